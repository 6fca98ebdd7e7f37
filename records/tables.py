"""Put long runs of language models beside this file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas as pd
import torch

HERE = Path(__file__).resolve().parent


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
