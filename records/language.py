"""Fine-tuning of encoders and decoders: settings, and what `measure` gives for each."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lorapower import _checks, randomness
from lorapower._records import Record, Results, pack, unpack
from lorapower.checkpoints import _libraries
from lorapower.checkpoints import _models as hub
from lorapower.errors import InputError
from records import models

from . import texts
from .texts import Examples, Task

Targets = Literal["attention", "feed-forward", "all", "queries and keys"]
#: What every model has.
TARGETS: tuple[Targets, ...] = get_args(Targets)[:3]
#: The head that ``transformers`` has for a model, or a linear one on the mean over the tokens.
Head = Literal["own", "mean"]
# Adapters are multiplied by SCALE/√R: Adam's first step then changes a weight about equally at each
# rank (Kalajdzievski, 2023).
SCALE = 4
# Number of batches whose texts are sorted by length together.
POOL = 8
# Texts that are answered at once, and those whose next tokens are, with a number for each word.
ANSWERED = (64, 16)
_QUERIES_KEYS = re.compile(r"\b(q|k|query|key)(_?(proj|lin))?$")


class Lora(Record):
    """Adapters of one rank, through ``peft``, on linear layers of the model.

    ``"feed-forward"`` are those of its equal layers that are not ``"attention"``, of which
    ``"queries and keys"`` are a part; ``"all"`` has those outside too. The rate of AdamW, without
    weight decay, rises to ``learning_rate`` over the first tenth of the steps, then falls linearly
    to 0.
    """

    kind: Literal["lora"] = "lora"
    targets: Targets = "all"
    rank: int = Field(4, ge=1)
    learning_rate: float = Field(5e-3, gt=0)


class Whole(Record):
    """Weights in full, by ``kind``.

    ``"full"`` are all, ``"linear"`` those of the layers that `Lora` adapts by default, ``"final"``
    those of the last layer and a pooling layer after it, ``"head"`` the head's. The head of a
    classifier is tuned in any case; that of a language model only with all weights. Learning rates
    are as in `Lora`.
    """

    kind: Literal["full", "linear", "final", "head"] = "full"
    learning_rate: float = Field(1e-4, gt=0)

    @property
    def rank(self) -> int:
        """0, as there are no adapters."""
        return 0


Method = Lora | Whole


class Problem(Record):
    """A task, a model, and how long which texts are shown to it.

    Texts are from ``source``: ``"rated"``, ``"code"``, ``"hub"`` or a folder in GLUE's layout; see
    `texts.read`. ``model`` is ``"packaged"``, a folder or a name on the hub; without ``pretrained``
    its weights are random. Head ``"mean"`` is linear on the mean over the tokens, for which
    sentence encoders are made (Reimers and Gurevych, 2019); ``"own"`` is the one in
    ``transformers``: as in GLUE's scores, on the last token for a decoder, and the language model's
    own for next tokens. With ``bfloat16`` texts are passed in this precision where the processor
    has it; what is tuned stays in float32.

    Texts are cut off to ``tokens``; fewer than 8 leave no place beside the marks of beginning and
    end. ``samples`` of the training set are used, 0 for all. Scores are taken on ``part``; GLUE's
    test sets have no labels. The seed draws head, random weights and factors, samples, their order,
    and dropout; head, samples and order depend on nothing else.
    """

    task: str = "movies"
    source: str = texts.RATED
    model: str = hub.PACKAGED
    pretrained: bool = True
    head: Head = "mean"
    epochs: int = Field(3, ge=1)
    batch: int = Field(16, ge=1)
    tokens: int = Field(48, ge=8)
    samples: int = Field(0, ge=0)
    part: Literal["validation", "test"] = "validation"
    bfloat16: bool = False
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        texts.choose([self.task], self.source)
        fits = self.part != "test" or self.source in texts.SCORED
        self.require("part", fits, f"validation but for source {' or '.join(texts.SCORED)}")
        self.require("model", bool(self.model), f"{hub.PACKAGED!r}, a folder, or a name on the hub")
        fits = self.head == "own" or not texts.find(self.task).next_tokens
        self.require("head", fits, f"'own' for task {self.task}")
        return self


class Setting(Record):
    """One run; a classifier's head is tuned too, whatever the method."""

    problem: Problem = Problem()
    method: Annotated[Method, Field(discriminator="kind")] = Lora()


