"""A checkpoint on disk: its configuration, and its tensors, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import _hub as hub
from ..errors import InputError

# Buffers that older files hold and that follow from the configuration.
_DERIVED = ("position_ids", "token_type_ids", "inv_freq", ".attn.masked_bias", ".attn.bias")
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


class Stored:
    """The weights of a checkpoint in files of safetensors.

    Attributes
    ----------
    name : str
        The argument that named it, ``"base"`` or ``"tuned"``.
    source : str
        What the caller gave: a folder, or a name on the hub.
    place
        The folder of its files.
    config
        Its configuration, of transformers.
    """

    def __init__(self, name: str, source: str) -> None:
        """Find the files and read what they say of their tensors, but not these.

        Raises `InputError` for a folder that does not exist or holds no such checkpoint, for a LoRA
        adapter, and for quantized weights.
        """
        from safetensors import SafetensorError, safe_open
        from transformers import AutoConfig

        self.name, self.source = name, str(source)
        self.place = _place(name, self.source)
        self.config: Any = hub.load(AutoConfig, str(self.place))
        if method := getattr(self.config, "quantization_config", None):
            given = dict(method).get("quant_method", "some") if isinstance(method, dict) else method
            raise self._quantized(f"weights quantized by {given}")
        # The file and the key there of each tensor, and its size and type.
        self._where: dict[str, tuple[Path, str]] = {}
        self._about: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in self._files():
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118
                        part = opened.get_slice(key)
                        # As older files of BERT call them.
                        new = key.replace(".gamma", ".weight").replace(".beta", ".bias")
                        self._where[new] = (file, key)
                        self._about[new] = (tuple(part.get_shape()), part.get_dtype())
            except (OSError, SafetensorError) as error:
                raise self._unusable(f"{file.name}, which is damaged ({error})") from error
        exotic = {kind for _, kind in self._about.values()} - {"F32", "F16", "BF16", "I64", "BOOL"}
        if exotic:
            raise self._quantized(f"weights of type {', '.join(sorted(exotic)).lower()}")

    def bind(self, wanted: Mapping[str, tuple[int, ...]], prefix: str) -> set[str]:
        """Call tensors by the names of a network with these parameters; returns those it lacks.

        Files may have them with the prefix of the model without its head, or without. Raises
        `InputError` for a tensor of another size.
        """
        for key in [*self._where]:
            if key.endswith(_DERIVED):
                del self._where[key]
                continue
            for alias in (f"{prefix}.{key}", key.removeprefix(f"{prefix}.")):
                if key not in wanted and alias in wanted:
                    self._where[alias] = self._where.pop(key)
                    self._about[alias] = self._about.pop(key)
                    break
        for key, shape in wanted.items():
            if key in self._where and self._about[key][0] != shape:
                rows = "embed" in key or "wte" in key
                raise InputError(
                    self.name,
                    allowed=f"of one shape with the other checkpoint, {key} {shape}",
                    given=f"{key} {self._about[key][0]}",
                    remedy="resize both vocabularies alike" if rows else "",
                )
        return {key for key in wanted if key not in self._where}

    def others(self, wanted: Mapping[str, tuple[int, ...]]) -> set[str]:
        """Tensors for which a network with these parameters has no use."""
        return {key for key in self._where if key not in wanted}

    def has(self, key: str) -> bool:
        """Whether it has a tensor of this name."""
        return key in self._where

    def read(self, key: str) -> Tensor:
        """One tensor, in float32; raises `InputError` for one that is not finite."""
        from safetensors import safe_open

        file, stored = self._where[key]
        with safe_open(file, framework="pt") as opened:
            tensor = opened.get_tensor(stored).float()
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise InputError(
                self.name,
                allowed="of finite weights",
                given=f"{key} with {bad} entries that are NaN or infinite",
            )
        return tensor

    def bytes(self) -> int:
        """Size of its files."""
        return sum(file.stat().st_size for file in {file for file, _ in self._where.values()})

    def _files(self) -> list[Path]:
        index = self.place / "model.safetensors.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = sorted(self.place / name for name in names)
        else:
            files = [self.place / "model.safetensors"]
        if lacking := [file.name for file in files if not file.is_file()]:
            raise self._unusable(f"a folder without {hub.some(lacking)}")
        return files

    def _unusable(self, given: str) -> InputError:
        return InputError(
            self.name,
            allowed="a checkpoint of transformers with weights in safetensors",
            given=f"{self.source!r}, {given}",
            remedy="load it with transformers and save it with save_pretrained",
        )

    def _quantized(self, given: str) -> InputError:
        return InputError(
            self.name,
            allowed="of weights in float32, float16 or bfloat16",
            given=given,
            remedy="take the checkpoint from before quantization, or dequantize and save it",
        )


def _place(name: str, source: str) -> Path:
    """The folder of a checkpoint; one on the hub is fetched, or found among what was."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    place = hub.packaged() if source == hub.PACKAGED else Path(source).expanduser()
    if not place.is_dir():
        if source.startswith(("/", ".", "~")) or source.count("/") > 1:
            raise InputError(name, allowed="a folder that exists", given=repr(source))
        try:
            with hub.quiet():
                place = Path(snapshot_download(source, allow_patterns=_FILES))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                name,
                allowed="a folder that exists, or a name on the hub that can be reached or was "
                "downloaded before",
                given=f"{source!r}, which is no folder here, and on the hub {reason}",
            ) from error
    if (place / "adapter_config.json").is_file():
        raise InputError(
            name,
            allowed="a checkpoint with all its weights",
            given=f"{source!r}, an adapter",
            remedy="measure it with `lorapower check BASE ADAPTER TUNED`, or merge it into its "
            "base (merge_and_unload of peft) and name the result",
        )
    if not (place / "config.json").is_file():
        raise InputError(
            name,
            allowed="a checkpoint of transformers",
            given=f"{source!r}, a folder without config.json",
        )
    return place
