"""Put long runs of language models beside this file, and read settings back from them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, TypeVar, get_args

import pandas as pd
import torch

from lorapower.experiments import sweeps

HERE = Path(__file__).resolve().parent

R = TypeVar("R", bound=sweeps.Record)


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


def settings(table: pd.DataFrame, kind: type[R]) -> list[R]:
    """Read the setting of each row of a table back, as a record of a kind."""
    return [_setting(kind, row.dropna()) for _, row in table.convert_dtypes().iterrows()]


def _setting(kind: type[R], row: pd.Series[Any]) -> R:
    values = {}
    for name, field in kind.model_fields.items():
        # A record within a record is of one kind, or of several that have their column.
        among: list[Any] = [field.annotation, *get_args(field.annotation)]
        kinds = [k for k in among if isinstance(k, type) and issubclass(k, sweeps.Record)]
        if kinds:
            inner = next((k for k in kinds if row.get(name) in _names(k)), kinds[0])
            values[name] = _setting(inner, row.rename({name: "kind"}))
        elif name in row:
            values[name] = row[name]
    return kind(**values)


def _names(kind: type[sweeps.Record]) -> tuple[Any, ...]:
    return get_args(kind.model_fields["kind"].annotation) if "kind" in kind.model_fields else ()
