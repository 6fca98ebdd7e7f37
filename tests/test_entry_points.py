"""The command `lorapower`: what it prints and writes, its status, and what it says of bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoint_files as files
import pytest

from lorapower import _cli

TEXTS = files.texts(140)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return files.pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return str(path)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )


def called(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lorapower", *arguments])
        with pytest.raises(SystemExit) as ended:
            _cli.main()
    out, err = capsys.readouterr()
    code = ended.value.code
    assert isinstance(code, int)
    return code, " ".join(out.split()), err


def test_plans_extracts_and_checks(
    places: tuple[str, str], file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [*places, "--texts", file]
    code, out, _ = called("plan", *pair, "--error", "0.3", "--json", capsys=capsys)
    report = json.loads(out)
    assert code == 0
    assert report["error"] <= 0.3
    code, out, _ = called("plan", *pair, "--rank", "1", capsys=capsys)
    assert code == 0
    for said in ("attention", "carried over", "numbers carried in all", "about 0.0"):
        assert said in out
    assert "error of uniform at rank 1 (688 parameters)" in out
    folder = str(tmp_path / "out")
    options = ["--rank", "2", "--out", folder, "--no-repair"]
    code, out, _ = called("extract", *pair, *options, capsys=capsys)
    assert code == 0
    assert "Written to" in out
    code, _, err = called("extract", *pair, *options, capsys=capsys)
    assert code == 2
    assert "replace it with --force" in err
    assert err.count("\n") == 1
    written = json.loads(Path(folder, "report.json").read_text())
    check = ["check", places[0], folder, places[1], "--texts", file]
    code, out, _ = called(*check, "--json", capsys=capsys)
    found = json.loads(out)
    assert code == 0
    assert found["texts"] == 140
    assert found["carried"] == written["carried"]
    assert found["adapter_bytes"] == written["adapter_bytes"]
    assert f"numbers carried in all │ {found['carried']:,}" in called(*check, capsys=capsys)[1]


def test_status_0_rests_on_the_estimate_and_says_so(
    places: tuple[str, str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(
        called("plan", *places, "--texts", file, "--rank", "1", "--json", capsys=capsys)[1]
    )
    between = (report["error"] + report["error_upper"]) / 2
    options = ["--texts", file, "--error", f"{between:.4f}"]
    code, out, _ = called("plan", *places, *options, "--json", capsys=capsys)
    found = json.loads(out)
    assert (code, found["reached"]) == (0, True)
    assert found["limit_reached"] == (found["error_upper"] <= found["asked_error"])
    said = "reached by the estimate, but not by its limit"
    assert (said in called("plan", *places, *options, capsys=capsys)[1]) != found["limit_reached"]
    for command in ("plan", "extract"):
        assert "cautious" in called(command, "--help", capsys=capsys)[1]


def test_status_1_says_how_near_one_gets(
    places: tuple[str, str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--texts", file, "--error", "0.000001", "--max-rank", "1"]
    code, out, _ = called("plan", *places, *options, capsys=capsys)
    assert code == 1
    assert "the nearest is" in out


def test_status_2_is_bad_input(
    places: tuple[str, str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = called("plan", "./nowhere", places[1], "--texts", file, capsys=capsys)
    assert code == 2
    assert "a folder that exists" in err
    code, _, err = called("plan", *places, "--texts", "nowhere.txt", capsys=capsys)
    assert code == 2
    assert "UTF-8" in err
    code, _, err = called("plan", *places, "--texts", file, "--rank", "x", capsys=capsys)
    assert code == 2


def test_is_installed() -> None:
    found = run("-m", "lorapower", "--help")
    assert found.returncode == 0
    assert all(name in found.stdout for name in ("plan", "extract", "check"))


@pytest.mark.parametrize("library", ["typer", "transformers"])
def test_without_its_extra_it_says_what_to_install(library: str) -> None:
    code = (
        f"import sys; sys.modules[{library!r}] = None; from lorapower.__main__ import main; main()"
    )
    found = run("-c", code)
    assert found.returncode == 2
    assert f"no {library}: install the extra `checkpoints`" in found.stderr
    assert found.stderr.count("\n") == 1


def test_plans_need_no_library_of_the_studies(places: tuple[str, str]) -> None:
    code = (
        "import sys\n"
        "absent = 'datasets', 'sklearn', 'pydantic', 'seaborn'\n"
        "sys.modules |= dict.fromkeys(absent)\n"
        "import checkpoint_files as files\n"
        "from lorapower import checkpoints\n"
        f"checkpoints.plan(*{places!r}, files.texts(140), rank=1, max_rank=1, by_module=False)\n"
    )
    found = run("-c", code)
    assert found.returncode == 0, found.stderr


def test_killed_in_the_middle_nothing_looks_finished(
    places: tuple[str, str], file: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["extract", *places, "--texts", file, "--out", str(out), "--rank", "2"]
    for sign, status in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = subprocess.Popen(
            [sys.executable, "-m", "lorapower", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "libtorch_cpu" not in maps.read_text():
            time.sleep(0.1)
        time.sleep(2)
        os.kill(process.pid, sign)
        assert process.wait() in (status, -sign, 0)
        assert not out.exists() or (out / "report.json").is_file()
