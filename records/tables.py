"""Put long runs of language models beside this file, and read settings back from them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch

from records import Values
from records.store import kind_of

HERE = Path(__file__).resolve().parent

S = TypeVar("S", bound=Values)


def begin() -> list[str]:
    """Enter the folder that the command line names first; return what it says after that.

    Files of runs, and folders of networks, are in the working directory of these commands. They
    compute on one thread, as recorded runs do.
    """
    folder, *others = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    torch.set_num_threads(1)
    return others


def put(table: pd.DataFrame, name: str, folder: Path = HERE) -> None:
    """Write a table, compressed; its bytes do not depend on the moment."""
    table.to_csv(folder / f"{name}.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})
    print(f"{name}: {len(table)} rows")


def settings(table: pd.DataFrame, kind: type[S]) -> list[S]:
    """Read the setting of each row of a table back, as values of a kind."""
    return [_setting(kind, row.dropna()) for _, row in table.convert_dtypes().iterrows()]


def _setting(kind: type[S], row: pd.Series[Any]) -> S:
    values = {}
    for name in kind.model_fields:
        if inner := kind_of(kind, name, row.get(name)):
            values[name] = _setting(inner, row.rename({name: "kind"}))
        elif name in row:
            values[name] = row[name]
    return kind(**values)
