"""Measure what tuning changed of the packaged language model, part by part.

The tunings are those of all weights that `plans` keeps in the same folder. What is measured is kept
as it ends; when all is there, it is recorded::

    python -m records.parts FOLDER
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, Literal, TypeAlias

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lorapower import lowrank, randomness
from lorapower.checkpoints import Adapter, Pair, Planner
from lorapower.checkpoints._effect import choose
from lorapower.checkpoints._measuring import watch
from lorapower.checkpoints._texts import Batch
from lorapower.experiments import sweeps
from lorapower.lowrank import SVD, LowRank
from lorapower.networks import Transformer, from_decoder
from records import models, pairs, plans
from records.tables import begin, put

# Texts for planning and for measuring.
PLANNING, TEXTS = 120, 60
# Of the floors: sentences, the tokens that each is cut to, and how many attention is measured on.
SENTENCES, LENGTH, MIXED = 192, 24, 64
# Blocks whose states give the directions of far tokens: half way, and behind the last.
DEPTHS = (15, 30)
# The sine of an angle below which spans meet: weights are stored in single precision.
ROUNDING = 1e-6
# A part of the effect of which nine tenths, as squares, are there.
LEFT = math.sqrt(0.1)
# Numbers of directions of adapters, and ranks of those of one rank everywhere.
DIRECTIONS, RANKS = (5, 10, 20, 40, 80, 210, 420, 840), (1, 2, 4)
# A uniform rank whose parameters pay for as many directions by effect.
MOST = 6
# Random outputs of each text by which products are estimated.
PROBES = 4
# Block, weight or part, quantity, value; -1 and "" stand for all. Of adapters also directions.
Row: TypeAlias = tuple[int, str, str, float]
Adapted: TypeAlias = tuple[int, str, str, float, int]
# Tokens are columns, those of a text side by side.
States = Float[Tensor, "texts width tokens"]


class PartRun(sweeps.Record):
    """A tuning, and what is measured of it."""

    tuning: str
    stage: Literal["weights", "heads", "floors", "effect"]


class PartResults(sweeps.Results):
    """Rows of ``"parts"`` of `records.read`, in JSON, how tunings are made, and versions."""

    rows: str
    precision: str
    torch: str
    transformers: str


def trace(network: Transformer, z: States) -> Iterator[tuple[States, States]]:
    """Give tokens before and after attention, for each block, and at last those that leave."""
    for l in range(network.depth):
        n = network.normalize(z)
        u = z + attention(network, l, n, n)
        yield z, u
        z = u + feed_forward(network, l, network.normalize(u))
    yield z, z


def feed_forward(network: Transformer, l: int, n: States) -> States:
    """Compute what the feed-forward layer of a block adds to tokens with these norms."""
    n = network.g_2[l][:, None] * n
    gate = network.activate(network.W_1[l] @ n)
    return network.W_2[l] @ (gate * (network.W_3[l] @ n))


def attention(network: Transformer, l: int, n: States, others: States) -> States:
    """Compute what attention adds to each token if those before it are ``others``.

    A token's own norm is in ``n``; weights have no biases.
    """
    n, others = (network.g_1[l][:, None] * x[:, None] for x in (n, others))
    W_K, W_V = (network.each_head(W[l]) for W in (network.W_K, network.W_V))
    queries, keys, past = (
        network.rotate(each) for each in (network.W_Q[l] @ n, W_K @ n, W_K @ others)
    )
    own = torch.eye(n.shape[-1], dtype=torch.bool)
    scores = torch.where(own, keys.mT @ queries, past.mT @ queries)
    P = network.patterns(scores)
    kept = P.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    mixed = (W_V @ others) @ P.masked_fill(own, 0) + (W_V @ n) * kept
    return (network.W_O[l] @ mixed).sum(1)


def alone(network: Transformer, l: int, n: States) -> States:
    """Compute what attention adds to the only token of a sequence."""
    values = network.each_head(network.W_V[l]) @ (network.g_1[l][:, None] * n)[:, None]
    return (network.W_O[l] @ values).sum(1)


def weights(pair: Pair) -> Iterator[Row]:
    """Count how many singular values of each difference matter."""
    every = []
    for name in pair.modules:
        values = lowrank.spectrum(pair.change(name))
        every.append(values)
        yield *place(name), "numerical", int((values > 1e-3 * values[0]).sum())
        yield *place(name), "nine", nine_tenths(values)
    values = torch.cat(every).sort(descending=True).values
    yield -1, "", "directions", len(values)
    yield -1, "", "nine", nine_tenths(values)


def nine_tenths(values: Tensor) -> int:
    """Count the fewest leading singular values with nine tenths of the squared norm."""
    squares = values.double().square().cumsum(0)
    return int((squares < 0.9 * squares[-1]).sum()) + 1


def place(name: str) -> tuple[int, str]:
    """Find the block and the name there of a module."""
    parts = name.split(".")
    return int(parts[2]), parts[-1].removesuffix("_proj")


def heads(base: Transformer, tuned: Transformer) -> Iterator[Row]:
    """Count what heads differ by [thm-every-network], and say how alike those of one model are.

    Two heads, of any places, differ by the full rank if neither factor of one depends on that of
    the other; ``dependent`` counts all other pairs.
    """
    ours, theirs = factors(base), factors(tuned)
    for part in ours:
        sides = [*zip(ours[part], theirs[part], strict=True)]
        left, right = (torch.cat(pair, -1) for pair in sides)
        signs = left.new_ones(left.shape[-1])
        signs[: len(signs) // 2] = -1
        values = spectrum(left * signs, right)
        counts = (values > 1e-3 * values[:, :1]).sum(1).view(base.depth, -1).amin(1)
        yield from ((l, part, "numerical", int(count)) for l, count in enumerate(counts))
        near = dependent(*sides[0]) | dependent(*sides[1])
        yield -1, part, "dependent", int(near.sum())
    left, right = theirs["values"]
    maps = (left @ right.mT).flatten(1)
    yield -1, "values", "cosine", largest_cosine(maps)
    # Queries of one direction, met by keys at each distance that the theorem takes.
    keys, queries = theirs["scores"]
    n = randomness.normal(randomness.generator(0, "direction"), tuned.width)
    asked = queries.mT @ (tuned.width**0.5 * n / n.norm())
    turned = tuned.rotate(asked[..., None].expand(-1, -1, asked.shape[-1] + 2))[..., 1:]
    met = (keys @ turned).unbind(-1)
    yield -1, "scores", "cosine", max(map(largest_cosine, met))
    lengths = torch.stack(met).norm(dim=-1)
    yield -1, "scores", "shortest", float(lengths.min() / lengths.median())


def factors(network: Transformer) -> dict[str, tuple[Tensor, Tensor]]:
    """Give ``A`` and ``M`` of all heads as factors, ``left @ right.mT``, with first gains."""
    g = network.g_1[:, None, :, None]
    K, V = network.each_head(network.W_K), network.each_head(network.W_V)
    Q, K, V = ((W.mT * g).flatten(0, 1) for W in (network.W_Q, K, V))
    return {"scores": (K, Q), "values": (network.W_O.flatten(0, 1), V)}


def spectrum(left: Tensor, right: Tensor) -> Float[Tensor, "heads rank"]:
    """Compute the singular values of ``left @ right.mT``."""
    first, second = (torch.linalg.qr(side).R for side in (left, right))
    return lowrank.spectrum(first @ second.mT)


def dependent(one: Tensor, other: Tensor) -> Bool[Tensor, "heads heads"]:
    """Find the pairs whose columns are dependent: their spans meet but for a sine of `ROUNDING`."""
    first, second = (torch.linalg.qr(side).Q for side in (one, other))
    unit = (1 - ROUNDING**2) * torch.eye(first.shape[-1]).to(first)
    found = []
    for U in first:
        C = U.mT @ second
        # Its least eigenvalue is the squared sine of the smallest angle.
        found.append(torch.linalg.cholesky_ex(unit - C.mT @ C).info > 0)
    return torch.stack(found)


def largest_cosine(rows: Float[Tensor, "heads n"]) -> float:
    """Compute the largest cosine between lines of two different rows."""
    rows = rows / rows.norm(dim=-1, keepdim=True)
    return float((rows @ rows.mT).abs().fill_diagonal_(0).max())


def floors(base: Transformer, tuned: Transformer, z: States) -> Iterator[Row]:
    """Measure how blocks turn own tokens, and what one part cannot do of the other's change.

    First tokens are left out: attention heaps on them. Floors are over the variance of the change.
    """
    states = [*trace(tuned, z)]
    yield -1, "", "turn", cosine(states[0][0], states[-1][0])
    for l, ((z, u), (y, _)) in enumerate(itertools.pairwise(states)):
        yield l, "", "turn", cosine(z, y)
        n = tuned.normalize(u)
        change = feed_forward(tuned, l, n) - feed_forward(base, l, n)
        yield l, "attention", "floor", not_affine(change, n) / variance(change)
        mixed, other = mix(base, tuned, tuned.normalize(z), [l])
        yield l, "mlp", "floor", mean_square(mixed - other) / 2 / variance(mixed)
    for depth in DEPTHS:
        n = tuned.normalize(states[depth][0])
        each = range(tuned.depth)
        change = total(feed_forward(tuned, l, n) - feed_forward(base, l, n) for l in each)
        single = change + total(alone(tuned, l, n) - alone(base, l, n) for l in each)
        yield depth, "attention", "far floor", not_affine(change, n) / variance(single)
        mixed, other = mix(base, tuned, n, each)
        whole = variance(mixed + change[: len(mixed)])
        yield depth, "mlp", "far floor", mean_square(mixed - other) / 2 / whole


def mix(
    base: Transformer, tuned: Transformer, n: States, blocks: Iterable[int]
) -> tuple[States, States]:
    """Add up attention's changes for tokens behind those of one other sentence, and another."""
    n = n[:MIXED]
    first, second = (
        total(attention(tuned, l, n, other) - attention(base, l, n, other) for l in blocks)
        for other in (n.roll(1, 0), n.roll(2, 0))
    )
    return first, second


