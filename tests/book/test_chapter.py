"""What a chapter does at its head, how its numbers get into its text, and what it claims."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from IPython.core.formatters import DisplayFormatter

from lorapower import InputError, book
from lorapower.book import _executed, _run, claims, figures
from lorapower.book._executed import read_claims

NAN = float("nan")


class All(book.Recorded):
    """Every type of parameter that there is."""

    width: book.Width = 16
    depth: book.whole(1, 64) = 6  # type: ignore[valid-type]
    seeds: book.Seeds = 2
    ranks: book.Ranks = []  # noqa: RUF012
    few: list[book.whole(1, 9)] = []  # type: ignore[valid-type]  # noqa: RUF012


def completed(**changes: Any) -> All:
    return All(**changes)


@pytest.mark.parametrize(
    ("width", "ranks"), [(2, range(3)), (11, range(12)), (16, range(17)), (64, range(0, 65, 4))]
)
def test_no_ranks_stand_for_all_up_to_the_width_or_seventeen(width: int, ranks: range) -> None:
    assert completed(width=width, ranks=[]).ranks == [*ranks]


@pytest.mark.parametrize("value", ["1,4", "[1, 4]", "[4,1]", "1,4,", [4, 1], [1, 4, 1], (1, 4)])
def test_lists_of_numbers_come_in_any_form(value: object) -> None:
    parameters = completed(ranks=value, few=value)
    assert parameters.ranks == parameters.few == [1, 4]
    assert completed(ranks=4).ranks == completed(ranks="4").ranks == [4]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("profile", "fast"),
        ("seed", -1),
        *(("width", value) for value in (0, 513, "16", 0.5)),
        *(("ranks", value) for value in (-1, "3,-1", "0.5", "all", 17, [0, 17])),
        ("few", [2, 0]),
        ("few", 10),
        *(("seeds", value) for value in (0, 101)),
    ],
)
def test_wrong_parameters_are_named(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^{name} must be") as caught:
        completed(**{name: value})
    assert caught.value.name == name
    assert "\n" not in str(caught.value)


def test_a_refusal_states_the_whole_range() -> None:
    for name, value, said in (
        ("depth", 65, "an integer from 1 to 64; got 65"),
        ("seed", -1, "an integer from 0; got -1"),
        ("few", [3, 10], "an integer from 1 to 9; got 10"),
    ):
        with pytest.raises(InputError, match=f"^{name} must be {said}"):
            completed(**{name: value})


# What a chapter does at its head


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Those of a notebook, to which tests add."""
    given = {**{name: field.default for name, field in All.model_fields.items()}, "In": [""]}
    shell = SimpleNamespace(user_ns=given, run_line_magic=lambda *_: None)
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    monkeypatch.setattr("IPython.display.display", lambda _: None)
    yield given
    _run.changed.clear()


@pytest.fixture
def cells(variables: dict[str, Any]) -> list[str]:
    """The cells that ran in a notebook, to which tests add."""
    return cast(list[str], variables["In"])


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that are not the book's."""
    monkeypatch.setitem(_run.changed, "width", 24)


def test_setup_sets_up_figures_and_threads(cells: list[str]) -> None:
    threads = torch.get_num_threads()
    with mpl.rc_context({"svg.hashsalt": None}):
        torch.set_num_threads(2)
        book.setup()
        assert torch.get_num_threads() == 1
        assert mpl.rcParams["svg.hashsalt"] == "lorapower"
    torch.set_num_threads(threads)


def test_unknown_names_are_refused_with_those_that_there_are(cells: list[str]) -> None:
    cells += ["# Parameters\nwdith = 24\nranks = [1]\n", "p = All()"]
    complaint = "among profile, seed, width, .*, few; got wdith: did you mean width?"
    with pytest.raises(InputError, match=complaint):
        All.read()
    # As in JupyterLab, after the cell was mended and run again.
    cells += ["# Parameters\nwidth = 24\n", "p = All.read()"]
    assert All.read().width == 16


def test_what_becomes_a_record_has_the_parameters_of_the_book(variables: dict[str, Any]) -> None:
    variables |= {"profile": "paper", "width": 4}
    with pytest.raises(InputError, match=r"parameters must be left as they are .* got width"):
        All.read()
    variables["width"] = 16
    assert All.read().profile == "paper"


def test_a_page_without_records_takes_all_parameters_in_each_profile(
    variables: dict[str, Any],
) -> None:
    variables |= {"profile": "paper", "seed": 3}
    assert book.Parameters.read().seed == 3


