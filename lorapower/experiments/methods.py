"""Methods that adapt a frozen network to a target, whatever the problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from .._records import Record, Results
from ..adapters.core import Adapters
from ..constructions.general import adapt
from ..errors import InputError, brief
from ..networks.fnn import FNN
from ..networks.linear import LinearNetwork
from ..networks.transformer import Transformer
from ..regions import Region
from ..training.engine import train
from ..training.tuning import LARGEST, Data, Tuning

Network = LinearNetwork | FNN | Transformer
Rank = Annotated[int, Field(ge=0)]
Ranks = Rank | tuple[Rank, ...]


class Construction(Record):
    """The theorems' adapters; ``ranks`` is one for all, or one for each weight."""

    kind: Literal["construction"] = "construction"
    ranks: Ranks = 0


class Fitted(Record):
    """The construction for the nearest target that the ranks reach on the training inputs.

    See `constructions.fitted.nearest`.
    """

    kind: Literal["fitted"] = "fitted"
    ranks: Ranks = 0


class Gradient(Record):
    """What Adam tunes.

    Attributes
    ----------
    biases : bool
        Whether they are tuned.
    learning_rate, weight_decay : float
        Of Adam; the decay is its L2 penalty.
    """

    biases: bool = True
    learning_rate: float = Field(1e-3, gt=0, le=LARGEST)
    weight_decay: float = Field(0.0, ge=0, le=LARGEST)

    def tuning(self) -> Tuning:
        """What `training.train` is told."""
        return Tuning(**self.model_dump(exclude={"kind"}))


class Lora(Gradient):
    """Adapters by Adam; ``ranks`` is one for all, or one for each weight."""

    kind: Literal["lora"] = "lora"
    ranks: Ranks = 0


class Final(Gradient):
    """The last weights, ``final`` of them, in full by Adam."""

    kind: Literal["final"] = "final"
    final: int = Field(1, ge=1)


class Trained(Results):
    """How training went: the least validation loss, and the step at which it was met.

    What does not apply, to a construction, is NaN, or step −1.
    """

    validation_loss: float = math.nan
    best_step: int = -1
    diverged: bool = False


def common_problem(settings: Sequence[Any]) -> Any:
    """The problem that all of the settings have; raises `InputError` for several."""
    if not isinstance(settings, Sequence) or not settings:
        raise InputError("settings", allowed="a list of at least one", given=brief(settings))
    if not all(hasattr(setting, "problem") for setting in settings):
        raise InputError("settings", allowed="of a problem", given=brief(settings))
    problem, *others = dict.fromkeys(setting.problem for setting in settings)
    if others:
        raise InputError("settings", allowed="of one problem", given=f"{len(others) + 1} of them")
    return problem


def adapted(
    methods: Sequence[Any],
    frozen: Network,
    data: Data,
    construction: Callable[[Any], Adapters],
    **training: Any,
) -> list[tuple[Any, Trained]]:
    """For each method the network that it makes of the frozen one, and how its training went.

    Those by gradient are trained at once, with the options of `training.train`; the adapters of
    others are what ``construction`` returns.
    """
    place = {m: i for i, m in enumerate(dict.fromkeys(m for m in methods if _trains(m)))}
    if place:
        runs = train(frozen, [method.tuning() for method in place], data, **training)
    found = []
    for method in methods:
        if method in place:
            i = place[method]
            about = Trained(
                validation_loss=float(runs.best_loss[i]),
                best_step=int(runs.best_step[i]),
                diverged=bool(runs.diverged[i]),
            )
            found.append((runs.network[i], about))
        else:
            found.append((construction(method).merge(frozen), Trained()))
    return found


def construct(frozen: Any, target: Any, ranks: Any, region: Region) -> Adapters:
    """The theorems' adapters, whatever digits rounding leaves; a ReLU network's over a region."""
    inputs = region if isinstance(frozen, FNN) else None
    return adapt(frozen, target, ranks, inputs, throw=False).adapters


def _trains(method: Any) -> bool:
    return isinstance(method, Gradient)
