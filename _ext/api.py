"""What autodoc and Napoleon leave to be done on the package's pages.

A page on a module begins with a table of what it offers. In docstrings, a name in single backticks
leads to what it is the end of the name of, and a label in brackets to the book's statement.
"""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pkgutil import walk_packages
from pydoc import locate
from typing import Any, cast

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.domains.python._object import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.ext.autodoc import GenericAliasMixin
from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import NumpyDocstring
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.inspect import stringify_signature
from sphinx.util.nodes import make_refnode

import lorapower

PACKAGE = f"{lorapower.__name__}."
_NUMPYDOC: Any = Config(napoleon_use_ivar=True)
_NAME = re.compile(r"\"[^\"]*\"|'[^']*'|[A-Za-z_]\w*")
_TYPE = re.compile(r"^(:(?:type|vartype) [^:]*: )(.*)$", re.MULTILINE)
_LABEL = re.compile(r"(``.+?``(?!`))|\[([a-z]+-[a-z-]+)\]", re.DOTALL)


def public(module: Any) -> list[str]:
    """The functions and classes that a module offers."""
    if names := getattr(module, "__all__", None):
        return [name for name in names if _place(getattr(module, name))]
    places = {name: _place(value) for name, value in vars(module).items() if name[0] != "_"}
    return [name for name, place in places.items() if place.startswith(f"{module.__name__}.")]


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
        return f"~{place}" if place.startswith(PACKAGE) else found[0]

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


def _comment_constants(app: Sphinx) -> None:
    """Let packages have the comments on constants that they offer from their modules."""
    for module in walk_packages(lorapower.__path__, PACKAGE):
        package = module.name.rpartition(".")[0]
        offered = getattr(import_module(package), "__all__", ())
        comments = ModuleAnalyzer.for_module(module.name).find_attr_docs()
        ModuleAnalyzer.for_module(package).find_attr_docs().update(
            {key: text for key, text in comments.items() if not key[0] and key[1] in offered}
        )


def _name_as_defined(app: Sphinx, env: BuildEnvironment) -> None:
    """Let what a package offers from its modules be found by its name there as well."""
    objects = cast(PythonDomain, env.get_domain("py")).objects
    for name, entry in list(objects.items()):
        holder, last = locate(name.rpartition(".")[0]), name.rpartition(".")[2]
        in_class = f"{_place(holder)}.{last}" if inspect.isclass(holder) else ""
        if place := in_class or _place(locate(name)):
            objects.setdefault(place, entry._replace(aliased=True))


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


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("sphinx.ext.autosummary")
    delattr(GenericAliasMixin, "update_content")  # it repeats values, comments say what they are
    variables = next(field for field in PyObject.doc_field_types if field.name == "variable")
    variables.label = "Attributes"
    app.connect("builder-inited", _comment_constants)
    app.connect("autodoc-process-docstring", _process_docstring)
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("autodoc-skip-member", _skip_member)
    app.connect("env-updated", _name_as_defined, priority=400)
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