@pytest.mark.parametrize("ranks", [[1, 4], "1,4", "[1, 4]"])
def test_a_run_says_which_parameters_are_not_the_books(
    variables: dict[str, Any], monkeypatch: pytest.MonkeyPatch, ranks: object
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("IPython.display.display", lambda text: shown.append(text.data))
    assert All.read().ranks == [*range(17)]
    assert (_run.changed, shown) == ({}, [])
    variables |= {"width": 8, "ranks": ranks}
    assert All.read().ranks == [1, 4]
    assert _run.changed == {"width": 8, "ranks": [1, 4]}
    assert shown == ["*Run with width 8, ranks 1 4. The book has width 16, ranks .*"]
    # All ranks up to another width are what the book has too.
    variables["ranks"] = []
    All.read()
    assert _run.changed == {"width": 8}


@pytest.mark.usefixtures("elsewhere")
def test_figures_name_parameters_that_are_not_the_books() -> None:
    with mpl.rc_context():
        figures.use_style()
        figure = plt.figure()
        assert [text.get_text() for text in figure.texts] == ["width 24"]
        _run.changed.clear()
        assert not plt.figure().texts
    plt.close("all")


# What the text quotes


def test_jupyterlab_and_the_page_are_told_what_the_text_quotes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    glued: dict[str, Any] = {}

    def keep(forms: dict[str, Any], *, metadata: dict[str, Any], raw: bool) -> None:
        about = metadata["scrapbook"]
        start = len(about["mime_prefix"])
        glued[about["name"]] = {kind[start:]: form for kind, form in forms.items()}

    monkeypatch.chdir(tmp_path)
    Path("26").mkdir()  # which a number must not be taken for
    monkeypatch.setattr("IPython.display.display", keep)
    monkeypatch.setattr("IPython.core.formatters.format_display_data", DisplayFormatter().format)
    book.quote("error", torch.tensor(0.0567, dtype=torch.float64))
    book.quote("count", np.int64(4))
    book.quote("names", "2, 4")
    book.quote("whole", 26, digits=2)
    book.quote("tiny", torch.tensor(2.34e-7, dtype=torch.float64), digits=2)
    plain = [glued[name]["text/plain"] for name in ("error", "count", "names")]
    assert plain == ["0.0567", "4", "'2, 4'"]
    assert [book.quoted[key] for key in ("error:.2f", "count:d", "names")] == ["0.06", "4", "2, 4"]
    assert book.quoted["whole"] == glued["whole"]["text/markdown"] == "26"
    tiny = r"$2.3\times10^{-7}$"
    assert book.quoted["tiny"].data == glued["tiny"]["text/markdown"] == tiny
    assert book.quoted["yet_to_come:.2f"] == "…"


def test_reading_what_a_chapter_recorded_loads_no_torch() -> None:
    """Nor what draws: each chapter is executed by such a program."""
    heavy = "[name for name in ('matplotlib', 'scipy', 'torch') if name in sys.modules]"
    program = f"import sys\nimport execute\nprint({heavy})"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "tools", capture_output=True, text=True
    )
    assert run.stdout == "[]\n", run.stderr


# Claims hold when, and only when, their criterion is met


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
    ("predicted", "measured", "options", "shown"),
    [
        ([1.0, 2.0], [1.0, 2.1], {"rtol": 0.1}, "off by 0.05"),
        ([0.0, 0.0], [0.0, 0.0], {"rtol": 0.1}, "off by 0"),
        ([0.0, 1.0], [1e-15, 9.0], {"rtol": 0.1}, "off by $10^{-15}$ where 0 is allowed"),
        ([0.0, 1.0], [1.0, NAN], {"rtol": 0.1}, "off by NaN"),
        ([1.0, 2.0], [NAN, 2.0], {}, "NaN"),
    ],
)
def test_equal_shows_how_far_off_it_is(
    predicted: list[float], measured: list[float], options: dict[str, Any], shown: str
) -> None:
    claim = claims.equal("s", "l", predicted=predicted, measured=measured, **options)
    assert claim.measured == shown


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


@pytest.mark.usefixtures("elsewhere")
def test_elsewhere_only_what_is_proved_has_to_hold() -> None:
    seen = claims.at_least("s", "obs-a", measured=[1, NAN], bound=3)
    assert seen.line == "○ Measured: s (1; ≥ 3 required with the book's parameters only)"
    tried = claims.at_least("s", "thm-a", measured=1, bound=3, by_hand=True)
    proved = claims.at_least("s", "thm-a", measured=[1, NAN], bound=3)
    equal = claims.equal("s", "thm-a", predicted=1, measured=2)
    assert [claim.fails for claim in (seen, tried, proved, equal)] == [False, False, True, True]
    assert proved.line == "✗ Fails: s (measured NaN; predicted ≥ 3)"
    for nothing in (
        claims.at_most("s", "thm-a", measured=[], bound=1),
        claims.at_most("s", "obs-a", measured=NAN, bound=1),
        claims.equal("s", "thm-a", predicted=[], measured=[]),
    ):
        assert nothing.line == "– Nothing to check: s (with these parameters)"
        assert not nothing.fails