def total(changes: Iterable[States]) -> States:
    """Add changes."""
    return functools.reduce(operator.add, changes)


def rows(x: States) -> Float[Tensor, "rows width"]:
    """Give tokens but for first ones, as rows."""
    return x[..., 1:].mT.flatten(0, 1).double()


def mean_square(x: States) -> float:
    """Compute the mean squared norm of tokens."""
    return float(rows(x).square().sum(-1).mean())


def variance(x: States) -> float:
    """Compute the variance of tokens, summed over coordinates."""
    return float(rows(x).var(0).sum())


def cosine(x: States, y: States) -> float:
    """Compute the mean cosine of tokens in two places."""
    return float(torch.cosine_similarity(rows(x), rows(y)).mean())


def not_affine(change: States, n: States) -> float:
    """Compute the mean square of a change that no affine map of ``n`` makes, without bias."""
    x, y = rows(n), rows(change)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    left = y - x @ torch.linalg.lstsq(x, y).solution
    return float(left.square().sum() / (len(x) - x.shape[1]))


class Distances:
    """Measure distances of outputs from the tuned network's on some of a plan's texts.

    A network misses a vector of logits at each token. The mean of these over all tokens is one
    shift; the second of two squares leaves it out.
    """

    def __init__(self, planner: Planner, batches: Sequence[Batch]) -> None:
        """Pass the texts through the tuned network and the base."""
        self.planner, self.batches = planner, batches
        planner.pair.fill(planner.network, "tuned")
        self.tuned = self._states()
        planner.pair.fill(planner.network, "base")
        self.whole = self._squares(self._states())

    @torch.no_grad()
    def _states(self) -> list[Tensor]:
        network, readout = self.planner.network, self.planner.readout
        return [readout.states(network, batch) for batch in self.batches]

    @torch.no_grad()
    def _squares(self, states: list[Tensor]) -> tuple[float, float]:
        missed = self.planner.readout.missed(self.planner.network)
        assert missed is not None
        rows = torch.cat([*map(missed, states, self.tuned)]).double()
        mean, squares = rows.mean(0), float(rows.square().sum())
        return squares, squares - len(rows) * float(mean.square().sum())

    def errors(self, states: list[Tensor] | None = None) -> tuple[float, float]:
        """Measure ``η`` of the network as it is, and without the shift of loss and of effect."""
        squares = self._squares(self._states() if states is None else states)
        error, rest = (math.sqrt(a / b) for a, b in zip(squares, self.whole, strict=True))
        return error, rest

    @torch.no_grad()
    def rows(self, part: str, directions: int) -> Iterator[Adapted]:
        """Measure the network as it is, the tuned one but for modules: errors, equal tokens."""
        states, head = self._states(), self.planner.readout.outputs
        pairs = zip(states, self.tuned, strict=True)
        equal = torch.cat([head(x).argmax(-1) == head(y).argmax(-1) for x, y in pairs])
        error, rest = self.errors(states)
        found = {"error": error, "unshifted": rest, "agreement": float(equal.double().mean())}
        yield from ((-1, part, quantity, value, directions) for quantity, value in found.items())


