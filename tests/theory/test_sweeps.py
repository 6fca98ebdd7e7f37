"""Sweeps: the table is the same however often the sweep was interrupted, and nothing is lost."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import pickle
import random
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import dependencies
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from lorapower._records import Record, Results
from lorapower.errors import InputError, LorapowerError, PrecisionError, ResultsError
from lorapower.experiments import residual, sweeps, synthetic
from lorapower.experiments.sweeps import grid
from records import language


class Problem(Record):
    width: int = Field(1, ge=0)
    scale: float = 1.0
    note: str | None = None


class Plain(Record):
    kind: Literal["plain"] = "plain"
    ranks: int | tuple[int, ...] = 1
    biases: bool = True


class Fast(Record):
    kind: Literal["fast"] = "fast"
    rate: float = Field(1e-3, gt=0)


class Listed(Record):
    values: list[int]


class Setting(Record):
    problem: Problem = Problem()
    method: Annotated[Plain | Fast, Field(discriminator="kind")] = Plain()


class Other(Record):
    width: int


class Found(Results):
    loss: float = math.nan
    steps: int | None = None
    exact: bool = False
    device: str = ""
    shape: tuple[int, ...] = ()


GRID = grid(
    Setting,
    problem=grid(Problem, width=range(6)),
    method=[*grid(Plain, ranks=[2, (2, 4, 8)]), *grid(Fast, rate=[0.5, 0.25])],
)
BITS64 = st.integers(-(2**63), 2**63 - 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
RANKS = BITS64 | st.lists(BITS64).map(tuple)
SETTING = st.builds(
    Setting,
    problem=st.builds(
        Problem, width=st.integers(0, 2**63 - 1), scale=FINITE, note=st.none() | st.text()
    ),
    method=st.builds(Plain, ranks=RANKS, biases=st.booleans())
    | st.builds(Fast, rate=st.floats(0, exclude_min=True, allow_infinity=False)),
)
FOUND = st.builds(
    Found,
    loss=st.floats(),
    steps=st.none() | BITS64,
    exact=st.booleans(),
    device=st.text(),
    shape=st.lists(BITS64).map(tuple),
)


def work(batch: list[Setting]) -> list[Found]:
    """Results that are missing or NaN here and there."""
    return [
        Found(
            loss=math.nan if s.problem.width == 3 else s.problem.width / 7,
            steps=None if s.problem.width == 3 else s.problem.width,
            exact=s.problem.width < 2,
            device=f"ünï {s.method.kind}",
        )
        for s in batch
    ]


def never(batch: list[Any]) -> list[Found]:
    pytest.fail(f"{batch} runs again")


def overlapping(batch: list[Any]) -> list[Other]:
    return [Other(width=1)]


def quiet(*arguments: Any, **options: Any) -> pd.DataFrame:
    return sweeps.run(*arguments, progress=False, **options)


@pytest.fixture(scope="module")
def undisturbed() -> Any:
    """Seventy-two trainings, and what they give when nothing happens."""
    import killed

    return killed.TRAININGS, killed.run(None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the finished sweep, in batches of two."""
    quiet(GRID, work, tmp_path / "runs.sqlite", size=2)
    return tmp_path / "runs.sqlite"


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def count(path: Path) -> int:
    """Finished runs in a file; one that was left unmade has none."""
    with closing(sqlite3.connect(path)) as connection:
        made = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'runs'").fetchone()
        return (made and connection.execute("SELECT count(*) FROM runs").fetchone()[0]) or 0


