"""Fine-tuning of encoders and decoders: settings, and what `measure` finds for each."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lorapower import randomness
from records import Results, Values, models, pack, texts

#: Names of choices of linear layers, with regular expressions for the names of the layers.
TARGETS = {
    "all": "",
    "attention": "attention|attn",
    "feed-forward": r"^(?!.*(attention|attn)).*\.\d+\.",
    "queries and keys": r"\b(query|key|q_proj|k_proj)$",
}
# Adapters are multiplied by SCALE/√R: Adam's first step then changes a weight about equally at each
# rank (Kalajdzievski, 2023).
SCALE = 4
# How much faster LoRA+ tunes the factor next to the outputs.
RATIO = 16
# Number of batches whose texts are sorted by length together.
POOL = 8
# Texts that are answered at once, and those whose next tokens are, with a number for each word.
ANSWERED = (64, 16)


class Lora(Values):
    """Tune adapters of one rank, through ``peft``, on linear layers of the model.

    ``targets`` are one of `TARGETS` or, by a regular expression for their names, others;
    ``"feed-forward"`` are those of its equal layers that are not ``"attention"``; ``"all"`` has
    those outside too. The rate of AdamW, without weight decay, rises to ``learning_rate`` over the
    first tenth of the steps, then falls linearly to 0; for ``"lora+"`` it is that of the factor
    next to the inputs. The ``recipe`` is peft's; ``"default"`` multiplies adapters by peft's own
    alpha, 8, over the rank.
    """

    kind: Literal["lora"] = "lora"
    targets: str = "all"
    rank: int = Field(4, ge=1)
    learning_rate: float = Field(5e-3, gt=0)
    recipe: Literal["plain", "default", "dora", "pissa", "lora+"] = "plain"


class Whole(Values):
    """Tune weights in full, by ``kind``.

    ``"full"`` are all, ``"linear"`` those of the layers that `Lora` adapts by default, ``"final"``
    those of an encoder's last layer, ``"head"`` the head's. The head of a classifier is tuned in
    any case; that of a language model only with all weights. Learning rates are as in `Lora`.
    """

    kind: Literal["full", "linear", "final", "head"] = "full"
    learning_rate: float = Field(1e-4, gt=0)


Method = Lora | Whole


class TextProblem(Values):
    """State a task, a model, and how long which texts are shown to it.

    ``task`` is one of `texts.read`. ``model`` is a packaged one's name or a folder; without
    ``pretrained`` an encoder's weights are random. Head ``"mean"`` is linear on the mean over the
    tokens, for which sentence encoders are made (Reimers and Gurevych, 2019); ``"own"`` is the one
    in ``transformers``: on the last token for a decoder, and the language model's own for next
    tokens. With ``bfloat16`` texts are passed in this precision where the processor has it; what is
    tuned stays in float32.

    Texts are cut off to ``tokens``. ``samples`` of the training set are used, 0 for all. Scores are
    taken on ``part``. The seed draws head, random weights and factors, samples, their order, and
    dropout; head, samples and order depend on nothing else.
    """

    task: str = "movies"
    model: str = models.PACKAGED
    pretrained: bool = True
    head: Literal["own", "mean"] = "mean"
    epochs: int = Field(3, ge=1)
    batch: int = Field(16, ge=1)
    tokens: int = Field(48, ge=1)
    samples: int = Field(0, ge=0)
    part: Literal["validation", "test"] = "validation"
    bfloat16: bool = False
    seed: int = Field(0, ge=0)


class TextRun(Values):
    """State one run; a classifier's head is tuned too, whatever the method."""

    problem: TextProblem = TextProblem()
    method: Annotated[Method, Field(discriminator="kind")] = Lora()


class TextResults(Results):
    """What a run reaches on held-out texts after training.

    The ``score`` is the mean of `texts.contributions`, the ``baseline`` that of the best constant
    in hindsight, NaN for next tokens. ``training_loss`` is the mean over steps, NaN without any,
    ``parameters`` the number tuned, ``cut_off`` the share of texts longer than ``tokens``,
    ``seconds`` the training's. ``answers`` packs what `answer` gives. ``changes``, which full
    tuning gives, is a list in JSON with, for each linear layer, its name as ``layer``, the ``norm``
    of its change over that of its weights, the least ranks with ``half`` and nine tenths
    (``most``) of the change's squared norm, and its singular values number ``1``, ``2``, ``4``, …
    over the first.
    """

    score: float
    baseline: float
    training_loss: float
    parameters: int
    cut_off: float
    answers: str
    changes: str = ""
    seconds: float


def measure(settings: Sequence[TextRun]) -> list[TextResults]:
    """Run each setting."""
    return [tune(setting) for setting in settings]


