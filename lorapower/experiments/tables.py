"""Tables: one line per run, flat, however its setting is built.

There are three groups of columns: the fields of the setting, the results, and what made them
(`provenance.Origin`). A record within a record has columns of its own names, but for its ``kind``,
which is in the column of the field that is of this kind: a setting whose ``method`` is
``Lora(ranks=2)`` has ``method`` ``"lora"`` and ``ranks`` 2. What is ``None``, or no field of the
row's method, is missing, for which pandas makes a column of integers one of floats. Tuples stay
tuples.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import pandas as pd

from .._records import Record
from ..errors import InputError
from .store import Row


def columns(record: type[Record], name: str = "") -> list[str]:
    """The columns that settings of this class have in a table, those of all kinds of its fields."""
    found = []
    for field, about in record.model_fields.items():
        kinds = [
            kind for kind in (about.annotation, *get_args(about.annotation)) if is_record(kind)
        ]
        inner = [column for kind in kinds for column in columns(kind, field)]
        found += [*dict.fromkeys(inner)] or [name if field == "kind" else field]
    return found


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """One line per row, in their order."""
    rows = list(rows)
    parts: list[list[dict[str, Any]]] = [
        [flat(row.setting) for row in rows],
        [flat(row.results) for row in rows],
        [row.origin._asdict() for row in rows],
    ]
    return pd.concat([pd.DataFrame(part) for part in parts], axis=1)


def flat(text: str) -> dict[str, Any]:
    """The cells of a record that is kept as this text, by their columns."""
    return dict(_leaves(json.loads(text)))


def require(table: Any, *names: str) -> None:
    """Refuse what is no table with these columns."""
    if not isinstance(table, pd.DataFrame) or not {*names} <= {*table.columns}:
        given = [*table.columns] if isinstance(table, pd.DataFrame) else type(table).__name__
        raise InputError("table", allowed=f"a table with {', '.join(names)}", given=given)


def is_record(kind: Any) -> bool:
    """Whether this is a class of records."""
    return isinstance(kind, type) and issubclass(kind, Record)


def distinct(name: str, found: list[str]) -> None:
    """Refuse columns of which two have one name; ``name`` says whose they are."""
    if twice := [column for column, count in Counter(found).items() if count > 1]:
        raise InputError(
            f"columns of {name}", allowed="different from one another", given=", ".join(twice)
        )


def _leaves(values: dict[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    for field, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, field)
        else:
            yield name if field == "kind" else field, _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
