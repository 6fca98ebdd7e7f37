"""Networks of layers: deep linear networks, ReLU networks, and values as networks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, reduce
from itertools import accumulate
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import _checks, lowrank, randomness
from ..errors import InputError
from .base import Inputs, Network, Outputs


class _Layers(Network):
    """Weights ``W_1, …, W_L`` that chain; subclasses say what is between them."""

    weights: tuple[Float[Tensor, "*batch _ _"], ...]
    _stream: ClassVar[str]

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
        **options: Any,
    ) -> Self:
        """Draw square layers uniform on ``±1/√D``, like `torch.nn.Linear`, by seed and purpose.

        Examples
        --------
        >>> from lorapower.networks import FNN, LinearNetwork
        >>> FNN.random(2, 4), LinearNetwork.random(3, 4, batch_shape=(5,))
        (FNN(4→4→4, float64), LinearNetwork(4→4→4→4, batch [5], float64))
        """
        generator = randomness.generator(seed, cls._stream, purpose)
        shape = (*batch_shape, depth, width)
        shapes = [(*shape, width), shape] if cls is FNN else [(*shape, width)]
        drawn = [2 * randomness.uniform(generator, *each) - 1 for each in shapes]
        return cls(*((values / width**0.5).to(dtype) for values in drawn), **options)

    @classmethod
    def of(cls, value: Any, name: str = "network") -> Self:
        """Read a network of this kind from what `as_network` takes; errors call it ``name``."""
        network: Any = as_network(value, name)
        _checks.kind(cls, **{name: network})
        return network

    @property
    def depth(self) -> int:
        """Number of layers ``L``."""
        return len(self.weights)

    @property
    def widths(self) -> tuple[int, ...]:
        """Sizes along the network, ``(in, …, out)``: ``L + 1`` of them."""
        return (self.weights[0].shape[-1], *(weight.shape[-2] for weight in self.weights))

    @property
    def _sides(self) -> str:
        """The widths, in the order of the layers."""
        return "→".join(map(str, self.widths))

    def to_sequential(self) -> nn.Sequential:
        """Make a `torch.nn.Sequential` that takes rows; raises `InputError` for batches."""
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
    """Multiply ``∏_l W_l = W_L ⋯ W_1``: the first of the sequence acts first."""
    return reduce(lambda inner, outer: outer @ inner, weights)


class LinearNetwork(_Layers):
    """A deep linear network ``x ↦ W_L ⋯ W_1 x``.

    Weights ``[..., out, in]``, first layer first, or stacked to ``[..., L, D, D]``, are tensors,
    numpy arrays or nested lists, all float32 or all float64; batch dimensions broadcast. Raises
    `InputError` for no layers, sizes that do not fit, other or mixed types, and non-finite numbers.
    Not ``checked``, it holds these very tensors, of one batch shape, and gradients flow to them.
    """

    _stream = "linear network"

    def __init__(self, weights: Any, *, checked: bool = True) -> None:
        self.weights = tuple(_usable_layers(weights)[0] if checked else weights)

    def _rebuilt(self, weights: Sequence[Tensor], biases: Sequence[Tensor], checked: bool) -> Self:
        return type(self)(weights, checked=checked)

    def __call__(self, x: Inputs) -> Outputs:
        """Compute ``W_L ⋯ W_1 x``, layer by layer."""
        return product([self.as_inputs(x), *self.weights])

    def product(self) -> Float[Tensor, "*batch out in"]:
        """Compute the matrix ``∏_l W_l`` that the network applies."""
        return product(self.weights)

    def halves(self) -> tuple[Tensor, Tensor]:
        """Compute the products of the first half of the layers and of the other half."""
        middle = self.depth // 2
        return product(self.weights[:middle]), product(self.weights[middle:])

    @cached_property
    def spectra(self) -> tuple[Float[Tensor, "*batch _"], ...]:
        """The singular values of each layer's weight."""
        return tuple(lowrank.spectrum(weight) for weight in self.weights)

    @cached_property
    def norm(self) -> Float[Tensor, "*batch"]:
        """``‖∏_l W_l‖_2``."""
        return self.spectra[0][..., 0] if self.depth == 1 else lowrank.norm(self.product())

    @cached_property
    def rounding_scale(self) -> Float[Tensor, "*batch"]:
        """Entries of the product below ``D · eps`` times this may be rounding.

        The smaller of two bounds: ``max_l ‖∏_{j>l} W_j‖ ‖W_l‖ ‖∏_{j<l} W_j‖`` over layers, and
        ``‖∏_l |W_l|‖_2``, bounded by the root of its largest row sum times its largest column sum.
        """
        norms = [values[..., 0] for values in self.spectra]
        if self.depth == 1:
            return norms[0]
        inner = [*accumulate(self.weights[:-1], lambda P, W: W @ P)]
        outer = [*accumulate(reversed(self.weights[1:]), torch.matmul)]
        one = torch.ones_like(norms[0])
        before = [one, norms[0], *map(lowrank.norm, inner[1:])]
        after = [one, norms[-1], *map(lowrank.norm, outer[1:])]
        layers = zip(after[::-1], norms, before, strict=True)
        layerwise = torch.stack([a * w * b for a, w, b in layers]).amax(0)
        sizes = product([weight.abs() for weight in self.weights]).nan_to_num(torch.inf)
        entrywise = sizes.sum(-1).amax(-1).sqrt() * sizes.sum(-2).amax(-1).sqrt()
        return torch.minimum(layerwise, entrywise)


