"""What a `torch.nn.Sequential` holds, layer by layer: one reading for every kind of network."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks
from ..errors import InputError

# What to do about a layer that has no place in a network, by the first class that it is of.
REMEDIES: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    (nn.Linear, "make it a plain Linear layer: a subclass may compute something else"),
    (nn.ReLU, "begin with a Linear layer"),
    (
        nn.Flatten,
        "only one before all other layers that keeps the first dimension can be left out",
    ),
    ((nn.Softmax, nn.LogSoftmax), "leave it out and compare what it takes in"),
    (nn.MultiheadAttention, "see networks.Transformer for attention"),
    (nn.modules.batchnorm._BatchNorm, "in evaluation it is affine: multiply it into a Linear"),
    (nn.modules.conv._ConvNd, "it is a linear map: write it as the Linear layer of its matrix"),
)
OTHER_ACTIVATION = (
    "ReLU is the only activation that the constructions cover: replace it and train again"
)
OTHER_LAYER = "no construction covers it: convert what lies before it and behind it apart"


class Dense(NamedTuple):
    """A ``Linear`` layer of a module.

    Attributes
    ----------
    weight, bias
        Its numbers, ``[out, in]`` and ``[out]``; ``None`` without a bias.
    relu : bool
        Whether a ReLU follows it.
    words : str
        What it is and where, such as ``"Linear(…) at 1.0"``.
    """

    weight: Tensor
    bias: Tensor | None
    relu: bool
    words: str


def dense_layers(module: Any, name: str, dtype: torch.dtype | None) -> list[Dense]:
    """The ``Linear`` layers of a `torch.nn.Sequential`, those of nested ones too, in their order.

    All is as in evaluation, where ``Identity`` and ``Dropout`` layers do nothing. A ``Flatten``
    before all other layers is left out too: inputs of a network are columns already.

    Raises `InputError` for another module, for a layer of another class, for numbers that are
    neither float32 nor float64 and not converted, for layers without numbers (meta tensors), and
    for forward hooks. It names the layer by its place, as a ``state_dict`` does.

    Parameters
    ----------
    name : str
        What errors call the module.
    dtype : dtype, optional
        What all numbers are converted to; by default they stay as they are.
    """
    if not isinstance(module, nn.Sequential):
        raise InputError(
            name, allowed="a torch.nn.Sequential of layers", given=type(module).__name__
        )
    if hooked := [place for place, layer in module.named_modules() if _has_hooks(layer)]:
        raise InputError(
            name,
            allowed="without hooks, which may change what a layer computes",
            given=f"one at {hooked[0] or 'the module itself'}",
            remedy="remove it first",
        )
    if dtype is not None:
        _checks.precision(dtype)
    found: list[Dense] = []
    # A layer that stands in two places is two layers.
    for place, layer in module.named_modules(remove_duplicate=False):
        # Not isinstance: a subclass may compute anything.
        if type(layer) is nn.Linear:
            found.append(_dense(layer, _words(layer, place), name, dtype))
        elif type(layer) is nn.ReLU and found:
            found[-1] = found[-1]._replace(relu=True)
        elif not _does_nothing(layer, leading=not found):
            raise InputError(
                name,
                allowed="a Sequential of Linear and ReLU layers",
                given=_words(layer, place),
                remedy=_remedy(layer),
            )
    return found


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _does_nothing(layer: nn.Module, *, leading: bool) -> bool:
    """In evaluation, to rows; what a Sequential does is done by its layers."""
    if type(layer) is nn.Flatten:
        return leading and (layer.start_dim, layer.end_dim) == (1, -1)
    if isinstance(layer, nn.Sequential):
        return type(layer).forward is nn.Sequential.forward
    return type(layer) in (nn.Identity, nn.Dropout)


def _dense(layer: nn.Linear, words: str, name: str, dtype: torch.dtype | None) -> Dense:
    parameters = dict(layer.named_parameters())
    for values in parameters.values():
        if values.is_meta:
            raise InputError(
                name,
                allowed="of layers that hold numbers",
                given=f"{words} on the meta device",
                remedy="load its weights first",
            )
        if dtype is None and values.dtype not in _checks.PRECISIONS:
            raise InputError(
                name,
                allowed="of float32 or float64 numbers",
                given=f"{values.dtype} in {words}",
                remedy="from_sequential(module, dtype=torch.float32) converts them",
            )
    numbers = {key: values.detach().to(dtype) for key, values in parameters.items()}
    return Dense(numbers["weight"], numbers.get("bias"), relu=False, words=words)


def _words(layer: nn.Module, place: str) -> str:
    """In one line, which the name of a layer with layers inside would not be."""
    inside = any(True for _ in layer.children())
    words = type(layer).__name__ if inside else repr(layer)
    return f"{words} at {place}" if place else words


def _remedy(layer: nn.Module) -> str:
    for kind, remedy in REMEDIES:
        if isinstance(layer, kind):
            return remedy
    is_activation = type(layer).__module__ == nn.ReLU.__module__
    return OTHER_ACTIVATION if is_activation else OTHER_LAYER
