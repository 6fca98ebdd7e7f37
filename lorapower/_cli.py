"""The command ``lorapower``: plan, extract and check adapters for a pair of checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .errors import LorapowerError

# Exit status: done; the error asked for is not reached; bad input.
DONE, SHORT, BAD = 0, 1, 2

app = typer.Typer(
    name="lorapower",
    help="Which rank does a checkpoint need? Ranks for a stated error of the function, and the "
    "adapter that has it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console, errors = Console(), Console(stderr=True)

Base = Annotated[str, typer.Argument(help="The base: a folder, a name on the hub, or 'packaged'.")]
Tuned = Annotated[str, typer.Argument(help="What was tuned from it: a folder or a name.")]
TextsFile = Annotated[
    Path, typer.Option(help="Texts like those the model is for: one a line, or .jsonl with 'text'.")
]
HeldOut = Annotated[
    Path | None, typer.Option(help="Other texts, to state errors with. Without: half of the texts.")
]
Error = Annotated[
    float | None,
    typer.Option(help="Part of the tuning's effect that may be lost; 0.1 if nothing is asked."),
]
Parameters = Annotated[int | None, typer.Option(help="Or: how many numbers the factors may have.")]
Rank = Annotated[
    int | None, typer.Option(help="Or: as many numbers as this rank everywhere takes.")
]
Modules = Annotated[str, typer.Option(help="all, attention, mlp, or a regular expression.")]
Leave = Annotated[
    list[str] | None,
    typer.Option(help="Kind that stays the base's: bias, norm, embedding, head. May be repeated."),
]
MaxRank = Annotated[int, typer.Option(help="Highest rank of a module.")]
Bucket = Annotated[int, typer.Option(help="Ranks are multiples of this.")]
Tokens = Annotated[int, typer.Option(help="Texts are cut off after so many.")]
Seed = Annotated[int, typer.Option(help="Draws texts and probes.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")]


@app.command()
def plan(
    context: typer.Context,
    base: Base,
    tuned: Tuned,
    texts: TextsFile,
    held_out: HeldOut = None,
    error: Error = None,
    parameters: Parameters = None,
    rank: Rank = None,
    modules: Modules = "all",
    leave: Leave = None,
    max_rank: MaxRank = 64,
    bucket: Bucket = 1,
    tokens: Tokens = 128,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Say which rank each module needs. Writes nothing.

    The status is 0 if the error measured on held-out texts is at most what was asked for. That is
    an estimate; the limit at 95% beside it is the cautious number, and may be above.
    """
    from .checkpoints import workflow

    _show(_call(workflow.plan, context.params), as_json)


