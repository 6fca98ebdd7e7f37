"""Ranks for a stated error, their adapter, and the error of anybody's adapter: one call each."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _checks
from ..errors import InputError, LorapowerError
from . import _export, _gguf, _peft_files
from . import _models as hub
from ._measuring import (
    TOKENS,
    Measured,
    Readout,
    Reference,
    count,
    largest_share,
    paired_ratio,
    prepare_all,
    without_nan,
)
from .pair import KINDS, Adapter, Pair
from .planner import STEPS, Planner, Report

if TYPE_CHECKING:
    import pandas as pd

# Methods whose errors at as many parameters are stated beside a plan's.
BASELINES = ("uniform", "energy", "plain")
#: The error that is aimed at by default.
ERROR = 0.1
# How often texts for stating may be looked at, if they show more error than was aimed at.
LOOKS = 4
# Options of `Planner` for servers of many adapters, which hold factors of few ranks and no more.
SERVING = {"max_rank": 16, "bucket": 8, "leave": KINDS}
# Relative tolerance of the error of an adapter that is read back.
RELOADED = 1e-5


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Ranks of modules, the adapter that has them, and what it loses.

    ``method``, one of `METHODS`, chose the ranks. ``aim`` is the error that was asked for, if any;
    ``predicted`` is the one to first order before repair; ``attention`` is the error on held-out
    texts if only the attention modules are tuned, in full. ``baselines`` has for each method the
    error there without repair, and the number of parameters: at most those asked for or the
    adapter's, except that ``uniform`` and ``energy`` have at least rank 1. ``shares`` are those of
    `Planner.losses`, empty in plans with repair. ``looks`` adapters were measured on held-out
    texts; the error's limit is meant for 1. If ``sure``, that limit was to be at most the aim.
    ``versus_uniform`` is the error over that of ``uniform``, with its limits at 95%, paired by
    texts; ``largest_share`` is the part of the squared error in the worst twentieth of the texts.
    ``carried`` counts all numbers in the adapter's file (factors, biases, heads, rows of
    embeddings); ``size`` is in bytes, estimated before writing.
    """

    planner: Planner
    adapter: Adapter
    method: str
    measured: Measured
    baselines: dict[str, tuple[float, int]]
    aim: float | None
    repaired: bool = False
    predicted: float = 0.0
    looks: int = 1
    sure: bool = False
    versus_uniform: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    largest_share: float = math.nan
    shares: dict[str, float] = field(default_factory=dict)
    attention: float = 0.0
    carried: int = 0
    size: int = 0
    seconds: float = 0.0

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of all modules, also 0."""
        return {name: self.adapter.ranks.get(name, 0) for name in self.planner.modules}

    @property
    def reached(self) -> bool:
        """Whether the error measured on held-out texts, an estimate, is at most what was asked for.

        If ``sure``, the cautious ``measured.error_upper`` must be.
        """
        return self.aim is None or _stated(self.measured, self.sure) <= self.aim

    def __repr__(self) -> str:
        return (
            f"Plan(error {self.measured.error:.3g}, at most {self.measured.error_upper:.3g}; "
            f"{self.adapter.parameters} parameters, ranks to "
            f"{max(self.adapter.ranks.values(), default=0)})"
        )

    def table(self) -> pd.DataFrame:
        """A table with each module's size, rank, and the part of the effect that it loses alone."""
        import pandas as pd

        return pd.DataFrame(
            {
                "module": module.name,
                "kind": module.kind,
                "out": module.shape[0],
                "in": module.shape[1],
                "rank": self.ranks[module.name],
                "lost": self.shares.get(module.name, math.nan),
            }
            for module in self.planner.modules.values()
        )

    def report(self) -> dict[str, Any]:
        """Everything for JSON, numbers and texts by name; ``None`` for NaN."""
        pair, texts = self.planner.pair, self.planner.texts
        return without_nan(
            {
                "base": pair.base.source,
                "tuned": pair.tuned.source,
                "base_dequantized": _gguf.is_dequantized(pair.base.folder),
                "architecture": pair.architecture,
                "ties_embeddings": pair.ties_embeddings(self.adapter),
                **{k: v for k, v in self.measured._asdict().items() if k != "texts"},
                "predicted_error": self.predicted,
                "largest_share": self.largest_share,
                "asked_error": self.aim,
                "sure": self.sure,
                "reached": self.reached,
                "limit_reached": self.aim is None or self.measured.error_upper <= self.aim,
                "equal": self.planner.equal,
                "parameters": self.adapter.parameters,
                "carried": self.carried,
                "adapter_bytes": self.size,
                "modules": len(pair.modules),
                "ranks": {name: rank for name, rank in self.ranks.items() if rank},
                "method": self.method,
                "repaired": self.repaired,
                "baseline_errors": {name: error for name, (error, _) in self.baselines.items()},
                "baseline_parameters": {name: used for name, (_, used) in self.baselines.items()},
                "versus_uniform": self.versus_uniform[0],
                "versus_uniform_lower": self.versus_uniform[1],
                "versus_uniform_upper": self.versus_uniform[2],
                "attention_only": self.attention,
                "not_low_rank": pair.not_low_rank,
                "left_out": sorted(pair.leave),
                "texts": count(texts.fit) + count(texts.select),
                "held_out_texts": self.measured.texts,
                "cut_texts": texts.cut,
                "unknown_tokens": texts.unknown,
                "looks": self.looks,
                "options": self.planner.options,
                "seconds": self.seconds,
                "versions": {
                    name: metadata.version(name)
                    for name in ("lorapower", "torch", "transformers", "peft")
                },
            }
        )


