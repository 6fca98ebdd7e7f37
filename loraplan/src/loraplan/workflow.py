"""Ranks for a stated error, their adapter, and the error of anybody's adapter: one call each."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch

from . import _checks, _export, _limits, _texts
from ._adapters import is_adapter, named_base
from ._errors import InputError, LoraplanError
from ._folders import require_apart, require_free, versions, write_folder
from ._measuring import Measured, Measurement, Readout, TunedOutputs, measure_networks
from ._models import find, is_dequantized, reason, require_device, require_name
from ._streams import Network, TextStates, advance, stream
from ._texts import Batch, Text
from .pair import KINDS, Adapter, Pair
from .planner import Planner, Report

if TYPE_CHECKING:
    import pandas as pd

# The error that is aimed at by default.
_ERROR = 0.1
# The rank of adapters for serving, by default and at most.
_SERVED, _MOST_SERVED = 8, 64
# What a report has from its plan.
_OWN = "certified", "certificate", "estimate", "stated", "reached", "neighbours_alike", "seconds"
# An adapter is read back with this part of the texts, the longest, to this relative tolerance.
_SOME, _RELOADED = 0.25, 1e-5


class PlanOptions(TypedDict, total=False):
    """PlanOptions of `plan`, `prices` and `extract`.

    They are those of `Planner`; ``any_base`` of `Pair.open`; and ``serving``, for factors alone,
    all of one rank, ``max_rank``: at most 64, 8 unless given. Zeros fill them up to it where they
    are written, and all else that tuning changed stays the base's.
    """

    held_out: Sequence[str | Text] | None
    modules: str
    leave: Collection[str]
    tokens: int
    thorough: bool
    max_rank: int
    serving: bool
    seed: int
    device: str
    report: Report | None
    any_base: bool


class _ExtractOptions(PlanOptions, total=False):
    """PlanOptions of `extract` too, which says what to plan for."""

    error: float | None
    parameters: int | None
    rank: int | None
    estimate: bool


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Ranks of modules, the adapter that has them, and what it loses."""

    #: The pair and the texts that the plan is for.
    planner: Planner
    #: The factors, and biases that make up for what they lack.
    adapter: Adapter
    #: What the adapter loses on the texts that certify.
    measured: Measured
    #: The error that was asked for.
    aim: float | None
    #: Whether the estimate, rather than the certificate, must be at most ``aim``.
    estimate: bool
    #: The error of one rank for all modules, at least 1, and its number of parameters: at most the
    #: adapter's but for rank 1.
    uniform: tuple[float, int] = (math.nan, 0)
    #: The one rank that factors are filled up to in files for servers.
    served: int | None = None
    #: What each module's missing directions alone would cost (`Planner.losses`).
    shares: dict[str, float] = field(default_factory=dict)
    #: Whether texts lose so like their neighbours that they may be of one group.
    neighbours_alike: bool = False
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
    def stated(self) -> float:
        """What is compared with the aim: the error and, without ``estimate``, what is certified."""
        error, certified = self.measured.error, self.measured.certified
        return error if self.estimate else max(error, certified)

    @property
    def certified(self) -> float:
        """The loss that at least 90% of texts do not exceed, at 95%: the aim, or else ``measured``.

        NaN for estimates and where the aim is not reached [prop-certificate].
        """
        if self.aim is None:
            return self.measured.certified
        return math.nan if self.estimate or not self.reached else self.aim

    @property
    def certificate(self) -> str:
        """What is certified, in words."""
        if not math.isfinite(self.certified):
            return "Nothing is certified."
        drawn = "one text of each of these groups" if self.planner.texts.grouped else "these texts"
        sure = f"{_limits.confidence(_limits.DOUBT / _limits.SIZES)}, so that all {_limits.SIZES} "
        sure += f"sizes of the price list hold at once at {_limits.confidence()}"
        if self.aim is not None:
            sure = f"{_limits.confidence()}: of all first plans made this way, {_limits.SELDOM} "
            sure += "gets a certificate that is wrong"
        lost = f"{_limits.PROMISE} {_export.most(self.certified)} {_limits.UNIT}"
        return (
            f"{lost[0].upper()}{lost[1:]}. The confidence is {sure}. {self.measured.texts} texts "
            f"certify it; no adapter was made with them. This takes {drawn} to be independent "
            "draws. Losses are measured in float32 on texts as given; nothing is generated."
        )

    @property
    def reached(self) -> bool:
        """Whether the ``stated`` error is at most what was asked for.

        Where a size was asked for, whether the error is at most the base's own, 1.
        """
        if self.aim is None:
            return self.measured.error <= 1 + _RELOADED
        return self.stated <= self.aim

    def table(self) -> pd.DataFrame:
        """Make a table with each module's size, rank, and the part of the effect it loses alone."""
        import pandas as pd

        about = ((m.name, m.kind, *m.shape) for m in self.planner.modules.values())
        ranks, lost = self.ranks, self.shares
        rows = ((n, *more, ranks[n], lost.get(n, math.nan)) for n, *more in about)
        return pd.DataFrame(rows, columns=["module", "kind", "out", "in", "rank", "lost"])

    def report(self) -> dict[str, Any]:
        """Collect everything for JSON, numbers and texts by name; ``None`` for NaN."""
        pair, texts = self.planner.pair, self.planner.texts
        kinds = {pair.modules[name].kind for name in self.adapter.factors}
        tied = pair.task == "language" and bool(pair.tuned.config.tie_word_embeddings)
        lost = self.measured._asdict()
        held_out = lost.pop("texts")
        for name in ("own_effect_repeated", "same", "same_repeated", "alike"):
            del lost[name]  # of checks
        return _export.without_nan(
            {
                "base": pair.base.source,
                "tuned": pair.tuned.source,
                "base_dequantized": is_dequantized(pair.base.folder),
                "architecture": pair.architecture,
                "task": pair.task,
                "ties_embeddings": tied and "embedding" in kinds,
                **lost,
                **{name: getattr(self, name) for name in _OWN},
                "own_effect_certified": self.aim is None,
                "asked_error": self.aim,
                "certified_share": _limits.SHARE,
                "typical_effect": self.planner.test.typical,
                "equal": self.planner.equal,
                "parameters": self.adapter.parameters,
                "carried": self.carried,
                "adapter_bytes": self.size,
                "modules": len(pair.modules),
                "ranks": {name: rank for name, rank in self.ranks.items() if rank},
                "uniform_error": self.uniform[0],
                "uniform_parameters": self.uniform[1],
                "not_low_rank": pair.not_low_rank,
                "left_out": sorted(pair.leave),
                "texts": _texts.count(texts.fit) + _texts.count(texts.select),
                "held_out_texts": held_out,
                "cut_texts": texts.cut,
                "unknown_tokens": texts.unknown,
                "options": self.planner.options | {"serving": self.served is not None},
                "alike_texts": texts.alike,
                "grouped": texts.grouped,
                "versions": versions(),
            }
        )


