"""Fine-tuning runs: settings, and what is measured for each."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Sequence
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from ... import _checks, hub, randomness
from ..._records import Record, Results
from ...errors import InputError
from .. import sweeps
from . import models, sources
from .models import TARGETS, Final, Lora
from .tasks import Task, find

# Adapters of some ranks. Quick is for a processor, and for a few hundred samples.
GRIDS: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "problem": {"epochs": 3, "batch": 16, "tokens": 24, "samples": 256, "seed": range(3)},
        "adapters": {"rank": [2, 8], "learning_rate": 5e-3},
    },
    "paper": {
        "problem": {"epochs": 10, "batch": 16, "tokens": 128, "samples": 0, "seed": range(5)},
        "adapters": {"rank": [2, 4, 8, 12], "learning_rate": 1e-3},
    },
}
# The final layer in full takes smaller steps: none of its weights is a product of small factors.
FINAL_RATE = 1 / 5


class Problem(Record):
    """A task, an encoder, and how long which texts are shown to it.

    Attributes
    ----------
    task, source : name of the task, and where its texts are: ``"packaged"``, ``"hub"`` or a folder
        in GLUE's layout.
    model : encoder: ``"packaged"``, a folder, or a name on the hub.
    pretrained : whether it has its weights, or random ones of the same configuration.
    epochs, batch : of training.
    tokens : to which longer texts are cut off; fewer than 8 have no place for a text beside the
        marks of where texts begin and end.
    samples : of the training set, drawn by the seed; 0 means all.
    seed : of the head, the random weights and factors, the samples, their order, and dropout. Equal
        seeds give equal heads, samples and orders whatever the rest.

    Raises `InputError` for a value that has no meaning, alone or with the others.
    """

    task: str = "condition"
    source: str = hub.PACKAGED
    model: str = hub.PACKAGED
    pretrained: bool = True
    epochs: int = Field(3, ge=1)
    batch: int = Field(16, ge=1)
    tokens: int = Field(24, ge=8)
    samples: int = Field(0, ge=0)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        sources.check(self.task, self.source)
        if not self.model:
            raise InputError(
                "model",
                allowed=f"{hub.PACKAGED!r}, a folder, or a name on the hub",
                given=repr(self.model),
            )
        return self


class Setting(Record):
    """One run; whatever the method tunes, the head is tuned too."""

    problem: Problem = Problem()
    method: Annotated[Lora | Final, Field(discriminator="kind")] = Lora()


def protocol(
    profile: str,
    tasks: Sequence[str],
    source: str,
    model: str,
    *,
    ranks: Sequence[int] = (),
    seed: int = 0,
    seeds: int = 0,
) -> list[Setting]:
    """The study's settings for these tasks: for pretrained and for random weights, adapters of each
    rank for the attention and for all layers; and, for comparison, the final layer in full.

    Ranks, and the number of seeds from ``seed`` on, are by default those of the profile. Raises
    `InputError` for a profile that there is not.
    """
    if profile not in GRIDS:
        raise InputError("profile", allowed=" or ".join(GRIDS), given=repr(profile))
    problem, adapters = GRIDS[profile]["problem"], GRIDS[profile]["adapters"]
    problem = problem | {"seed": range(seed, seed + (seeds or len(problem["seed"])))}
    adapters = adapters | {"rank": [*(ranks or adapters["rank"])]}
    texts: Any = {"task": [*tasks], "source": source, "model": model}
    return sweeps.grid(
        Setting,
        problem=sweeps.grid(Problem, **texts, pretrained=[True, False], **problem),
        method=[
            *sweeps.grid(Lora, targets=[*TARGETS], **adapters),
            Final(learning_rate=FINAL_RATE * adapters["learning_rate"]),
        ],
    )


def check(settings: Sequence[Setting]) -> None:
    """Read the texts of all tasks and adapt each model once, for the highest of its ranks.

    So whatever of the settings is not usable is found before the first run. Raises `InputError`
    for texts, models and ranks, as `measure` does when it comes to them.
    """
    hub.check()
    problems = [setting.problem for setting in settings]
    for task, source in dict.fromkeys((p.task, p.source) for p in problems):
        for part in ("train", "validation"):
            sources.read(task, source, part)
    highest = {}
    for setting in sorted(settings, key=lambda s: (_rank(s.method), s.problem.pretrained)):
        targets = getattr(setting.method, "targets", None)
        highest[setting.problem.model, setting.problem.tokens, targets] = setting
    for setting in highest.values():
        _network(setting)


class Found(Results):
    """What a run reaches on the validation set of its task after training.

    ``accuracy`` to ``spearman`` are `tasks.METRICS`, NaN where they are none of the task's;
    ``score``, that by which the task is judged; ``accuracy_matched`` and ``accuracy_mismatched``
    are of MNLI's two validation sets; ``baseline``, the score of the best constant answer;
    ``training_loss``, the mean over the steps; ``parameters``, number of those that are tuned;
    ``cut_off``, part of the texts that had more tokens than are used; ``left_out``, rows of the
    source that were of no use.
    """

    accuracy: float
    f1: float
    matthews: float
    pearson: float
    spearman: float
    score: float
    accuracy_matched: float = math.nan
    accuracy_mismatched: float = math.nan
    baseline: float
    training_loss: float
    parameters: int
    cut_off: float
    left_out: int


def measure(settings: Sequence[Setting]) -> list[Found]:
    """What each setting reaches; raises `InputError` for texts, models, ranks of no use."""
    hub.check()
    return [_run(setting) for setting in settings]


def _run(setting: Setting) -> Found:
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

    problem = setting.problem
    task = find(problem.task)
    train, validation = (
        sources.read(problem.task, problem.source, part) for part in ("train", "validation")
    )
    words = hub.tokenizer(problem.model)
    samples, cut_off = _tokenized(problem.task, problem.source, problem.model, problem.tokens)
    network = _network(setting)
    chosen = torch.randperm(
        len(train.labels), generator=randomness.generator(problem.seed, "samples"), device="cpu"
    ).tolist()
    with tempfile.TemporaryDirectory() as unused, hub.quiet():
        trainer = Trainer(
            model=network,
            args=TrainingArguments(
                output_dir=unused,
                learning_rate=setting.method.learning_rate,
                num_train_epochs=problem.epochs,
                per_device_train_batch_size=problem.batch,
                per_device_eval_batch_size=64,
                seed=randomness.number(problem.seed, "training"),
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=[samples["train"][i] for i in chosen[: problem.samples or None]],
            data_collator=DataCollatorWithPadding(words),
        )
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
        outputs = trainer.predict(samples["validation"]).predictions
    answers = task.answers(outputs)
    baseline = np.full(len(answers), task.constant(train.labels))
    return Found(
        **task.scores(answers, validation.labels),
        **_by_set(task, answers, validation),
        baseline=task.scores(baseline, validation.labels)["score"],
        training_loss=float(loss),
        parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        cut_off=cut_off,
        left_out=train.left_out + validation.left_out,
    )


def _rank(method: Lora | Final) -> int:
    return method.rank if isinstance(method, Lora) else 0


def _network(setting: Setting) -> Any:
    """The model with a head for the task, and what is tuned of it."""
    problem = setting.problem
    network = models.classifier(
        problem.model, find(problem.task), pretrained=problem.pretrained, seed=problem.seed
    )
    _fits(problem, network)
    return models.adapt(network, setting.method, seed=problem.seed)


def _by_set(task: Task, answers: Any, validation: sources.Examples) -> dict[str, Any]:
    """Accuracies on MNLI's two validation sets."""
    if len(validation.sizes) == 1:
        return {}
    parts, labels = (
        np.split(np.asarray(values), [validation.sizes[0]])
        for values in (answers, validation.labels)
    )
    return {
        f"accuracy_{kind}": task.scores(given, wanted)["accuracy"]
        for kind, given, wanted in zip(("matched", "mismatched"), parts, labels, strict=True)
    }