def effect(planner: Planner) -> Iterator[Row | Adapted]:
    """Measure what adapters of a few directions lose, and halves, and what blocks lose together."""
    test, select = (Distances(planner, part.batches) for part in (planner.test, planner.select))

    def measured(part: str, adapter: Adapter) -> Iterator[Adapted]:
        planner.put(adapter)
        yield from test.rows(part, sum(adapter.ranks.values()))

    def unshifted(adapter: Adapter) -> float:
        planner.put(adapter)
        return select.errors()[1]

    yield -1, "", "alike", 1 - test.whole[1] / test.whole[0]
    for part in ("attention", "mlp"):
        planner.only(part)
        yield -1, part, "error", test.errors()[0]
    yield from measured("none", Adapter({}, {}))
    changes = {name: lowrank.svd(planner.pair.change(name)) for name in planner.modules}
    choice = choose(planner._pool, *planner._sketches, planner.parameters(MOST))
    costs = planner._pool.costs[choice.order].cumsum(0)
    for number in DIRECTIONS:
        yield from measured("norm", leading(changes, number))
        gains = choice.gains(float(costs[number - 1]))
        yield from measured("effect", planner._with_gains(gains))
    for rank in RANKS:
        yield from measured("rank", planner.uniform(planner.parameters(rank)))
    for part, lost in {"smallest": None, "smallest unshifted": unshifted}.items():
        adapter = planner.smallest(LEFT, lost)
        yield from measured(part, adapter)
        if lost is None:
            for name, rank in adapter.ranks.items():
                yield *place(name), "taken", rank
    # Blocks lose together what a rule by modules adds up.
    adapter = planner.uniform(planner.parameters(1))
    blocks, apart = products(planner, adapter)
    whole = float(planner.test.effect.sum())
    yield -1, "", "apart", apart / whole
    for l, row in enumerate((blocks / whole).tolist()):
        yield from ((l, str(k), "product", value) for k, value in enumerate(row))
    nothing, known = Adapter({}, {}), planner.weighted
    total, missing = planner.losses(nothing), {*planner.modules}
    for rank in range(1, planner.max_rank + 1):
        best = {name: known[name].update.leading(rank) for name in missing}
        left = planner.losses(Adapter(best, {}))
        for name in [name for name in missing if left[name] <= LEFT * total[name]]:
            yield *place(name), "alone", rank
            missing.remove(name)
        if not missing:
            break


