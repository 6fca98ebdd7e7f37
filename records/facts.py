"""Let the packaged language model learn random facts, with adapters of many sizes.

A fact is a key of three random words and a value of two; a model that has learned it says the value
after the key. There is as much to learn as there are facts, and nothing else helps. Each run is
kept in a folder as it ends, so that the same command goes on after an interruption; ``facts.md``
says which runs there are and how rates are chosen::

    python -m records.facts FOLDER
"""

from __future__ import annotations

import functools
import math
import re
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from lorapower import randomness
from lorapower.experiments import sweeps
from records import language, models, pack, protocols
from records.language import Lora, Method, Part, Whole
from records.tables import begin, merge, put, workers

KEY, VALUE, JOINT = 3, 2, " means"
BATCH = 16
# Numbers of facts: in short runs, where rates are chosen, and in the longest runs.
NUMBERS, SEARCHED, MANY = (16, 64), 64, 256
SEEDS = 2
PASSES = 20
# The rank at which recipes are compared on one block, and with how many seeds.
RECIPE_RANK, RECIPE_SEEDS = 16, 3
# A way that recalls a smaller share is shown no more facts.
ENOUGH = 0.5
# Passes of the runs that ask whether a way that falls short needs only more of them.
LONG = 100
BLOCK, TEN = r"layers\.14\.", r"layers\.1[0-9]\."
#: What the layers of a way are called on pages.
PLACES = {BLOCK: "one block", TEN: "ten blocks", "all": "all blocks", "full": "full tuning"}
# Adapters from a single block to all linear layers, and all weights; rates a factor of two apart.
WAYS: list[tuple[Method, list[float]]] = [
    (Part(pattern=BLOCK, rank=1), [0.008, 0.016, 0.032]),
    (Part(pattern=BLOCK, rank=4), [0.004, 0.008, 0.016]),
    (Part(pattern=BLOCK, rank=16), [0.002, 0.004, 0.008]),
    (Part(pattern=BLOCK, rank=64), [0.002, 0.004, 0.008]),
    (Part(pattern=BLOCK, rank=16, recipe="dora"), [0.004, 0.008, 0.016]),
    (Part(pattern=BLOCK, rank=16, recipe="pissa"), [0.0005, 0.001, 0.002]),
    (Part(pattern=BLOCK, rank=16, recipe="lora+"), [0.0005, 0.001, 0.002]),
    (Part(pattern=TEN, rank=1), [0.004, 0.008, 0.016]),
    (Lora(rank=1), [0.004, 0.008, 0.016]),
    (Lora(rank=4), [0.002, 0.004, 0.008]),
    (Lora(targets="attention", rank=1), [0.004, 0.008, 0.016]),
    (Lora(targets="feed-forward", rank=1), [0.004, 0.008, 0.016]),
    (Lora(targets="queries and keys", rank=1), [0.008, 0.016, 0.032]),
    (Whole(kind="full"), [0.0001, 0.0002, 0.0004]),
]


class FactProblem(sweeps.Record):
    """State how many facts are shown to which model, and how often.

    The seed draws the facts, their order, and random factors.
    """

    number: int = Field(16, ge=1)
    passes: int = Field(PASSES, ge=1)
    model: str = models.LANGUAGE
    pretrained: Literal[True] = True  # by which `protocols.best_rates` groups runs
    seed: int = Field(0, ge=0)


class FactRun(sweeps.Record):
    """State one run."""

    problem: FactProblem = FactProblem()
    method: Annotated[Method, Field(discriminator="kind")] = Lora()


class FactResults(sweeps.Results):
    """What a run learned.

    ``recall`` is the share of facts whose value greedy decoding says. ``bits`` are those learned
    about the values, ``n·2·log₂(words) − Σ loss/ln 2``, where each loss is a fact's, in nats; they
    are negative for a model worse than guessing among all words. ``losses`` packs the losses, and
    ``score`` is minus their mean. ``parameters`` are those tuned, ``seconds`` the training's.
    """

    recall: float
    bits: float
    score: float
    losses: str
    training_loss: float
    parameters: int
    seconds: float


@functools.lru_cache(maxsize=2)
def words(model: str) -> NDArray[np.int64]:
    """List the tokens that are a space and a word of three lower-case letters or more."""
    tokenizer = models.tokenizer(model)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    return np.flatnonzero([bool(re.fullmatch(" [a-z]{3,}", text)) for text in texts])


def facts(problem: FactProblem) -> NDArray[np.int64]:
    """Draw facts of different keys: tokens of key, of what joins, and of value, ``[n, …]``."""
    draw = np.random.default_rng(randomness.number(problem.seed, "facts"))
    among = words(problem.model)
    keys = np.unique(draw.choice(among, (2 * problem.number, KEY)), axis=0)
    keys = draw.permutation(keys)[: problem.number]
    joint = models.tokenizer(problem.model)(JOINT, add_special_tokens=False)["input_ids"]
    values = draw.choice(among, (len(keys), VALUE))
    return np.hstack([keys, np.tile(joint, (len(keys), 1)), values])


