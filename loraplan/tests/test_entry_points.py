"""The command `loraplan`: what it prints and writes, its status, and what it says of bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import checkpoint_files as files
import pytest
import torch
from checkpoint_files import Patch
from rich.console import Console

import loraplan
from loraplan import LoraplanError, __main__, _command, _measuring, extract, workflow
from loraplan._limits import confidence
from loraplan._measuring import TunedOutputs

TEXTS = files.texts(140)
README = Path(__file__).parents[1].joinpath("README.md").read_text("utf-8")
Call = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair, an adapter of it, and texts."""
    folder = tmp_path_factory.mktemp("given")
    files.pair(folder)
    (folder / "texts").mkdir()
    for name, seed in (("lines", 0), ("fresh", 1)):
        lines = "\n".join(files.texts(140, seed))
        (folder / "texts" / f"{name}.txt").write_text(lines, encoding="utf-8")
    base, tuned = (str(folder / name) for name in ("base", "tuned"))
    extract(base, tuned, TEXTS, folder / "adapter", size=0.02)
    return folder


@pytest.fixture(autouse=True)
def own(given: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    """A copy of what is given, where commands run."""
    folder = Path(shutil.copytree(given, tmp_path / "own"))
    monkeypatch.chdir(folder)
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: Patch) -> Call:
    """Run the command, which ends with a status: what it prints, and what it says of errors."""

    def called(words: str, status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["loraplan", *words.split()])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
        out, err = capsys.readouterr()
        assert ended.value.code == status, err
        if status == 2:
            assert err.count("\n") == 1
        return " ".join(out.split()), err

    return called


PAIR = "base tuned --texts texts/lines.txt"


def test_plans_extracts_and_checks(own: Path, call: Call) -> None:
    out = call(f"extract {PAIR} --size 0.012 --out out")[0]
    assert "Written to out, and read back" in out
    assert re.match(r"Decisions at least \d+(\.\d)?% are the tuned model's, so accuracy", out)
    assert "however often" not in out
    card = (own / "out" / "README.md").read_text()
    assert f"made by | `loraplan extract {PAIR} --size 0.012 --out out`" in card
    check = "check base out tuned --texts texts/fresh.txt"
    said = call(check)[0]
    assert re.match(r"Decisions at least \d+(\.\d)?% are the tuned model's", said)
    assert "however often you check Own effect 90% of texts lose at most" in said
    found = json.loads(call(f"{check} --json")[0])
    assert found["texts"] == 140
    assert found["bytes"] == (own / "out" / "adapter_model.safetensors").stat().st_size
    # Without a base, and with one that the adapter names.
    assert "Own effect" not in call("check tuned tuned --texts texts/fresh.txt")[0]
    assert call("check out tuned --texts texts/fresh.txt")[0] == said


def test_a_check_has_the_status_of_what_is_asked(own: Path, call: Call) -> None:
    check = "check base adapter tuned --texts texts/fresh.txt"
    found = json.loads(call(f"{check} --json")[0])
    for option, limit in (("same", found["same"]), ("error", found["own_effect"])):
        for aim in (limit - 1e-6, limit + 1e-6):
            kept = (aim <= limit) == (option == "same")
            said = call(f"{check} --{option} {aim}", 0 if kept else 1)[0]
            assert said.startswith(f"Verdict {'KEPT' if kept else 'NOT KEPT'}, by 140 texts at 95%")


def test_own_scores_are_compared(own: Path, call: Call) -> None:
    rows = [f"{i % 10 > 1:d},{i % 10 > 1 and i % 40 > 3:d}" for i in range(200)]
    (own / "scores.csv").write_text("tuned,standin\n" + "\n".join(rows))
    found = json.loads(call("check --scores scores.csv --json")[0])
    assert (found["texts"], found["tuned"], found["standin"]) == (200, 0.8, 0.75)
    assert 0.05 < found["drop"] < 0.15
    share = 1 - found["drop"]
    assert call(f"check --scores scores.csv --same {share - 1e-6}")[0].startswith("Verdict KEPT")
    said = call(f"check --scores scores.csv --same {share + 1e-6}", 1)[0]
    assert "points on average, however often you check" in said


def test_status_0_rests_on_what_is_certified(own: Path, call: Call) -> None:
    # With one rank the adapter is the same whatever is asked.
    command = f"extract {PAIR} --one-rank 1 --out out --error"
    nearest = json.loads(call(f"{command} 1e-6 --json", 1)[0])
    assert nearest["certificate"] == "Nothing is certified."
    said = call(f"{command} {0.5 * nearest['own_effect']}", 1)[0]
    for words in ("Verdict NOT CERT", "largest adapter that was tried loses", "Raise --one-rank"):
        assert words in said
    assert not (own / "out").exists()
    call(f"{command} {1.5 * nearest['own_effect']}")


