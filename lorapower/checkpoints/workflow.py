"""Ranks for a stated error, the adapter that has it, anybody's adapter measured: a call each."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _checks
from .._subnormal import flushing
from ..errors import InputError, LorapowerError
from . import export
from .adapter import Adapter
from .measuring import Measured, Reference
from .pair import Pair
from .planner import METHODS, PATHS, STEPS, Planner, Report, silent
from .texts import count, whole

if TYPE_CHECKING:
    import pandas as pd

#: What is aimed at where nothing is asked for.
ERROR = 0.1
# Held-out texts are looked at again when they show more error than was aimed at.
LOOKS = 4
RELOADED = 1e-5


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Ranks of modules, the adapter that has them, and what it loses.

    Attributes
    ----------
    planner : Planner
        The pair and its texts, made ready.
    adapter : Adapter
        Factors and biases.
    method : str
        Which of `METHODS` chose its ranks.
    repaired : bool
        Whether it was fitted to the tuned network after that.
    measured : Measured
        On held-out texts.
    predicted : float
        The error to first order, of the adapter before repair.
    aim : float or None
        The error that was asked for, or nothing.
    looks : int
        How many adapters were measured on held-out texts until this was taken, at least 1; the
        limit of the error is meant for 1.
    shares : dict
        Of each module the part of the effect that its missing directions cost alone, predicted and
        measured, in plans without repair.
    baselines : dict
        The error on held-out texts of each method at as many parameters, without repair.
    attention : float
        The error on held-out texts with all attention modules as tuned and no other.
    seconds : float
        That it took.
    """

    planner: Planner
    adapter: Adapter
    method: str
    repaired: bool
    measured: Measured
    predicted: float
    aim: float | None
    looks: int
    shares: dict[str, tuple[float, float]]
    baselines: dict[str, float]
    attention: float
    seconds: float

    @property
    def ranks(self) -> dict[str, int]:
        """Of all modules, also those of rank 0."""
        return {name: self.adapter.ranks.get(name, 0) for name in self.planner.modules}

    @property
    def reached(self) -> bool:
        """Whether the error on held-out texts is at most what was asked for."""
        return self.aim is None or self.measured.error <= self.aim

    def __repr__(self) -> str:
        return (
            f"Plan(error {self.measured.error:.3g}, at most {self.measured.error_upper:.3g}; "
            f"{self.adapter.parameters} parameters, ranks to "
            f"{max(self.adapter.ranks.values(), default=0)})"
        )

    def table(self) -> pd.DataFrame:
        """A row for each module: its size, rank, and the shares that its missing part costs."""
        import pandas as pd

        modules = self.planner.modules.values()
        return pd.DataFrame(
            {
                "module": [module.name for module in modules],
                "kind": [module.kind for module in modules],
                "out": [module.shape[0] for module in modules],
                "in": [module.shape[1] for module in modules],
                "rank": [*self.ranks.values()],
                **{
                    name: [self.shares.get(m.name, (math.nan,) * 2)[i] for m in modules]
                    for i, name in enumerate(("predicted", "measured"))
                },
            }
        )

    def report(self) -> dict[str, Any]:
        """All of it for machines: numbers and texts under names; nothing for what is NaN."""
        planner = self.planner
        measured = {k: v for k, v in self.measured._asdict().items() if k != "texts"}
        found = {
            "base": planner.pair.base.source,
            "tuned": planner.pair.tuned.source,
            "architecture": planner.pair.family.architecture,
            **measured,
            "predicted_error": self.predicted,
            "asked_error": self.aim,
            "reached": self.reached,
            "equal": planner.equal,
            "parameters": self.adapter.parameters,
            "modules": len(planner.pair.modules),
            "ranks": {name: rank for name, rank in self.ranks.items() if rank},
            "method": self.method,
            "repaired": self.repaired,
            "baseline_errors": self.baselines,
            "attention_only": self.attention,
            "not_low_rank": planner.pair.not_low_rank,
            "left_out": sorted(planner.leave),
            "texts": count(planner.texts.fitting) + count(planner.texts.choosing),
            "held_out_texts": self.measured.texts,
            "cut_texts": planner.texts.cut,
            "looks": self.looks,
            "options": planner.options,
            "seconds": self.seconds,
            "versions": {
                name: metadata.version(name)
                for name in ("lorapower", "torch", "transformers", "peft")
            },
        }
        return finite(found)


