"""Claims hold when, and only when, their criterion is met; records survive the notebook."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import torch

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


def test_a_claim_is_one_line_that_says_what_it_rests_on() -> None:
    """Only what is proved is predicted; bounds that differ are no interval."""
    proved = claims.at_most("all", "thm-a", measured=[0, 1], bound=2, seeds=1)
    assert proved.line == "✓ Holds: all (one seed) (measured 0 … 1; predicted ≤ 2)"
    seen = claims.at_least("s", "obs-a", measured=[1, 3], bound=[1, 4], seeds=3)
    assert seen.line == "✗ Fails: s (3 seeds) (measured 1 … 3; required ≥ 1 … 4, each its own)"


def test_claims_are_read_from_a_notebook_as_they_were_recorded(tmp_path: Path) -> None:
    made = [claims.at_most(s, "thm-a", measured=1, bound=2) for s in ("one", "other")]
    outputs = [nbformat.v4.new_output("display_data", claim._repr_mimebundle_()) for claim in made]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("…", outputs=outputs)])
    nbformat.write(notebook, tmp_path / "01-a.ipynb")
    assert read_claims(tmp_path / "01-a.ipynb") == made
