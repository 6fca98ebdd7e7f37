"""Put a long run of language models into the package, for `protocols.read_record`.

Takes its name there, and the files that the encoders' chapter, with profile paper, leaves in its
folder of results::

    python -m records.record movies runs/rates.sqlite runs/texts.sqlite
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lorapower.experiments import sweeps
from records import language


def record(
    files: Sequence[Path | str], place: Path, kind: type[sweeps.Record] = language.Setting
) -> pd.DataFrame:
    """The runs of all files as one compressed table, in an order that does not depend on theirs."""
    table = pd.concat([sweeps.read(file) for file in files])
    settings = sweeps.columns(kind)
    table = table.drop_duplicates(settings).sort_values(settings, ignore_index=True)
    # The moment of writing is no part of the contents.
    table.to_csv(place, index=False, compression={"method": "gzip", "mtime": 0})
    return table


def put(name: str, files: Sequence[Path | str]) -> None:
    """Record the runs of all files in the package."""
    folder = Path(__file__).parent
    found = record(files, folder / f"{name}.csv.gz")
    print(f"{len(found)} runs, {found.seconds.sum() / 3600:.1f} hours of training")


if __name__ == "__main__":
    put(sys.argv[1], sys.argv[2:])