class Found(Results):
    """What a run reaches on held-out texts after training.

    ``accuracy`` to ``loss`` are `texts.METRICS`, NaN if not the task's; ``score`` is its first;
    ``accuracy_matched`` and ``accuracy_mismatched`` are of MNLI's two validation sets. ``baseline``
    is the score of the best constant in hindsight, NaN for next tokens, ``training_loss`` the mean
    over steps, NaN without any, ``parameters`` the number tuned, ``cut_off`` the share of texts
    longer than ``tokens``, ``seconds`` the training's. `answers` reads ``answers``; `spectra` reads
    ``changes``, which full tuning gives.
    """

    accuracy: float
    f1: float
    matthews: float
    pearson: float
    spearman: float
    loss: float = math.nan
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


def check(settings: Sequence[Setting]) -> None:
    """Read the texts and adapt the models of all settings, to refuse what is not usable.

    Each model is adapted once, at its highest rank. Raises `InputError` as `measure` would later.
    """
    _libraries.require("glue")
    problems = [setting.problem for setting in settings]
    for problem in dict.fromkeys(p.replace(seed=0, pretrained=True) for p in problems):
        there = len(texts.read(problem.task, problem.source, "train").labels)
        texts.read(problem.task, problem.source, problem.part)
        _checks.integer("samples", problem.samples, 0, there, limit="all there are to train on")
    highest = {}
    for setting in sorted(settings, key=lambda s: (s.method.rank, s.problem.pretrained)):
        targets = getattr(setting.method, "targets", None)
        highest[setting.problem.model, setting.problem.tokens, targets] = setting
    for setting in highest.values():
        _network(setting)


def measure(settings: Sequence[Setting]) -> list[Found]:
    """What each setting reaches; raises `InputError` for unusable texts, models and ranks."""
    return [tune(setting) for setting in settings]


def tune(setting: Setting, keep: Callable[[Any], object] = lambda network: None) -> Found:
    """What one setting reaches; ``keep`` is called with its trained network.

    Raises what `measure` raises.
    """
    _libraries.require("glue")
    return _measure(setting, keep)


def answer(network: Any, problem: Problem) -> NDArray[np.float64]:
    """What a network says to each held-out text of a problem.

    The number of its class, the value or, for next tokens, their mean loss in nats. The network has
    the problem's tokens, and a head for its task.
    """
    samples, task = _samples(problem)[0][problem.part], texts.find(problem.task)
    collate, device = _collator(problem), next(network.parameters()).device
    order = np.argsort(_lengths(samples), kind="stable")
    outputs = np.empty((len(samples), task.outputs))
    half = problem.bfloat16 and hub.has_bfloat16(device.type)
    network.eval()
    with (
        _libraries.quiet(),
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=half),
    ):
        for some in _cut(order, ANSWERED[task.next_tokens]):
            batch = {key: x.to(device) for key, x in collate([samples[i] for i in some]).items()}
            labels = batch.pop("labels")
            found = network(**batch)["logits"].float()
            outputs[some] = _losses(found, labels) if task.next_tokens else found.cpu().numpy()
    return task.answers(outputs)


def answers(text: str) -> NDArray[np.float64]:
    """Read ``Found.answers``: what `answer` gives."""
    return unpack(text)


def spectra(changes: str) -> pd.DataFrame:
    """Read ``Found.changes``: a row for each linear layer of the model.

    ``layer`` is its name, ``norm`` the Frobenius norm of its change over that of its weights,
    ``half`` and ``most`` the least ranks with half and nine tenths of the change's squared norm.
    ``1``, ``2``, ``4``, … are the change's singular values of these numbers over the first.
    """
    return pd.DataFrame(json.loads(changes))


def equal_ranks(
    model: str, rank: int, head: Head = "own", every: Sequence[Targets] = TARGETS
) -> dict[Targets, int]:
    """For every choice of targets, the rank with about as many numbers as ``rank`` on all layers.

    No rank is above the least size of a weight.
    """
    hub.place(model)  # is dequantized, where it has to be, on a device with memory
    with torch.device("meta"):
        body = _draw(model, head).base_model
    shapes = {
        targets: [layer.weight.shape for layer in _layers(body, targets).values()]
        for targets in dict.fromkeys([*every, "all"])
    }
    size = {targets: sum(map(sum, each)) for targets, each in shapes.items()}
    return {
        targets: min(max(1, round(rank * size["all"] / size[targets])), *map(min, each))
        for targets, each in shapes.items()
        if targets in every
    }


