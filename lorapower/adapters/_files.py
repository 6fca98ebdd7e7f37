"""Files of adapters: safetensors with a header that says which network they are for."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import InputError, ResultsError
from ..networks.base import Network

CONTENT = "adapters of lorapower"
FORMAT = "1"


def write(path: Path, tensors: Mapping[str, Tensor], network: Network) -> None:
    """Write named tensors, and which network they belong to."""
    numbers = {name: owned(values) for name, values in tensors.items()}
    header = {
        "content": CONTENT,
        "format": FORMAT,
        "network": json.dumps(description(network)),
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
    _require_same(path, json.loads(header["network"]), description(network))
    return {name: values.to(network.weights[0].device) for name, values in numbers.items()}


def description(network: Network) -> dict[str, Any]:
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
