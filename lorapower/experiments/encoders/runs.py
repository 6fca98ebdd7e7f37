"""Fine-tuning runs: settings, and what is measured for each."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from ... import _checks, hub, randomness
from ...errors import InputError
from .. import sweeps
from . import models, sources
from .models import METHODS, TARGETS
from .tasks import Task, find

# Adapters of some ranks. Quick is for a processor, and for a few hundred samples.
GRIDS: dict[str, dict[str, Any]] = {
    "quick": {
        "rank": [2, 8],
        "learning_rate": 5e-3,
        "epochs": 3,
        "batch": 16,
        "tokens": 24,
        "samples": 256,
        "seed": range(3),
    },
    "paper": {
        "rank": [2, 4, 8, 12],
        "learning_rate": 1e-3,
        "epochs": 10,
        "batch": 16,
        "tokens": 128,
        "samples": 0,
        "seed": range(5),
    },
}
# The final layer in full takes smaller steps: none of its weights is a product of small factors.
FINAL_RATE = 1 / 5


@dataclass(frozen=True)
class Setting:
    """One run: a task, an encoder, and what of it is tuned.

    Attributes
    ----------
    task, source : name of the task, and where its texts are: ``"packaged"``, ``"hub"`` or a folder
        in GLUE's layout.
    model : encoder: ``"packaged"``, a folder, or a name on the hub.
    pretrained : whether it has its weights, or random ones of the same configuration.
    method : ``"lora"``: adapters. ``"final"``: the last layer in full. The head is tuned in both.
    targets : of adapters: layers of the ``"attention"``, or ``"all"``; empty for others.
    rank : of adapters; 0 for others.
    learning_rate, epochs, batch : of AdamW without weight decay; the rate falls linearly to 0.
    tokens : to which longer texts are cut off.
    samples : of the training set, drawn by the seed; 0 means all.
    seed : of the head, the random weights and factors, the samples, their order, and dropout. Equal
        seeds give equal heads, samples and orders in all settings.

    Raises `InputError` for a value that has no meaning, alone or with the others.
    """

    task: str = "condition"
    source: str = hub.PACKAGED
    model: str = hub.PACKAGED
    pretrained: bool = True
    method: str = "lora"
    targets: str = "all"
    rank: int = 4
    learning_rate: float = 5e-3
    epochs: int = 3
    batch: int = 16
    tokens: int = 24
    samples: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        sources.check(self.task, self.source)
        if not isinstance(self.model, str) or not self.model:
            raise InputError(
                "model",
                allowed=f"{hub.PACKAGED!r}, a folder, or a name on the hub",
                given=repr(self.model),
            )
        if not isinstance(self.pretrained, bool):
            raise InputError("pretrained", allowed="True or False", given=repr(self.pretrained))
        if self.method not in METHODS:
            raise InputError(
                "method", allowed=f"one of {', '.join(METHODS)}", given=repr(self.method)
            )
        lora = self.method == "lora"
        allowed = TARGETS if lora else ("",)
        if self.targets not in allowed:
            raise InputError(
                "targets",
                allowed=f"{' or '.join(map(repr, allowed))} for method {self.method!r}",
                given=repr(self.targets),
            )
        _checks.integer("rank", self.rank, int(lora), None if lora else 0)
        _checks.positive("learning_rate", self.learning_rate)
        for name in ("epochs", "batch"):
            _checks.integer(name, getattr(self, name), 1)
        # Fewer have no place for a text beside the marks of where texts begin and end.
        _checks.integer("tokens", self.tokens, 8)
        _checks.integer("samples", self.samples, 0)
        _checks.integer("seed", self.seed, 0, 2**32 - 1)


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
    axes = GRIDS[profile] | {
        "task": [*tasks],
        "source": source,
        "model": model,
        "pretrained": [True, False],
        "rank": [*(ranks or GRIDS[profile]["rank"])],
        "seed": range(seed, seed + (seeds or len(GRIDS[profile]["seed"]))),
    }
    rate = FINAL_RATE * axes["learning_rate"]
    final = axes | {"method": "final", "targets": "", "rank": 0, "learning_rate": rate}
    return [*sweeps.grid(Setting, **axes, targets=[*TARGETS]), *sweeps.grid(Setting, **final)]


def check(settings: Sequence[Setting]) -> None:
    """Read the texts of all tasks and adapt each model once, for the highest of its ranks.

    So whatever of the settings is not usable is found before the first run. Raises `InputError`
    for texts, models and ranks, as `measure` does when it comes to them.
    """
    hub.check()
    for task, source in dict.fromkeys((s.task, s.source) for s in settings):
        for part in ("train", "validation"):
            sources.read(task, source, part)
    ordered = sorted(settings, key=lambda s: (s.rank, s.pretrained))
    for last in {(s.model, s.method, s.targets, s.tokens): s for s in ordered}.values():
        _network(last)


def measure(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """What each setting reaches on the validation set of its task after training.

    The metrics of `tasks.METRICS`, NaN where they are none of the task's; ``score``, that by which
    the task is judged; ``baseline``, the score of the best constant answer; ``accuracy_matched``
    and ``accuracy_mismatched`` of MNLI's two validation sets; ``training_loss``, the mean over the
    steps; ``parameters``, number of those that are tuned; ``cut_off``, part of the texts that had
    more tokens than are used; ``left_out``, rows of the source that were of no use.

    Raises `InputError` for texts, models and ranks that are not usable.
    """
    hub.check()
    return [_run(setting) for setting in settings]


def sweep(
    settings: Sequence[Setting],
    folder: Any = None,
    *,
    scheduler: Any = None,
    progress: bool = True,
) -> pd.DataFrame:
    """`sweeps.run` of `measure`, one run after the other, each kept when it is finished."""
    return sweeps.run(settings, measure, folder, size=1, scheduler=scheduler, progress=progress)


def _run(setting: Setting) -> dict[str, Any]:
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

    task = find(setting.task)
    train, validation = (
        sources.read(setting.task, setting.source, part) for part in ("train", "validation")
    )
    words = hub.tokenizer(setting.model)
    samples, cut_off = _tokenized(setting.task, setting.source, setting.model, setting.tokens)
    network = _network(setting)
    chosen = torch.randperm(
        len(train.labels), generator=randomness.generator(setting.seed, "samples")
    ).tolist()
    with tempfile.TemporaryDirectory() as unused, hub.quiet():
        trainer = Trainer(
            model=network,
            args=TrainingArguments(
                output_dir=unused,
                learning_rate=setting.learning_rate,
                num_train_epochs=setting.epochs,
                per_device_train_batch_size=setting.batch,
                per_device_eval_batch_size=64,
                seed=randomness.number(setting.seed, "training"),
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=[samples["train"][i] for i in chosen[: setting.samples or None]],
            data_collator=DataCollatorWithPadding(words),
        )
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
        outputs = trainer.predict(samples["validation"]).predictions
    answers = task.answers(outputs)
    baseline = np.full(len(answers), task.constant(train.labels))
    return {
        **task.scores(answers, validation.labels),
        **_by_set(task, answers, validation),
        "baseline": task.scores(baseline, validation.labels)["score"],
        "training_loss": float(loss),
        "parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "cut_off": cut_off,
        "left_out": train.left_out + validation.left_out,
    }


def _network(setting: Setting) -> Any:
    """The model with a head for the task, and what is tuned of it."""
    network = models.classifier(
        setting.model, find(setting.task), pretrained=setting.pretrained, seed=setting.seed
    )
    _fits(setting, network)
    return models.adapt(network, setting.method, setting.targets, setting.rank, seed=setting.seed)


def _by_set(task: Task, answers: Any, validation: sources.Examples) -> dict[str, float]:
    """Accuracies on MNLI's two validation sets."""
    found = {"accuracy_matched": math.nan, "accuracy_mismatched": math.nan}
    if len(validation.sizes) > 1:
        parts = np.split(answers, [validation.sizes[0]])
        labels = np.split(np.asarray(validation.labels), [validation.sizes[0]])
        for name, given, wanted in zip(found, parts, labels, strict=True):
            found[name] = task.scores(given, wanted)["accuracy"]
    return found


def _fits(setting: Setting, network: Any) -> None:
    """Refuse sequences for whose positions the model has nothing."""
    places = getattr(network.config, "max_position_embeddings", None)
    if places is not None:
        # RoBERTa counts positions from behind the one for padding.
        pad = network.config.pad_token_id if "roberta" in network.config.model_type else None
        places -= 0 if pad is None else pad + 1
        _checks.integer("tokens", setting.tokens, 8, places, limit="what the model takes")


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
