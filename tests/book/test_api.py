"""What the book's pages on the package make of docstrings."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from conftest import ROOT
from sphinx.util.inventory import InventoryFile

import api

PAGES = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "api").glob("*.rst"))
SHOWN = re.findall(r"^\.\. automodule:: (lorapower\.\S+)$", PAGES, re.MULTILINE)


def test_every_module_of_the_package_has_a_place() -> None:
    top = {path.stem for path in (ROOT / "lorapower").iterdir() if not path.name.startswith("_")}
    assert {name.split(".")[1] for name in SHOWN} == top - {"py"}
    assert len(SHOWN) == len(set(SHOWN))
    listed = set(
        re.findall(r"^   ([\w.]+)$", (ROOT / "api" / "index.rst").read_text(), re.MULTILINE)
    )
    assert {name.split(".")[1] for name in SHOWN} == {name.split(".")[0] for name in listed}


def test_labels_become_links() -> None:
    text = api.link_labels("`pad` of ``x `y` z`` by [thm-partition], ``[a-b]``, [..., k].")
    assert text == "`pad` of ``x `y` z`` by [:prf:ref:`thm-partition`], ``[a-b]``, [..., k]."


def test_members_come_from_bases_without_an_entry(book: Path) -> None:
    with (book / "objects.inv").open("rb") as file:
        entries = InventoryFile.load(file, "", posixpath.join)
    methods, data = entries["py:method"], entries["py:data"]
    assert {f"lorapower.networks.FNN.{name}" for name in ("__call__", "random")} <= {*methods}
    assert "lorapower.networks.FNN.depth" in entries["py:property"]
    # The first is said at the base, which has an entry; the second has no docstring of its own.
    assert not {f"lorapower.networks.FNN.{name}" for name in ("map", "with_parameters")} & {
        name for name, (*_, place, _) in methods.items() if "FNN" in place
    }
    assert "lorapower.book.WIDEST" in data
