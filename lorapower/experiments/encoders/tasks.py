"""Tasks: which texts are read, which labels there are, and by which metrics answers are scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import InputError

#: Names of all scores.
METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")


@dataclass(frozen=True)
class Task:
    """What is asked of a model, and where the texts and labels are.

    Attributes
    ----------
    name : str
        Of the task, as the hub has it.
    folder : str
        Of its files, in the layout in which GLUE is distributed.
    texts : tuple of str
        One column or two, as the hub names them.
    columns, label
        The same columns, and that of the labels, in the files.
    classes : tuple of str
        Labels in the files, in the order of the integers that stand for them; none for a
        regression.
    metrics : tuple of str
        Those of the task. The first is its score, as in the published tables of adapters: Matthews
        correlation for CoLA, Pearson correlation for STS-B and accuracy for the others, for MNLI
        over both validation sets. (GLUE's own leaderboard averages the two metrics of a task that
        has two.)
    sets : tuple of str
        Endings of the names of validation and test sets, for a task that has several.
    header : tuple of str
        The columns of training and validation files that have no line of names.
    spoiled : int
        How many lines of a training or validation set may have a wrong number of columns or an
        empty text, as they do in the distributed files; they are left out and counted.
    limits : tuple
        Least and greatest number of a regression.
    """

    name: str
    folder: str
    texts: tuple[str, ...]
    columns: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
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
    def outputs(self) -> int:
        """Number of a model's outputs."""
        return len(self.classes) or 1

    def splits(self, part: str) -> list[str]:
        """Names on the hub of what ``part``, train, validation or test, consists of."""
        return ["train"] if part == "train" else [part + end for end in self.sets]

    def answers(self, outputs: ArrayLike) -> NDArray[np.float64]:
        """What a model's outputs ``[samples, outputs]`` say: the class, or the number."""
        values = np.asarray(outputs, dtype=np.float64)
        return values[:, 0] if self.regression else values.argmax(1).astype(np.float64)

    def scores(self, answers: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """All `METRICS`, NaN for those that are not of the task, and ``score``.

        Answers that are all the same correlate with nothing: 0.
        """
        from scipy import stats
        from sklearn import metrics

        given, wanted = (np.asarray(a, dtype=np.float64) for a in (answers, labels))
        constant = bool(np.ptp(given) == 0 or np.ptp(wanted) == 0)
        functions = {
            "accuracy": lambda: metrics.accuracy_score(wanted, given),
            "f1": lambda: metrics.f1_score(wanted, given, zero_division=0.0),
            "matthews": lambda: 0.0 if constant else metrics.matthews_corrcoef(wanted, given),
            "pearson": lambda: 0.0 if constant else stats.pearsonr(given, wanted).statistic,
            "spearman": lambda: 0.0 if constant else stats.spearmanr(given, wanted).statistic,
        }
        found = {
            name: float(functions[name]()) if name in self.metrics else math.nan for name in METRICS
        }
        return found | {"score": found[self.metrics[0]]}

    def contributions(self, answers: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
        """Of each text: a number such that their mean is the score, and their spread its error.

        For an accuracy that is 1 where the answer is right, else 0. For a correlation ``r``, of
        answers ``x`` and labels ``y`` brought to mean 0 and variance 1, it is
        ``r + xy - r(x² + y²)/2``: with this influence function the standard error of ``r`` is that
        of a mean, to first order. Answers that are all the same correlate with nothing: 0, of
        which this knows no error.
        """
        given, wanted = (np.asarray(a, dtype=np.float64) for a in (answers, labels))
        if self.metrics[0] == "accuracy":
            return (given == wanted).astype(np.float64)
        if np.ptp(given) == 0 or np.ptp(wanted) == 0:
            return np.zeros(len(given))
        x, y = ((values - values.mean()) / values.std() for values in (given, wanted))
        r = (x * y).mean()
        return np.asarray(r + x * y - r * (x**2 + y**2) / 2)

    def constant(self, labels: Sequence[float]) -> float:
        """The best answer for all samples alike: the most frequent class, or the mean."""
        values, counts = np.unique(np.asarray(labels), return_counts=True)
        return float(np.mean(labels) if self.regression else values[counts.argmax()])


_BINARY = ("0", "1")
_PAIR = ("sentence1", "sentence2")

#: GLUE's tasks, by name.
GLUE = {
    task.name: task
    for task in (
        Task(
            "cola",
            "CoLA",
            ("sentence",),
            ("sentence",),
            "label",
            _BINARY,
            ("matthews", "accuracy"),
            header=("source", "label", "star", "sentence"),
        ),
        Task("sst2", "SST-2", ("sentence",), ("sentence",), "label", _BINARY),
        Task(
            "mrpc",
            "MRPC",
            _PAIR,
            ("#1 String", "#2 String"),
            "Quality",
            _BINARY,
            ("accuracy", "f1"),
        ),
        Task("stsb", "STS-B", _PAIR, _PAIR, "score", (), ("pearson", "spearman")),
        Task(
            "qqp",
            "QQP",
            ("question1", "question2"),
            ("question1", "question2"),
            "is_duplicate",
            _BINARY,
            ("accuracy", "f1"),
            spoiled=100,
        ),
        Task(
            "mnli",
            "MNLI",
            ("premise", "hypothesis"),
            _PAIR,
            "gold_label",
            ("entailment", "neutral", "contradiction"),
            sets=("_matched", "_mismatched"),
        ),
        Task(
            "qnli",
            "QNLI",
            ("question", "sentence"),
            ("question", "sentence"),
            "label",
            ("entailment", "not_entailment"),
        ),
        Task("rte", "RTE", _PAIR, _PAIR, "label", ("entailment", "not_entailment")),
        Task("wnli", "WNLI", _PAIR, _PAIR, "label", _BINARY),
    )
}

_KINDS = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}

#: Tasks on the rated sentences, by name: for each kind of text the sign of the mean rating, and,
#: with ``-rating`` after its name, the mean rating itself.
SENTENCES = {
    task.name: task
    for kind, file in _KINDS.items()
    for task in (
        Task(
            kind,
            file,
            ("text",),
            ("text",),
            "rating",
            ("negative", "positive"),
            ("accuracy", "matthews"),
            spoiled=100,
        ),
        Task(
            f"{kind}-rating",
            file,
            ("text",),
            ("text",),
            "rating",
            (),
            ("pearson", "spearman"),
            spoiled=100,
            limits=(-4.0, 4.0),
        ),
    )
}

#: All of them.
TASKS = GLUE | SENTENCES

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


def find(name: str) -> Task:
    """The task of this name; raises `InputError` that lists all."""
    if not isinstance(name, str) or name not in TASKS:
        raise InputError("task", allowed=f"one of {', '.join(TASKS)}", given=repr(name))
    return TASKS[name]
