"""Mathematics without a network: MathJax is copied into the book.

Of the distribution that the package ``sphinx-mathjax-offline`` carries, only the files that a
browser asks for are copied: the bundle, its fonts, and the TeX extensions that it loads on demand.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.fileutil import copy_asset
from sphinx.util.typing import ExtensionMetadata

_BUNDLE = "tex-chtml.js"
_PARTS = (_BUNDLE, "output/chtml/fonts/woff-v2", "input/tex/extensions")


def _point_to_copy(app: Sphinx, config: Config) -> None:
    config["mathjax_path"] = f"mathjax/{_BUNDLE}"


def _copy(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    package = import_module("sphinx-mathjax-offline")  # no name that `import` would take
    source = Path(package.__path__[0]) / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    for part in _PARTS:
        # copy_asset puts a file into the folder that it is given, and a folder's content into it.
        copy_asset(source / part, target if part == _BUNDLE else target / part)


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("config-inited", _point_to_copy)
    app.connect("build-finished", _copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
