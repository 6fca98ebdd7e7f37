"""The command ``lorapower``: plan, extract and check adapters for a pair of checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..errors import InputError, LorapowerError

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

Base = Annotated[
    str,
    typer.Argument(metavar="BASE", help="The base: a folder, a name on the hub, or 'packaged'."),
]
Tuned = Annotated[
    str | None,
    typer.Argument(
        metavar="TUNED", help="What was tuned from it: a checkpoint, or an adapter of peft."
    ),
]
Weighted = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="DIR=WEIGHT",
        help="Instead of TUNED: an adapter and its weight, such as movies=0.7. May be repeated.",
    ),
]
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
MaxRank = Annotated[
    int | None, typer.Option(help="Highest rank of a module; 64, or 16 for serving.")
]
Bucket = Annotated[
    int | None, typer.Option(help="Ranks are multiples of this; 1, or 8 for serving.")
]
Sure = Annotated[
    bool,
    typer.Option("--sure", help="Reached means: by the error's limit at 95%, the cautious one."),
]
Format = Annotated[
    Literal["peft", "serving"],
    typer.Option(
        "--format",
        help="serving: ranks in few sizes and factors alone, as servers of many adapters want; "
        "biases, norms, embeddings and heads stay the base's, and the error says what that costs.",
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Take adapters that name another base, and replace what is in folders for results.",
    ),
]
Device = Annotated[str, typer.Option(help="Where networks run: cpu, cuda, cuda:1, mps.")]
Memory = Annotated[
    float | None,
    typer.Option(help="GB for statistics of modules at once; without: half of what is free."),
]
Tokens = Annotated[int, typer.Option(help="Texts are cut off after so many.")]
Seed = Annotated[int, typer.Option(help="Draws texts and probes.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Report no progress.")]


@app.command()
def plan(
    context: typer.Context,
    base: Base,
    texts: TextsFile,
    tuned: Tuned = None,
    adapter: Weighted = None,
    held_out: HeldOut = None,
    error: Error = None,
    parameters: Parameters = None,
    rank: Rank = None,
    sure: Sure = False,
    modules: Modules = "all",
    leave: Leave = None,
    max_rank: MaxRank = None,
    bucket: Bucket = None,
    form: Format = "peft",
    tokens: Tokens = 128,
    seed: Seed = 0,
    device: Device = "cpu",
    memory: Memory = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say which rank each module needs. Writes nothing.

    The status is 0 if the error measured on held-out texts is at most what was asked for. That is
    an estimate; the limit at 95% beside it is the cautious number, and may be above. With --sure
    the limit must be at most what was asked for. It cuts 1.25% of a bootstrap of texts, not 5%,
    since errors of texts are skewed.
    """
    from . import workflow

    _show(_call(workflow.plan, context.params), as_json)


