"""Parts of the planner for experiments: streams, derivatives, choices and measurements.

The command needs none of these names; records of experiments do, and so may anybody who compares
ways to choose an adapter. They may change between versions.
"""

from __future__ import annotations

from collections.abc import Collection

from ._effect import Directions, Moments, Slopes, choose, draw_rows
from ._example import write as write_example
from ._export import estimate, measure_peft
from ._export import load as load_adapter
from ._lowrank import LowRank
from ._measuring import Measured, TunedOutputs, measure_networks
from ._models import (
    LANGUAGE,
    PACKAGED,
    Rows,
    has_bfloat16,
    load,
    package_folder,
    place,
    public_name,
    quiet,
    tokenizer,
)
from ._streams import Network, TextStates, advance, stream
from ._texts import count_tokens
from .pair import Adapter
from .planner import Planner

__all__ = [
    "LANGUAGE",
    "PACKAGED",
    "Directions",
    "LowRank",
    "Moments",
    "Network",
    "Rows",
    "Slopes",
    "TextStates",
    "TunedOutputs",
    "advance",
    "choose",
    "count_tokens",
    "draw_rows",
    "estimate",
    "has_bfloat16",
    "load",
    "load_adapter",
    "measure",
    "measure_networks",
    "measure_peft",
    "moments",
    "package_folder",
    "place",
    "public_name",
    "quiet",
    "stream",
    "tokenizer",
    "write_example",
]


def measure(planner: Planner, adapter: Adapter) -> Measured:
    """Measure what an adapter loses on a planner's texts for stating."""
    return planner.test.summarize(planner.run((adapter, "test"))[0].compare())


def moments(planner: Planner, names: Collection[str]) -> dict[str, Moments]:
    """Take `Moments` of inputs and outputs of a planner's linear modules at the tuned network."""
    taken: dict[str, Moments | None] = {}
    slopes = planner.slopes({name: planner.modules[name] for name in names})
    slopes.collect_derivatives(taken.__setitem__, None)
    return {name: rows for name, rows in taken.items() if rows is not None}
