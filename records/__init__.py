"""Long runs, done once: `sweep` gives the runs of a chapter, `read` tables of language models.

`grid` makes settings, which are `Values`, and `run` makes a table of what each gives, `Results`.
"""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lorapower.book.values import Values
from lorapower.errors import InputError
from records.runs import Results, grid, run, sweep

__all__ = [
    "TABLES",
    "Results",
    "Values",
    "complete",
    "grid",
    "pack",
    "read",
    "run",
    "sweep",
    "unpack",
]

_HERE = Path(__file__).parent
TABLES = sorted(file.name.removesuffix(".csv.gz") for file in _HERE.glob("*.csv.gz"))
# What is compared on each text.
_COMPARED = ("squares", "effect", "equal", "divergence", "decisions")


def read(name: str) -> pd.DataFrame:
    """Read a recorded table; ``records/README.md`` says what each of `TABLES` has.

    Raises `InputError` for other names.
    """
    if name not in TABLES:
        raise InputError("name", allowed=f"one of {', '.join(TABLES)}", given=repr(name))
    texts: dict[str, type] = {"changes": str, "revision": str}  # also where all are empty
    return complete(pd.read_csv(_HERE / f"{name}.csv.gz", dtype=texts))


def complete(table: pd.DataFrame) -> pd.DataFrame:
    """Unpack arrays over texts, where a table has them, and compute what `read` says of them."""
    if "squares" not in table:
        return table.fillna({"changes": "", "revision": ""})
    there = [*_COMPARED, "variation"]
    texts = table[there]
    table[there] = texts.mask(texts == "").map(unpack, na_action="ignore")
    sums = (table[name].map(np.sum).astype(float) for name in _COMPARED)
    squares, effect, equal, divergence, decisions = sums
    table["error"] = np.sqrt(squares / effect)
    table["agreement"] = equal / decisions
    table["kl"] = divergence / decisions
    return table


def pack(values: ArrayLike) -> str:
    """Write numbers, in single precision, as a text that a result can be."""
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def unpack(text: str) -> NDArray[np.float64]:
    """Read the numbers that `pack` was given."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)
