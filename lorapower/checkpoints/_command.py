"""The command ``lorapower``: plan, extract and check adapters for a pair of checkpoints."""

# ruff: noqa: RUF009
from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..errors import InputError, LorapowerError
from . import workflow
from ._export import measure_peft, measured_rows, megabytes, percent, size_rows, without_nan
from ._measuring import read_texts
from .workflow import Plan

# Exit status: done; the error asked for is not reached; bad input.
DONE, SHORT, BAD = 0, 1, 2
INTERRUPTED = 130
# Share of tokens unknown to the tokenizer above which it is said.
UNKNOWN = 0.05
# Seconds between lines of a long stage, where there is no terminal.
PAUSE = 20.0

app = typer.Typer(
    name="lorapower",
    help="Which rank does a checkpoint need? Ranks for a stated error of the function, and the "
    "adapter that has it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console, errors = Console(), Console(stderr=True)


def _flag(help: str, default: Any = None, *names: str, **about: Any) -> Any:
    """A field of a command's options that is a flag; ``MISSING`` for one that must be given."""
    return field(default=default, metadata={"is": typer.Option(*names, help=help, **about)})


def _argument(help: str, metavar: str, default: Any = MISSING) -> Any:
    """A field of a command's options that is given by its place."""
    return field(default=default, metadata={"is": typer.Argument(help=help, metavar=metavar)})


@dataclass(kw_only=True)
class _Options:
    """What all commands take: each field is an argument or a flag."""

    base: str = _argument("The base: a folder, a name on the hub, or 'packaged'.", "BASE")
    texts: Path = _flag(
        "Texts like those the model is for: one a line, or .jsonl with 'text'.", MISSING
    )
    tokens: int = _flag("Each text is cut to this many tokens.", 128)
    seed: int = _flag("Draws texts and probes.", 0)
    device: str = _flag("Where networks run: cpu, cuda, cuda:1, mps.", "cpu")
    as_json: bool = _flag("Print the report as JSON and nothing else.", False, "--json")
    quiet: bool = _flag("Report no progress.", False, "--quiet")


@dataclass(kw_only=True)
class _PlanOptions(_Options):
    """What `plan` takes."""

    tuned: str | None = _argument(
        "What was tuned from it: a checkpoint, or an adapter of peft.", "TUNED", None
    )
    adapter: list[str] | None = _flag(
        "Instead of TUNED: an adapter and its weight, such as movies=0.7. May be repeated.",
        metavar="DIR=WEIGHT",
    )
    held_out: Path | None = _flag("Other texts, to state errors with. Without: half of the texts.")
    error: float | None = _flag(
        "Part of the tuning's effect that may be lost; 0.1 if nothing is asked."
    )
    parameters: int | None = _flag("Instead of --error: how many numbers the factors may have.")
    rank: int | None = _flag(
        "Instead of --error: as many numbers as this rank on all modules takes."
    )
    sure: bool = _flag(
        "Require the 95% limit of the error, not its estimate, to be at most --error.",
        False,
        "--sure",
    )
    modules: str = _flag("all, attention, mlp, or a regular expression.", "all")
    leave: list[str] | None = _flag(
        "Kind that stays the base's: bias, norm, embedding, head. May be repeated."
    )
    max_rank: int | None = _flag("Highest rank of a module; 64, or 16 for serving.")
    bucket: int | None = _flag("Ranks are multiples of this; 1, or 8 for serving.")
    form: Literal["peft", "serving"] = _flag(
        "serving: ranks in few sizes and factors alone, as servers of many adapters want; biases, "
        "norms, embeddings and heads stay the base's, and the error says what that costs.",
        "peft",
        "--format",
    )
    force: bool = _flag(
        "Take adapters that name another base, and replace what is in folders for results.",
        False,
        "--force",
    )


@dataclass(kw_only=True)
class _ExtractOptions(_PlanOptions):
    """What `extract` and `shrink` take."""

    out: Path = _flag("Folder for the adapter.", MISSING)
    merged: Path | None = _flag("Folder for the adapted model in full, in float32, too.")


@dataclass(kw_only=True)
class _CheckOptions(_Options):
    """What `check` takes."""

    adapter: str = _argument("Folder of an adapter that peft reads.", "ADAPTER")
    tuned: str = _argument("What it stands in for, as in `plan`.", "TUNED")
    force: bool = _flag("Take adapters for other bases.", False, "--force")


def _command(options: type[_Options], **about: Any) -> Callable[[Callable[[Any], None]], Any]:
    """Make a function of options a command, whose arguments and flags are their fields."""
    types = get_type_hints(options)
    parameters = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if each.default is MISSING else each.default,
            annotation=Annotated[types[each.name], each.metadata["is"]],
        )
        for each in fields(options)
    ]

    def decorate(function: Callable[[Any], None]) -> Callable[[Any], None]:
        def run(**given: Any) -> None:
            function(options(**given))

        functools.update_wrapper(run, function)
        run.__dict__["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {}
        app.command(**about)(run)
        return function

    return decorate


@_command(_PlanOptions)
def plan(options: _PlanOptions) -> None:
    """Say which rank each module needs. Writes nothing.

    The status is 0 if the error measured on held-out texts is at most what was asked for. That is
    an estimate; the limit at 95% beside it is the cautious number, and may be above. With --sure
    the limit must be at most what was asked for. The limit cuts off 1.25% of a bootstrap of texts,
    not 5%, since errors of texts are skewed.
    """
    _show(_call(workflow.plan, options), options.as_json)


@_command(_ExtractOptions)
@_command(
    _ExtractOptions,
    name="shrink",
    help="Write a smaller adapter: `extract`, where TUNED is an adapter.",
)
def extract(options: _ExtractOptions) -> None:
    """Write the adapter as a folder that peft reads, with its errors in report.json.

    The adapter is written, and the status is 0, if the error measured on held-out texts is at most
    what was asked for. That is an estimate; the limit at 95% beside it is the cautious number. With
    --sure the limit must be at most what was asked for, or nothing is written. It cuts 1.25% of a
    bootstrap of texts, not 5%, since errors of texts are skewed.
    """
    _show(_call(workflow.extract, options), options.as_json, options.out)


@_command(_CheckOptions)
def check(options: _CheckOptions) -> None:
    """Measure anybody's adapter against the tuned model, on texts that no plan has used."""
    measured = _call(workflow.check, options)
    carried, size = measure_peft(Path(options.adapter))
    if options.as_json:
        _print(without_nan(measured._asdict() | {"carried": carried, "adapter_bytes": size}))
        return
    rows = [*size_rows(carried, size, estimated=False), *measured_rows(measured)]
    console.print(_table(f"{options.adapter} against {options.tuned}", rows))


def main() -> NoReturn:
    """Run the command; errors of this package are one line, with exit status 2."""
    try:
        app()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            errors.print("interrupted")
        raise
    except LorapowerError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(BAD) from None
    raise SystemExit(DONE)


def _call(function: Callable[..., Any], options: _Options) -> Any:
    """Call a function with a command's options and the texts of its files."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    del given["as_json"], given["quiet"]
    if isinstance(options, _PlanOptions):
        given["tuned"] = _tuned(options.tuned, given.pop("adapter", None))
        given["serving"] = given.pop("form") == "serving"
    for name in ("texts", "held_out"):
        if name in given:
            given[name] = read_texts(given[name])
    if options.quiet or options.as_json:
        return function(**given)
    with _Stages() as report:
        return function(**given, report=report)


def _tuned(tuned: str | None, weighted: Sequence[str] | None) -> str | dict[str, float]:
    """What was tuned from the base: a name, or adapters with their weights."""
    if not weighted:
        if tuned is None:
            allowed = "given, or adapters with their weights (--adapter DIR=WEIGHT)"
            raise InputError("TUNED", allowed=allowed, given="neither")
        return tuned
    if tuned is not None:
        allowed = "left out where adapters have weights (--adapter)"
        raise InputError("TUNED", allowed=allowed, given=f"{tuned} and {len(weighted)} of these")
    weights: dict[str, float] = {}
    for entry in weighted:
        folder, _, number = entry.rpartition("=")
        weight = math.nan
        with suppress(ValueError):
            weight = float(number)
        if not folder or not math.isfinite(weight):
            allowed = "a folder, an equals sign and a number, such as movies=0.7"
            raise InputError("--adapter", allowed=allowed, value=entry)
        if not Path(folder).expanduser().is_dir():
            raise InputError("--adapter", allowed="of a folder that exists", given=folder)
        if folder in weights:
            raise InputError("--adapter", allowed="given once for each folder", given=entry)
        weights[folder] = weight
    return weights


class _Stages:
    """Stages of work on the stream for errors: bars on a terminal, elsewhere plain lines."""

    def __init__(self) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        times = TimeElapsedColumn(), TimeRemainingColumn()
        self._bars = Progress(*columns, *times, console=errors, transient=True)
        self._under_way, self._said = False, 0.0

    def show(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is."""
        if errors.is_terminal:
            # Not before: what is refused before any work is one line.
            self._bars.start()
        if not self._under_way or self._bars.tasks[-1].description != stage:
            self.end()
            self._bars.add_task(stage, total=total)
            self._under_way, self._said = True, 0.0
            self._say("...")
        task = self._bars.tasks[-1]
        self._bars.update(task.id, completed=done, total=total)
        elapsed = task.elapsed or 0.0
        if done >= total:
            self.end()
        elif done and elapsed - self._said >= PAUSE:
            self._said = elapsed
            remains = elapsed * (total - done) / done
            self._say(f"{done} of {total}, about {remains:.0f} s remain")

    def end(self) -> None:
        """End the stage that is under way, if there is one."""
        if self._under_way:
            self._say(f"done in {self._bars.tasks[-1].elapsed:.1f} s")
        self._under_way = False

    def _say(self, what: str) -> None:
        if not errors.is_terminal:
            typer.echo(f"{self._bars.tasks[-1].description}: {what}", err=True)

    def __enter__(self) -> Callable[[str, int, int], None]:
        return self.show

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            # Not if it failed: no stage is done then.
            self.end()
        if errors.is_terminal:
            self._bars.stop()


def _show(plan: Plan, as_json: bool, out: Path | None = None) -> NoReturn:
    """Show a plan, and end with its status."""
    status = DONE if plan.reached else SHORT
    if as_json:
        _print(plan.report())
        raise typer.Exit(status)
    ranks = Table(title="Ranks, and the part of the effect that each module alone loses")
    ranks.add_column("module", overflow="fold")
    for name in ("size", "rank", "lost"):
        ranks.add_column(name, justify="right")
    for name, _, rows, columns, rank, lost in plan.table().itertuples(index=False):
        ranks.add_row(name, f"{rows}×{columns}", str(rank), percent(lost))
    console.print(ranks)
    table = _table("In all", plan.totals(written=plan.reached and out is not None))
    table.caption = (
        "uniform: one rank for all; energy: an equal share of each change's squared norm; plain: "
        "singular values by gain for cost; effect: directions and gains chosen by the outputs"
    )
    console.print(table)
    if plan.planner.equal:
        console.print("Both models give the same on all texts: rank 0 everywhere is exact.")
    elif plan.reached and not plan.adapter.parameters:
        console.print("Nothing but what is carried over is needed: rank 0 everywhere.")
    aim, measured = plan.aim, plan.measured
    if (unknown := plan.planner.texts.unknown) > UNKNOWN:
        console.print(
            f"{unknown:.0%} of the tokens stand for words that the tokenizer does not know: are "
            "these texts like those the model is for?"
        )
    if not plan.reached:
        most = f", at most {measured.error_upper:.3g} at 95%" if plan.sure else ""
        console.print(
            f"An error of {aim:g} was not reached with ranks up to {plan.planner.max_rank}: "
            f"the nearest found is {measured.error:.3g}{most}. Raise --max-rank, allow a larger "
            + ("error, or give more texts." if plan.sure else "error, or both.")
        )
    elif out is not None:
        size = megabytes(plan.size)
        console.print(f"Written to {out}, {size}, read back with the same error.")
    if left := ", ".join(sorted(plan.planner.pair.leave & plan.planner.pair.not_low_rank.keys())):
        console.print(f"Left as in the base, and counted in the error: {left}.")
    if plan.reached and aim is not None and measured.error_upper > aim:
        console.print(
            f"The error of {aim:g} is reached by the estimate, but not by its limit at 95%, "
            "the cautious number: ask for a smaller error, use --sure, or give more texts."
        )
    raise typer.Exit(status)


def _table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def _print(report: dict[str, Any]) -> None:
    typer.echo(json.dumps(report, indent=2, allow_nan=False))
