"""Parameters of the book's chapters: checked before a chapter does any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import _checks, hub
from ..errors import InputError
from ..experiments.encoders import sources

PROFILES = ("quick", "paper")


def check(chapter: str = "", /, **given: Any) -> list[Any]:
    """The parameters of a chapter, checked and completed, in the order in which they are given.

    ``profile``: quick or paper. ``seed``: from 0. ``seeds`` (how many): 1 to 100, or 0 for those of
    the profile. ``width``: 1 to 512; where there are ``heads``,
    which can be narrower, from 2. ``depth``: 1 to 64. ``heads``: 1 to 16. ``tokens`` (in a
    sequence): 1 to 1000.
    ``layers`` (frozen, for one of the target's): 2 to 5. ``blocks`` (of them): 2 to 4.
    ``ranks``: one rank or a list of them, each from 0 to the width; an empty list means all of
    these, or 17 spread evenly where there are more.
    ``source`` of the texts to fine-tune on: empty for the packaged reviews, ``"hub"``, or a folder
    in GLUE's layout. ``tasks``: a list of their names, or a text of names separated by
    commas; empty means all nine of GLUE, or ``condition`` of the reviews.
    ``text_ranks``: one rank of the encoder's adapters or a list, from 1; empty: the profile's.
    ``model``: the encoder, empty for the packaged one, a folder, or a name on the hub.
    ``results``: a folder in which one with the chapter's name keeps the runs of its sweeps. An
    empty text means none in profile quick, and in profile paper ``results``, where the chapter
    runs.
    Raises `InputError` for the first that is not usable, naming it.
    """
    about = given | {"chapter": chapter}
    return [_RULES[name](value, about) for name, value in given.items()]


def _profile(value: Any, _: dict[str, Any]) -> str:
    if value not in PROFILES:
        raise InputError("profile", allowed=" or ".join(PROFILES), given=repr(value))
    return str(value)


def _width(value: Any, given: dict[str, Any]) -> int:
    return _checks.integer("width", value, 2 if "heads" in given else 1, 512)


def _ranks(value: Any, given: dict[str, Any]) -> list[int]:
    width = given["width"]
    ranks = value if isinstance(value, list) else [value]
    checked = [_checks.integer("ranks", rank, 0, width, limit="the width") for rank in ranks]
    spread = {round(i * width / 16) for i in range(17)} if width > 16 else range(width + 1)
    return sorted(set(checked) or spread)


def _results(value: Any, given: dict[str, Any]) -> Path | None:
    if not isinstance(value, str):
        raise InputError("results", allowed="the name of a folder, or empty", given=repr(value))
    if not value and given["profile"] == "quick":
        return None
    return Path(value or "results").expanduser() / given["chapter"]


def _source(value: Any, _: dict[str, Any]) -> str:
    if not isinstance(value, str):
        raise InputError("source", allowed="a folder, hub, or empty", given=repr(value))
    source = value or hub.PACKAGED
    sources.check(next(iter(sources.tasks_of(source))), source)
    return source


def _tasks(value: Any, given: dict[str, Any]) -> list[str]:
    names = value.replace(" ", "").split(",") if isinstance(value, str) and value else value
    if not isinstance(names, list | str):
        raise InputError("tasks", allowed="a list of names", given=repr(value))
    source = _source(given["source"], given)
    allowed = sources.tasks_of(source)
    for name in names:
        if name not in allowed:
            among = f"among {', '.join(allowed)} with source {source!r}"
            raise InputError("tasks", allowed=among, given=repr(name))
    wanted = names or (["condition"] if source == hub.PACKAGED else allowed)
    return [name for name in allowed if name in wanted]


def _text_ranks(value: Any, _: dict[str, Any]) -> list[int]:
    ranks = value if isinstance(value, list) else [value]
    return sorted({_checks.integer("text_ranks", rank, 1) for rank in ranks})


def _model(value: Any, _: dict[str, Any]) -> str:
    if not isinstance(value, str):
        raise InputError("model", allowed="a folder, a hub name, or empty", given=repr(value))
    return value or hub.PACKAGED


_RULES: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "profile": _profile,
    "seed": lambda value, _: _checks.integer("seed", value, 0),
    "seeds": lambda value, _: _checks.integer("seeds", value, 0, 100),
    "width": _width,
    "depth": lambda value, _: _checks.integer("depth", value, 1, 64),
    "heads": lambda value, _: _checks.integer("heads", value, 1, 16),
    "tokens": lambda value, _: _checks.integer("tokens", value, 1, 1000),
    "layers": lambda value, _: _checks.integer("layers", value, 2, 5),
    "blocks": lambda value, _: _checks.integer("blocks", value, 2, 4),
    "ranks": _ranks,
    "source": _source,
    "tasks": _tasks,
    "model": _model,
    "text_ranks": _text_ranks,
    "results": _results,
}
