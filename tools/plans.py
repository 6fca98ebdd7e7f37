"""Compare ways to plan an adapter for a tuned language model, for `pairs.read_plans`.

Adds rows to a table as they are measured, and skips those that are there::

    python tools/plans.py plans.csv NAME BASE TUNED KIND 1,4,16 [FOLDER ...]

``NAME`` is the tuning's, ``KIND`` that of the rated sentences to plan and to measure with. Each
``FOLDER`` has an adapter that another tool extracted, named ``TOOL-RANK``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lorapower.adapters import _files
from lorapower.checkpoints import Pair, Planner, workflow
from lorapower.experiments import pairs

PLANNING, HELD_OUT = 300, 150
METHODS = ("uniform", "energy", "effect")
AIMS = (0.3, 0.2, 0.1)


def measure(
    place: Path,
    name: str,
    base: str,
    tuned: str,
    kind: str,
    ranks: Sequence[int],
    others: Sequence[Path],
) -> None:
    """Measure all methods at the parameters of uniform ranks, and the least for stated errors."""
    start = time.perf_counter()
    texts = pairs.texts(kind, "test")
    planner = Planner(
        Pair.open(base, tuned), texts[:PLANNING], held_out=texts[PLANNING : PLANNING + HELD_OUT]
    )
    prepared = time.perf_counter() - start

    def keep(method: str, asked: float, parameters: int, measured: Any, seconds: float) -> None:
        row = {"tuning": name, "method": method, "asked": asked, "parameters": parameters}
        row |= measured._asdict() | {"seconds": seconds, "prepared": prepared}
        pd.DataFrame([row]).to_csv(place, mode="a", header=not place.exists(), index=False)
        print(row, flush=True)

    def done(method: str, asked: float) -> bool:
        if not place.exists():
            return False
        known = pd.read_csv(place)
        return bool(
            ((known.tuning == name) & (known.method == method) & (known.asked == asked)).any()
        )

    for folder in others:
        tool, _, size = folder.name.rpartition("-")
        if not done(tool, int(size)):
            numbers, _ = _files.measure_peft(folder)
            loaded = workflow._load(folder, planner.pair)
            keep(tool, int(size), numbers, planner.test.measure(loaded), 0.0)
    for rank in ranks:
        for method in METHODS:
            if not done(method, rank):
                start = time.perf_counter()
                adapter = planner.candidate(method, planner.parameters(rank))
                seconds = time.perf_counter() - start
                keep(method, rank, adapter.parameters, planner.measure(adapter), seconds)
    for aim in AIMS:
        if not done("least", aim):
            start = time.perf_counter()
            _, adapter = planner.smallest(aim)
            seconds = time.perf_counter() - start
            keep("least", aim, adapter.parameters, planner.measure(adapter), seconds)


if __name__ == "__main__":
    out, name, base, tuned, kind, given, *folders = sys.argv[1:]
    measure(
        Path(out),
        name,
        base,
        tuned,
        kind,
        [int(rank) for rank in given.split(",")],
        [*map(Path, folders)],
    )