@app.command()
def extract(
    context: typer.Context,
    base: Base,
    tuned: Tuned,
    texts: TextsFile,
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    held_out: HeldOut = None,
    error: Error = None,
    parameters: Parameters = None,
    rank: Rank = None,
    repair: Annotated[bool, typer.Option(help="Fit the adapter to the tuned model.")] = True,
    modules: Modules = "all",
    leave: Leave = None,
    max_rank: MaxRank = 64,
    bucket: Bucket = 1,
    tokens: Tokens = 128,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option(help="Replace an adapter that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write the adapter as a folder that peft reads, with its errors in report.json.

    The adapter is written, and the status is 0, if the error measured on held-out texts is at most
    what was asked for. That is an estimate; the limit at 95% beside it is the cautious number.
    """
    from .checkpoints import workflow

    _show(_call(workflow.extract, context.params), as_json, out)


@app.command()
def check(
    context: typer.Context,
    base: Base,
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter that peft reads.")],
    tuned: Tuned,
    texts: TextsFile,
    tokens: Tokens = 128,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure anybody's adapter against the tuned model, on texts that no plan has used."""
    from .adapters import _files
    from .checkpoints import workflow
    from .checkpoints._measuring import without_nan

    measured = _call(workflow.check, context.params)
    carried, size = _files.measure_peft(Path(adapter))
    if as_json:
        numbers = measured._asdict() | {"carried": carried, "adapter_bytes": size}
        _print(without_nan(numbers))
        return
    title = f"{adapter} against {tuned}"
    console.print(_table(title, [*_carried(carried, size, estimate=False), *_measured(measured)]))


def main() -> NoReturn:
    """Run the command; errors of this package are one line, with exit status 2."""
    try:
        app()
    except LorapowerError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(BAD) from None
    raise SystemExit(DONE)


def _call(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Call a function with a command's options and the texts of its files."""
    from .checkpoints import read_texts

    options = dict(options)
    with _progress(quiet=options.pop("as_json")) as report:
        for name in ("texts", "held_out"):
            if options.get(name):
                options[name] = read_texts(options[name])
        if "leave" in options:
            options["leave"] = options["leave"] or []
        return function(**options, report=report)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A report of progress by a bar for each stage, on the stream for errors."""
    if quiet:
        yield None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    progress = Progress(*columns, TimeElapsedColumn(), console=errors, transient=True)
    bars: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        # Not before: what is refused before any work is one line.
        progress.start()
        if stage not in bars:
            bars[stage] = progress.add_task(stage, total=total)
        progress.update(bars[stage], completed=done, total=total)

    try:
        yield report
    finally:
        if bars:
            progress.stop()


def _show(plan: Any, as_json: bool, out: Path | None = None) -> NoReturn:
    """Show a plan, and end with its status."""
    status = DONE if plan.reached else SHORT
    if as_json:
        _print(plan.report())
        raise typer.Exit(status)
    if not plan.repaired:
        console.print(_ranks(plan))
    console.print(_totals(plan, written=plan.reached and out is not None))
    if plan.planner.equal:
        console.print("Both models give the same on all texts: rank 0 everywhere is exact.")
    elif plan.reached and not plan.adapter.parameters:
        console.print("Nothing but what is carried over is needed: rank 0 everywhere.")
    if not plan.reached:
        console.print(
            f"An error of {plan.aim:g} is not reached with ranks up to {plan.planner.max_rank}: "
            f"the nearest is {plan.measured.error:.3g}. Raise --max-rank, or ask for less."
        )
    elif out is not None:
        from .checkpoints._measuring import megabytes

        size = megabytes(plan.size)
        console.print(f"Written to {out}, {size}, read back with the same error.")
    if plan.reached and plan.aim is not None and plan.measured.error_upper > plan.aim:
        console.print(
            f"The error of {plan.aim:g} is reached by the estimate, but not by its limit at 95%, "
            "the cautious number: ask for less to be sure, or give more texts."
        )
    raise typer.Exit(status)


def _ranks(plan: Any) -> Table:
    table = Table(title="Ranks, and the part of the effect that each module alone loses")
    table.add_column("module", overflow="fold")
    rows = plan.table()
    known = [name for name in ("lost",) if rows[name].notna().any()]
    for name in ("size", "rank", *known):
        table.add_column(name, justify="right")
    for row in rows.to_dict("records"):
        shares = (_percent(row[name]) for name in known)
        table.add_row(row["module"], f"{row['out']}×{row['in']}", str(row["rank"]), *shares)
    return table


def _totals(plan: Any, written: bool) -> Table:
    pair, used = plan.planner.pair, plan.adapter.parameters
    whole = sum(out * into for out, into in (m.shape for m in pair.modules.values()))
    rows = [
        ("parameters of the factors", f"{used:,} of {whole:,}"),
        *_carried(plan.carried, plan.size, estimate=not written),
        ("method", plan.method + (", repaired" if plan.repaired else "")),
        *_measured(plan.measured),
        ("error predicted to first order", _percent(plan.predicted)),
        ("error with attention alone, in full", _percent(plan.attention)),
    ]
    for name, (error, parameters) in plan.baselines.items():
        # One rank for all cannot be below 1.
        smallest = f" at rank 1 ({parameters:,} parameters)" if parameters > used else ""
        rows.append((f"error of {name}{smallest}, unrepaired", _percent(error)))
    for kind, number in pair.not_low_rank.items():
        what = "left out" if kind in pair.leave else "carried over"
        rows.append((f"{kind}, {what}", f"{number:,}"))
    rows += [("texts cut off", f"{plan.planner.texts.cut}"), ("seconds", f"{plan.seconds:.0f}")]
    table = _table("In all", rows)
    table.caption = (
        "uniform: one rank for all; energy: an equal share of each change's squared norm; inputs: "
        "by the variance of inputs; plain, input metric, two metrics: by gain for cost"
    )
    return table


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def _carried(numbers: int, size: int, *, estimate: bool) -> list[tuple[str, str]]:
    from .checkpoints._measuring import megabytes

    return [
        ("numbers carried in all", f"{numbers:,}"),
        ("size of the adapter's files", "about " * estimate + megabytes(size)),
    ]


def _measured(measured: Any) -> list[tuple[str, str]]:
    rows = [
        ("error (part of the effect that is lost)", _percent(measured.error)),
        ("at most, at 95%", _percent(measured.error_upper)),
    ]
    if math.isfinite(measured.agreement):
        rows += [
            ("equal decisions", _percent(measured.agreement)),
            ("at least, at 95%", _percent(measured.agreement_lower)),
            ("mean KL divergence, nats", f"{measured.kl:.2e}"),
        ]
    return [*rows, ("texts measured on", f"{measured.texts}")]


def _percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "–"


def _print(report: dict[str, Any]) -> None:
    typer.echo(json.dumps(report, indent=2, allow_nan=False))
