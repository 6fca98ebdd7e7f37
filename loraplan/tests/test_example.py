"""`loraplan example`: what it writes, that its seed decides it, and what it refuses."""

from __future__ import annotations

import email.message
import filecmp
import json
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from loraplan import InputError, Pair, _example, _models, _randomness

FOLDERS = ["base", "lora", "tuned"]
FILES = {"texts.jsonl": 240, "fresh.jsonl": 240}


def make(folder: Path, seed: int = 0) -> Path:
    """Fill a folder with the example, its models tuned on few texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_example, "_EACH", 170)
        _example.write(folder, seed=seed, report=lambda *_: None)
    return folder


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("example"))


def test_has_a_base_tuned_models_and_texts_with_their_source(example: Path) -> None:
    assert {path.name for path in example.iterdir()} == {"README.md", *FOLDERS, *FILES}
    assert not filecmp.dircmp(example / "base", _models.place("packaged")).diff_files
    for name in FOLDERS[1:]:
        pair = Pair.open(str(example / "base"), str(example / name))
        assert pair.tuned.config.num_labels == 3
        changes = [pair.change(module) for module in pair.modules]
        assert all(change.abs().max() > 0 for change in changes)
    tuned = json.loads((example / "tuned" / "config.json").read_text(encoding="utf-8"))
    assert [*tuned["id2label"].values()] == [*_example._KINDS]
    about = (example / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in about for name in (*FOLDERS, *FILES))
    assert all(said in about for said in ("PSF License", "say MIT", "Apache 2.0"))
    assert all(oct(path.stat().st_mode)[-3:] in ("644", "755") for path in example.rglob("*"))


def test_texts_are_docstrings_each_once_with_their_kind(example: Path) -> None:
    samples = _example._samples(_randomness.generator(0, "docstrings"))
    labels = {sample["text"]: sample["label"] for sample in samples}
    assert len(labels) == len(samples) == 1200
    assert Counter(labels.values()) == dict.fromkeys(range(3), 400)
    assert all(5 <= len(text.split()) <= 40 for text in labels)
    own = [set(map(_example._clean, _example._docstrings(kind))) for kind in _example._KINDS]
    for text, label in labels.items():
        assert [kind for kind, texts in enumerate(own) if text in texts] == [label]
    # Of a module within a package.
    assert _example._clean(email.message.__doc__ or "") in own[1]
    lines = {name: (example / name).read_text(encoding="utf-8").splitlines() for name in FILES}
    assert {name: len(each) for name, each in lines.items()} == FILES
    rows = [json.loads(line) for each in lines.values() for line in each]
    assert len({row["text"] for row in rows}) == len(rows)
    assert all(row["text"] in own[row["label"]] for row in rows)


def test_missing_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: tmp_path)
    with pytest.raises(InputError, match="standard library must be installed with its sources"):
        make(tmp_path / "example")
    assert not (tmp_path / "example").exists()


@pytest.mark.nightly
def test_the_seed_decides_everything(example: Path, tmp_path: Path) -> None:
    with _randomness.seeded(1, "of no account"):
        again, other = make(tmp_path / "again"), make(tmp_path / "other", seed=1)
    names = [str(path.relative_to(example)) for path in example.rglob("*") if path.is_file()]
    assert filecmp.cmpfiles(example, again, names, shallow=False) == (names, [], [])
    different = filecmp.cmpfiles(example, other, names, shallow=False)[1]
    models = ["lora/adapter_model.safetensors", "tuned/model.safetensors"]
    assert sorted(different) == sorted([*FILES, *models])
