"""The files of runs: a record, compressed, and what an interrupted sweep has finished.

Both have a line of JSON for each run. A run is found by settings of equal values; fields that a
line does not have count as today's defaults, so that new ones with a default lose no run.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from IPython import get_ipython

from lorapower.book.values import Values
from lorapower.errors import InputError

S = TypeVar("S", bound=Values)
# Between processors, runs of a few hundred steps differ by up to some 10⁻⁷, and exact fits by their
# rounding; a change of one of Adam's constants by a thousandth shows as 10⁻⁴ after twenty steps.
_RTOL, _ATOL = 1e-5, 1e-20
# Distributions whose versions, and packages whose code, can change a result.
_LIBRARIES = "numpy", "peft", "scikit-learn", "scipy", "torch", "transformers"
_PACKAGES = "lorapower", "loraplan", "records"


class Row(NamedTuple):
    """Hold what is kept of a run: its results, and their origin."""

    results: dict[str, Any]
    version: str
    revision: str
    seconds: float


def read_record(file: Path, kind: type[S]) -> dict[S | str, Row]:
    """Read the runs of a record; none of a file that is not there."""
    if not file.is_file():
        return {}
    return _read(gzip.decompress(file.read_bytes()).splitlines()[1:], kind)


def write_record(
    file: Path, settings: Sequence[Values], rows: Sequence[Row], protocol: str
) -> None:
    """Write what made runs and the runs, whole or not at all; partial files are then done with."""
    origin = {"protocol": protocol, "processor": platform.machine(), "libraries": _libraries()}
    lines = [json.dumps(origin, sort_keys=True), *map(_write, settings, rows)]
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))
    temporary.replace(file)
    for partial in file.parent.glob(f"{file.name.partition('.')[0]}.*.partial"):
        partial.unlink()


def read_partial(file: Path, kind: type[S]) -> dict[S | str, Row]:
    """Read the runs of an interrupted sweep; cut off what was written of a last line."""
    if not file.is_file():
        return {}
    written = file.read_bytes()
    complete = written[: written.rfind(b"\n") + 1]
    os.truncate(file, len(complete))
    return _read(complete.splitlines(), kind)


def append(file: Path, rows: Mapping[S, Row]) -> None:
    """Add finished runs to a partial file."""
    with file.open("a", encoding="utf-8") as partial:
        partial.writelines(f"{_write(*row)}\n" for row in rows.items())


def _write(setting: Values, row: Row) -> str:
    """Write a run as a line of a file."""
    return json.dumps({"setting": setting.model_dump(), **row._asdict()})


def _read(lines: Iterable[bytes], kind: type[S]) -> dict[S | str, Row]:
    """Read runs by setting; those of which no settings of this kind can be made, by their text."""
    rows: dict[S | str, Row] = {}
    for line in lines:
        run = json.loads(line, object_hook=_with_tuples)
        setting = run.pop("setting")
        try:
            key: S | str = kind(**setting)
        except InputError:
            key = json.dumps(setting)
        rows[key] = Row(**run)
    return rows


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def digest_code(work: Callable[..., Any]) -> str:
    """Digest the code that can change a result.

    It is the notebook's cells since its first one ran last, each once, which define all that its
    functions call, or else the file of ``work``; the packages of this project; and the versions of
    libraries that compute.
    """
    shell = get_ipython()
    if shell:
        ran = [cell for cell in shell.user_ns["In"] if cell]
        code = [*dict.fromkeys(ran[len(ran) - 1 - ran[::-1].index(ran[0]) :])]
    else:
        code = [Path(inspect.getfile(work)).read_text("utf-8")]
    for package in _PACKAGES:
        folder = Path(str(resources.files(package)))
        code += [path.read_text("utf-8") for path in sorted(folder.rglob("*.py"))]
    text = json.dumps([code, _libraries()])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _libraries() -> dict[str, str]:
    return {name: metadata.version(name) for name in _LIBRARIES}


def equal(before: Any, now: Any) -> bool:
    """Say whether two results are equal but for rounding."""
    if isinstance(before, tuple) and isinstance(now, tuple):
        return len(before) == len(now) and all(map(equal, before, now))
    if isinstance(before, float) and isinstance(now, float):
        near = math.isclose(before, now, rel_tol=_RTOL, abs_tol=_ATOL)
        return near or (math.isnan(before) and math.isnan(now))
    return type(before) is type(now) and bool(before == now)
