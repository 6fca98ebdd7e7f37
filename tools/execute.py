"""Execute one chapter with papermill; a finished file appears only if everything in it succeeded.

usage: python tools/execute.py SOURCE TARGET PROFILE CHAPTERS-AT-A-TIME [--reworded]

Beside it ``NN-name.json`` says in which profile, on which machine and in what time it ran.

A chapter fails if a cell raises, if a claim that it records does not hold, or if its outputs hold
a path of this machine. A failed run is kept beside the target as ``NN-name.failed.ipynb``. With
``--reworded`` a chapter whose code is the same as when the target was executed keeps its outputs,
below the new text.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from pathlib import Path

# Notebooks are validated without it: its grammar, of addresses that none has, takes seconds.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from lorapower.book._executed import read_claims

ROOT = Path(__file__).resolve().parent.parent


class ChapterError(Exception):
    """A chapter that must not enter the book; the message says why."""


def run(source: Path, target: Path, given: dict[str, object]) -> None:
    """Execute a notebook with parameters, and leave in `target` what is its result."""
    # Figures carry the time at which they were drawn: one and the same in each run.
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")
    target.parent.mkdir(parents=True, exist_ok=True)
    notebook: NotebookNode = papermill.execute_notebook(
        source,
        target,
        given,
        kernel_name="python3",
        engine_name="nbclient",  # the book's own text is written by what builds its pages
        cwd=target.parent,
        progress_bar=False,
        stderr_file=sys.stderr,
        # Kernels are reached over loopback: the notice that this is not encrypted is noise. So is
        # that of the interrupt which jupyter_client sends to a kernel that it is about to stop.
        config=Config({"KernelManager": {"transport_encryption": "auto"}}),
        extra_arguments=["--log-level=CRITICAL"],
    )
    clean(notebook)
    nbformat.write(notebook, target)


def clean(notebook: NotebookNode) -> None:
    """Strip `notebook` of all that is not its result, in place.

    The cell of injected parameters is hidden if it says what each notebook does by default, so that
    the page always shows the parameters with which it was made.
    """
    for key in ("papermill", "lorapower"):
        notebook.metadata.pop(key, None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type != "code":
            continue
        if cell.execution_count is None:
            raise ChapterError(f"the run stopped before this cell was done:\n{cell.source}")
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            cell.id = "injected-parameters"  # papermill draws one at random
            if cell.source == '# Parameters\nprofile = "quick"\n':
                tags.append("remove-cell")
        if not tags:
            cell.metadata.pop("tags", None)
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def reword(source: Path, executed: Path, target: Path) -> bool:
    """Write an executed notebook with the source's text; say whether the code is the same."""
    new, old = (nbformat.read(path, as_version=4) for path in (source, executed))
    code, done = ([c for c in book.cells if c.cell_type == "code"] for book in (new, old))
    injected = next(k for k, cell in enumerate(done) if cell.id == "injected-parameters")
    given = done.pop(injected)
    if [(cell.id, cell.source) for cell in code] != [(cell.id, cell.source) for cell in done]:
        return False
    for cell, run in zip(code, done, strict=True):
        cell.outputs, cell.execution_count = run.outputs, run.execution_count
    new.cells.insert(new.cells.index(code[injected - 1]) + 1, given)
    new.metadata = old.metadata
    nbformat.write(new, target)
    return True


def check(executed: Path) -> None:
    """Raise ChapterError if the file `executed` holds a failing claim or a path of this machine."""
    failing = [
        f"claim fails: {claim.statement} ({claim.label})\n"
        f"  {claim.expected:9} {claim.predicted}\n  measured  {claim.measured}"
        for claim in read_claims(executed)
        if claim.fails or not claim.measured
    ]
    text = executed.read_text(encoding="utf-8")
    failing += [
        f"an output holds the path {path}: print nothing that depends on the machine"
        for path in sorted({str(ROOT), sys.prefix})
        if path in text
    ]
    if re.search(r"Not all of these runs|others are left out", text):
        failing.append("its runs are not those of its records: make these again")
    if failing:
        raise ChapterError("\n".join(failing))


def main(source: Path, target: Path, profile: str, jobs: int, reworded: bool) -> int:
    # Each has its part of the processors: threads of one would take the time of another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    partial, failed = (target.with_suffix(f".{end}.ipynb") for end in ("partial", "failed"))
    # The file carries the time at which its inputs were read: what changes during the run is newer.
    started = time.time_ns()
    if reworded and reword(source, target, partial):
        os.utime(partial, ns=(started, started))
        partial.replace(target)
        print(f"The code of {source} is as it was: outputs stay")
        return 0
    try:
        run(source, partial, {"profile": profile})
        check(partial)
    except (ChapterError, DeadKernelError, PapermillExecutionError) as error:
        print(f"{source} failed: {error}", file=sys.stderr)
        if partial.exists():
            partial.replace(failed)
            print(f"The failed run is kept in {failed.resolve()}", file=sys.stderr)
        return 1
    seconds = (time.time_ns() - started) / 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processors = f"{os.cpu_count()} processors ({platform.machine()})"
    machine = f"{processors}, {memory:.0f} GiB of memory, {platform.system()}"
    about = {"profile": profile, "machine": machine, "seconds": seconds}
    target.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")
    os.utime(partial, ns=(started, started))
    partial.replace(target)
    failed.unlink(missing_ok=True)
    print(f"Executed {source} in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    source, target, profile, jobs, *options = sys.argv[1:]
    sys.exit(main(Path(source), Path(target), profile, int(jobs), "--reworded" in options))
