"""The command `lorapower`: what it prints and writes, its status, and what it says of bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checkpoint_files as files
import pytest
import torch
from rich.console import Console

from lorapower import __main__
from lorapower.checkpoints import (
    Pair,
    Planner,
    _command,
    _export,
    extract,
    read_texts,
    workflow,
)
from lorapower.checkpoints._models import PEFT_CONFIG
from lorapower.errors import LorapowerError

TEXTS = files.texts(140)
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return files.pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("fresh") / "texts.txt"
    path.write_text("\n".join(files.texts(140, 1)), encoding="utf-8")
    return str(path)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the command: its status, what it prints, and what it says on the stream for errors."""

    def called(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lorapower", *arguments])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        out, err = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, " ".join(out.split()), err

    return called


@pytest.fixture(scope="module")
def pair(places: tuple[str, str], file: str) -> list[str]:
    """The pair and its texts, as arguments."""
    return [*places, "--texts", file]


def test_plans_extracts_and_checks(
    pair: list[str], places: tuple[str, str], file: str, fresh: str, tmp_path: Path, call: Call
) -> None:
    code, out, _ = call("plan", *pair, "--error", "0.3", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["error"] <= 0.3
    code, out, _ = call("plan", *pair, "--parameters", "300", "--details")
    assert code == 0
    assert "about 0.0" in out
    assert "lost" in out
    folder = str(tmp_path / "out")
    options = ["--rank", "2", "--out", folder]
    code, out, _ = call("extract", *pair, *options)
    assert code == 0
    assert f"Writtento{folder}," in out.replace(" ", "")
    assert out.startswith("Certified at least 90% of texts like these lose at most")
    code, _, err = call("extract", *pair, *options)
    assert code == 2
    assert "replace it with --overwrite" in err
    assert err.count("\n") == 1
    written = json.loads(Path(folder, "report.json").read_text())
    code, _, err = call("check", places[0], folder, places[1], "--texts", file)
    assert code == 2
    assert "that the adapter's plan has not used; got 0" in err
    check = ["check", places[0], folder, places[1], "--texts", fresh]
    code, out, _ = call(*check, "--json")
    found = json.loads(out)
    assert (code, found["texts"]) == (0, 140)
    assert all(found[name] == written[name] for name in ("carried", "adapter_bytes"))
    said = call(*check)[1]
    assert said.startswith("Verdict CON")
    assert f"{found['carried']:,} numbers" in said


def test_status_0_rests_on_the_certificate_or_the_estimate(pair: list[str], call: Call) -> None:
    # With all ranks at 1 the adapter is the same whatever is asked.
    options = ["--max-rank", "1", "--quiet"]
    code, said, _ = call("plan", *pair, *options, "--error", "1e-6")
    assert code == 1
    assert "NOT CERTIFIED" in said
    assert "The best adapter that was tried loses" in said
    assert "Raise --max-rank" in said
    for last in ([], ["--estimate"]):
        nearest = json.loads(call("plan", *pair, *options, "--error", "1e-6", *last, "--json")[1])
        assert nearest["certified"] is None
        assert nearest["stated"] >= nearest["error"]
        for share in (0.99, 1.01):
            asked = ["--error", str(share * nearest["stated"]), *last]
            assert call("plan", *pair, *options, *asked)[0] == int(share < 1)
    for command in ("plan", "extract"):
        assert "whatever their" in call(command, "--help")[1]


def test_verdict_comes_first_and_details_are_asked_for(pair: list[str], call: Call) -> None:
    options = ["--error", "0.3", "--quiet"]
    code, said, _ = call("plan", *pair, *options)
    assert code == 0
    assert said.startswith("Asked at least 90% of texts like these lose at most 30%")
    assert "Verdict CERTIFIED (95%, any distribution; 70 texts that had no part" in said
    assert "Decisions" in said
    assert "of 70 as the tuned model" in said
    assert "Ranks block" in said
    assert said.endswith("Next the same with extract and --out FOLDER writes this adapter")
    # These texts chose the adapter: no limits of means.
    assert ", at 95%" not in said
    assert "differ if both draw" in said
    assert "part of the effect" not in said
    assert "part of the effect" in call("plan", *pair, *options, "--details")[1]


def test_prices_are_listed_where_nothing_is_asked(pair: list[str], call: Call) -> None:
    code, said, _ = call("plan", *pair, "--quiet")
    assert code == 0
    assert said.startswith("Prices numbers size loss 9 of 10 texts at most")
    rows = json.loads(call("plan", *pair, "--json")[1])
    assert [row["parameters"] for row in rows] == sorted({row["parameters"] for row in rows})
    assert all(0 <= row["error"] and 0 <= row["nine_of_ten"] for row in rows)
    assert rows[-1]["error"] < rows[0]["error"]
    nothing = call("plan", pair[0], pair[0], *pair[2:], "--json")[1]
    assert [(row["parameters"], row["error"]) for row in json.loads(nothing)] == [(0, 0)]
    planner = Planner(Pair.open(*pair[:2]), read_texts(pair[3]))
    for row in (rows[0], rows[-1]):
        adapter = planner.candidate(row["parameters"])
        assert adapter.parameters == row["parameters"]
        assert planner.error(adapter) == pytest.approx(row["error"], rel=1e-4)


def test_labels_give_accuracies(
    places: tuple[str, str], file: str, tmp_path: Path, call: Call
) -> None:
    texts = Path(file).read_text().splitlines()
    labelled = tmp_path / "labelled.jsonl"

    def write(label: Callable[[int], object]) -> None:
        lines = [json.dumps({"text": text, "label": label(i)}) for i, text in enumerate(texts)]
        labelled.write_text("\n".join(lines))

    options = [*places, "--texts", str(labelled), "--quiet", "--rank", "1"]
    write(lambda i: i % 2)
    _, said, _ = call("plan", *options)
    report = json.loads(call("plan", *options, "--json")[1])
    parts = [report[name] for name in ("accuracy", "tuned_accuracy", "base_accuracy")]
    assert "Accuracy {:.1%}; the tuned model {:.1%}, the base {:.1%}".format(*parts) in said
    write(lambda i: f"LABEL_{i % 2}")
    assert json.loads(call("plan", *options, "--json")[1])["accuracy"] == report["accuracy"]
    # What is right half of the time is wrong the other half.
    write(lambda i: 1 - i % 2)
    other = json.loads(call("plan", *options, "--json")[1])
    for name in ("accuracy", "tuned_accuracy", "base_accuracy"):
        assert report[name] + other[name] == pytest.approx(1)
    for wrong in (2, -1, "good", 0.5, None, True):
        write(lambda i, wrong=wrong: wrong if i == 3 else 0)  # type: ignore[misc]
        code, _, err = call("plan", *options)
        assert code == 2
        assert "label must be a class, 0 to 1, or its name (LABEL_0, LABEL_1)" in err


def test_ranks_are_a_grid() -> None:
    names = ["query", "output.dense"]
    ranks = {f"bert.layer.{k}.attention.{name}": 10 * k + 1 for k in (0, 1) for name in names}
    ranks |= {f"bert.layer.{k}.output.dense": 7 for k in (0, 1)} | {"pooler.dense": 3}
    assert _command._grid(ranks) == [
        "block query attention.output output",
        "    0     1                1      7",
        "    1    11               11      7",
        "pooler 3",
    ]
    assert _command._grid({"v2.layers.0.q_proj": 1, "1.k": 2}) == [
        "block q k",
        "    0 1  ",
        "    1   2",
    ]
    assert _command._grid({}) == ["none"]


def test_adapters_shrink(
    places: tuple[str, str], file: str, fresh: str, tmp_path: Path, call: Call
) -> None:
    base, tuned = places
    trained, other, small = (str(tmp_path / name) for name in ("trained", "other", "small"))
    texts = ["--texts", file]
    for folder, seed in ((trained, "0"), (other, "1")):
        options = [*texts, "--rank", "4", "--out", folder, "--seed", seed, "--quiet"]
        assert call("extract", base, tuned, *options)[0] == 0
    options = [*texts, "--error", "0.3", "--out", small]
    code, out, _ = call("shrink", base, trained, *options, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["tuned"] == trained
    assert report["parameters"] < json.loads(Path(trained, "report.json").read_text())["parameters"]
    found = json.loads(call("check", base, small, trained, "--texts", fresh, "--json")[1])
    assert found["error"] < 0.6
    # Several, with weights: as the pair itself says.
    weighted = [f"--adapter={trained}=0.7", f"--adapter={other}=0.3"]
    options = [*texts, "--rank", "2", "--out", small, "--overwrite"]
    code, out, _ = call("shrink", base, *weighted, *options, "--json")
    assert code == 0
    both = Pair.open(base, {trained: 0.7, other: 0.3})
    assert json.loads(out)["tuned"] == both.tuned.source
    assert "# A low-rank adapter of 0.7 × trained + 0.3 × other" in Path(
        small, _export.CARD
    ).read_text(encoding="utf-8")


NOT_A_WEIGHT = "--adapter must be a folder that exists, an equals sign and a number"
REFUSED: list[tuple[list[str], str]] = [
    (["./nowhere", "TUNED"], "base must be a folder that exists"),
    (["BASE", "TUNED", "--texts", "nowhere.txt"], "a text file in UTF-8"),
    (["BASE", "TUNED", "--held-out", "nowhere.txt"], "a text file in UTF-8"),
    *[(["BASE", "TUNED", "--device", name], "device must be") for name in ("cuda:99", "meta", "x")],
    (["BASE"], "TUNED must be given"),
    (["BASE", "TUNED", "--adapter", "BASE=1"], "TUNED must be left out"),
    *[(["BASE", "--adapter", each], NOT_A_WEIGHT) for each in ("BASE", "BASE=a", "BASE=nan", "=1")],
    (["BASE", "--adapter", "nowhere=1"], NOT_A_WEIGHT),
    (["BASE", "--adapter", "BASE=1", "--adapter", "BASE=2"], "--adapter must be given once"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=str)
def test_status_2_is_bad_input_in_one_line(
    places: tuple[str, str], file: str, arguments: list[str], said: str, call: Call
) -> None:
    named = [a.replace("BASE", places[0]).replace("TUNED", places[1]) for a in arguments]
    code, _, err = call("plan", "--texts", file, *named)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_formats_for_serving_and_in_full(
    pair: list[str],
    places: tuple[str, str],
    tmp_path: Path,
    call: Call,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, full = tmp_path / "out", tmp_path / "full"
    options = ["--rank", "8", "--format", "serving", "--merged", str(full)]
    code, said, _ = call("extract", *pair, *options, "--out", str(out))
    assert code == 0
    assert "Left as in the base, and counted in the loss: bias, head, norm" in said
    config = json.loads((out / PEFT_CONFIG).read_text())
    assert (config["modules_to_save"], config["bias"]) == (None, "none")
    report = json.loads((out / "report.json").read_text())
    assert {rank % 8 for rank in report["ranks"].values()} == {0}
    assert report["carried"] == report["parameters"]
    assert report["options"]["max_rank"] == 8
    # The model in full is the base with the adapter.
    given, whole = Pair.open(*places), Pair.open(places[0], str(full))
    adapted = _export.load(out, given).merge_and_unload()
    for name, value in adapted.named_parameters():
        assert torch.equal(whole.tuned.read(name), value)
    assert whole.tokenizer("w1 w2")["input_ids"] == given.tokenizer("w1 w2")["input_ids"]
    assert whole.tuned.config.use_cache
    for place, said in ((full, "a new folder"), (tmp_path / "new" / "full", "apart from")):
        options[-1] = str(place)
        code, _, err = call("extract", *pair, *options, "--out", str(tmp_path / "new"))
        assert code == 2
        assert f"merged must be {said}" in err


@pytest.fixture(scope="module")
def written(places: tuple[str, str], file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair, an adapter of it, texts, and a link to what is tuned."""
    folder = tmp_path_factory.mktemp("written")
    for place in map(Path, places):
        shutil.copytree(place, folder / place.name)
    (folder / "texts").mkdir()
    shutil.copyfile(file, folder / "texts" / "lines.txt")
    extract(*places, read_texts(file), folder / "adapter", rank=2, max_rank=2)
    (folder / "link").symlink_to("tuned", target_is_directory=True)
    return folder


@pytest.fixture
def own(written: Path, tmp_path: Path) -> Path:
    """A copy of `written`."""
    return Path(shutil.copytree(written, tmp_path / "own", symlinks=True))


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# The options that name outputs, with the pair's folder for a dot.
INPUTS: list[tuple[str, str]] = [
    ("extract ./base ./tuned", "--out ./new --merged ./tuned"),
    ("extract ./base ./tuned", "--out ./new --merged ./base"),
    ("extract ./base ./tuned", "--out ./new --merged ./link"),
    ("extract ./base ./link", "--out ./tuned"),
    ("extract ./base ./tuned", "--out ./tuned/adapter"),
    ("extract ./base ./tuned", "--out ."),
    ("extract ./base ./tuned", "--out ./texts"),
    ("extract ./base ./tuned", "--out ./new --merged ./texts"),
    ("extract ./base ./tuned --held-out ./texts/lines.txt", "--out ./texts/lines.txt"),
    ("shrink ./base ./adapter", "--out ./adapter"),
    ("shrink ./base --adapter ./adapter=1", "--out ./adapter"),
    ("shrink ./base ./adapter", "--out ./new --merged ./adapter"),
]


@pytest.mark.parametrize(("inputs", "outputs"), INPUTS, ids=str)
def test_what_is_read_is_not_written_over(
    inputs: str, outputs: str, own: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own)
    before = contents(own)
    monkeypatch.setattr(workflow, "plan", None)  # No work is done.
    options = ["--texts", "texts/lines.txt", "--rank", "1", "--overwrite"]
    code, _, err = call(*inputs.split(), *options, *outputs.split())
    assert code == 2
    assert "must be apart from all that is read" in err
    assert err.count("\n") == 1
    assert contents(own) == before


def test_replacing_is_not_taking_any_base(own: Path, call: Call) -> None:
    adapter, small = own / "adapter", own / "small"
    options = ["--texts", str(own / "texts" / "lines.txt"), "--rank", "1", "--quiet"]
    shrink = ["shrink", str(own / "base"), str(adapter), *options, "--out", str(small)]
    files.configure(adapter, base_model_name_or_path="org/other")
    code, _, err = call(*shrink, "--overwrite")
    assert code == 2
    assert "made for 'org/other': name that base, or say that both are the same (--any-base" in err
    assert call(*shrink, "--any-base")[0] == 0
    code, _, err = call(*shrink, "--any-base")
    assert code == 2
    assert "out must be a new folder" in err
    assert call(*shrink, "--any-base", "--overwrite")[0] == 0


def test_progress_is_in_lines_without_a_terminal(pair: list[str], call: Call) -> None:
    options = ["--rank", "1"]
    lines = call("plan", *pair, *options)[2].splitlines()
    assert re.fullmatch(r"passing texts \(about .* GB of memory, .* GB free\): 0 of 4", lines[0])
    stages = [line.rpartition(": ")[0] for line in lines]
    assert len({*stages}) == len(stages) > 4
    for option in ("--json", "--quiet"):
        assert call("plan", *pair, *options, option)[2] == ""


def test_long_stages_say_how_far_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(_command, "monotonic", lambda: now)
    with _command._stages() as show:
        for done in range(9):
            show("long", done, 8)
            now += 15.0
        show("short", 0, 2)
        show("next", 0, 2)
    assert capsys.readouterr().err.splitlines() == [
        *(f"long: {done} of 8" for done in (0, 2, 4, 6, 8)),
        "short: 0 of 2",
        "next: 0 of 2",
    ]


def test_progress_is_in_bars_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_command, "errors", Console(stderr=True, force_terminal=True, width=120))
    with _command._stages() as report:
        for done in (0, 2, 0, 1):
            report("passing texts", done, 2)
    err = capsys.readouterr().err
    assert "passing texts" in err
    assert "50%" in err


def test_is_installed() -> None:
    found = run("-m", "lorapower", "--help")
    assert found.returncode == 0
    assert all(name in found.stdout for name in ("plan", "extract", "shrink", "check"))


@pytest.mark.parametrize("library", ["typer", "transformers"])
def test_without_its_extra_it_says_what_to_install(library: str) -> None:
    code = (
        f"import sys; sys.modules[{library!r}] = None; from lorapower.__main__ import main; main()"
    )
    found = run("-c", code)
    assert found.returncode == 2
    assert f"got no {library}: pip install '.[checkpoints]' in a checkout" in found.stderr
    assert found.stderr.count("\n") == 1


def test_plans_need_no_library_of_the_studies(places: tuple[str, str]) -> None:
    code = (
        "import sys\n"
        "absent = 'sklearn', 'pydantic', 'seaborn'\n"
        "sys.modules |= dict.fromkeys(absent)\n"
        "import checkpoint_files as files\n"
        "from lorapower import checkpoints\n"
        f"checkpoints.plan(*{places!r}, files.texts(140), rank=1, max_rank=1)\n"
    )
    found = run("-c", code)
    assert found.returncode == 0, found.stderr


def test_interrupts_are_one_line(
    pair: list[str], call: Call, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "prices", interrupted)
    found = call("plan", *pair)
    assert found == (130, "", "interrupted\n")
    monkeypatch.setattr(_command, "app", interrupted)
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory (Default"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory (CUDA"),
        (MemoryError("Unable to allocate 9 GiB"), "out of memory (Unable"),
        (ZeroDivisionError("by zero"), "this is unexpected; please report"),
        (LorapowerError("the adapter read back is 3 off"), "the adapter read back"),
    ],
    ids=str,
)
def test_status_3_is_what_should_not_happen(
    error: Exception,
    said: str,
    pair: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(workflow, "prices", fail)
    monkeypatch.setattr(sys, "argv", ["lorapower", "plan", *pair])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"error: {said}")
    assert (len(lines) == 1) == (not isinstance(error, ZeroDivisionError))


def test_statuses_are_in_the_help(call: Call) -> None:
    said = call("--help")[1]
    assert "Exit status: 0 done; 1" in said
    assert "3 an unexpected error" in said


def test_texts_that_the_tokenizer_does_not_know(tmp_path: Path, call: Call) -> None:
    pair = files.pair(tmp_path / "pair")
    tokenizer = files.words()
    tokenizer.unk_token = "<unk>"
    for place in pair:
        tokenizer.save_pretrained(place)
    texts = tmp_path / "texts.txt"
    for part in (0, 1):
        known = [f"{text} w1 w2" for text in TEXTS]
        strange = [f"{text} ключ слово" for text in TEXTS]
        texts.write_text("\n".join(strange if part else known), encoding="utf-8")
        options = ["--texts", str(texts), "--rank", "1", "--quiet"]
        out = call("plan", *pair, *options)[1]
        assert ("words that the tokenizer does not know" in out) == part
        report = json.loads(call("plan", *pair, *options, "--json")[1])
        tokens = sum(len(text.split()) for text in texts.read_text("utf-8").splitlines())
        assert report["unknown_tokens"] == pytest.approx(part * 2 * len(TEXTS) / tokens)


def test_killed_in_the_middle_nothing_looks_finished(pair: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["extract", *pair, "--out", str(out), "--rank", "2"]
    for sign, status in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = subprocess.Popen(
            [sys.executable, "-m", "lorapower", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "libtorch_cpu" not in maps.read_text():
            time.sleep(0.1)
        time.sleep(2)
        os.kill(process.pid, sign)
        said = process.communicate()[1]
        assert process.returncode in (status, -sign, 0)
        if process.returncode == 130:
            assert said.splitlines()[-1] == "interrupted"
            assert "Traceback" not in said
        assert not out.exists() or (out / "report.json").is_file()
