"""Claims hold when, and only when, their criterion is met; records survive the notebook."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare
import nbformat
import pytest
import torch
import verdicts

from lorapower import InputError
from lorapower.book import claims
from lorapower.book._executed import read_claims

NAN = float("nan")


@pytest.mark.parametrize(
    ("predicted", "measured", "options", "holds"),
    [
        (1.0, 1.0, {}, True),
        (1.0, 1.0 + 1e-12, {}, False),
        (1.0, 1.0 + 1e-12, {"rtol": 1e-11}, True),
        ([1.0, 2.0], [1.0, 2.1], {"rtol": 1e-2}, False),
        ([1.0, 2.0], [1.0, 2.1], {"rtol": 1e-1}, True),
        (0.0, 1e-15, {"rtol": 1e-10}, False),
        (0.0, 1e-15, {"rtol": 1e-10, "scale": 1.0}, True),
        (0.0, 0.0, {"rtol": 1e-10}, True),
        (1.0, NAN, {"rtol": 1.0}, False),
        (NAN, NAN, {"rtol": 1.0}, False),
        (torch.ones(3, 2), torch.ones(2), {}, True),
    ],
)
def test_equal(predicted: object, measured: object, options: dict[str, float], holds: bool) -> None:
    claim = claims.equal("s", "l", predicted=predicted, measured=measured, **options)  # type: ignore[arg-type]
    assert claim.holds is holds


@pytest.mark.parametrize(
    ("measured", "bound", "below", "above"),
    [(1, 2, True, False), (2, 1, False, True), (1, 1, True, True), (NAN, 1, False, False)],
)
def test_inequalities(measured: float, bound: float, below: bool, above: bool) -> None:
    assert claims.at_most("s", "l", measured=[measured, 1], bound=bound).holds is (below)
    assert claims.at_least("s", "l", measured=[measured, 2], bound=bound).holds is (above)


def test_nothing_checked_is_no_claim() -> None:
    with pytest.raises(InputError, match="measured must be at least one number; got none"):
        claims.at_most("s", "l", measured=[], bound=1)


def test_numbers_keep_their_digits_and_typeset_powers_of_ten() -> None:
    written = [claims.number(value, 2) for value in (0.0, 12.34, 1e-7, -3.21e-7, 1234.0)]
    assert written == ["0", "12", "$10^{-7}$", r"$-3.2\times10^{-7}$", r"$1.2\times10^{3}$"]


def record(path: Path, *recorded: claims.Claim) -> Path:
    outputs = [
        nbformat.v4.new_output("display_data", claim._repr_mimebundle_()) for claim in recorded
    ]
    cells = [nbformat.v4.new_code_cell("…", outputs=[output]) for output in outputs]
    cells.append(nbformat.v4.new_markdown_cell("text"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_an_executed_notebook_yields_its_claims_in_order(tmp_path: Path) -> None:
    good = claims.at_most("first $x$", "lem-a", measured=1, bound=2)
    bad = claims.at_least("second", "lem-b", measured=1, bound=2)
    assert read_claims(record(tmp_path / "executed.ipynb", good, bad)) == [good, bad]
    assert (good.holds, bad.holds) == (True, False)
    assert "✗ Fails: second" in bad._repr_mimebundle_()["text/markdown"]


def test_builds_are_compared_claim_by_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for build in ("old", "new"):
        (tmp_path / build).mkdir()
    one, same, gone = (claims.at_most(s, "thm-a", measured=1, bound=2) for s in ("one", "s", "go"))
    other = claims.at_most("one", "thm-a", measured=3, bound=2)
    record(tmp_path / "old" / "01-a.ipynb", one, same, same, gone)
    record(tmp_path / "new" / "01-a.ipynb", other, same, same)
    record(tmp_path / "new" / "01-a.partial.ipynb", gone)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "old"), str(tmp_path / "new")])
    assert compare.main() == 1
    printed = capsys.readouterr().out
    was, now = "measured 1; predicted ≤ 2", "measured 3; predicted ≤ 2, fails"
    for line in (
        "Claims equal: 2",
        f"Claims changed: 1\n  01-a: thm-a: one: {was} -> {now}\n",
        f"Claims gone: 1\n  01-a: thm-a: go: {was}\n",
        "Claims new: 0",
        f"Claims failing: 1\n  01-a: thm-a: one: {now}\n",
    ):
        assert line in printed
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "old"), str(tmp_path / "old")])
    assert compare.main() == 0


def shown(claim: claims.Claim) -> str:
    return str(claim._repr_mimebundle_()["text/markdown"])


@pytest.mark.parametrize(
    ("label", "word"), [("thm-a", "predicted"), ("rem-a", "predicted"), ("obs-a", "required")]
)
def test_a_claim_is_one_line_and_only_what_is_proved_is_predicted(label: str, word: str) -> None:
    claim = claims.at_most("all is well", label, measured=[0, 1], bound=2)
    assert shown(claim) == f"✓ Holds: all is well (measured 0 … 1; {word} ≤ 2)"
    assert claim.observed is (word == "required")


def test_bounds_that_differ_are_no_interval() -> None:
    claim = claims.at_least("s", "obs-a", measured=[1, 3], bound=[1, 2])
    assert shown(claim) == "✓ Holds: s (measured 1 … 3; required ≥ 1 … 2, each its own)"


def test_a_claim_says_how_many_seeds_it_rests_on() -> None:
    for seeds, said in ((None, ""), (1, " (one seed)"), (3, " (3 seeds)")):
        equal = claims.equal("s", "l", predicted=1, measured=1, seeds=seeds)
        below = claims.at_most("s", "l", measured=1, bound=1, seeds=seeds)
        assert equal.statement == below.statement == "s" + said


def test_lines_of_claims_go_unless_they_fail(tmp_path: Path) -> None:
    """A claim about a statement of another page leaves its badge in their place."""

    class Environment:
        def doc2path(self, docname: str) -> str:
            return str(tmp_path / f"{docname}.ipynb")

    fine, wrong, elsewhere, both = (
        claims.at_most(word, label, measured=measured, bound=1)
        for word, label, measured in (
            ("fine", "thm-a", 0),
            ("wrong", "thm-a", 2),
            ("elsewhere", "thm-b", 0),
            ("both", "thm-b", 2),
        )
    )
    path = record(tmp_path / "page.ipynb", fine, wrong, elsewhere, both)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_markdown_cell(":::{prf:theorem}\n:label: thm-a\n:::"))
    nbformat.write(notebook, path)
    environment: Any = Environment()
    found = verdicts.badges(environment, "page")
    assert {name: badge.claims for name, badge in found.items()} == {
        "thm-a": [fine, wrong],
        "thm-b-2": [elsewhere],
        "thm-b-3": [both],
    }
    source = [path.read_text(encoding="utf-8")]
    app: Any = SimpleNamespace(env=environment)
    verdicts.set_marks(app, "page", source)
    cells = nbformat.reads(source[0], as_version=4).cells
    assert verdicts.verdict([fine, wrong]) == "✗ 1 of 2 fails"
    assert verdicts.verdict([elsewhere]) == "✓ holds"
    shown = [[output.data["text/markdown"] for output in cell.outputs] for cell in cells[:4]]
    checked = "Checked here: {prf:ref}`thm-b`"
    marks = [f":::{{margin}}\n{checked} {{verdict}}`page::thm-b-{k}`\n:::" for k in (2, 3)]
    assert shown == [[], [wrong.line], [marks[0]], [f"{marks[1]}\n\n{both.line}"]]
