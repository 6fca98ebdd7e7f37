"""Networks of layers: deep linear networks, ReLU networks, and values as networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import _checks, lowrank, randomness
from ..errors import InputError
from .base import Network


@dataclass(frozen=True, eq=False, repr=False)
class _Layers(Network):
    """Weights ``W_1, …, W_L`` that chain; subclasses say what is between them."""

    weights: tuple[Float[Tensor, "*batch _ _"], ...]

    @property
    def depth(self) -> int:
        """Number of layers ``L``."""
        return len(self.weights)

    @property
    def widths(self) -> tuple[int, ...]:
        """Sizes along the network, ``(in, …, out)``: ``L + 1`` of them."""
        return (self.weights[0].shape[-1], *(weight.shape[-2] for weight in self.weights))

    @property
    def sides(self) -> str:
        """The widths, in the order of the layers."""
        return "→".join(map(str, self.widths))

    def to_sequential(self) -> nn.Sequential:
        """A `torch.nn.Sequential` that computes this on rows; raises `InputError` for batches."""
        _checks.single(network=self)
        modules: list[nn.Module] = []
        for l, weight in enumerate(self.weights):
            out, into = weight.shape
            layer = nn.Linear(into, out, bias=bool(self.biases), dtype=weight.dtype)
            layer.weight = nn.Parameter(weight.clone())
            if self.biases:
                layer.bias = nn.Parameter(self.biases[l].clone())
            modules += [layer, nn.ReLU()] if l < self.relus else [layer]
        return nn.Sequential(*modules)


def product(weights: Sequence[Float[Tensor, "*#batch _ _"]]) -> Float[Tensor, "*batch out in"]:
    """``∏_l W_l = W_L ⋯ W_1``: the first of the sequence acts first."""
    return reduce(lambda inner, outer: outer @ inner, weights)


@dataclass(frozen=True, eq=False, repr=False)
class LinearNetwork(_Layers):
    """A deep linear network ``x ↦ W_L ⋯ W_1 x``.

    Weights ``[..., out, in]``, first layer first, or stacked to ``[..., L, D, D]``, are tensors,
    numpy arrays or nested lists, all float32 or all float64; batch dimensions broadcast. Raises
    `InputError` for no layers, sizes that do not chain, other types, and non-finite numbers.
    """

    def __init__(self, weights: Any) -> None:
        object.__setattr__(self, "weights", tuple(_usable_layers(weights)[0]))

    @classmethod
    def of(cls, value: Any, name: str = "network") -> LinearNetwork:
        """``value`` if it is a linear network, or make one from it; `InputError` calls it ``name``.

        A `torch.nn.Sequential`, one matrix ``[out, in]`` (one layer), or ``weights`` of the class.
        """
        network: Any = as_network(value, name)
        _checks.kind(cls, **{name: network})
        return network

    @classmethod
    def unchecked(
        cls,
        weights: Sequence[Float[Tensor, "*batch _ _"]],
        spectra: Sequence[Float[Tensor, "*batch _"]] | None = None,
    ) -> LinearNetwork:
        """The network of usable weights of one batch shape, with singular values that are known."""
        network = object.__new__(cls)
        object.__setattr__(network, "weights", tuple(weights))
        if spectra is not None:
            vars(network)["spectra"] = tuple(spectra)
        return network

    @classmethod
    def random(
        cls,
        depth: int,
        width: int,
        *,
        batch_shape: tuple[int, ...] = (),
        seed: int = 0,
        purpose: str = "network",
        dtype: torch.dtype = torch.float64,
    ) -> LinearNetwork:
        """Draw square layers uniform on ``±1/√D``, like `torch.nn.Linear`, by seed and purpose."""
        generator = randomness.generator(seed, "linear network", purpose)
        return cls(
            _random_weights(depth, width, batch_shape=batch_shape, generator=generator, dtype=dtype)
        )

    def with_parameters(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
    ) -> LinearNetwork:
        return LinearNetwork(weights)

    def holding(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> LinearNetwork:
        return LinearNetwork.unchecked(weights)

    def __call__(
        self, x: Float[Tensor, "*#batch in samples"]
    ) -> Float[Tensor, "*batch out samples"]:
        """``W_L ⋯ W_1 x``, layer by layer."""
        return product([self.as_inputs(x), *self.weights])

    def product(self) -> Float[Tensor, "*batch out in"]:
        """The matrix ``∏_l W_l`` that the network applies."""
        return product(self.weights)

    def halves(self) -> tuple[Tensor, Tensor]:
        """The products of the first half of the layers and of the other half."""
        middle = self.depth // 2
        return product(self.weights[:middle]), product(self.weights[middle:])

    @cached_property
    def spectra(self) -> tuple[Float[Tensor, "*batch _"], ...]:
        """The singular values of each layer's weight."""
        return tuple(lowrank.spectrum(weight) for weight in self.weights)

    @property
    def norms(self) -> tuple[Float[Tensor, "*batch"], ...]:
        """``‖W_l‖_2`` of each layer."""
        return tuple(values[..., 0] for values in self.spectra)

    @cached_property
    def norm(self) -> Float[Tensor, "*batch"]:
        """``‖∏_l W_l‖_2``."""
        return self.norms[0] if self.depth == 1 else lowrank.norm(self.product())

    @cached_property
    def rounding_scale(self) -> Float[Tensor, "*batch"]:
        """Entries of the product below ``D · eps`` times this may be rounding.

        The smaller of two bounds: ``max_l ‖∏_{j>l} W_j‖ ‖W_l‖ ‖∏_{j<l} W_j‖`` over layers, and
        ``‖∏_l |W_l|‖_2``, bounded by the root of its largest row sum times its largest column sum.
        """
        if self.depth == 1:
            return self.norms[0]
        first, *middle, last = self.weights
        inner, outer = [first], [last]
        for low, high in zip(middle, reversed(middle), strict=True):
            inner.append(low @ inner[-1])
            outer.append(outer[-1] @ high)
        one = torch.ones_like(self.norms[0])
        before = [one, self.norms[0], *map(lowrank.norm, inner[1:])]
        after = [one, self.norms[-1], *map(lowrank.norm, outer[1:])]
        layers = zip(after[::-1], self.norms, before, strict=True)
        layerwise = torch.stack([a * w * b for a, w, b in layers]).amax(0)
        sizes = product([weight.abs() for weight in self.weights]).nan_to_num(torch.inf)
        entrywise = sizes.sum(-1).amax(-1).sqrt() * sizes.sum(-2).amax(-1).sqrt()
        return torch.minimum(layerwise, entrywise)

    @classmethod
    def from_sequential(
        cls, module: nn.Sequential, *, dtype: torch.dtype | None = None, name: str = "module"
    ) -> LinearNetwork:
        """Read a `torch.nn.Sequential` as `FNN.from_sequential` does; refuses ReLU and bias too."""
        layers = _dense_layers(module, name, dtype)
        for layer in layers:
            if layer.relu or layer.bias is not None:
                what = "a ReLU after" if layer.relu else "a bias in"
                raise InputError(
                    name,
                    allowed="without ReLU and biases",
                    given=f"{what} {layer.words}",
                    remedy="FNN.from_sequential takes both",
                )
        return cls([layer.weight for layer in layers])