@_checks.flushing()
def plan(
    base: str | Path,
    tuned: str | Path,
    texts: Sequence[str | Text],
    *,
    error: float | None = None,
    parameters: int | None = None,
    rank: int | None = None,
    estimate: bool = False,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Find which rank each module needs, for a stated error or for a number of parameters.

    A plan for an error is certified: at least 90% of texts like these lose at most this part of
    what tuning typically changes in a text (`Measured`), at a confidence of 95%
    [prop-certificate]. Texts, or groups of them, must be independent draws, on which the model was
    not tuned, and the error chosen before looking at plans with them. The texts that certify made
    none of the adapters; they decide only where the search stops. The error over all of them is at
    most this too. If no adapter is certified, ``reached`` is false and the plan is the largest that
    was tried. A plan for a size of the list of `prices` may be made after looking at that: its
    limit is the same. Where factors lose more than none, rank 0 everywhere is offered, and where
    that loses more than the base, ``reached`` is false too. Raises `InputError` for unusable
    arguments, before any text is passed through a network.

    Parameters
    ----------
    base, tuned
        See `Pair.open`.
    texts : sequence of str or Text
        At least 122 like those that the model is for, maybe with labels; or 122 groups (`Text`).
    error : float, optional
        The part of what tuning typically changes that may be lost, 0.1 if nothing else is asked
        for.
    parameters, rank : int, optional
        Instead, at most so many numbers in the factors, or as many as this rank for all modules.
    estimate : bool
        Whether the error over held-out texts alone is to be at most ``error``, without a
        certificate. These texts also choose the size, so the error on others may be a little
        larger.
    **options
        See `PlanOptions`.
    """
    start = time.perf_counter()
    given = {"error": error, "parameters": parameters, "rank": rank}
    asked = [name for name, value in given.items() if value is not None] or ["error"]
    if len(asked) > 1:
        names, joined = "error, parameters and rank", " and ".join(asked)
        raise InputError(names, "given alone, each of them", joined)
    estimate = _checks.flag("estimate", estimate)
    aim: Any = None if asked != ["error"] else _ERROR if error is None else error
    if aim is None and estimate:
        raise InputError("estimate", "used with an error", asked[0])
    is_number = isinstance(aim, Real) and not isinstance(aim, bool)
    if aim is not None and not (is_number and 0 < aim <= 1):
        raise InputError("error", "above 0 and at most 1, the base's own", value=aim)
    number = 0 if aim is not None else _checks.integer(asked[0], given[asked[0]], 0)
    planner = _prepare(base, tuned, texts, options)
    if planner.equal:
        found = _state(planner, Adapter({}, {}), aim, estimate)
    elif aim is None:
        number = number if rank is None else planner.parameters(number)
        found = _state(planner, planner.no_worse(planner.candidate(number)), aim, estimate)
    else:
        found = _search(planner, aim, estimate)
    if not planner.equal:
        planner.report("comparing", 0, 1)
        alike = planner.uniform(found.adapter.parameters)
        other, own = planner.run((alike, "test"), (found.adapter, "planned"))
        uniform = planner.test.error(other.squares), alike.parameters
        shares = planner.losses(found.adapter.gains)
        neighbours = planner.neighbours_alike(own.squares)
        found = replace(found, uniform=uniform, shares=shares, neighbours_alike=neighbours)
        planner.report("comparing", 1, 1)
    served = _one_rank(planner, options)
    carried, size = _export.estimate(planner.pair, found.adapter, served)
    seconds = time.perf_counter() - start
    return replace(found, served=served, carried=carried, size=size, seconds=seconds)


@_checks.flushing()
def prices(
    base: str | Path,
    tuned: str | Path,
    texts: Sequence[str | Text],
    **options: Unpack[PlanOptions],
) -> pd.DataFrame:
    """Certify what adapters of several sizes lose, all at once [prop-certificate].

    Any size of the list may then be taken with `plan` and the same texts and seed, after looking.
    There is a row for the numbers of uniform ranks 1/4, 1/2, 1, 2, 4, 8 and 16, as far as the
    highest ranks allow: the ``parameters`` of the factors, the ``bytes`` of the files, the
    ``error`` over the texts that certify, and ``certified`` (`Measured`), at a confidence of 95%
    for all rows together. ``attrs`` of the table have the number of these ``texts``, and
    ``neighbours_alike`` of `Plan`.

    Parameters
    ----------
    base, tuned, texts, **options
        See `plan`.
    """
    import pandas as pd

    planner = _prepare(base, tuned, texts, options)
    ranks = range(_limits.SIZES)
    numbers = {min(planner.parameters(1) * 2**k // 4, planner.most) for k in ranks}
    offers = (planner.no_worse(planner.candidate(number)) for number in sorted(numbers))
    adapters = {each.parameters: each for each in offers}
    rows, test = [], planner.test
    for done, adapter in enumerate(adapters.values()):
        planner.report("measuring", done, len(adapters))
        (measurement,) = planner.run((adapter, "test"))
        losses = test.losses(measurement.squares)
        _, size = _export.estimate(planner.pair, adapter, _one_rank(planner, options))
        error = test.error(measurement.squares)
        limit = _limits.quantile_limit(losses, _limits.DOUBT / _limits.SIZES)
        rows.append((adapter.parameters, size, error, limit))
    planner.report("measuring", len(adapters), len(adapters))
    table = pd.DataFrame(rows, columns=["parameters", "bytes", "error", "certified"])
    table.attrs["texts"] = len(losses)
    (measurement,) = planner.run((adapter, "planned"))
    table.attrs["neighbours_alike"] = planner.neighbours_alike(measurement.squares)
    return table


@_checks.flushing()
def extract(
    base: str | Path,
    tuned: str | Path,
    texts: Sequence[str | Text],
    out: Path | str,
    *,
    overwrite: bool = False,
    **options: Unpack[_ExtractOptions],
) -> Plan:
    """Plan an adapter, write it, and read it back through peft, on a quarter of the texts.

    Nothing is written if the error is not `Plan.reached`. Raises `InputError` for unusable
    arguments, folders that exist and folders in or around those that are read, `ResultsError` for
    folders that cannot be written, and `LoraplanError` if the adapter measures differently when it
    is read back.

    Parameters
    ----------
    base, tuned, texts, **options
        See `plan`.
    out : Path or str
        The folder for the adapter, ``report.json`` and a model card.
    overwrite : bool
        Whether an adapter there is replaced; a folder with other files is refused.
    """
    overwrite = _checks.flag("overwrite", overwrite)
    require_apart("out", out, [base, tuned])
    folder = require_free("out", out, overwrite=overwrite, own=_export.FILES)
    start = time.perf_counter()
    result = plan(base, tuned, texts, **options)
    if not result.reached:
        return result
    planner = result.planner
    some = planner.test.longest(_SOME)
    tell = functools.partial(planner.report, "writing")
    tell(0, 2)
    with write_folder(folder, own=_export.FILES) as partial:
        _export.save(partial, planner.pair, result.adapter, result.served)
        tell(1, 2)
        made = stream(planner.pair, result.adapter, planner.device)
        networks = made, _export.load(partial, planner.pair, planner.device)
        # By outputs of both, as the head that is read back may be any.
        compared = (
            measurement.compare()
            for measurement in measure_networks([(each, some) for each in networks])
        )
        stated, again = (math.sqrt(each.squares.sum()) for each in compared)
        effect = planner.test.typical * math.sqrt(_texts.count(some.batches))
        off = _RELOADED * max(stated, 0.1 * effect) + some.rounding()
        if not abs(again - stated) <= off:
            said = f"the adapter read back is {again:.6g} off, not {stated:.6g} as measured: "
            said += "nothing was written; please report this with the names of both models"
            raise LoraplanError(said)
        carried, size = _export.measure_peft(partial)
        seconds = time.perf_counter() - start
        result = replace(result, carried=carried, size=size, seconds=seconds)
        _export.describe(partial, result.report(), result.table())
    tell(2, 2)
    return result


@_checks.flushing()
def check(
    standin: str | Path,
    tuned: str | Path,
    texts: Sequence[str | Text],
    *,
    base: str | Path | None = None,
    tokens: int = _texts.TOKENS,
    dtype: str = "float32",
    device: str = "cpu",
    any_base: bool = False,
    report: Report | None = None,
) -> Measured:
    """Measure how much of a tuned model a stand-in keeps, on texts that chose nothing about it.

    A stand-in is whatever loads: an adapter of any kind that peft reads, a merged checkpoint, a
    file in GGUF, or the tuned model itself, in another type. Nothing is kept between checks: limits
    ``repeated`` hold for all who come back with more texts, however often [prop-certificate].
    Raises `InputError` for unusable arguments, and for a stand-in that does not load or lacks
    weights.

    Parameters
    ----------
    standin, tuned
        Folders, names on the hub, files in GGUF or packaged models, as in `Pair.open`.
    texts : sequence of str or Text
        At least one, of which each group counts once. All are used.
    base : str or Path, optional
        What the model was before tuning. It is the yardstick of the effect, which is NaN without,
        and what adapters are for: by default the one that they name.
    tokens : int
        Texts are cut off after so many tokens.
    dtype : {"float32", "bfloat16"}
        The type of the stand-in's weights and values. An adapter is merged in bfloat16.
    any_base : bool
        Whether adapters may name another base.
    device, report
        See `Planner`.
    """
    where = require_device(device)
    _checks.choice("dtype", dtype, ["float32", "bfloat16"])
    models = {"tuned": tuned, "standin": standin}
    for name, model in models.items():
        require_name(name, model)
    # Without a base there is no effect; then the tuned model is in its place.
    adapters = [model for name, model in models.items() if is_adapter(name, model)]
    known = base or next(map(named_base, adapters), None)
    pair = Pair.open(known or tuned, tuned, any_base=any_base)
    batches, alike = _texts.prepare_all(pair, texts, tokens)
    type_ = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if standin not in adapters:
        skeleton, read = pair.open_standin(str(standin))
        network = Network(pair, skeleton, read, device=where, dtype=type_)
    elif type_ == torch.float32:
        network = _export.load(find("standin", str(standin)), pair, where)
    else:
        network = _export.load_merged(find("standin", str(standin)), pair, where, type_)
    _require_runs(str(standin), network, Batch._make(part[:1] for part in batches[0]))
    networks = [stream(pair, "tuned", where), network]
    if known:
        networks.append(stream(pair, "base", where))
    passes = [TextStates(each, batches) for each in networks]
    advance(passes, functools.partial(report or (lambda *_: None), "passing texts"))
    reference = TunedOutputs(batches, Readout(networks[0]), passes[0].states)
    if known:
        reference.record(networks[2], passes[2].states)
    measured = reference.summarize(reference.compare(network, passes[1].states))
    return measured._replace(differing=pair.differing, alike=alike)


def _require_runs(standin: str, network: Network, one: Batch) -> None:
    """Refuse a stand-in that does not run on one text, or that lacks what the base does."""
    try:
        passed = TextStates(network, [one])
        advance([passed])
        values = passed.states
        if network.task == "language":
            values = [*network.logits(passed.states[0])]
        finite = not any(each.isnan().any() for each in values)
    except Exception as error:  # whatever peft raises for what it cannot do
        given = f"{standin} ({reason(error)})"
        raise InputError("standin", "one that runs on texts", given) from error
    if not finite:
        allowed = "one of finite numbers, with a head if the base lacks it"
        raise InputError("standin", allowed, f"{standin}, with which outputs are NaN")


def _prepare(
    base: str | Path, tuned: str | Path, texts: Sequence[str | Text], options: PlanOptions
) -> Planner:
    """Open a pair and pass the texts, for factors that servers of many adapters read or others."""
    if unknown := options.keys() - PlanOptions.__annotations__:
        raise InputError("options", f"among {', '.join(PlanOptions.__annotations__)}", min(unknown))
    given: dict[str, Any] = {**options}
    if _checks.flag("serving", given.pop("serving", False)):
        rank = given.setdefault("max_rank", _SERVED)
        _checks.integer("max_rank", rank, 1, _MOST_SERVED, limit="for serving")
        if "leave" in given:
            allowed = "left out for serving, where all but factors stays the base's"
            raise InputError("leave", allowed, value=given["leave"])
        given["leave"] = KINDS
    pair = Pair.open(base, tuned, any_base=given.pop("any_base", False))
    return Planner(pair, texts, **given)


def _one_rank(planner: Planner, options: PlanOptions) -> int | None:
    """The rank of factors in files for servers; ``None`` for other files."""
    return planner.max_rank if options.get("serving") else None


def _search(planner: Planner, aim: float, estimate: bool) -> Plan:
    """Certify adapters, or estimate what they lose, until the aim is missed (`_limits.search`)."""
    sizes, start = planner.sizes(aim, estimate=estimate)
    tried: dict[int, tuple[float, Measurement]] = {}
    state = planner.test.error if estimate else planner.test.stated

    def lost(place: int) -> float:
        adapter = planner.at(sizes[place])
        if adapter.parameters not in tried:
            planner.report("certifying", len(tried), max(len(tried) + 1, 3 if estimate else 8))
            (measurement,) = planner.run((adapter, "test"))
            tried[adapter.parameters] = state(measurement.squares), measurement
        return tried[adapter.parameters][0]

    adapter = planner.at(sizes[_limits.search(lost, len(sizes), start, aim, estimate=estimate)])
    planner.report("certifying", 1, 1)
    return _state(planner, adapter, aim, estimate, tried[adapter.parameters][1])


def _state(
    planner: Planner,
    adapter: Adapter,
    aim: float | None,
    estimate: bool,
    measurement: Measurement | None = None,
) -> Plan:
    """Measure an adapter on the texts for stating, unless they have passed it."""
    measurement = measurement or planner.run((adapter, "test"))[0]
    compared = measurement.compare()._replace(squares=measurement.squares)
    doubt = _limits.DOUBT / (_limits.SIZES if aim is None else 1)
    measured = planner.test.summarize(compared, doubt)._replace(differing=planner.pair.differing)
    return Plan(planner, adapter, measured, aim, estimate)