def tune(
    setting: TextRun,
    keep: Callable[[Any], object] = lambda network: None,
    *,
    stride: int = 1,
) -> TextResults:
    """Run one setting; ``keep`` is called with its trained network.

    All held-out texts are scored, or every ``stride``-th, because answers can take most of the
    time.
    """
    problem = setting.problem
    network = prepare(setting)
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    before = _weights(network) if setting.method.kind == "full" else {}
    loss, seconds = train(network, setting) if parameters else (math.nan, 0.0)
    keep(network)
    given = answer(network, problem, stride)
    labels = texts.read(problem.task, problem.part).labels[::stride]
    positive = float(np.mean(labels)) if texts.has_classes(problem.task) else math.nan
    return TextResults(
        score=float(texts.contributions(problem.task, given, labels).mean()),
        baseline=max(positive, 1 - positive),
        training_loss=loss,
        parameters=parameters,
        cut_off=tokenize(problem)[1],
        answers=pack(given),
        changes=_changes(before, _weights(network)) if before else "",
        seconds=seconds,
    )


def answer(network: Any, problem: TextProblem, stride: int = 1) -> NDArray[np.float64]:
    """Ask a network for the answers to all held-out texts of a problem, or to every ``stride``-th.

    An answer is the number of a class or, for next tokens, the text's mean loss in nats.
    The network has a head for the problem's task.
    """
    samples = tokenize(problem)[0][problem.part][::stride]
    collate, device = collator(problem), next(network.parameters()).device
    order = np.argsort(_lengths(samples), kind="stable")
    answers = np.empty(len(samples))
    classes = texts.has_classes(problem.task)
    half = problem.bfloat16 and models.has_bfloat16(device.type)
    network.eval()
    with models.quiet(), torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        for rows in _cut(order, ANSWERED[not classes]):
            batch = {key: x.to(device) for key, x in collate([samples[i] for i in rows]).items()}
            labels = batch.pop("labels")
            logits = network(**batch)["logits"].float()
            found = logits.argmax(1) if classes else _losses(logits, labels)
            answers[rows] = found.cpu().numpy()
    return answers


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
        self, attention_mask: Tensor, labels: Tensor | None = None, **inputs: Any
    ) -> dict[str, Tensor]:
        hidden = self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state
        present = attention_mask.unsqueeze(-1)
        logits = self.classifier((hidden * present).sum(1) / present.sum(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _build(problem: TextProblem) -> Any:
    """Build the model with a head for the task, its weights as shipped or drawn."""
    import transformers

    if not texts.has_classes(problem.task):
        return models.decoder(problem.model)
    config = models.load(transformers.AutoConfig, problem.model, num_labels=2)
    # The seed alone draws the head.
    with randomness.seeded(problem.seed, "head"), models.quiet():
        if problem.head == "mean":
            encoder = transformers.AutoModel.from_config(config)
            encoder.pooler = None  # its outputs are not used
            whole: Any = _Mean(encoder, config.num_labels)
        else:
            whole = transformers.AutoModelForSequenceClassification.from_config(config)
    if whole.config.pad_token_id is None:  # by which a decoder finds the last token
        whole.config.pad_token_id = whole.config.eos_token_id
    if problem.pretrained:
        weights = models.load(transformers.AutoModel, problem.model).state_dict()
        used = {name: weights[name] for name in whole.base_model.state_dict()}
        whole.base_model.load_state_dict(used)
    return whole


def _adapt(network: Any, method: Method, seed: int) -> Any:
    """Freeze all but the network's head and what the method tunes."""
    if method.kind == "full":
        return network.requires_grad_(True)
    body, prefix = network.base_model, network.base_model_prefix
    # Of a language model it is no task's own, and the embeddings besides.
    heads = [name for name in ("classifier", "score") if hasattr(network, name)]
    if isinstance(method, Whole):
        tuned = [network.get_submodule(name) for name in heads]
        if method.kind == "linear":
            tuned += linear_layers(body).values()
        elif method.kind == "final":
            tuned.append(body.encoder.layer[-1])
        network.requires_grad_(False)
        for module in tuned:
            module.requires_grad_(True)
        return network
    from peft import LoraConfig, TaskType, get_peft_model

    layers = linear_layers(body, TARGETS.get(method.targets, method.targets))
    scaling: dict[str, Any] = {"lora_alpha": SCALE, "use_rslora": True}
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if heads else TaskType.CAUSAL_LM,
        r=method.rank,
        target_modules=[f"{prefix}.{name}" for name in layers],
        modules_to_save=heads,
        use_dora=method.recipe == "dora",
        init_lora_weights="pissa" if method.recipe == "pissa" else True,
        **(scaling if method.recipe != "default" else {}),
    )
    with randomness.seeded(seed, "factors"), models.quiet():
        return get_peft_model(network, config)


def linear_layers(body: nn.Module, pattern: str = "") -> dict[str, nn.Linear]:
    """Find the linear layers of a model whose names a regular expression finds, by name."""
    layers = {name: m for name, m in body.named_modules() if isinstance(m, nn.Linear)}
    return {name: layer for name, layer in layers.items() if re.search(pattern, name)}


def prepare(setting: TextRun) -> Any:
    """Build the model with a head for the task, ready to be tuned."""
    problem = setting.problem
    network = _build(problem)
    half = problem.bfloat16 and problem.head == "own"
    return ready(network, setting.method, problem.seed, half=half)


def ready(network: Any, method: Method, seed: int, *, half: bool) -> Any:
    """Freeze all that a method does not tune; with ``half``, prepare for passes in bfloat16."""
    if not half:
        return _adapt(network, method, seed)
    network.set_attn_implementation("eager")  # a fifth faster on texts as short as these
    layers = linear_layers(network.base_model).values()
    network = _adapt(network, method, seed)
    if models.has_bfloat16(network.device.type):
        for layer in layers:
            if not layer.weight.requires_grad:
                # As each pass would make it.
                layer.weight.data = layer.weight.data.bfloat16()
    return network


def optimizer_of(network: Any, method: Method) -> Any:
    """Make the optimizer of LoRA+, if asked for; otherwise none, and training makes its own."""
    if not (isinstance(method, Lora) and method.recipe == "lora+"):
        return None
    from peft.optimizers import create_loraplus_optimizer

    rate = {"lr": method.learning_rate, "loraplus_lr_ratio": RATIO}
    return create_loraplus_optimizer(network, torch.optim.AdamW, **rate)


def train(network: Any, setting: TextRun) -> tuple[float, float]:
    """Train a network that `prepare` built; return the mean loss, and seconds."""
    from transformers import Trainer

    problem = setting.problem
    samples = tokenize(problem)[0]["train"]
    steps = _batches(problem, _lengths(samples))

    class Ordered(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(samples, batch_sampler=steps, collate_fn=self.data_collator)

    result = models.train(
        network,
        samples,
        collator(problem),
        trainer=Ordered,
        optimizer=optimizer_of(network, setting.method),
        learning_rate=setting.method.learning_rate,
        num_train_epochs=1,
        seed=randomness.number(problem.seed, "training"),
        remove_unused_columns=False,
        **models.precision() if problem.bfloat16 else {},
    )
    return float(result.training_loss), result.metrics["train_runtime"]


def collator(problem: TextProblem) -> Any:
    """Make what turns samples of a problem into a batch."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    classes = texts.has_classes(problem.task)
    kind: Any = DataCollatorWithPadding if classes else DataCollatorForSeq2Seq
    return kind(_tokenizer(problem.model))


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean loss of each text's next tokens."""
    following = labels[:, 1:]
    losses = nn.functional.cross_entropy(logits[:, :-1].mT, following, reduction="none")
    there = following != -100  # padding, for the collator and the loss
    return losses.sum(1) / there.sum(1)


@functools.lru_cache(maxsize=4)
def _tokenizer(model: str) -> Any:
    """Load a model's tokenizer, which can pad, behind the text."""
    tokenizer = models.tokenizer(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def tokenize(problem: TextProblem) -> tuple[dict[str, Any], float]:
    """Turn the training set and the problem's part into samples; also find the share cut off."""
    return _tokenize(problem.task, problem.model, problem.tokens, problem.part)


@functools.lru_cache(maxsize=4)
def _tokenize(task: str, model: str, tokens: int, part: str) -> tuple[dict[str, Any], float]:
    tokenizer, classes = _tokenizer(model), texts.has_classes(task)
    end = "" if classes else tokenizer.eos_token or ""
    samples, lengths = {}, []
    for name in ("train", part):
        examples = texts.read(task, name)
        column = [text + end for text in examples.texts]
        with models.quiet():
            encoded = tokenizer(column, truncation=True, max_length=tokens)
            lengths += [len(ids) for ids in tokenizer(column)["input_ids"]]
        rows = [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]
        samples[name] = [
            # Labels of their own, since padding is told from the end by them alone.
            row | ({"label": int(label)} if classes else {"labels": row["input_ids"]})
            for row, label in zip(rows, examples.labels, strict=True)
        ]
    return samples, float(np.mean(np.array(lengths) > tokens))


def _batches(problem: TextProblem, lengths: NDArray[np.int64]) -> list[list[int]]:
    """Draw the training texts of each step, of all epochs."""
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
    layers = linear_layers(network.base_model)
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}


def _changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """Describe what tuning changed, for ``TextResults.changes``."""
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