@app.command()
@app.command("shrink", help="Write a smaller adapter: `extract`, where TUNED is an adapter.")
def extract(
    context: typer.Context,
    base: Base,
    texts: TextsFile,
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    tuned: Tuned = None,
    adapter: Weighted = None,
    held_out: HeldOut = None,
    error: Error = None,
    parameters: Parameters = None,
    rank: Rank = None,
    sure: Sure = False,
    repair: Annotated[
        bool,
        typer.Option(
            help="Also fit the factors to the tuned model, block by block and by gradient: minutes "
            "more, for a somewhat smaller adapter."
        ),
    ] = False,
    modules: Modules = "all",
    leave: Leave = None,
    max_rank: MaxRank = None,
    bucket: Bucket = None,
    form: Format = "peft",
    tokens: Tokens = 128,
    seed: Seed = 0,
    device: Device = "cpu",
    memory: Memory = None,
    merged: Annotated[
        Path | None, typer.Option(help="Folder for the adapted model in full, in float32, too.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the adapter as a folder that peft reads, with its errors in report.json.

    The adapter is written, and the status is 0, if the error measured on held-out texts is at most
    what was asked for. That is an estimate; the limit at 95% beside it is the cautious number. With
    --sure the limit must be at most what was asked for, or nothing is written. It cuts 1.25% of a
    bootstrap of texts, not 5%, since errors of texts are skewed.
    """
    from . import workflow

    _show(_call(workflow.extract, context.params), as_json, out)


@app.command()
def check(
    context: typer.Context,
    base: Base,
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Folder of an adapter that peft reads.")
    ],
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="What it stands in for, as in `plan`.")
    ],
    texts: TextsFile,
    tokens: Tokens = 128,
    seed: Seed = 0,
    device: Device = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Take adapters for other bases.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure anybody's adapter against the tuned model, on texts that no plan has used."""
    from . import _peft_files, workflow
    from ._measuring import without_nan

    measured = _call(workflow.check, context.params)
    carried, size = _peft_files.measure_peft(Path(adapter))
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
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            errors.print("interrupted")
        raise
    except LorapowerError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(BAD) from None
    raise SystemExit(DONE)


def _call(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Call a function with a command's options and the texts of its files."""
    from ._measuring import read_texts

    options = {name: value for name, value in options.items() if value is not None}
    quiet = options.pop("quiet") | options.pop("as_json")
    with _progress(quiet=quiet) as report:
        if "form" in options:
            options["tuned"] = _tuned(options.get("tuned"), options.pop("adapter", None))
            options["serving"] = options.pop("form") == "serving"
        if "memory" in options:
            options["memory"] *= 1e9
        for name in ("texts", "held_out"):
            if name in options:
                options[name] = read_texts(options[name])
        return function(**options, report=report)


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
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not folder or not math.isfinite(weight):
            allowed = "a folder, an equals sign and a number, such as movies=0.7"
            raise InputError("--adapter", allowed=allowed, value=entry)
        if not Path(folder).expanduser().is_dir():
            raise InputError("--adapter", allowed="of a folder that exists", given=folder)
        if folder in weights:
            raise InputError("--adapter", allowed="given once for each folder", given=entry)
        weights[folder] = weight
    return weights


class _Lines:
    """Lines on the stream for errors: where a stage begins and ends, and now and then within."""

    def __init__(self) -> None:
        self._stage = ""
        self._started = self._said = 0.0

    def show(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self.end()
            self._stage, self._started, self._said = stage, now, now
            self._say("...")
        if done >= total:
            self.end()
        elif done and now - self._said >= PAUSE:
            self._said = now
            remains = (now - self._started) * (total - done) / done
            self._say(f"{done} of {total}, about {remains:.0f} s remain")

    def end(self) -> None:
        if self._stage:
            self._say(f"done in {time.monotonic() - self._started:.1f} s")
        self._stage = ""

    def _say(self, what: str) -> None:
        typer.echo(f"{self._stage}: {what}", err=True)


class _Bars:
    """A bar for each stage, on a terminal."""

    def __init__(self) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        times = TimeElapsedColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, *times, console=errors, transient=True)
        self._bars: dict[str, TaskID] = {}

    def show(self, stage: str, done: int, total: int) -> None:
        # Not before: what is refused before any work is one line.
        self._progress.start()
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=total)
        elif self._progress.tasks[self._bars[stage]].finished:
            self._progress.reset(self._bars[stage])
        self._progress.update(self._bars[stage], completed=done, total=total)

    def end(self) -> None:
        if self._bars:
            self._progress.stop()


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A report of progress on the stream for errors."""
    if quiet:
        yield None
    elif errors.is_terminal:
        bars = _Bars()
        try:
            yield bars.show
        finally:
            bars.end()
    else:
        lines = _Lines()
        yield lines.show
        # Not if it failed: no stage is done then.
        lines.end()


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
            f"the nearest found is {measured.error:.3g}{most}. Raise --max-rank, or ask for less"
            + (", or give more texts." if plan.sure else ".")
        )
    elif out is not None:
        from ._measuring import megabytes

        size = megabytes(plan.size)
        console.print(f"Written to {out}, {size}, read back with the same error.")
    if left := ", ".join(sorted(plan.planner.pair.leave & plan.planner.pair.not_low_rank.keys())):
        console.print(f"Left as in the base, and counted in the error: {left}.")
    if plan.reached and aim is not None and measured.error_upper > aim:
        console.print(
            f"The error of {aim:g} is reached by the estimate, but not by its limit at 95%, "
            "the cautious number: ask for less, or for --sure, or give more texts."
        )
    raise typer.Exit(status)


def _ranks(plan: Any) -> Table:
    from ._measuring import percent

    table = Table(title="Ranks, and the part of the effect that each module alone loses")
    table.add_column("module", overflow="fold")
    for name in ("size", "rank", "lost"):
        table.add_column(name, justify="right")
    for row in plan.table().to_dict("records"):
        size = f"{row['out']}×{row['in']}"
        table.add_row(row["module"], size, str(row["rank"]), percent(row["lost"]))
    return table


def _totals(plan: Any, written: bool) -> Table:
    from ._measuring import percent

    pair, used = plan.planner.pair, plan.adapter.parameters
    whole = sum(out * into for out, into in (m.shape for m in pair.modules.values()))
    words = ", embeddings as in the base" if pair.words.keys() & pair.modules.keys() else ""
    rows = [
        ("parameters of the factors", f"{used:,} of {whole:,}"),
        *_carried(plan.carried, plan.size, estimate=not written),
        ("method", plan.method + (", repaired" if plan.repaired else "")),
        *_measured(plan.measured),
        ("share of its square in the worst 5% of texts", percent(plan.largest_share)),
        ("error predicted to first order", percent(plan.predicted)),
        (f"error with attention alone, in full{words}", percent(plan.attention)),
    ]
    for name, (error, parameters) in plan.baselines.items():
        # One rank for all cannot be below 1.
        smallest = f" at rank 1 ({parameters:,} parameters)" if parameters > used else ""
        rows.append((f"error of {name}{smallest}, unrepaired", percent(error)))
    quotient, low, high = plan.versus_uniform
    if math.isfinite(quotient) and used:
        larger = plan.baselines["uniform"][1] / used
        times = f", which has {larger:.1f} times as many parameters" if larger > 1 else ""
        limits = f"{quotient:.2f} ({low:.2f} to {high:.2f} at 95%)"
        rows.append((f"error over that of uniform{times}", limits))
    for kind, number in pair.not_low_rank.items():
        what = "left out" if kind in pair.leave else "carried over"
        rows.append((f"{kind}, {what}", f"{number:,}"))
    if plan.looks > 1:
        rows.append(("adapters measured on these texts", f"{plan.looks}: the limit is meant for 1"))
    rows += [("texts cut off", f"{plan.planner.texts.cut}"), ("seconds", f"{plan.seconds:.0f}")]
    table = _table("In all", rows)
    table.caption = (
        "uniform: one rank for all; energy: an equal share of each change's squared norm; plain: "
        "singular values by gain for cost; effect: directions and gains chosen by the outputs"
    )
    return table


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def _carried(numbers: int, size: int, *, estimate: bool) -> list[tuple[str, str]]:
    from ._measuring import megabytes

    return [
        ("numbers carried in all", f"{numbers:,}"),
        ("size of the adapter's files", "about " * estimate + megabytes(size)),
    ]


def _measured(measured: Any) -> list[tuple[str, str]]:
    from ._measuring import percent

    rows = [
        ("error (part of the effect that is lost)", percent(measured.error)),
        ("at most, at 95%", percent(measured.error_upper)),
    ]
    if math.isfinite(measured.agreement):
        rows += [
            ("equal decisions", percent(measured.agreement)),
            ("at least, at 95%", percent(measured.agreement_lower)),
            ("mean KL divergence, nats", f"{measured.kl:.2e}"),
        ]
    return [*rows, ("texts measured on", f"{measured.texts}")]


def _print(report: dict[str, Any]) -> None:
    typer.echo(json.dumps(report, indent=2, allow_nan=False))
