"""Ask what can be known before training about the rank that a task needs.

For each task and packaged model three rules are asked: the first gradients, their estimated gain,
and a short run at the highest rank that is cut. What the encoder needs on further tasks is trained
here; the rest is in other records. The same command goes on after an interruption, and at last
makes both records::

    python -m records.before FOLDER
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

import records
from lorapower.experiments import sweeps
from records import language, models, protocols, texts, tune
from records.record import begin, merge, put

RANKS = (1, 2, 4, 8, 16, 32, 64)
# Texts of both halves, of a short run, and of those that it is cut on.
ASKED, SHORT, CUT = 400, 160, 128
# Of these tasks, and so many texts, both models' needs are known.
TASKS = {
    models.LANGUAGE: tune.TASKS,
    models.PACKAGED: dict.fromkeys(("movies", "tweets", "products"), texts.RATED),
}
SAMPLES = tune.PROFILE.samples[-1]


class Setting(sweeps.Record):
    """A rank of a task and model."""

    model: str
    task: str
    rank: int = Field(1, ge=1)


class Found(sweeps.Results):
    """What ``"before"`` of `records.read` says."""

    share: float
    gain: float
    error: float


def problem(model: str, task: str) -> language.Problem:
    """State what a model is trained on, for each task."""
    profile = "decoder" if model == models.LANGUAGE else "encoder"
    one, *_ = protocols.compare(profile, [task], TASKS[model][task], model, samples=SAMPLES)
    return one.problem.replace(samples=SHORT, part="validation")


def work(settings: list[Setting]) -> list[Found]:
    """Ask a rank."""
    (setting,) = settings
    shares, gains = gradients(setting.model, setting.task)
    at = RANKS.index(setting.rank)
    return [Found(share=shares[at], gain=gains[at], error=cut(setting.model, setting.task)[at])]


@functools.lru_cache(maxsize=1)
def gradients(model: str, task: str) -> tuple[list[float], list[float]]:
    """Compute ``share`` and ``gain`` of each rank."""
    one = problem(model, task)
    network = language.prepare(language.Setting(problem=one, method=language.Whole()))
    network.eval().requires_grad_(False)
    layers = language.linear_layers(network.base_model)
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    samples, collate = language.tokenize(one)[0]["train"], language.collator(one)
    order = np.random.default_rng(0).permutation(len(samples))[:ASKED]
    means = []
    for half in np.split(order, 2):
        network.zero_grad()
        for i in np.split(half, len(half) // 8):
            loss = network(**collate([samples[j] for j in i]))["loss"]
            (loss * len(i) / len(half)).backward()
        means.append({name: weight.grad for name, weight in weights.items()})
    inner, own, whole = np.zeros(len(RANKS)), np.zeros(len(RANKS)), 0.0
    for first, second in (means, means[::-1]):
        for name, G in first.items():
            U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
            along = ((U.mT @ second[name].double()) * Vh).sum(1) * S
            kept = [min(rank, len(S)) - 1 for rank in RANKS]
            inner += along.cumsum(0)[kept].numpy()
            own += S.square().cumsum(0)[kept].numpy()
            whole += float((G * second[name]).sum(dtype=torch.float64))
    return (inner / whole).tolist(), ((2 * inner - own) / whole).tolist()


@functools.lru_cache(maxsize=1)
def cut(model: str, task: str) -> list[float]:
    """Compute ``error`` of each rank."""
    one, found = problem(model, task), []
    rate = {models.LANGUAGE: 2e-3, models.PACKAGED: 1e-3}[model]
    method = language.Lora(rank=RANKS[-1], learning_rate=rate)
    language.tune(
        language.Setting(problem=one, method=method),
        lambda network: found.extend(errors(network, one)),
    )
    return found


def errors(network: Any, one: language.Problem) -> list[float]:
    """Compute what a trained network of peft loses, for each rank its adapters are cut to."""
    network.eval()
    held_out, collate = language.tokenize(one)[0][one.part], language.collator(one)
    some = np.random.default_rng(0).permutation(len(held_out))[:CUT]
    batches = [collate([held_out[j] for j in i]) for i in np.array_split(some, CUT // 16)]
    tuned = outputs(network, batches)
    with network.disable_adapter():
        effect = squares(outputs(network, batches), tuned)
    layers = [m for m in network.modules() if hasattr(m, "lora_A")]
    pairs = [(m.lora_B["default"].weight.data, m.lora_A["default"].weight.data) for m in layers]
    # As an SVD of each product, of which a cut keeps the first rows of the second factor.
    for B, A in pairs:
        Q, core = torch.linalg.qr(B.double())
        U, S, Vh = torch.linalg.svd(core @ A.double(), full_matrices=False)
        B.copy_(Q @ U)
        A.copy_(S[:, None] * Vh)
    left = []
    for rank in sorted(RANKS, reverse=True):
        for _, A in pairs:
            A[rank:] = 0
        left.append((squares(outputs(network, batches), tuned) / effect) ** 0.5)
    return left[::-1]


def outputs(network: Any, batches: list[Any]) -> list[Tensor]:
    """Compute logits, less their mean, of each batch's tokens or texts."""
    found = []
    with torch.no_grad(), models.quiet():
        for batch in batches:
            inputs = {k: x for k, x in batch.items() if k != "labels"}
            logits = network(**inputs)["logits"].float()
            if logits.ndim == 3:
                logits = logits[batch["attention_mask"].bool()]
            found.append(logits - logits.mean(-1, keepdim=True))
    return found


def squares(some: list[Tensor], others: list[Tensor]) -> float:
    """Compute the squared distance of outputs."""
    return sum(float((a - b).square().sum()) for a, b in zip(some, others, strict=True))


def trainings() -> list[language.Setting]:
    """List trainings of the encoder on further tasks, with the rates of its first."""
    known = records.read("movies")
    rates = protocols.best_rates(known[known.part == "validation"])
    about = "encoder", [*TASKS[models.PACKAGED]][1:], texts.RATED, models.PACKAGED
    compared = protocols.compare(*about, samples=SAMPLES, seeds=3, rates=rates)
    return [
        setting
        for setting in compared
        if setting.problem.pretrained
        and setting.problem.samples == SAMPLES
        and setting.method.way in ("full", "lora")
    ]


if __name__ == "__main__":
    begin()
    asked = [
        Setting(model=model, task=task, rank=rank)
        for model, tasks in TASKS.items()
        for task in tasks
        for rank in RANKS
    ]
    sweeps.run(trainings(), language.measure, "encoder.sqlite", size=1)
    sweeps.run(asked, work, "before.sqlite", size=1)
    put(merge(["before.sqlite"], Setting), "before")
    put(merge(["encoder.sqlite"]), "encoder")
