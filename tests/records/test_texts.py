"""Tasks and their metrics, and sources of texts."""

from __future__ import annotations

import ast
import gzip
import hashlib
import html
import json
import math
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from lorapower import InputError
from lorapower.checkpoints import _example
from records import models, texts
from records.texts import GLUE, METRICS, SENTENCES, Examples, Task

each_task = pytest.mark.parametrize("task", GLUE.values(), ids=GLUE)


# Tasks


def test_metrics_have_their_known_values() -> None:
    # 6 true and 1 false positives, 3 true and 2 false negatives.
    wanted = [1] * 8 + [0] * 4
    given = [1] * 6 + [0] * 2 + [1] + [0] * 3
    matthews = (6 * 3 - 1 * 2) / math.sqrt(7 * 8 * 4 * 5)
    found = GLUE["mrpc"].scores(given, wanted)
    assert found["accuracy"] == pytest.approx(9 / 12)
    assert found["f1"] == pytest.approx(2 * 6 / (2 * 6 + 1 + 2))
    assert GLUE["cola"].scores(given, wanted)["score"] == pytest.approx(matthews)
    # Deviations −2 −1 0 1 2 and −2 −1 0 −1 4, ranks 1 2.5 4 2.5 5 for the second.
    found = GLUE["stsb"].scores([1, 2, 3, 2, 7], [1, 2, 3, 4, 5])
    assert found["pearson"] == found["score"] == pytest.approx(12 / math.sqrt(10 * 22))
    assert found["spearman"] == pytest.approx(8 / math.sqrt(10 * 9.5))
    assert math.isnan(found["accuracy"])
    assert set(found) == {*METRICS, "score"}


@each_task
def test_perfect_answers_score_one_and_constant_ones_little(task: Task) -> None:
    labels = np.array([0.0, 1.0, 0.0, 1.0, 0.0])
    assert task.scores(labels, labels)["score"] == pytest.approx(1)
    constant = np.full(5, task.constant([*labels]))
    score = task.scores(constant, labels)["score"]
    assert score == (0.6 if task.metrics[0] == "accuracy" else 0)


@each_task
def test_contributions_have_the_score_as_mean(task: Task) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, task.classes or 6, 200).astype(float)
    same = random.random(200) < 0.7
    given = np.where(same, labels, random.permutation(labels))
    found = task.contributions(given, labels)
    assert found.mean() == pytest.approx(task.scores(given, labels)["score"])
    assert not task.contributions(np.zeros(200), labels + 1).any()


@pytest.mark.parametrize("name", ["stsb", "cola", "rte"])
def test_contributions_have_the_error_of_the_score(name: str) -> None:
    """Against the bootstrap."""
    task, random = GLUE[name], np.random.default_rng(0)
    x = random.normal(size=(2, 1000))
    labels, given = x[0], 0.8 * x[0] + 0.6 * x[1]
    if task.classes:
        labels, given = (labels > 0.3).astype(float), (given > 0.3).astype(float)
    draws = random.integers(0, 1000, (400, 1000))
    scores = [task.scores(given[draw], labels[draw])["score"] for draw in draws]
    error = task.contributions(given, labels).std() / math.sqrt(1000)
    assert error == pytest.approx(np.std(scores), rel=0.12)


# GLUE


@pytest.mark.parametrize("task", ["cola", "stsb", "mnli", "qqp"])
def test_a_copy_of_glue_is_read(task: str, glue: str) -> None:
    about = GLUE[task]
    found = texts.read(task, glue, "train")
    assert len(found.texts) == len(found.labels) == 8
    assert {len(row) for row in found.texts} == {len(about.columns)}
    assert found.texts[7][0] == "It hurts."
    wanted = [i % about.classes if about.classes else 5 * i / 7 for i in range(8)]
    assert found.labels == pytest.approx(wanted)
    assert found.left_out == ({"spoiled": 1} if task == "qqp" else {})
    validation = texts.read(task, glue, "validation")
    assert validation.texts == found.texts * len(about.validation)
    assert validation.labels == found.labels * len(about.validation)


