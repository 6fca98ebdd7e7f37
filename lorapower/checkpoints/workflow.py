"""Ranks for a stated error, their adapter, and the error of anybody's adapter: one call each."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _checks
from ..errors import InputError, LorapowerError
from . import _export
from ._folders import require_free, write_folder
from ._gguf import is_dequantized
from ._measuring import Measured, Readout, Reference, largest_share, paired_ratio
from ._models import listed, require_device
from ._peft_files import PEFT_CONFIG, estimate_peft, measure_peft
from ._texts import TOKENS, count, prepare_all
from .pair import KINDS, Adapter, Pair
from .planner import Planner, Report

if TYPE_CHECKING:
    import pandas as pd

# Methods whose errors at as many parameters are stated beside a plan's.
_BASELINES = ("uniform", "energy", "plain")
# The error that is aimed at by default.
_ERROR = 0.1
# How often texts for stating may be looked at, if they show more error than was aimed at.
_LOOKS = 4
# Options of `Planner` for servers of many adapters, which hold factors of few ranks and no more.
_SERVING = {"max_rank": 16, "bucket": 8, "leave": KINDS}
# Relative tolerance of the error of an adapter that is read back.
_RELOADED = 1e-5


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Ranks of modules, the adapter that has them, and what it loses."""

    #: The pair and the texts that the plan is for.
    planner: Planner
    #: The factors, and biases that make up for what they lack.
    adapter: Adapter
    #: The one of `METHODS` that chose them.
    method: str
    #: What the adapter loses on held-out texts.
    measured: Measured
    #: For other methods the error, and the number of parameters: at most those asked for or the
    #: adapter's, except that ``uniform`` and ``energy`` have at least rank 1.
    baselines: dict[str, tuple[float, int]]
    #: The error that was asked for.
    aim: float | None
    #: The error to first order.
    predicted: float = 0.0
    #: How many adapters were measured on held-out texts; the error's limit is meant for 1.
    looks: int = 1
    #: Whether that limit was to be at most the aim.
    sure: bool = False
    #: The error over that of ``uniform``, with its limits at 95%, paired by texts.
    versus_uniform: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    #: The part of the squared error in the worst twentieth of the texts.
    largest_share: float = math.nan
    #: What each module's missing directions alone would cost (`Planner.losses`).
    shares: dict[str, float] = field(default_factory=dict)
    #: The error on held-out texts if only the attention modules are tuned, in full.
    attention: float = 0.0
    #: All numbers in the adapter's file (factors, biases, heads, rows of embeddings).
    carried: int = 0
    #: Bytes of its files, estimated before writing.
    size: int = 0
    #: What the plan took.
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
        """Make a table with each module's size, rank, and the part of the effect it loses alone."""
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

    def totals(self, *, written: bool = False) -> list[tuple[str, str]]:
        """Name and write what the plan has in all, for people; if ``written``, sizes are exact."""
        pair, used = self.planner.pair, self.adapter.parameters
        whole = sum(math.prod(module.shape) for module in pair.modules.values())
        words = ", embeddings as in the base" if pair.words.keys() & pair.modules.keys() else ""
        worst = "share of its square in the worst 5% of texts"
        rows = [
            ("parameters of the factors", f"{used:,} of {whole:,}"),
            *_export.size_rows(self.carried, self.size, estimated=not written),
            ("method", self.method),
            *_export.measured_rows(self.measured),
            (worst, _export.percent(self.largest_share)),
            ("error predicted to first order", _export.percent(self.predicted)),
            (f"error with attention alone, in full{words}", _export.percent(self.attention)),
        ]
        for name, (error, parameters) in self.baselines.items():
            # One rank for all cannot be below 1.
            smallest = f" at rank 1 ({parameters:,} parameters)" if parameters > used else ""
            rows.append((f"error of {name}{smallest}", _export.percent(error)))
        quotient, low, high = self.versus_uniform
        if math.isfinite(quotient) and used:
            larger = self.baselines["uniform"][1] / used
            times = f", which has {larger:.1f} times as many parameters" if larger > 1 else ""
            limits = f"{quotient:.2f} ({low:.2f} to {high:.2f} at 95%)"
            rows.append((f"error over that of uniform{times}", limits))
        for kind, number in pair.not_low_rank.items():
            what = "left out" if kind in pair.leave else "carried over"
            rows.append((f"{kind}, {what}", f"{number:,}"))
        if self.looks > 1:
            looks = f"{self.looks}: the limit is meant for 1"
            rows.append(("adapters measured on these texts", looks))
        cut, seconds = f"{self.planner.texts.cut}", f"{self.seconds:.0f}"
        return [*rows, ("texts cut off", cut), ("seconds", seconds)]

    def report(self) -> dict[str, Any]:
        """Collect everything for JSON, numbers and texts by name; ``None`` for NaN."""
        pair, texts, measured = self.planner.pair, self.planner.texts, self.measured
        return _export.without_nan(
            {
                "base": pair.base.source,
                "tuned": pair.tuned.source,
                "base_dequantized": is_dequantized(pair.base.folder),
                "architecture": pair.architecture,
                "ties_embeddings": pair.ties_embeddings(self.adapter),
                "error": measured.error,
                "error_upper": measured.error_upper,
                "agreement": measured.agreement,
                "agreement_lower": measured.agreement_lower,
                "kl": measured.kl,
                "predicted_error": self.predicted,
                "largest_share": self.largest_share,
                "asked_error": self.aim,
                "sure": self.sure,
                "reached": self.reached,
                "limit_reached": self.aim is None or measured.error_upper <= self.aim,
                "equal": self.planner.equal,
                "parameters": self.adapter.parameters,
                "carried": self.carried,
                "adapter_bytes": self.size,
                "modules": len(pair.modules),
                "ranks": {name: rank for name, rank in self.ranks.items() if rank},
                "method": self.method,
                "baseline_errors": {name: error for name, (error, _) in self.baselines.items()},
                "baseline_parameters": {name: used for name, (_, used) in self.baselines.items()},
                "versus_uniform": self.versus_uniform[0],
                "versus_uniform_lower": self.versus_uniform[1],
                "versus_uniform_upper": self.versus_uniform[2],
                "attention_only": self.attention,
                "not_low_rank": pair.not_low_rank,
                "left_out": sorted(pair.leave),
                "texts": count(texts.fit) + count(texts.select),
                "held_out_texts": measured.texts,
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
    report: Report | None = None,
    **options: Any,
) -> Plan:
    """Find which rank each module needs, for a stated error or for a number of parameters.

    The plan is the nearest one if the highest ranks do not reach the error. ``reached`` compares
    the error measured on held-out texts, an estimate; the limit ``measured.error_upper`` is the
    cautious number (`Measured`).

    Parameters
    ----------
    base, tuned, force
        See `Pair.open`.
    texts : sequence of str
        At least 120 like those that the model is for.
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
    report : callable, optional
        Receives progress: the stage, the steps done, and their number.
    **options
        Options of `Planner`.

    Raises
    ------
    InputError
        For unusable arguments, before any text is passed through a network.
    """
    start = time.perf_counter()
    given = {"error": error, "parameters": parameters, "rank": rank}
    asked = [name for name, value in given.items() if value is not None]
    if len(asked) > 1:
        allowed = "given alone, each of them"
        raise InputError("error, parameters and rank", allowed=allowed, given=" and ".join(asked))
    aim = None
    if error is not None or not asked:
        aim = _ERROR if error is None else error
        if not 0 < aim <= 1:
            raise InputError("error", allowed="above 0 and at most 1, the base's own", given=aim)
    elif sure:
        raise InputError("sure", allowed="used with an error", given=asked[0])
    if parameters is not None:
        _checks.integer("parameters", parameters, 0)
    if rank is not None:
        _checks.integer("rank", rank, 0)
    if serving:
        options = {**_SERVING, **options, "leave": _SERVING["leave"]}
    pair = Pair.open(base, tuned, force=force)
    _require_heads(pair, options.get("leave", ()))
    planner = Planner(pair, texts, report=report, **options)
    if planner.equal:
        same = Measured(0.0, 0.0, 1.0, 1.0, 0.0, count(planner.texts.test))
        baselines = dict.fromkeys(_BASELINES, (0.0, 0))
        nothing = Plan(planner, Adapter({}, {}), "uniform", same, baselines, aim, sure=sure)
        return _finish(nothing, start)
    number = planner.parameters(rank) if rank is not None else parameters or 0
    if aim is None:
        method, adapter = planner.best(number)
        found = _Found(method, adapter, _measure(planner, adapter))
    else:
        found = _search(planner, aim, sure=sure)
    adapter, (measured, squares) = found.adapter, found.stated
    versus, baselines = _compare(planner, squares, max(number, adapter.parameters))
    result = Plan(
        planner,
        adapter,
        found.method,
        measured,
        baselines,
        aim,
        predicted=planner.predicted(adapter),
        looks=found.looks,
        sure=sure,
        versus_uniform=versus,
        largest_share=largest_share(squares),
        shares=planner.losses(adapter),
        attention=planner.only("attention"),
    )
    return _finish(result, start)


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

    Nothing is written if the error is not `Plan.reached`.

    Parameters
    ----------
    base, tuned, texts, **options
        See `plan`.
    out, merged : Path or str
        Folders for the adapter, ``report.json`` and a model card, and, if wanted, for the base with
        the adapter merged into it, in float32, and its tokenizer.
    force : bool
        Whether what is in these folders is replaced, and an adapter may name another base.

    Raises
    ------
    InputError, ResultsError
        For unusable arguments and folders that exist, and where these cannot be written.
    LorapowerError
        If the adapter read back has another error.
    """
    folder = require_free("out", out, force, PEFT_CONFIG)
    whole = None
    if merged is not None:
        whole = require_free("merged", merged, force, "config.json")
        one, other = folder.resolve(), whole.resolve()
        if one.is_relative_to(other) or other.is_relative_to(one):
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
        partial = stack.enter_context(write_folder(folder))
        _export.save(partial, planner.pair, planner.network, result.adapter)
        tell(1, 2)
        # Only one network at a time.
        planner.network = None
        planner.network = _export.load(partial, planner.pair, planner.device)
        again = planner.test.measure(planner.network, seed=planner.seed)
        stated = result.measured.error
        if not abs(again.error - stated) <= max(_RELOADED * stated, 1e-6):
            raise LorapowerError(
                f"the adapter read back has error {again.error:.6g}, not the {stated:.6g} that was "
                "measured: nothing was written; please report this with the names of both models"
            )
        carried, size = measure_peft(partial)
        seconds = time.perf_counter() - start
        result = replace(result, carried=carried, size=size, seconds=seconds)
        report = result.report() | {"reloaded_error": again.error}
        _export.describe(partial, report, result.table(), result.totals(written=True))
        if whole is not None:
            full = stack.enter_context(write_folder(whole))
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
    """Measure what anybody's adapter of peft, in a folder, loses against the tuned model.

    Parameters
    ----------
    base, adapter, tuned, force, report
        The adapter's folder, and what `plan` takes.
    texts : sequence of str
        At least 60; at most 256 are used, drawn by ``seed`` and cut off after ``tokens``.

    Raises
    ------
    InputError
        For unusable arguments, and for an adapter that peft does not read into the base.
    """
    where = require_device(device)
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


class _Found(NamedTuple):
    """An adapter, what it loses (`_measure`), and how many were stated."""

    method: str
    adapter: Adapter
    stated: tuple[Measured, NDArray[np.float64]]
    looks: int = 1


def _search(planner: Planner, aim: float, *, sure: bool) -> _Found:
    """The smallest adapter whose stated error is at most the aim, or the largest one."""
    selected, before, looks = aim, -1, 0
    while True:
        looks += 1
        method, adapter = planner.smallest(selected)
        stated = _measure(planner, adapter)
        error = _stated(stated[0], sure)
        if error <= aim or adapter.parameters == before or looks == _LOOKS:
            return _Found(method, adapter, stated, looks)
        # From what this adapter has there, or the same could be found again.
        selected = min(selected, planner.error(adapter)) * max(0.95 * aim / error, 0.1)
        before = adapter.parameters


def _stated(measured: Measured, sure: bool) -> float:
    """The error that is to be at most the aim."""
    return measured.error_upper if sure else measured.error


def _measure(planner: Planner, adapter: Adapter) -> tuple[Measured, NDArray[np.float64]]:
    """What an adapter loses on the texts for stating, and the squared error of each."""
    planner.put(adapter)
    return planner.test.measure_texts(planner.network, seed=planner.seed)


def _compare(
    planner: Planner, squares: NDArray[np.float64], parameters: int
) -> tuple[tuple[float, float, float], dict[str, tuple[float, int]]]:
    """The quotient to uniform ranks, with its limits, and errors and sizes of `_BASELINES`."""
    baselines, versus = {}, (math.nan, math.nan, math.nan)
    for done, name in enumerate(_BASELINES):
        planner.report("comparing", done, len(_BASELINES))
        baseline = planner.candidate(name, parameters)
        measured, others = _measure(planner, baseline)
        baselines[name] = measured.error, baseline.parameters
        if name == "uniform":
            versus = paired_ratio(squares, others, seed=planner.seed)
    planner.report("comparing", len(_BASELINES), len(_BASELINES))
    return versus, baselines


def _finish(plan: Plan, start: float) -> Plan:
    """A plan with an estimate of its file's contents, and the seconds since the start."""
    pair, adapter = plan.planner.pair, plan.adapter
    network = pair.skeleton()
    options = _export.peft_options(pair, network, adapter)
    carried, size = estimate_peft(network, adapter.ranks, **options)
    return replace(plan, carried=carried, size=size, seconds=time.perf_counter() - start)


def _require_heads(pair: Pair, leave: Sequence[str]) -> None:
    """Refuse to leave out a head that the base lacks."""
    lacking = [o.name for o in pair.others if o.kind == "head" and not pair.base.has(o.name)]
    if lacking and "head" in leave:
        raise InputError(
            "leave",
            allowed="without head, as the base has none",
            given=f"head, which is {listed(lacking)} of the tuned model",
            remedy="name a base with this head, or ask for a format that has a place for it",
        )
