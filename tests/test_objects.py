"""Public objects show themselves on one short line, and can be compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import typechecks

from lorapower import bounds, lowrank, rank_for_error
from lorapower.adapters import Adapters, Tuned, coding
from lorapower.book.claims import Claim
from lorapower.constructions import fitted, fnn, fused, linear, partition, residual, transformer
from lorapower.constructions.attention import Scores
from lorapower.experiments import digits
from lorapower.lowrank import LowRank
from lorapower.networks import FNN, Gap, LinearNetwork, Partition, Pieces, Transformer, segments
from lorapower.networks.residual import ResidualTransformer
from lorapower.regions import Ball, Box, Samples
from lorapower.regression import reduced_rank
from lorapower.training import (
    Fixed,
    Fresh,
    Tuning,
    dynamics,
    landscape,
    newton,
    train,
    train_fused,
)

X = torch.ones(3, 4).double() + torch.eye(3, 4)
TOKENS = torch.eye(4).double().repeat(1, 3) + 0.1 * torch.arange(12)


# Of settings and results, of chapters, and of checkpoints.
APART = ("experiments", "book", "_hub", "errors", "_records", "checkpoints", "cli")


def networks(kind: Any, **options: Any) -> tuple[Any, Any]:
    size = (3, 2) if kind is Transformer else (3,)
    frozen, target = (kind.random(2, *size, seed=seed, **options) for seed in (0, 1))
    return frozen, target


STREAMS = ResidualTransformer.random(1, 4, 1), ResidualTransformer.random(1, 4, 1, seed=1)
FNNS, LINEARS, TRANSFORMERS = (networks(kind) for kind in (FNN, LinearNetwork, Transformer))
ADAPTERS = fnn.adapt(*FNNS, 1, Ball(1.0), throw=False).adapters
LINEAR_ADAPTERS = linear.adapt(*LINEARS, 1, throw=False).adapters
WIDE = LinearNetwork([torch.ones(2, 8, 3), torch.ones(5, 8)])

SHOWN: dict[str, tuple[Callable[[], Any], str]] = {
    "LinearNetwork": (lambda: WIDE, "LinearNetwork(3→8→5, batch [2], float32)"),
    "FNN": (lambda: FNNS[0], "FNN(3→3→3, float64)"),
    "Transformer": (
        lambda: TRANSFORMERS[0],
        "Transformer(2 blocks, 2 heads of 3 and 3, 3→3→3, 3 outputs, float64)",
    ),
    "ResidualTransformer": (
        lambda: STREAMS[0],
        "ResidualTransformer(1 blocks, 1 heads of 4 and 4, 4→8→4, relu, layer norm, float64)",
    ),
    "ResidualSegments": (
        lambda: bounds.residual.ranks(*STREAMS),
        "ResidualSegments(query_key=int64[1, 1], value_output=int64[1, 1], inner=int64[1], "
        "outer=int64[1])",
    ),
    "Gap": (
        lambda: Gap(WIDE, torch.ones(5, 3)),
        "Gap(frozen 3→8→5, target 3→5, batch [2], float32)",
    ),
    "Pieces": (
        lambda: Pieces(*FNNS),
        "Pieces(frozen=FNN(3→3→3, float64), target=FNN(3→3→3, float64))",
    ),
    "Partition": (lambda: Partition([2, 1]), "Partition(sizes=(2, 1))"),
    "Segments": (
        lambda: bounds.transformer_ranks(*TRANSFORMERS),
        "Segments(query_key=int64[2, 2], value_output=int64[2, 2], output=2)",
    ),
    "BlockTrace": (
        lambda: TRANSFORMERS[0].trace(X)[0],
        "BlockTrace(patterns=float64[2, 4, 4], preactivations=float64[3, 4], "
        "outputs=float64[3, 4])",
    ),
    "SVD": (
        lambda: lowrank.svd(torch.ones(2, 3, 4)),
        "SVD(U=float32[2, 3, 3], S=float32[2, 3], V=float32[2, 4, 3])",
    ),
    "Ball": (lambda: Ball(2.0), "Ball(any width, radius 2, float64)"),
    "Balls": (lambda: Ball(X, torch.ones(3).double()), "Ball(width 3, batch [3, 4], float64)"),
    "Box": (lambda: Box(-1.0, [1.0, 2.0]), "Box(width 2, float64)"),
    "Samples": (lambda: Samples(X), "Samples(width 3, 4 samples, margin 0.1, float64)"),
    "Floor": (
        lambda: bounds.Floor(torch.tensor(0.5), torch.tensor(1e-3)),
        "Floor(mean_squared_error=0.5, standard_error=0.001)",
    ),
    "OptimalPartition": (
        lambda: partition.least_rank(*FNNS),
        "OptimalPartition(sizes=int64[2], value=3)",
    ),
    "Fresh": (lambda: Fresh(FNNS[1], (3,)), "Fresh(shape (3,), 256 samples, seed 0)"),
    "Fixed": (lambda: Fixed((X, X), (X, X)), "Fixed([3, 4] to [3, 4], 4 samples)"),
    "Tuning": (
        lambda: Tuning((1, 2)),
        "Tuning(ranks=(1, 2), final=0, biases=True, learning_rate=0.001, "
        "weight_decay=0.0, schedule='constant', ratio=1.0, "
        "loss='squared', start='study', blocks=1)",
    ),
    "Split": (
        lambda: digits.Split(*[(X, X[0])] * 3),
        "Split(training=(float64[3, 4], float64[4]), validation=(float64[3, 4], float64[4]), "
        "test=(float64[3, 4], float64[4]))",
    ),
    "Claim": (lambda: Claim("a", "thm-a", "1", "2", True), ""),
}
# What they show is not short, or no concern here.
COMPARED: dict[str, Callable[[], Any]] = {
    "LowRank": lambda: LowRank(X, X),
    "Adapters": lambda: Adapters((LowRank(X, X),), (X[0],)),
    "LinearAdaptation": lambda: linear.adapt(*LINEARS, 1),
    "FNNAdaptation": lambda: fnn.adapt(*FNNS, 3, Ball(1.0)),
    "TransformerAdaptation": lambda: transformer.adapt(*TRANSFORMERS, 3),
    "ResidualAdaptation": lambda: residual.adapt(*STREAMS, 4),
    "AttentionFloor": lambda: bounds.residual.attention_floor(*STREAMS, TOKENS),
    "Training": lambda: train(FNNS[0], [Tuning(1)], Fresh(FNNS[1], (3,), samples=4), steps=1),
    "Norms": lambda: bounds.linear_error(*LINEARS, 1),
    "PairRanks": lambda: bounds.pair_ranks(segments(*TRANSFORMERS).query_key),
    "Tuned": lambda: Tuned(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)),
    "NeededRank": lambda: rank_for_error(*LINEARS, 0.5, X),
    "Fused": lambda: fused.fuse(*FNNS, 1),
    "Fit": lambda: fitted.adapt(*FNNS, 1, X, 2 * X, throw=False).fits[0],
    "Fitted": lambda: fitted.adapt(*FNNS, 1, X, 2 * X, throw=False),
    "Scores": lambda: Scores(X, X, X[0, 0]),
    "Regression": lambda: reduced_rank(X, X, 1),
    "Newton": lambda: newton(FNNS[0], ADAPTERS, (X, X), (X, X), 1),
    "FusedTraining": lambda: train_fused(
        FNNS[0], 1, Fresh(FNNS[1], (3,), samples=4), starts=1, steps=10
    ),
    "Flow": lambda: dynamics.flow(LINEARS[0], LINEAR_ADAPTERS, (X, X), 0.1, points=2),
    "Critical": lambda: next(landscape.critical_points(X, 1)),
    "Code": lambda: coding.encode(ADAPTERS, 2),
    "Design": lambda: bounds.samples.Design(9, 3, 3, 1.0),
    "PaidRank": lambda: bounds.samples.paid_rank(LINEARS[0], X, X, noise=1.0),
    "Segments of gaps": lambda: segments(*TRANSFORMERS),
}


@pytest.mark.parametrize(("make", "shown"), SHOWN.values(), ids=SHOWN)
def test_one_short_line(make: Callable[[], Any], shown: str) -> None:
    text = repr(make())
    assert text == shown or not shown
    assert "\n" not in text
    assert len(text) <= 160


@pytest.mark.parametrize(
    "make", [*(make for make, _ in SHOWN.values()), *COMPARED.values()], ids=[*SHOWN, *COMPARED]
)
def test_comparing_does_not_raise(make: Callable[[], Any]) -> None:
    one, other = make(), make()
    assert one == one
    assert (one == other) in (True, False)
    assert one != "another"
    assert hash(one) == hash(one)
    assert one in [other, one]


def test_all_classes_that_hold_tensors_are_compared() -> None:
    """Those of dataclasses, named tuples, networks and regions outside of `APART`."""
    inside = {
        "_objects",
        "free",
        "stack",
        "compiled",
        "reference",
        "engine",
        "methods",
        "modules",
        "store",
    }
    found = set()
    for name in typechecks.modules():
        _, part, *rest = name.split(".")
        if part in APART or {part, *rest} & inside:
            continue
        module = import_module(name)
        found |= {
            cls.__name__
            for cls in vars(module).values()
            if inspect.isclass(cls)
            and cls.__module__ == name
            and not inspect.isabstract(cls)
            and not cls.__name__.startswith("_")
        }
    assert found - {"Layers", "Stacked", "Adaptation", "Builder"} <= {*SHOWN, *COMPARED}
