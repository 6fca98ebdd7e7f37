"""Figures show what they are given."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorapower.book import figures
from lorapower.book.figures._style import mark_rounding, use_style

mpl.use("agg")


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with mpl.rc_context():
        use_style()
        yield
    plt.close("all")


def lines(ax: Axes) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]


def legend(figure: Figure) -> set[str]:
    return {text.get_text() for shown in figure.legends for text in shown.get_texts()}


MANY = [f"line {i}" for i in range(12)]
TABLE = pd.DataFrame({"x": [1, 1, 2, 2], "y": [1.0, 3.0, 5.0, 9.0]})


def twelve(values: Any) -> dict[str, Any]:
    return dict.fromkeys(MANY, values)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.error_against_rank(twelve([0, 1]), {}, twelve([2, 1]), ylabel="e"),
        lambda: figures.curves([1, 2], twelve([[1], [2]]), xlabel="x", ylabel="y"),
        lambda: figures.curves([1, 2], {"a": [1, 2]}, guides=twelve([1, 2]), xlabel="", ylabel=""),
        lambda: figures.medians({"a": twelve(TABLE)}, "x", "y", xlabel="", ylabel=""),
        lambda: figures.intervals({"a": [1, 0, 2]}, levels=twelve(1), xlabel="x"),
        lambda: figures.scatter(twelve(([1, 2], [1, 2])), xlabel="x", ylabel="y"),
    ],
)
def test_every_line_given_is_drawn_and_named(draw: Callable[[], Figure]) -> None:
    drawn = draw()
    for ax in drawn.axes:
        assert set(MANY) <= {str(line.get_label()) for line in ax.lines}
    assert set(MANY) <= legend(drawn)


def test_markers_are_medians_and_lines_predictions_above_rounding() -> None:
    figure = figures.error_against_rank(
        {"a": [0, 1, 2]},
        {"a": [1, 0.5, 1e-17]},
        {"a": np.array([[1, 1], [0.25, 0.75], [1e-16, 3e-16]])},
        thresholds={"a": 2},
        levels={"constant": 1.0},
        line="bound",
        ylabel="e",
    )
    predicted, measured, *_ = lines(figure.axes[0])
    np.testing.assert_array_equal(predicted, [1, 0.5, np.nan])
    np.testing.assert_array_equal(measured[:2], [1, 0.5])
    assert legend(figure) == {"a", "constant", "measured", "bound", "threshold"}


def test_curves_are_medians_with_their_ranges() -> None:
    curves = figures.curves([1, 2], {"a": [[1, 2, 9], [3, 4, 5]]}, xlabel="x", ylabel="y").axes[0]
    np.testing.assert_array_equal(lines(curves), [[2, 4]])
    (band,) = (np.asarray(path.vertices) for path in curves.collections[0].get_paths())
    assert {(1, 1), (1, 9), (2, 3), (2, 5)} == {*map(tuple, band.tolist())}
    table = pd.concat([TABLE.assign(x=TABLE.x + 2 * i) for i in range(2)])
    rows = figures.medians({"p": {"a": table}}, "x", "y", xlabel="", ylabel="").axes[0]
    np.testing.assert_array_equal(rows.lines[0].get_xydata(), [[1, 2], [2, 7], [3, 2], [4, 7]])


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9),
    st.lists(st.floats(0, 1e-12), min_size=1, max_size=9),
    st.sampled_from(["linear", "log"]),
)
def test_rounding_takes_one_strip_at_the_foot(
    above: list[float], below: list[float], yscale: str
) -> None:
    ax = Figure().add_subplot()
    ax.plot([*above, math.nan, *below])
    ax.set_yscale(yscale)
    mark_rounding(ax, 1e-9)
    (drawn,) = lines(ax)[:1]
    foot, top = ax.get_ylim()
    high, missing, low = np.split(drawn, [len(above), len(above) + 1])
    np.testing.assert_array_equal(high, above)
    assert np.isnan(missing).all()
    assert ((foot < low) & (low < min(above))).all()
    assert max(above) < top
    strip = ax.patches[0].get_extents().get_points()[:, 1]
    ends = ax.transData.transform([(0, low[0]), (0, min(above))])[:, 1]
    assert strip[0] < ends[0] < strip[1] < ends[1] + 1


def choices() -> figures.Choices:
    """Two sliders; a line for each pair of their places, and one for any place of the second."""
    figure, ax = plt.subplots()
    for place in np.ndindex(2, 3):
        figures.show_at(ax.plot(place)[0], *place)
    figures.show_at(ax.plot([5, 5])[0], 1, None)
    said = {place: f"Shows <{place}>." for place in np.ndindex(2, 3)}
    return figures.Choices(figure, {"First": ["a", "b"], "Second": [1, 2, 3]}, said, (1, 2))


def test_a_figure_with_choices_shows_the_first_ones_without_scripts() -> None:
    bundle = choices()._repr_mimebundle_()
    parts = re.findall(r'<g id="shown-([\d_]+)-\d+"( style="display: none")?', bundle["text/html"])
    assert {part: not hidden for part, hidden in parts} == {
        **{f"{i}_{j}": (i, j) == (1, 2) for i, j in np.ndindex(2, 3)},
        "1_": True,
    }
    assert 'aria-label="Shows &lt;(1, 2)&gt;."' in bundle["text/html"]
    assert bundle["text/plain"] == "Shows <(1, 2)>."
    assert not plt.get_fignums()


def test_sliders_move_what_is_shown(browser: Any, tmp_path: Path) -> None:
    html = choices()._repr_mimebundle_()["text/html"]
    file = tmp_path / "page.html"
    file.write_text(f'<!doctype html><meta charset="utf-8">{html}', encoding="utf-8")
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(file.as_uri())
    seen = """() => [...document.querySelectorAll("g[id^='shown-']")]
        .filter((part) => part.style.display !== "none").map((part) => part.id.split("-")[1])"""
    said = page.locator("[aria-live]")
    assert page.evaluate(seen) == ["1_2", "1_"]
    page.get_by_label("First").press("Home")
    page.get_by_label("Second").press("ArrowLeft")
    assert page.evaluate(seen) == ["0_1"]
    assert said.inner_text() == "Shows <(0, 1)>."
    assert page.get_by_label("First").get_attribute("aria-valuetext") == "a"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()
