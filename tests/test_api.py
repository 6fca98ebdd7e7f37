"""What the book's pages on the package make of docstrings."""

from __future__ import annotations

import inspect
import re

from conftest import ROOT

import api
import lorapower
from lorapower import bounds, networks
from lorapower.networks import FNN, base

PAGES = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "api").glob("*.rst"))
SHOWN = re.findall(r"^\.\. package:: (\S+)$", PAGES, re.MULTILINE)


def test_every_module_of_the_package_has_a_place() -> None:
    top = {path.stem for path in (ROOT / "lorapower").iterdir() if not path.name.startswith("_")}
    assert {name.split(".")[1] for name in SHOWN} == top - {"py"}
    assert len(SHOWN) == len(set(SHOWN))
    listed = set(
        re.findall(r"^   ([\w.]+)$", (ROOT / "api" / "index.rst").read_text(), re.MULTILINE)
    )
    assert {name.split(".")[1] for name in SHOWN} == {name.split(".")[0] for name in listed}


def test_names_become_links_or_code() -> None:
    text = api.linked(
        "`pad` and `FNN.random` of ``x `y` z``, `given`, `torch.nn.Linear`, `nowhere`, "
        "`bounds.fnn_error` by [thm-partition], ``[a-b]``.",
        [networks],
        {"given"},
    )
    assert text == (
        ":py:obj:`pad <lorapower.networks.fnn.pad>` and "
        ":py:obj:`FNN.random <lorapower.networks.fnn.FNN.random>` of ``x `y` z``, ``given``, "
        "``torch.nn.Linear``, `nowhere`, :py:obj:`bounds.fnn_error <lorapower.bounds.fnn_error>` "
        "by [:prf:ref:`thm-partition`], ``[a-b]``."
    )


def test_public_is_what_all_lists() -> None:
    for package in (bounds, lorapower):
        listed = {n for n in package.__all__ if not inspect.ismodule(getattr(package, n))}
        assert {*api.public(package)} == listed
    assert "Layers" in api.public(base)
    assert not {"Tensor", "N", "_checks"} & {*api.public(base)}


def test_members_come_from_bases_without_an_entry() -> None:
    found = api.members(FNN, networks)
    assert {"__call__", "random", "depth"} <= {*found}
    # The first is said at the base, which has an entry; the second has no docstring of its own.
    assert not {"map", "with_parameters"} & {*found}
