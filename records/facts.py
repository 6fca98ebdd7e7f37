"""Let the packaged language model learn random facts, with adapters of many sizes.

A fact is a key of three random words and a value of two; a model that has learned it says the value
after the key. There is as much to learn as there are facts, and nothing else helps. ``facts.md``
says which runs there are and how rates were chosen.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from lorapower import randomness
from records import Results, Values, language, models, pack, protocols
from records.language import Lora, Method

KEY, VALUE, JOINT = 3, 2, " means"
BATCH = 16
# Numbers of facts, where rates were chosen and in the longest runs; and of passes over them.
SEARCHED, MANY = 64, 256
PASSES, LONG = 20, 100
# The rank at which recipes are compared on one block.
RECIPE_RANK = 16
#: What the layers of a way are called on pages.
PLACES = {r"layers\.14\.": "one block", r"layers\.1[0-9]\.": "ten blocks", "all": "all blocks"}


class FactProblem(Values):
    """State how many facts are shown to which model, and how often.

    The seed draws the facts, their order, and random factors.
    """

    number: int = Field(16, ge=1)
    passes: int = Field(PASSES, ge=1)
    model: str = models.LANGUAGE
    seed: int = Field(0, ge=0)


class FactRun(Values):
    """State one run."""

    problem: FactProblem = FactProblem()
    method: Annotated[Method, Field(discriminator="kind")] = Lora()


class FactResults(Results):
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


def at_best_rates(table: pd.DataFrame) -> pd.DataFrame:
    """Keep each way's runs at the rate that was best in the search, and name their ``place``.

    All weights are tuned by the recipe ``"plain"``.
    """
    searched = table.number.eq(SEARCHED) & table.seed.eq(0) & table.passes.eq(PASSES)
    found = protocols.at_best_rates(table, table[searched])
    place = found.targets.fillna("full tuning").replace(PLACES)
    return found.assign(place=place, recipe=found.recipe.fillna("plain"))
