"""A promise and its adapter, and what anybody's stand-in keeps: one call each."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch

from . import _checks, _export, _limits, _texts
from ._adapters import is_adapter, named_base
from ._errors import InputError, LoraplanError
from ._folders import require_apart, require_free, versions, write_folder
from ._limits import confidence
from ._measuring import Measured, Measurement, Readout, TunedOutputs, measure_networks
from ._models import find, is_dequantized, reason, require_device, require_name
from ._promises import Promise
from ._streams import Network, TextStates, advance, stream
from ._texts import Batch, Text
from .pair import Adapter, Pair
from .planner import Planner, Report

if TYPE_CHECKING:
    import pandas as pd

# What is promised by default: of decisions, and of what tuning changed where there are none.
_SAME, _ERROR = Promise("same", 0.9), Promise("error", 0.1)
# The highest rank that servers take.
_MOST_SERVED = 64
# Limits in a `Measured`.
_LIMITS = [
    name + again for name in ("own_effect", "same", "same_answers") for again in ("", "_repeated")
]
# Sizes of the price list, as uniform ranks.
_LISTED = [2.0**k for k in range(-3, 5)]
# An adapter is read back with this part of the texts, the longest, to this relative tolerance.
_SOME, _RELOADED = 0.25, 1e-5


class PlanOptions(TypedDict, total=False):
    """Options of `plan`, `prices` and `extract`.

    They are those of `Planner`; and ``one_rank``, at most 64, for factors alone that all have this
    rank, as servers read them. Zeros fill them up to it where they are written.
    """

    held_out: Sequence[str | Text] | None
    modules: str
    carry: str
    tokens: int
    thorough: bool
    max_rank: int
    one_rank: int
    device: str
    report: Report | None


class _ExtractOptions(PlanOptions, total=False):
    """Options of `extract` too, which says what to plan for."""

    same: float | None
    error: float | None
    same_answers: float | None
    size: float | None


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Ranks of modules, the adapter that has them, and what it keeps."""

    #: The pair and the texts that the plan is for.
    planner: Planner
    #: The factors, and what is carried beside them.
    adapter: Adapter
    #: What the adapter keeps on the texts that certify.
    measured: Measured
    #: What was asked for, if it was no size.
    promise: Promise | None
    #: The one rank that factors are filled up to in files for servers.
    served: int | None = None
    #: What each module's missing directions alone would cost (`Planner.losses`).
    shares: dict[str, float] = field(default_factory=dict)
    #: All numbers in the adapter's file (factors, biases, heads, rows of embeddings).
    numbers: int = 0
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
        """Whether the promise is certified or, of a size, whether it loses less than the base."""
        if self.promise is None:
            return self.measured.error <= 1 + _RELOADED
        return self.promise.holds(self.measured)

    @property
    def certificate(self) -> str:
        """What is certified, in words."""
        if not (self.promise and self.reached):
            return "Nothing is certified."
        words, grouped = self.promise.words, self.planner.texts.grouped
        drawn = "one text of each of these groups" if grouped else "these texts"
        over = "a random text of groups like these" if grouped else "texts like these"
        return (
            f"{words[0].upper()}{words[1:]}, on average over {over}, at a confidence of "
            f"{confidence()}: of all first plans made this way, at most one in "
            f"{1 / _limits.DOUBT:.3g} gets a promise that is wrong. {self.measured.texts} texts "
            f"certify it; no adapter was made with them. This takes {drawn} to be independent "
            "draws. All is measured in float32 on texts as given."
        )

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
        measured = self.measured._asdict()
        # Others are no limits after a search.
        for name in {*_LIMITS} - {self.promise.limit} if self.promise else ():
            del measured[name]
        return _export.without_nan(
            {
                "base": pair.base.source,
                "tuned": pair.tuned.source,
                "base_dequantized": is_dequantized(pair.base.folder),
                "architecture": pair.architecture,
                "task": pair.task,
                "labels": int(getattr(pair.tuned.config, "num_labels", 0)),
                "ties_embeddings": tied and "embedding" in kinds,
                "promised": self.promise._asdict() if self.promise else None,
                "reached": self.reached,
                "certificate": self.certificate,
                **measured,
                "equal": self.planner.equal,
                "parameters": self.adapter.parameters,
                "numbers": self.numbers,
                "bytes": self.size,
                "ranks": {name: rank for name, rank in self.ranks.items() if rank},
                "carried": [*self.adapter.carried],
                "planning_texts": _texts.count(texts.fit) + _texts.count(texts.select),
                "unknown_tokens": texts.unknown,
                "grouped": texts.grouped,
                "options": self.planner.options | {"one_rank": self.served},
                "seconds": self.seconds,
                "versions": versions(),
            }
        )


