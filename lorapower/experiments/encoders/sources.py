"""Sources of labelled texts: rated sentences, the hub, and a folder in GLUE's own layout."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ... import _hub as hub
from ..._hub import RATED as RATED
from ...errors import InputError
from . import examples
from . import rated as rated
from .examples import Examples, Row
from .tasks import GLUE, SENTENCES, Task, find

HUB = "hub"
PARTS = ("train", "validation", "test")
HUB_NAME = "nyu-mll/glue"


def tasks_of(source: str) -> dict[str, Task]:
    """The tasks that a source has."""
    return SENTENCES if source == RATED else GLUE


def held_out(source: str) -> Literal["validation", "test"]:
    """The part on which scores are reported: test sets of GLUE have no labels."""
    return "test" if source == RATED else "validation"


def chosen(names: Sequence[str], source: str) -> list[str]:
    """The tasks of these names, in the source's order; of none, all of GLUE's, or ``movies``.

    Raises `InputError` for a name that the source has not, and for a source that there is not.
    """
    every = [*tasks_of(source)]
    wanted = names or (["movies"] if source == RATED else every)
    for name in wanted:
        check(name, source)
    return [name for name in every if name in wanted]


def check(task: str, source: str) -> None:
    """Raise `InputError` unless ``source`` is one for this task, and a folder, if it is one."""
    find(task)
    if not isinstance(source, str) or not source:
        raise InputError("source", allowed=f"{RATED!r}, {HUB!r} or a folder", given=repr(source))
    allowed = tasks_of(source)
    if task not in allowed:
        raise InputError(
            "task", allowed=f"one of {', '.join(allowed)} with source {source!r}", given=repr(task)
        )
    if source not in (RATED, HUB) and not Path(source).expanduser().is_dir():
        raise InputError(
            "source",
            allowed=f"{RATED!r}, {HUB!r} or a folder that exists",
            given=repr(source),
            remedy="name the folder that holds CoLA, SST-2 and the others",
        )


@functools.lru_cache(maxsize=4)
def read(task: str, source: str, part: str) -> Examples:
    """The examples of a task's training, validation or test set; validation sets are joined.

    Raises `InputError` for what is missing or is not as it should be, with file and line.

    Parameters
    ----------
    task : str
        Name of one of `tasks.TASKS`.
    source : str
        ``"rated"``, ``"hub"``, or a folder that holds GLUE's files as they are distributed: a
        folder for each task (``CoLA``, ``SST-2``, …) with ``train.tsv``, ``dev.tsv`` and
        ``test.tsv``, fields separated by tabs, quotation marks being text.
    part : str
        ``"train"``, ``"validation"`` or ``"test"``.
    """
    if part not in PARTS:
        raise InputError("part", allowed=f"one of {', '.join(PARTS)}", given=repr(part))
    check(task, source)
    about = find(task)
    if source == RATED:
        return rated.read(about, part)
    load = _hub if source == HUB else functools.partial(_file, Path(source).expanduser())
    sets = [load(about, split) for split in about.splits(part)]
    return functools.reduce(operator.add, sets)


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

    found = examples.made(task, rows(), spoiled=task.spoiled if labelled else 0)
    if not found.labels:
        raise InputError(str(path), allowed="a file with examples", given="none")
    return found


def _hub(task: Task, split: str) -> Examples:
    """One split as the hub has it, through ``datasets``; kept by it on this machine."""
    hub.require("glue")
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

    return examples.made(task, rows(), spoiled=task.spoiled if labelled else 0)
