"""In the chapters' code, names of the package lead to its pages.

``sphinx-codeautolink`` reads the cells of a chapter as one program, and knows what its names stand
for. Here it is told of the cells that the page leaves out, which import them; and variables, which
it would link to their types, stay plain: a link has the name of what it leads to.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.typing import ExtensionMetadata
from sphinx_codeautolink.extension.directive import PrefaceMarker


def _tell_of_hidden_cells(app: Sphinx, doctree: nodes.document) -> None:
    path = Path(app.env.doc2path(app.env.docname))
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        hidden = [cell.source for cell in cells if "remove-cell" in cell.metadata.get("tags", ())]
        doctree.insert(0, PrefaceMarker("\n".join(hidden), "file"))


def _leave_variables_plain(app: Sphinx, env: BuildEnvironment) -> None:
    for transforms in env.sphinx_codeautolink_transforms.values():  # type: ignore[attr-defined]
        for transform in transforms:
            transform.names = [
                name
                for name in transform.names
                if name.code_str.split(".")[-1] == name.resolved_location.split(".")[-1]
            ]


def setup(app: Sphinx) -> ExtensionMetadata:
    app.setup_extension("sphinx_codeautolink")
    app.connect("doctree-read", _tell_of_hidden_cells, priority=480)  # it reads them at 490
    app.connect("env-updated", _leave_variables_plain, priority=600)  # once it knows what they are
    return {"parallel_read_safe": True, "parallel_write_safe": True}
