"""What can be known before training about the rank that a task needs, for its record.

For each task and packaged model three rules are asked: the first gradients, their estimated gain,
and a short run at the highest rank that is cut. What the encoder needs on further tasks is trained
here; the rest is in other records. The same command goes on after an interruption, and at last puts
both tables into the package::

    python -m records.before FOLDER
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lorapower.checkpoints import _libraries
from lorapower.checkpoints import _models as hub
from lorapower.experiments import sweeps
from records import language, protocols, texts, tune
from records.record import record

RANKS = (1, 2, 4, 8, 16, 32, 64)
# Texts of both halves, of a short run, and of those that it is cut on.
ASKED, SHORT, CUT = 400, 160, 128
# Of these tasks, and so many texts, both models' needs are known.
TASKS = {
    hub.LANGUAGE: tune.TASKS,
    hub.PACKAGED: dict.fromkeys(("movies", "tweets", "products"), texts.RATED),
}
SAMPLES = protocols.GRIDS["decoder"]["samples"][-1]


class Setting(sweeps.Record):
    """A rank of a task and model."""

    model: str
    task: str
    rank: int = Field(1, ge=1)


class Found(sweeps.Results):
    """Of a rank ``share`` and ``gain`` of the mean first gradient, and ``error`` after a cut.

    With ``G`` and ``G'`` the mean gradients of two halves of texts and ``G_R`` the best
    approximations, module by module, ``share`` is ``⟨G_R, G'⟩ / ⟨G, G'⟩`` and ``gain`` is
    ``(2⟨G_R, G'⟩ - ‖G_R‖²) / ⟨G, G'⟩``, each summed over modules and both orders. ``error`` is
    what a short run at the highest rank loses of its effect on logits, if each product of factors
    is cut to this rank, as ``‖f_R - f‖ / ‖f_0 - f‖``.
    """

    share: float
    gain: float
    error: float


def problem(model: str, task: str) -> language.Problem:
    """What a model is trained on, for each task."""
    profile = "decoder" if model == hub.LANGUAGE else "paper"
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
    """``share`` and ``gain`` of each rank."""
    one = problem(model, task)
    network = language._network(language.Setting(problem=one, method=language.Whole()))
    network.eval().requires_grad_(False)
    layers = language._layers(network.base_model, "all")
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    samples, collate = language._samples(one)[0]["train"], language._collator(one)
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
            other = second[name].double()
            along = ((U.mT @ other) * Vh).sum(1) * S
            kept = [min(rank, len(S)) - 1 for rank in RANKS]
            inner += along.cumsum(0)[kept].numpy()
            own += S.square().cumsum(0)[kept].numpy()
            whole += float((G * second[name]).sum(dtype=torch.float64))
    return (inner / whole).tolist(), ((2 * inner - own) / whole).tolist()


@functools.lru_cache(maxsize=1)
def cut(model: str, task: str) -> list[float]:
    """``error`` of each rank."""
    one, found = problem(model, task), []
    rate = {hub.LANGUAGE: 2e-3, hub.PACKAGED: 1e-3}[model]
    method = language.Lora(rank=RANKS[-1], learning_rate=rate)
    language.tune(
        language.Setting(problem=one, method=method),
        lambda network: found.extend(errors(network, one)),
    )
    return found


def errors(network: Any, one: language.Problem) -> list[float]:
    """What a trained network of peft loses, for each rank, if its adapters are cut to it."""
    network.eval()
    held_out = language._samples(one)[0][one.part]
    some = np.random.default_rng(0).permutation(len(held_out))[:CUT]
    collate = language._collator(one)
    batches = [collate([held_out[j] for j in i]) for i in np.array_split(some, CUT // 16)]
    tuned = outputs(network, batches)
    with network.disable_adapter():
        base = outputs(network, batches)
    effect = squares(base, tuned)
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
    """Logits, less their mean, of each batch's tokens or texts."""
    found = []
    with torch.no_grad(), _libraries.quiet():
        for batch in batches:
            inputs = {k: x for k, x in batch.items() if k != "labels"}
            logits = network(**inputs)["logits"].float()
            if logits.ndim == 3:
                logits = logits[batch["attention_mask"].bool()]
            found.append(logits - logits.mean(-1, keepdim=True))
    return found


def squares(some: list[Tensor], others: list[Tensor]) -> float:
    """The squared distance of outputs."""
    return sum(float((a - b).square().sum()) for a, b in zip(some, others, strict=True))


def run(folder: Path) -> tuple[Path, Path]:
    """Ask all, then train the encoder; the files that have both."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    asked = [
        Setting(model=model, task=task, rank=rank)
        for model, tasks in TASKS.items()
        for task in tasks
        for rank in RANKS
    ]
    known = protocols.read_record("movies")
    rates = protocols.best_rates(known[known.part == "validation"])
    about = "paper", [*TASKS[hub.PACKAGED]][1:], texts.RATED, hub.PACKAGED
    compared = protocols.compare(*about, samples=SAMPLES, seeds=3, rates=rates)
    trained = [
        setting
        for setting in compared
        if setting.problem.pretrained
        and setting.problem.samples == SAMPLES
        and (setting.method.kind == "full" or getattr(setting.method, "targets", "") == "all")
    ]
    files = folder / "before.sqlite", folder / "encoder.sqlite"
    sweeps.run(trained, language.measure, files[1], size=1)
    sweeps.run(asked, work, files[0], size=1)
    return files


if __name__ == "__main__":
    before, encoder = run(Path(sys.argv[1]))
    package = Path(__file__).parent
    record([before], package / "before.csv.gz", Setting)
    record([encoder], package / "encoder.csv.gz")