@_checks.flushing()
def plan(
    base: str | Path,
    tuned: str | Path,
    texts: Sequence[str | Text],
    *,
    same: float | None = None,
    error: float | None = None,
    same_answers: float | None = None,
    size: float | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Find the smallest adapter of which a promise can be certified, or the best one of a size.

    A promise is about texts like these and holds at a confidence of 95% [prop-certificate]. Texts,
    or groups of them, must be independent draws, on which the model was not tuned, and the promise
    chosen before looking at plans with them. Those that certify, at least 61 of them, made none of
    the adapters; they decide only where the search stops. If nothing can be promised, ``reached``
    is false and the plan is the largest that was tried. Where factors lose more than none, rank 0
    everywhere is offered for a size. This is a fixed sequence of tests, as in Learn then Test
    (Angelopoulos et al., 2025) and Pareto Testing (Laufer-Goldshtein et al., 2023). Raises
    `InputError` for unusable arguments, before any text is passed through a network.

    Parameters
    ----------
    base, tuned
        See `Pair.open`.
    texts : sequence of str or Text
        At least 122 like those that the model is for, maybe with labels; or 122 groups (`Text`).
    same : float, optional
        At least this share of decisions is to be the tuned model's; 0.9 if nothing else is asked
        for and the model decides.
    error : float, optional
        Instead, nine of ten texts are to lose at most this part of what tuning changed in them; 0.1
        if nothing else is asked for and the model does not decide.
    same_answers : float, optional
        Instead, at least this share of prompts is to get the tuned model's greedy answer.
    size : float, optional
        Instead, the most megabytes of the adapter's files.
    **options
        See `PlanOptions`.
    """
    start = time.perf_counter()
    promise = Promise.asked(same=same, error=error, same_answers=same_answers)
    if size is not None and promise:
        names, given = "same, error, same_answers and size", f"size and {promise.kind}"
        raise InputError(names, "given alone, each of them", given)
    _require_size(size)
    planner = _prepare(base, tuned, texts, options, promise)
    served = options.get("one_rank")
    if size is None and promise is None:
        promise = _SAME if planner.pair.decides else _ERROR
    in_bfloat16 = math.nan
    if promise and promise.kind == "same_answers":
        in_bfloat16 = _keep_in_bfloat16(planner.pair, planner.planned)
    if planner.equal:
        found = _state(planner, Adapter({}, {}, ()), promise)
    elif promise is None:
        found = _state(planner, _fit(planner, 1e6 * float(size or 0), served), promise)
    else:
        found = _search(planner, promise)
    shares = {} if planner.equal else planner.losses(found.adapter.gains)
    numbers, bytes_ = _export.estimate(planner.pair, found.adapter, served)
    measured = found.measured._replace(in_bfloat16=in_bfloat16)
    about: dict[str, Any] = {"measured": measured, "served": served, "shares": shares}
    seconds = time.perf_counter() - start
    return replace(found, numbers=numbers, size=bytes_, seconds=seconds, **about)


@_checks.flushing()
def prices(
    base: str | Path,
    tuned: str | Path,
    texts: Sequence[str | Text],
    **options: Unpack[PlanOptions],
) -> pd.DataFrame:
    """Estimate what adapters of several sizes keep, on the texts by which they are selected.

    The texts that certify decide on nothing here, so that a promise or a size may be chosen after
    looking, for `plan` and the same texts. There is a row for each size up to that of rank 16
    everywhere, as far as the highest ranks allow: the ``bytes`` of the files, the ``parameters`` of
    the factors, the share of the ``same`` decisions, the ``error``, and the ``own_effect`` that
    nine of ten texts lose at most (`Measured`).

    Parameters
    ----------
    base, tuned, texts, **options
        See `plan`.
    """
    import pandas as pd

    planner = _prepare(base, tuned, texts, options, None)
    unit, rows = planner.parameters(1), []
    sizes = sorted({min(round(rank * unit), planner.most) for rank in _LISTED})
    for done, number in enumerate([0] if planner.equal else sizes):
        planner.report("listing sizes", done, len(sizes))
        adapter = Adapter({}, {}, ())
        if number:
            adapter = planner.no_worse(planner.candidate(number))
        (measurement,) = planner.run((adapter, "select"))
        compared, reference = measurement.compare(), measurement.reference
        own = _limits.quantile(reference.own(compared.squares))
        same, error = 1 - compared.differing.mean(), reference.error(compared.squares)
        _, size = _export.estimate(planner.pair, adapter, options.get("one_rank"))
        rows.append((size, adapter.parameters, float(same), error, own))
    planner.report("listing sizes", len(sizes), len(sizes))
    names = ["bytes", "parameters", "same", "error", "own_effect"]
    table = pd.DataFrame(rows, columns=names).drop_duplicates("bytes")
    return table.sort_values("bytes", ignore_index=True)


@_checks.flushing()
def extract(
    base: str | Path,
    tuned: str | Path,
    texts: Sequence[str | Text],
    out: Path | str,
    *,
    overwrite: bool = False,
    made_by: str = "",
    **options: Unpack[_ExtractOptions],
) -> Plan:
    """Plan an adapter, write it, and read it back through peft, on a quarter of the texts.

    Nothing is written if the plan is not `Plan.reached`. Raises `InputError` for unusable
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
    made_by : str
        The command line, for the card.
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
        effect = math.sqrt(planner.select.effect.mean() * _texts.count(some.batches))
        off = _RELOADED * max(stated, 0.1 * effect) + some.rounding()
        if not abs(again - stated) <= off:
            said = f"the adapter read back is {again:.6g} off, not {stated:.6g} as measured: "
            said += "nothing was written; please report this with the names of both models"
            raise LoraplanError(said)
        numbers, size = _export.measure_peft(partial)
        seconds = time.perf_counter() - start
        result = replace(result, numbers=numbers, size=size, seconds=seconds)
        _export.describe(partial, result.report(), result.table(), made_by)
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
    answers: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    report: Report | None = None,
) -> Measured:
    """Measure how much of a tuned model a stand-in keeps, on texts not used to make or choose it.

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
    answers : bool
        Whether prompts without an ``answer`` get the tuned model's own (`Pair.respond`).
    dtype : {"float32", "bfloat16"}
        The type of the stand-in's weights and values.
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
    pair = Pair.open(known or tuned, tuned)
    if answers and pair.task != "language":
        raise InputError("same_answers", "asked of a language model", pair.architecture)
    tell = report or (lambda *_: None)
    respond = functools.partial(pair.respond, report=functools.partial(tell, "answering prompts"))
    batches, cut, alike = _texts.prepare_all(pair, texts, tokens, respond if answers else None)
    type_ = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if standin not in adapters:
        skeleton, read = pair.open_standin(str(standin))
        network = Network(pair, skeleton, read, device=where, dtype=type_)
    else:
        network = _export.load(find("standin", str(standin)), pair, where, type_)
    _require_runs(str(standin), network, Batch._make(part[:1] for part in batches[0]))
    networks = [stream(pair, "tuned", where), network]
    if known:
        networks.append(stream(pair, "base", where))
    passes = [TextStates(each, batches) for each in networks]
    advance(passes, functools.partial(tell, "passing texts"))
    reference = TunedOutputs(batches, Readout(networks[0]), passes[0].states)
    if known:
        reference.record(networks[2], passes[2].states)
    measured = reference.summarize(reference.compare(network, passes[1].states))
    if answers:
        measured = measured._replace(in_bfloat16=_keep_in_bfloat16(pair, reference))
    return measured._replace(differing=pair.differing, cut=cut, alike=alike)


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
    base: str | Path,
    tuned: str | Path,
    texts: Sequence[str | Text],
    options: PlanOptions,
    promise: Promise | None,
) -> Planner:
    """Open a pair and pass the texts, for factors that servers of many adapters read or others."""
    if unknown := options.keys() - PlanOptions.__annotations__:
        raise InputError("options", f"among {', '.join(PlanOptions.__annotations__)}", min(unknown))
    given: dict[str, Any] = {**options}
    if (rank := given.pop("one_rank", None)) is not None:
        _checks.integer("one_rank", rank, 1, _MOST_SERVED)
        for name in ("carry", "max_rank"):
            if name in given:
                allowed = "left out with one_rank, by which adapters are factors alone"
                raise InputError(name, allowed, value=given[name])
        given |= {"carry": "none", "max_rank": rank}
    pair = Pair.open(base, tuned)
    if promise and promise.kind == "same_answers":
        if pair.task != "language":
            raise InputError("same_answers", "asked of a language model", pair.architecture)
        given["answers"] = True
    if promise and promise.kind == "same" and not pair.decides:
        remedy = "ask for --error, the part of what tuning changed that may be lost"
        raise InputError("same", "asked of a model that decides", pair.architecture, remedy)
    return Planner(pair, texts, **given)


def _require_size(size: object) -> None:
    """Refuse what is no number of megabytes."""
    number = isinstance(size, Real) and not isinstance(size, bool)
    if size is not None and not (number and 0 < float(size) < math.inf):  # type: ignore[arg-type]
        raise InputError("size", "a number of megabytes above 0", value=size)


def _fit(planner: Planner, size: float, served: int | None) -> Adapter:
    """Find the best adapter whose files take at most so many bytes, at four a number."""
    number = min(int(size / 4), planner.most)
    while True:
        adapter = planner.candidate(number)
        over = _export.estimate(planner.pair, adapter, served)[1] - size
        if over <= 0 or not number:
            return planner.no_worse(adapter)
        number = max(0, min(number - math.ceil(over / 4), int(0.98 * number)))


def _search(planner: Planner, promise: Promise) -> Plan:
    """Certify adapters until the first of which nothing can be promised (`_limits.search`)."""
    sizes = planner.sizes(promise.lost, promise.error)
    tried: list[Measurement] = []

    def holds(place: int) -> bool:
        planner.report("certifying", place, max(place + 1, 8))
        tried.extend(planner.run((planner.at(sizes[place]), "test")))
        return promise.passes(tried[-1])

    found = _limits.search(holds, len(sizes))
    planner.report("certifying", 1, 1)
    return _state(planner, planner.at(sizes[found]), promise, tried[found])


def _state(
    planner: Planner,
    adapter: Adapter,
    promise: Promise | None,
    measurement: Measurement | None = None,
) -> Plan:
    """Measure an adapter on the texts that certify, unless they have passed it."""
    measurement = measurement or planner.run((adapter, "test"))[0]
    measured = planner.test.summarize(measurement.compare())
    texts, differing = planner.texts, planner.pair.differing
    measured = measured._replace(differing=differing, cut=texts.cut, alike=texts.alike)
    return Plan(planner, adapter, measured, promise)


def _keep_in_bfloat16(pair: Pair, reference: TunedOutputs) -> float:
    """Measure which share of its own answers the tuned model keeps in bfloat16."""
    about: dict[str, Any] = {"device": reference.readout.network.device, "dtype": torch.bfloat16}
    network = Network(pair, pair.skeleton(), pair.reader("tuned"), **about)
    (measurement,) = measure_networks([(network, reference)])
    return 1 - float(measurement.compare().other_answers.mean())
