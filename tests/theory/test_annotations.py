"""Annotations of shapes that are not true are found, by the check that `typechecks` describes."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
import typechecks
from jaxtyping import Float
from torch import Tensor


def doubled(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    return 2 * x


def summed(x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    return x.sum(-1, keepdim=True)


def test_what_is_not_true_fails() -> None:
    checked = jaxtyping.jaxtyped(typechecker=typechecks.checked)
    ones = torch.ones(3, 4)
    checked(doubled)(ones)
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(summed)(ones)
