"""Ranks for a stated error, their adapter, and the error of anybody's adapter: one call each."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import _checks
from .. import _hub as hub
from ..adapters import _files
from ..errors import InputError, LorapowerError, ResultsError
from ._measuring import (
    TOKENS,
    Measured,
    Readout,
    Reference,
    count,
    megabytes,
    prepare_all,
    without_nan,
)
from .pair import Adapter, Pair
from .planner import STEPS, Planner, Report

if TYPE_CHECKING:
    import pandas as pd

# Methods whose errors at as many parameters are stated beside a plan's.
BASELINES = ("uniform", "energy", "plain")
#: The error that is aimed at by default.
ERROR = 0.1
# How often texts for stating may be looked at, if they show more error than was aimed at.
LOOKS = 4
# Relative tolerance of the error of an adapter that is read back.
RELOADED = 1e-5
REPORT, CARD = "report.json", "README.md"
# ``task_type`` of an adapter in peft.
TASKS = {"classification": "SEQ_CLS", "language": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION"}


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Ranks of modules, the adapter that has them, and what it loses.

    ``method``, one of `METHODS`, chose the ranks. ``aim`` is the error that was asked for, if any;
    ``predicted`` is the one to first order before repair; ``attention`` is the error on held-out
    texts if only the attention modules are tuned, in full. ``baselines`` has for each method the
    error there without repair, and the number of parameters: at most the adapter's, except that
    ``uniform`` and ``energy`` have at least rank 1. ``shares`` are those of `Planner.losses`, empty
    in plans with repair. ``looks`` adapters were measured on held-out texts; the error's limit is
    meant for 1. ``carried`` counts all numbers in the adapter's file (factors, biases, heads, rows
    of embeddings); ``size`` is in bytes, estimated before writing.
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

        The cautious question is whether ``measured.error_upper`` is.
        """
        return self.aim is None or self.measured.error <= self.aim

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
                "architecture": pair.architecture,
                **{k: v for k, v in self.measured._asdict().items() if k != "texts"},
                "predicted_error": self.predicted,
                "asked_error": self.aim,
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
                "attention_only": self.attention,
                "not_low_rank": pair.not_low_rank,
                "left_out": sorted(pair.leave),
                "texts": count(texts.fit) + count(texts.select),
                "held_out_texts": self.measured.texts,
                "cut_texts": texts.cut,
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
    """Find which rank each module needs, for a stated error or for a number of parameters.

    At least 120 ``texts`` like those that the model is for are needed; other arguments are those of
    `Pair.open` and options of `Planner`. The plan is the nearest one if the highest ranks do not
    reach the error. ``reached`` compares the error measured on held-out texts, an estimate; the
    limit ``measured.error_upper`` is the cautious number and may be above what was asked for.
    Raises `InputError` for unusable arguments before any text is passed through a network.

    Parameters
    ----------
    error : float, optional
        The part of the tuning's effect that may be lost (`Measured`), 0.1 if nothing else is asked
        for; the plan has the fewest parameters.
    parameters, rank : int, optional
        Instead, at most so many numbers in the factors, or as many as this rank for all modules.
    repair, by_module : bool
        Whether the adapter is fitted to the tuned network (`Planner.repair`), with ``steps`` by
        gradient; whether what each module alone loses is predicted.
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
    planner = Planner(Pair.open(base, tuned), texts, report=report, **options)
    if planner.equal:
        same = Measured(0.0, 0.0, 1.0, 1.0, 0.0, count(planner.texts.test))
        baselines = dict.fromkeys(BASELINES, (0.0, 0))
        return _finish(Plan(planner, Adapter({}, {}), "uniform", same, baselines, aim), start)
    if aim is None:
        number = planner.parameters(rank) if rank is not None else parameters or 0
        method, raw, _ = planner.best(number)
        adapter = planner.repair(raw, steps=steps) if repair else raw
        measured, looks = planner.measure(adapter), 1
    else:
        method, raw, adapter, measured, looks = _search(planner, aim, repair, steps)
    shares = planner.losses(raw) if by_module and not repair else {}
    baselines = {}
    for name in BASELINES:
        baseline = planner.candidate(name, adapter.parameters)
        baselines[name] = planner.measure(baseline).error, baseline.parameters
    result = Plan(
        planner,
        adapter,
        method,
        measured,
        baselines,
        aim,
        repaired=adapter is not raw,
        predicted=planner.predicted(raw),
        looks=looks,
        shares=shares,
        attention=planner.only("attention"),
    )
    return _finish(result, start)


def _finish(plan: Plan, start: float) -> Plan:
    """A plan with an estimate of its file's contents, and the seconds since the start."""
    pair, adapter = plan.planner.pair, plan.adapter
    network = pair.skeleton()
    carried, size = _files.estimate_peft(network, adapter.ranks, **_options(pair, network, adapter))
    return replace(plan, carried=carried, size=size, seconds=time.perf_counter() - start)


