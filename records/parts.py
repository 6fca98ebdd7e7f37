"""Measure what tuning changed of a language model, part by part, for `checkpoints.read_parts`.

A table for one tuning of the packaged language model, and ``KIND`` of the rated sentences::

    python -m records.parts FOLDER NAME TUNED KIND

The last step puts the tables of all tunings into the package::

    python -m records.parts FOLDER
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import records as _record
from lorapower import lowrank
from lorapower.checkpoints import Adapter, Measured, Pair, Planner
from lorapower.checkpoints import _models as hub
from records import models, pairs

# Texts for planning and for measuring.
PLANNING, TEXTS = 120, 100
# Of the floors: sentences, the tokens that each is cut to, and how many attention is measured on.
SENTENCES, LENGTH, MIXED = 192, 24, 64
# Blocks whose states give the directions of far tokens: half way, and behind the last.
DEPTHS = (15, 30)
# A part of the effect of which nine tenths, as squares, are there.
LEFT = math.sqrt(0.1)
BLOCKS = r"^model\.layers\."
# Block, weight or part, quantity, value; -1 and "" stand for all.
Row = tuple[int, str, str, float]
States = Float[Tensor, "texts tokens width"]


class Parts:
    """The blocks of a network of the family of Llama, read at normalized tokens ``n``."""

    def __init__(self, network: Any) -> None:
        config = network.config
        self.layers: Any = network.base_model.layers
        self._size = config.head_dim
        self._embed, self._rotary = network.get_input_embeddings(), network.base_model.rotary_emb
        self._eps = config.rms_norm_eps

    def trace(self, ids: Tensor) -> Iterator[tuple[States, States]]:
        """Tokens before and after attention, for each block, and at last those that leave."""
        z = self._embed(ids)
        for l in range(len(self.layers)):
            n = self.normalize(z)
            u = z + self.attention(l, n, n)
            yield z, u
            z = u + self.feed_forward(l, self.normalize(u))
        yield z, z

    def normalize(self, z: States) -> States:
        """``n(z)``, without gains."""
        return z / (z.square().mean(-1, keepdim=True) + self._eps).sqrt()

    def feed_forward(self, l: int, n: States) -> States:
        """What the feed-forward layer of a block adds."""
        layer = self.layers[l]
        return layer.mlp(layer.post_attention_layernorm.weight * n)

    def attention(self, l: int, n: States, others: States) -> States:
        """What attention adds to each token if those before it are ``others``."""
        at, gains = self.layers[l].self_attn, self.layers[l].input_layernorm.weight
        q = self._turn(self._heads(at.q_proj(gains * n)))
        (k, v), (k_0, v_0) = (self._keys_values(at, gains * x, q) for x in (n, others))
        scores = q @ k_0.mT
        before = torch.ones_like(scores[0, 0], dtype=torch.bool).tril(-1)
        own = (q * k).sum(-1, keepdim=True)
        scores = torch.cat([scores.masked_fill(~before, -math.inf), own], -1)
        P = (scores / self._size**0.5).softmax(-1)
        mixed = P[..., :-1] @ v_0 + P[..., -1:] * v
        return at.o_proj(mixed.transpose(1, 2).flatten(2))

    def alone(self, l: int, n: States) -> States:
        """What attention adds to the only token of a sequence."""
        at, gains = self.layers[l].self_attn, self.layers[l].input_layernorm.weight
        values = at.v_proj(gains * n).unflatten(-1, (-1, self._size))
        shared = at.o_proj.in_features // at.v_proj.out_features
        return at.o_proj(values.repeat_interleave(shared, -2).flatten(-2))

    def _keys_values(self, at: Any, reads: States, q: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._turn(self._heads(at.k_proj(reads))), self._heads(at.v_proj(reads))
        shared = q.shape[1] // k.shape[1]
        return k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)

    def _heads(self, x: Tensor) -> Float[Tensor, "texts heads tokens size"]:
        return x.unflatten(-1, (-1, self._size)).transpose(1, 2)

    def _turn(self, x: Tensor) -> Tensor:
        """Rotate by positions."""
        cos, sin = self._rotary(x, torch.arange(x.shape[-2])[None])
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin


def weights(pair: Pair) -> Iterator[Row]:
    """How many singular values of each difference matter."""
    every = []
    for name in pair.modules:
        values = lowrank.spectrum(pair.change(name))
        every.append(values)
        yield *place(name), "numerical", int((values > 1e-3 * values[0]).sum())
        for quantity, share in (("half", 0.5), ("nine", 0.9)):
            yield *place(name), quantity, count(values, share)
    values = torch.cat(every).sort(descending=True).values
    yield -1, "", "directions", len(values)
    yield -1, "", "nine", count(values, 0.9)


def count(values: Tensor, share: float) -> int:
    """The least number of leading singular values with a share of the squared norm."""
    squares = values.double().square().cumsum(0)
    return int((squares < share * squares[-1]).sum()) + 1


def place(name: str) -> tuple[int, str]:
    """The block and the name there of a module."""
    parts = name.split(".")
    return int(parts[2]), parts[-1].removesuffix("_proj")


def freedoms(base: Parts, tuned: Parts) -> Iterator[Row]:
    """The share of a change's squared norm that other weights of the same function could save.

    To first order, and for the best choice: a complex number for each frequency of a group's
    queries and keys, a matrix for a group's values and outputs, a number for each hidden unit.
    """
    saved: dict[str, list[float]] = {"q k": [], "v o": [], "up down": []}
    for before, after in zip(base.layers, tuned.layers, strict=True):
        at, old, size = after.self_attn, before.self_attn, after.self_attn.head_dim
        q, k = (turning(at, old, name, size) for name in ("q_proj", "k_proj"))
        # 1 + e for queries, 1 / conj(1 + e) for keys.
        slopes = [(W.conj() * E).sum((-1, -2)) for W, E in (q, k)]
        own = sum(W.abs().square().sum((-1, -2)) for W, _ in (q, k))
        won = (slopes[0] - slopes[1].conj()).abs().square() / own
        saved["q k"] += [float(won.sum()), norms(q, k)]

        v, o = changed(at.v_proj, old.v_proj), changed(at.o_proj, old.o_proj)
        (V, dV), (O, dO) = (
            [M.unflatten(0, (-1, size)) for M in v],
            [M.unflatten(1, (len(v[0]) // size, -1, size)).movedim(0, 2).flatten(1, 2) for M in o],
        )
        # I + X for values, I - X for outputs: an equation of Sylvester's.
        left, lefts = torch.linalg.eigh(O.mT @ O)
        right, rights = torch.linalg.eigh(V @ V.mT)
        slope = lefts.mT @ (O.mT @ dO - dV @ V.mT) @ rights
        won = slope.square() / (left[..., None] + right[:, None, :])
        saved["v o"] += [float(won.sum()), norms(v, o)]

        up = changed(after.mlp.up_proj, before.mlp.up_proj)
        down = changed(after.mlp.down_proj, before.mlp.down_proj)
        slope = (up[0] * up[1]).sum(1) - (down[0] * down[1]).sum(0)
        won = slope.square() / (up[0].square().sum(1) + down[0].square().sum(0))
        saved["up down"] += [float(won.sum()), norms(up, down)]
    for name, found in saved.items():
        yield -1, name, "free", sum(found[::2]) / sum(found[1::2])


def changed(after: Any, before: Any) -> tuple[Tensor, Tensor]:
    """The tuned weight of a module, and its change."""
    weight = after.weight.double()
    return weight, weight - before.weight.double()


def turning(after: Any, before: Any, name: str, size: int) -> list[Tensor]:
    """The same for queries or keys, as complex rows: groups, frequencies, heads, width."""
    groups = len(after.k_proj.weight) // size
    both = changed(getattr(after, name), getattr(before, name))
    halves = [M.unflatten(0, (groups, -1, 2, size // 2)).transpose(1, 3) for M in both]
    return [torch.complex(M[:, :, 0], M[:, :, 1]) for M in halves]


def norms(*both: Any) -> float:
    """The squared norm of changes."""
    return float(sum(change.abs().square().sum() for _, change in both))


def floors(base: Parts, tuned: Parts, ids: Tensor) -> Iterator[Row]:
    """What each part adds to own tokens, and what one part alone cannot do of its change.

    First tokens are left out: attention heaps on them. Floors are over the variance of the change.
    """
    trace = [*tuned.trace(ids)]
    yield -1, "", "tokens", ids[:, 1:].numel()
    yield -1, "", "turn", cosine(trace[0][0], trace[-1][0])
    for l, ((z, u), (y, _)) in enumerate(itertools.pairwise(trace)):
        for part, before, after in (("attention", z, u), ("mlp", u, y)):
            sizes = (after - before).norm(dim=-1) / before.norm(dim=-1)
            yield l, part, "added", float(sizes[:, 1:].median())
        yield l, "", "turn", cosine(z, y)
        n = tuned.normalize(u)
        change = tuned.feed_forward(l, n) - base.feed_forward(l, n)
        yield l, "attention", "floor", not_affine(change, n) / variance(change)
        mixed, other = mix(base, tuned, tuned.normalize(z), [l])
        yield l, "mlp", "floor", square(mixed - other) / 2 / variance(mixed)
    for depth in DEPTHS:
        n = tuned.normalize(trace[depth][0])
        each = range(len(tuned.layers))
        change = total(tuned.feed_forward(l, n) - base.feed_forward(l, n) for l in each)
        single = change + total(tuned.alone(l, n) - base.alone(l, n) for l in each)
        yield depth, "attention", "far floor", not_affine(change, n) / variance(single)
        mixed, other = mix(base, tuned, n, each)
        whole = variance(mixed + change[: len(mixed)])
        yield depth, "mlp", "far floor", square(mixed - other) / 2 / whole


def mix(base: Parts, tuned: Parts, n: States, blocks: Iterable[int]) -> tuple[States, States]:
    """How attention's changes add up for tokens behind those of one other sentence, and another."""
    n = n[:MIXED]
    first, second = (
        total(tuned.attention(l, n, other) - base.attention(l, n, other) for l in blocks)
        for other in (n.roll(1, 0), n.roll(2, 0))
    )
    return first, second