@_checks.flushing()
def plan(
    base: str,
    tuned: str | Path | Mapping[str, float],
    texts: Sequence[str],
    *,
    error: float | None = None,
    parameters: int | None = None,
    rank: int | None = None,
    sure: bool = False,
    serving: bool = False,
    force: bool = False,
    repair: bool = False,
    steps: int = STEPS,
    report: Report | None = None,
    **options: Any,
) -> Plan:
    """Find which rank each module needs, for a stated error or for a number of parameters.

    At least 120 ``texts`` like those that the model is for are needed; other arguments are those of
    `Pair.open` and options of `Planner`. The plan is the nearest one if the highest ranks do not
    reach the error. ``reached`` compares the error measured on held-out texts, an estimate; the
    limit ``measured.error_upper`` is the cautious number and may be above what was asked for: at
    95%, by a bootstrap of texts of which 1.25% are cut, not 5%, as errors of texts are skewed.
    Raises `InputError` for unusable arguments before any text is passed through a network.

    Parameters
    ----------
    error : float, optional
        The part of the tuning's effect that may be lost (`Measured`), 0.1 if nothing else is asked
        for; the plan has the fewest parameters.
    parameters, rank : int, optional
        Instead, at most so many numbers in the factors, or as many as this rank for all modules.
    sure : bool
        Whether the limit, not the estimate, is to be at most ``error``.
    serving : bool
        Whether the adapter is to have factors alone, of few ranks: multiples of 8 up to 16 unless
        ``max_rank`` or ``bucket`` are given. All else that tuning changed stays the base's.
    force : bool
        Whether an adapter in place of a tuned checkpoint may name another base (`Pair.open`).
    repair : bool
        Whether the adapter is fitted to the tuned network (`Planner.repair`), with ``steps`` by
        gradient.
    """
    start = time.perf_counter()
    asked = {"error": error, "parameters": parameters, "rank": rank}
    asked = {name: value for name, value in asked.items() if value is not None}
    if len(asked) > 1:
        name = "error, parameters, rank"
        raise InputError(name, allowed="one of them at most", given=" and ".join(asked))
    aim = _checks.finite("error", error) if "error" in asked else None if asked else ERROR
    if aim is not None and not 0 < aim <= 1:
        raise InputError("error", allowed="above 0 and at most 1, the base's own", given=aim)
    for name in asked.keys() - {"error"}:
        _checks.integer(name, asked[name], 0)
    _checks.integer("steps", steps, 0)
    if _checks.flag("sure", sure) and aim is None:
        raise InputError("sure", allowed="for an error to reach", given=f"{' and '.join(asked)}")
    if _checks.flag("serving", serving):
        options = {**SERVING, **options, "leave": SERVING["leave"]}
    _checks.device(options.get("device", "cpu"))
    pair = Pair.open(base, tuned, force=force)
    _require_heads(pair, options.get("leave"))
    planner = Planner(pair, texts, report=report, **options)
    if planner.equal:
        same = Measured(0.0, 0.0, 1.0, 1.0, 0.0, count(planner.texts.test))
        baselines = dict.fromkeys(BASELINES, (0.0, 0))
        nothing = Plan(planner, Adapter({}, {}), "uniform", same, baselines, aim, sure=sure)
        return _finish(nothing, start)
    number = planner.parameters(rank) if rank is not None else parameters or 0
    if aim is None:
        found = _fill(planner, number, repair, steps)
    else:
        found = _search(planner, aim, repair, steps, sure=sure)
    raw, adapter, (measured, squares) = found.raw, found.adapter, found.stated
    versus, baselines = _compare(planner, squares, max(number, adapter.parameters))
    result = Plan(
        planner,
        adapter,
        found.method,
        measured,
        baselines,
        aim,
        repaired=adapter is not raw,
        predicted=planner.predicted(raw),
        looks=found.looks,
        sure=sure,
        versus_uniform=versus,
        largest_share=largest_share(squares),
        shares={} if repair else planner.losses(raw),
        attention=planner.only("attention"),
    )
    return _finish(result, start)