def leading(changes: Mapping[str, SVD], number: int) -> Adapter:
    """Make the adapter of the largest singular values over all modules."""
    least = torch.cat([change.S for change in changes.values()]).sort(descending=True).values
    ranks = {name: int((c.S >= least[number - 1]).sum()) for name, c in changes.items()}
    factors = {}
    for name, rank in ranks.items():
        if rank:
            U, S, V = changes[name]
            factors[name] = LowRank(U[:, :rank] * S[:rank], V[:, :rank])
    return Adapter(factors, {})


def products(planner: Planner, adapter: Adapter) -> tuple[Tensor, float]:
    """Estimate the products of what blocks lose, and the sum of squares over modules.

    They are to first order at the tuned network, summed over texts for measuring, from products
    with random outputs [prop-sketch].
    """
    pair, network, readout = planner.pair, planner.network, planner.readout
    missing = {name: pair.change(name) for name in planner.modules}
    for name, factors in adapter.factors.items():
        missing[name] = missing[name] - factors.matrix()
    pair.fill(network, "tuned")
    draw = randomness.generator(0, "products")
    number = 1 + max(place(name)[0] for name in missing)
    blocks, apart = torch.zeros(number, number), 0.0
    for batch in planner.test.batches:
        with torch.enable_grad(), watch(network, missing) as seen:
            values = readout.rows(readout.states(network, batch))
        after = [output for _, output in seen.values()]
        moved = {name: given @ missing[name].mT for name, (given, _) in seen.items()}
        for _ in range(PROBES):
            along = randomness.normal(draw, *values.shape).to(values)
            slopes = torch.autograd.grad(values, after, along, retain_graph=True)
            lost = torch.zeros(len(batch.input_ids), number)
            for (name, move), slope in zip(moved.items(), slopes, strict=True):
                part = (slope * move).sum((1, 2))
                lost[:, place(name)[0]] += part
                apart += float(part.square().sum()) / PROBES
            blocks += lost.mT @ lost / PROBES
    return blocks, apart