@pytest.mark.programs
def test_one_number_says_how_sure_everything_is(own: Path, monkeypatch: Patch) -> None:
    """What is printed, what is written, and how many texts are needed, of a copy at 99%."""
    package = shutil.copytree(Path(loraplan.__file__).parent, own / "copy" / "loraplan")
    limits = (package / "_limits.py").read_text()
    assert limits.count("\nDOUBT = 0.05\n") == 1
    (package / "_limits.py").write_text(limits.replace("DOUBT = 0.05", "DOUBT = 0.01"))
    (own / "texts" / "many.txt").write_text("\n".join(files.texts(400)))
    monkeypatch.setenv("PYTHONPATH", str(own / "copy"))
    monkeypatch.setenv("COLUMNS", "1000")
    few = run("-m", "loraplan", *f"plan {PAIR}".split())
    assert "81 to plan with and 81 to certify with" in few.stderr
    printed = ""
    check = "check base adapter tuned --texts texts/lines.txt"
    for words in ("plan --help", "check --help", check, f"extract {PAIR} --out out"):
        done = run("-m", "loraplan", *words.replace("lines", "many").split())
        assert done.returncode == 0, done.stderr
        printed += " ".join(done.stdout.split())
    for name in ("report.json", "README.md"):
        printed += (own / "out" / name).read_text()
    for words in ("99%", "one in 100 ", "at 99%", "confidence of 99%"):
        assert words in printed
    for words in ("95%", "one in 20 "):
        assert words not in printed


@pytest.mark.parametrize("text", [README, loraplan.plan.__doc__, loraplan.Measured.__doc__])
def test_pages_say_how_sure_everything_is(text: str) -> None:
    words = " ".join(text.split())
    assert f"confidence of {confidence()}" in words
    needed = re.findall(r"(?i)at least (\d+) (?:texts|like)", words)
    assert {*needed} <= {str(2 * loraplan.LEAST_TEXTS)}


def test_promises_come_first_and_sizes_where_nothing_is_asked(
    call: Call, monkeypatch: Patch
) -> None:
    said = call(f"plan {PAIR} --error 0.3")[0]
    assert said.startswith("Promise 90% of texts lose at most 30% of what tuning changed in them")
    assert said.endswith("Next the same with extract and --out FOLDER writes this adapter")
    for words in (
        "Verdict CERTIFIED by 61 texts at 95%. No adapter was made with these texts",
        "of 61 decisions as the tuned model",
        "Ranks block",
    ):
        assert words in said
    # Without anything asked sizes are listed, and the texts that certify are not looked at.
    with monkeypatch.context() as patch:
        patch.setattr(TunedOutputs, "summarize", lambda *_: pytest.fail("looked at"))
        said = call(f"plan {PAIR}")[0]
        rows = json.loads(call(f"plan {PAIR} --json")[0])
    assert said.startswith("Sizes size same decisions 9 of 10 texts lose at most")
    assert [row["bytes"] for row in rows] == sorted(row["bytes"] for row in rows)
    assert rows[-1]["error"] < 0.01 < rows[0]["error"]
    size = rows[-1]["bytes"] / 1e6
    assert json.loads(call(f"plan {PAIR} --size {size} --json")[0])["bytes"] <= rows[-1]["bytes"]
    nothing = json.loads(call("plan base base --texts texts/lines.txt --same 0.5 --json")[0])
    assert (nothing["reached"], nothing["parameters"], nothing["error"]) == (True, 0, 0)
    (row,) = json.loads(call("plan base base --texts texts/lines.txt --json")[0])
    assert (row["parameters"], row["same"], row["error"]) == (0, 1, 0)


def test_groups_count_once(own: Path, call: Call) -> None:
    entries = [{"text": text, "of": i % 125} for i, text in enumerate(files.texts(250))]
    (own / "given.jsonl").write_text("\n".join(map(json.dumps, entries)))
    plan = "plan base tuned --texts given.jsonl --error 0.5"
    assert "by 61 texts, one of each group" in call(f"{plan} --group of")[0]
    assert not json.loads(call(f"{plan} --json")[0])["grouped"]


def test_neighbours_that_lose_alike_are_noticed(own: Path, call: Call, monkeypatch: Patch) -> None:
    monkeypatch.setattr(_measuring, "are_alike", lambda _: True)
    check = "check tuned tuned --texts texts/fresh.txt"
    for words in (f"plan {PAIR} --size 1", check):
        said = call(words)[0]
        assert "WARNING Neighbouring lines lose alike: are they of one document, or is" in said
    (own / "texts" / "fresh.txt").write_text("w1 w2 w3 w4\n" * 50 + "w5 w6 w7\n" * 50)
    assert "98 texts are nearly the same as another" in call(check)[0]


def test_labels_give_accuracies(own: Path, call: Call) -> None:
    options = "base tuned --texts labelled.jsonl --size 0.015"

    def report(label: Callable[[int], object]) -> Any:
        lines = [json.dumps({"text": text, "label": label(i)}) for i, text in enumerate(TEXTS)]
        (own / "labelled.jsonl").write_text("\n".join(lines))
        return json.loads(call(f"plan {options} --json")[0])

    parts = report(lambda i: i % 2)
    numbers = [parts[name] for name in ("accuracy", "tuned_accuracy", "base_accuracy")]
    said = "Accuracy {:.1%}; the tuned model {:.1%}, the base {:.1%}".format(*numbers)
    assert said in call(f"plan {options}")[0]
    assert report(lambda i: f"LABEL_{i % 2}")["accuracy"] == parts["accuracy"]
    # What is right half of the time is wrong the other half.
    assert report(lambda i: 1 - i % 2)["accuracy"] == pytest.approx(1 - parts["accuracy"])


