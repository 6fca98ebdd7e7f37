"""The command ``loraplan``: plan, extract and check adapters for a pair of checkpoints."""

# ruff: noqa: RUF009
from __future__ import annotations

import functools
import inspect
import json
import math
import re
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
from ._export import least, measure, megabytes, most, percent, without_nan
from ._folders import require_apart
from ._limits import DOUBT, PROMISE, SELDOM, SHARE, SIZES, UNIT, confidence, fewest
from ._measuring import Measured
from ._texts import MOST_TEXTS, read_texts
from .planner import Report
from .workflow import Plan

if TYPE_CHECKING:
    import pandas as pd

# Exit status: done; the error asked for is not reached.
DONE, SHORT = 0, 1
# Share of tokens unknown to the tokenizer above which it is said.
UNKNOWN = 0.05
# Seconds between lines of a long stage, where there is no terminal.
PAUSE = 20.0

app = typer.Typer(
    name="loraplan",
    help="Which rank does a checkpoint need? Ranks for a stated error of the function, and the "
    "adapter that has it.",
    epilog="Exit status: 0 done; 1 the error asked for is not reached, or a certificate is "
    "contradicted; 2 bad input, or a folder that cannot be written to; 3 an unexpected error, or "
    "too little memory; 130 interrupted.",
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

    texts: Path = _flag(
        "Texts like those the model is for, which it was not tuned on: .txt, one a line; .jsonl or "
        ".csv with 'text', maybe 'label'; or .jsonl of chats ('messages').",
        ...,
    )
    group: str | None = _flag(
        "Field of .jsonl or .csv that texts of one document or source share: a group counts once. "
        "In .txt blank lines separate documents."
    )
    tokens: int | None = _flag("Each text is cut to this many tokens; 128.")
    any_base: bool = _flag("Take adapters that name another base.", False, "--any-base")
    device: str = _flag("Where networks run: cpu, cuda, cuda:1, mps.", "cpu")
    as_json: bool = _flag("Print the report as JSON and nothing else.", False, "--json")
    quiet: bool = _flag("Report no progress.", False, "--quiet")


@dataclass(kw_only=True)
class _PlanOptions(_Options):
    """What `plan` takes."""

    base: str = typer.Argument(
        help="The base: a folder, a name on the hub, or 'packaged'.", metavar="BASE"
    )
    tuned: str = typer.Argument(
        help="What was tuned from it: a checkpoint, or an adapter of peft.", metavar="TUNED"
    )
    seed: int = _flag("Draws texts and probes.", 0)
    held_out: Path | None = _flag("Other texts, to certify with. Without: half of the texts.")
    error: float | None = _flag(
        "Part of what tuning typically changes in a text that may be lost, chosen before you look "
        "at prices. Without it `plan` lists these; else 0.1."
    )
    parameters: int | None = _flag(
        "Instead of --error: how many numbers the factors may have, such as a size of the list."
    )
    rank: int | None = _flag(
        "Instead of --error: as many numbers as this rank on all modules takes."
    )
    estimate: bool = _flag(
        "Require the estimate over all texts, not the certificate, to be at most --error.",
        False,
        "--estimate",
    )
    details: bool = _flag("Print the size, rank and loss of each module.", False, "--details")
    thorough: bool = _flag(
        f"Plan with {MOST_TEXTS} texts of any length, certify with {fewest(MOST_TEXTS)}, and "
        "differentiate twice as much.",
        False,
        "--thorough",
    )
    modules: str = _flag("all, attention, mlp, or a regular expression.", "all")
    leave: list[str] | None = _flag(
        "Kind that stays the base's: bias, norm, embedding, head. May be repeated."
    )
    max_rank: int | None = _flag(
        "Highest rank of a module; 64. For serving the one rank, at most 64; 8."
    )
    form: Literal["peft", "serving"] = _flag(
        "serving: factors alone, all of one rank, which peft, vLLM, SGLang and llama.cpp read "
        "alike; biases, norms, embeddings and heads stay the base's, and the error says what that "
        "costs.",
        "peft",
        "--format",
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

    models: list[str] = typer.Argument(
        help="The base, what stands in for the tuned model (an adapter of peft, a merged "
        "checkpoint, a file in GGUF), and the tuned model. Without a base nothing is said of the "
        "effect; adapters name theirs.",
        metavar="[BASE] STANDIN TUNED",
    )
    same: float | None = _flag(
        "Status 0 only if, at the stated confidence, at least this share of decisions is the tuned "
        "model's."
    )
    error: float | None = _flag(
        "Status 0 only if nine of ten texts lose at most this part of what tuning changed in them."
    )
    dtype: Literal["float32", "bfloat16"] = _flag(
        "The type of the stand-in's weights and values.", "float32"
    )


def _command(options: type[_Options], **about: Any) -> Callable[[Callable[[Any], None]], Any]:
    """Make a function of options a command, whose arguments and flags are their fields.

    Its docstring, with what `_limits` says of certificates, is the command's help.
    """
    words = {"promise": PROMISE, "unit": UNIT, "confidence": confidence(), "seldom": SELDOM}
    words["doubt"] = f"{DOUBT:.0%}"

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
    """Say which rank each module needs. Writes nothing.

    Without --error, --parameters or --rank: a list of sizes and what each is certified to lose, all
    at once, so that you may look and then take one with --parameters.

    With --error the status is 0 if the plan is certified: {promise} so much {unit}. The confidence
    is {confidence}: of all first plans made this way, {seldom} gets a certificate that is wrong.
    Texts (or groups of them) must be independent draws. Half of them certify: no adapter is made
    with these, they only end the search. Losses are measured in float32 on texts as given; nothing
    is generated.
    With --estimate only the root mean square over these texts is compared.
    """
    if options.error is options.parameters is options.rank is None and not options.estimate:
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
    """Write the adapter as a folder that peft reads, with its errors in report.json.

    With --error it is written, and the status is 0, if it is certified, as `plan --help` explains;
    with --parameters or --rank if it loses less than the base, with what it is certified to lose.
    """
    _show(_call(workflow.extract, options), options, options.out)


@_command(_CheckOptions)
def check(options: _CheckOptions) -> None:
    """Say how much of a tuned model a stand-in keeps, on texts that chose nothing about it.

    A stand-in is an adapter of any kind that peft reads, a merged checkpoint, a file in GGUF, or
    the tuned model itself with --dtype bfloat16. Limits hold at a confidence of {confidence}, for
    any distribution of texts, if these are independent draws: the first if this is the only check,
    the other however often you come back with more texts in the same file. Nothing is kept between
    checks. Texts are scored as they are given; nothing is generated.
    With --same or --error the status is 1 if the first limit does not say that much is kept.
    """
    for name in ("same", "error"):
        if (share := getattr(options, name)) is not None and not 0 < share < 1:
            raise InputError(name, "above 0 and below 1", share)
    if not 2 <= len(options.models) <= 3:
        given = " ".join(options.models)
        raise InputError("models", "a stand-in and a tuned model, maybe after a base", given)
    names = zip(("standin", "tuned"), options.models, strict=False)
    if options.error and len(options.models) == 2 and not any(is_adapter(*each) for each in names):
        remedy = "name the model before tuning first"
        raise InputError("error", "asked with a base, of whose tuning it is a part", "none", remedy)
    measured = _call(workflow.check, options)
    size = measure(options.models[-2])
    if options.as_json:
        _print(without_nan(measured._asdict() | {"bytes": size}))
    else:
        _tell([*_promises(measured, options), *_measured(measured), ("Size", megabytes(size))])
    if not _is_kept(measured, options):
        raise typer.Exit(SHORT)


@app.command()
def example(
    folder: Annotated[Path, typer.Argument(help="A new folder.", metavar="DIR")],
    seed: Annotated[int, typer.Option(help="Draws the texts, their order and the heads.")] = 0,
) -> None:
    """Write a base, what was tuned from it and texts, to try the other commands on.

    This takes under a minute. An encoder is tuned on docstrings of Python's standard library, to
    say what their module is for, once in full and once by LoRA; README.md in DIR has the sources.
    """
    with _stages() as report:
        _example.write(folder.expanduser(), seed=seed, report=report)
    files = "base, tuned, lora, texts.jsonl, fresh.jsonl; README.md has their sources"
    _tell([("Written", f"to {folder}: {files}")])
    plan = "loraplan plan base tuned --texts texts.jsonl --error 0.1"
    _tell([("Next", f"cd {folder}"), ("", plan)], wrap=False)


def _call(function: Callable[..., Any], options: _Options) -> Any:
    """Call a function with a command's options and the texts of its files."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    for name in ("as_json", "quiet", "details"):
        given.pop(name, None)
    if function is workflow.prices:
        del given["estimate"]
    if isinstance(options, _PlanOptions):
        given["serving"] = given.pop("form") == "serving"
    files = {name: given[name] for name in ("texts", "held_out") if name in given}
    if "out" in given:
        require_apart("out", given["out"], files.values())
    if isinstance(options, _CheckOptions):
        *base, given["standin"], given["tuned"] = given.pop("models")
        given |= {"base": base[0]} if base else {}
        given.pop("same", None), given.pop("error", None)
    models = [given[name] for name in ("tuned", "base", "standin") if name in given]
    about = {"models": models, "group": given.pop("group", None)}
    given |= {name: read_texts(file, **about) for name, file in files.items()}
    if options.quiet or options.as_json:
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
    if options.details:
        _tell([("Modules", "what each loses alone is a part of the effect")])
        typer.echo(plan.table().to_string(index=False, formatters={"lost": percent}))
    raise typer.Exit(status)


def _show_prices(prices: pd.DataFrame, options: _PlanOptions) -> None:
    """Show what adapters of several sizes lose."""
    if options.as_json:
        typer.echo(prices.to_json(orient="records", indent=2))
        return
    lines = [f"{'numbers':>12} {'size':>9} {'loss':>7} {'9 of 10 texts at most':>22}"]
    for numbers, size, error, limit in prices.itertuples(index=False):
        lines.append(f"{numbers:>12,} {megabytes(size):>9} {percent(error):>7} {most(limit):>22}")
    _tell([("Prices" * (not k), line) for k, line in enumerate(lines)], wrap=False)
    by = f"by {prices.attrs['texts']} texts at {confidence()}, for all sizes at once"
    rows = [
        ("Certified", f"the last column, {by}: parts {UNIT}"),
        ("Next", "extract with --parameters NUMBERS and --out FOLDER writes one of these"),
    ]
    _tell(_neighbours(prices.attrs["neighbours_alike"]) + rows)


def _verdict(plan: Plan, out: Path | None) -> list[tuple[str, str]]:
    """What was asked, whether it holds, and what the adapter loses and takes."""
    rows, measured, planner = [], plan.measured, plan.planner
    if plan.aim is None:
        rows += _certificate(
            measured, f"{confidence(DOUBT / SIZES)}, as each size of the price list"
        )
    elif plan.estimate:
        aim = f"{100 * plan.aim:.4g}%"
        rows.append(("Asked", f"an estimated loss of at most {aim} over the texts to certify with"))
        rows.append(("Verdict", "REACHED, as an estimate" if plan.reached else "NOT REACHED"))
    else:
        rows.append(("Asked", f"{PROMISE} {100 * plan.aim:.4g}% {UNIT}"))
        drawn = ", one of each group," * planner.texts.grouped
        verdict = f"CERTIFIED by {measured.texts} texts{drawn} at {confidence()} (float32, nothing "
        verdict += "generated)"
        made = ". No adapter was made with these texts; they only ended the search"
        rows.append(("Verdict", verdict + made if plan.reached else f"NOT {verdict}"))
    if not plan.reached:
        rows.append(("", _remedy(plan)))
    rows += _neighbours(plan.neighbours_alike)
    if math.isfinite(measured.own_effect):
        how = confidence() if plan.aim is None else "estimate"
        own = f"{most(measured.own_effect)} of what tuning changed in that text ({how})"
        rows.append(("Own effect", f"9 of 10 texts lose at most {own}"))
    rows += _measured(measured, "Decisions")
    size = f"{megabytes(plan.size)}: {plan.adapter.parameters:,} numbers in factors, "
    size += f"{plan.carried:,} in all"
    rows.append(("Size", size if plan.reached and out is not None else f"about {size}"))
    error, parameters = plan.uniform
    if plan.adapter.parameters and parameters <= 1.05 * plan.adapter.parameters:
        rows.append(("Instead", f"one rank everywhere, at the same size, loses {percent(error)}"))
    if planner.equal:
        same = "Both models have the same outputs on all texts"
        rows.append(("Note", f"{same}: rank 0 everywhere is exact."))
    elif plan.reached and not plan.adapter.parameters:
        rows.append(("Note", "No factors are needed: rank 0 everywhere."))
    if planner.texts.cut:
        cut = f"{planner.texts.cut} texts were cut off after {planner.options['tokens']} tokens"
        rows.append(("Note", f"{cut}; the certificate is for such texts."))
    if planner.texts.unknown > UNKNOWN:
        unknown = f"{planner.texts.unknown:.0%} of the tokens stand for words that the tokenizer"
        rows.append(("WARNING", f"{unknown} does not know: are these texts like the model's?"))
    if left := ", ".join(sorted(planner.pair.leave & planner.pair.not_low_rank.keys())):
        rows.append(("Note", f"Left as in the base, and counted in the loss: {left}."))
    if plan.reached and out is not None:
        same = "read back with the same loss on a quarter of the texts"
        rows.append(("Written", f"to {out}, and {same}"))
    return rows


def _neighbours(alike: bool) -> list[tuple[str, str]]:
    """A warning of texts that may be no independent draws."""
    said = "Neighbouring lines lose alike: are they of one document? Then give --group FIELD, or "
    said += "separate documents by blank lines; the certificate counts each as a draw of its own."
    return [("WARNING", said)] * alike


def _remedy(plan: Plan) -> str:
    """What to do where nothing that was asked is reached."""
    if not math.isfinite(plan.stated):
        none = "Tuning changes none of the texts for choosing."
        return f"{none} Give texts on which it does something."
    if plan.aim is None:
        less = "NOTHING TO OFFER: without an adapter the base loses less, 100%"
        return f"{less}. Raise --max-rank or --parameters, or --leave more as in the base."
    high = max(plan.ranks.values(), default=0) >= plan.planner.max_rank
    more = "Raise --max-rank, or allow a larger error." if high else "Allow a larger error."
    nearest = f"The best adapter that was tried loses {most(plan.stated)}"
    if plan.estimate:
        return f"{nearest}. {more}"
    again = "Certify another plan with fresh texts (--held-out)."
    return f"{nearest}, by its certificate or over all texts. {more} {again}"


def _certificate(measured: Measured, also: str = "") -> list[tuple[str, str]]:
    """What texts certify of an adapter on which they did not decide."""
    by = f"by {measured.texts} texts at {also or confidence()}"
    return [("Certified", f"{PROMISE} {most(measured.certified)} {UNIT} ({by})")]


def _is_kept(measured: Measured, options: _CheckOptions) -> bool:
    """Whether the limits say that as much is kept as was asked."""
    same = options.same is None or measured.same >= options.same
    return same and (options.error is None or measured.own_effect <= options.error)


def _promises(measured: Measured, options: _CheckOptions) -> list[tuple[str, str]]:
    """What texts say of all texts like them, for people."""
    rows, often = list[tuple[str, str]](), "however often you check"
    if (options.same, options.error) != (None, None):
        kept = "KEPT" if _is_kept(measured, options) else "NOT KEPT"
        rows.append(("Verdict", f"{kept}, by {measured.texts} texts at {confidence()}"))
    if math.isfinite(measured.same):
        same = f"at least {least(measured.same)} of decisions are the tuned model's, so accuracy "
        same += f"changes by at most {most(1 - measured.same)[:-1]} points; "
        rows.append(("Decisions", f"{same}{least(measured.same_repeated)} {often}"))
    if not math.isnan(measured.own_effect):
        own = f"{SHARE:.0%} of texts lose at most {most(measured.own_effect)} of what tuning "
        own += f"changed in them; {most(measured.own_effect_repeated)} {often}"
        rows.append(("Own effect", own))
    sure = f"{confidence()}, if texts like these {measured.texts} are independent draws"
    rows.append(("Confidence", sure))
    if measured.alike:
        alike = f"{measured.alike} texts are nearly the same as another: are they independent?"
        rows.append(("WARNING", alike))
    return rows


def _measured(measured: Measured, label: str = "Here") -> list[tuple[str, str]]:
    """What was measured on these texts, for people."""
    rows = []
    if math.isfinite(measured.error):
        rows.append(("Estimate", f"{percent(measured.error)} lost over all {measured.texts} texts"))
    if math.isfinite(measured.agreement):
        equal = round(measured.agreement * measured.decisions)
        decisions = f"{equal:,} of {measured.decisions:,} as the tuned model"
        drawn = f"if both sample, they differ on {percent(measured.variation)}"
        rows.append((label, f"{decisions}; {drawn}"))
    if math.isfinite(measured.accuracy):
        parts = measured.base_accuracy, measured.tuned_accuracy, measured.accuracy
        base, tuned, adapted = map(percent, parts)
        before = f", the base {base}" if math.isfinite(measured.base_accuracy) else ""
        rows.append(("Accuracy", f"{adapted}; the tuned model {tuned}{before}"))
    if entries := ", ".join(measured.differing):
        rows.append(("Note", f"The loss counts that adapters have the base's {entries}."))
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