def recite(network: Any, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Compute each fact's loss, a sum over its value in nats, and whether its value is said."""
    losses, said = [], []
    network.eval()
    device = network.device
    half = models.has_bfloat16(device.type)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        for tokens in torch.from_numpy(rows).to(device).split(256):
            logits = network(tokens)["logits"][:, -VALUE - 1 : -1].float()
            asked = tokens[:, -VALUE:]
            loss = torch.nn.functional.cross_entropy(logits.mT, asked, reduction="none")
            losses.append(loss.sum(1))
            # Where all words before it are right, greedy decoding comes to the same word.
            said.append((logits.argmax(-1) == asked).all(1))
    return torch.cat(losses).double().cpu().numpy(), torch.cat(said).cpu().numpy()


def collate(samples: list[Tensor]) -> dict[str, Tensor]:
    """Stack facts; only their values count in the loss."""
    tokens = torch.stack(samples)
    labels = tokens.clone()
    labels[:, :-VALUE] = -100
    return {"input_ids": tokens, "labels": labels}


def work(settings: list[FactRun]) -> list[FactResults]:
    """Train a model on the facts of a setting, then ask for them."""
    (setting,) = settings
    problem, method = setting.problem, setting.method
    rows = facts(problem)
    network = language.ready(models.decoder(problem.model), method, problem.seed, half=True)
    trained = models.train(
        network,
        [*torch.from_numpy(rows)],
        collate,
        optimizer=language.optimizer_of(network, method),
        learning_rate=method.learning_rate,
        num_train_epochs=problem.passes,
        per_device_train_batch_size=BATCH,
        seed=randomness.number(problem.seed, "training"),
        remove_unused_columns=False,
        **models.precision(),
    )
    losses, said = recite(network, rows)
    known = VALUE * len(rows) * math.log2(len(words(problem.model)))
    return [
        FactResults(
            recall=float(said.mean()),
            bits=known - float(losses.sum()) / math.log(2),
            score=-float(losses.mean()),
            losses=pack(losses),
            training_loss=float(trained.training_loss),
            parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
            seconds=trained.metrics["train_runtime"],
        )
    ]


def run(file: str) -> None:
    """Choose rates at one number of facts, then learn more and more of them, kept in a file."""
    with workers():
        learn = functools.partial(sweeps.run, work=work, path=file, size=1)
        tried = [
            FactRun(problem=FactProblem(number=SEARCHED), method=way.replace(learning_rate=rate))
            for way, rates in WAYS
            for rate in rates
        ]
        best = protocols.choose_rates(tried, learn)
        ways = [way.replace(learning_rate=best[way.way, True][way.rank]) for way, _ in WAYS]
        recipes = [way for way in ways if isinstance(way, Part) and way.rank == RECIPE_RANK]
        problems = sweeps.grid(FactProblem, number=[SEARCHED], seed=range(RECIPE_SEEDS))
        learn(sweeps.grid(FactRun, problem=problems, method=recipes))
        methods = [way for way in ways if way not in recipes or way.way == BLOCK]
        one_block = [method for method in methods if method.way == BLOCK]
        for number in NUMBERS:
            problems = sweeps.grid(FactProblem, number=[number], seed=range(SEEDS))
            found = learn(sweeps.grid(FactRun, problem=problems, method=methods))
            shares = found.recall.to_numpy().reshape(SEEDS, -1).mean(0)
            methods = [methods[i] for i in np.flatnonzero(shares >= ENOUGH)]
        lowest = [method for method in one_block if method.rank <= 4]
        for number, some in ((SEARCHED, one_block), (MANY, lowest)):
            patient = sweeps.grid(FactProblem, number=[number], passes=[LONG], seed=range(SEEDS))
            learn(sweeps.grid(FactRun, problem=patient, method=some))
        slower = one_block[0].replace(learning_rate=one_block[0].learning_rate / 2)
        for passes, method in ((LONG, slower), (2 * LONG, one_block[0])):
            learn([FactRun(problem=FactProblem(number=MANY, passes=passes), method=method)])


def at_best_rates(table: pd.DataFrame) -> pd.DataFrame:
    """Keep each way's runs at the rate that was best in the search, and name their ``place``.

    Runs without a ``recipe`` are ``"plain"`` too.
    """
    searched = table.number.eq(SEARCHED) & table.seed.eq(0) & table.passes.eq(PASSES)
    found = protocols.at_best_rates(table, table[searched])
    place = found.pattern.fillna(found.targets).fillna("full").replace(PLACES)
    return found.assign(place=place, recipe=found.recipe.fillna("plain"))


if __name__ == "__main__":
    begin()
    run("facts.sqlite")
    put(merge(["facts.sqlite"], FactRun), "facts")