def pad(x: Float[Tensor, "*batch in samples"], width: int) -> Float[Tensor, "*batch width samples"]:
    """Append rows of zeros to inputs of a narrower network, up to ``width`` coordinates."""
    width = _checks.integer("width", width, x.shape[-2])
    return nn.functional.pad(x, (0, 0, 0, width - x.shape[-2]))


@dataclass(frozen=True, eq=False, repr=False)
class FNN(_Layers):
    """A ReLU network: layer ``l`` maps ``z`` to ``ReLU(W_l z + b_l)``.

    With ``linear_last`` it ends with ``W_L z + b_L``. The ``L`` weights ``[..., out, in]`` and
    biases ``[..., out]``, first layer first, may be stacked to ``[..., L, D, D]`` and
    ``[..., L, D]``. Tensors, numpy arrays or nested lists are taken, all float32 or all float64;
    batch dimensions broadcast. Raises `InputError` for no layers, sizes that do not fit, other or
    mixed types, and numbers that are not finite.
    """

    biases: tuple[Float[Tensor, "*batch _"], ...]
    linear_last: bool = False

    def __init__(self, weights: Any, biases: Any, *, linear_last: bool = False) -> None:
        linear_last = _checks.flag("linear_last", linear_last)
        self._set(*_usable_layers(weights, [] if biases is None else biases), linear_last)

    def _set(self, weights: Sequence[Tensor], biases: Sequence[Tensor], linear_last: bool) -> FNN:
        object.__setattr__(self, "weights", tuple(weights))
        object.__setattr__(self, "biases", tuple(biases))
        object.__setattr__(self, "linear_last", linear_last)
        return self

    @classmethod
    def random(
        cls,
        depth: int,
        width: int,
        *,
        linear_last: bool = False,
        batch_shape: tuple[int, ...] = (),
        seed: int = 0,
        purpose: str = "network",
        dtype: torch.dtype = torch.float64,
    ) -> FNN:
        """Draw square layers uniform on ``±1/√D``, like `torch.nn.Linear`, by seed and purpose."""
        generator = randomness.generator(seed, "ReLU network", purpose)
        weights = _random_weights(
            depth, width, batch_shape=batch_shape, generator=generator, dtype=dtype
        )
        shape = weights.shape[:-1]
        biases = _uniform(*shape, width=width, generator=generator, dtype=dtype)
        return cls(weights, biases, linear_last=linear_last)

    @property
    def relus(self) -> int:
        """How many of the first layers have a ReLU: all, or all but the last."""
        return self.depth - self.linear_last

    def with_parameters(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
    ) -> FNN:
        biases = self.biases if biases is None else biases
        return FNN(weights, biases, linear_last=self.linear_last)

    def holding(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> FNN:
        return object.__new__(FNN)._set(weights, biases, self.linear_last)

    def without_last_relu(self) -> FNN:
        """The network without its last ReLU."""
        return object.__new__(FNN)._set(self.weights, self.biases, True)

    def layers(self, which: slice) -> FNN:
        """The network of consecutive layers; only the last of all layers can be linear."""
        last = self.linear_last and self.depth - 1 in range(self.depth)[which]
        return object.__new__(FNN)._set(self.weights[which], self.biases[which], last)

    def linearize(self, blocks: Sequence[slice]) -> FNN:
        """The network without the ReLUs inside blocks: each block becomes one affine layer."""
        weights, biases = [], []
        for layers in blocks:
            bias, *others = self.biases[layers]
            for W, b in zip(self.weights[layers][1:], others, strict=True):
                bias = (W @ bias[..., None])[..., 0] + b
            weights.append(product(self.weights[layers]))
            biases.append(bias)
        return FNN(weights, biases, linear_last=self.linear_last)

    def preactivations(
        self, x: Float[Tensor, "*#batch in samples"]
    ) -> list[Float[Tensor, "*batch _ samples"]]:
        """``W_l z_{l−1} + b_l`` of each layer, with ``z_0 = x`` and ``z_l`` its ReLU."""
        z, arguments = self.as_inputs(x), []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            arguments.append(weight @ z + bias[..., None])
            z = arguments[-1].relu()
        return arguments

    def behind(
        self, l: int, p: Float[Tensor, "*#batch _ samples"]
    ) -> Float[Tensor, "*batch out samples"]:
        """The outputs for pre-activations of layer ``l``, from 0; gradients flow through."""
        for weight, bias in zip(self.weights[l + 1 :], self.biases[l + 1 :], strict=True):
            p = weight @ p.relu() + bias[..., None]
        return p if self.linear_last else p.relu()

    def __call__(
        self, x: Float[Tensor, "*#batch in samples"]
    ) -> Float[Tensor, "*batch out samples"]:
        """``z_L``: the last layer's pre-activations, or the ReLU of them."""
        last = self.preactivations(x)[-1]
        return last if self.linear_last else last.relu()

    @classmethod
    def from_sequential(
        cls, module: nn.Sequential, *, dtype: torch.dtype | None = None, name: str = "module"
    ) -> FNN:
        """Read a `torch.nn.Sequential` of ``Linear`` layers with a ReLU between any two.

        It may end with a ReLU, or with ``Linear``: then the last layer is linear. Missing biases
        are zeros. Sequentials may be nested; ``Identity``, ``Dropout`` and a leading ``Flatten``
        are left out, as in evaluation. The module takes rows: ``network(x.mT).mT`` equals
        ``module(x)``. ``dtype`` converts all numbers, which are float32 or float64.

        Raises `InputError`, which calls the module ``name``, for other modules and layers, by their
        place as in a ``state_dict``, for forward hooks and for other types.
        """
        layers = _dense_layers(module, name, dtype)
        for inner, outer in pairwise(layers):
            if not inner.relu:
                raise InputError(
                    name,
                    allowed="a Sequential with a ReLU between any two Linear layers",
                    given=f"none between {inner.words} and {outer.words}",
                    remedy="multiply the two into one",
                )
        biases = [
            layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
            for layer in layers
        ]
        weights = [layer.weight for layer in layers]
        return cls(weights, biases, linear_last=bool(layers) and not layers[-1].relu)


def as_network(value: Any, name: str = "network") -> Network:
    """Return ``value`` if it is a network, or make one from it.

    A `torch.nn.Sequential` with a ReLU or bias makes an `FNN`; another one, a matrix, or several
    make a `LinearNetwork`. Raises `InputError`, which calls the value ``name``, for anything else.
    """
    if isinstance(value, Network):
        return value
    if isinstance(value, nn.Sequential):
        has_relu_or_bias = any(
            isinstance(part, nn.ReLU) or getattr(part, "bias", None) is not None
            for part in value.modules()
        )
        kind: type[FNN] | type[LinearNetwork] = FNN if has_relu_or_bias else LinearNetwork
        return kind.from_sequential(value, name=name)
    if isinstance(value, str) or not isinstance(value, Tensor | np.ndarray | Sequence):
        raise InputError(
            name,
            allowed="a network (lorapower.networks), a torch.nn.Sequential of layers, or matrices",
            given=type(value).__name__,
            remedy="networks.from_decoder makes a network of a GPT-2, OPT, Llama, Mistral or Qwen2"
            if hasattr(value, "config")
            else "",
        )
    is_matrix = isinstance(value, Tensor | np.ndarray) and value.ndim == 2
    return LinearNetwork([value] if is_matrix else value)


def _usable_layers(weights: Any, biases: Any = None) -> tuple[list[Tensor], list[Tensor]]:
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


def _uniform(
    *shape: int, width: int, generator: torch.Generator, dtype: torch.dtype
) -> Float[Tensor, "*shape"]:
    """Draw as `torch.nn.Linear` draws its own numbers: uniformly on ``±1/√width``."""
    drawn = randomness.uniform(generator, *shape)
    return ((2 * drawn - 1) / width**0.5).to(dtype)


def _random_weights(
    depth: int,
    width: int,
    *,
    batch_shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch depth width width"]:
    """Draw square layers by `_uniform`; checks all arguments."""
    depth = _checks.integer("depth", depth, 1)
    width = _checks.integer("width", width, 1)
    batch_shape, dtype = _checks.sizes("batch_shape", batch_shape), _checks.precision(dtype)
    shape = (*batch_shape, depth, width, width)
    return _uniform(*shape, width=width, generator=generator, dtype=dtype)


class _Dense(NamedTuple):
    """A ``Linear`` layer's numbers, whether a ReLU follows, and its name and place."""

    weight: Tensor
    bias: Tensor | None
    relu: bool
    words: str


def _dense_layers(module: Any, name: str, dtype: torch.dtype | None) -> list[_Dense]:
    """The ``Linear`` layers of a Sequential, also nested; refuses all else that computes."""
    if not isinstance(module, nn.Sequential):
        allowed = "a torch.nn.Sequential of layers"
        raise InputError(name, allowed=allowed, given=type(module).__name__)
    if dtype is not None:
        _checks.precision(dtype)
    layers: list[_Dense] = []
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
            layers.append(_Dense(weight, bias, False, words))
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