def _require_heads(pair: Pair, leave: object) -> None:
    """Refuse to leave out a head that the base lacks."""
    lacking = [o.name for o in pair.others if o.kind == "head" and not pair.base.has(o.name)]
    if lacking and isinstance(leave, Collection) and "head" in leave:
        raise InputError(
            "leave",
            allowed="without head, as the base has none",
            given=f"head, which is {hub.some(lacking)} of the tuned model",
            remedy="name a base with this head, or ask for a format that has a place for it",
        )


def _compare(
    planner: Planner, squares: NDArray[np.float64], parameters: int
) -> tuple[tuple[float, float, float], dict[str, tuple[float, int]]]:
    """The quotient to uniform ranks, with its limits, and errors and sizes of `BASELINES`."""
    baselines, versus = {}, (math.nan, math.nan, math.nan)
    for done, name in enumerate(BASELINES):
        planner.report("comparing", done, len(BASELINES))
        baseline = planner.candidate(name, parameters)
        measured, others = _measure(planner, baseline)
        baselines[name] = measured.error, baseline.parameters
        if name == "uniform":
            versus = paired_ratio(squares, others, seed=planner.seed)
    planner.report("comparing", len(BASELINES), len(BASELINES))
    return versus, baselines


def _stated(measured: Measured, sure: bool) -> float:
    """The error that is to be at most the aim."""
    return measured.error_upper if sure else measured.error


def _measure(planner: Planner, adapter: Adapter) -> tuple[Measured, NDArray[np.float64]]:
    """What an adapter loses on the texts for stating, and the squared error of each."""
    planner.put(adapter)
    return planner.test.measure_texts(planner.network, seed=planner.seed)


def _finish(plan: Plan, start: float) -> Plan:
    """A plan with an estimate of its file's contents, and the seconds since the start."""
    pair, adapter = plan.planner.pair, plan.adapter
    network = pair.skeleton()
    carried, size = _peft_files.estimate_peft(
        network, adapter.ranks, **_export.peft_options(pair, network, adapter)
    )
    return replace(plan, carried=carried, size=size, seconds=time.perf_counter() - start)


class _Found(NamedTuple):
    """An adapter before and after repair, what it loses (`_measure`), and how many were stated."""

    method: str
    raw: Adapter
    adapter: Adapter
    stated: tuple[Measured, NDArray[np.float64]]
    looks: int = 1


def _fill(planner: Planner, parameters: int, repair: bool, steps: int) -> _Found:
    """The best adapter of at most so many parameters."""
    method, raw = planner.best(parameters)
    adapter = planner.repair(raw, steps=steps) if repair else raw
    return _Found(method, raw, adapter, _measure(planner, adapter))


def _search(planner: Planner, aim: float, repair: bool, steps: int, *, sure: bool) -> _Found:
    """The smallest adapter whose stated error is at most the aim, or the largest one."""
    selected, before, looks = aim, -1, 0
    while True:
        looks += 1
        method, raw = planner.smallest(selected)
        stated = _measure(planner, raw)
        error = _stated(stated[0], sure)
        if error <= aim or raw.parameters == before or looks == LOOKS:
            break
        # From what this adapter has there, or the same could be found again.
        selected = min(selected, planner.error(raw)) * max(0.95 * aim / error, 0.1)
        before = raw.parameters
    found = _Found(method, raw, raw, stated, looks)
    if not repair:
        return found
    # The smallest repaired one that will do, or else one of as many parameters.
    start, fitted = planner.smallest_repaired(selected, method, raw, steps)
    stated, looks = _measure(planner, fitted), looks + 1
    if _stated(stated[0], sure) > aim and start is not raw:
        start, fitted = raw, planner.repair(raw, steps=steps)
        stated, looks = _measure(planner, fitted), looks + 1
    if _stated(stated[0], sure) <= max(aim, error):
        return _Found(method, start, fitted, stated, looks)
    return found._replace(looks=looks)


