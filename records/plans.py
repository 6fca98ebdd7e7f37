"""Compare adapters that stand in for tunings of the packaged language model.

The tunings are made if they are missing; adapters of another tool are taken from
``others/TUNING/TOOL-RANK``, where there are such folders. Each adapter that is measured is kept in
a folder as it ends, so that the same command goes on after an interruption. Rows of other tunings
than those named stay as they are::

    python -m records.plans FOLDER [TUNING ...]
"""

from __future__ import annotations

import functools
import math
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from loraplan import Adapter, Pair, Planner, lab
from loraplan.lab import measure_networks
from lorapower import lowrank, randomness
from records import Results, Values, grid, models, neighbours, pack, pairs, run
from records.tables import HERE, begin, put

BASE = models.LANGUAGE
# Texts for planning, of which as many are used as a plan takes.
PLANNING = 300
RANKS = (1, 4, 16)
# Ranks whose parameters are tried, in this order, for an error by another rule.
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Of a tuning of all weights embeddings are carried, as by mergekit; only blocks get factors.
BLOCKS = r"^model\.layers\."
OF_BLOCKS = "effect of blocks"


class Tuning(NamedTuple):
    """Kind of sentences, an adapter's rank or 0, texts to measure on, and errors asked for.

    A plan draws at most 256 of the texts, and 251 to measure.
    """

    kind: str
    rank: int
    texts: int
    errors: tuple[float, ...]


TUNINGS = {
    "movies": Tuning("movies", 0, 300, (0.3, 0.2, 0.1)),
    "movies, rank 64": Tuning("movies", 64, 160, (0.2, 0.1)),
    "tweets": Tuning("tweets", 0, 160, (0.2, 0.1)),
    "editorials": Tuning("editorials", 0, 160, (0.1,)),
}


class AdapterRun(Values):
    """An adapter for a tuning: a method, and the rank or the error that is ``asked``."""

    tuning: str
    method: str
    asked: float


class AdapterResults(Results):
    """What ``"plans"`` of `records.read` says."""

    parameters: float
    seconds: float
    carried: int
    bytes: int
    squares: str
    effect: str
    equal: str
    divergence: str
    decisions: str
    variation: str
    torch: str
    peft: str


def tune(kind: str, rank: int, folder: Path) -> None:
    """Tune the model in 100 steps to predict sentences of a kind, all weights or an adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq

    tokenizer, network = models.tokenizer(BASE), models.decoder(BASE)
    end = tokenizer.eos_token
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or end, "right"
    if rank:
        about: Any = {"r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
        with randomness.seeded(0, "factors of a language model"), models.quiet():
            network = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", **about))
    sentences = [text + end for text in pairs.texts(kind, "train")]
    tokens = tokenizer(sentences, truncation=True, max_length=64)["input_ids"]
    models.train(
        network,
        # Labels of their own, since padding is told from the end by them alone.
        [{"input_ids": ids, "labels": ids} for ids in tokens],
        DataCollatorForSeq2Seq(tokenizer),
        seed=randomness.number(0, "order of sentences"),
        learning_rate=4e-4 if rank else 5e-5,
        max_steps=100,
        warmup_steps=10,
        per_device_train_batch_size=8,
        **models.precision(),
    )
    models.save(network, BASE, folder)


def tuned(tuning: str) -> Path:
    """Name the folder of a tuning, which is made if it is missing."""
    folder = Path("tuned", tuning.replace(", ", "-").replace(" ", "-"))
    if not folder.exists():
        tune(TUNINGS[tuning].kind, TUNINGS[tuning].rank, folder)
    return folder


def other(setting: AdapterRun) -> Path:
    """Name the folder of another tool's adapter."""
    return Path("others", setting.tuning, f"{setting.method}-{setting.asked:g}")


@functools.lru_cache(maxsize=2)
def plan(tuning: str, modules: str) -> Planner:
    """Prepare a plan for a tuning."""
    about = TUNINGS[tuning]
    return Planner(
        Pair.open(BASE, str(tuned(tuning))),
        pairs.texts(about.kind, "validation")[:PLANNING],
        held_out=pairs.texts(about.kind, "test")[: about.texts],
        modules=modules,
        carry="all",
        thorough=True,
    )


def make(planner: Planner, method: str, parameters: int) -> Adapter:
    """Make an adapter with at most so many parameters: by effect, uniform, or by another's rule."""
    if method == "effect":
        return planner.candidate(parameters)
    if method == "uniform":
        return planner.uniform(parameters)
    changes = {name: lowrank.svd(planner.pair.change(name)) for name in planner.modules}
    return neighbours.choose(method, changes, planner.modules, parameters)[1]


def work(settings: list[AdapterRun]) -> list[AdapterResults]:
    """Choose an adapter, or load it, and measure it."""
    (setting,) = settings
    blocks = plan(setting.tuning, BLOCKS)
    about: dict[str, Any] = {"parameters": math.nan, "seconds": math.nan}
    if setting.method == "mergekit":
        folder = other(setting)
        carried, size = lab.measure_peft(folder)
        network = lab.load_adapter(folder, blocks.pair, blocks.device)
        (measurement,) = measure_networks([(network, blocks.test)])
    else:
        method = setting.method.removesuffix(" of blocks")
        in_blocks = method in neighbours.RULES or method != setting.method
        planner = blocks if in_blocks else plan(setting.tuning, "all")
        start = time.perf_counter()
        if method.startswith("least "):
            adapter = least(planner, method.removeprefix("least "), setting.asked)
        else:
            adapter = make(planner, method, blocks.parameters(int(setting.asked)))
        about = {"parameters": adapter.parameters, "seconds": time.perf_counter() - start}
        carried, size = lab.estimate(planner.pair, adapter)
        (measurement,) = planner.run((adapter, "test"))
    arrays = measurement.compare()._asdict() | {"effect": measurement.reference.effect}
    for name in ("right", "tuned_right", "first"):
        del arrays[name]  # There are no labels and no answers.
    about |= {name: pack(values) for name, values in arrays.items()}
    about |= {name: metadata.version(name) for name in ("torch", "peft")}
    return [AdapterResults(carried=carried, bytes=size, **about)]


def least(planner: Planner, method: str, error: float) -> Adapter:
    """Find the smallest adapter with at most an error on the texts for choosing, or the largest."""
    if method == "effect":
        return planner.smallest(error)
    for rank in LADDER:
        adapter = make(planner, method, planner.parameters(rank))
        if planner.error(adapter) <= error:
            break
    return adapter


def every(tuning: str) -> list[AdapterRun]:
    """List the adapters of a tuning; those of another tool as far as they are there."""
    about = TUNINGS[tuning]
    methods = ["mergekit", *neighbours.RULES, OF_BLOCKS, "effect"]
    if about.rank:
        methods = ["peft, energy", "uniform", "effect"]
    settings = grid(AdapterRun, tuning=tuning, method=methods, asked=[*map(float, RANKS)])
    settings = [s for s in settings if s.method != "mergekit" or other(s).exists()]
    methods = ["least effect", "least uniform", *(["least peft, energy"] if about.rank else [])]
    return settings + grid(AdapterRun, tuning=tuning, method=methods, asked=[*about.errors])


if __name__ == "__main__":
    named = begin() or [*TUNINGS]
    asked = [setting for tuning in named for setting in every(tuning)]
    kept = pd.read_csv(HERE / "plans.csv.gz", dtype=str)
    made = run(asked, work, "plans", size=1)
    rows = pd.concat([kept[~kept.tuning.isin(named)], made])
    put(rows.sort_values("tuning", kind="stable"), "plans")