def similarities(model: str, pairs: Sequence[tuple[str, str]]) -> Float[Tensor, " pairs"]:
    """Cosine similarities of the two texts of each pair, by the means of outputs over tokens.

    Raises `InputError` for no pairs or an unusable model.
    """
    if not pairs:
        raise InputError("pairs", allowed="at least one pair of texts", given="none")
    tokenizer, network = hub.tokenizer(model), models.encoder(model).eval()
    means = []
    for column in zip(*pairs, strict=True):
        tokens = tokenizer(list(column), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            outputs = network(**tokens).last_hidden_state
        means.append(_mean(outputs, tokens["attention_mask"]))
    first, second = means
    return torch.cosine_similarity(first, second)


class _Mean(nn.Module):
    """An encoder with a linear head on the mean of its outputs over the tokens of a text."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: Any, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.classifier = nn.Linear(encoder.config.hidden_size, outputs)

    @property
    def base_model(self) -> Any:
        return self.encoder

    def forward(
        self,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        hidden = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state
        logits = self.classifier(_mean(hidden, attention_mask))
        if labels is None:
            return {"logits": logits}
        if self.config.problem_type == "regression":
            return {"loss": nn.functional.mse_loss(logits[:, 0], labels), "logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return hidden.mean(1)
    present = mask.unsqueeze(-1)
    return (hidden * present).sum(1) / present.sum(1)


def _draw(model: str, head: Head | Literal["next"], **options: Any) -> Any:
    """The configured model with random weights and a head."""
    _libraries.require("glue")
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    config = hub.load(AutoConfig, model, **options)
    with _libraries.quiet():
        if head == "mean":
            encoder = AutoModel.from_config(config)
            encoder.pooler = None  # its outputs are not used
            return _Mean(encoder, config.num_labels)
        try:
            if head == "next":
                return AutoModelForCausalLM.from_config(config)
            return AutoModelForSequenceClassification.from_config(config)
        except ValueError as error:
            raise InputError(
                "model",
                allowed="one that transformers can give a head for the task",
                given=f"{model!r} ({type(config).__name__})",
            ) from error


def _build(model: str, task: Task, *, pretrained: bool, seed: int, head: Head = "own") -> Any:
    """The encoder with a head for the task, its weights as shipped or drawn."""
    kind = "regression" if task.regression else "single_label_classification"
    if task.next_tokens and pretrained:
        return models.language(model)
    # The seed alone draws the head, and a pooling layer that is not shipped.
    with randomness.seeded(seed, "head"):
        if task.next_tokens:
            return _draw(model, "next")
        whole = _draw(model, head, num_labels=task.outputs, problem_type=kind)
    if whole.config.pad_token_id is None:  # by which a decoder finds the last token
        whole.config.pad_token_id = whole.config.eos_token_id
    if pretrained:
        shipped, lacking = models.shipped(model)
        weights, drawn = shipped.state_dict(), whole.base_model.state_dict()
        known = {key: weights[key] for key in drawn.keys() - lacking}
        whole.base_model.load_state_dict(drawn | known)
    return whole


def _adapt(network: Any, method: Method, *, seed: int) -> Any:
    """The network with all frozen but its head and what the method tunes."""
    if method.kind == "full":
        return network.requires_grad_(True)
    body = network.base_model
    prefix = network.base_model_prefix
    heads = {name: module for name, module in network.named_children() if name != prefix}
    heads = {name: module for name, module in heads.items() if [*module.parameters()]}
    if _tells_words(network):
        heads = {}
    if isinstance(method, Whole):
        tuned: list[Any] = []
        if method.kind == "linear":
            tuned = [*_layers(body, "all").values()]
        elif method.kind == "final":
            tuned = [_last_layer(body), getattr(body, "pooler", None)]
        network.requires_grad_(False)
        for module in filter(None, (*tuned, *heads.values())):
            module.requires_grad_(True)
        return network
    from peft import LoraConfig, TaskType, get_peft_model

    layers = _layers(body, method.targets)
    for name, layer in layers.items():
        rows, columns = layer.weight.shape
        limit = f"the weight of {name} is {rows}×{columns}"
        _checks.integer("rank", method.rank, 1, min(rows, columns), limit=limit)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if _tells_words(network) else TaskType.SEQ_CLS,
        r=method.rank,
        lora_alpha=SCALE,
        use_rslora=True,
        target_modules=[f"{prefix}.{name}" for name in layers],
        modules_to_save=[*heads],
    )
    with randomness.seeded(seed, "factors"), _libraries.quiet():
        return get_peft_model(network, config)


def _tells_words(network: Any) -> bool:
    """Whether a network is a language model, with no head of a task's own."""
    outputs = getattr(network, "get_output_embeddings", None)
    return outputs is not None and outputs() is not None


def _layers(body: nn.Module, targets: Targets) -> dict[str, nn.Linear]:
    """The linear layers of a model, by name, that `Lora` adapts for these targets."""
    layers = {name: m for name, m in body.named_modules() if isinstance(m, nn.Linear)}
    chosen = {name: m for name, m in layers.items() if targets in ("all", *_purposes(name))}
    if not chosen:
        kinds = sorted({type(module).__name__ for module in body.modules()})
        raise InputError(
            "model",
            allowed=f"one with linear layers for targets {targets!r}",
            given=f"one of {hub.some(sorted(layers) or kinds)}",
        )
    return chosen


def _purposes(name: str) -> tuple[str, ...]:
    """What a linear layer is for: attention, feed-forward, or neither, outside the equal layers."""
    parts = name.split(".")
    if any("attention" in part or "attn" in part for part in parts):
        return "attention", *["queries and keys"] * bool(_QUERIES_KEYS.search(parts[-1]))
    return ("feed-forward",) * any(part.isdigit() for part in parts)


def _last_layer(body: nn.Module) -> nn.Module:
    """The last of the equal layers that a model consists of."""
    stacks = [module for module in body.modules() if isinstance(module, nn.ModuleList) and module]
    if not stacks:
        raise InputError(
            "model",
            allowed="a stack of layers, to tune the last one",
            given=type(body).__name__,
        )
    return max(stacks, key=len)[-1]


def _network(setting: Setting) -> Any:
    """The model with a head for the task, ready to be tuned."""
    problem = setting.problem
    network = _build(
        problem.model,
        texts.find(problem.task),
        pretrained=problem.pretrained,
        seed=problem.seed,
        head=problem.head,
    )
    places = getattr(network.config, "max_position_embeddings", None)
    if places is not None:
        # RoBERTa counts positions from behind the one for padding.
        pad = network.config.pad_token_id if "roberta" in network.config.model_type else None
        places -= 0 if pad is None else pad + 1
        _checks.integer("tokens", problem.tokens, 8, places, limit="what the model takes")
    if not (problem.bfloat16 and problem.head == "own"):
        return _adapt(network, setting.method, seed=problem.seed)
    network.set_attn_implementation("eager")  # a fifth faster on texts as short as these
    layers = _layers(network.base_model, "all").values()
    network = _adapt(network, setting.method, seed=problem.seed)
    if hub.has_bfloat16(network.device.type):
        for layer in layers:
            if not layer.weight.requires_grad:
                # As each pass would make it.
                layer.weight.data = layer.weight.data.bfloat16()
    return network


def _measure(setting: Setting, keep: Callable[[Any], object]) -> Found:
    problem = setting.problem
    task = texts.find(problem.task)
    examples = texts.read(problem.task, problem.source, problem.part)
    cut_off = _samples(problem)[1]
    network = _network(setting)
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    before = _weights(network) if setting.method.kind == "full" else {}
    loss, seconds = _train(network, setting) if parameters else (math.nan, 0.0)
    keep(network)
    given, labels = answer(network, problem), np.array(examples.labels)
    baseline = np.full(len(given), task.constant(examples.labels))
    return Found(
        **task.scores(given, labels),
        **_by_set(task, given, examples),
        baseline=task.scores(baseline, labels)["score"],
        training_loss=loss,
        parameters=parameters,
        cut_off=cut_off,
        answers=pack(given),
        changes=_changes(before, _weights(network)) if before else "",
        seconds=seconds,
    )


def _train(network: Any, setting: Setting) -> tuple[float, float]:
    """Train a network; the mean loss, and seconds."""
    from transformers import Trainer

    problem = setting.problem
    train = _samples(problem)[0]["train"]
    steps = _batches(problem, _lengths(train))

    class Ordered(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(train, batch_sampler=steps, collate_fn=self.data_collator)

    _, result = models.train(
        Ordered,
        network,
        train,
        _collator(problem),
        learning_rate=setting.method.learning_rate,
        num_train_epochs=1,
        seed=randomness.number(problem.seed, "training"),
        remove_unused_columns=False,
        **models.passes() if problem.bfloat16 else {},
    )
    return float(result.training_loss), result.metrics["train_runtime"]


def _collator(problem: Problem) -> Any:
    """Makes a batch of samples."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    asks = texts.find(problem.task).next_tokens
    return (DataCollatorForSeq2Seq if asks else DataCollatorWithPadding)(_tokenizer(problem.model))


def _losses(logits: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """The mean loss of each text's next tokens, ``[texts, 1]``."""
    told = labels[:, 1:]
    losses = nn.functional.cross_entropy(logits[:, :-1].mT, told, reduction="none")
    there = told != -100  # padding, for the collator and the loss
    means = losses.sum(1, keepdim=True) / there.sum(1, keepdim=True)
    return means.cpu().double().numpy()


@functools.lru_cache(maxsize=4)
def _tokenizer(model: str) -> Any:
    """A model's tokenizer, which can pad, behind the text."""
    tokenizer = hub.tokenizer(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _samples(problem: Problem) -> tuple[dict[str, Any], float]:
    return _tokenize(problem.task, problem.source, problem.model, problem.tokens, problem.part)


@functools.lru_cache(maxsize=4)
def _tokenize(
    task: str, source: str, model: str, tokens: int, part: str
) -> tuple[dict[str, Any], float]:
    """Training set and another part as the model takes them, and the part of texts cut off."""
    tokenizer, about = _tokenizer(model), texts.find(task)
    end = tokenizer.eos_token or "" if about.next_tokens else ""
    samples, lengths = {}, []
    for name in ("train", part):
        examples = texts.read(task, source, name)
        columns = [[text + end for text in column] for column in zip(*examples.texts, strict=True)]
        with _libraries.quiet():
            encoded = tokenizer(*columns, truncation=True, max_length=tokens)
            lengths += [len(ids) for ids in tokenizer(*columns)["input_ids"]]
        rows = [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]
        kind = float if about.regression else int
        samples[name] = [
            # Labels of their own, since padding is told from the end by them alone.
            row | ({"labels": row["input_ids"]} if about.next_tokens else {"label": kind(label)})
            for row, label in zip(rows, examples.labels, strict=True)
        ]
    return samples, float(np.mean(np.array(lengths) > tokens))


def _batches(problem: Problem, lengths: NDArray[np.int64]) -> list[list[int]]:
    """The training texts of each step, of all epochs."""
    # Padding costs as much as text. So texts of a few random batches are sorted by length, and the
    # batches of an epoch are then shuffled.
    draw = np.random.default_rng(randomness.number(problem.seed, "samples"))
    drawn = draw.permutation(len(lengths))[: problem.samples or None]
    steps = []
    for _ in range(problem.epochs):
        epoch = []
        for pool in _cut(draw.permutation(drawn), POOL * problem.batch):
            epoch += _cut(pool[np.argsort(lengths[pool], kind="stable")], problem.batch)
        steps += [epoch[i].tolist() for i in draw.permutation(len(epoch))]
    return steps


def _cut(values: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return np.split(values, range(size, len(values), size))


def _lengths(samples: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
    return np.array([len(sample["input_ids"]) for sample in samples])


def _weights(network: Any) -> dict[str, Tensor]:
    layers = _layers(network.base_model, "all")
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}


def _changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """What `spectra` reads."""
    rows = []
    for name, weight in before.items():
        change = after[name] - weight
        values = torch.linalg.svdvals(change.double())
        values = values / values[0].clamp(min=torch.finfo(values.dtype).tiny)
        carried = values.square().cumsum(0) / values.square().sum()
        # Six digits, as a record has tens of thousands of these.
        row = {"layer": name, "norm": float(f"{change.norm() / weight.norm():.6g}")}
        for part, share in (("half", 0.5), ("most", 0.9)):
            row[part] = int((carried < share).sum()) + 1
        for number in (2**i for i in range(len(values).bit_length())):
            row[str(number)] = float(f"{values[number - 1]:.6g}")
        rows.append(row)
    return json.dumps(rows)


def _by_set(task: Task, answers: Any, examples: Examples) -> dict[str, Any]:
    """Accuracies on MNLI's two validation sets."""
    if len(examples.sizes) == 1:
        return {}
    parts, labels = (
        np.split(np.asarray(values), [examples.sizes[0]]) for values in (answers, examples.labels)
    )
    kinds = ("accuracy_matched", "accuracy_mismatched")
    scores = (task.scores(*both)["accuracy"] for both in zip(parts, labels, strict=True))
    return dict(zip(kinds, scores, strict=True))
