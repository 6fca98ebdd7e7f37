"""Encoders: loaded or drawn at random, given a head for a task, and adapted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ... import _checks, randomness
from ... import _hub as hub
from ..._records import Record
from ...errors import InputError
from .tasks import Task

Targets = Literal["attention", "feed-forward", "all"]
TARGETS: tuple[Targets, ...] = get_args(Targets)
#: The head that ``transformers`` has for an encoder, or `Mean`.
Head = Literal["own", "mean"]
# Adapters are multiplied by SCALE/√R, with which a first step of Adam changes a weight about as
# much at each rank (Kalajdzievski, 2023).
SCALE = 4


class Lora(Record):
    """Adapters, through ``peft``, on linear layers of the encoder.

    Attributes
    ----------
    targets : Targets
        ``"attention"``; ``"feed-forward"``, all others of the equal layers that the encoder
        consists of; or ``"all"``, with those outside these too.
    rank : int
        Of each adapter.
    learning_rate : float
        The highest of AdamW without weight decay; it rises over the first tenth of the steps, then
        falls linearly to 0.
    """

    kind: Literal["lora"] = "lora"
    targets: Targets = "all"
    rank: int = Field(4, ge=1)
    learning_rate: float = Field(5e-3, gt=0)


class Final(Record):
    """The last layer, and the pooling layer after it, in full; the learning rate as of `Lora`."""

    kind: Literal["final"] = "final"
    learning_rate: float = Field(1e-3, gt=0)


class Full(Record):
    """All weights; the learning rate as of `Lora`."""

    kind: Literal["full"] = "full"
    learning_rate: float = Field(1e-4, gt=0)


class Alone(Record):
    """Nothing but the head, which is tuned in any case; the learning rate as of `Lora`."""

    kind: Literal["head"] = "head"
    learning_rate: float = Field(1e-2, gt=0)


Method: TypeAlias = Lora | Final | Full | Alone


class Mean(nn.Module):
    """An encoder with a linear head on the mean of its outputs over the tokens of a text.

    It is how sentence encoders are made to be used (Reimers and Gurevych, 2019). Takes what models
    of ``transformers`` take, and returns ``loss``, where there are labels, and ``logits``.
    """

    base_model_prefix = "encoder"

    def __init__(self, encoder: Any, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.classifier = nn.Linear(encoder.config.hidden_size, outputs)

    @property
    def base_model(self) -> Any:
        """The encoder."""
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


def rank_of(method: Method) -> int:
    """The rank of a method's adapters; 0 where it has none."""
    return method.rank if isinstance(method, Lora) else 0


def classifier(model: str, task: Task, *, pretrained: bool, seed: int, head: Head = "own") -> Any:
    """The encoder with a head for the task: weights as shipped, or drawn as its configuration says.

    The head is the one that ``transformers`` has for the encoder, or `Mean`. The seed alone draws
    it, and a pooling layer that is not shipped; both are the same with pretrained and random
    weights. Raises `InputError` for a model that cannot be found, lacks weights or cannot have such
    a head.
    """
    kind = "regression" if task.regression else "single_label_classification"
    with randomness.seeded(seed, "head"):
        whole = _drawn(model, head, num_labels=task.outputs, problem_type=kind)
    if pretrained:
        shipped, lacking = hub.shipped(model)
        weights, own = shipped.state_dict(), whole.base_model.state_dict()
        whole.base_model.load_state_dict(own | {key: weights[key] for key in own.keys() - lacking})
    return whole


def adapt(network: Any, method: Method, *, seed: int) -> Any:
    """What of the network the method tunes, the rest being frozen; its head is tuned in any case.

    Raises `InputError` for a network without such layers, or a rank above a layer's size.
    """
    if isinstance(method, Full):
        return network.requires_grad_(True)
    body = network.base_model
    prefix = network.base_model_prefix
    heads = {
        name: module
        for name, module in network.named_children()
        if name != prefix and any(True for _ in module.parameters())
    }
    if isinstance(method, Final | Alone):
        whole = isinstance(method, Final)
        tuned = (_last_layer(body), getattr(body, "pooler", None)) if whole else ()
        network.requires_grad_(False)
        for module in (*tuned, *heads.values()):
            if module is not None:
                module.requires_grad_(True)
        return network
    from peft import LoraConfig, TaskType, get_peft_model

    chosen = targeted(body, method.targets)
    for name, layer in chosen.items():
        shape = tuple(layer.weight.shape)
        _checks.integer(
            "rank",
            method.rank,
            1,
            min(shape),
            limit=f"the weight of {name} is {shape[0]}×{shape[1]}",
        )
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=method.rank,
        lora_alpha=SCALE,
        use_rslora=True,
        target_modules=[f"{prefix}.{name}" for name in chosen],
        modules_to_save=[*heads],
    )
    with randomness.seeded(seed, "factors"), hub.quiet():
        return get_peft_model(network, config)


