"""Tasks and their metrics, and sources of texts."""

from __future__ import annotations

import html
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lorapower import InputError
from records import models, texts
from records.texts import Examples

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
    return {part: texts.read(task, part) for part in texts.PARTS}


@pytest.mark.parametrize(("kind", "distinct"), KINDS.items())
def test_each_rated_sentence_is_in_one_part(kind: str, distinct: int) -> None:
    lines = [line.split("\t") for line in archived(texts.KINDS[kind]).splitlines()]
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


def test_other_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = texts._ARCHIVE.read_bytes()
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    monkeypatch.setattr(texts, "_ARCHIVE", path)
    texts.read.cache_clear()
    command = "`pip download --no-deps --no-binary :all: --dest .* vaderSentiment==3.3.2`"
    with pytest.raises(InputError, match=f"archive of rated sentences must be at .*: {command}"):
        texts.read("movies", "train")
    path.write_bytes(whole[:-1000])
    with pytest.raises(InputError, match=f"got {len(whole) - 1000} bytes of other .*{command}"):
        texts.read("movies", "train")
    text = "def double(values):\n    return [2 * value for value in values if value is not None]\n"
    (tmp_path / "one.py").write_text(text)
    monkeypatch.setattr(models, "package_folder", lambda package: tmp_path)
    with pytest.raises(InputError, match=r"must be sympy==1\.14\.0 .*got 1 .*`pip install sympy="):
        texts._functions.__wrapped__()


# Functions


def functions(part: str) -> list[str]:
    return [*texts.read("functions-next", part).texts]


def test_functions_of_a_file_are_in_one_part_and_those_of_a_form_there_once() -> None:
    parts = {part: functions(part) for part in texts.PARTS}
    assert [*map(len, parts.values())] == [2722, 374, 1276]
    left_out = [texts.read("functions-next", part).left_out for part in texts.PARTS]
    assert left_out == [{"repeated": number} for number in (2429, 304, 1135)]
    every = [text for found in parts.values() for text in found]
    assert all(60 <= len(text) <= 200 for text in every)
    # As they stand in a file of the part, but for indentation.
    folder = models.package_folder("sympy")
    files = {
        path.relative_to(folder).as_posix(): " ".join(path.read_text(encoding="utf-8").split())
        for path in folder.rglob("*.py")
        if not {"tests", "benchmarks"} & {*path.parts}
    }
    random = np.random.default_rng(0)
    for part, found in parts.items():
        for text in random.choice(found, 5):
            words = " ".join(text.split())
            homes = [name for name, file in files.items() if words in file]
            assert part in {texts._part(home, texts.FILES) for home in homes}
