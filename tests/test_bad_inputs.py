"""What every public function and class says of bad input: one line, before any work."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import isclass, isfunction
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
import typechecks

from lorapower import (
    LorapowerError,
    adapters,
    bounds,
    constructions,
    lowrank,
    networks,
    randomness,
    regions,
    regression,
    training,
)
from lorapower.book import claims, figures, notebook
from lorapower.constructions import (
    attention,
    fitted,
    fnn,
    fused,
    heads,
    layer,
    linear,
    partition,
    residual,
    residual_fit,
    transformer,
)
from lorapower.errors import LONGEST, brief
from lorapower.experiments import coded, digits, methods, synthetic
from lorapower.networks import (
    FNN,
    Gap,
    LinearNetwork,
    Partition,
    Transformer,
    segments,
)
from lorapower.networks.residual import ResidualTransformer
from lorapower.regions import Ball, Box, Samples
from lorapower.training import Fixed, Fresh, Tuning, train

mpl.use("agg")

TABLE = Path(__file__).with_name("bad_inputs.txt")

X = torch.ones(3, 4).double() + torch.eye(3, 4)
LINEAR = LinearNetwork.random(2, 3), LinearNetwork.random(1, 3, seed=1)
RELU = FNN.random(2, 3), FNN.random(1, 3, seed=1)
HEADS = Transformer.random(1, 3, 1), Transformer.random(1, 3, 1, seed=1)
STREAMS = ResidualTransformer.random(1, 4, 1), ResidualTransformer.random(1, 4, 1, seed=1)
Y = torch.eye(4, 9).double() + torch.arange(36).reshape(4, 9) % 7
GAP = Gap(*LINEAR)
DATA = Fresh(RELU[1], (3,), samples=4)
SEGMENT = segments(*HEADS).query_key
ADAPTED = fnn.adapt(*RELU, 3, Ball(1.0))
FUSED = fused.fuse(*RELU, 1)
FITTED = fitted.adapt(*RELU, 1, X, 2 * X, throw=False)
KEYS, QUERIES = X.expand(2, 3, 4), torch.ones(2, 4, 4).double()
FRAME = {"xlabel": "x", "ylabel": "y"}

# Nothing of a caller's gets into them.
TAKE_NOTHING = {
    figures.transformer_segments,
    figures.use_style,
    digits.images,
}
# Made by the package itself, to hold what it found: whatever they are given they hold.
HOLD = {
    adapters.Tuned,
    bounds.Floor,
    bounds.PairRanks,
    bounds.samples.PaidRank,
    coded.Split,
    claims.Claim,
    attention.Scores,
    digits.Split,
    bounds.residual.AttentionFloor,
    residual.ResidualAdaptation,
    fitted.Fit,
    fitted.Fitted,
    fnn.FNNAdaptation,
    fused.Fused,
    regression.Regression,
    regression.Truncation,
    linear.LinearAdaptation,
    constructions.Adaptation,
    figures.Look,
    constructions.NeededRank,
    lowrank.Norms,
    lowrank.SVD,
    notebook.Quoted,
    transformer.TransformerAdaptation,
    training.FusedTraining,
    training.Newton,
    training.Training,
}
# Called by the package alone, with what it has checked.
WITHIN = {
    coded.fit,
    digits.trained,
    linear.close,
    synthetic.Tests,
    synthetic.fitting_inputs,
    methods.adapted,
    methods.construct,
    attention.Builder,
    attention.candidates,
    attention.columns,
    attention.sequences,
    heads.adapt,
    heads.is_narrow,
    heads.one_by_one,
    layer.fit,
    heads.ranks_by_name,
    residual_fit.candidates,
    fitted.checked,
    fitted.evidence,
    fitted.fit,
    fitted.halves,
    fused.is_narrow,
}
# Likewise private modules and all of these, but for what is listed by a package or has a row above.
INSIDE = (
    "lorapower.errors",
    "lorapower.adapters",
    "lorapower.book.figures",
    "lorapower.book.parameters",
    "lorapower.checkpoints",
    "lorapower.cli",
    "lorapower.experiments.encoders",
    "lorapower.experiments.pairs",
    "lorapower.experiments.provenance",
    "lorapower.experiments.store",
    "lorapower.experiments.tables",
    "lorapower.training",
    "lorapower.networks",
)


# What the table's calls are made of, beside the names above.
MODULES = (
    *("adapters", "bounds", "lowrank", "networks", "randomness", "regions"),
    *("regression", "training"),
    *("book.claims", "book.figures", "book.notebook", "book.outputs", "book.parameters"),
    *("bounds.samples", "constructions", "experiments.coded", "experiments.optimization"),
    *("constructions.attention", "constructions.fitted", "constructions.fused"),
    *("constructions.fnn", "constructions.linear", "constructions.narrow"),
    *("constructions.partition", "constructions.transformer", "experiments.digits"),
    *("constructions.heads", "experiments", "experiments.residual", "networks.residual"),
    *("experiments.methods", "experiments.sweeps", "experiments.synthetic"),
    *("experiments.encoders.models", "experiments.encoders.runs", "experiments.encoders.sources"),
    *("experiments.encoders.tasks",),
)
NAMES = {
    **vars(networks),
    **vars(regions),
    **vars(training),
    **globals(),
    **{name.rpartition(".")[2]: import_module(f"lorapower.{name}") for name in MODULES},
    "np": np,
    "partitions": import_module("lorapower.networks.partition"),
    "pd": pd,
}


def rows() -> list[tuple[Any, str, str]]:
    """What is at fault, the call and the message, of each row of the table beside this file."""
    found, at_fault, call = [], None, ""
    lines = TABLE.read_text(encoding="utf-8").splitlines()[1:]
    for line in filter(None, lines):
        if line.startswith("["):
            at_fault = eval(line[1:-1], NAMES)
        elif line.startswith(" "):
            found.append((at_fault, call, line.strip()))
        else:
            call = line
    return found


@pytest.mark.parametrize(("call", "said"), [row[1:] for row in rows()])
def test_bad_input_is_told_in_a_line(call: str, said: str) -> None:
    with pytest.raises(LorapowerError) as caught:
        eval(call, NAMES)
    assert str(caught.value) == said


def public() -> set[Any]:
    """Functions and classes that users are offered: listed by packages, or a module's own."""
    found = set()
    listed = [networks, adapters, bounds, constructions, training, figures]
    for module in listed:
        found |= {
            each
            for each in map(vars(module).get, module.__all__)
            if isfunction(each) or isclass(each)
        }
    for name in typechecks.modules():
        if name.startswith(INSIDE) or "._" in name:
            continue
        module = import_module(name)
        found |= {
            each
            for each in vars(module).values()
            if callable(each)
            and getattr(each, "__module__", None) == name
            and not each.__name__.startswith("_")
        }
    return found