@_checks.flushing()
def extract(
    base: str,
    tuned: str | Path | Mapping[str, float],
    texts: Sequence[str],
    out: Path | str,
    *,
    merged: Path | str | None = None,
    force: bool = False,
    **options: Any,
) -> Plan:
    """Plan an adapter, write it, read it back through peft and measure it again.

    The folder ``out`` gets the adapter, ``report.json`` and a model card; the folder ``merged``, if
    given, the base with the adapter merged into it, in float32, and its tokenizer. ``force``
    replaces what is there of this kind. Other arguments are those of `plan`. Nothing is written if
    the error is not `Plan.reached`.

    Raises what `plan` raises, `InputError` for folders that exist, `ResultsError` where they cannot
    be written, and `LorapowerError` if the adapter read back has another error.
    """
    folder = _export.claim("out", out, force, _peft_files.PEFT_CONFIG)
    whole = None if merged is None else _export.claim("merged", merged, force, "config.json")
    if whole is not None and _export.overlap(folder, whole):
        allowed = "a folder beside that of the adapter"
        raise InputError("merged", allowed=allowed, given=f"{whole}, where it is {folder}")
    start = time.perf_counter()
    result = plan(base, tuned, texts, force=force, **options)
    if not result.reached:
        return result
    planner = result.planner
    tell = functools.partial(planner.report, "writing")
    tell(0, 2)
    with contextlib.ExitStack() as stack:
        partial = stack.enter_context(_export.write(folder))
        _export.save(partial, planner.pair, planner.network, result.adapter)
        tell(1, 2)
        # Only one network at a time.
        planner.network = None
        planner.network = _export.load(partial, planner.pair, planner.device)
        again = planner.test.measure(planner.network, seed=planner.seed)
        stated = result.measured.error
        if not abs(again.error - stated) <= max(RELOADED * stated, 1e-6):
            raise LorapowerError(
                f"the adapter read back has error {again.error:.6g}, not the {stated:.6g} that was "
                "measured: nothing was written; please report this with the names of both models"
            )
        carried, size = _peft_files.measure_peft(partial)
        seconds = time.perf_counter() - start
        result = replace(result, carried=carried, size=size, seconds=seconds)
        report = result.report() | {"reloaded_error": again.error}
        _export.describe(partial, report, result.table())
        if whole is not None:
            full = stack.enter_context(_export.write(whole))
            planner.network = None
            planner.network = _export.save_merged(full, planner.pair, result.adapter)
    tell(2, 2)
    return result


@_checks.flushing()
def check(
    base: str,
    adapter: str,
    tuned: str | Path | Mapping[str, float],
    texts: Sequence[str],
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    device: str = "cpu",
    force: bool = False,
    report: Report | None = None,
) -> Measured:
    """Measure what anybody's adapter of peft, a folder, loses against the tuned model.

    At least 60 texts are needed, and at most 256 are used, drawn by ``seed``. The network is on
    ``device``. Other arguments are those of `plan`.
    """
    where = _checks.device(device)
    pair = Pair.open(base, tuned, force=force)
    batches = prepare_all(pair, texts, tokens=tokens, seed=seed)
    tell = functools.partial(report or (lambda *_: None), "passing texts")
    tell(0, 3)
    network = pair.network().to(where)
    reference = Reference(batches, Readout(network, pair.task))
    reference.record_tuned(network)
    tell(1, 3)
    pair.fill(network, "base")
    reference.record_base(network)
    tell(2, 3)
    del network
    measured = reference.measure(_export.load(adapter, pair, where))
    tell(3, 3)
    if math.isnan(measured.error):
        allowed = "one that brings the head that the base lacks"
        raise InputError("adapter", allowed=allowed, given=f"{adapter}, with which outputs are NaN")
    return measured