def _search(
    planner: Planner, aim: float, repair: bool, steps: int
) -> tuple[str, Adapter, Adapter, Measured, int]:
    """The method, the adapter before and after repair, its error, and the number of looks."""
    selected, before, looks = aim, -1, 0
    while True:
        looks += 1
        method, raw = planner.smallest(selected)
        measured = planner.measure(raw)
        if measured.error <= aim or raw.parameters == before or looks == LOOKS:
            break
        selected *= 0.95 * aim / measured.error
        before = raw.parameters
    if not repair:
        return method, raw, raw, measured, looks
    # The smallest repaired one that will do, or else one of as many parameters.
    start, fitted = planner.smallest_repaired(selected, method, raw, steps)
    repaired, looks = planner.measure(fitted), looks + 1
    if repaired.error > aim and start is not raw:
        start, fitted = raw, planner.repair(raw, steps=steps)
        repaired, looks = planner.measure(fitted), looks + 1
    if repaired.error <= max(aim, measured.error):
        return method, start, fitted, repaired, looks
    return method, raw, raw, measured, looks


@_checks.flushing()
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

    The folder ``out`` gets the adapter, ``report.json`` and a model card; ``force`` replaces an
    adapter that is there. Other arguments are those of `plan`. Nothing is written if the error
    measured on held-out texts, an estimate as in `plan`, is above what was asked for.

    Raises what `plan` raises, `InputError` for a folder that exists, `ResultsError` where it cannot
    be written, and `LorapowerError` if the adapter read back has another error.
    """
    folder = _claim(out, force)
    start = time.perf_counter()
    result = plan(base, tuned, texts, repair=repair, by_module=False, **options)
    if not result.reached:
        return result
    planner = result.planner
    with _write(folder) as partial:
        _save(partial, planner.pair, planner.network, result.adapter)
        # Only one network at a time.
        planner.network = None
        planner.network = _load(partial, planner.pair)
        again = planner.test.measure(planner.network, seed=planner.seed)
        stated = result.measured.error
        if not abs(again.error - stated) <= max(RELOADED * stated, 1e-6):
            raise LorapowerError(
                f"the adapter read back has error {again.error:.6g}, not the {stated:.6g} that was "
                "measured: nothing was written; please report this with the names of both models"
            )
        carried, size = _files.measure_peft(partial)
        seconds = time.perf_counter() - start
        result = replace(result, carried=carried, size=size, seconds=seconds)
        _describe(partial, result.report() | {"reloaded_error": again.error})
    return result


@_checks.flushing()
def check(
    base: str,
    adapter: str,
    tuned: str,
    texts: Sequence[str],
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    report: Report | None = None,
) -> Measured:
    """Measure what anybody's adapter of peft, a folder, loses against the tuned model.

    At least 60 texts are needed, and at most 256 are used, drawn by ``seed``. Other arguments are
    those of `plan`.
    """
    pair = Pair.open(base, tuned)
    batches = prepare_all(pair, texts, tokens=tokens, seed=seed)
    tell = functools.partial(report or (lambda *_: None), "passing texts")
    network = pair.network()
    reference = Reference(batches, Readout(network, pair.task))
    reference.record_tuned(network)
    tell(1, 3)
    pair.fill(network, "base")
    reference.record_base(network)
    tell(2, 3)
    del network
    measured = reference.measure(_load(adapter, pair))
    tell(3, 3)
    if math.isnan(measured.error):
        allowed = "one that brings the head that the base lacks"
        raise InputError("adapter", allowed=allowed, given=f"{adapter}, with which outputs are NaN")
    return measured


def _claim(out: Path | str, force: bool) -> Path:
    """The folder to write to, which must not exist or, with ``force``, be an adapter's."""
    folder = _checks.path("out", out).expanduser()
    above = next(place for place in folder.absolute().parents if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        allowed = "in a folder that can be written to"
        raise InputError("out", allowed=allowed, given=f"{folder}, in {above}")
    if not folder.exists():
        return folder
    if not force:
        remedy = "name another, or replace it with --force (force=True)"
        allowed = "a folder that does not exist"
        raise InputError("out", allowed=allowed, given=str(folder), remedy=remedy)
    if not folder.is_dir() or (
        any(folder.iterdir()) and not (folder / _files.PEFT_CONFIG).is_file()
    ):
        allowed = "a new folder, or one with an adapter to replace"
        raise InputError("out", allowed=allowed, given=str(folder))
    return folder


@contextlib.contextmanager
def _write(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when it is complete and is gone if anything fails."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            new.mkdir()
            yield new
            for file in new.iterdir():
                file.chmod(0o644)
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
    except OSError as error:
        raise ResultsError(
            folder,
            f"cannot be written ({error.strerror or error})",
            remedy="make room or give access, or name another folder",
        ) from error


def _options(pair: Pair, network: Any, adapter: Adapter) -> dict[str, Any]:
    """What `_files.save_peft` is to keep beside the factors, without what is in ``leave``."""
    words = network.get_input_embeddings()
    whole: dict[str, None] = {}
    rows: dict[str, list[int]] = {}
    biases = bool(adapter.biases)
    for other in pair.others:
        if other.kind in pair.leave:
            continue
        owner = other.name.rpartition(".")[0]
        if other.kind == "bias":
            biases = True
        elif network.get_submodule(owner) is words and pair.base.has(other.name):
            old, new = pair.base.read(other.name), pair.tuned.read(other.name)
            rows[owner] = (old != new).any(1).nonzero().flatten().tolist()
        elif owner.startswith(pair.prefix):
            whole[owner] = None
        else:
            # peft saves a head as a whole, and would not find parts of it.
            whole[owner.partition(".")[0]] = None
    return {
        "biases": biases,
        "task_type": TASKS[pair.task],
        "fan_in_fan_out": any(pair.modules[name].transposed for name in adapter.factors),
        "modules_to_save": [*whole] or None,
        "trainable_token_indices": rows or None,
    }


def _save(folder: Path, pair: Pair, network: Any, adapter: Adapter) -> None:
    """Write an adapter through peft; the network is used up."""
    biases = {f"{name}.bias": values.clone for name, values in adapter.biases.items()}
    # Modules to save are copied as they are now.
    pair.fill(network, "adapted", updates=dict(biases))
    options = _options(pair, network, adapter)
    with hub.quiet():
        _files.save_peft(
            folder, network, adapter.factors, base=hub.public_name(pair.base.source), **options
        )


def _load(folder: Path | str, pair: Pair) -> Any:
    """A network with the base's weights and an adapter read by peft; NaN for a head in neither."""
    from peft import PeftModel

    if not (_checks.path("adapter", folder) / _files.PEFT_CONFIG).is_file():
        raise InputError("adapter", allowed="a folder with an adapter of peft", given=str(folder))
    network = pair.network()
    nothing = {
        name: functools.partial(torch.full_like, parameter, torch.nan)
        for name, parameter in network.named_parameters()
        if not pair.base.has(name)
    }
    pair.fill(network, "base", updates=dict(nothing))
    with hub.quiet(), warnings.catch_warnings(action="ignore"):
        try:
            return PeftModel.from_pretrained(network, str(folder)).eval().requires_grad_(False)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            given = f"{folder} ({' '.join(str(error).split())})"
            allowed = "one that peft reads into the base"
            raise InputError("adapter", allowed=allowed, given=given) from error


def _describe(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the report, and a card for people."""
    text = json.dumps(report, indent=2, allow_nan=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    (folder / CARD).write_text(_card(report), encoding="utf-8")


def _card(report: Mapping[str, Any]) -> str:
    """The model card of a report, in Markdown."""
    ranks, error = report["ranks"], f"{report['error']:.1%}"
    upper = report["error_upper"]
    limit = "no limit can be given" if upper is None else f"at most about {upper:.1%} at 95%"
    rows = {
        "parameters of the factors": f"{report['parameters']:,}",
        "numbers carried in all": f"{report['carried']:,}",
        "size of the adapter's files": megabytes(report["adapter_bytes"]),
        "modules with an adapter": f"{len(ranks)} of {report['modules']}",
        "highest rank": f"{max(ranks.values(), default=0)}",
    }
    if report["agreement"] is not None:
        least = f"{report['agreement_lower']:.1%}"
        rows["equal decisions"] = f"{report['agreement']:.1%} (at least {least} at 95%)"
        rows["mean KL divergence"] = f"{report['kl']:.2e} nats"
    for kind, number in report["not_low_rank"].items():
        what = "left out" if kind in report["left_out"] else "carried over exactly"
        rows[f"{kind}, {what}"] = f"{number:,}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: peft
base_model: {hub.public_name(report["base"])}
tags: [lora, lorapower]
---

# A low-rank adapter of {Path(report["tuned"]).name} for {Path(report["base"]).name}

It stands in for the fine-tuned model. Of what tuning changed in the outputs, {error} is lost \
(root mean square, {report["held_out_texts"]} held-out texts; for others like these {limit}). The \
first number is an estimate, the limit is the cautious one.

| | |
| --- | --- |
{table}

`report.json` has the rank of each module and how all this was measured.
"""