@flushing()
def plan(
    base: str,
    tuned: str,
    texts: Sequence[str],
    *,
    error: float | None = None,
    parameters: int | None = None,
    rank: int | None = None,
    repair: bool = False,
    steps: int = STEPS,
    by_module: bool = True,
    report: Report | None = None,
    **options: Any,
) -> Plan:
    """Which rank each module needs: for a stated error, or for so many parameters.

    An error that the highest ranks do not reach is no failure: ``reached`` says so, and the plan is
    the nearest. Raises `InputError` for what is not usable, before any text is passed.

    Parameters
    ----------
    base, tuned : str
        As for `Pair.open`.
    texts : sequence of str
        At least 120 like those that the model is for; labels are not needed.
    error : float, optional
        The part of the tuning's effect that may be lost (`Measured`); `ERROR` if nothing else is
        asked for. The least number of parameters is looked for.
    parameters : int, optional
        Numbers of the factors, at most.
    rank : int, optional
        As many parameters as this rank for all modules takes.
    repair : bool
        Whether the adapter is fitted to the tuned network (`Planner.repaired`).
    steps : int
        Of repair by gradient.
    by_module : bool
        Whether what each module alone costs is measured.
    report : Report, optional
        Is told of progress.
    options
        Of `Planner`: ``held_out``, ``modules``, ``leave``, ``tokens``, ``max_rank``, ``bucket``,
        ``seed``.
    """
    start = time.perf_counter()
    asked = {"error": error, "parameters": parameters, "rank": rank}
    if len(given := [name for name, value in asked.items() if value is not None]) > 1:
        raise InputError(
            "error, parameters, rank", allowed="one of them at most", given=" and ".join(given)
        )
    aim = (ERROR if not given else None) if error is None else _aim(error)
    if parameters is not None:
        _checks.integer("parameters", parameters, 0)
    if rank is not None:
        _checks.integer("rank", rank, 0)
    _checks.integer("steps", steps, 0)
    planner = Planner(Pair.open(base, tuned), texts, report=report, **options)
    if planner.equal:
        return _nothing(planner, aim, time.perf_counter() - start)
    wanted = parameters if rank is None else planner.parameters(rank)
    adapter, raw, method, measured, looks = _found(planner, aim, wanted, repair, steps)
    shares = planner.shares(method, raw) if by_module and not repair else {}
    baselines = {
        name: planner.measure(planner.candidate(name, adapter.parameters)).error for name in METHODS
    }
    return Plan(
        planner,
        adapter,
        method,
        adapter is not raw,
        measured,
        planner.predicted(raw),
        aim,
        looks,
        shares,
        baselines,
        planner.only("attention"),
        time.perf_counter() - start,
    )


@flushing()
def extract(
    base: str,
    tuned: str,
    texts: Sequence[str],
    out: Path | str,
    *,
    repair: bool = True,
    force: bool = False,
    **options: Any,
) -> Plan:
    """Plan an adapter, write it, read it back through peft and measure it again.

    Nothing is written where the error asked for is not reached. Raises `InputError` as `plan`, and
    for a folder that exists; `ResultsError` where it cannot be written; `LorapowerError` if what is
    read back has another error than stated.

    Parameters
    ----------
    base, tuned, texts, repair, options
        As for `plan`.
    out : Path or str
        The folder, with the adapter, ``report.json`` and a model card.
    force : bool
        Whether an adapter that is there is replaced.
    """
    folder = export.place(out, force)
    start = time.perf_counter()
    found = plan(base, tuned, texts, repair=repair, by_module=False, **options)
    if not found.reached:
        return found
    planner = found.planner
    with export.written(folder) as partial:
        export.save(partial, planner.pair, planner.network, found.adapter, leave=planner.leave)
        # One network at a time.
        planner.network = None
        planner.network = export.load(partial, planner.pair)
        again = planner.held_out.measure(planner.network, seed=planner.seed)
        stated = found.measured.error
        if not abs(again.error - stated) <= max(RELOADED * stated, 1e-6):
            raise LorapowerError(
                f"the adapter read back has error {again.error:.6g}, not the {stated:.6g} that was "
                "measured: nothing was written; please report this with the names of both models"
            )
        found = replace(found, seconds=time.perf_counter() - start)
        written = found.report() | {
            "adapter_bytes": export.size(partial),
            "reloaded_error": again.error,
        }
        export.describe(partial, written)
    return found


@flushing()
def check(
    base: str,
    adapter: str,
    tuned: str,
    texts: Sequence[str],
    *,
    report: Report | None = None,
    **options: Any,
) -> Measured:
    """What anybody's adapter of peft loses against the tuned model, on all texts.

    Raises `InputError` for what is not usable.

    Parameters
    ----------
    base, adapter, tuned : str
        Checkpoints, and the adapter's folder.
    texts : sequence of str
        At least 60.
    report : Report, optional
        Is told of progress.
    options
        ``tokens`` and ``seed``, as of `Planner`.
    """
    pair = Pair.open(base, tuned)
    batches = whole(texts, pair.words, pair.tuned.config, **options)
    reference = Reference(batches, pair.family.task)
    network = pair.network()
    told = report or silent
    reference.tuned(network)
    told("passing texts", 1, 3)
    pair.fill(network, "base")
    reference.base(network)
    told("passing texts", 2, 3)
    del network
    found = reference.measure(export.load(adapter, pair))
    told("passing texts", 3, 3)
    if math.isnan(found.error):
        raise InputError(
            "adapter",
            allowed="one that brings the head that the base lacks",
            given=f"{adapter}, with which outputs are NaN",
        )
    return found


