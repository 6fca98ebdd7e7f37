"""Arrays that are read and copied, errors, random streams and the check of annotated shapes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
import typechecks
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float
from strategies import seeds
from torch import Tensor

from lorapower import InputError, _checks, randomness
from lorapower.errors import LONGEST, LorapowerError, PrecisionError, ResultsError, SingularError
from lorapower.networks import FNN, LinearNetwork, Transformer
from lorapower.regions import Ball, Box, Samples
from lorapower.training import Fixed


@pytest.mark.parametrize("dtype", [">f8", "<f8", ">f4", "<f4"])
def test_arrays_of_any_order_and_strides_are_read(dtype: str) -> None:
    array = np.arange(12.0).reshape(3, 4).astype(dtype)
    array.setflags(write=False)
    for view in (array, array.T, array[::-1, ::2]):
        assert _checks.real_tensor("it", view, min_dims=2).tolist() == view.tolist()


@given(st.integers(LONGEST // 2, 20 * LONGEST), st.integers(1, 5))
def test_messages_are_single_lines_of_bounded_length(length: int, lines: int) -> None:
    for long in ("a" * length, "a\n" * length, "a " * length):
        message = str(InputError(long, allowed=long, given=long, remedy=long))
        assert len(message) <= 4 * LONGEST + len(" must be ; got : ")
        assert "\n" not in message
    assert str(InputError("it", allowed="short", value="a")) == "it must be short; got 'a'"
    for value in ([[0.0] * length, *[[1.0]] * lines], torch.ones(lines, length)):
        message = str(InputError("it", allowed="short", value=value))
        assert len(message) <= len("it must be short; got ") + LONGEST
        assert "\n" not in message


@pytest.mark.parametrize(
    "error",
    [
        InputError("it", allowed="short", value=[1], remedy="shorten it"),
        SingularError(2, 1e9, 0.1, 1e8, " of batch member 1"),
        PrecisionError(1, 12.0, limit=8.0, dtype=torch.float64),
        ResultsError(Path("runs"), "is torn", remedy="mend it"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_processes(error: LorapowerError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


MADE: dict[str, Any] = {
    "LinearNetwork": lambda a: LinearNetwork([a(2, 2), a(3, 2)]),
    "stacked": lambda a: LinearNetwork(a(3, 2, 2)),
    "FNN": lambda a: FNN(a(3, 2, 2), a(3, 2)),
    "Transformer": lambda a: Transformer(
        {name: a(1, 1, 2, 2) for name in ("W_Q", "W_K", "W_V", "W_O")}
        | {"W_1": a(1, 2, 2), "b_1": a(1, 2), "W_2": a(1, 2, 2), "b_2": a(1, 2)}
    ),
    "Ball": lambda a: Ball(a(3), a(3, 2)),
    "Box": lambda a: Box(-a(2), a(2)),
    "Samples": lambda a: Samples(a(2, 3)),
    "Fixed": lambda a: Fixed((a(2, 3), a(2, 3)), (a(2, 3), a(2, 3))),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@pytest.mark.parametrize("kind", [np.ones, torch.ones])
def test_objects_copy_the_numbers_that_they_are_given(make: Any, kind: Any) -> None:
    given = []

    def made(*shape: int) -> Any:
        given.append(kind(shape))
        return given[-1]

    result = make(made)
    before = pickle.dumps(result)
    for part in given:
        part *= 2
    assert pickle.dumps(result) == before


purposes = st.lists(st.one_of(st.text(max_size=5), st.integers(0, 9)), max_size=3).map(tuple)


@given(seeds, purposes, seeds, purposes)
def test_equal_numbers_only_for_equal_seed_and_purpose(
    seed: int, purpose: tuple[Any, ...], other_seed: int, other: tuple[Any, ...]
) -> None:
    same = (seed, purpose) == (other_seed, other)
    one, two = (
        torch.rand(8, generator=randomness.generator(s, *p))
        for s, p in ((seed, purpose), (other_seed, other))
    )
    assert torch.equal(one, two) == same
    assert torch.equal(one, torch.rand(8, generator=randomness.generator(seed, *purpose)))


def test_all_bits_of_seeds_count() -> None:
    one, two = (torch.rand(8, generator=randomness.generator(s)) for s in (5, 5 + 2**32))
    assert not torch.equal(one, two)
    numbers = {randomness.number(seed, "x") for seed in range(100)}
    assert len(numbers) == 100
    assert all(0 <= value < 2**32 for value in numbers)


def test_seeded_leaves_the_global_numbers_as_they_were() -> None:
    before = torch.get_rng_state()
    with randomness.seeded(1, "module"):
        inside = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(inside, torch.rand(4, generator=randomness.generator(1, "module")))
    with pytest.raises(ZeroDivisionError), randomness.seeded(1, "module"):
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


def test_annotations_that_are_not_true_fail() -> None:
    @jaxtyping.jaxtyped(typechecker=typechecks.checked)
    def summed(x: Float[Tensor, "*batch n"], keep: bool) -> Float[Tensor, "*batch n"]:
        return 2 * x if keep else x.sum(-1, keepdim=True)

    summed(torch.ones(3, 4), True)
    with pytest.raises(jaxtyping.TypeCheckError):
        summed(torch.ones(3, 4), False)