def total(changes: Iterable[States]) -> States:
    """The sum of changes."""
    return functools.reduce(operator.add, changes)


def rows(x: States) -> Float[Tensor, "rows width"]:
    """Tokens but for first ones."""
    return x[:, 1:].flatten(0, 1).double()


def square(x: States) -> float:
    """The mean squared norm of tokens."""
    return float(rows(x).square().sum(-1).mean())


def variance(x: States) -> float:
    """The variance of tokens, summed over coordinates."""
    return float(rows(x).var(0).sum())


def cosine(x: States, y: States) -> float:
    """The mean cosine of tokens in two places."""
    return float(torch.cosine_similarity(rows(x), rows(y)).mean())


def not_affine(change: States, n: States) -> float:
    """The mean square of a change that no affine map of ``n`` makes, without bias."""
    x, y = rows(n), rows(change)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    left = y - x @ torch.linalg.lstsq(x, y).solution
    return float(left.square().sum() / (len(x) - x.shape[1]))


def effect(planner: Planner) -> Iterator[Row]:
    """What one part's change alone leaves of the effect, and directions that nine tenths take."""
    pair, network, test, nothing = planner.pair, planner.network, planner.test, Adapter({}, {})
    yield from measured("none", planner.measure(nothing))
    for part in ("attention", "mlp"):
        yield -1, part, "error", planner.only(part)
    pair.fill(network, "base")
    batches = enumerate(test.batches)
    off = torch.cat([test.rows(network, batch) - test.tuned_rows(i) for i, batch in batches])
    yield -1, "", "alike", float(off.mean(0).square().sum() / off.square().sum(1).mean())
    adapter = planner.smallest(LEFT)[1]
    yield from measured("few", planner.measure(adapter))
    yield -1, "", "taken", sum(adapter.ranks.values())
    for name in planner.modules:
        yield *place(name), "taken", adapter.ranks.get(name, 0)
    known = planner.directions("uniform")
    whole, missing = planner.losses(nothing), {*planner.modules}
    for rank in range(1, planner.max_rank + 1):
        leading = {name: known[name].update.leading(rank) for name in missing}
        left = planner.losses(Adapter(leading, {}))
        for name in [name for name in missing if left[name] <= LEFT * whole[name]]:
            yield *place(name), "alone", rank
            missing.remove(name)
        if not missing:
            break


