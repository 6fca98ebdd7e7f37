"""The annotations of the package are true, those of shapes too, and untrue ones are found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import jaxtyping
import pytest
import torch
import typechecks
from jaxtyping import Float
from torch import Tensor

from lorapower import lowrank

# Together they call most of what has annotations of shapes.
FILES = ["adapters", "bounds", "claims", "figures", "lowrank", "networks", "regions"]
ONES = torch.ones(3, 4)


def doubled(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    return 2 * x


def summed(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    return x.sum(-1, keepdim=True)


def first(ranks: Sequence[int]) -> int:
    return ranks[0]


def test_what_is_not_true_fails() -> None:
    checked = jaxtyping.jaxtyped(typechecker=typechecks.checked)
    checked(doubled)(ONES)
    checked(first)([1, 2])
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(summed)(ONES)
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(first)(torch.ones(3, dtype=torch.int64))  # type: ignore[arg-type]


@pytest.mark.skipif(not typechecks.installed, reason="annotations have a run of their own")
def test_the_package_is_checked() -> None:
    for module in typechecks.modules():
        import_module(module)
    with pytest.raises(jaxtyping.TypeCheckError):
        lowrank.spectrum([[1.0]])  # type: ignore[arg-type]


@pytest.mark.programs
@pytest.mark.sources("lorapower/**/*.py", "tests/*.py")
@pytest.mark.skipif(typechecks.installed, reason="this is that run")
def test_the_annotations_of_the_package_are_true() -> None:
    tests = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "typechecks"]
        + [str(tests / f"test_{name}.py") for name in ["annotations", *FILES]],
        cwd=tests.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr
    # Nothing was checked where the one test that only that run has was left out.
    assert "annotations have a run of their own" not in run.stdout