def test_the_hub_is_asked_for_the_same_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        return [{"premise": "One.", "hypothesis": "Two.", "label": 2}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    texts.read.cache_clear()
    assert texts.read("mnli", "hub", "validation").labels == (2, 2)
    parts = ("validation_matched", "validation_mismatched")
    assert asked == [("nyu-mll/glue", "mnli", part) for part in parts]
    texts.read.cache_clear()


def test_what_cannot_be_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, glue: str
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for source in ("hub", str(tmp_path)):
        with pytest.raises(InputError, match="must be the data set nyu-mll/glue, on") as info:
            texts.read("cola", source, "train")
        assert "\n" not in str(info.value)


# Rated sentences, with each file's number of distinct ones.
KINDS = {"movies": 10603, "tweets": 4140, "products": 3697, "editorials": 5118}


def archived(file: str) -> str:
    """A file of the archive, read with the command line's own tools."""
    content = b""
    for source, name in ((texts._ARCHIVE, "*/hutto*.gz"), ("-", f"*/{file}_GroundTruth.txt")):
        command = ["tar", "--wildcards", "-xzOf", source, name]
        content = subprocess.run(command, input=content, check=True, capture_output=True).stdout
    return content.decode()


def rated_parts(task: str) -> dict[str, Examples]:
    return {part: texts.read(task, "rated", part) for part in texts.PARTS}


@pytest.mark.parametrize(("kind", "distinct"), KINDS.items())
def test_each_rated_sentence_is_in_one_part(kind: str, distinct: int) -> None:
    lines = [line.split("\t") for line in archived(SENTENCES[kind].title).splitlines()]
    table = pd.DataFrame(lines, columns=["id", "rating", "text"]).astype({"rating": float})
    table["text"] = [html.unescape(html.unescape(text)).strip() for text in table["text"]]
    table["words"] = table["text"].str.casefold().str.split().str.join(" ")
    once = table.drop_duplicates("words")
    assert len(once) == distinct
    means = rated_parts(f"{kind}-rating")
    assert Counter(t for p in means.values() for (t,) in p.texts) == Counter(once["text"])
    ratings = {t: y for p in means.values() for (t,), y in zip(p.texts, p.labels, strict=True)}
    assert ratings == dict(zip(once["text"], once["rating"], strict=True))
    assert sum(p.left_out.get("repeated", 0) for p in means.values()) == len(table) - len(once)
    signs = rated_parts(kind)
    for part, examples in signs.items():
        for (text,), label in zip(examples.texts, examples.labels, strict=True):
            assert (ratings[text] > texts.NEUTRAL) if label else (ratings[text] < -texts.NEUTRAL)
        dropped = examples.left_out.get("neutral", 0)
        assert len(examples.labels) + dropped == len(means[part].labels)
    neutral = once["rating"].abs() <= texts.NEUTRAL
    assert sum(p.left_out["neutral"] for p in signs.values()) == neutral.sum()


def test_parts_have_their_shares_and_share_no_words() -> None:
    parts = rated_parts("movies-rating")
    sizes = np.array([len(part.labels) for part in parts.values()])
    assert np.abs(sizes / sizes.sum() - [*texts.SHARES.values()]).max() < 0.01
    assert len(rated_parts("movies")["test"].labels) >= 1500
    words = [{text.casefold() for (text,) in part.texts} for part in parts.values()]
    assert not words[0] & words[1] | words[0] & words[2] | words[1] & words[2]


def test_the_example_of_the_command_has_decided_movie_snippets() -> None:
    def drawn(*parts: str) -> list[dict[str, Any]]:
        found = [texts.read("movies", texts.RATED, part) for part in parts]
        pairs = [pair for each in found for pair in zip(each.texts, each.labels, strict=True)]
        rows = [{"text": text, "label": int(label)} for (text,), label in pairs]
        return sorted(rows, key=lambda row: hashlib.sha256(row["text"].encode()).digest())

    rows = [*drawn("train")[:640], *drawn("validation", "test")[:360]]
    lines = gzip.decompress(_example._MOVIES.read_bytes()).decode().splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_another_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = texts._ARCHIVE.read_bytes()
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    monkeypatch.setattr(texts, "_ARCHIVE", path)
    texts.read.cache_clear()
    command = "`pip download --no-deps --no-binary :all: --dest .* vaderSentiment==3.3.2`"
    with pytest.raises(InputError, match=f"archive of rated sentences must be at .*: {command}"):
        texts.read("movies", "rated", "train")
    path.write_bytes(whole[:-1000])
    with pytest.raises(InputError, match=f"got {len(whole) - 1000} bytes of other .*{command}"):
        texts.read("movies", "rated", "train")


def test_texts_are_from_what_is_installed() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert {texts.REQUIREMENT, texts.SYMPY} <= {*lines}


# Functions


def functions(part: str) -> list[str]:
    return [text for (text,) in texts.read("functions-next", "code", part).texts]


def test_functions_of_a_file_are_in_one_part_and_those_of_a_form_there_once() -> None:
    parts = {part: functions(part) for part in texts.PARTS}
    assert [*map(len, parts.values())] == [2722, 374, 1276]
    left_out = [texts.read("functions-next", "code", part).left_out for part in texts.PARTS]
    assert left_out == [{"repeated": number} for number in (2429, 304, 1135)]
    every = [text for found in parts.values() for text in found]
    assert all(60 <= len(text) <= 200 for text in every)
    # As they stand in a file of the part, but for indentation.
    folder = models.folder("sympy")
    files = {
        path.relative_to(folder).as_posix(): " ".join(path.read_text(encoding="utf-8").split())
        for path in folder.rglob("*.py")
        if not {"tests", "benchmarks"} & {*path.parts}
    }
    random = np.random.default_rng(0)
    for part, found in parts.items():
        for text in random.choice(found, 20):
            words = " ".join(text.split())
            homes = [name for name, file in files.items() if words in file]
            assert part in {texts._part(home, texts.FILES) for home in homes}

    class Mask(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.Constant:
            return ast.Constant("")

    def mask(text: str) -> str:
        tree = Mask().visit(ast.parse(text))
        return re.sub(r"'\w*'", "_", ast.dump(tree, annotate_fields=False))

    assert len({*map(mask, every)}) == len(every)


def test_functions_of_another_version_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "def double(values):\n    return [2 * value for value in values if value is not None]\n"
    (tmp_path / "one.py").write_text(text)
    monkeypatch.setattr(models, "folder", lambda package: tmp_path)
    with pytest.raises(InputError, match=r"must be sympy==1\.14\.0 .*got 1 .*`pip install sympy="):
        texts._functions("another")