class FNN(_Layers):
    """A ReLU network: layer ``l`` maps ``z`` to ``ReLU(W_l z + b_l)``.

    With ``linear_last`` it ends with ``W_L z + b_L``. Weights, and biases ``[..., out]`` or stacked
    to ``[..., L, D]``, are taken and refused as by a `LinearNetwork`.
    """

    _stream = "ReLU network"

    def __init__(
        self, weights: Any, biases: Any, *, linear_last: bool = False, checked: bool = True
    ) -> None:
        if checked:
            weights, biases = _usable_layers(weights, [] if biases is None else biases)
        self.weights, self.biases, self.linear_last = tuple(weights), tuple(biases), linear_last

    @property
    def relus(self) -> int:
        """How many of the first layers have a ReLU: all, or all but the last."""
        return self.depth - 1 if self.linear_last else self.depth

    def _rebuilt(self, weights: Sequence[Tensor], biases: Sequence[Tensor], checked: bool) -> Self:
        return type(self)(weights, biases, linear_last=self.linear_last, checked=checked)

    def layers(self, which: slice) -> FNN:
        """Cut out consecutive layers; only the last of all layers can be linear."""
        last = self.linear_last and self.depth - 1 in range(self.depth)[which]
        return FNN(self.weights[which], self.biases[which], linear_last=last, checked=False)

    def linearize(self, blocks: Sequence[slice]) -> FNN:
        """Drop the ReLUs inside blocks: each block becomes one affine layer."""
        weights, biases = [], []
        for layers in blocks:
            bias, *others = self.biases[layers]
            for W, b in zip(self.weights[layers][1:], others, strict=True):
                bias = lowrank.times(W, bias) + b
            weights.append(product(self.weights[layers]))
            biases.append(bias)
        return FNN(weights, biases, linear_last=self.linear_last)

    def preactivations(self, x: Inputs) -> list[Float[Tensor, "*batch _ samples"]]:
        """Compute ``W_l z_{l−1} + b_l`` of each layer, with ``z_0 = x`` and ``z_l`` its ReLU."""
        z, arguments = self.as_inputs(x), []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            arguments.append(weight @ z + bias[..., None])
            z = arguments[-1].relu()
        return arguments

    def __call__(self, x: Inputs) -> Outputs:
        """Compute ``z_L``: the last layer's pre-activations, or the ReLU of them."""
        last = self.preactivations(x)[-1]
        return last if self.linear_last else last.relu()