def measured(name: str, found: Measured) -> Iterator[Row]:
    """What a network loses."""
    for quantity in ("error", "error_upper", "kl", "agreement"):
        yield -1, "", f"{name} {quantity}", getattr(found, quantity)


class Tuning:
    """The table of one tuning, which grows as its parts are measured."""

    def __init__(self, folder: Path, name: str, tuned: str, kind: str) -> None:
        self._file, self._name, self._kind = folder / f"{name}.csv", name, kind
        self._pair = Pair.open(hub.LANGUAGE, tuned)
        self._tuned = tuned

    def run(self) -> None:
        """Measure what the table lacks."""
        pair = self._pair
        self._keep("weights", lambda: weights(pair))
        self._keep("floors", self._floors)
        self._keep("effect", self._effect)

    @torch.no_grad()
    def _floors(self) -> list[Row]:
        base, tuned = (Parts(models.language(name)) for name in (hub.LANGUAGE, self._tuned))
        sentences = [s for part in ("test", "validation") for s in pairs.texts(self._kind, part)]
        ids = self._pair.tokenizer(sentences)["input_ids"]
        ids = [tokens[:LENGTH] for tokens in ids if len(tokens) >= LENGTH]
        found = floors(base, tuned, torch.tensor(ids[:SENTENCES]))
        return [*freedoms(base, tuned), *found]

    @torch.no_grad()
    def _effect(self) -> list[Row]:
        planning, held_out = (pairs.texts(self._kind, part) for part in ("validation", "test"))
        planner = Planner(
            self._pair, planning[:PLANNING], held_out=held_out[:TEXTS], modules=BLOCKS
        )
        return [*effect(planner)]

    def _keep(self, stage: str, measure: Callable[[], Iterable[Row]]) -> None:
        there = self._file.exists()
        if there and stage in {*pd.read_csv(self._file).stage}:
            return
        table = pd.DataFrame([*measure()], columns=["block", "part", "quantity", "value"])
        table.insert(0, "tuning", self._name)
        table.insert(1, "stage", stage)
        for library in ("torch", "transformers"):
            table[library] = metadata.version(library)
        table.to_csv(self._file, mode="a", header=not there, index=False, float_format="%.5g")
        print(self._name, stage, time.process_time(), flush=True)


def record(folder: Path, file: Path) -> None:
    """Put the tables into the package, compressed alike at any time."""
    table = pd.concat([pd.read_csv(part) for part in sorted(folder.glob("*.csv"))])
    table.to_csv(file, index=False, compression={"method": "gzip", "mtime": 0})


if __name__ == "__main__":
    out, *rest = sys.argv[1:]
    if rest:
        Tuning(Path(out), *rest).run()
    else:
        record(Path(out), Path(__file__).parent / _record.PARTS)
