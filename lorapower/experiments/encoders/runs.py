"""Fine-tuning runs: settings, and what is measured for each."""

from __future__ import annotations

import base64
import functools
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch.utils.data import DataLoader

from ... import _checks, randomness
from ... import _hub as hub
from ..._hub import RATED
from ..._records import Record, Results
from ...errors import InputError
from . import models, sources
from .examples import Examples
from .models import Full, Lora, Method
from .tasks import Task, find

# So many batches at a time have their texts sorted by length.
POOL = 8
# The learning rate rises over this part of the steps.
WARMUP = 0.1


class Problem(Record):
    """A task, an encoder, and how long which texts are shown to it.

    Raises `InputError` for a value that has no meaning, alone or with the others.

    Attributes
    ----------
    task, source : str
        Name of the task, and where its texts are: ``"rated"``, ``"hub"`` or a folder in GLUE's
        layout.
    model : str
        Encoder: ``"packaged"``, a folder, or a name on the hub.
    pretrained : bool
        Whether it has its weights, or random ones of the same configuration.
    head : Head
        ``"mean"``, linear on the mean over the tokens (`models.Mean`), or ``"own"``, that which
        ``transformers`` has for the encoder, as in the published scores of GLUE.
    epochs, batch : int
        Of training.
    tokens : int
        To which longer texts are cut off; fewer than 8 have no place for a text beside the marks of
        where texts begin and end.
    samples : int
        Of the training set, drawn by the seed; 0 means all.
    part : {"validation", "test"}
        On which scores are taken; GLUE's test sets have no labels.
    seed : int
        Of the head, the random weights and factors, the samples, their order, and dropout. Equal
        seeds give equal heads, samples and orders whatever the rest.
    """

    task: str = "movies"
    source: str = RATED
    model: str = hub.PACKAGED
    pretrained: bool = True
    head: models.Head = "mean"
    epochs: int = Field(3, ge=1)
    batch: int = Field(16, ge=1)
    tokens: int = Field(48, ge=8)
    samples: int = Field(0, ge=0)
    part: Literal["validation", "test"] = "validation"
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        sources.check(self.task, self.source)
        if self.part == "test" and sources.held_out(self.source) != "test":
            raise InputError(
                "part", allowed=f"validation but for source {RATED!r}", given=self.part
            )
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
    method: Annotated[Method, Field(discriminator="kind")] = Lora()


def check(settings: Sequence[Setting]) -> None:
    """Read the texts of all tasks and adapt each model once, for the highest of its ranks.

    So whatever of the settings is not usable is found before the first run. Raises `InputError`
    for texts, models and ranks, as `measure` does when it comes to them.
    """
    hub.require("glue")
    problems = [setting.problem for setting in settings]
    for problem in dict.fromkeys(p.replace(seed=0, pretrained=True) for p in problems):
        there = len(sources.read(problem.task, problem.source, "train").labels)
        sources.read(problem.task, problem.source, problem.part)
        _checks.integer("samples", problem.samples, 0, there, limit="all there are to train on")
    highest = {}
    for setting in sorted(settings, key=lambda s: (models.rank_of(s.method), s.problem.pretrained)):
        targets = getattr(setting.method, "targets", None)
        highest[setting.problem.model, setting.problem.tokens, targets] = setting
    for setting in highest.values():
        _network(setting)


class Found(Results):
    """What a run reaches on held-out texts after training.

    ``accuracy`` to ``spearman`` are `tasks.METRICS`, NaN where they are none of the task's;
    ``score``, that by which the task is judged; ``accuracy_matched`` and ``accuracy_mismatched``
    are of MNLI's two validation sets; ``baseline``, the score of the best constant answer, chosen
    in hindsight; ``training_loss``, the mean over the steps; ``parameters``, number of those
    that are tuned; ``cut_off``, part of the task's texts that had more tokens than are used;
    ``answers``, to each held-out text (`answers`); ``changes``, what tuning all weights did to each
    linear layer (`spectra`), or nothing; ``seconds``, of training alone.
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
    answers: str
    changes: str = ""
    seconds: float


def measure(settings: Sequence[Setting]) -> list[Found]:
    """What each setting reaches; raises `InputError` for texts, models, ranks of no use."""
    hub.require("glue")
    return [_run(setting) for setting in settings]


def answers(text: str) -> NDArray[np.float64]:
    """Of ``Found.answers``, for each held-out text: number of the class, or the number."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64)


def spectra(changes: str) -> pd.DataFrame:
    """Of ``Found.changes``: a row for each linear layer of the encoder.

    Columns are ``layer``, its name; ``norm``, of the change against that of the weights
    (Frobenius); ``half`` and ``most``, the least rank with half and nine tenths of the change's
    squared norm; and ``1``, ``2``, ``4``, …, its singular values of these numbers against the
    first.
    """
    return pd.DataFrame(json.loads(changes))


def tuned(setting: Setting) -> Any:
    """The network of a setting after its training; raises what `measure` raises."""
    hub.require("glue")
    return _trained(setting)[0].model


