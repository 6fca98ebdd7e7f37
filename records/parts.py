"""Measure what tuning changed of the packaged language model, part by part.

The tunings are those of all weights that `plans` keeps in the same folder. What is measured is kept
as it ends; when all is there, it is recorded::

    python -m records.parts FOLDER
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from collections.abc import Iterator
from importlib import metadata
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from loraplan import Adapter, Pair, Planner
from loraplan.lab import (
    Directions,
    LowRank,
    Moments,
    Network,
    Rows,
    Slopes,
    TextStates,
    TunedOutputs,
    advance,
    choose,
    draw_rows,
    measure_networks,
    stream,
)
from lorapower import bounds, lowrank, randomness
from lorapower.networks import Decoder, from_decoder
from records import Results, Values, grid, models, neighbours, pairs, plans, run
from records.tables import begin, put

# Texts for planning and for measuring.
PLANNING, TEXTS = 120, 61
# Sentences by which blocks turn tokens, and the tokens that each is cut to.
SENTENCES, LENGTH = 192, 24
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


class PartRun(Values):
    """A tuning, and what is measured of it."""

    tuning: str
    stage: Literal["weights", "heads", "turns", "effect"]


class PartResults(Results):
    """Rows of ``"parts"`` of `records.read`, in JSON, how tunings are made, and versions."""

    rows: str
    precision: str
    torch: str
    transformers: str


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


def heads(base: Decoder, tuned: Decoder) -> Iterator[Row]:
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


def shuffled(network: Decoder) -> Decoder:
    """Give what `factors` reads with coordinates of tokens in another order, drawn once."""
    draw = randomness.generator(0, "order of coordinates")
    order = torch.randperm(network.width, generator=draw)
    into = {name: getattr(network, name)[..., order] for name in ("W_Q", "W_K", "W_V", "g_1")}
    return network.replace(W_O=network.W_O[..., order, :], **into)


def tails(frozen: Decoder, target: Decoder, name: str) -> Iterator[Adapted]:
    """Compute by how much adapters of each rank on each weight of each head must miss the target.

    Sums of `bounds.head_tails` over the squared norm of the target's heads, in the order of heads
    that makes the sum of both parts least; ``moved`` counts heads that are not in their places.
    With rotary positions scores are those at distance 0.
    """
    found = bounds.head_tails(frozen, target)
    sizes = [spectrum(*sides).square().sum() for sides in factors(target).values()]
    shares = bounds.HeadTails(*(tail / size for tail, size in zip(found, sizes, strict=True)))
    places = torch.arange(len(found.scores))
    for rank in range(0, found.scores.shape[-1] - 1, 2):
        order = shares.least(rank, rank)[1]
        yield -1, "", f"{name} moved", int((order != places).sum()), rank
        for part, share in shares._asdict().items():
            yield -1, part, f"{name} tail", float(share[places, order, rank].sum()), rank


def factors(network: Decoder) -> dict[str, tuple[Tensor, Tensor]]:
    """Give ``A`` and ``M`` of all heads as factors, ``left @ right.mT``, with first gains."""
    found = bounds.heads(network)
    return {
        "scores": (found.keys, found.queries.mT),
        "values": (found.outputs, found.values.mT),
    }


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


def turns(network: Any, ids: Tensor) -> Iterator[Row]:
    """Measure the mean cosine of tokens before and after each block, and all.

    First tokens are left out: attention heaps on them.
    """
    states = [network.get_input_embeddings()(ids)]
    for layer in network.base_model.layers:
        layer.register_forward_hook(lambda *given: states.append(given[-1]))
    network.base_model(ids)
    for l, (x, y) in enumerate(itertools.pairwise(states)):
        yield l, "", "turn", float(torch.cosine_similarity(x[:, 1:], y[:, 1:], dim=-1).mean())
    first, last = states[0][:, 1:], states[-1][:, 1:]
    yield -1, "", "turn", float(torch.cosine_similarity(first, last, dim=-1).mean())


class Unshifted(TunedOutputs):
    """Distances without one shift of all logits: the mean over all tokens of what is missed."""

    def __init__(self, whole: TunedOutputs, base: Network) -> None:
        """Pass the texts through the base, for the effect without its shift."""
        super().__init__(whole.batches, whole.readout, whole.states)
        (measurement,) = measure_networks([(base, self)])
        self.record(base, measurement.states)

    def squares(self, network: Network, states: list[Tensor]) -> NDArray[np.float64]:
        """Measure squared distances; what the shift has of them is taken off all texts alike."""
        squares = super().squares(network, states)
        # Logits are linear in states.
        mean, wanted = (torch.cat(each).mean(0, keepdim=True) for each in (states, self.states))
        shift = float(self._distances(network, mean, wanted)) * sum(map(len, states))
        return squares - shift / len(squares)


def measure(
    planner: Planner, unshifted: Unshifted, part: str, adapter: Adapter
) -> Iterator[Adapted]:
    """Measure errors of an adapter on the texts for stating, and equal tokens."""
    (measurement,) = planner.run((adapter, "test"))
    found = planner.test.summarize(measurement.compare())
    rest = unshifted.error(measurement._replace(reference=unshifted).squares)
    values = {"error": found.error, "unshifted": rest, "agreement": found.agreement}
    number = sum(adapter.ranks.values())
    yield from ((-1, part, quantity, value, number) for quantity, value in values.items())


def only(planner: Planner, kind: str) -> float:
    """Measure ``η`` on texts for stating with only the modules of one kind as tuned."""
    pair = planner.pair
    names = {f"{name}.weight" for name, module in pair.modules.items() if module.kind == kind}

    def read(name: str, rows: Rows = None) -> Tensor:
        return pair.read("tuned", name, rows) if name in names else rest(name, rows)

    rest = pair.reader(Adapter({}, {}))
    network = stream(pair, Adapter({}, {}), planner.device, read=read)
    return planner.test.error(measure_networks([(network, planner.test)])[0].squares)


def effect(planner: Planner) -> Iterator[Row | Adapted]:
    """Measure what adapters of a few directions lose, and halves, and what blocks lose together."""
    base = stream(planner.pair, "base", planner.device)
    test = Unshifted(planner.test, base)
    measured = functools.partial(measure, planner, test)
    yield -1, "", "alike", 1 - float(test.effect.sum() / planner.test.effect.sum())
    for part in ("attention", "mlp"):
        yield -1, part, "error", only(planner, part)
    yield from measured("none", Adapter({}, {}))
    changes = {name: lowrank.svd(planner.pair.change(name)) for name in planner.modules}
    choice = choose(planner.candidates, *planner.sketches, planner.parameters(MOST))
    costs = planner.candidates.costs[choice.order].cumsum(0)
    # By norm each direction counts as one.
    alike = {name: module._replace(shape=(1, 0)) for name, module in planner.modules.items()}
    for number in DIRECTIONS:
        yield from measured("norm", neighbours.choose("PARA", changes, alike, number)[1])
        gains = choice.gains(float(costs[number - 1]))
        yield from measured("effect", planner.with_gains(gains))
    for rank in RANKS:
        yield from measured("rank", planner.uniform(planner.parameters(rank)))
    adapter = planner.smallest(LEFT)
    yield from measured("smallest", adapter)
    for name, rank in adapter.ranks.items():
        yield *place(name), "taken", rank
    unshifted = copy.copy(planner)
    unshifted.select = Unshifted(planner.select, base)
    yield from measured("smallest unshifted", unshifted.smallest(LEFT))
    # Blocks lose together what a rule by modules adds up.
    blocks, apart = products(planner, planner.uniform(planner.parameters(1)))
    whole = float(planner.test.effect.sum())
    yield -1, "", "apart", apart / whole
    for l, row in enumerate((blocks / whole).tolist()):
        yield from ((l, str(k), "product", value) for k, value in enumerate(row))
    taken = torch.zeros_like(planner.candidates.costs)
    total, missing = planner.losses(taken), {*planner.modules}
    for rank in range(1, planner.max_rank + 1):
        for name in missing:
            taken[planner.candidates.places[name]][:rank] = 1
        left = planner.losses(taken)
        for name in [name for name in missing if left[name] <= LEFT * total[name]]:
            yield *place(name), "alone", rank
            missing.remove(name)
        if not missing:
            break


def products(planner: Planner, adapter: Adapter) -> tuple[Tensor, float]:
    """Estimate the products of what blocks lose, and the sum of squares over modules.

    They are to first order at the tuned network, summed over texts for measuring, from products
    with random outputs [prop-sketch].
    """
    readout, modules, batches = planner.readout, planner.modules, planner.test.batches
    passed = TextStates(readout.network, batches, len(batches))
    advance([passed])
    generator = randomness.generator(0, "products")
    tuned, adapted = planner.pair.reader("tuned"), planner.pair.reader(adapter)

    def find(name: str, _: Moments | None) -> Directions:
        """Take what is missing in columns, which are no singular directions."""
        missing = tuned(f"{name}.weight") - adapted(f"{name}.weight")
        out, into = map(torch.zeros, missing.shape)
        return Directions(LowRank(missing, torch.eye(len(into))), into, out, into)

    rows = Slopes(passed, readout, modules, {}, ()).collect_derivatives(
        find, lambda i, x: draw_rows(generator, x, len(batches[i].places), PROBES)
    )
    sides = [module.shape[1] for module in modules.values()]
    lost = torch.stack([part.sum(1) for part in torch.cat(rows).split(sides, 1)])
    places = torch.tensor([place(name)[0] for name in modules])
    blocks = lost.new_zeros(1 + int(places.max()), lost.shape[1]).index_add_(0, places, lost)
    return blocks @ blocks.mT / PROBES, float(lost.square().sum()) / PROBES


@torch.no_grad()
def work(settings: list[PartRun]) -> list[PartResults]:
    """Measure one stage of a tuning."""
    (setting,) = settings
    folder, kind = plans.tuned(setting.tuning), plans.TUNINGS[setting.tuning].kind
    pair = Pair.open(models.LANGUAGE, str(folder))
    found: list[Row | Adapted]
    if setting.stage == "weights":
        found = [*weights(pair)]
    elif setting.stage == "heads":
        networks = (models.decoder(name) for name in (models.LANGUAGE, str(folder)))
        base, tuned = (from_decoder(one, final_norm=False).to(torch.float64) for one in networks)
        found = [*heads(base, tuned), *tails(base, tuned, "base")]
        found += tails(shuffled(base), tuned, "shuffled")
    elif setting.stage == "turns":
        sentences = [s for part in ("test", "validation") for s in pairs.texts(kind, part)]
        ids = pair.tokenizer(sentences)["input_ids"]
        ids = [tokens[:LENGTH] for tokens in ids if len(tokens) >= LENGTH]
        found = [*turns(pair.network(), torch.tensor(ids[:SENTENCES]))]
    else:
        planning, held_out = (pairs.texts(kind, part) for part in ("validation", "test"))
        limits: Any = {"held_out": held_out[:TEXTS], "modules": plans.BLOCKS, "carry": "all"}
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
    asked = grid(PartRun, tuning=tunings, stage=["weights", "turns", "effect"])
    # Heads are compared for one tuning.
    asked.append(PartRun(tuning="tweets", stage="heads"))
    put(unfold(run(asked, work, "parts", size=1)), "parts")