def as_network(value: Any, name: str = "network") -> Network:
    """Return a network as it is, or make one from a module or from matrices.

    A `torch.nn.Linear` is one layer; a `torch.nn.Sequential` has several, with a ReLU between any
    two, or with neither ReLUs nor biases. Without these they make a `LinearNetwork`, as do a matrix
    or several; others make an `FNN`, whose last layer is linear where no ReLU follows it, with
    zeros for missing biases. Sequentials may be nested; ``Identity``, ``Dropout`` and a leading
    ``Flatten`` are left out, as in evaluation. The module takes rows: ``network(x.mT).mT`` equals
    ``module(x)``. Raises `InputError`, which calls the value ``name``, for anything else.

    Examples
    --------
    >>> from torch import nn
    >>> from lorapower.networks import as_network
    >>> as_network(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    FNN(3→5→2, float32)
    >>> as_network([[[1.0, 0.0], [0.0, 1.0]]])
    LinearNetwork(2→2, float64)
    """
    if isinstance(value, Network):
        return value
    if isinstance(value, nn.Sequential | nn.Linear):
        return _from_sequential(value, name)
    if isinstance(value, str) or not isinstance(value, Tensor | np.ndarray | Sequence):
        allowed = "a network (lorapower.networks), torch.nn.Linear or Sequential, or matrices"
        remedy = "networks.from_decoder reads transformers" if hasattr(value, "config") else ""
        raise InputError(name, allowed, type(value).__name__, remedy)
    is_matrix = isinstance(value, Tensor | np.ndarray) and value.ndim == 2
    return LinearNetwork([value] if is_matrix else value)


def _from_sequential(module: nn.Module, name: str) -> Network:
    """Read the ``Linear`` layers of a Sequential; refuse all else that computes."""
    layers: list[nn.Linear] = []
    relus: list[bool] = []
    for _, part in module.named_modules(remove_duplicate=False):
        # Not isinstance: a subclass may compute anything.
        kind = type(part)
        flattens = kind is nn.Flatten and (part.start_dim, part.end_dim) == (1, -1)
        if type(part) is nn.Linear:
            layers.append(part)
            relus.append(False)
        elif kind is nn.ReLU and layers:
            relus[-1] = True
        elif not (kind in (nn.Sequential, nn.Identity, nn.Dropout) or (flattens and not layers)):
            allowed = "a torch.nn.Sequential of Linear and ReLU layers"
            raise InputError(name, allowed=allowed, given=repr(part))
    weights = [layer.weight for layer in layers]
    if not any(relus) and all(layer.bias is None for layer in layers):
        return LinearNetwork(weights)
    if not all(relus[:-1]):
        allowed = "a Sequential with a ReLU between any two Linear layers"
        given = f"none after its layer {relus.index(False) + 1}"
        raise InputError(name, allowed=allowed, given=given, remedy="multiply the two into one")
    biases = [
        W.new_zeros(len(W)) if layer.bias is None else layer.bias
        for W, layer in zip(weights, layers, strict=True)
    ]
    return FNN(weights, biases, linear_last=not relus[-1])


def _usable_layers(weights: Any, biases: Any = None) -> tuple[list[Tensor], list[Tensor]]:
    """Read weights and biases (maybe none) of layers that chain, of one type and batch shape."""
    matrices = _per_layer("weight", weights, 2)
    vectors = [] if biases is None else _per_layer("bias", biases, 1)
    outputs, inputs = ([W.shape[dim] for W in matrices] for dim in (-2, -1))
    if outputs[:-1] != inputs[1:]:
        allowed = f"of {outputs[:-1]} columns after the first, the outputs of the layers before"
        raise InputError("weights", allowed=allowed, given=inputs[1:])
    if biases is not None and [b.shape[-1] for b in vectors] != outputs:
        allowed = f"of {outputs} entries, the outputs of the layers"
        raise InputError("biases", allowed=allowed, given=[b.shape[-1] for b in vectors])
    expanded = _checks.one_batch([*((w, 2) for w in matrices), *((b, 1) for b in vectors)])
    return expanded[: len(matrices)], expanded[len(matrices) :]


def _per_layer(name: str, values: Any, dims: int) -> list[Tensor]:
    """Read one tensor of at least ``dims`` dimensions a layer, from a sequence or a stack."""
    plural = {"weight": "weights", "bias": "biases"}[name]
    if isinstance(values, Tensor | np.ndarray):
        values = _checks.real_tensor(plural, values, min_dims=dims + 1).unbind(-dims - 1)
    if not isinstance(values, Sequence) or isinstance(values, str) or not len(values):
        given = "none" if isinstance(values, Sequence) else type(values).__name__
        raise InputError(plural, allowed=f"one {name} or more", given=given)
    return [
        _checks.real_tensor(f"{name} of layer {l}", value, min_dims=dims, copy=True)
        for l, value in enumerate(values, start=1)
    ]
