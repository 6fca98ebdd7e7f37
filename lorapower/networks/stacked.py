"""Networks whose parameters are kept in stacks, over blocks and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks
from ..errors import InputError
from .base import Network


class Stacked(Network):
    """A network of blocks with heads: each kind of parameter is one tensor, an attribute.

    Attributes
    ----------
    SHAPES
        The last dimensions of every kind of parameter by name; equal names are equal sizes.
    weight_kinds, bias_kinds
        The kinds that are matrices and those that are vectors, in the order of ``weights`` and
        ``biases``.
    """

    SHAPES: ClassVar[Mapping[str, tuple[str, ...]]]
    weight_kinds: ClassVar[tuple[str, ...]]
    bias_kinds: ClassVar[tuple[str, ...]]
    W_Q: Float[Tensor, "*batch blocks heads query width"]
    W_K: Float[Tensor, "*batch blocks heads query width"]
    W_V: Float[Tensor, "*batch blocks heads value width"]
    W_O: Float[Tensor, "*batch blocks heads width value"]
    sequences: ClassVar[bool] = True

    def _set(self, values: Mapping[str, Any]) -> None:
        """Checked, of one batch shape, and with sizes that fit: the attributes of this network."""
        given = {
            name: _checks.real_tensor(name, value, min_dims=len(self.SHAPES[name]), copy=True)
            for name, value in values.items()
        }
        sizes: dict[str, int] = {}
        for name, tensor in given.items():
            shape = self.SHAPES[name]
            own = tensor.shape[-len(shape) :]
            wanted = tuple(sizes.setdefault(side, n) for side, n in zip(shape, own, strict=True))
            if tuple(own) != wanted:
                raise InputError(
                    name,
                    allowed=f"[..., {', '.join(shape)}] = [..., {', '.join(map(str, wanted))}]",
                    given=f"shape {tuple(tensor.shape)}",
                )
        if len({tensor.dtype for tensor in given.values()}) > 1:
            raise InputError(
                "weights and biases",
                allowed="all float32 or all float64",
                given="both",
                remedy="convert one",
            )
        batch = _checks.common_shape(
            "weights and biases",
            [tensor.shape[: -len(self.SHAPES[name])] for name, tensor in given.items()],
        )
        for name, tensor in given.items():
            own = tensor.shape[-len(self.SHAPES[name]) :]
            object.__setattr__(self, name, tensor.expand(*batch, *own))

    @staticmethod
    def _drawn_sizes(
        depth: int, width: int, heads: int, head_size: int | None, hidden: int | None, usual: int
    ) -> dict[str, int]:
        """Checked sizes of a random network by name; heads are as wide as tokens by default."""
        width = _checks.integer("width", width, 1)
        size = width if head_size is None else _checks.integer("head_size", head_size, 1)
        return {
            "blocks": _checks.integer("depth", depth, 1),
            "heads": _checks.integer("heads", heads, 1),
            "query size": size,
            "value size": size,
            "width": width,
            "hidden": usual * width if hidden is None else _checks.integer("hidden", hidden, 1),
            "outputs": width,
        }

    @property
    def depth(self) -> int:
        """Number of blocks ``L``."""
        return self.W_Q.shape[-4]

    @property
    def heads(self) -> int:
        """Number of heads ``H`` in each block."""
        return self.W_Q.shape[-3]

    @property
    def width(self) -> int:
        """Size ``D`` of a token."""
        return self.W_Q.shape[-1]

    @property
    def sizes(self) -> dict[str, int]:
        """Every size by its name, such as blocks, heads, query size, width and hidden."""
        return {
            side: n
            for name, shape in self.SHAPES.items()
            if name in (*self.weight_kinds, *self.bias_kinds)
            for side, n in zip(shape, getattr(self, name).shape[-len(shape) :], strict=True)
        }

    # Kept in stacks, so that both are read only.
    @cached_property
    def weights(self) -> tuple[Float[Tensor, "*batch _ _"], ...]:  # type: ignore[override]
        """All matrices, one by one: by kind in the order of parameters, then by block and head."""
        return tuple(w for name in self.weight_kinds for w in self._unstacked(name, 2))

    @cached_property
    def biases(self) -> tuple[Float[Tensor, "*batch _"], ...]:  # type: ignore[override]
        """All vectors, one by one: by kind in the order of parameters, then by block and head."""
        return tuple(b for name in self.bias_kinds for b in self._unstacked(name, 1))

    @property
    def weight_names(self) -> tuple[str, ...]:
        """For each of `weights` what it is, such as ``"W_Q of block 1, head 2"``."""
        return self._names(self.weight_kinds)

    @property
    def bias_names(self) -> tuple[str, ...]:
        """For each of `biases` what it is, such as ``"b_1 of block 2"``."""
        return self._names(self.bias_kinds)

    def with_parameters(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
    ) -> Self:
        for name, given, own in (
            ("weights", weights, self.weights),
            ("biases", biases, self.biases),
        ):
            if given is not None and len(given) != len(own):
                raise InputError(
                    name, allowed=f"{len(own)}, in the order of this network's", given=len(given)
                )
        tuned = self.biases if biases is None else biases
        return self._made_of(weights, tuned, checked=True)

    def holding(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Self:
        return self._made_of(weights, biases, checked=False)

    def _made_of(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor], *, checked: bool
    ) -> Self:
        network = object.__new__(type(self))
        for name, value in self.settings.items():
            object.__setattr__(network, name, value)
        stacks = self._stacked(self.weight_kinds, weights, 2)
        stacks |= self._stacked(self.bias_kinds, biases, 1)
        if checked:
            network._set(stacks)
        else:
            for name, stack in stacks.items():
                object.__setattr__(network, name, stack)
        return network

    @property
    def settings(self) -> dict[str, Any]:
        """What a network of other numbers has in common with this one, by attribute."""
        return {}

    def _names(self, kinds: Sequence[str]) -> tuple[str, ...]:
        blocks, heads = range(1, self.depth + 1), range(1, self.heads + 1)
        names: list[str] = []
        for name in kinds:
            if "heads" in self.SHAPES[name]:
                names += [f"{name} of block {l}, head {h}" for l in blocks for h in heads]
            elif "blocks" in self.SHAPES[name]:
                names += [f"{name} of block {l}" for l in blocks]
            else:
                names.append(name)
        return tuple(names)

    def _unstacked(self, name: str, dims: int) -> tuple[Tensor, ...]:
        stack: Tensor = getattr(self, name)
        first = stack.ndim - len(self.SHAPES[name])
        return stack.unsqueeze(first).flatten(first, -dims - 1).unbind(first)

    def _stacked(
        self, names: Sequence[str], values: Sequence[Tensor], dims: int
    ) -> dict[str, Tensor]:
        remaining, stacks = iter(values), {}
        for name in names:
            sizes = getattr(self, name).shape[-len(self.SHAPES[name]) : -dims]
            members = torch.broadcast_tensors(*(next(remaining) for _ in range(sizes.numel())))
            stack = torch.stack(members, -dims - 1)
            shape = (*stack.shape[: -dims - 1], *sizes, *stack.shape[-dims:])
            stacks[name] = stack.reshape(shape)
        return stacks

    def as_inputs(self, x: Any, name: str = "x") -> Float[Tensor, "*batch width n"]:
        x = super().as_inputs(x, name)
        _checks.common_shape(f"{name} and network", [tuple(x.shape[:-2]), tuple(self.batch_shape)])
        return x
