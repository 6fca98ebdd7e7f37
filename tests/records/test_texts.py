"""Tasks and their metrics, and sources of texts."""

from __future__ import annotations

import ast
import html
import math
import re
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from lorapower import InputError
from records import models, texts
from records.texts import Examples

# Tasks


def test_scores_are_means_of_what_texts_contribute() -> None:
    labels, answers = [0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]
    sign, following = texts.find("movies"), texts.find("functions-next", "code")
    assert sign.contributions(answers, labels).tolist() == [0, 1, 0, 1]
    found = sign.scores(answers, labels)
    assert (found["score"], found["accuracy"], sign.constant(labels)) == (0.5, 0.5, 1)
    losses = [2.0, 4.0]
    assert following.contributions(losses, []).tolist() == [-2, -4]
    score = following.scores(losses, [])
    assert (score["score"], score["loss"]) == (-3, 3)
    assert math.isnan(found["loss"])
    assert math.isnan(score["accuracy"])
    outputs = [[0.1, 0.2], [3.0, -1.0]]
    assert sign.answers(outputs).tolist() == [1, 0]
    assert following.answers(outputs).tolist() == [0.1, 3]


@pytest.mark.parametrize(
    ("task", "source", "part", "message"),
    [
        ("functions", "code", "train", "task must be one of functions-next"),
        ("movies", "code", "train", "task must be one of functions-next"),
        ("movies", "hub", "train", "source must be one of rated, code"),
        ("movies", "rated", "dev", "part must be one of train, validation, test"),
    ],
)
def test_unknown_tasks_sources_and_parts_are_refused(
    task: str, source: str, part: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        texts.read(task, source, part)


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
    lines = [line.split("\t") for line in archived(texts.find(kind).title).splitlines()]
    table = pd.DataFrame(lines, columns=["id", "rating", "text"]).astype({"rating": float})
    table["text"] = [html.unescape(html.unescape(text)).strip() for text in table["text"]]
    table["words"] = table["text"].str.casefold().str.split().str.join(" ")
    once = table.drop_duplicates("words")
    assert len(once) == distinct
    means = rated_parts(f"{kind}-next")
    assert Counter(t for p in means.values() for t in p.texts) == Counter(once["text"])
    ratings = {t: y for p in means.values() for t, y in zip(p.texts, p.labels, strict=True)}
    assert ratings == dict(zip(once["text"], once["rating"], strict=True))
    assert sum(p.left_out.get("repeated", 0) for p in means.values()) == len(table) - len(once)
    signs = rated_parts(kind)
    for part, examples in signs.items():
        for text, label in zip(examples.texts, examples.labels, strict=True):
            assert (ratings[text] > texts.NEUTRAL) if label else (ratings[text] < -texts.NEUTRAL)
        dropped = examples.left_out.get("neutral", 0)
        assert len(examples.labels) + dropped == len(means[part].labels)
    neutral = once["rating"].abs() <= texts.NEUTRAL
    assert sum(p.left_out["neutral"] for p in signs.values()) == neutral.sum()


def test_parts_have_their_shares_and_share_no_words() -> None:
    parts = rated_parts("movies-next")
    sizes = np.array([len(part.labels) for part in parts.values()])
    assert np.abs(sizes / sizes.sum() - [*texts.SHARES.values()]).max() < 0.01
    assert len(rated_parts("movies")["test"].labels) >= 1500
    words = [{text.casefold() for text in part.texts} for part in parts.values()]
    assert not words[0] & words[1] | words[0] & words[2] | words[1] & words[2]


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
    return [*texts.read("functions-next", "code", part).texts]


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
