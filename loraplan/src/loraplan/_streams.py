"""Networks whose weights are read while texts pass them, one block after the other.

transformers' own forward runs with stand-ins for its blocks, which note what each block is given.
Then one block at a time, with its weights, computes for all texts. So memory holds the weights of
one block, for any architecture, and a block that has been read serves all texts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ._lowrank import LowRank
from ._texts import Batch
from .pair import Adapter, Pair, Reader

# Rows of a head that are read at a time.
_WORDS = 2**12
# What a block is given beside hidden states, for each block.
_Given: TypeAlias = list[tuple[tuple[Any, ...], dict[str, Any]]]
# Weights that are in no block; of word embeddings only rows of some words, and these, if not None.
_Outer: TypeAlias = tuple[dict[str, Tensor], Tensor | None]


class Network:
    """A network of transformers, of whose weights memory holds one block at a time.

    The ``skeleton`` has no weights, or only some, such as an adapter's of peft; ``read`` finds all
    others by their names. What ``factors`` of modules add is computed beside them. Texts pass it in
    the type ``dtype``, but frequencies of rotations are no weights and stay in float32, as servers
    have them. ``same_head`` says whether its head is known to be the tuned one.
    """

    def __init__(
        self,
        pair: Pair,
        skeleton: Any,
        read: Reader,
        *,
        device: torch.device,
        factors: Mapping[str, LowRank] = {},
        dtype: torch.dtype = torch.float32,
        same_head: bool = False,
    ) -> None:
        self.task, self.skeleton, self.read = pair.task, skeleton, read
        self.device, self.dtype, self.same_head = device, dtype, same_head
        #: Tokens with which answers of a language model end.
        self.ends = pair.ends if pair.task == "language" else []
        self._path = pair.blocks
        self.blocks: list[nn.Module] = [*skeleton.get_submodule(pair.blocks)]
        # A language model's head is applied to its states, some words at a time.
        self._body = skeleton.base_model if pair.task == "language" else skeleton
        self._factors: dict[int, dict[str, LowRank]] = {}
        for name, update in factors.items():
            self._factors.setdefault(self.stage(name), {})[name] = update
        # Weights that are tied are read by the first of their names.
        self._names = {id(value): name for name, value in skeleton.named_parameters()}
        # Listed before a skeleton that is shared computes with others' weights in their places.
        self._loaders = [self._loading(block) for block in self.blocks]

    def stage(self, name: str) -> int:
        """Find the block of a module: -1 for word embeddings, and what follows all for others."""
        if name.startswith(f"{self._path}."):
            return int(name.removeprefix(f"{self._path}.").partition(".")[0])
        return -1 if self.skeleton.get_submodule(name) is self._embedding else len(self.blocks)

    def stage_weights(self, number: int) -> dict[str, Tensor]:
        """Read the weights of a block; none for what comes before the blocks or after them."""
        return self._loaders[number]() if 0 <= number < len(self.blocks) else {}

    def has_head_of(self, name: str) -> bool:
        """Whether a module's weight is the head of a language model."""
        head = self.skeleton.get_output_embeddings() if self.task == "language" else None
        weight = self.skeleton.get_submodule(name).weight
        return head is not None and weight is head.weight

    def run_block(
        self, number: int, weights: dict[str, Tensor], hidden: Tensor, given: _Given
    ) -> Float[Tensor, "texts tokens width"]:
        """Compute what a block makes of hidden states."""
        (arguments, options), block = given[number], self.blocks[number]
        with self._adding(number):
            inputs = hidden, *arguments
            found: Tensor = functional_call(block, weights, inputs, options, tie_weights=False)
        return found

    def outer(self, batches: Sequence[Batch]) -> _Outer:
        """Read the weights that are in no block, for some texts."""
        skip = {id(value) for block in self.blocks for value in block.parameters()}
        embedding, words = self._embedding, None
        # Not of one that peft has wrapped, which may look up other rows.
        few = isinstance(embedding, nn.Embedding) and embedding.weight.is_meta
        if few:
            skip.add(id(embedding.weight))
        weights = self._loading(self._body, skip)()
        if few:
            words = torch.cat([batch.input_ids.flatten() for batch in batches]).unique()
            rows = self.read(self._names[id(embedding.weight)], words)
            name = next(n for n, v in self._body.named_parameters() if v is embedding.weight)
            weights[name] = rows.to(self.device, self.dtype)
            words = words.to(self.device)
        return weights, words

    def begin(self, batch: Batch, outer: _Outer) -> tuple[Tensor, _Given]:
        """Compute hidden states that the first block is given, and what all are given beside."""
        noted: list[tuple[Tensor, Any]] = []

        def note(_: int, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
            noted.append((hidden, (arguments, options)))
            return hidden

        self._run(batch, outer, note)
        return noted[0][0], [given for _, given in noted]

    def end(self, batch: Batch, outer: _Outer, hidden: Tensor) -> Float[Tensor, "rows columns"]:
        """Compute the states, a row for each token or text, from what the last block gives.

        States are last hidden states, or a classifier's logits minus their mean.
        """
        last = len(self.blocks) - 1
        with self._adding(last + 1):
            result = self._run(batch, outer, lambda k, x, *_, **__: hidden if k == last else x)
        if self.task == "classification":
            return centre(batch.rows(result.logits).float())
        return batch.rows(result.last_hidden_state)

    @torch.no_grad()
    def logits(self, states: Float[Tensor, "rows columns"]) -> Iterator[Float[Tensor, "rows some"]]:
        """Compute a language model's logits from states, some words at a time."""
        head, cap = self.skeleton.get_output_embeddings(), self.cap
        states = states.to(self.device, self.dtype)
        if isinstance(head, nn.Linear) and head.weight.is_meta:
            rows = self.head_rows()
            values = (nn.functional.linear(states, w.to(states), bias) for w, bias in rows)
        else:
            whole = functional_call(head, self._loading(head)(), (states,))
            values = iter(whole.split(_WORDS, -1))
        for some in map(Tensor.float, values):
            yield cap * (some / cap).tanh() if cap else some

    def head_rows(self) -> Iterator[tuple[Float[Tensor, "some columns"], Tensor | None]]:
        """Read a language model's head, some rows at a time, with its bias there."""
        head = self.skeleton.get_output_embeddings()
        weight, bias = (self._names.get(id(value)) for value in (head.weight, head.bias))
        shift = None if bias is None else self.read(bias).to(self.device, self.dtype)
        for start in range(0, self.words, _WORDS):
            some = slice(start, start + _WORDS)
            rows = self.read(str(weight), some).to(self.device)
            yield rows, None if shift is None else shift[some]

    @property
    def words(self) -> int:
        """How many words a language model knows."""
        return len(self.skeleton.get_output_embeddings().weight)

    @property
    def cap(self) -> float | None:
        """The bound of logits, for models that have one."""
        found: float | None = getattr(self.skeleton.config, "final_logit_softcapping", None)
        return found

    @contextmanager
    def watch(self, names: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Collect inputs and outputs of modules in the order of their calls.

        What word embeddings give is a leaf, by which what follows can be differentiated.
        """
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            if module is self._embedding:
                output = output.detach().requires_grad_()
            seen[name] = inputs[0].detach(), output
            return output

        with self._hooked({name: functools.partial(keep, name) for name in names}):
            yield seen

    def _adding(self, number: int) -> AbstractContextManager[None]:
        """Add to what modules of a stage give what their factors make of what they take in."""

        def add(update: LowRank, _: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            left, right = update.left.to(output), update.right.to(output)
            return output + (inputs[0] @ right) @ left.mT

        factors = self._factors.get(number, {})
        return self._hooked({name: functools.partial(add, x) for name, x in factors.items()})

    @contextmanager
    def _hooked(self, hooks: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
        """Change what modules give."""
        with ExitStack() as stack:
            for name, hook in hooks.items():
                handle = self.skeleton.get_submodule(name).register_forward_hook(hook)
                stack.callback(handle.remove)
            yield

    @property
    def _embedding(self) -> Any:
        return self.skeleton.get_input_embeddings()

    def _loading(
        self, part: nn.Module, skip: Iterable[int] = ()
    ) -> Callable[[], dict[str, Tensor]]:
        """Find what loads a part's weights: reads those that are not there, and places all."""
        # Buffers of adapters that are on no device only serve to undo them.
        buffers = ((name, value) for name, value in part.named_buffers() if not value.is_meta)
        listed: list[tuple[str, str | Tensor, torch.dtype | None]] = [(*x, None) for x in buffers]
        for name, value in part.named_parameters():
            if id(value) not in skip:
                there = self._names[id(value)] if value.is_meta else value.detach()
                listed.append((name, there, self.dtype))

        def load() -> dict[str, Tensor]:
            values = ((n, self.read(x) if isinstance(x, str) else x, t) for n, x, t in listed)
            return {name: value.to(self.device, t or value.dtype) for name, value, t in values}

        return load

    def _run(self, batch: Batch, outer: _Outer, stand_in: Callable[..., Tensor]) -> Any:
        """Run the network with a stand-in for each of its blocks."""
        weights, words = outer
        with ExitStack() as stack:
            for k, block in enumerate(self.blocks):
                block.forward = functools.partial(stand_in, k)
                stack.callback(vars(block).__delitem__, "forward")
            if words is not None:
                # No row that is left stands for padding.
                self._embedding.padding_idx = None
                look_up = self._embedding.register_forward_pre_hook(
                    lambda _, ids: torch.searchsorted(words, ids[0])
                )
                stack.callback(look_up.remove)
            return functional_call(self._body, weights, (), batch.on(self.device))


def stream(
    pair: Pair, which: str | Adapter, device: torch.device, read: Reader | None = None
) -> Network:
    """The network of the ``"base"``, of the ``"tuned"`` checkpoint, or of the base adapted.

    An adapter of embeddings and heads is merged.
    """
    factors: dict[str, LowRank] = {}
    if isinstance(which, Adapter):
        merged = {n: update for n, update in which.factors.items() if n in pair.words}
        factors = {n: update for n, update in which.factors.items() if n not in merged}
        read = read or pair.reader(which._replace(factors=merged))
    skeleton = pair.skeleton("tuned" if which == "tuned" else "base")
    about: dict[str, Any] = {"device": device, "factors": factors}
    about["same_head"] = which == "tuned" or pair.keeps_head(which)
    return Network(pair, skeleton, read or pair.reader(which), **about)


class TextStates:
    """Texts on their way through a network.

    Of the first ``keep`` batches ``kept`` has what each block was given. At the end ``states`` are
    those of each batch (`Network.end`).
    """

    def __init__(self, network: Network, batches: Sequence[Batch], keep: int = 0) -> None:
        self.network, self.batches, self.keep = network, batches, keep
        self.outer = network.outer(batches)
        self.given: list[_Given] = []
        self.hidden: list[Tensor] = []
        self.kept: list[list[Tensor]] = []
        self.states: list[Tensor] = []
        with torch.no_grad():
            for batch in batches:
                hidden, given = network.begin(batch, self.outer)
                self.hidden.append(hidden)
                self.given.append(given)

    def step(self, number: int, weights: dict[str, Tensor]) -> None:
        """Pass a block, and after the last one what follows all."""
        if self.keep:
            self.kept.append([hidden.cpu() for hidden in self.hidden[: self.keep]])
        for i, (hidden, given) in enumerate(zip(self.hidden, self.given, strict=True)):
            self.hidden[i] = self.network.run_block(number, weights, hidden, given)
        if number == len(self.network.blocks) - 1:
            each = zip(self.batches, self.hidden, strict=True)
            self.states = [self.network.end(b, self.outer, hidden).cpu() for b, hidden in each]
            self.hidden, self.given = self.hidden[: self.keep], self.given[: self.keep]


@torch.no_grad()
def advance(
    passes: Sequence[TextStates], report: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Pass all texts through their networks, which read a block of the same number in turn."""
    if not passes:
        return
    jobs = [(k, each) for k in range(len(passes[0].network.blocks)) for each in passes]
    report(0, len(jobs))
    for done, (k, each) in enumerate(jobs, 1):
        each.step(k, each.network.stage_weights(k))
        report(done, len(jobs))


def centre(logits: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Subtract the mean of each row, unless there is one column."""
    return logits - logits.mean(-1, keepdim=True) if logits.shape[-1] > 1 else logits