def targeted(body: nn.Module, targets: Targets) -> dict[str, nn.Linear]:
    """The linear layers of an encoder, by name, that `Lora` adapts for these targets.

    Raises `InputError` for an encoder without such layers.
    """
    layers = {name: m for name, m in body.named_modules() if isinstance(m, nn.Linear)}
    chosen = {name: m for name, m in layers.items() if targets in ("all", _kind(name))}
    if not chosen:
        kinds = sorted({type(module).__name__ for module in body.modules()})
        raise InputError(
            "model",
            allowed=f"an encoder with linear layers for targets {targets!r}",
            given=f"one of {hub.some(sorted(layers) or kinds)}",
        )
    return chosen


def equal_ranks(model: str, rank: int, head: Head = "own") -> dict[Targets, int]:
    """For each choice of targets, the rank whose adapters have most nearly as many numbers as those
    of rank ``rank`` on all linear layers; at least 1, at most what their layers can have."""
    with torch.device("meta"):
        body = _drawn(model, head).base_model
    shapes = {
        targets: [layer.weight.shape for layer in targeted(body, targets).values()]
        for targets in TARGETS
    }
    size = {targets: sum(map(sum, each)) for targets, each in shapes.items()}
    return {
        targets: min(max(1, round(rank * size["all"] / size[targets])), *map(min, each))
        for targets, each in shapes.items()
    }


def similarities(model: str, pairs: Sequence[tuple[str, str]]) -> Float[Tensor, " pairs"]:
    """Cosine of the angle between the two texts of each pair: the means over their tokens.

    It is how sentence encoders are made to be used (Reimers and Gurevych, 2019). Raises
    `InputError` for no pairs, and as `hub.encoder` does.
    """
    if not pairs:
        raise InputError("pairs", allowed="at least one pair of texts", given="none")
    words, network = hub.tokenizer(model), hub.encoder(model).eval()
    means = []
    for texts in zip(*pairs, strict=True):
        tokens = words(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            outputs = network(**tokens).last_hidden_state
        means.append(_mean(outputs, tokens["attention_mask"]))
    one, other = means
    return torch.cosine_similarity(one, other)


def _drawn(model: str, head: Head, **options: Any) -> Any:
    """The model with random weights and a head, as its configuration says."""
    hub.require("glue")
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    config = hub.load(AutoConfig, model, **options)
    with hub.quiet():
        if head == "mean":
            encoder = AutoModel.from_config(config)
            encoder.pooler = None  # its outputs are not used
            return Mean(encoder, config.num_labels)
        try:
            return AutoModelForSequenceClassification.from_config(config)
        except ValueError as error:
            raise InputError(
                "model",
                allowed="an encoder that transformers can give a head for classes",
                given=f"{model!r} ({type(config).__name__})",
            ) from error


def _mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the tokens that are there."""
    if mask is None:
        return hidden.mean(1)
    present = mask.unsqueeze(-1)
    return (hidden * present).sum(1) / present.sum(1)


def _kind(name: str) -> str:
    """What a linear layer is for: attention, feed-forward, or neither, outside the equal layers."""
    parts = name.split(".")
    if any("attention" in part or "attn" in part for part in parts):
        return "attention"
    return "feed-forward" if any(part.isdigit() for part in parts) else ""


def _last_layer(body: nn.Module) -> nn.Module:
    """The last of the equal layers that an encoder consists of."""
    stacks = [module for module in body.modules() if isinstance(module, nn.ModuleList) and module]
    if not stacks:
        raise InputError(
            "model",
            allowed="an encoder that is a stack of layers, to tune the last one",
            given=type(body).__name__,
        )
    return max(stacks, key=len)[-1]
