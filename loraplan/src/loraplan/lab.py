"""Parts of the planner for experiments: streams, derivatives, choices and measurements.

The command needs none of these names; records of experiments do, and so may anybody who compares
ways to choose an adapter. They may change between versions.
"""

from ._effect import Directions, Moments, Slopes, choose, draw_rows
from ._export import estimate, measure_peft
from ._export import load as load_adapter
from ._lowrank import LowRank
from ._measuring import TunedOutputs, measure_networks
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
    "measure_networks",
    "measure_peft",
    "package_folder",
    "place",
    "public_name",
    "quiet",
    "stream",
    "tokenizer",
]
