"""Methods that adapt a frozen network, for all kinds of experiments, and the best of a grid."""

from __future__ import annotations

from typing import Annotated, Literal

import pandas as pd
from pydantic import Field

from .._records import Record
from . import sweeps
from ._training import Gradient

Rank = Annotated[int, Field(ge=0)]
# One for all weights, or one for each.
Ranks = Rank | tuple[Rank, ...]


class Construction(Record):
    """Adapt by the theorems' construction."""

    kind: Literal["construction"] = "construction"
    ranks: Ranks = 0


class Fitted(Record):
    """Adapt by the construction for the target nearest on inputs (`constructions.fitted`)."""

    kind: Literal["fitted"] = "fitted"
    ranks: Ranks = 0


class Lora(Gradient):
    """Train adapters, and ``biases`` or not, by Adam with weight decay as an L2 penalty."""

    kind: Literal["lora"] = "lora"
    ranks: Ranks = 0


class Final(Gradient):
    """Train the last weights, ``final`` of them, in full by Adam."""

    kind: Literal["final"] = "final"
    final: int = Field(1, ge=1)


def keep_best(table: pd.DataFrame, record: type[Record]) -> pd.DataFrame:
    """Keep the row of least validation loss of each setting, rate and weight decay aside.

    ``table`` has settings of class ``record``. A run that diverged counts by its loss before that.
    """
    of_grid = ("learning_rate", "weight_decay")
    same = [name for name in sweeps.columns(record) if name in table and name not in of_grid]
    ordered = table.sort_values("validation_loss", kind="stable", na_position="last")
    return ordered.groupby(same, sort=False, dropna=False).head(1).sort_index()