@torch.no_grad()
def work(settings: list[PartRun]) -> list[PartResults]:
    """Measure one stage of a tuning."""
    (setting,) = settings
    folder, kind = plans.tuned(setting.tuning), plans.TUNINGS[setting.tuning].kind
    pair = Pair.open(models.LANGUAGE, str(folder))
    modules = [models.decoder(name) for name in (models.LANGUAGE, str(folder))]
    base, tuned = (from_decoder(module, final_norm=False) for module in modules)
    found: list[Row | Adapted]
    if setting.stage == "weights":
        found = [*weights(pair)]
    elif setting.stage == "heads":
        found = [*heads(base.to(torch.float64), tuned.to(torch.float64))]
    elif setting.stage == "floors":
        sentences = [s for part in ("test", "validation") for s in pairs.texts(kind, part)]
        ids = pair.tokenizer(sentences)["input_ids"]
        ids = [tokens[:LENGTH] for tokens in ids if len(tokens) >= LENGTH]
        x = modules[1].get_input_embeddings()(torch.tensor(ids[:SENTENCES]))
        found = [*floors(base, tuned, x.mT)]
    else:
        planning, held_out = (pairs.texts(kind, part) for part in ("validation", "test"))
        limits: Any = {"held_out": held_out[:TEXTS], "modules": plans.BLOCKS}
        found = [*effect(Planner(pair, planning[:PLANNING], **limits))]
    about = {name: metadata.version(name) for name in ("torch", "transformers")}
    about["precision"] = "bfloat16" if models.precision() else "float32"
    return [PartResults(rows=json.dumps(found), **about)]


def unfold(runs: pd.DataFrame) -> pd.DataFrame:
    """Give each of a run's rows a row of the table."""
    before, after = ["tuning", "stage"], ["precision", "torch", "transformers"]
    table = runs.assign(rows=runs.rows.map(json.loads)).explode("rows", ignore_index=True)
    names = ["block", "part", "quantity", "value", "directions"]
    found = pd.DataFrame(table.rows.tolist(), columns=names)
    return pd.concat([table[before], found, table[after]], axis=1)


if __name__ == "__main__":
    begin()
    tunings = [name for name, about in plans.TUNINGS.items() if not about.rank]
    asked = sweeps.grid(PartRun, tuning=tunings, stage=["weights", "floors", "effect"])
    # Heads are compared for one tuning.
    asked.append(PartRun(tuning="tweets", stage="heads"))
    put(unfold(sweeps.run(asked, work, "parts.sqlite", size=1)), "parts")
