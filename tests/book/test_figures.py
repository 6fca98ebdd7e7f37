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
TABLE = figures.tidy([1, 2], measured={name: [[1, 3], [5, 9]] for name in MANY})
NAMED: Any = {"x": "x", "y": "measured", "xlabel": "", "ylabel": ""}


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.error_against_rank(TABLE, ylabel="e"),
        lambda: figures.curves(TABLE, **NAMED),
        lambda: figures.curves(TABLE.assign(part="p"), panel="part", **NAMED),
        lambda: figures.curves(
            TABLE.assign(line=TABLE.method, method="trained"),
            style="line",
            label="{line}",
            **NAMED,
        ),
        lambda: figures.curves(TABLE[:4], levels=dict.fromkeys(MANY, 1), **NAMED),
        lambda: figures.curves(TABLE[:4], marks=dict.fromkeys(MANY, 1), **NAMED),
    ],
)
def test_every_line_given_is_drawn_and_named(draw: Callable[[], Figure]) -> None:
    drawn = draw()
    for ax in drawn.axes:
        assert set(MANY) <= {str(line.get_label()) for line in ax.lines}
    assert set(MANY) <= legend(drawn)


def test_a_method_has_its_colour_whatever_the_legend_says() -> None:
    data = pd.concat(TABLE[:4].assign(method=method) for method in ("fitted", "trained", "other"))
    names = {"fitted": "trained", "trained": "fitted", "other": "construction"}
    data["name"] = data.method.map(names)
    for lines_of in (figures.curves(data, label="{name}", **NAMED), figures.curves(data, **NAMED)):
        fitted, trained, other = (line.get_color() for line in lines_of.axes[0].lines)
        assert (fitted, trained) == (figures.COLORS["fitted"], figures.COLORS["trained"])
        assert other not in figures.COLORS.values()
    assert legend(figures.curves(data, label="{name}", **NAMED)) == {*names.values()}


def test_depths_have_shades_and_their_own_ranks() -> None:
    data = figures.tidy({1: [0, 1], 4: [0]}, measured={1: [2, 1], 4: [3]})
    drawn = figures.error_against_rank(data, label="depth {method}", ylabel="e")
    first, fourth = drawn.axes[0].lines
    assert legend(drawn) == {"depth 1", "depth 4"}
    assert first.get_color() != fourth.get_color()
    assert [len(y) for y in lines(drawn.axes[0])] == [2, 1]


def test_markers_are_medians_and_lines_predictions_above_rounding() -> None:
    data = figures.tidy(
        [0, 1, 2],
        predicted={"a": [1, 0.5, 1e-17]},
        measured={"a": np.array([[1, 1], [0.25, 0.75], [1e-16, 3e-16]])},
    )
    figure = figures.error_against_rank(data, thresholds={"a": 2}, line="bound", ylabel="e")
    predicted, measured, *_ = lines(figure.axes[0])
    np.testing.assert_array_equal(predicted, [1, 0.5, np.nan])
    np.testing.assert_array_equal(measured[:2], [1, 0.5])
    assert legend(figure) == {"a", "measured", "bound", "threshold"}


def test_curves_are_medians_with_their_ranges_and_stars_published_values() -> None:
    data = figures.tidy([1, 2], measured={"trained": [[1, 2, 9], [3, 4, 8]]})
    stars = pd.DataFrame({"method": ["trained"], "x": [1], "measured": [0.5]})
    # The axis is logarithmic, the median of 1 and 9 is not.
    even = pd.concat([data, data.assign(x=3, measured=[1, 1, 1, 9, 9, 9])])
    figure = figures.curves(even, published=stars, **NAMED)
    median, star = figure.axes[0].lines
    np.testing.assert_array_equal(median.get_xydata(), [[1, 2], [2, 4], [3, 5]])
    np.testing.assert_array_equal(star.get_xydata(), [[1, 0.5]])
    assert star.get_color() == median.get_color() == figures.COLORS["trained"]
    (band,) = (np.asarray(path.vertices) for path in figure.axes[0].collections[0].get_paths())
    assert {(1, 1), (1, 9), (2, 3), (2, 8), (3, 1), (3, 9)} == {*map(tuple, band.tolist())}
    assert legend(figure) == {"trained", "published"}


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
    # And without trust, where no HTML is shown either.
    assert bundle["image/png"].startswith(b"\x89PNG")
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