def _run(setting: Setting) -> Found:
    problem = setting.problem
    task = find(problem.task)
    held_out = sources.read(problem.task, problem.source, problem.part)
    samples, cut_off = _samples(problem)
    trainer, before, loss, seconds = _trained(setting)
    network = trainer.model
    asked = samples[problem.part]
    order = np.argsort(_lengths(asked), kind="stable")
    ordered: Any = [asked[i] for i in order]
    outputs = np.empty((len(asked), task.outputs))
    with hub.quiet():
        outputs[order] = trainer.predict(ordered).predictions
    given, wanted = task.answers(outputs), np.array(held_out.labels)
    baseline = np.full(len(given), task.constant(held_out.labels))
    return Found(
        **task.scores(given, wanted),
        **_by_set(task, given, held_out),
        baseline=task.scores(baseline, wanted)["score"],
        training_loss=loss,
        parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        cut_off=cut_off,
        answers=base64.b64encode(given.astype("<f4").tobytes()).decode(),
        changes=_changes(before, _weights(network)) if before else "",
        seconds=seconds,
    )


def _trained(setting: Setting) -> tuple[Any, dict[str, torch.Tensor], float, float]:
    """The trainer when it is done, weights before full tuning, the mean loss, and seconds."""
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

    problem = setting.problem
    train = _samples(problem)[0]["train"]
    network = _network(setting)
    before = _weights(network) if isinstance(setting.method, Full) else {}
    steps = _batches(problem, _lengths(train))

    class Ordered(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(train, batch_sampler=steps, collate_fn=self.data_collator)

    with tempfile.TemporaryDirectory() as unused, hub.quiet():
        trainer = Ordered(
            model=network,
            args=TrainingArguments(
                output_dir=unused,
                learning_rate=setting.method.learning_rate,
                num_train_epochs=1,
                warmup_steps=WARMUP,
                per_device_eval_batch_size=64,
                seed=randomness.number(problem.seed, "training"),
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=train,
            data_collator=DataCollatorWithPadding(hub.tokenizer(problem.model)),
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        loss = float(trainer.train().training_loss)
    return trainer, before, loss, time.perf_counter() - start


def _samples(problem: Problem) -> tuple[dict[str, Any], float]:
    return _tokenized(problem.task, problem.source, problem.model, problem.tokens, problem.part)


def _batches(problem: Problem, lengths: NDArray[np.int64]) -> list[list[int]]:
    """The training texts of each step, of all epochs.

    Texts of about one length go together, as padding costs as much as text: of a few batches at a
    time, drawn at random, the texts are sorted, and the batches of an epoch are then shuffled.
    """
    draw = np.random.default_rng(randomness.number(problem.seed, "samples"))
    chosen = draw.permutation(len(lengths))[: problem.samples or None]
    found = []
    for _ in range(problem.epochs):
        epoch = []
        for pool in _cut(draw.permutation(chosen), POOL * problem.batch):
            epoch += _cut(pool[np.argsort(lengths[pool], kind="stable")], problem.batch)
        found += [epoch[i].tolist() for i in draw.permutation(len(epoch))]
    return found


def _cut(values: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return np.split(values, range(size, len(values), size))


def _lengths(samples: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
    return np.array([len(sample["input_ids"]) for sample in samples])


def _weights(network: Any) -> dict[str, torch.Tensor]:
    layers = models.targeted(network.base_model, "all")
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}


def _changes(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> str:
    """What `spectra` reads."""
    rows = []
    for name, weight in before.items():
        change = after[name] - weight
        values = torch.linalg.svdvals(change.double())
        values = values / values[0].clamp(min=torch.finfo(values.dtype).tiny)
        carried = values.square().cumsum(0) / values.square().sum()
        numbers = [2**i for i in range(len(values).bit_length())]
        rows.append(
            {"layer": name, "norm": float(change.norm() / weight.norm())}
            | {
                part: int((carried < share).sum()) + 1
                for part, share in (("half", 0.5), ("most", 0.9))
            }
            | {str(number): float(values[number - 1]) for number in numbers}
        )
    return json.dumps(rows)


def _network(setting: Setting) -> Any:
    """The model with a head for the task, and what is tuned of it."""
    problem = setting.problem
    network = models.classifier(
        problem.model,
        find(problem.task),
        pretrained=problem.pretrained,
        seed=problem.seed,
        head=problem.head,
    )
    _fits(problem, network)
    return models.adapt(network, setting.method, seed=problem.seed)


def _by_set(task: Task, answers: Any, validation: Examples) -> dict[str, Any]:
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
def _tokenized(
    task: str, source: str, model: str, tokens: int, part: str
) -> tuple[dict[str, Any], float]:
    """Training set and another part as the model takes them, and the part of texts cut off."""
    words = hub.tokenizer(model)
    found, lengths = {}, []
    for name in ("train", part):
        examples = sources.read(task, source, name)
        columns = [list(column) for column in zip(*examples.texts, strict=True)]
        with hub.quiet():
            encoded = words(*columns, truncation=True, max_length=tokens)
            lengths += [len(ids) for ids in words(*columns)["input_ids"]]
        kind = float if find(task).regression else int
        found[name] = [
            {key: values[i] for key, values in encoded.items()} | {"label": kind(label)}
            for i, label in enumerate(examples.labels)
        ]
    return found, float(np.mean(np.array(lengths) > tokens))
