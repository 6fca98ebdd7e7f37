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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

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
    largest_share,
    megabytes,
    paired_ratio,
    percent,
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
REPORT, CARD = "report.json", "README.md"
# ``task_type`` of an adapter in peft.
TASKS = {"classification": "SEQ_CLS", "language": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION"}


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
                "architecture": pair.architecture,
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
    by_module: bool = True,
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
    shares = planner.losses(raw) if by_module and not repair else {}
    tell = functools.partial(planner.report, "comparing")
    total = len(BASELINES) + 2
    baselines, versus = {}, (math.nan, math.nan, math.nan)
    for done, name in enumerate(BASELINES):
        tell(done, total)
        baseline = planner.candidate(name, max(number, adapter.parameters))
        theirs, their_squares = _measure(planner, baseline)
        baselines[name] = theirs.error, baseline.parameters
        if name == "uniform":
            versus = paired_ratio(squares, their_squares, seed=planner.seed)
    tell(total - 2, total)
    predicted = planner.predicted(raw)
    tell(total - 1, total)
    attention = planner.only("attention")
    tell(total, total)
    result = Plan(
        planner,
        adapter,
        found.method,
        measured,
        baselines,
        aim,
        repaired=adapter is not raw,
        predicted=predicted,
        looks=found.looks,
        sure=sure,
        versus_uniform=versus,
        largest_share=largest_share(squares),
        shares=shares,
        attention=attention,
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
    carried, size = _files.estimate_peft(network, adapter.ranks, **_options(pair, network, adapter))
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
    folder = _claim("out", out, force, _files.PEFT_CONFIG)
    whole = None if merged is None else _claim("merged", merged, force, "config.json")
    if whole is not None and _overlap(folder, whole):
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
        partial = stack.enter_context(_write(folder))
        _save(partial, planner.pair, planner.network, result.adapter)
        tell(1, 2)
        # Only one network at a time.
        planner.network = None
        planner.network = _load(partial, planner.pair, planner.device)
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
        _describe(partial, result, again.error)
        if whole is not None:
            full = stack.enter_context(_write(whole))
            planner.network = _save_merged(full, planner.pair, planner.network)
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
    measured = reference.measure(_load(adapter, pair, where))
    tell(3, 3)
    if math.isnan(measured.error):
        allowed = "one that brings the head that the base lacks"
        raise InputError("adapter", allowed=allowed, given=f"{adapter}, with which outputs are NaN")
    return measured


def _claim(name: str, place: Path | str, force: bool, sign: str) -> Path:
    """The folder to write to, which must not exist or, with ``force``, have the file ``sign``."""
    folder = _checks.path(name, place).expanduser()
    above = next(place for place in folder.absolute().parents if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        allowed = "in a folder that can be written to"
        raise InputError(name, allowed=allowed, given=f"{folder}, in {above}")
    if not folder.exists():
        return folder
    if not force:
        remedy = "name another, or replace it with --force (force=True)"
        allowed = "a folder that does not exist"
        raise InputError(name, allowed=allowed, given=str(folder), remedy=remedy)
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / sign).is_file()):
        allowed = f"a new folder, or one with {sign} to replace"
        raise InputError(name, allowed=allowed, given=str(folder))
    return folder


def _overlap(first: Path, second: Path) -> bool:
    """Whether a folder is the other, or in it."""
    first, second = first.resolve(), second.resolve()
    return first.is_relative_to(second) or second.is_relative_to(first)


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
    except ResultsError:
        raise
    except (OSError, SafetensorError) as error:
        raise ResultsError(
            folder,
            f"cannot be written ({getattr(error, 'strerror', None) or error})",
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
    # For classifiers peft saves heads unasked.
    headless = pair.task == "classification" and "head" in pair.leave
    return {
        "biases": biases,
        "task_type": None if headless else TASKS[pair.task],
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


def _save_merged(folder: Path, pair: Pair, network: Any) -> Any:
    """Write a network of peft with its adapter merged, and the tokenizer; return what is merged."""
    merged = network.merge_and_unload()
    with hub.quiet():
        merged.config.use_cache = True
        merged.save_pretrained(folder)
        merged.config.use_cache = False
        hub.tokenizer(str(pair.tuned.folder)).save_pretrained(folder)
    return merged


def _load(folder: Path | str, pair: Pair, device: torch.device | str = "cpu") -> Any:
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
            adapted = PeftModel.from_pretrained(network, str(folder))
            return adapted.eval().requires_grad_(False).to(device)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            given = f"{folder} ({' '.join(str(error).split())})"
            allowed = "one that peft reads into the base"
            raise InputError("adapter", allowed=allowed, given=given) from error


def _short(source: str) -> str:
    """The last part of a checkpoint's name, or of adapters' with their weights."""
    parts = [part.rpartition(" × ") for part in source.split(" + ")]
    return " + ".join(weight + times + Path(place).name for weight, times, place in parts)


def _describe(folder: Path, plan: Plan, reloaded: float) -> None:
    """Write the report, and a card for people."""
    report = plan.report() | {"reloaded_error": reloaded}
    text = json.dumps(report, indent=2, allow_nan=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    (folder / CARD).write_text(_card(report, plan.table()), encoding="utf-8")


def _card(report: Mapping[str, Any], modules: pd.DataFrame) -> str:
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
    by_module = "\n".join(
        f"| {row['module']} | {row['out']}×{row['in']} | {row['rank']} | {percent(row['lost'])} |"
        for row in modules.to_dict("records")
    )
    return f"""---
library_name: peft
base_model: {hub.public_name(report["base"])}
tags: [lora, lorapower]
---

# A low-rank adapter of {_short(report["tuned"])} for {_short(report["base"])}

It stands in for the fine-tuned model. Of what tuning changed in the outputs, {error} is lost \
(root mean square, {report["held_out_texts"]} held-out texts; for others like these {limit}). The \
first number is an estimate, the limit is the cautious one.

| | |
| --- | --- |
{table}

`report.json` says how all this was measured.

## Ranks

The part lost is what the missing directions of a module alone would cost, predicted to first order.

| module | size | rank | part lost |
| --- | --- | --- | --- |
{by_module}
"""
