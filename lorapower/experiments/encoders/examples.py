"""Labelled texts, and how the rows of any source become such."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ...errors import InputError
from .tasks import Task

UNLABELLED = math.nan

# Place of a row, its texts or what is the matter with it, and its label, None where it has none.
Row = tuple[str, "list[str] | InputError", "str | float | None"]


@dataclass(frozen=True)
class Examples:
    """Texts, single or in pairs, and their labels.

    Attributes
    ----------
    texts : tuple of tuple of str
        One text or two of each example.
    labels : tuple of float
        Number of the class, or the value of a regression; NaN in test sets that have none.
    sizes : tuple of int
        Number of examples of each of the sets that these are, one after the other.
    left_out : mapping
        Number of rows of the source that were of no use, by reason.
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
            dict(Counter(self.left_out) + Counter(other.left_out)),
        )


def made(task: Task, rows: Iterable[Row], *, spoiled: int = 0) -> Examples:
    """What the rows hold, all checked; up to ``spoiled`` of them may be of no use.

    Raises `InputError` with the place of the first row that is one too many, or of a label that is
    none of the task's.
    """
    texts, labels, unused = [], [], 0
    for place, row, label in rows:
        problem = row if isinstance(row, InputError) else None
        stripped = () if problem else tuple(text.strip() for text in row)  # type: ignore[union-attr]
        if not problem and not all(stripped):
            problem = InputError(place, allowed="without empty texts", given=repr(row))
        if problem:
            unused += 1
            if unused > spoiled:
                raise problem
            continue
        texts.append(stripped)
        labels.append(UNLABELLED if label is None else _label(task, place, label))
    counts = {"spoiled": unused} if unused else {}
    return Examples(tuple(texts), tuple(labels), (len(labels),), counts)


def _label(task: Task, place: str, label: str | float) -> float:
    try:
        value = float(label) if task.regression else float(task.classes.index(str(label)))
    except ValueError:
        value = math.nan
    low, high = task.limits
    if math.isnan(value) or (task.regression and not low <= value <= high):
        allowed = (
            f"a number from {low:g} to {high:g}"
            if task.regression
            else f"one of {', '.join(task.classes)}"
        )
        raise InputError(f"{place}: label", allowed=allowed, given=repr(label))
    return value
