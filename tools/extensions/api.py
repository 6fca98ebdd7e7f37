"""What autodoc and Napoleon leave to be done on the package's pages.

A page on a module begins with a table of what it offers. In docstrings, a name in single backticks
leads to what it is the end of the name of, and a label in brackets to the book's statement.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any, cast

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.ext.autodoc import DataDocumenter, GenericAliasMixin
from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import NumpyDocstring
from sphinx.util.inspect import stringify_signature
from sphinx.util.nodes import make_refnode

import lorapower

PACKAGES = ("lorapower.", "loraplan.")
_NUMPYDOC: Any = Config(napoleon_use_ivar=True)
_NAME = re.compile(r"\"[^\"]*\"|'[^']*'|[A-Za-z_]\w*")
_TYPE = re.compile(r"^(:(?:type|vartype) [^:]*: )(.*)$", re.MULTILINE)
_LABEL = re.compile(r"(``.+?``(?!`))|\[([a-z]+-[a-z-]+)\]", re.DOTALL)


def public(module: Any) -> list[str]:
    """The functions and classes that a module offers."""
    if names := getattr(module, "__all__", None):
        return [name for name in names if _place(getattr(module, name))]
    places = {name: _place(value) for name, value in vars(module).items() if name[0] != "_"}
    return [name for name, place in places.items() if place == f"{module.__name__}.{name}"]


def _place(value: Any) -> str:
    """Where a function or a class is defined."""
    code = inspect.unwrap(value)
    is_code = inspect.isclass(code) or inspect.isfunction(code) or inspect.ismethod(code)
    return f"{code.__module__}.{code.__qualname__}" if is_code else ""


def link_labels(text: str) -> str:
    """Labels of statements in brackets as references."""
    return _LABEL.sub(lambda found: found[1] or f"[:prf:ref:`{found[2]}`]", text)


def _qualify(annotation: Any, module: str) -> str:
    """A type as `module` has it, classes of this package in full; "" for one made at run time."""
    if not isinstance(annotation, str):
        return ""

    def replace(found: re.Match[str]) -> str:
        place = _place(getattr(sys.modules[module], found[0], None))
        return f"~{place}" if place.startswith(PACKAGES) else found[0]

    return _NAME.sub(replace, annotation)


def _process_docstring(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    text = "\n".join(lines)
    if inspect.isclass(value) or inspect.isroutine(value):  # others it takes for types
        text = str(NumpyDocstring(lines, _NUMPYDOC, app, what))
        text = _TYPE.sub(lambda found: found[1] + _qualify(found[2], value.__module__), text)
    lines[:] = link_labels(text).split("\n")
    if what == "module" and value is not lorapower:
        lines += ["", ".. autosummary::", "   :nosignatures:", ""]
        lines += [*(f"   {each}" for each in public(value)), ""]


def _process_signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, given: str, returned: str
) -> tuple[str, str] | None:
    """Types as the source has them: it knows aliases that Python resolves."""
    if not given:
        return None
    signature, module = inspect.signature(value), value.__module__
    shown = [
        each.replace(annotation=_qualify(each.annotation, module) or each.empty)
        for each in signature.parameters.values()
        if each.name != "self"
    ]
    text = stringify_signature(signature.replace(parameters=shown), show_return_annotation=False)
    text = text.replace("<factory>", "...")  # of a dataclass: Sphinx reads no signature with it
    return text, "" if inspect.isclass(value) else _qualify(signature.return_annotation, module)


def _skip_member(
    app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out fields of named tuples: Python writes their docstrings, classes describe them."""
    return (value.__doc__ or "").startswith("Alias for field") or None


def _call_attributes(app: Sphinx, doctree: nodes.document) -> None:
    """Let attributes of a class be called what the docstring calls them."""
    for name in doctree.findall(nodes.field_name):
        if name.astext() == "Variables":
            name[:] = [nodes.Text("Attributes")]


class Constant(DataDocumenter):
    """A constant by its comment, without what a type is an alias of: the comment says it."""

    def update_content(self, more_content: StringList) -> None:
        super(GenericAliasMixin, self).update_content(more_content)


def _resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element
) -> nodes.Element | None:
    """The end of a name is enough; other libraries' names are no links."""
    if node["refdomain"] != "py":
        return None
    name, domain = node["reftarget"], cast(PythonDomain, env.get_domain("py"))
    ends = dict(domain.find_obj(env, "", "", name, None, 1))
    if shortest := min(ends, key=lambda end: end.count("."), default=None):
        entry = ends[shortest]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode)
    library = name.partition(".")[0] if "." in name else ""
    return contnode if node["reftype"] == "class" or library in sys.modules else None


def setup(app: Sphinx) -> None:
    app.setup_extension("sphinx.ext.autosummary")
    app.add_autodocumenter(Constant, override=True)
    app.connect("autodoc-process-docstring", _process_docstring)
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("autodoc-skip-member", _skip_member)
    app.connect("doctree-read", _call_attributes)
    app.connect("missing-reference", _resolve)
