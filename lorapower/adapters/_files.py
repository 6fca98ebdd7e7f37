"""Files of adapters: the package's own, which know their network, and those of ``peft``."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .. import _hub
from ..errors import InputError, ResultsError
from ..lowrank import LowRank
from ..networks.base import Network

CONTENT = "adapters of lorapower"
FORMAT = "1"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# A name that peft accepts where no module is named.
_NO_MODULES = "dummy-target-modules"
_TYING = "embed_tokens"


def write(path: Path, tensors: Mapping[str, Tensor], network: Network) -> None:
    """Write named tensors, and which network they belong to."""
    numbers = {name: owned(values) for name, values in tensors.items()}
    header = {
        "content": CONTENT,
        "format": FORMAT,
        "network": json.dumps(_describe(network)),
    }
    header["digest"] = _digest(header, numbers)
    put(path, safetensors.torch.save(numbers, header))


def read(path: Path, network: Network | None) -> dict[str, Tensor]:
    """Read what `write` wrote, onto the network's device; refuse damage and other networks."""
    if not path.is_file():
        raise ResultsError(path, "is no file", remedy="name one that Adapters.save has written")
    header: dict[str, str] = {}
    numbers, reason = {}, ""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            numbers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        reason = f" ({' '.join(str(error).split())})"
    if header.get("content") != CONTENT:
        problem = f"is damaged, or no file of adapters{reason}"
        raise ResultsError(path, problem, remedy="name one that Adapters.save has written")
    if header.get("format") != FORMAT:
        problem = f"is of format {header.get('format')}, where this version has format {FORMAT}"
        raise ResultsError(path, problem, remedy="save the adapters again")
    if header.pop("digest", "") != _digest(header, numbers):
        raise ResultsError(path, "is damaged", remedy="save the adapters again")
    if network is None:
        return numbers
    _require_same(path, json.loads(header["network"]), _describe(network))
    return {name: values.to(network.weights[0].device) for name, values in numbers.items()}


def _describe(network: Network) -> dict[str, Any]:
    """What tells a network from others, by name, for JSON."""
    names = [n for n in ("widths", "linear_last", "sizes") if hasattr(network, n)]
    numbers = {str(i): owned(p) for i, p in enumerate((*network.weights, *network.biases))}
    about = {
        "kind": type(network).__name__,
        **{name: getattr(network, name) for name in names},
        **getattr(network, "settings", {}),
        "type": str(network.dtype),
        "batch shape": list(network.batch_shape),
        "numbers": _digest({}, numbers),
    }
    return dict(json.loads(json.dumps(about)))


def owned(values: Tensor) -> Tensor:
    """A copy with memory of its own, since tensors that share memory cannot be written."""
    return values.detach().cpu().clone(memory_format=torch.contiguous_format)


