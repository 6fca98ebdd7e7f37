"""Two checkpoints of one architecture: what tuning changed, and a network with either's weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import _hub as hub
from ..errors import InputError
from . import families
from .families import Family, Kind
from .stored import Stored
from .texts import tokenizer


class Module(NamedTuple):
    """A linear module that an adapter can be put on.

    Attributes
    ----------
    name : str
        In the network.
    kind : Kind
        ``"attention"`` or ``"mlp"``, the halves of a block, or ``"other"``.
    shape : tuple
        ``(out, in)``.
    bias : bool
        Whether it has one.
    transposed : bool
        Whether the weight is kept as ``[in, out]``, as GPT-2's are.
    """

    name: str
    kind: Kind
    shape: tuple[int, int]
    bias: bool
    transposed: bool

    @property
    def cost(self) -> int:
        """Numbers of an adapter of rank 1: ``out + in``."""
        return sum(self.shape)


class Other(NamedTuple):
    """A parameter that tuning changed and that no adapter of low rank carries.

    Attributes
    ----------
    name : str
        In the network.
    kind : str
        ``"bias"``, ``"norm"``, ``"embedding"``, or ``"head"``, which the base may lack.
    size : int
        How many numbers it has.
    """

    name: str
    kind: str
    size: int


KINDS = ("bias", "norm", "embedding", "head")


@dataclass(frozen=True, eq=False, repr=False)
class Pair:
    """A base and what was tuned from it; see `Pair.open`.

    Attributes
    ----------
    base, tuned : Stored
        The checkpoints.
    family : Family
        Their architecture.
    prefix : str
        Of names in the model without its head, such as ``"bert."``; empty where there is no head.
    modules : dict
        Linear modules that adapters can be put on, by name, in the order of the network.
    others : tuple of Other
        All else that differs.
    """

    base: Stored
    tuned: Stored
    family: Family
    prefix: str
    modules: dict[str, Module]
    others: tuple[Other, ...]

    @classmethod
    def open(cls, base: str, tuned: str) -> Pair:
        """Two checkpoints: folders, names on the hub, or ``"packaged"``, the encoder of this book.

        The architecture, and a head that the base lacks, are those of ``tuned``. Weights are read
        later, one at a time. Raises `InputError` for checkpoints that are missing, not supported,
        quantized or no whole ones, and for two that are not of one architecture and size.
        """
        hub.require("checkpoints")
        first, second = Stored("base", base), Stored("tuned", tuned)
        family = families.family(second.config, "tuned")
        ours, theirs = first.config.model_type, second.config.model_type
        if ours != theirs:
            raise InputError("tuned", allowed=f"of type {ours!r}, like the base", given=theirs)
        with torch.device("meta"):
            network = _made(second.config, family)
        sizes = {name: tuple(value.shape) for name, value in network.named_parameters()}
        stem, body = network.base_model_prefix, network.base_model
        prefix = "" if body is network else f"{stem}."
        lacking = second.bind(sizes, stem)
        if lacking:
            raise InputError(
                "tuned",
                allowed=f"with all weights of {family.architecture}",
                given=f"one without {hub.some(sorted(lacking))}",
            )
        new = first.bind(sizes, stem)
        if deep := sorted(n for n in new if n.startswith(f"{prefix}{family.blocks}.")):
            raise InputError(
                "base", allowed="with all weights of the blocks", given=f"no {hub.some(deep)}"
            )
        modules = {
            one.name: one
            for one in _linear(body, prefix, family)
            if not new & {f"{one.name}.weight", f"{one.name}.bias"}
        }
        if extra := sorted(second.others(sizes) - first.others(sizes)):
            raise InputError(
                "tuned",
                allowed=f"with nothing but weights of {family.architecture}",
                given=f"one with {hub.some(extra)}",
            )
        pair = cls(first, second, family, prefix, modules, ())
        return replace(pair, others=tuple(pair._differing(network, new)))

    def __repr__(self) -> str:
        return (
            f"Pair({self.base.source!r}, {self.tuned.source!r}, {self.family.architecture}, "
            f"{len(self.modules)} modules)"
        )

    @cached_property
    def words(self) -> Any:
        """The tokenizer of the tuned checkpoint."""
        return tokenizer(self.tuned.source, str(self.tuned.place))

    @property
    def not_low_rank(self) -> dict[str, int]:
        """By kind, numbers of all parameters that differ and that no adapter of low rank carries.

        Of word embeddings an adapter holds only the rows that differ.
        """
        found = {kind: sum(o.size for o in self.others if o.kind == kind) for kind in KINDS}
        return {kind: size for kind, size in found.items() if size}

    def change(self, name: str) -> Float[Tensor, "out in"]:
        """``ΔW``, tuned less base, of a module, in float32."""
        module = self.modules[name]
        return self.weight("tuned", module) - self.weight("base", module)

    def weight(self, which: str, module: Module) -> Float[Tensor, "out in"]:
        """The weight of a module in ``"base"`` or ``"tuned"``."""
        stored = self.base if which == "base" else self.tuned
        weight = stored.read(f"{module.name}.weight")
        return weight.mT if module.transposed else weight

    def network(self) -> Any:
        """A network of transformers with the tuned weights, to be given others by `fill`."""
        with hub.quiet():
            network = _made(self.tuned.config, self.family)
        network.eval().requires_grad_(False)
        if network.config.pad_token_id is None:
            # By it a classifier on a decoder finds where texts end.
            network.config.pad_token_id = self.words.pad_token_id
        # Each text is passed once, and keys of one pass must not come into another.
        network.config.use_cache = False
        self.fill(network, "tuned")
        return network

    def fill(
        self,
        network: Any,
        which: str,
        *,
        within: str = "",
        leave: Collection[str] = (),
        updates: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> None:
        """Give a network the weights of ``"base"``, of ``"tuned"``, or of an ``"adapted"`` one.

        The adapted one has the base's modules, and everything else as tuned, but for parameters of
        the kinds of `Other` in ``leave``, which stay the base's. A head that the base lacks is the
        tuned one's. ``updates`` are values, by parameter, that are put in place of these. Only
        parameters whose names begin with ``within`` are set.
        """
        changed = {other.name for other in self.others if other.kind not in leave}
        updates = updates or {}
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if not name.startswith(within):
                    continue
                if name in updates:
                    value = updates[name]()
                elif which == "tuned" or (which == "adapted" and name in changed):
                    value = self.tuned.read(name)
                else:
                    value = (self.base if self.base.has(name) else self.tuned).read(name)
                parameter.copy_(value)

    def _differing(self, network: Any, new: set[str]) -> Iterable[Other]:
        """What differs beside the weights of modules, with what the base lacks (``new``)."""
        from transformers.pytorch_utils import Conv1D

        for name, value in network.named_parameters():
            place, _, part = name.rpartition(".")
            if place in self.modules and part == "weight":
                continue
            if name not in new and self._same(name):
                continue
            owner = network.get_submodule(place)
            if isinstance(owner, nn.Embedding):
                kind = "embedding"
            elif isinstance(owner, nn.Linear | Conv1D) and place not in self.modules:
                kind = "head"
            else:
                kind = "bias" if part == "bias" else "norm"
            yield Other(name, kind, value.numel())

    def _same(self, name: str) -> bool:
        return torch.equal(self.base.read(name), self.tuned.read(name))


def _made(config: Any, family: Family) -> Any:
    import transformers

    # Attention written out: with it gradients and tuned outputs are the same on every machine.
    kind = getattr(transformers, family.architecture)
    network = kind._from_config(config, attn_implementation="eager", dtype=torch.float32)
    network.tie_weights()
    return network


def _linear(body: nn.Module, prefix: str, family: Family) -> Iterable[Module]:
    from transformers.pytorch_utils import Conv1D

    for name, module in body.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        # A pooling layer has no part in the last hidden states.
        within = name.startswith(f"{family.blocks}.") or (
            name == "pooler.dense" and family.task == "classification"
        )
        if within:
            turned = isinstance(module, Conv1D)
            rows, cols = module.weight.shape
            yield Module(
                prefix + name,
                families.kind(name, family.blocks),
                (cols, rows) if turned else (rows, cols),
                module.bias is not None,
                turned,
            )