@flushing()
def compare(
    planner: Planner,
    parameters: Sequence[int],
    *,
    methods: Sequence[str] = tuple(METHODS),
    repaired: Collection[int] = (),
    steps: int = STEPS,
) -> pd.DataFrame:
    """Errors of methods at equal numbers of parameters: a row for each, with `Measured`'s columns.

    ``ranks`` are those of the modules, and ``used`` is how many parameters they take.

    Parameters
    ----------
    planner : Planner
        The pair and its texts.
    parameters : sequence of int
        Numbers of the factors.
    methods : sequence of str
        Among `METHODS`.
    repaired : Collection
        Numbers at which the best of `PATHS`, on the texts for choosing, is repaired as well.
    steps : int
        Of repair.
    """
    import pandas as pd

    rows = []

    def add(method: str, asked: int, adapter: Adapter) -> None:
        rows.append(
            {
                "method": method,
                "parameters": asked,
                "used": adapter.parameters,
                **planner.measure(adapter)._asdict(),
                "ranks": adapter.ranks,
            }
        )

    for asked in parameters:
        for method in methods:
            add(method, asked, planner.candidate(method, asked))
        if asked in repaired:
            best = _best(planner, asked)[1]
            add("repaired", asked, planner.repaired(best, steps=steps))
    return pd.DataFrame(rows)


def finite(found: Mapping[str, Any]) -> dict[str, Any]:
    """With nothing in place of numbers that JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in found.items()
    }


def _aim(error: float) -> float:
    value = _checks.finite("error", error)
    if not 0 < value <= 1:
        raise InputError("error", allowed="above 0 and at most 1, the base's own", given=value)
    return value


def _nothing(planner: Planner, aim: float | None, seconds: float) -> Plan:
    """The plan for two checkpoints that do the same."""
    adapter = Adapter({}, {})
    same = Measured(0.0, 0.0, 1.0, 1.0, 0.0, count(planner.texts.held_out))
    baselines = dict.fromkeys(METHODS, 0.0)
    return Plan(planner, adapter, "uniform", False, same, 0.0, aim, 1, {}, baselines, 0.0, seconds)


def _best(planner: Planner, parameters: int) -> tuple[str, Adapter, float]:
    """Of the methods by gain for cost the one with the least error on the texts for choosing."""
    found = [(name, planner.candidate(name, parameters)) for name in PATHS]
    errors = [planner.error(adapter) for _, adapter in found]
    i = errors.index(min(errors))
    return *found[i], errors[i]


def _found(
    planner: Planner, aim: float | None, wanted: int | None, repair: bool, steps: int
) -> tuple[Adapter, Adapter, str, Measured, int]:
    """The adapter, as it was before repair, its method, its errors, and looks at held-out texts."""
    if aim is None:
        assert wanted is not None
        method, raw, _ = _best(planner, wanted)
        adapter = planner.repaired(raw, steps=steps) if repair else raw
        return adapter, raw, method, planner.measure(adapter), 1
    target, before, look = aim, -1, 0
    while True:
        look += 1
        raw, method = _least(planner, target)
        measured = planner.measure(raw)
        if measured.error <= aim or raw.parameters == before or look == LOOKS:
            break
        # What was enough for the texts for choosing was not for these.
        target *= 0.95 * aim / measured.error
        before = raw.parameters
    if not repair:
        return raw, raw, method, measured, look
    # Of repaired ones the smallest that will do, or else one of as many parameters.
    start, fitted = _smaller(planner, target, method, raw, steps)
    found, look = planner.measure(fitted), look + 1
    if found.error > aim and start is not raw:
        start, fitted = raw, planner.repaired(raw, steps=steps)
        found, look = planner.measure(fitted), look + 1
    if found.error <= max(aim, measured.error):
        return fitted, start, method, found, look
    return raw, raw, method, measured, look


def _least(planner: Planner, target: float) -> tuple[Adapter, str]:
    """The smallest adapter with at most an error on the texts for choosing, or the largest."""
    number = planner.least(target, "two metrics")
    method, raw, error = _best(planner, planner.most if number is None else number)
    if method != "two metrics" and number is not None and error < target:
        smaller = planner.least(target, method)
        raw = planner.candidate(method, number if smaller is None else smaller)
    return raw, method


def _smaller(
    planner: Planner, target: float, method: str, raw: Adapter, steps: int
) -> tuple[Adapter, Adapter]:
    """Of fewer parameters, what has at most an error once it is repaired; and repaired."""
    low, high = planner.parameters(1) // 8, raw.parameters
    best: tuple[Adapter, Adapter] | None = None
    for _ in range(4):
        if high <= 1.2 * low:
            break
        middle = round(math.sqrt(low * high))
        start = planner.candidate(method, middle)
        fitted = planner.repaired(start, steps=steps)
        if planner.error(fitted) <= target:
            best, high = (start, fitted), middle
        else:
            low = middle
    return best or (raw, planner.repaired(raw, steps=steps))
