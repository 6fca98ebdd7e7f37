"""Parameters of networks of layers: from arrays, from torch modules, at random."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import _checks, randomness
from ..errors import InputError


def usable_layers(weights: Any, biases: Any = None) -> tuple[list[Tensor], list[Tensor]]:
    """Usable weights and biases (maybe none) of layers that chain, of one type and batch shape."""
    matrices = _per_layer("weight", weights, min_dims=2)
    vectors = [] if biases is None else _per_layer("bias", biases, min_dims=1)
    for l, (inner, outer) in enumerate(pairwise(matrices), start=2):
        if inner.shape[-2] != outer.shape[-1]:
            allowed = f"of {inner.shape[-2]} columns, the outputs of layer {l - 1}"
            given = f"shape {tuple(outer.shape)}"
            raise InputError(f"weight of layer {l}", allowed=allowed, given=given)
    if biases is not None and len(vectors) != len(matrices):
        allowed = f"one for each of the {len(matrices)} layers"
        raise InputError("biases", allowed=allowed, given=len(vectors))
    for l, (weight, bias) in enumerate(zip(matrices, vectors, strict=False), start=1):
        if bias.shape[-1] != weight.shape[-2]:
            allowed = f"of {weight.shape[-2]} entries, the outputs of its weight"
            given = f"shape {tuple(bias.shape)}"
            raise InputError(f"bias of layer {l}", allowed=allowed, given=given)
    name = "weights and biases" if vectors else "weights"
    if len({part.dtype for part in (*matrices, *vectors)}) > 1:
        allowed = "all float32 or all float64"
        raise InputError(name, allowed=allowed, given="both", remedy="convert one")
    shapes = [*(w.shape[:-2] for w in matrices), *(b.shape[:-1] for b in vectors)]
    batch = _checks.common_shape(name, shapes)
    return (
        [w.expand(*batch, *w.shape[-2:]) for w in matrices],
        [b.expand(*batch, b.shape[-1]) for b in vectors],
    )


def _per_layer(name: Literal["weight", "bias"], values: Any, *, min_dims: int) -> list[Tensor]:
    """One tensor of at least ``min_dims`` dimensions a layer, from a sequence or a stack."""
    plural = {"weight": "weights", "bias": "biases"}[name]
    if isinstance(values, Tensor | np.ndarray):
        stacked = _checks.real_tensor(plural, values, min_dims=min_dims + 1)
        values = stacked.unbind(-min_dims - 1)
    if not isinstance(values, Sequence) or isinstance(values, str) or not len(values):
        given = "none" if isinstance(values, Sequence) else type(values).__name__
        raise InputError(plural, allowed=f"one {name} or more", given=given)
    return [
        _checks.real_tensor(f"{name} of layer {l}", value, min_dims=min_dims, copy=True)
        for l, value in enumerate(values, start=1)
    ]


def uniform(
    *shape: int, width: int, generator: torch.Generator, dtype: torch.dtype
) -> Float[Tensor, "*shape"]:
    """Draw as `torch.nn.Linear` draws its own numbers: uniformly on ``±1/√width``."""
    drawn = randomness.uniform(generator, *shape)
    return ((2 * drawn - 1) / width**0.5).to(dtype)


def random_weights(
    depth: int,
    width: int,
    *,
    batch_shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch depth width width"]:
    """Draw square layers by `uniform`; checks all arguments."""
    depth = _checks.integer("depth", depth, 1)
    width = _checks.integer("width", width, 1)
    batch_shape, dtype = _checks.sizes("batch_shape", batch_shape), _checks.precision(dtype)
    shape = (*batch_shape, depth, width, width)
    return uniform(*shape, width=width, generator=generator, dtype=dtype)


class Dense(NamedTuple):
    """A ``Linear`` layer's numbers, whether a ReLU follows, and its name and place."""

    weight: Tensor
    bias: Tensor | None
    relu: bool
    words: str


def dense_layers(module: Any, name: str, dtype: torch.dtype | None) -> list[Dense]:
    """The ``Linear`` layers of a Sequential, also nested; refuses all else that computes."""
    if not isinstance(module, nn.Sequential):
        allowed = "a torch.nn.Sequential of layers"
        raise InputError(name, allowed=allowed, given=type(module).__name__)
    if dtype is not None:
        _checks.precision(dtype)
    layers: list[Dense] = []
    # A layer that stands in two places is two layers.
    for place, layer in module.named_modules(remove_duplicate=False):
        if layer._forward_hooks or layer._forward_pre_hooks:
            allowed = "without hooks, which may change what a layer computes"
            given = f"one at {place or 'the module itself'}"
            raise InputError(name, allowed=allowed, given=given, remedy="remove it first")
        words = type(layer).__name__ if [*layer.children()] else repr(layer)
        words = f"{words} at {place}" if place else words
        # Not isinstance: a subclass may compute anything.
        if type(layer) is nn.Linear:
            weight, bias = (
                None if values is None else values.detach().to(dtype or values.dtype)
                for values in (layer.weight, layer.bias)
            )
            assert weight is not None
            layers.append(Dense(weight, bias, False, words))
        elif type(layer) is nn.ReLU and layers:
            layers[-1] = layers[-1]._replace(relu=True)
        elif not _does_nothing(layer, leading=not layers):
            raise InputError(
                name,
                allowed="a Sequential of Linear and ReLU layers",
                given=words,
                remedy="no construction covers it: convert what lies before it and behind it apart",
            )
    return layers


def _does_nothing(layer: nn.Module, *, leading: bool) -> bool:
    """Whether a layer changes no row in evaluation; a leading ``Flatten`` changes none."""
    if type(layer) is nn.Flatten:
        return leading and (layer.start_dim, layer.end_dim) == (1, -1)
    if isinstance(layer, nn.Sequential):
        return type(layer).forward is nn.Sequential.forward
    return type(layer) in (nn.Identity, nn.Dropout)