def test_papermill_writes_numbers_into_the_text_and_fails_with_a_claim() -> None:
    text = '{eval}`book.quoted["error:.1f"]`, {eval}`book.quoted["later"]`, {quoted}`01::a`'
    failing, held = (
        claims.at_most("s", "thm-a", measured=measured, bound=1) for measured in (2, 1)
    )
    glue = {"scrapbook": {"name": "error", "mime_prefix": _executed.GLUE}}
    number = nbformat.v4.new_output(
        "display_data", {f"{_executed.GLUE}text/plain": "0.26"}, metadata=glue
    )
    shown = [
        nbformat.v4.new_output("display_data", claim._repr_mimebundle_())
        for claim in (held, failing)
    ]
    code = nbformat.v4.new_code_cell("from lorapower import book", outputs=[number, shown[0]])
    cells = [nbformat.v4.new_markdown_cell(text), code]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["papermill"] = {"parameters": {"width": 8, "ranks": [1, 4]}}
    _executed.finish(notebook)
    first, written, _ = notebook.cells
    assert first.source.startswith("*Run with width 8, ranks 1 4. ")
    assert written.source == "0.3, …, …"
    assert [output.output_type for output in code.outputs] == ["display_data"] * 2
    code.outputs.append(shown[1])
    _executed.finish(notebook)
    assert (code.outputs[-1].output_type, code.outputs[-1].evalue) == ("error", "s")
    other = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    _executed.finish(other)
    assert [cell.source for cell in other.cells] == [text]


@pytest.mark.programs
def test_a_run_again_ends_with_a_status_if_a_theorems_claim_fails(tmp_path: Path) -> None:
    parameters = nbformat.v4.new_code_cell("width: int = 2  # a width")
    parameters.metadata["tags"] = ["parameters"]
    claim = (
        "from lorapower import book\nfrom lorapower.book import claims\n"
        "claims.at_most('s', 'thm-a', measured=width, bound=3)"
    )
    cells = [parameters, *map(nbformat.v4.new_code_cell, (claim, "print('at the end')"))]
    metadata = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.write(notebook, tmp_path / "in.ipynb")
    for width, status in ((3, 0), (4, 1)):
        words = ["in.ipynb", f"{width}.ipynb", "-p", "width", str(width)]
        command = [str(Path(sys.executable).with_name("papermill")), *words]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == status
        assert "at the end" in (tmp_path / f"{width}.ipynb").read_text(encoding="utf-8")


def test_numbers_keep_their_digits_and_typeset_powers_of_ten() -> None:
    written = [claims.number(value, 2) for value in (0.0, 12.34, 1e-7, -3.21e-7, 1234.0)]
    assert written == ["0", "12", "$10^{-7}$", r"$-3.2\times10^{-7}$", r"$1.2\times10^{3}$"]


def test_a_claim_is_one_line_that_says_what_it_rests_on() -> None:
    """What is proved is predicted, no bar set by hand; bounds that differ are no interval."""
    proved = claims.at_most("all", "thm-a", measured=[0, 1], bound=2, seeds=1)
    assert proved.line == "✓ Holds: all (one seed) (measured 0 … 1; predicted ≤ 2)"
    seen = claims.at_least("s", "obs-a", measured=[1, 3], bound=[1, 4], seeds=3)
    assert seen.line == "✗ Fails: s (3 seeds) (measured 1 … 3; required ≥ 1 … 4, each its own)"
    tried = claims.at_least("s", "thm-a", measured=3, bound=1, by_hand=True)
    assert tried.line == "✓ Holds: s (measured 3; required ≥ 1)"


def test_claims_are_read_from_a_notebook_as_they_were_recorded(tmp_path: Path) -> None:
    made = [
        claims.at_most("s", "thm-a", measured=1, bound=2, by_hand=by_hand)
        for by_hand in (False, True)
    ]
    outputs = [nbformat.v4.new_output("display_data", claim._repr_mimebundle_()) for claim in made]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("…", outputs=outputs)])
    nbformat.write(notebook, tmp_path / "01-a.ipynb")
    assert read_claims(tmp_path / "01-a.ipynb") == made
