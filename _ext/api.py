"""The directive ``package``: what a module offers, from its docstrings.

A table of its public names, and each of them with its signature and its docstring. Public is what
``__all__`` lists or, without it, what the module defines under a name without an underscore; of its
constants those with a comment that begins with ``#:``.

Docstrings are numpydoc, for Napoleon to read. Names of the package in single backticks and labels
of the book's statements in brackets become links.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache, cached_property
from importlib import import_module
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, cast

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import desc_sig_literal_string, pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.domains.python._object import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature
from sphinx.util.nodes import nested_parse_with_titles
from sphinx.util.typing import ExtensionMetadata

PACKAGE = "lorapower"
_SPECIAL = ("__call__", "__getitem__")
_DESCRIPTORS = (property, cached_property, classmethod, staticmethod)
_NAME = re.compile(r"\"[^\"]*\"|'[^']*'|(?P<name>[A-Za-z_][\w.]*)")
_TYPE = re.compile(r"^(:(?:type|vartype) [^:]*: )(.*)$", re.MULTILINE)
_MARKUP = re.compile(r"``.+?``(?!`)|`(?P<name>[^`]+)`|\[(?P<label>[a-z]+-[a-z-]+)\]", re.DOTALL)


@cache
def public(module: ModuleType) -> dict[str, object]:
    """What a module offers, by name; other modules are not among it."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and _is_code(value) and value.__module__ == module.__name__
    ]
    found = {name: getattr(module, name) for name in [*names, *comments(module)]}
    return {name: value for name, value in found.items() if not inspect.ismodule(value)}


@cache
def comments(module: ModuleType) -> dict[str, list[str]]:
    """Lines about the constants that a module defines, or that a package has from its modules."""
    found: dict[str, list[str]] = {}
    for name in sorted(sys.modules):
        if f"{name}.".startswith(f"{module.__name__}."):
            documented = ModuleAnalyzer.for_module(name).find_attr_docs()
            found |= {own: text for (scope, own), text in documented.items() if not scope}
    return {name: text for name, text in found.items() if name in vars(module)}


def members(kind: type, module: ModuleType) -> list[str]:
    """Methods and properties with a docstring of their own, also of bases without an entry.

    What overrides a method without a word is said at the one that it overrides.
    """
    found: dict[str, object] = {}
    for base in kind.__mro__:
        if base is not kind and (base in public(module).values() or not _is_ours(base)):
            break
        found = vars(base) | found
    return [
        name
        for name, value in found.items()
        if (not name.startswith("_") or name in _SPECIAL)
        and (isinstance(value, _DESCRIPTORS) or inspect.isfunction(value))
        and value.__doc__
    ]


def full_name(path: str, scope: Any) -> str | None:
    """The name, from its module on, of what ``path`` leads to from a class or module ``scope``."""
    for part in path.split("."):
        holder, scope = scope, getattr(scope, part, None)
        if scope is None:
            return None
    return _own_name(scope) or f"{_own_name(holder)}.{part}"


def _own_name(value: Any) -> str | None:
    if inspect.ismodule(value):
        return value.__name__
    return f"{value.__module__}.{value.__qualname__}" if _is_code(value) else None


def _is_code(value: Any) -> bool:
    return inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value))


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith(f"{PACKAGE}.") and "._" not in kind.__module__


def linked(text: str, scopes: list[object], own: set[str]) -> str:
    """Names in backticks that lead somewhere from one of `scopes`, and labels, as references.

    Names of the text's own parameters, and of other packages, become code. What leads nowhere stays
    as it is, for Sphinx to complain of.
    """

    def replaced(found: re.Match[str]) -> str:
        name, label = found["name"], found["label"]
        if label:
            return f"[:prf:ref:`{label}`]"
        if name is None:
            return found[0]
        if name in own:
            return f"``{name}``"
        target = next(filter(None, (full_name(name, scope) for scope in scopes)), None)
        target = target or _imported(name)
        if target is None:
            return found[0]
        return f":py:obj:`{name} <{target}>`" if target.startswith(PACKAGE) else f"``{name}``"

    return _MARKUP.sub(replaced, text)


def _imported(name: str) -> str | None:
    for path in (f"{PACKAGE}.{name}", name):
        with contextlib.suppress(ImportError, AttributeError, ValueError):
            resolve_name(path)
            return path
    return None


def _parameters(code: Any) -> set[str]:
    try:
        return {*inspect.signature(code).parameters, *getattr(code, "__annotations__", ())}
    except (TypeError, ValueError):
        return set()