def same(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(found, wanted, check_exact=True)


class TestGrid:
    def test_is_the_product_with_the_last_axis_fastest(self) -> None:
        found = grid(Plain, ranks=np.array([3, 1]), biases=[True, False])
        assert found == [Plain(ranks=r, biases=b) for r in (3, 1) for b in (True, False)]
        assert type(found[0].ranks) is int
        assert grid(Plain, ranks=(1, 2)) == [Plain(ranks=(1, 2))]
        assert [s.problem.width for s in GRID] == [width for width in range(6) for _ in range(4)]

    @pytest.mark.parametrize(
        ("name", "values"),
        [("names", {"widht": 3}), ("width", {"width": []}), ("width", {"width": np.ones((2, 2))})],
    )
    def test_refuses(self, name: str, values: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=f"^{name} must be "):
            grid(Problem, **values)


class TestTable:
    def test_has_a_row_for_each_setting_in_their_order(self) -> None:
        table = quiet(GRID, work, size=3)
        assert [*table.columns] == [
            *("width", "scale", "note", "method", "ranks", "biases", "rate"),
            *("loss", "steps", "exact", "device", "shape"),
            *("version", "revision", "fingerprint"),
        ]
        assert [*table.columns][:7] == sweeps.columns(Setting)
        assert table.width.tolist() == [s.problem.width for s in GRID]
        assert table.method.tolist() == [s.method.kind for s in GRID]
        assert table.ranks.tolist()[:2] == [2, (2, 4, 8)]
        assert table.rate.isna().tolist() == [True, True, False, False] * 6
        assert table.loss.isna().tolist() == (table.width == 3).tolist()
        assert table.exact.dtype == bool
        assert table.fingerprint.nunique() == 1

    def test_revision_is_the_checkout_s(self) -> None:
        revision = quiet(GRID[:1], work).revision[0]
        if not (ROOT / ".git").exists():
            assert revision == ""
            return
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
        changed = subprocess.check_output(["git", "diff", "HEAD", "--name-only"], cwd=ROOT)
        assert revision == head + "-dirty" * bool(changed)

    @given(st.dictionaries(SETTING, FOUND, min_size=1, max_size=8), st.integers(1, 8))
    def test_is_what_was_given_bit_by_bit(self, runs: dict[Setting, Found], size: int) -> None:
        cells = {
            s.model_dump_json(): dict(s.problem)
            | {"method": s.method.kind}
            | s.method.model_dump(exclude={"kind"})
            | dict(found)
            for s, found in runs.items()
        }
        wanted = [*runs]

        def given_results(batch: list[Setting]) -> list[Found]:
            return [runs.pop(setting) for setting in batch]

        with TemporaryDirectory() as folder:
            path = Path(folder, "runs")
            table = quiet(wanted, given_results, path, size=size)
            same(quiet(wanted, given_results, path), table)
            rows = sweeps._newest(path)
        # Zero's sign, each bit of a float, and the types of all count.
        kept = {row.setting: sweeps._flat(row.setting) | sweeps._flat(row.results) for row in rows}
        assert {key: repr(kept[key]) for key in cells} == {k: repr(v) for k, v in cells.items()}

    @given(st.data())
    def test_is_the_same_after_interruptions(self, data: st.DataObject) -> None:
        wanted = data.draw(st.lists(st.sampled_from(GRID), min_size=1, unique=True))
        size = data.draw(st.integers(1, 5))
        done: list[Setting] = []
        left = iter(range(0))

        def interrupted(batch: list[Setting]) -> list[Found]:
            if next(left, None) is None:
                raise KeyboardInterrupt
            done.extend(batch)
            return work(batch)

        with TemporaryDirectory() as folder:
            path = Path(folder, "runs")
            for failure in data.draw(st.lists(st.integers(0, 4), max_size=4)):
                left = iter(range(failure))
                try:
                    quiet(wanted, interrupted, path, size=size)
                except KeyboardInterrupt:
                    assert len(sweeps.read(path)) == len(done)
            left = iter(range(100))
            same(quiet(wanted, interrupted, path, size=size), quiet(wanted, interrupted, size=size))
        assert sorted(done[: len(wanted)], key=repr) == sorted(wanted, key=repr)

    def test_batches_are_of_one_problem(self) -> None:
        seen: list[list[Setting]] = []

        def watched(batch: list[Setting]) -> list[Found]:
            seen.append([*batch])
            batch.reverse()
            return work([*reversed(batch)])

        table = quiet(GRID, watched, size=3)
        assert [[s.problem.width for s in batch] for batch in seen] == [
            [width] * size for width in range(6) for size in (3, 1)
        ]
        same(table.drop(columns="fingerprint"), quiet(GRID, work).drop(columns="fingerprint"))

    def test_keeps_and_ignores_what_is_not_asked_for(
        self, path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        table = quiet(GRID[5:2:-1], work, path)
        assert table.width.tolist() == [s.problem.width for s in GRID[5:2:-1]]
        assert capsys.readouterr() == ("", "")
        assert count(path) == len(GRID)
        sweeps.run([*GRID, Setting(problem=Problem(width=100))], work, path)
        assert re.search(r"25/25 \[.*run/s\]", capsys.readouterr().err)
        assert sweeps.read(path).width.tolist() == [s.problem.width for s in GRID] + [100]


class TestBadInput:
    @pytest.mark.parametrize(
        "settings",
        [
            [],
            Setting(),
            [3],
            [Setting(), Other(width=1)],
            [Setting(problem=Problem(scale=scale)) for scale in (0.0, -0.0)],
            [Listed(values=[1])],
        ],
    )
    def test_settings(self, settings: Any) -> None:
        with pytest.raises(InputError, match=r"^settings must be "):
            quiet(settings, never)

    def test_columns_of_one_name(self) -> None:
        class Twice(Record):
            problem: Problem = Problem()
            width: int = 1

        with pytest.raises(InputError, match=r"columns of Twice must be different .*; got width"):
            quiet([Twice()], never)
        with pytest.raises(InputError, match=r"columns of Other must be different .*; got width"):
            quiet(GRID[:1], overlapping)

    @pytest.mark.parametrize(
        "results",
        [None, [], [Found()], [Found()] * 3, [{"loss": 1.0}] * 2, [Found(), Other(width=1)]],
    )
    def test_results(self, results: Any, tmp_path: Path) -> None:
        def bad(batch: list[Setting]) -> Any:
            return results

        with pytest.raises(InputError, match=r"^work must be "):
            quiet(GRID[:2], bad, tmp_path / "runs")
        assert sweeps.read(tmp_path / "runs").empty

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            *(("work", {"work": nameless}) for nameless in (None, functools.partial(never), max)),
            ("work", {"work": lambda batch: work(batch)}),
            ("size", {"size": 0}),
            *(("executor", {"executor": none}) for none in ("tcp://127.0.0.1:1", 3)),
        ],
    )
    def test_work_size_and_executor(self, name: str, arguments: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=f"^{name} must be "):
            quiet(GRID, **{"work": never} | arguments)

    @pytest.mark.parametrize(
        "error",
        [
            InputError("rank", allowed="small", given=torch.float32, remedy="try"),
            PrecisionError(1, 9.0, limit=6.0, dtype=torch.float32),
            ResultsError(Path("here"), "is torn", remedy="mend it"),
        ],
    )
    def test_errors_survive_the_way_between_processes(self, error: LorapowerError) -> None:
        found = pickle.loads(pickle.dumps(error))
        assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def altered(statement: str) -> Callable[[Path], None]:
    def alter(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(statement)
            connection.commit()

    return alter


class TestFile:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda path: path.write_bytes(b"mine" * 1000), "is damaged, or no file of a sweep"),
            (lambda path: path.write_bytes(path.read_bytes()[:9000]), "is damaged"),
            (
                lambda path: path.write_bytes(
                    path.read_bytes()[:8192] + bytes(range(256)) * 16 + path.read_bytes()[12288:]
                ),
                "is damaged",
            ),
            (altered("PRAGMA application_id = 7"), "is no file of a sweep"),
            (altered("PRAGMA user_version = 9"), "is of format 9"),
            (altered("DROP TABLE runs"), "no such table"),
        ],
    )
    def test_is_of_another_kind_or_damaged(
        self, path: Path, damage: Callable[[Path], Any], message: str
    ) -> None:
        """It is refused in one line, and loses nothing by it."""
        damage(path)
        before = path.read_bytes()
        with pytest.raises(ResultsError, match=message) as caught:
            quiet(GRID, never, path)
        assert caught.value.path == path
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == before

    def test_is_a_folder_or_in_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for place in (tmp_path, tmp_path / "file" / "x"):
            with pytest.raises(ResultsError, match="cannot be used"):
                quiet(GRID, never, place)
        with pytest.raises(ResultsError, match="is no file"):
            sweeps.read(tmp_path / "nowhere")

    def test_cannot_grow(self, path: Path) -> None:
        table, before = quiet(GRID, work), path.stat().st_size
        more = grid(Setting, method=grid(Plain, ranks=range(100, 600)))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        try:
            with pytest.raises(ResultsError, match=r"cannot be used .* is kept; make room or give"):
                quiet(more, work, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        same(quiet(GRID, work, path), table)
        assert len(quiet(more, work, path)) == len(more)

    def test_has_one_writer_and_any_readers(self, tmp_path: Path) -> None:
        path = tmp_path / "runs"
        (tmp_path / "link").symlink_to(path)
        lengths = []

        def nested(batch: list[Setting]) -> list[Found]:
            for name in ("runs", "link"):
                with pytest.raises(ResultsError, match="is in use by another sweep: wait until"):
                    quiet(GRID, never, tmp_path / name)
            lengths.append(len(sweeps.read(path)))
            return work(batch)

        quiet(GRID, nested, path)
        assert lengths == [*range(0, 24, 4)]


class TestKills:
    def test_at_random_moments(self, tmp_path: Path, undisturbed: Any) -> None:
        import killed

        # Each is forked from one that has imported and compiled already what takes long.
        context = get_context("forkserver")
        context.set_forkserver_preload(["killed"])
        path = tmp_path / "runs"
        trainings, wanted = undisturbed
        assert len(trainings) == 72
        began = time.monotonic()
        same(killed.run(None), wanted)
        whole = time.monotonic() - began
        moments = random.Random(0)

        def written() -> int:
            return count(path) if path.exists() and path.stat().st_size else 0

        finished = [0]
        # Later and later, until a batch has finished: a busy machine is slower than it was.
        kills = 0
        while kills < 5 or not finished[-1]:
            kills += 1
            channel, end = context.Pipe()
            process = context.Process(target=killed.run, args=(path, end))
            process.start()
            assert channel.recv() == "started"
            moment = time.monotonic() + moments.uniform(0, kills * whole / 18)
            # The machine may be faster than it was: half of the runs are enough.
            while time.monotonic() < moment and written() < len(trainings) // 2:
                time.sleep(whole / 1000)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            finished.append(written())
        assert finished == sorted(finished)
        assert 0 < finished[-1] < len(trainings)
        assert finished[-1] % 4 == 0
        same(killed.run(path), wanted)
        assert count(path) == len(trainings)


class TestProvenance:
    def study(self, folder: Path, source: str) -> Callable[..., Any]:
        """``work`` of a module with this source."""
        file = folder / "study.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location("study", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["study"] = module
        exec(compile(source, file, "exec"), vars(module))
        function: Callable[..., Any] = module.work
        return function

    def test_rows_of_other_code_are_kept_aside(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "study", None)  # as it was, in the end
        path, runs = tmp_path / "runs", GRID[:4]
        first = (
            "from lorapower._records import Results\n"
            "class Found(Results):\n    loss: float\n"
            "def work(batch):\n    return [Found(loss=1.0) for _ in batch]\n"
        )
        old = quiet(runs, self.study(tmp_path, first), path)
        assert capsys.readouterr().err == ""
        # What does not change what is computed does not count.
        for same_code in (
            first.replace("def work(batch):", 'def work(batch):\n    """Results."""'),
            f"# Results.\n\n{first}".replace("[Found(", "[\n        Found("),
            f"{first}\nif __name__ == '__main__':\n    print(work)\n",
        ):
            same(quiet(runs, self.study(tmp_path, same_code), path), old)
        other = first.replace("1.0", "2.0")
        new = quiet([*runs, GRID[5]], self.study(tmp_path, other), path)
        said = capsys.readouterr().err
        assert said == f"{path}: 4 runs were made by other code; kept aside, done again\n"
        assert new.loss.tolist() == [2.0] * 5
        assert {*new.fingerprint}.isdisjoint(old.fingerprint)
        assert count(path) == 9
        assert sweeps.read(path).loss.tolist() == [2.0] * 5
        # Back at the old code, its rows count again.
        same(quiet(runs, self.study(tmp_path, first), path), old)
        assert (capsys.readouterr().err, count(path)) == ("", 9)

    def test_covers_the_package_up_to_the_experiments(self) -> None:
        ours, notebooks = sweeps._code(synthetic.measure), sweeps._code(work)
        assert {"__init__.py", "training/_compiled.py", "lowrank.py"} < {*ours.files}
        assert "experiments/synthetic.py" in ours.files
        for absent in ("book/figures/_style.py", "checkpoints/pair.py", "experiments/sweeps.py"):
            assert absent not in ours.files
        assert {*notebooks.files} > {*ours.files, "checkpoints/pair.py"}
        assert "experiments/sweeps.py" not in notebooks.files
        assert ours.own != sweeps._code(residual.measure).own

    def test_encoders_are_as_old_as_the_modules_that_they_load(self) -> None:
        """Their trainings take hours: the list is explicit, and what they load, no more."""
        package = dependencies.Package(ROOT)
        loaded = package.reach(["lorapower.experiments.language"])
        files = {package.paths[name].relative_to(sweeps._ROOT).as_posix() for name in loaded}
        assert files == {*sweeps._code(language.measure).files}
        assert len(files) <= 15

    def test_changes_with_a_module_and_not_with_its_docstrings(self, tmp_path: Path) -> None:
        code = sweeps._code(language.measure)
        folders = {}
        for name in ("same", "comment", "code"):
            folders[name] = tmp_path / name
            for file in code.files:
                copy = folders[name] / file
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text((sweeps._ROOT / file).read_text())
        changed = folders["comment"] / "randomness.py"
        text = changed.read_text()
        text = "# A comment.\n" + text.replace('"""', '"""Other words. ', 1)
        changed.write_text(text.replace(':\n    """', ':\n    # Words.\n    """More. '))
        changed = folders["code"] / "randomness.py"
        changed.write_text(changed.read_text() + "\nONE_MORE = 1\n")
        found = {name: sweeps._origin(code, folder) for name, folder in folders.items()}
        assert found["same"] == found["comment"] != found["code"]

    def test_tells_functions_without_a_file_apart(self) -> None:
        made = []
        for value, default in ((1, 0), (2, 0), (1, 1), (1, 0)):
            names: dict[str, Any] = {"__name__": "nowhere"}
            exec(f"def f(batch, other={default}): return [{value} for _ in batch]", names)
            made.append(sweeps._code(names["f"]))
        assert made[0] == made[3]
        assert len({*made}) == 3
        assert "checkpoints/pair.py" in made[0].files


def failing(batch: list[Setting]) -> list[Found]:
    if batch[0].problem.width == 4:
        raise InputError("width", allowed="less than 4", given=4)
    return work(batch)


def deadly(batch: list[Any]) -> list[synthetic.Found]:
    """Trainings of which one batch, the first time, kills the process that it runs in."""
    # A worker that was started in place of a killed one knows nothing of the marker.
    marker = Path(os.environ.get("MARKER", __file__))
    if batch[0].problem.seed == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return synthetic.measure(batch)


class Elsewhere(ThreadPoolExecutor):
    """Runs batches where the code is another."""

    def submit(self, run: Any, /, *arguments: Any, **options: Any) -> Any:
        work, code, batch = arguments
        return super().submit(run, work, code._replace(own="other"), batch)


def set_environment(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def processes(**environment: str) -> Executor:
    context = get_context("forkserver")
    context.set_forkserver_preload(["killed"])
    return ProcessPoolExecutor(
        2, mp_context=context, initializer=set_environment, initargs=(environment,)
    )


@pytest.mark.sources("lorapower/experiments/*.py")
class TestExecutors:
    @pytest.mark.parametrize("make", [processes, ThreadPoolExecutor])
    def test_give_the_same_table(self, make: Callable[[], Executor], tmp_path: Path) -> None:
        with make() as executor:
            same(quiet(GRID, work, tmp_path / "runs", size=3, executor=executor), quiet(GRID, work))
        assert count(tmp_path / "runs") == len(GRID)

    @pytest.mark.parametrize("where", ["process", "dask"])
    def test_worker_killed_in_the_middle(
        self,
        where: str,
        tmp_path: Path,
        undisturbed: Any,
        request: pytest.FixtureRequest,
    ) -> None:
        trainings, wanted = undisturbed
        path = tmp_path / "runs"
        marker = str(tmp_path / "killed")
        if where == "process":
            # A pool of processes breaks; what had finished is kept, and the same call resumes.
            with processes(MARKER=marker) as executor, pytest.raises(BrokenProcessPool):
                quiet(trainings, deadly, path, size=6, executor=executor)
            assert count(path) < len(trainings)
            with processes(MARKER=marker) as executor:
                found = quiet(trainings, deadly, path, size=6, executor=executor)
        else:
            # A cluster runs what the worker had not delivered on another.
            client = request.getfixturevalue("client")
            client.run(set_environment, {"MARKER": marker})
            found = quiet(trainings, deadly, path, size=6, executor=client.get_executor())
        assert Path(marker).exists()
        same(found.drop(columns="fingerprint"), wanted.drop(columns="fingerprint"))
        assert count(path) == len(trainings)

    def test_errors_of_the_work(self, client: Client, tmp_path: Path) -> None:
        for _ in range(2):
            with pytest.raises(InputError, match="width must be less than 4; got 4") as caught:
                quiet(GRID, failing, tmp_path / "runs", size=2, executor=client.get_executor())
            assert caught.value.given == 4

    def test_workers_of_other_code(self, tmp_path: Path) -> None:
        with (
            Elsewhere() as executor,
            pytest.raises(InputError, match="one whose workers have this code and these librar"),
        ):
            quiet(GRID, work, tmp_path / "runs", executor=executor)
        assert sweeps.read(tmp_path / "runs").empty