def _fits(problem: Problem, network: Any) -> None:
    """Refuse sequences for whose positions the model has nothing."""
    places = getattr(network.config, "max_position_embeddings", None)
    if places is not None:
        # RoBERTa counts positions from behind the one for padding.
        pad = network.config.pad_token_id if "roberta" in network.config.model_type else None
        places -= 0 if pad is None else pad + 1
        _checks.integer("tokens", problem.tokens, 8, places, limit="what the model takes")


@functools.lru_cache(maxsize=4)
def _tokenized(task: str, source: str, model: str, tokens: int) -> tuple[dict[str, Any], float]:
    """Training and validation set as the model takes them, and the part of texts cut off."""
    words = hub.tokenizer(model)
    found, lengths = {}, []
    for part in ("train", "validation"):
        examples = sources.read(task, source, part)
        columns = [list(column) for column in zip(*examples.texts, strict=True)]
        with hub.quiet():
            encoded = words(*columns, truncation=True, max_length=tokens)
            lengths += [len(ids) for ids in words(*columns)["input_ids"]]
        kind = float if find(task).regression else int
        found[part] = [
            {name: values[i] for name, values in encoded.items()} | {"label": kind(label)}
            for i, label in enumerate(examples.labels)
        ]
    return found, float(np.mean(np.array(lengths) > tokens))