def process_docstring(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    text = "\n".join(lines)
    if what == "module":
        scopes, own = [obj, sys.modules[obj.__package__]], set[str]()
    else:
        code = getattr(obj, "fget", None) or getattr(obj, "func", obj)
        holder = resolve_name(name.rpartition(".")[0])
        home = sys.modules[code.__module__]
        scopes = [code, holder, home, sys.modules[home.__package__ or home.__name__]]
        own = _parameters(code)
        text = _TYPE.sub(lambda found: found[1] + _type(found[2], code), text)
    lines[:] = linked(text, scopes, own).split("\n")


class Package(SphinxDirective):
    """What the module that is named offers: a table, then each with its docstring."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module = import_module(self.arguments[0])
        section = nodes.section()
        section.document = self.state.document
        lines = StringList(list(self._lines(module)), source=self.env.docname)
        nested_parse_with_titles(self.state, lines, section)
        _show_sizes(section)
        self._name_as_defined(module)
        return section.children

    def _lines(self, module: ModuleType) -> Iterator[str]:
        offered, about = public(module), comments(module)
        yield from (f".. automodule:: {module.__name__}", "")
        if code := [name for name, value in offered.items() if _is_code(value)]:
            yield from (".. autosummary::", "   :nosignatures:", "")
            yield from (f"   {name}" for name in code)
            yield ""
        for name, value in offered.items():
            if not _is_code(value):
                yield from (f".. py:data:: {name}", "")
                text = linked("\n".join(about.get(name, ())), [module], set())
                yield from (f"   {line}" for line in text.split("\n"))
            elif inspect.isclass(value):
                kind = "exception" if issubclass(value, BaseException) else "class"
                yield f".. auto{kind}:: {name}"
                if shown := ", ".join(members(value, module)):
                    yield from (f"   :members: {shown}", f"   :special-members: {shown}")
            else:
                yield f".. autofunction:: {name}"
            yield ""

    def _name_as_defined(self, module: ModuleType) -> None:
        """Let what is imported from another module be found by its name there as well."""
        domain = cast(PythonDomain, self.env.get_domain("py"))
        for name in public(module):
            here, there = f"{module.__name__}.{name}", full_name(name, module)
            for entry, about in list(domain.objects.items()):
                other = f"{there}{entry.removeprefix(here)}"
                if f"{entry}.".startswith(f"{here}.") and other not in domain.objects:
                    domain.note_object(other, about.objtype, about.node_id, aliased=True)


def _process_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, given: str, returned: str
) -> tuple[str, str] | None:
    """The signature with types as the source has them, which knows aliases that Python undoes."""
    if not given:
        return None
    found = inspect.signature(obj)
    shown = [_shown(each, obj) for each in found.parameters.values() if each.name != "self"]
    text = stringify_signature(found.replace(parameters=shown), show_return_annotation=False)
    return text, "" if inspect.isclass(obj) else _type(found.return_annotation, obj)


def _shown(parameter: inspect.Parameter, code: Any) -> inspect.Parameter:
    default = parameter.default
    if default is not parameter.empty and len(repr(default)) > 40:
        default = _Long()
    annotation = _type(parameter.annotation, code) or parameter.empty
    return parameter.replace(annotation=annotation, default=default)


class _Long:
    """Stands for a default value that takes too long to say."""

    def __repr__(self) -> str:
        return "..."


def _type(annotation: object, code: Any) -> str:
    """A type as it is written, its names from this package in full; none for one made at run time.

    The fields of validated records have such types; their docstrings say more.
    """
    home = sys.modules[code.__module__]

    def replaced(found: re.Match[str]) -> str:
        target = full_name(found[0], home) if found["name"] else None
        return f"~{target}" if target and target.startswith(PACKAGE) else found[0]

    return _NAME.sub(replaced, annotation) if isinstance(annotation, str) else ""


def _show_sizes(section: nodes.Element) -> None:
    """In signatures, let ``Float[Tensor, '*batch out in']`` be ``Float[..., out, in]``."""
    for literal in [*section.findall(desc_sig_literal_string)]:
        parent, place = literal.parent, literal.parent.index(literal)
        if "".join(node.astext() for node in parent[place - 4 : place]) == "[Tensor, ":
            sizes = literal.astext().strip("'").split()
            shown = ", ".join("..." if size.startswith("*") else size for size in sizes)
            literal[0] = nodes.Text(shown)
            del parent[place - 3 : place]


def _leave_unlinked(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element
) -> nodes.Element | None:
    """What exists but has no entry, and a type in a signature, is no link."""
    if node["refdomain"] != "py":
        return None
    return contnode if node["reftype"] == "class" or _imported(node["reftarget"]) else None


def setup(app: Sphinx) -> ExtensionMetadata:
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.autosummary")
    app.setup_extension("sphinx.ext.napoleon")
    variables = next(field for field in PyObject.doc_field_types if field.name == "variable")
    variables.label = "Attributes"
    app.add_directive("package", Package)
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("missing-reference", _leave_unlinked)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
