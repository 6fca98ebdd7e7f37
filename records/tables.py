"""Put long runs of language models beside this file, for `records.read`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import joblib
import pandas as pd
import torch

from lorapower.experiments import sweeps

HERE = Path(__file__).resolve().parent


def begin() -> list[str]:
    """Enter the folder that the command line names first; return what it says after that.

    Files of runs, and folders of networks, are in the working directory of these commands, also of
    their workers. They compute on one thread, as recorded runs do.
    """
    folder, *others = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    torch.set_num_threads(1)
    return others


def workers() -> joblib.parallel_config:
    """Run batches in two processes of one thread each, which do more than two threads."""
    return joblib.parallel_config("loky", n_jobs=2, inner_max_num_threads=1)


def put(table: pd.DataFrame, name: str, folder: Path = HERE) -> None:
    """Write a table, compressed; its bytes do not depend on the moment."""
    table.to_csv(folder / f"{name}.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})
    print(f"{name}: {len(table)} rows")


def merge(files: Sequence[Path | str], kind: type[sweeps.Record]) -> pd.DataFrame:
    """Read the runs of all files as one table, in an order that does not depend on theirs."""
    table = pd.concat([sweeps.read(file) for file in files])
    settings = [name for name in columns(kind) if name in table]
    return table.drop_duplicates(settings).sort_values(settings, ignore_index=True)


def columns(record: type[sweeps.Record], name: str = "") -> list[str]:
    """List the columns of a class's settings in a table, of all kinds that its fields name."""
    names = []
    for field, about in record.model_fields.items():
        kinds = [
            kind for kind in (about.annotation, *get_args(about.annotation)) if _is_record(kind)
        ]
        inner = [column for kind in kinds for column in columns(kind, field)]
        names += [*dict.fromkeys(inner)] or [name if field == "kind" else field]
    return names


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, sweeps.Record)
