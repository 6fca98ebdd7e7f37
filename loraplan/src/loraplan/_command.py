"""The command ``loraplan``: plan, extract and check adapters for a pair of checkpoints."""

# ruff: noqa: RUF009
from __future__ import annotations

import functools
import inspect
import json
import math
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress

from . import _example, workflow
from ._adapters import is_adapter
from ._errors import InputError
from ._export import measure, megabytes, without_nan
from ._folders import require_apart
from ._limits import DOUBT, SHARE, confidence, drop_limit
from ._measuring import Measured
from ._promises import Promise, least, most, percent
from ._texts import read_scores, read_texts
from .pair import ANSWER
from .planner import Report
from .workflow import Plan

if TYPE_CHECKING:
    import pandas as pd

# Exit status: done; what was asked is not kept.
DONE, SHORT = 0, 1
# Share of tokens unknown to the tokenizer above which it is said.
UNKNOWN = 0.05
# And of texts that nearly repeat another.
REPEATED = 0.02
# Seconds between lines of a long stage, where there is no terminal.
PAUSE = 20.0

app = typer.Typer(
    name="loraplan",
    help="How much of a tuned model does a stand-in keep? Small adapters with a promise, and a "
    "check of any stand-in.",
    epilog="Exit status: 0 done; 1 what was asked is not certified; 2 bad input, or a folder that "
    "cannot be written to; 3 an unexpected error, or too little memory; 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True)


def _flag(help: str, default: Any = None, *names: str, **about: Any) -> Any:
    """A field of a command's options that is a flag; ``...`` for one that must be given."""
    return typer.Option(default, *names, help=help, **about)


@dataclass(kw_only=True)
class _Options:
    """What all commands take: each field is an argument or a flag."""

    texts: Path | None = _flag(
        "Texts like those the model is for, which it was not tuned on: .txt, one a line; .jsonl or "
        ".csv with 'text', maybe 'label' or 'answer'; or .jsonl of chats ('messages').",
    )
    group: str | None = _flag(
        "Field of .jsonl or .csv that texts of one document or source share: a group counts once. "
        "In .txt blank lines separate documents."
    )
    tokens: int | None = _flag("Each text is cut to this many tokens; 128.")
    same: float | None = _flag(
        "At least this share of decisions (classes, or next tokens) is the tuned model's."
    )
    error: float | None = _flag(
        "Nine of ten texts lose at most this part of what tuning changed in them: in their logits "
        "or, of models without a head, last hidden states."
    )
    same_answers: float | None = _flag(
        "At least this share of prompts gets the tuned model's greedy answer, token for token up "
        "to 64. For short and sure answers."
    )
    device: str = _flag("Where networks run: cpu, cuda, cuda:1, mps.", "cpu")
    as_json: bool = _flag("Print the report as JSON and nothing else.", False, "--json")

    def shares(self) -> dict[str, float | None]:
        """What may be asked for."""
        return {name: getattr(self, name) for name in ("same", "error", "same_answers")}


@dataclass(kw_only=True)
class _PlanOptions(_Options):
    """What `plan` takes."""

    base: str = typer.Argument(
        help="The base: a folder, a name on the hub, or 'packaged'.", metavar="BASE"
    )
    tuned: str = typer.Argument(
        help="What was tuned from it: a checkpoint, or an adapter of peft.", metavar="TUNED"
    )
    held_out: Path | None = _flag("Other texts, to certify with. Without: half of the texts.")
    size: float | None = _flag("Instead of a promise: the most megabytes of the adapter's files.")
    modules: str = _flag("all, attention, mlp, or a regular expression.", "all")
    one_rank: int | None = _flag(
        "For servers: factors alone, all of this rank (vLLM's max_lora_rank), at most 64."
    )


@dataclass(kw_only=True)
class _ExtractOptions(_PlanOptions):
    """What `extract` and `shrink` take."""

    out: Path = _flag("Folder for the adapter.", ...)
    overwrite: bool = _flag(
        "Replace an adapter there. A folder with other files is refused.", False, "--overwrite"
    )


@dataclass(kw_only=True)
class _CheckOptions(_Options):
    """What `check` takes."""

    models: list[str] | None = typer.Argument(
        None,
        help="The base, what stands in for the tuned model (an adapter of peft, a merged "
        "checkpoint, a file in GGUF), and the tuned model. Without a base nothing is said of the "
        "effect; adapters name theirs.",
        metavar="[BASE] STANDIN TUNED",
    )
    dtype: Literal["float32", "bfloat16"] = _flag(
        "The type of the stand-in's weights and values.", "float32"
    )
    scores: Path | None = _flag(
        "Instead of models and texts: scores from 0 to 1 of both on the same fresh prompts, .csv "
        "or .jsonl with 'tuned' and 'standin'. With --same X the score may fall by 1 - X."
    )


def _command(options: type[_Options], **about: Any) -> Callable[[Callable[[Any], None]], Any]:
    """Make a function of options a command, whose arguments and flags are their fields.

    Its docstring, with what `_limits` says of promises, is the command's help.
    """
    words = {"confidence": confidence(), "seldom": f"at most one in {1 / DOUBT:.3g}"}

    def decorate(function: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            function(options(**given))

        run.__dict__["__signature__"] = inspect.signature(options, eval_str=True)
        help = inspect.cleandoc(function.__doc__ or "").format(**words)
        app.command(**{"help": help} | about)(run)
        return function

    return decorate


@_command(_PlanOptions)
def plan(options: _PlanOptions) -> None:
    """Find the smallest adapter that keeps what you ask for. Writes nothing.

    You ask by one of --same, --error and --same-answers, or for a --size. Without any, sizes are
    listed with what they keep, estimated on texts that certify nothing: choose any of them, or a
    promise, and ask for it with the same texts.

    The status is 0 if the promise is certified: it holds on average over texts like these, at a
    confidence of {confidence}: of all first plans made this way, {seldom} gets a promise that is
    wrong. If you ask again because of a verdict, certify with fresh texts (--held-out). Texts (or
    groups of them) must be independent draws. Half of them certify: no adapter is made with these,
    they only end the search. Which half a text is in depends on its words alone. All is measured in
    float32.
    """
    if {options.size, *options.shares().values()} == {None}:
        _show_prices(_call(workflow.prices, options), options)
    else:
        _show(_call(workflow.plan, options), options)


@_command(_ExtractOptions)
@_command(
    _ExtractOptions,
    name="shrink",
    help="Write a smaller adapter: `extract`, where TUNED is an adapter.",
)
def extract(options: _ExtractOptions) -> None:
    """Write the adapter as a folder that peft reads, with a card and report.json.

    It is written, and the status is 0, if what you ask for is certified, as `plan --help` explains:
    --same 0.9 unless you say something else (--error 0.1 for models that decide nothing); with
    --size if it loses less than the base.
    """
    _show(_call(workflow.extract, options), options, options.out)


@_command(_CheckOptions)
def check(options: _CheckOptions) -> None:
    """Say how much of a tuned model a stand-in keeps, on texts not used to make or choose it.

    A stand-in is an adapter of any kind that peft reads and merges, a merged checkpoint, a file in
    GGUF, or the tuned model itself with --dtype bfloat16. Limits hold at a confidence of
    {confidence} each, for any distribution of texts, if these are independent draws: the first if
    this is the only check, the other however often you come back with this stand-in and more texts
    (or groups) in the same file. Nothing is kept between checks, and nothing is generated but, with
    --same-answers, answers of the tuned model to prompts that have none.

    With --same, --error or --same-answers the status is 1 if the limit for one check misses it.
    """
    promise = Promise.asked(**options.shares())
    if options.scores is not None:
        _check_scores(options.scores, promise, options)
    models = options.models or []
    if not 2 <= len(models) <= 3:
        given = " ".join(models) or "none"
        raise InputError("models", "a stand-in and a tuned model, maybe after a base", given)
    names = zip(("standin", "tuned"), models, strict=False)
    if options.error and len(models) == 2 and not any(is_adapter(*each) for each in names):
        remedy = "name the model before tuning first"
        raise InputError("error", "asked with a base, of whose tuning it is a part", "none", remedy)
    measured = _call(workflow.check, options)
    size = measure(models[-2])
    kept = promise is None or promise.holds(measured)
    if options.as_json:
        _print(without_nan(measured._asdict() | {"bytes": size}))
    else:
        by = f"by {measured.texts} texts at {confidence()}"
        verdict = [("Verdict", f"{'KEPT' if kept else 'NOT KEPT'}, {by}")] * bool(promise)
        sure = (
            f"{confidence()} for each line, if these {measured.texts} texts are independent draws"
        )
        rows = [*verdict, *_limits(measured, often=True), ("Confidence", sure)]
        _tell([*rows, *_here(measured), ("Size", megabytes(size))])
    raise typer.Exit(DONE if kept else SHORT)


def _check_scores(file: Path, promise: Promise | None, options: _CheckOptions) -> NoReturn:
    """Say how far a user's own score falls, and end with the status."""
    if options.models or options.texts or (promise and promise.kind != "same"):
        allowed = "given without models and texts, maybe with --same"
        raise InputError("scores", allowed, "models, texts, --error or --same-answers with it")
    tuned, standin = read_scores(file)
    drop = drop_limit(tuned, standin)
    kept = promise is None or drop <= 1 - promise.share
    if options.as_json:
        means = {"tuned": float(tuned.mean()), "standin": float(standin.mean())}
        _print({"texts": len(tuned), **means, "drop": drop})
    else:
        rows = [("Verdict", "KEPT" if kept else "NOT KEPT")] * bool(promise)
        points = most(drop).removesuffix("%")
        falls = f"falls by at most {points} points on average, however often you check"
        rows.append(("Score", falls))
        sure = f"{confidence()}, if prompts like these {len(tuned)} are independent draws"
        rows.append(("Confidence", sure))
        rows.append(("Here", f"{percent(standin.mean())}; the tuned model {percent(tuned.mean())}"))
        _tell(rows)
    raise typer.Exit(DONE if kept else SHORT)


@app.command()
def example(
    folder: Annotated[Path, typer.Argument(help="A new folder.", metavar="DIR")],
) -> None:
    """Write a base, what was tuned from it and texts, to try the other commands on.

    This takes under a minute. An encoder is tuned on docstrings of Python's standard library, to
    say what their module is for, once in full and once by LoRA; README.md in DIR has the sources.
    """
    with _stages() as report:
        _example.write(folder, report=report)
    files = "base, tuned, lora, texts.jsonl, fresh.jsonl; README.md has their sources"
    _tell([("Written", f"to {folder}: {files}")])
    plan = "loraplan plan base tuned --texts texts.jsonl"
    _tell([("Next", f"cd {folder}"), ("", plan)], wrap=False)


def _call(function: Callable[..., Any], options: _Options) -> Any:
    """Call a function with a command's options and the texts of its files."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    as_json, group = given.pop("as_json"), given.pop("group", None)
    if "texts" not in given:
        raise InputError("texts", "given (--texts FILE)", "none")
    files = {name: given[name] for name in ("texts", "held_out") if name in given}
    if "out" in given:
        require_apart("out", given["out"], files.values())
        given["made_by"] = shlex.join(["loraplan", *sys.argv[1:]])
    if isinstance(options, _CheckOptions):
        *base, given["standin"], given["tuned"] = given.pop("models")
        given |= {"base": base[0]} if base else {}
        given["answers"] = options.same_answers is not None
        for name in options.shares():
            given.pop(name, None)
    models = [given[name] for name in ("tuned", "base", "standin") if name in given]
    given |= {n: read_texts(file, models=models, group=group) for n, file in files.items()}
    if as_json:
        return function(**given)
    with _stages() as report:
        return function(**given, report=report)


@contextmanager
def _stages() -> Iterator[Report]:
    """Show stages of work on the stream for errors: bars on a terminal, elsewhere plain lines."""
    bars = Progress(console=errors, transient=True)
    said = 0.0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal said
        begins = not bars.tasks or bars.tasks[-1].description != stage
        if begins:
            bars.add_task(stage, total=total)
        task = bars.tasks[-1]
        bars.update(task.id, completed=done, total=total)
        if errors.is_terminal:
            # Not before: what is refused before any work is one line.
            bars.start()
        elif begins or monotonic() - said >= PAUSE:
            said = monotonic()
            typer.echo(f"{stage}: {done} of {total}", err=True)

    try:
        yield show
    finally:
        if errors.is_terminal:
            bars.stop()


def _show(plan: Plan, options: _PlanOptions, out: Path | None = None) -> NoReturn:
    """Show a plan, its verdict first, and end with its status."""
    status = DONE if plan.reached else SHORT
    if options.as_json:
        _print(plan.report())
        raise typer.Exit(status)
    _tell(_verdict(plan, out))
    typer.echo("")
    _tell([("Ranks" * (not k), line) for k, line in enumerate(_grid(plan.ranks))], wrap=False)
    if plan.reached and out is None:
        _tell([("Next", "the same with extract and --out FOLDER writes this adapter")])
    raise typer.Exit(status)


def _show_prices(prices: pd.DataFrame, options: _PlanOptions) -> None:
    """Show what adapters of several sizes keep."""
    if options.as_json:
        typer.echo(prices.to_json(orient="records", indent=2))
        return
    lines = [f"{'size':>10} {'same decisions':>15} {'9 of 10 texts lose at most':>27}"]
    columns = prices[["bytes", "same", "own_effect"]]
    for size, same, own in columns.itertuples(index=False):
        lines.append(f"{megabytes(size):>10} {percent(same):>15} {percent(own):>27}")
    _tell([("Sizes" * (not k), line) for k, line in enumerate(lines)], wrap=False)
    said = "on texts that certify nothing; the last column is a part of what tuning changed in them"
    ask = "the same with --same SHARE, --error SHARE or --size MB, which certifies what it promises"
    _tell([("Estimated", said), ("Next", ask)])


def _verdict(plan: Plan, out: Path | None) -> list[tuple[str, str]]:
    """What was asked, whether it holds, and what the adapter keeps and takes."""
    measured, planner, promise = plan.measured, plan.planner, plan.promise
    if promise is None:
        rows = _limits(measured)
    else:
        drawn = ", one of each group," * planner.texts.grouped
        verdict = f"CERTIFIED by {measured.texts} texts{drawn} at {confidence()}"
        made = ". No adapter was made with these texts; they only ended the search"
        rows = [("Promise", promise.words)]
        rows.append(("Verdict", verdict + made if plan.reached else f"NOT {verdict}"))
    if not plan.reached:
        rows.append(("", _remedy(plan)))
    rows += _here(measured, grouped=planner.texts.grouped)
    size = f"{megabytes(plan.size)}: {plan.adapter.parameters:,} numbers in factors, "
    size += f"{plan.numbers:,} in all"
    rows.append(("Size", size if plan.reached and out is not None else f"about {size}"))
    if planner.equal:
        same = "Both models have the same outputs on the texts for choosing"
        rows.append(("Note", f"{same}: rank 0 everywhere."))
    elif plan.reached and not plan.adapter.parameters:
        rows.append(("Note", "No factors are needed: rank 0 everywhere."))
    if planner.texts.unknown > UNKNOWN:
        unknown = f"{planner.texts.unknown:.0%} of the tokens stand for words that the tokenizer"
        rows.append(("WARNING", f"{unknown} does not know: are these texts like the model's?"))
    kinds = planner.pair.not_low_rank.keys() - {*plan.adapter.carried}
    if left := ", ".join(sorted(kinds & {*planner.costs} if planner.costs else kinds)):
        rows.append(("Note", f"Left as in the base, and counted in the loss: {left}."))
    if plan.reached and out is not None:
        same = "read back with the same loss on a quarter of the texts"
        rows.append(("Written", f"to {out}, and {same}"))
    return rows


def _remedy(plan: Plan) -> str:
    """What to do where nothing that was asked is reached."""
    measured, promise = plan.measured, plan.promise
    if promise is None:
        less = "NOTHING TO OFFER: without an adapter the base loses less, 100%"
        return f"{less}. Allow more megabytes (--size), or another rank (--one-rank)."
    if promise.kind == "error" and not math.isfinite(measured.own_effect):
        none = "Tuning changes nothing in some of the texts."
        return f"{none} Give texts on which it does something."
    high = max(plan.ranks.values(), default=0) >= plan.planner.max_rank
    more = "Raise --one-rank, or ask for less." if high and plan.served else "Ask for less."
    if promise.kind == "error":
        nearest = f"loses {most(measured.own_effect)}"
    else:
        nearest = f"keeps {least(getattr(measured, promise.kind))}"
        if promise.kind == "same_answers" and measured.in_bfloat16 < promise.share:
            own = f"The tuned model itself keeps {percent(measured.in_bfloat16)} in bfloat16: "
            more = f"{own}these answers are too long or too open to promise."
    again = "Certify another plan with fresh texts (--held-out)."
    return f"The largest adapter that was tried {nearest}, at {confidence()}. {more} {again}"


def _limits(measured: Measured, *, often: bool = False) -> list[tuple[str, str]]:
    """What texts say of all texts like them, for people, also for those who come back."""

    def row(label: str, said: str, share: str) -> tuple[str, str]:
        return label, said + f"; {share} however often you check" * often

    rows = []
    if math.isfinite(measured.same):
        points = most(1 - measured.same).removesuffix("%")
        same = f"at least {least(measured.same)} are the tuned model's, "
        if measured.decisions == measured.texts:
            same += f"so accuracy changes by at most {points} points"
        else:
            same += "on average over texts"
        rows.append(row("Decisions", same, least(measured.same_repeated)))
    if math.isfinite(measured.same_answers):
        same = (
            f"at least {least(measured.same_answers)} of prompts get the tuned model's, token for"
        )
        same += f" token up to {ANSWER}"
        rows.append(row("Answers", same, least(measured.same_answers_repeated)))
    if not math.isnan(measured.error):
        own = f"{SHARE:.0%} of texts lose at most {most(measured.own_effect)} of what tuning "
        own += "changed in them"
        rows.append(row("Own effect", own, most(measured.own_effect_repeated)))
    return rows


def _here(measured: Measured, *, grouped: bool = False) -> list[tuple[str, str]]:
    """What was measured on these texts, for people."""
    rows = []
    if math.isfinite(measured.agreement):
        equal = round(measured.agreement * measured.decisions)
        decisions = f"{equal:,} of {measured.decisions:,} decisions as the tuned model, or "
        rows.append(("Here", f"{decisions}{percent(measured.acceptance)} if both are sampled"))
    if math.isfinite(measured.first_tokens):
        first = f"9 of 10 begin with the tuned model's first {measured.first_tokens:.0f} tokens, "
        first += "or are the same"
        if math.isfinite(measured.in_bfloat16):
            first += f"; the tuned model in bfloat16 keeps {percent(measured.in_bfloat16)}"
        rows.append(("Answers", first))
        if measured.verified < measured.texts:
            own = f"{measured.texts - measured.verified} answers are not the tuned model's greedy "
            rows.append(("WARNING", f"{own}ones, or only by a hair, and count as different"))
    if math.isfinite(measured.error):
        lost = f"{percent(measured.error)} of tuning's effect lost over all {measured.texts} texts"
        rows.append(("Estimate", lost))
    if math.isfinite(measured.accuracy):
        parts = measured.base_accuracy, measured.tuned_accuracy, measured.accuracy
        base, tuned, adapted = map(percent, parts)
        before = f", the base {base}" if math.isfinite(measured.base_accuracy) else ""
        rows.append(("Accuracy", f"{adapted}; the tuned model {tuned}{before}"))
    if measured.cut:
        cut = f"{measured.cut} texts were cut off (--tokens); all this is for such texts."
        rows.append(("Note", cut))
    if entries := ", ".join(measured.differing):
        rows.append(("Note", f"The loss counts that adapters have the base's {entries}."))
    if measured.alike > REPEATED * measured.texts:
        alike = f"{measured.alike} texts are nearly the same as another: are they independent?"
        rows.append(("WARNING", alike))
    if measured.neighbours and not grouped:
        said = "Neighbouring lines lose alike: are they of one document, or is the file sorted? Of "
        said += "documents give --group FIELD, or separate them by blank lines."
        rows.append(("WARNING", said))
    return rows


def _grid(ranks: Mapping[str, int]) -> list[str]:
    """Ranks of modules, a line for each block and a column for each kind, then all others."""
    blocks: dict[int, dict[str, int]] = {}
    others = []
    for name, rank in ranks.items():
        found = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.*?)(?:\.dense|_proj)?", name)
        if found:
            blocks.setdefault(int(found[1]), {})[found[2]] = rank
        else:
            others.append(f"{name.removesuffix('.dense').rpartition('.')[2]} {rank}")
    kinds = list(dict.fromkeys(kind for block in blocks.values() for kind in block))
    heads = {kind: _ending(kind, kinds) for kind in kinds}
    lines = []
    if blocks:
        lines.append("block " + " ".join(heads.values()))
    for number, block in blocks.items():
        cells = (f"{block.get(kind, ''):>{len(head)}}" for kind, head in heads.items())
        lines.append(f"{number:>5} " + " ".join(cells))
    return [*lines, *([", ".join(others)] if others else [])] or ["none"]


def _ending(kind: str, kinds: Sequence[str]) -> str:
    """The shortest ending of a dotted name that no other name has."""
    parts = kind.split(".")
    endings = (".".join(parts[k:]) for k in reversed(range(len(parts))))
    alone = (e for e in endings if not any(o != kind and f".{o}".endswith(f".{e}") for o in kinds))
    return next(alone, kind)


def _tell(rows: Sequence[tuple[str, str]], *, wrap: bool = True) -> None:
    """Print labels and texts in two columns, 72 characters wide."""
    for label, text in rows:
        lines = textwrap.wrap(text, 60, break_long_words=False, break_on_hyphens=False)
        for k, line in enumerate(lines if wrap else [text]):
            typer.echo(f"{label * (not k):<11} {line}".rstrip())


def _print(report: dict[str, Any]) -> None:
    typer.echo(json.dumps(report, indent=2, allow_nan=False))
