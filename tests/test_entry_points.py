"""Whoever hands a network of the wrong kind to the package is told which kind it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import lorapower
from lorapower import InputError, bounds, constructions
from lorapower.adapters import Adapters
from lorapower.constructions import (
    attention,
    fitted,
    fnn,
    fused,
    heads,
    linear,
    narrow,
    partition,
    residual,
    transformer,
)
from lorapower.networks import FNN, LinearNetwork, Transformer, segments
from lorapower.networks.residual import ResidualTransformer
from lorapower.regions import Ball

X = torch.ones(3, 4).double()
RIGHT: dict[type, tuple[Any, Any]] = {
    LinearNetwork: (LinearNetwork.random(2, 3), LinearNetwork.random(1, 3, seed=1)),
    FNN: (FNN.random(2, 3), FNN.random(1, 3, seed=1)),
    Transformer: (Transformer.random(1, 3, 1), Transformer.random(1, 3, 1, seed=1)),
    ResidualTransformer: (
        ResidualTransformer.random(1, 4, 1),
        ResidualTransformer.random(1, 4, 1, seed=1),
    ),
}
TOKENS = torch.eye(4, 9).double() + torch.arange(36).reshape(4, 9) % 7
ADAPTED = fnn.adapt(*RIGHT[FNN], 2, Ball(1.0))
ERRORS = bounds.transformer_ranks(*RIGHT[Transformer])

# Every public function of two networks, and how it is called with them.
CALLS: dict[Callable[..., Any], tuple[type, Callable[[Any, Any], Any]]] = {
    bounds.linear_error: (LinearNetwork, lambda f, t: bounds.linear_error(f, t, 1)),
    bounds.linear_threshold: (LinearNetwork, bounds.linear_threshold),
    linear.adapt: (LinearNetwork, lambda f, t: linear.adapt(f, t, 1)),
    bounds.fnn_error: (FNN, lambda f, t: bounds.fnn_error(f, t, 1, X)),
    bounds.fnn_error_on: (FNN, lambda f, t: bounds.fnn_error_on(f, t, 1, X)),
    bounds.fnn_threshold: (FNN, bounds.fnn_threshold),
    bounds.final_layers_floor: (FNN, bounds.final_layers_floor),
    fnn.adapt: (FNN, lambda f, t: fnn.adapt(f, t, 2, Ball(1.0))),
    bounds.fnn_data_threshold: (FNN, lambda f, t: bounds.fnn_data_threshold(f, t, X)),
    partition.least_error: (FNN, lambda f, t: partition.least_error(f, t, 1, X)),
    partition.least_rank: (FNN, partition.least_rank),
    bounds.transformer_error: (
        Transformer,
        lambda f, t: bounds.transformer_error(f, t, ERRORS, X),
    ),
    bounds.transformer_errors: (Transformer, lambda f, t: bounds.transformer_errors(f, t, 1)),
    bounds.transformer_ranks: (Transformer, bounds.transformer_ranks),
    bounds.transformer_threshold: (Transformer, bounds.transformer_threshold),
    transformer.adapt: (Transformer, lambda f, t: transformer.adapt(f, t, 2)),
    bounds.residual.ranks: (ResidualTransformer, bounds.residual.ranks),
    bounds.residual.attention_floor: (
        ResidualTransformer,
        lambda f, t: bounds.residual.attention_floor(f, t, TOKENS),
    ),
    bounds.residual.directions: (
        ResidualTransformer,
        lambda f, t: bounds.residual.directions(f, t, TOKENS),
    ),
    residual.adapt: (ResidualTransformer, lambda f, t: residual.adapt(f, t, 2)),
    residual.attention_only: (
        ResidualTransformer,
        lambda f, t: residual.attention_only(f, t, TOKENS),
    ),
}

# Those that take every kind of network; what they refuse is in test_general.py.
OF_EVERY_KIND: set[Callable[..., Any]] = {
    lorapower.adapt,
    lorapower.rank_for_error,
    fitted.adapt,
    fused.fuse,
}

WRONG: list[object] = [
    None,
    nn.Linear(3, 3),
    nn.Sequential(nn.Linear(3, 3), nn.Tanh()),
    "a network",
    RIGHT[LinearNetwork][0],
    RIGHT[FNN][0],
    RIGHT[Transformer][0],
    RIGHT[ResidualTransformer][0],
]


def public(module: ModuleType) -> set[Callable[..., Any]]:
    """What the module itself offers: by ``__all__``, or all that is defined in it."""
    names = getattr(module, "__all__", None)
    found = (getattr(module, name) for name in names or vars(module) if not name.startswith("_"))
    return {
        f for f in found if inspect.isfunction(f) and (names or f.__module__ == module.__name__)
    }


def test_the_table_of_calls_is_complete() -> None:
    parts = (getattr(constructions, name) for name in constructions.__all__)
    modules = [lorapower, bounds, bounds.residual, constructions, *filter(inspect.ismodule, parts)]
    functions = set().union(*map(public, modules))
    of_two = {f for f in functions if {"frozen", "target"} <= set(inspect.signature(f).parameters)}
    assert of_two == set(CALLS) | OF_EVERY_KIND
    assert functions - of_two == {
        bounds.activation_sizes,
        attention.candidates,
        attention.closed_form,
        attention.columns,
        attention.sequences,
        bounds.residual.inner_rank,
        heads.adapt,
        heads.is_narrow,
        heads.one_by_one,
        heads.ranks_by_name,
        heads.require_ranks,
        residual.far_error,
        bounds.colliding_inputs,
        bounds.first_order,
        bounds.pair_ranks,
        bounds.variance,
        fitted.ball,
        fitted.checked,
        fitted.evidence,
        fitted.fit,
        fitted.halves,
        fitted.nearest,
        fitted.relative_error,
        fused.is_narrow,
        linear.close,
        narrow.adapt,
        narrow.require_ranks,
    }


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_two_networks_of_one_kind(function: Callable[..., Any]) -> None:
    kind, call = CALLS[function]
    right = RIGHT[kind]
    call(*right)
    for wrong in WRONG:
        if isinstance(wrong, kind):
            continue
        # A stack of layers stands for a linear network, and is judged by its layers.
        stack = kind is LinearNetwork and isinstance(wrong, nn.Sequential)
        for name, pair in (("frozen", (wrong, right[1])), ("target", (right[0], wrong))):
            said = "a Sequential of" if stack else f"of class {kind.__name__} "
            with pytest.raises(InputError, match=f"^{name} must be {said}"):
                call(*pair)


def test_a_module_is_told_the_way_in() -> None:
    module = nn.Sequential(nn.Linear(3, 3).double(), nn.ReLU())
    with pytest.raises(InputError, match=r"FNN .*; got Sequential: from_sequential makes"):
        fnn.adapt(module, RIGHT[FNN][1], 2, Ball(1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", WRONG[:4], ids=str)
def test_one_network(wrong: Any) -> None:
    with pytest.raises(InputError, match="frozen must be of class FNN "):
        bounds.colliding_inputs(wrong, X)
    with pytest.raises(InputError, match="frozen must be of class FNN "):
        ADAPTED.covers(wrong, X)
    adapters: Adapters = ADAPTED.adapters
    for change in (adapters.merge, adapters.unmerge):
        with pytest.raises(InputError, match="network must be of class Network "):
            change(wrong)


def test_gaps_are_not_networks() -> None:
    networks: Any = RIGHT[Transformer]
    with pytest.raises(InputError, match="frozen must be of class Transformer "):
        segments(None, networks[1])  # type: ignore[arg-type]
    for function in (
        bounds.pair_ranks,
        lambda gap: narrow.adapt(gap, 1, 1),
        lambda gap: narrow.require_ranks(gap, {"W_Q": 1, "W_K": 1}),
    ):
        with pytest.raises(InputError, match="gap must be of class Gap "):
            function(networks[0])
