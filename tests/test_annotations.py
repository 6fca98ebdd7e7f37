"""The annotations of the package are true, and untrue ones are found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import typechecks
from jaxtyping import Float
from torch import Tensor

from lorapower import InputError, lowrank
from lorapower.networks import FNN

checked = jaxtyping.jaxtyped(typechecker=typechecks.checked)
ONES = torch.ones(3, 4)


@checked
def doubled(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    return 2 * x


@checked
def summed(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    return x.sum(-1, keepdim=True)


@checked
def added(x: Float[Tensor, "*batch n"], y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    return x + y


@checked
def first(ranks: Sequence[int]) -> int:
    return ranks[0]


@checked
def refuses(x: Float[Tensor, " n"]) -> int:
    raise InputError("x", allowed="another", given=x)


def test_what_is_true_passes() -> None:
    doubled(ONES)
    added(ONES, ONES)
    first([1, 2])


@pytest.mark.parametrize(
    "lie",
    [
        lambda: summed(ONES),
        lambda: added(ONES, ONES[0]),
        lambda: first(torch.ones(3, dtype=torch.int64)),  # type: ignore[arg-type]
    ],
)
def test_what_is_not_true_fails(lie: Any) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        lie()


def test_a_function_may_refuse_what_its_annotations_exclude() -> None:
    with pytest.raises(InputError, match="x must be another"):
        refuses("text")  # type: ignore[arg-type]


@pytest.mark.skipif(not typechecks.installed, reason="annotations have a run of their own")
def test_the_package_is_checked() -> None:
    expected = {"lorapower.lowrank", "lorapower.networks.fnn", "lorapower.book.figures.curves"}
    assert expected <= {*typechecks.modules()}
    for module in typechecks.modules():
        import_module(module)
    network = FNN.random(2, 3)
    for function in (lowrank.spectrum, FNN.preactivations, type(network).random.__func__):  # type: ignore[attr-defined]
        assert function.__code__.co_filename == jaxtyping.jaxtyped.__code__.co_filename
    with pytest.raises(jaxtyping.TypeCheckError):
        lowrank.spectrum([[1.0]])  # type: ignore[arg-type]


# Together they call all that has annotations of shapes, and take half a minute.
FILES = ["adapters", "annotations", "bounds", "claims", "devices", "empty", "figures", "lowrank"]
FILES += ["networks", "objects", "regions"]


@pytest.mark.programs
@pytest.mark.sources("lorapower/**/*.py", "tests/*.py")
@pytest.mark.skipif(typechecks.installed, reason="this is that run")
def test_the_annotations_of_the_package_are_true() -> None:
    tests = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "typechecks"]
        + [str(tests / f"test_{name}.py") for name in FILES],
        cwd=tests.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr
    # Nothing was checked where the one test that only that run has was left out.
    assert "annotations have a run of their own" not in run.stdout