def test_the_table_is_complete() -> None:
    table = rows()
    refused = {row[0] for row in table}
    exempt = TAKE_NOTHING | HOLD | WITHIN
    missing = public() - refused - exempt
    assert not missing, sorted(f"{each.__module__}.{each.__qualname__}" for each in missing)
    assert exempt <= public()
    assert not exempt & refused
    assert len(table) == len({call for _, call, _ in table}) >= 100


# A call of each that succeeds.
VALID: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (LinearNetwork, {"weights": [X]}),
    (LinearNetwork.random, {"depth": 1, "width": 2, "batch_shape": (), "seed": 0}),
    (FNN, {"weights": [X], "biases": [X[:, 0]]}),
    (FNN.random, {"depth": 1, "width": 2, "dtype": torch.float64}),
    (Transformer.random, {"depth": 1, "width": 2, "heads": 1, "scale": 1.0, "head_size": 2}),
    (LINEAR[0].to, {"dtype": torch.float32, "device": "cpu"}),
    (LINEAR[0].__call__, {"x": X}),
    (LINEAR[0].zeroed, {"which": torch.tensor(True)}),
    (RELU[0].preactivations, {"x": X}),
    (RELU[0].layers, {"which": slice(1)}),
    (HEADS[0].trace, {"x": X}),
    (Gap, {"frozen": LINEAR[0], "target": LINEAR[1]}),
    (GAP.error, {"rank": 1, "ord": 2}),
    (GAP.ranks, {"ranks": [1, 1]}),
    (Partition, {"sizes": [1]}),
    (Partition.uniform, {"depth": 2, "blocks": 1}),
    (Partition.of_layers, {"blocks": [[1]]}),
    (networks.blocks, {"frozen": RELU[0], "target": RELU[1], "partition": None}),
    (networks.shares, {"gaps": [GAP], "ranks": [1, 1]}),
    (networks.pad, {"x": X, "width": 4}),
    (networks.product, {"weights": [X]}),
    (ADAPTED.adapters.merge, {"network": RELU[0]}),
    (ADAPTED.covers, {"frozen": RELU[0], "x": X}),
    (bounds.activation_sizes, {"target": RELU[1], "inputs": X}),
    (bounds.colliding_inputs, {"frozen": RELU[0], "x": X, "reach": 1.0, "seed": 0}),
    (bounds.fnn_error, {"frozen": RELU[0], "target": RELU[1], "ranks": 1, "inputs": X}),
    (bounds.fnn_error_on, {"frozen": RELU[0], "target": RELU[1], "ranks": 1, "inputs": X}),
    (bounds.linear_error, {"frozen": LINEAR[0], "target": LINEAR[1], "total_rank": 1}),
    (bounds.transformer_threshold, {"frozen": HEADS[0], "target": HEADS[1]}),
    (linear.adapt, dict(zip(("frozen", "target"), LINEAR, strict=True)) | {"ranks": 1, "seed": 0}),
    (
        fnn.adapt,
        {"frozen": RELU[0], "target": RELU[1], "ranks": 1, "region": Ball(1.0), "throw": False}
        | {"partition": None, "input_scale": 1.0, "scalar_biases": False, "max_digits_lost": 9.0},
    ),
    (fused.fuse, {"frozen": RELU[0], "target": RELU[1], "ranks": 1, "partition": None}),
    (fitted.nearest, {"fused": FUSED, "inputs": X}),
    (
        fitted.adapt,
        {"frozen": RELU[0], "target": RELU[1], "ranks": 1, "inputs": X, "held_out": 2 * X}
        | {"partition": None, "region": Ball(9.0), "metric": "alike", "throw": False},
    ),
    (fitted.relative_error, {"network": RELU[1], "target": RELU[1], "x": X}),
    (fitted.ball, {"inputs": X}),
    (attention.closed_form, {"E": X, "keys": KEYS, "queries": QUERIES, "rank": 1}),
    (bounds.fnn_data_threshold, {"frozen": RELU[0], "target": RELU[1], "inputs": X}),
    (bounds.variance, {"outputs": X}),
    (bounds.first_order, {"adapted": RELU[1], "target": RELU[1], "inputs": X}),
    (
        regression.reduced_rank,
        {"outputs": X, "inputs": X, "rank": 1, "towards": None, "shrinkage": 0.1}
        | {"metric": None, "intercept": True},
    ),
    (regression.truncate, {"matrix": X, "rank": 1}),
    (regression.second_moment_root, {"columns": X, "ridge": 0.0}),
    (training.polish, {"fitted": FITTED, "inputs": X, "held_out": 2 * X, "starts": ["fitted"]}),
    (partition.least_error, {"frozen": RELU[0], "target": RELU[1], "ranks": 1, "inputs": X}),
    (transformer.adapt, {"frozen": HEADS[0], "target": HEADS[1], "ranks": 3, "seed": 0}),
    (lowrank.LowRank, {"left": X, "right": X}),
    (lowrank.spectrum, {"matrix": X}),
    (lowrank.svd, {"matrix": X}),
    (lowrank.truncated_svd, {"matrix": X, "rank": 1}),
    (lowrank.tail_norms, {"singular_values": X, "rank": 1}),
    (lowrank.rank, {"matrix": X, "scale": 1.0}),
    (lowrank.random_matrix, {"rows": 1, "cols": 2, "condition_number": 2.0, "batch_shape": ()}),
    (Ball, {"radius": 1.0, "centre": 0.0}),
    (Box, {"low": 0.0, "high": 1.0}),
    (Samples, {"inputs": X, "margin": 0.1}),
    (Samples(X).sample, {"samples": 2, "edge": True, "seed": 0}),
    (Samples(X).fit, {"width": 3, "dtype": torch.float32}),
    (Samples(X).typical, {"scale": 1.0}),
    (Samples(X).lowest, {"matrix": X[:, :3]}),
    (randomness.generator, {"seed": 0}),
    (randomness.normal, {"generator": randomness.generator(0, "junk"), "dtype": torch.float32}),
    (Fresh, {"label": RELU[0], "shape": (3,), "samples": 2, "validation_samples": 2, "seed": 0}),
    (Fixed, {"training": (X, X), "validation": (X, X), "samples": 2, "purpose": ()}),
    (DATA.block, {"index": 0}),
    (Tuning, {"ranks": 1, "biases": True, "learning_rate": 1.0, "weight_decay": 0.0}),
    (
        train,
        {"frozen": RELU[0], "tunings": [Tuning(1)], "data": DATA, "steps": 1, "every": 1}
        | {"classes": (), "until": 0.0, "seed": 0, "backend": "compiled", "device": None},
    ),
    (claims.equal, {"statement": "", "label": "", "predicted": 1.0, "measured": 1.0, "rtol": 0.0}),
    (claims.number, {"value": 1.0, "digits": 2}),
    (synthetic.Problem, {"model": "fnn", "width": 2, "scale": 1.0, "fixed": False, "seed": 0}),
    (synthetic.Setting, {"problem": synthetic.Problem(), "method": methods.Lora()}),
]
JUNK: list[Any] = [
    *(None, "", "text", b"ab", True, -1, 0, 0.5, 2.5, 10**400, -(10**400), float("nan")),
    *(float("inf"), 1j, [], (), {}, {"a": 1}, [None], [[]], ["a"], [1, [2]], [0.5], object()),
    *(str, slice(None), np.nan, np.float32(1), np.int64(-3), np.bool_(True), range(3)),
    *(np.zeros(0), np.zeros((2, 2)), np.array(["a"]), np.array([None]), np.zeros((3, 3), ">f8")),
    *(torch.zeros(0), torch.tensor(1.0), torch.ones(2, 2), torch.ones(3, 3, 3).double()),
    *(torch.ones(3, 4).half(), torch.ones(3, 4).long(), torch.ones(3, 4) + 1j, X * torch.nan),
    *(torch.ones(3, 4, device="meta"), torch.eye(3).to_sparse(), torch.ones(3, 4).bool()),
    *(torch.nn.Linear(2, 2), torch.nn.Sequential(), torch.float16, torch.device("cpu")),
    *(LINEAR[0], RELU[0], HEADS[0], GAP, Ball(1.0), Tuning(1), DATA, Partition([1]), [GAP] * 2),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", VALID, ids=lambda call: call[0].__qualname__)
def test_junk_is_taken_or_refused_in_a_line(
    call: tuple[Callable[..., Any], dict[str, Any]],
) -> None:
    function, valid = call
    function(**valid)
    raw = []
    for name in valid:
        for junk in JUNK:
            try:
                function(**valid | {name: junk})
            except Exception as error:
                said = str(error)
                clear = isinstance(error, LorapowerError) and "\n" not in said
                if not clear or len(said) > 4 * LONGEST:
                    raw.append(f"{name}={brief(junk)}: {brief(error)}")
    assert not raw, "\n".join(raw)
