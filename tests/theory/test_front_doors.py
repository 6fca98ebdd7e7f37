"""The functions and classes that users call refuse what they cannot use: one line, before any work.

Parameters of chapters are refused in `test_notebooks`, those of the command in `test_entry_points`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from lorapower import (
    InputError,
    LorapowerError,
    adapt,
    bounds,
    lowrank,
    rank_for_error,
    regression,
)
from lorapower.adapters import Adapters
from lorapower.checkpoints import Pair
from lorapower.constructions import fitted, fnn, fused, linear, transformer
from lorapower.errors import LONGEST
from lorapower.networks import FNN, Gap, LinearNetwork, Partition, Transformer, as_network
from lorapower.regions import Ball, Box, Samples
from lorapower.training import Fixed, Fresh, Tuning, polish, train, train_fused

X = torch.ones(3, 4).double() + torch.eye(3, 4)
LINEAR: dict[str, Any] = {
    "frozen": LinearNetwork.random(2, 3),
    "target": LinearNetwork.random(1, 3, seed=1),
}
RELU: dict[str, Any] = {"frozen": FNN.random(2, 3), "target": FNN.random(1, 3, seed=1)}
HEADS: dict[str, Any] = {
    "frozen": Transformer.random(1, 3, 1),
    "target": Transformer.random(1, 3, 1, seed=1),
}
WIDER = FNN.random(1, 4)
DATA = Fresh(RELU["target"], (3,), samples=4)
FITTED = fitted.adapt(**RELU, ranks=1, inputs=X, held_out=2 * X, throw=False)
NAN = X * torch.nan
RANKS: list[Any] = [4, -1, True, None, "all", [1, 2, 3]]


class Door(NamedTuple):
    """A function, a call of it that succeeds, and by parameter what it refuses."""

    function: Callable[..., Any]
    valid: dict[str, Any]
    refused: Mapping[str, Sequence[Any]] = {}


DOORS = [
    Door(LinearNetwork, {"weights": [X]}, {"weights": [[], None, [X, X], [NAN], [X.half()], "w"]}),
    Door(
        LinearNetwork.random,
        {"depth": 1, "width": 2, "batch_shape": (), "seed": 0},
        {"depth": [0], "width": [2.5], "batch_shape": [(-1,)], "seed": [-1]},
    ),
    Door(
        FNN,
        {"weights": [X], "biases": [X[:, 0]]},
        {"weights": [None, [NAN]], "biases": [[], [X], [X[:, 0].float()], [X[0]]]},
    ),
    Door(FNN.random, {"depth": 1, "width": 2, "dtype": torch.float64}, {"dtype": [torch.half]}),
    Door(
        Transformer.random,
        {"depth": 1, "width": 2, "heads": 1, "scale": 1.0, "head_size": 2},
        {
            "heads": [0],
            "scale": [-1.0, np.nan],
            "head_size": [0],
            "gated": [True],
            "rotary": [100.0],
        },
    ),
    Door(
        Transformer.random,
        {"depth": 1, "width": 2, "heads": 2, "head_size": 2, "residual": True, "gated": True}
        | {"groups": 1, "rotary": 100.0},
        {"heads": [0], "groups": [0, 3], "rotary": [0.0], "gated": ["a"]},
    ),
    Door(RELU["frozen"].__call__, {"x": X}, {"x": [None, X[:2], X[0]]}),
    Door(as_network, {"value": [X]}),
    Door(
        linear.adapt,
        LINEAR | {"ranks": 1, "seed": 0, "rtol": 1.0, "throw": True},
        {"frozen": [None, RELU["frozen"]], "target": [LinearNetwork.random(1, 2)], "ranks": RANKS},
    ),
    Door(
        fnn.adapt,
        RELU | {"ranks": 1, "region": Ball(1.0), "partition": None, "throw": False},
        {"target": [WIDER], "ranks": RANKS, "region": [None, 2.0, Ball(1.0, [0.0, 0.0])]}
        | {"partition": ["uniform", Partition([1]), Partition([1, 1])]},
    ),
    Door(
        transformer.adapt,
        HEADS | {"ranks": 3, "seed": 0},
        {"target": [Transformer.random(2, 3, 1)], "ranks": [{"W_Q": 1}, 4, "all"]},
    ),
    Door(
        adapt,
        RELU | {"ranks": 1, "inputs": Ball(1.0), "throw": False},
        {"frozen": [None, "text"], "target": [LINEAR["target"]], "ranks": RANKS, "inputs": [None]},
    ),
    Door(
        rank_for_error,
        LINEAR | {"error": 0.5, "inputs": X},
        {"target": [None], "error": [-1.0, np.nan, "a"], "inputs": [None, NAN]},
    ),
    Door(
        fitted.adapt,
        RELU | {"ranks": 1, "inputs": X, "held_out": 2 * X, "metric": "alike", "throw": False},
        {"target": [HEADS["target"]], "ranks": RANKS, "inputs": [X[:, :1], NAN, None]}
        | {"held_out": [X, X[:2]], "metric": ["all"]},
    ),
    Door(fused.fuse, RELU | {"ranks": 1}, {"frozen": [None], "target": [WIDER], "ranks": [7]}),
    Door(
        polish,
        {"fitted": FITTED, "inputs": X, "held_out": 2 * X, "starts": ["fitted"], "steps": 0},
        {"fitted": [None], "starts": [["other"], ["no", "such"]], "steps": [-1]},
    ),
    Door(
        Tuning,
        {"ranks": 1, "biases": True, "learning_rate": 1.0, "weight_decay": 0.0},
        {"ranks": [-1], "learning_rate": [0.0, "a"], "weight_decay": [-1.0]},
    ),
    Door(
        Fresh,
        {"label": RELU["target"], "shape": (3,), "samples": 2, "seed": 0},
        {"label": [3], "shape": [3], "samples": [0]},
    ),
    Door(Fixed, {"training": (X, X), "validation": (X, X)}, {"training": [None, (X, X[:, :1])]}),
    Door(
        train,
        {"frozen": RELU["frozen"], "tunings": [Tuning(1)], "data": DATA, "steps": 1, "every": 1},
        {
            "frozen": [None, "text", FNN.random(2, 3, batch_shape=(0,))],
            "tunings": [[], None],
            "data": [X],
            "steps": [-1],
        },
    ),
    Door(
        train_fused,
        {"frozen": RELU["frozen"], "ranks": 1, "data": DATA, "starts": 1, "steps": 1, "every": 1}
        | {"throw": False},
        {"frozen": [None], "ranks": [9, "a"], "data": [X], "starts": [0], "steps": [-1]},
    ),
    Door(bounds.linear_error, LINEAR | {"total_rank": 1}, {"frozen": [None, RELU["frozen"]]}),
    Door(bounds.linear_threshold, LINEAR, {"target": [LinearNetwork.random(1, 2), None]}),
    Door(bounds.fnn_threshold, RELU | {"partition": None}, {"partition": ["uniform"]}),
    Door(bounds.fnn_error, RELU | {"ranks": 1, "inputs": X}, {"ranks": [4], "inputs": ["x"]}),
    Door(bounds.fnn_data_threshold, RELU | {"inputs": X}, {"target": [None, WIDER]}),
    Door(bounds.transformer_threshold, HEADS, {"target": [None, RELU["target"]]}),
    Door(
        regression.reduced_rank,
        {"outputs": X, "inputs": X, "rank": 1, "shrinkage": 0.1},
        {"outputs": [X[:, :2]], "rank": [4], "shrinkage": [-1]},
    ),
    Door(
        lowrank.random_matrix,
        {"rows": 1, "cols": 2, "condition_number": 2.0},
        {"rows": [0, "a"], "condition_number": [0.5, None]},
    ),
    Door(lowrank.truncated_svd, {"matrix": X, "rank": 1}, {"matrix": ["X", X[0]], "rank": [4]}),
    Door(Ball, {"radius": 1.0, "centre": 0.0}, {"radius": [-1.0, "1", np.inf, None]}),
    Door(Box, {"low": 0.0, "high": 1.0}, {"low": [2.0, None]}),
    Door(Samples, {"inputs": X, "margin": 0.1}, {"inputs": [None, X[0]], "margin": [-0.1]}),
    Door(Partition, {"sizes": [1]}, {"sizes": [[], 3, [0]]}),
    Door(Gap, LINEAR, {"frozen": [None], "target": [RELU["target"]]}),
]

JUNK: list[Any] = [
    *(None, "", "text", b"ab", True, -1, 0, 0.5, 10**400, float("nan"), float("inf"), 1j),
    *([], (), {}, {"a": 1}, [None], [[]], ["a"], [1, [2]], object(), str, slice(None), range(3)),
    *(np.float32(1), np.int64(-3), np.zeros(0), np.zeros((2, 2)), np.array(["a"])),
    *(torch.zeros(0), torch.tensor(1.0), torch.ones(2, 2), torch.ones(3, 3, 3).double()),
    *(torch.ones(3, 4).half(), torch.ones(3, 4).long(), torch.ones(3, 4) + 1j, NAN),
    *(torch.ones(3, 4, device="meta"), torch.eye(3).to_sparse(), torch.ones(3, 4).bool()),
    *(torch.nn.Linear(2, 2), torch.nn.Sequential(), torch.float16, torch.device("cpu")),
    *(LINEAR["target"], RELU["target"], HEADS["target"], Ball(1.0), Tuning(1), DATA),
    *(Partition([1]), Adapters),
]


def named(door: Door) -> str:
    return door.function.__qualname__


@pytest.mark.parametrize("door", DOORS, ids=named)
def test_a_refusal_names_the_parameter(door: Door) -> None:
    door.function(**door.valid)
    for name, values in door.refused.items():
        for value in values:
            with pytest.raises(InputError) as caught:
                door.function(**door.valid | {name: value})
            # "rank of layer 1" among `ranks`
            assert re.sub("e?s$", "", name) in caught.value.name, f"{name}={value!s:.99}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("door", DOORS, ids=named)
def test_junk_is_taken_or_refused_in_a_line(door: Door) -> None:
    raw = []
    for name in door.valid:
        for junk in JUNK:
            try:
                door.function(**door.valid | {name: junk})
            except Exception as error:
                said = str(error)
                clear = isinstance(error, LorapowerError) and "\n" not in said
                if not clear or len(said) > 4 * LONGEST:
                    raw.append(f"{name}={type(junk)}: {error!r:.300}")
    assert not raw, "\n".join(raw)


@pytest.mark.parametrize("junk", [None, 3, "", "no/such/folder", X, LINEAR["target"]])
def test_checkpoints_are_folders_or_models(junk: Any) -> None:
    with pytest.raises(InputError, match="base"):
        Pair.open(junk, "no/such/folder")
