"""Compare adapters of a tuned language model, for `checkpoints.read_record`.

Two tables get rows when an adapter is measured: one of adapters, one of texts. What is there is not
measured again::

    python -m records.plans FOLDER NAME TUNED KIND TEXTS AIMS [ADAPTER ...]

``NAME`` is the tuning's, of the packaged language model; ``KIND`` is that of the rated sentences to
plan with and, with at most so many ``TEXTS``, to measure with. The least adapters are looked for
with errors of at most each of ``AIMS``, such as 0.3,0.1. An ``ADAPTER`` is a folder that another
tool wrote, named ``TOOL-RANK``.
The last step puts the tables into the package::

    python -m records.plans FOLDER
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

import records as _record
from lorapower.checkpoints import Adapter, Pair, Planner, _export
from lorapower.checkpoints import _models as hub
from lorapower.checkpoints import _peft_files as _files
from records import pairs

# Texts for planning, of which as many are used as a plan takes.
PLANNING = 300
# Of an adapter that is to shrink, beside those of tools.
METHODS = ("energy", "uniform", "effect")
RANKS = (1, 4, 16)
# Uniform ranks among which the least for an error is looked for.
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Of a tuning of all weights embeddings are carried, as by mergekit; only blocks get factors.
BLOCKS = r"^model\.layers\."


class Comparison:
    """The tables of one tuning."""

    def __init__(
        self, folder: Path, name: str, tuned: str, kind: str, number: str, aims: str
    ) -> None:
        self._name, self._tuned, self._kind = name, tuned, kind
        self._number, self._aims = int(number), [float(aim) for aim in aims.split(",")]
        self._files = [folder / file for file in _record.TABLES]

    def run(self, others: list[Path]) -> None:
        """Measure all adapters that are missing."""
        blocks = self._plan(BLOCKS)
        budgets = {rank: blocks.parameters(rank) for rank in RANKS}
        for place in others:
            tool, _, number = place.name.rpartition("-")
            if self._lacks(tool, int(number)):
                carried, size = _files.measure_peft(place)
                network = _export.load(place, blocks.pair)
                self._add(blocks, network, tool, int(number), carried=carried, bytes=size)
        if others:
            self._compare(blocks, ("effect",), budgets, " of blocks")
        planner = self._plan("all")
        self._compare(planner, ("effect",) if others else METHODS, budgets)
        for aim in self._aims:
            for method in ("effect", "uniform"):
                if self._lacks(f"least {method}", aim):
                    start = time.perf_counter()
                    adapter = _least(planner, method, aim)
                    self._keep(planner, adapter, f"least {method}", aim, start)

    def _compare(
        self, planner: Planner, methods: Iterable[str], budgets: Mapping[int, int], label: str = ""
    ) -> None:
        for method in methods:
            for rank, budget in budgets.items():
                if self._lacks(method + label, rank):
                    start = time.perf_counter()
                    adapter = planner.candidate(method, budget)
                    self._keep(planner, adapter, method + label, rank, start)

    def _plan(self, modules: str) -> Planner:
        pair = Pair.open(hub.LANGUAGE, self._tuned)
        planning, held_out = (pairs.texts(self._kind, part) for part in ("validation", "test"))
        return Planner(
            pair, planning[:PLANNING], held_out=held_out[: self._number], modules=modules
        )

    def _keep(
        self, planner: Planner, adapter: Adapter, method: str, asked: float, start: float
    ) -> None:
        seconds = time.perf_counter() - start
        pair = planner.pair
        network = pair.skeleton()
        options = _export.peft_options(pair, network, adapter)
        carried, size = _files.estimate_peft(network, adapter.ranks, **options)
        planner.put(adapter)
        about = {"parameters": adapter.parameters, "carried": carried, "bytes": size}
        self._add(planner, planner.network, method, asked, seconds=seconds, **about)

    def _add(
        self, planner: Planner, network: Any, method: str, asked: float, **about: float
    ) -> None:
        found = planner.test.compare(network)
        key: dict[str, Any] = {"tuning": self._name, "method": method, "asked": asked}
        texts = pd.DataFrame(found._asdict()).assign(effect=planner.test.effect, **key)
        self._append(1, texts.reset_index(names="text"))
        versions = {name: metadata.version(name) for name in ("lorapower", "torch", "peft")}
        row = {"parameters": None, "seconds": None} | about | versions
        self._append(0, pd.DataFrame([key | row]))
        print(key | about, flush=True)

    def _lacks(self, method: str, asked: float) -> bool:
        if not self._files[0].exists():
            return True
        known = pd.read_csv(self._files[0])
        same = (known.tuning == self._name) & (known.method == method) & (known.asked == asked)
        return not same.any()

    def _append(self, which: int, rows: pd.DataFrame) -> None:
        place = self._files[which]
        rows.to_csv(place, mode="a", header=not place.exists(), index=False, float_format="%.6g")


def _least(planner: Planner, method: str, aim: float) -> Adapter:
    """The smallest adapter with at most an error on the texts for choosing, or the largest."""
    if method == "effect":
        return planner.smallest(aim)[1]
    for rank in LADDER:
        adapter = planner.candidate(method, planner.parameters(rank))
        if planner.error(adapter) <= aim:
            break
    return adapter


def record(folder: Path, package: Path) -> None:
    """Put the tables into the package, compressed alike at any time."""
    for name in _record.TABLES:
        table = pd.read_csv(folder / name)
        target = package / f"{name}.gz"
        table.to_csv(target, index=False, compression={"method": "gzip", "mtime": 0})


if __name__ == "__main__":
    out, *rest = sys.argv[1:]
    if rest:
        name, tuned, kind, number, aims, *adapters = rest
        Comparison(Path(out), name, tuned, kind, number, aims).run([*map(Path, adapters)])
    else:
        record(Path(out), Path(__file__).parent)