def put(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ResultsError(
            path,
            f"cannot be written ({error.strerror or error})",
            remedy="make room or give access, or name another file",
        ) from error


def _require_same(path: Path, expected: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a network other than the adapters' own, with the first difference."""
    for name in {**expected, **given}:
        sides = [about.get(name, "unknown") for about in (expected, given)]
        if sides[0] != sides[1]:
            words = [f"{name} {side}" for side in sides]
            if name == "numbers":
                words = ["the same weights and biases", "one of other weights or biases"]
            raise InputError("network", allowed=f"that of {path}, of {words[0]}", given=words[1])


def _digest(header: Mapping[str, str], numbers: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name, values in sorted(numbers.items()):
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _wrap(network: Any, ranks: Mapping[str, int], *, biases: bool = False, **options: Any) -> Any:
    """Give a network's named modules adapters of their ranks, scaled by 1, maybe all its biases."""
    _hub.require("checkpoints", "peft")
    from peft import LoraConfig, get_peft_model

    # Only a pattern matches whole names: "0" in a list would match "1.0" too.
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    largest = max(ranks.values(), default=1)
    targets = [*map(re.escape, ranks)]
    if tied := _is_tied(network, ranks):
        # Which peft ties only where it finds one of these names alone.
        targets.append(_TYING)
    config = LoraConfig(
        target_modules="|".join(targets) or _NO_MODULES,
        ensure_weight_tying=tied,
        r=largest,
        lora_alpha=largest,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        bias="all" if biases else "none",
        inference_mode=True,
        **options,
    )
    with warnings.catch_warnings(action="ignore"):
        # It warns about tied weights and biases; what is read back is tested for these.
        return get_peft_model(network, config)


def _is_tied(network: Any, names: Collection[str]) -> bool:
    """Whether a head shares its weight with embeddings among modules of these names."""
    if not hasattr(network, "get_output_embeddings"):
        return False
    head = network.get_output_embeddings()
    modules = (network.get_submodule(name) for name in names)
    return head is not None and any(
        isinstance(module, nn.Embedding) and module.weight is head.weight for module in modules
    )


def save_peft(
    folder: Path | str,
    network: Any,
    updates: Mapping[str, LowRank],
    *,
    base: str | None = None,
    **options: Any,
) -> None:
    """Write updates of named modules and what `_wrap` keeps with them; uses the network up."""
    wrapped = _wrap(network, {name: update.rank for name, update in updates.items()}, **options)
    with torch.no_grad():
        for name, update in updates.items():
            module = wrapped.base_model.model.get_submodule(name)
            if isinstance(module.base_layer, nn.Embedding):
                A, B = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
            else:
                A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            A.copy_(update.right.mT)
            B.copy_(update.left)
    wrapped.peft_config["default"].base_model_name_or_path = base
    with warnings.catch_warnings(action="ignore"):
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)


def estimate_peft(network: Any, ranks: Mapping[str, int], **options: Any) -> tuple[int, int]:
    """Numbers and approximate bytes that `save_peft` would write; uses the network up."""
    from peft import get_peft_model_state_dict

    wrapped = _wrap(network, ranks, **options)
    with warnings.catch_warnings(action="ignore"):
        tensors = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    about = wrapped.peft_config["default"].to_dict()
    # In addition to 4 bytes a number: each tensor's entry in the header, and the configuration.
    return numbers, 4 * numbers + 160 * len(tensors) + len(json.dumps(about, default=list))


def measure_peft(folder: Path) -> tuple[int, int]:
    """Numbers in an adapter's file, and bytes of its files."""
    weights = folder / PEFT_WEIGHTS
    if weights.is_file():
        with safetensors.safe_open(weights, framework="pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    else:
        tensors = torch.load(weights.with_suffix(".bin"), weights_only=True, map_location="cpu")
        shapes = [tensor.shape for tensor in tensors.values()]
    size = sum(file.stat().st_size for file in folder.glob("adapter_*"))
    return sum(map(math.prod, shapes)), size


def write_peft(
    folder: Path, module: nn.Sequential, updates: Sequence[LowRank], biases: Sequence[Tensor]
) -> None:
    """Write the configuration and the weights for the ``Linear`` layers of a module."""
    layers = _linear_layers(module, updates)
    tuned = copy.deepcopy(module)
    for name, change in zip(layers, biases, strict=bool(biases)):
        bias = dict(tuned.get_submodule(name).named_parameters()).get("bias")
        if bias is not None:
            with torch.no_grad():
                bias.add_(change)
        elif change.any():
            raise InputError(
                "module",
                allowed="with biases where these are tuned",
                given=f"none in layer {name}",
                remedy="make the layer with bias=True, and zeros for them",
            )
    adapted = {name: u for name, u in zip(layers, updates, strict=True) if u.rank}
    with tempfile.TemporaryDirectory() as partial:
        save_peft(partial, tuned, adapted, biases=bool(biases))
        for name in (PEFT_WEIGHTS, PEFT_CONFIG):
            put(folder / name, Path(partial, name).read_bytes())


def _linear_layers(module: nn.Sequential, updates: Sequence[LowRank]) -> dict[str, nn.Linear]:
    """The ``Linear`` layers by name, which the updates must fit."""
    if not isinstance(module, nn.Sequential):
        raise InputError(
            "module", allowed="the network's torch.nn.Sequential", given=type(module).__name__
        )
    named = module.named_modules()
    layers = {name: layer for name, layer in named if isinstance(layer, nn.Linear)}
    expected = [(update.left.shape[-2], update.right.shape[-2]) for update in updates]
    given = [tuple(layer.weight.shape) for layer in layers.values()]
    if given != expected:
        raise InputError(
            "module", allowed=f"of Linear layers {expected}, as the adapters are", given=given
        )
    return layers