def test_ranks_are_a_grid() -> None:
    names = ["query", "output.dense"]
    ranks = {f"bert.layer.{k}.attention.{name}": 10 * k + 1 for k in (0, 1) for name in names}
    ranks |= {"bert.layer.1.output.dense": 7, "pooler.dense": 3}
    assert _command._grid(ranks) == [
        "block query attention.output output",
        "    0     1                1       ",
        "    1    11               11      7",
        "pooler 3",
    ]
    assert _command._grid({}) == ["none"]


def test_adapters_shrink(own: Path, call: Call, caplog: pytest.LogCaptureFixture) -> None:
    files.configure(own / "adapter", base_model_name_or_path="org/other")
    call("shrink base adapter --texts texts/lines.txt --size 0.01 --out small")
    assert "# A low-rank adapter of adapter for base" in (own / "small/README.md").read_text()
    assert "names another base, 'org/other'" in caplog.text


def test_one_rank_for_servers(own: Path, call: Call) -> None:
    said = call(f"extract {PAIR} --size 1 --one-rank 8 --out out")[0]
    assert "Left as in the base, and counted in the loss: bias, head, norm" in said
    assert json.loads((own / "out" / "report.json").read_text())["options"]["one_rank"] == 8


def test_progress_is_in_lines_without_a_terminal(call: Call) -> None:
    plan = "plan base tuned --texts texts/lines.txt --size 0.015"
    lines = call(plan)[1].splitlines()
    assert re.fullmatch(r"passing texts \(about .* GB of memory, .* GB free\): 0 of \d+", lines[0])
    stages = [line.rpartition(": ")[0] for line in lines]
    assert len({*stages}) == len(stages) == 2
    assert call(f"{plan} --json")[1] == ""


def test_long_stages_are_told(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(_command, "monotonic", lambda: now)
    said = []
    for terminal in (False, True):
        console = Console(stderr=True, force_terminal=terminal, width=120)
        monkeypatch.setattr(_command, "errors", console)
        with _command._stages() as show:
            for done in range(9):
                show("long", done, 8)
                now += 15.0
            show("next", 1, 2)
        said.append(capsys.readouterr().err)
    lines = [*(f"long: {done} of 8" for done in (0, 2, 4, 6, 8)), "next: 1 of 2"]
    assert said[0].splitlines() == lines
    assert all(words in said[1] for words in ("long", "next", "50%"))


def test_is_installed(call: Call) -> None:
    found = run("-m", "loraplan", "--help")
    assert found.returncode == 0
    names = "plan", "extract", "shrink", "check", "Exit status: 0 done; 1", "3 an unexpected error"
    assert all(name in " ".join(found.stdout.split()) for name in names)
    assert "at most one in 20" in call("plan --help")[0]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "out of memory (Default"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 3, "out of memory (CUDA"),
        (MemoryError("Unable to allocate 9 GiB"), 3, "out of memory (Unable"),
        (ZeroDivisionError("by zero"), 3, "this is unexpected; please report"),
        (LoraplanError("the adapter read back is 3 off"), 3, "the adapter read back"),
    ],
    ids=str,
)
def test_statuses_of_what_should_not_happen(
    error: BaseException, status: int, said: str, call: Call, monkeypatch: Patch
) -> None:
    # Typer ends a command itself when it is interrupted, but not while it starts.
    for owner, name in ((workflow, "prices"), (_command, "app")):
        monkeypatch.setattr(owner, name, Mock(side_effect=error))
        out, err = call(f"plan {PAIR}", status)
        lines = err.splitlines()
        assert out == ""
        assert lines[-1].removeprefix("error: ").startswith(said)
        assert (len(lines) == 1) == (not isinstance(error, ZeroDivisionError))


def test_texts_that_the_tokenizer_does_not_know(own: Path, call: Call) -> None:
    tokenizer = files.words()
    tokenizer.unk_token = "<unk>"
    tokenizer.save_pretrained(own / "tuned")
    for words, part in (("w1 w2", 0), ("ключ слово", 1)):
        texts = [f"{text} {words}" for text in TEXTS]
        (own / "texts" / "lines.txt").write_text("\n".join(texts), encoding="utf-8")
        warned = "words that the tokenizer does not know" in call(f"plan {PAIR} --size 0.015")[0]
        assert warned == part
        report = json.loads(call(f"plan {PAIR} --size 0.015 --json")[0])
        tokens = sum(len(text.split()) for text in texts)
        # Of 140 texts 131 are taken.
        assert report["unknown_tokens"] == pytest.approx(part * 2 * len(TEXTS) / tokens, rel=0.02)
