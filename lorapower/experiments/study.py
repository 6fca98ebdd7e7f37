"""What experiments share: methods that adapt a frozen network, and the best of a grid.

An experiment's module has ``Problem`` (networks and data), ``Setting`` (a problem and a method),
``Found`` (what a run gives) and ``measure`` (of settings of one problem), for `sweeps.run`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field

from .._records import Record
from ..adapters.core import Adapters
from ..constructions.general import adapt
from ..networks.layers import FNN
from ..regions import Region
from . import sweeps
from ._training import Gradient

Rank = Annotated[int, Field(ge=0)]
Ranks = Rank | tuple[Rank, ...]


class Construction(Record):
    """The theorems' adapters; ``ranks`` is one for all, or one for each weight."""

    kind: Literal["construction"] = "construction"
    ranks: Ranks = 0


class Fitted(Record):
    """The construction for the target nearest on inputs, see `constructions.fitted.nearest`."""

    kind: Literal["fitted"] = "fitted"
    ranks: Ranks = 0


class Lora(Gradient):
    """Adapters, and ``biases`` or not, by Adam with weight decay as an L2 penalty.

    ``ranks`` is one for all, or one for each weight.
    """

    kind: Literal["lora"] = "lora"
    ranks: Ranks = 0


class Final(Gradient):
    """The last weights, ``final`` of them, in full by Adam."""

    kind: Literal["final"] = "final"
    final: int = Field(1, ge=1)


def construct(frozen: Any, target: Any, ranks: Any, region: Region) -> Adapters:
    """The theorems' adapters, whatever digits rounding leaves; a ReLU network's over a region."""
    inputs = region if isinstance(frozen, FNN) else None
    return adapt(frozen, target, ranks, inputs, throw=False).adapters


def keep_best(table: pd.DataFrame, record: type[Record]) -> pd.DataFrame:
    """The row of least validation loss for each setting, learning rate and weight decay aside.

    ``table`` has settings of class ``record``. A run that diverged counts by its loss before that.
    """
    of_grid = ("learning_rate", "weight_decay")
    same = [name for name in sweeps.columns(record) if name in table and name not in of_grid]
    ordered = table.sort_values("validation_loss", kind="stable", na_position="last")
    return ordered.groupby(same, sort=False, dropna=False).head(1).sort_index()
