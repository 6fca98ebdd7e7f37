"""Tensors, arrays and lists: which are taken, what is said of others, whose numbers they are."""

from __future__ import annotations

import pickle
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorapower import InputError, _checks
from lorapower.errors import LONGEST
from lorapower.networks import FNN, LinearNetwork, Transformer
from lorapower.regions import Ball, Box, Samples
from lorapower.training import Fixed


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will give them up
        return torch.quantize_per_tensor(torch.ones(2, 2), 1.0, 0, torch.quint8)


LOOP: list[Any] = []
LOOP.append(LOOP)

UNUSABLE: dict[str, Any] = {
    "float16": torch.ones(2, 2).half(),
    "complex": torch.ones(2, 2) + 1j,
    "integers": torch.ones(2, 2).long(),
    "truth values": torch.ones(2, 2).bool(),
    "quantized": quantized(),
    "meta": torch.ones(2, 2, device="meta"),
    "sparse": torch.eye(2).to_sparse(),
    "integer lists": [[1, 2], [3, 4]],
    "float16 array": np.ones((2, 2), np.float16),
    "objects": np.array([[None]], object),
    "texts": [["a"]],
    "ragged": [[1.0], [1.0, 2.0]],
    "huge": [[10**400]],
    "without a repr": Unprintable(),
    "endless": LOOP,
    "a mapping": {"a": 1.0},
    "nothing": None,
    "list of gradients": [torch.ones(2, requires_grad=True)],
    "NaN": [[0.0, np.nan, np.inf]],
    "too few dimensions": [1.0],
    "no columns": torch.ones(3, 2, 0),
}


@pytest.mark.parametrize("value", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_values_are_told_in_a_line(value: Any) -> None:
    with pytest.raises(InputError) as caught:
        _checks.real_tensor("it", value, min_dims=2)
    assert caught.value.name == "it"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [">f8", "<f8", ">f4", "<f4"])
def test_arrays_of_any_order_and_strides(dtype: str) -> None:
    array = np.arange(12.0).reshape(3, 4).astype(dtype)
    array.setflags(write=False)
    for view in (array, array.T, array[::-1, ::2]):
        assert _checks.real_tensor("it", view, min_dims=2).tolist() == view.tolist()


@given(st.integers(LONGEST // 2, 20 * LONGEST), st.integers(1, 5))
def test_messages_are_bounded_lines(length: int, lines: int) -> None:
    ragged = [[0.0] * length, *[[1.0]] * lines]
    with pytest.raises(InputError):
        _checks.real_tensor("it", ragged, min_dims=2)
    for long in ("a" * length, "a\n" * length, "a " * length):
        message = str(InputError(long, allowed=long, given=long, remedy=long))
        assert len(message) <= 4 * LONGEST + len(" must be ; got : ")
        assert "\n" not in message
    for value in (ragged, torch.ones(lines, length), 10**length * 10**4400, Unprintable()):
        message = str(InputError("it", allowed="short", value=value))
        assert len(message) <= len("it must be short; got ") + LONGEST
        assert "\n" not in message


@pytest.mark.parametrize(
    ("check", "value", "result"),
    [
        (_checks.positive, 10**400, None),
        (_checks.positive, Fraction(1, 10**400), None),
        (_checks.tolerance, -(10**400), None),
        (_checks.positive, True, None),
        (_checks.positive, np.float32(2), 2.0),
        (_checks.positive, Fraction(1, 2), 0.5),
        (_checks.positive, float("nan"), None),
        (_checks.tolerance, 10**400, None),
        (_checks.tolerance, float("inf"), float("inf")),
        (_checks.tolerance, float("nan"), None),
        (_checks.tolerance, "0", None),
    ],
)
def test_numbers_of_all_sizes(check: Any, value: Any, result: float | None) -> None:
    if result is None:
        with pytest.raises(InputError, match=r"^it must be a"):
            check("it", value)
    else:
        assert check("it", value) == result


MADE: dict[str, Any] = {
    "LinearNetwork": lambda a: LinearNetwork([a(2, 2), a(3, 2)]),
    "stacked": lambda a: LinearNetwork(a(3, 2, 2)),
    "FNN": lambda a: FNN(a(3, 2, 2), a(3, 2)),
    "Transformer": lambda a: Transformer(
        **{name: a(1, 1, 2, 2) for name in ("W_Q", "W_K", "W_V", "W_O")},
        **{"W_1": a(1, 2, 2), "b_1": a(1, 2), "W_2": a(1, 2, 2), "b_2": a(1, 2)},
        W_out=a(2, 2),
    ),
    "Ball": lambda a: Ball(a(3), a(3, 2)),
    "Box": lambda a: Box(-a(2), a(2)),
    "Samples": lambda a: Samples(a(2, 3)),
    "Fixed": lambda a: Fixed((a(2, 3), a(2, 3)), (a(2, 3), a(2, 3))),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@pytest.mark.parametrize("kind", [np.ones, torch.ones])
def test_what_is_made_has_numbers_of_its_own(make: Any, kind: Any) -> None:
    given = []

    def made(*shape: int) -> Any:
        given.append(kind(shape))
        return given[-1]

    result = make(made)
    before = pickle.dumps(result)
    for part in given:
        part *= 2
    assert pickle.dumps(result) == before


def test_no_gradients_flow_into_a_network() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    x = torch.ones(2, 3, requires_grad=True)
    network = LinearNetwork([weight])
    assert not network.weights[0].requires_grad
    assert not network(x).requires_grad
