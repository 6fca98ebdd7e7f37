"""Front doors refuse what they cannot use in one line that names the parameter.

Parameters of chapters are refused in `test_notebooks`, those of the command in `test_entry_points`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from decoder_modules import decoder
from peft import LoraConfig, inject_adapter_in_model
from strategies import normal, residual_pair
from torch import nn

from lorapower import InputError, bounds, lowrank, regression
from lorapower.adapters import Adapters
from lorapower.constructions import (
    adapt,
    adapt_attention,
    adapt_fitted,
    adapt_linear,
    adapt_relu,
    adapt_transformer,
    fuse,
    rank_for_error,
)
from lorapower.lowrank import LowRank
from lorapower.networks import (
    FNN,
    Decoder,
    Gap,
    LinearNetwork,
    Partition,
    Transformer,
    as_network,
    from_decoder,
    segments,
    to_decoder,
)
from lorapower.regions import Ball, Box, Samples
from lorapower.training import Fixed, Fresh, Tuning, polish, train, train_fused

X = torch.ones(3, 4).double() + torch.eye(3, 4)
NAN, TOKENS = X * torch.nan, normal(6, 9)


def both(frozen: Any, target: Any) -> dict[str, Any]:
    return {"frozen": frozen, "target": target}


LINEAR = both(LinearNetwork.random(2, 3), LinearNetwork.random(1, 3, seed=1))
RELU = both(FNN.random(2, 3), FNN.random(1, 3, seed=1))
HEADS = both(Transformer.random(1, 3, 1), Transformer.random(1, 3, 1, seed=1))
ONE, WIDER = HEADS["frozen"], FNN.random(1, 4)
SINGLE = LINEAR["target"].to(torch.float32)
DATA = Fresh(RELU["target"], (3,), samples=4)
FITTED = adapt_fitted(**RELU, ranks=1, inputs=X, held_out=2 * X, throw=False)
# Of two types, batches that do not broadcast, no numbers or not of a usable type, and others.
MIXED, BATCHES = [X[:, :3].float(), X[:, :3]], [torch.ones(2, 1, 1), torch.ones(3, 1, 1)]
UNUSABLE: list[Any] = [[], [X, X], [NAN], [X.half()], X, MIXED, BATCHES, [None], [[["a"]]]]
UNUSABLE += [[X + 1j], [[[1, 2], [3, 4]]], [[[1.0], [1.0, 2.0]]], [torch.ones(3, 2, 0)]]
UNUSABLE += [[[torch.ones(2, requires_grad=True)]]]
UNLIKE = [{"b_1": torch.ones(1, 3)}, {f"b_{n}": torch.ones(n + 1, 1, 3).double() for n in (1, 2)}]
# Above the width, below 0, no number, and one too many.
RANKS: list[Any] = [4, -1, "all", [1, 2, 3]]
MANY = Transformer.random(1, 3, 1, batch_shape=(2,))
BIAS = {"b_Q": ONE.W_Q[..., 0]}
NARROW = both(*residual_pair(0, 1, 6, 2, head_size=3))
PRENORM = both(*residual_pair(0, 1, 6, 1, hidden=8))
FEW, FINAL_NORM = PRENORM["frozen"], residual_pair(0, 1, 6, 1, hidden=8, final_norm=True)[1]
UNRELATED = residual_pair(0, 1, 6, 1, head_size=4, hidden=11)[1]
NARROWER = residual_pair(0, 1, 4, 1, head_size=6, hidden=8)[1]
LLAMA = decoder("LlamaModel", 4, 4)
READ = from_decoder(LLAMA)
SLIDING: Any = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
# Read as it is, the base would be taken for the tuned model.
LORA = inject_adapter_in_model(
    LoraConfig(r=1, target_modules=["q_proj"]), decoder("LlamaForCausalLM")
)


def replaced(network: Any, change: Any, *names: str) -> list[Any]:
    """Change each of these parts in turn."""
    return [network.replace(**{name: change(getattr(network, name))}) for name in names]


class Door(NamedTuple):
    """A function, a call of it that succeeds, and by parameter what it refuses."""

    function: Callable[..., Any]
    valid: dict[str, Any]
    refused: Mapping[str, Sequence[Any]]


DOORS = [
    # Networks, adapters and gaps
    Door(LinearNetwork, {"weights": [X]}, {"weights": UNUSABLE}),
    Door(
        FNN,
        {"weights": [X], "biases": [X[:, 0]]},
        {"weights": [None, [NAN]], "biases": [None, [], [X], [X[:, 0].float()], [X[0]]]},
    ),
    Door(
        Transformer.random,
        {"depth": 1, "width": 2, "heads": 1, "activation": "relu"},
        {"activation": ["tanh"]},
    ),
    Door(
        Decoder.random,
        {"depth": 1, "width": 2, "heads": 2, "head_size": 2, "residual": True, "gated": True}
        | {"groups": 1, "rotary": 100.0},
        {"groups": [3], "rotary": [0.0]},
    ),
    Door(RELU["frozen"].__call__, {"x": X}, {"x": [X[:2], X[0], NAN]}),
    Door(as_network, {"value": [X], "name": "value"}, {"value": ["text", torch.nn.ReLU()]}),
    Door(Gap, LINEAR, {"frozen": [RELU["frozen"]], "target": [X, RELU["target"], SINGLE]}),
    Door(Partition, {"sizes": [1]}, {"sizes": [[], [2, 0], [1.5]]}),
    Door(Partition.uniform, {"depth": 2, "blocks": 2}, {"blocks": [0, 3]}),
    Door(
        ONE.replace,
        {},
        {"W_O": [ONE.W_O * torch.nan], "W_1": [ONE.W_1[..., :2]], "W_K": [ONE.W_K[:, :0]]},
    ),
    Door(lambda parameters: ONE.replace(**parameters), {"parameters": {}}, {"parameters": [BIAS]}),
    Door(
        lambda settings: Transformer(ONE.parameters, settings),
        {"settings": ONE.settings},
        {"settings": [FEW.settings]},
    ),
    Door(lambda biases: ONE.replace(**biases), {"biases": {}}, {"biases": UNLIKE}),
    Door(
        Adapters((LowRank(X, X[:, :4]),) * 2, (X[:, 0],) * 2).merge,
        {"network": RELU["frozen"]},
        {"network": [None, FNN.random(2, 4), FNN.random(3, 3), LINEAR["frozen"]]},
    ),
    Door(
        MANY.__call__,
        {"x": torch.ones(3, 4)},
        {"x": [torch.ones(4, 4), torch.ones(3, 0)]},
    ),
    Door(
        segments,
        {"frozen": MANY, "target": MANY},
        {"target": [Transformer.random(1, 3, 1, batch_shape=(3,)), MANY.to(torch.float32)]},
    ),
    Door(
        from_decoder,
        {"module": LLAMA},
        {
            "module": [
                nn.Linear(2, 2),
                LORA,
                LORA.model,
                *map(decoder, ("BertModel", "GemmaModel", "PhiModel", "MixtralModel")),
                decoder("GPT2Model", activation_function="tanh"),
                decoder("GPT2Model", scale_attn_weights=False),
                decoder("MistralModel", sliding_window=31),
                decoder("Qwen2Model", **SLIDING),
                decoder("LlamaModel", rope_parameters=SCALED),
            ]
        },
    ),
    # Vectors that a module lacks must be 0.
    Door(
        to_decoder,
        {"network": READ, "module": LLAMA},
        {
            "network": replaced(
                READ, torch.ones_like, "b_Q", "s_1", "b_O", "s_2", "b_1", "b_3", "b_2", "s_f"
            ),
            "module": [decoder("LlamaModel"), decoder("LlamaModel", 4, 4, rms_norm_eps=1.0)],
        },
    ),
    # Constructions
    Door(
        adapt_linear,
        LINEAR | {"ranks": 1},
        {"frozen": [RELU["frozen"]], "target": [LinearNetwork.random(1, 2)], "ranks": RANKS},
    ),
    Door(
        adapt_relu,
        RELU | {"ranks": 1, "on": Ball(1.0), "partition": None, "throw": False},
        {"target": [WIDER], "ranks": RANKS, "on": [2.0, X[:2], Ball(1.0, [0.0, 0.0])]}
        | {"partition": [Partition([1]), Partition([1, 1])]},
    ),
    Door(
        adapt_transformer,
        HEADS | {"ranks": 3},
        {
            "target": [
                HEADS["target"].to(torch.float32),
                *(Transformer.random(*sizes) for sizes in ((2, 3, 1), (1, 3, 2), (1, 2, 1))),
            ],
            "ranks": [dict.fromkeys(ONE.adapted_kinds, 3) | {"W_V": 4}, {"W_Q": 1}, 4],
        },
    ),
    # Heads narrower than the tokens, of 3 rows, are adapted exactly or not at all.
    Door(adapt_transformer, NARROW | {"ranks": 4}, {"ranks": [2]}),
    Door(
        adapt_attention,
        PRENORM | {"tokens": TOKENS},
        {"frozen": replaced(FEW, torch.zeros_like, "W_V", "g_1")},
    ),
    Door(
        adapt,
        RELU | {"ranks": 1, "on": Ball(1.0), "throw": False},
        {"frozen": ["text"], "target": [LINEAR["target"]], "ranks": RANKS, "on": [None]},
    ),
    Door(adapt, LINEAR | {"ranks": 1, "on": None}, {"on": [X]}),
    Door(adapt, HEADS | {"ranks": 3, "on": None}, {"on": [X]}),
    Door(
        rank_for_error,
        LINEAR | {"error": 0.5, "on": X},
        {"error": [-1.0, np.nan], "on": [NAN], "target": [RELU["target"]]},
    ),
    Door(
        adapt_fitted,
        RELU | {"ranks": 1, "inputs": X, "held_out": 2 * X, "throw": False},
        {"target": [HEADS["target"]], "ranks": RANKS, "inputs": [X[:, :1], NAN]}
        | {"held_out": [X, X[:2]]},
    ),
    Door(fuse, RELU | {"ranks": 1}, {"frozen": [DATA], "target": [WIDER], "ranks": [7]}),
    # Training
    Door(
        Tuning,
        {"schedule": "cosine", "loss": "squared"},
        {"schedule": ["no such"], "loss": ["absolute"]},
    ),
    Door(Tuning, {"final": 0, "ranks": 1}, {"final": [1]}),
    Door(
        Fresh,
        {"label": RELU["target"], "shape": (3,), "samples": 2},
        {"label": [nn.Sequential(nn.Linear(3, 3))]},
    ),
    Door(
        Fixed,
        {"training": (X, X), "validation": (X, X), "samples": 4},
        {"training": [(X, X[:, :1]), (NAN, X)], "validation": [(X, NAN)], "samples": [5]},
    ),
    Door(
        train,
        {"frozen": RELU["frozen"], "tunings": [Tuning(1)], "data": DATA, "steps": 1, "every": 1},
        {"frozen": ["text"], "steps": [-1]},
    ),
    Door(
        lambda ranks: train(RELU["frozen"], [Tuning(ranks)], DATA, steps=1),
        {"ranks": 1},
        {"ranks": [-1, 4, [1, 2, 3]]},
    ),
    Door(
        train_fused,
        {"frozen": RELU["frozen"], "ranks": 1, "data": DATA, "starts": 1, "steps": 1, "every": 1}
        | {"throw": False},
        {"ranks": [9], "starts": [0], "steps": [-1]},
    ),
    Door(
        polish,
        {"fitted": FITTED, "inputs": X, "held_out": 2 * X, "iterations": 1, "steps": 1},
        {"inputs": [NAN], "iterations": [-1], "steps": [-1]},
    ),
    # Bounds
    Door(bounds.fnn_error, RELU | {"ranks": 1, "inputs": X}, {"ranks": [4], "inputs": [NAN]}),
    Door(bounds.transformer_ranks, HEADS, {"target": [RELU["target"]]}),
    Door(bounds.transformer_ranks, PRENORM, {"target": [NARROWER, FEW.replace(eps=1.0)]}),
    Door(
        bounds.packed_rank,
        {"width": 2, "heads": 2, "head_size": 1, "part": "values", "norm": "layer"},
        {"groups": [3], "head_size": [2]},
    ),
    Door(
        bounds.necessary_ranks,
        {"network": UNRELATED},
        {"network": [HEADS["target"], UNRELATED.replace(activation="gelu_tanh"), FEW]},
    ),
    Door(
        bounds.ranks_suffice,
        {"network": UNRELATED, "ranks": bounds.necessary_ranks(UNRELATED)},
        {"network": [HEADS["target"]], "ranks": [{}, 3]},
    ),
    Door(
        Decoder.with_norms,
        {"self": UNRELATED, "other": UNRELATED},
        {"other": [UNRELATED.replace(g_1=0 * UNRELATED.g_1), X]},
    ),
    Door(bounds.attention_floor, PRENORM | {"tokens": TOKENS}, {"frozen": [FINAL_NORM]}),
    # Matrices and regions
    Door(
        regression.reduced_rank,
        {"outputs": X, "inputs": X, "rank": 1, "shrinkage": 0.1},
        {"rank": [4], "shrinkage": [-1]},
    ),
    Door(lowrank.truncated_svd, {"matrix": X, "rank": 1}, {"matrix": [X[0], NAN], "rank": [4]}),
    Door(Ball, {"radius": 1.0, "centre": 0.0}, {"radius": [-1.0, np.inf]}),
    Door(Box, {"low": [0.0, 0.0], "high": 1.0}, {"low": [2.0, -np.inf]}),
    Door(Box, {"low": [0.0, 0.0], "high": [1.0, 1.0]}, {"high": [[1.0, 1.0, 1.0]]}),
    Door(
        Samples,
        {"inputs": X, "margin": 0.1},
        {"inputs": [X[0], X[:, :0], X.half()], "margin": [-0.1]},
    ),
]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.function.__qualname__)
def test_a_refusal_names_the_parameter(door: Door) -> None:
    door.function(**door.valid)
    for name, values in door.refused.items():
        for value in values:
            with pytest.raises(InputError) as caught:
                door.function(**door.valid | {name: value})
            # "rank of layer 1" among `ranks`
            assert re.sub("e?s$", "", name) in caught.value.name, f"{name}={value!s:.99}"
            assert "\n" not in str(caught.value)
