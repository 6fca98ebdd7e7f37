"""Figures show what they are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation, Text

from lorapower import book
from lorapower.book import figures
from lorapower.book.figures._style import (
    ROLES,
    contrast,
    ink,
    looks,
    squeeze_rounding,
    use_style,
)

mpl.use("agg")


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with mpl.rc_context():
        use_style()
        yield
    plt.close("all")


def lines(ax: Axes) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]


def legend(figure: Figure) -> list[str]:
    """Names in the legend, and those that are written beside lines."""
    inside = [text.get_text() for shown in figure.legends for text in shown.get_texts()]
    beside = [t.get_text() for ax in figure.axes for t in ax.texts if isinstance(t, Annotation)]
    return inside + beside


MANY = [f"line {i}" for i in range(12)]


def twelve(values: Any) -> dict[str, Any]:
    return dict.fromkeys(MANY, values)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.error_against_rank(twelve([0, 1]), {}, twelve([2, 1]), ylabel="e"),
        lambda: figures.curves([1, 2], twelve([[1], [2]]), xlabel="x", ylabel="y"),
        lambda: figures.curves([1, 2], {"a": [1, 2]}, guides=twelve([1, 2]), xlabel="", ylabel=""),
        lambda: figures.medians(
            {"a": twelve(pd.DataFrame({"x": [1, 2], "y": [1, 2]}))}, "x", "y", xlabel="", ylabel=""
        ),
        lambda: figures.intervals({"a": [1, 0, 2]}, levels=twelve(1), xlabel="x"),
        lambda: figures.scatter(twelve(([1, 2], [1, 2])), xlabel="x", ylabel="y"),
        lambda: figures.scatter(
            {"a": ([1], [2])}, guides=twelve(([1, 2], [1, 2])), xlabel="x", ylabel="y"
        ),
    ],
)
def test_every_line_given_is_drawn_and_named(draw: Callable[[], Figure]) -> None:
    drawn = draw()
    for ax in drawn.axes:
        assert set(MANY) <= {str(line.get_label()) for line in ax.lines}
    assert set(MANY) <= set(legend(drawn))


@pytest.mark.parametrize("yscale", ["linear", "log"])
def test_error_against_rank_predicts_nothing_below_rounding(yscale: str) -> None:
    figure = figures.error_against_rank(
        {"a": [0, 1, 2]},
        {"a": [1, 0.5, 1e-17]},
        {"a": np.array([[1, 1], [0.25, 0.75], [1e-16, 3e-16]])},
        thresholds={"a": 2},
        levels={"constant": 1.0},
        line="bound",
        yscale=yscale,
        ylabel="e",
    )
    (ax,) = figure.axes
    predicted, measured, threshold, level = lines(ax)
    np.testing.assert_array_equal(predicted, [1, 0.5, np.nan])
    np.testing.assert_array_equal(measured, [1, 0.5, 2e-16])
    np.testing.assert_array_equal(ax.lines[2].get_xdata(), [2, 2])
    assert (threshold.tolist(), level.tolist()) == ([0, 1], [1, 1])
    assert {*legend(figure)} == {"a", "constant", "measured", "bound", "threshold"}
    assert "rounding" in [text.get_text() for text in ax.texts]


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8))
def test_medians_in_text_and_figures_are_one(values: list[float]) -> None:
    ordered = sorted(values)
    middle = (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
    assert (
        book.median(values)
        == book.median(torch.tensor([values], dtype=torch.float64), 1)[0]
        == middle
    )
    drawn = figures.error_against_rank({"a": [0]}, {}, {"a": [values]}, rounding=0, ylabel="e")
    assert lines(drawn.axes[0])[0].tolist() == [middle]
    plt.close("all")


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9),
    st.lists(st.floats(0, 1e-12), min_size=1, max_size=9),
    st.sampled_from(["linear", "log"]),
)
def test_rounding_takes_one_strip_at_the_foot(
    above: list[float], below: list[float], yscale: str
) -> None:
    ax = Figure().add_subplot()
    ax.plot(above + below)
    ax.set_yscale(yscale)
    squeeze_rounding(ax, 1e-9)

    def place(y: list[float]) -> np.ndarray:
        points = ax.transData.transform(np.column_stack([np.zeros(len(y)), y]))
        return np.asarray(ax.transAxes.inverted().transform(points)[:, 1])

    low, high = place(sorted(below)), place(sorted(above))
    assert ((low > 0) & (low < 0.14)).all()
    assert ((high > 0.13) & (high < 1)).all()
    assert (np.diff(low) >= -1e-9).all()
    assert (np.diff(high) >= -1e-9).all()
    # What is not rounding stands on the axis as it would without a strip.
    some = np.array([0.3, 0.7]) * (1 - 0.14) + 0.14
    heights = ax.transData.inverted().transform(
        ax.transAxes.transform(np.column_stack([np.zeros(2), some]))
    )
    np.testing.assert_allclose(place(heights[:, 1].tolist()), some, rtol=1e-6)


def test_missing_values_are_not_drawn_in_the_strip() -> None:
    _, ax = plt.subplots()
    ax.plot([1, np.nan, 1e-20])
    squeeze_rounding(ax, 1e-9)
    assert np.isnan(ax.transScale.transform([(0, np.nan)])[0, 1])


@pytest.mark.parametrize(("xscale", "yscale"), [("log", "linear"), ("linear", "log")])
def test_curves_show_medians_ranges_and_guides(xscale: str, yscale: str) -> None:
    figure = figures.curves(
        [1, 2],
        {"a": [[1, 2, 9], [3, 4, 5]]},
        guides={"g": [7, 8]},
        marks={"m": 1.5},
        xlabel="x",
        ylabel="y",
        xscale=xscale,
        yscale=yscale,
    )
    (ax,) = figure.axes
    np.testing.assert_array_equal(lines(ax)[:2], [[2, 4], [7, 8]])
    np.testing.assert_array_equal(ax.lines[2].get_xdata(), [1.5, 1.5])
    (band,) = (np.asarray(path.vertices) for path in ax.collections[0].get_paths())
    assert {(1, 1), (1, 9), (2, 3), (2, 5)} == {*map(tuple, band.tolist())}
    assert {*legend(figure)} == {"a", "g", "m"}
    assert (ax.get_xscale(), ax.get_yscale()) == (xscale, yscale)


def test_a_line_leads_past_what_is_missing() -> None:
    nan = math.nan
    samples = {"a": [2.0, nan, 4.0], "b": [nan, 1.0, nan]}
    figure = figures.curves([1, 2, 3], samples, xlabel="x", ylabel="y")
    a, b = figure.axes[0].lines
    np.testing.assert_array_equal(a.get_xydata(), [[1, 2], [3, 4]])
    np.testing.assert_array_equal(b.get_xydata(), [[2, 1]])


METHODS = ("construction", "fitted", "trained", "final layers", "all weights")


def test_a_role_looks_the_same_in_all_company() -> None:
    alone = {name: looks([name])[name] for name in METHODS}
    together = looks(["something else", *reversed(METHODS), "bound from norms"])
    assert {name: together[name] for name in METHODS} == alone
    assert len({look.color for look in alone.values()}) == len(METHODS)
    assert len({look.marker for look in alone.values()}) == len(METHODS)
    assert looks(["final layer"])["final layer"] == alone["final layers"]


def test_what_else_a_label_says_is_the_kind_of_line_in_every_role() -> None:
    labels = [f"{name}, {start}" for start in ("pretrained", "random") for name in METHODS]
    found = looks(labels)
    for name in METHODS:
        random, pretrained = (found[f"{name}, {start}"] for start in ("random", "pretrained"))
        assert random.color == pretrained.color == looks([name])[name].color
        assert (random.line, pretrained.line) == ("-", "--")
        assert random.fill != pretrained.fill


def test_depths_have_one_colour_each_and_free_lines_none_that_means_something() -> None:
    found = looks(["depth 3", "3 blocks", "bound, 3 blocks", "measured, 3 blocks"])
    assert len({look.color for look in found.values()}) == 1
    assert found["bound, 3 blocks"].marker == found["measured, 3 blocks"].line == ""
    assert len({look.color for look in looks([f"depth {L}" for L in range(1, 15)]).values()}) == 14
    free = looks([f"line {i}" for i in range(8)]).values()
    assert len({(look.color, look.marker) for look in free}) == 8
    fixed = {str(color).lower() for color, _ in ROLES.values()}
    assert not fixed & {str(look.color).lower() for look in free}


TABLE = pd.DataFrame({"x": [1, 1, 2, 2], "y": [1.0, 3.0, 5.0, 9.0]})


def test_medians_without_bands_show_the_range_at_the_end_beside_the_line() -> None:
    table = pd.concat([TABLE.assign(x=TABLE.x + 2 * i) for i in range(2)])
    axes: dict[str, Any] = {"xlabel": "", "ylabel": "", "xscale": "log"}
    (ax,) = figures.medians({"p": {"a": table}}, "x", "y", bands=False, **axes).axes
    line, bar, end = ax.lines
    np.testing.assert_array_equal(line.get_xydata(), [[1, 2], [2, 7], [3, 2], [4, 7]])
    np.testing.assert_array_equal(bar.get_xydata(), [[4, 5], [4, 9]])
    drawn = bar.get_transform().transform([(4, 5)])
    assert drawn[0, 0] > ax.transData.transform([(4, 5)])[0, 0]
    assert len(np.asarray(end.get_xdata())) == 1


def test_few_medians_are_not_joined_and_have_their_ranges_beside_one_another() -> None:
    (ax,) = figures.medians({"p": {"a": TABLE, "b": TABLE}}, "x", "y", xlabel="", ylabel="").axes
    low, high, points, *_, others = ax.lines
    np.testing.assert_array_equal(low.get_xydata(), [[1, 1], [1, 3]])
    np.testing.assert_array_equal(high.get_xydata(), [[2, 5], [2, 9]])
    np.testing.assert_array_equal(points.get_xydata(), [[1, 2], [2, 7]])
    assert points.get_linestyle() == "None"
    here, there = (line.get_transform().transform([(1, 2)])[0] for line in (points, others))
    assert here[0] < there[0]
    assert here[1] == there[1]


def test_ranges_are_bars_from_lowest_to_highest() -> None:
    before, after = figures.ranges(
        {"before": ([-1, -2], [3, 4]), "after": ([0, 0], [4, 6])}, ylabel="y"
    ).axes
    boxes = [bar.get_bbox() for bar in before.patches[:2] if isinstance(bar, Rectangle)]
    assert [(box.y0, box.y1) for box in boxes] == [(-1, 3), (-2, 4)]
    assert before.get_ylim() == after.get_ylim()
    assert (before.get_title(), after.get_title()) == ("before", "after")


def test_published_values_are_stars_with_their_numbers() -> None:
    figure = figures.medians(
        {"p": {"trained": TABLE}},
        "x",
        "y",
        published={"p": {"trained": (1, 0.28), "both": (2, 3.0)}},
        xlabel="",
        ylabel="",
    )
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.texts] == ["0.28", "3"]
    *_, points, own, other = ax.lines
    assert points.get_color() == own.get_color() != other.get_color()
    assert {*legend(figure)} == {"trained", "published", "0.28", "3"}


def test_partitions_draw_every_layer_and_write_into_blocks() -> None:
    (ax,) = figures.partitions({"one": [(1, "a"), (3, "b")], "two": [(2, "c"), (2, "d")]}).axes
    assert [text.get_text() for text in ax.texts] == ["a", "b", "c", "d"]
    widths = [bar.get_bbox().width for bar in ax.patches if isinstance(bar, Rectangle)]
    np.testing.assert_allclose(widths, [0.9, 2.9, 1.9, 1.9])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3", "4"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "two"]


def test_plane_joins_the_pairs() -> None:
    one, other = np.array([[0.0, 1], [2, 0]]), np.array([[1.0, 1], [2, 1]])
    ax, _ = figures.plane(
        lambda x: x[0] + x[1], [(np.array([1.0, 0]), 0.5)], (one, other), label="v"
    ).axes
    first, second, points = ax.lines
    np.testing.assert_array_equal(first.get_xydata(), [[0, 2], [1, 2]])
    np.testing.assert_array_equal(second.get_xydata(), [[1, 0], [1, 1]])
    assert np.shape(points.get_xydata()) == (4, 2)
    shades = np.asarray(ax.collections[0].get_array())
    assert shades.max() == -shades.min() > 4, "all of the pairs are in the picture"


def test_points_are_joined_at_medians_above_zero() -> None:
    figure = figures.scatter(
        {"a": ([1, 10], [[1, 3], [0, 0]])},
        levels={"f": 0.5},
        joined=True,
        xlabel="x",
        ylabel="y",
        yscale="linear",
    )
    (ax,) = figure.axes
    np.testing.assert_array_equal(lines(ax), [[2, 0], [0.5, 0.5]])
    assert legend(figure) == ["a", "f"]
    assert ax.get_ylim()[0] == pytest.approx(-0.15), "markers at 0 are seen whole"
    (band,) = (np.asarray(path.vertices) for path in ax.collections[0].get_paths())
    assert {(1, 1), (1, 3), (10, 0)} <= {*map(tuple, band.tolist())}


def test_intervals_stand_in_rows_from_above() -> None:
    figure = figures.intervals({"a": (2, 1, 4), "b": (0, -1, 1)}, levels={"none": 0}, xlabel="x")
    (ax,) = figure.axes
    bars = [line for line in ax.lines if np.shape(line.get_xdata()) == (2,)]
    assert [np.asarray(line.get_xdata()).tolist() for line in bars[:2]] == [[1, 4], [-1, 1]]
    assert [np.asarray(line.get_ydata()).tolist() for line in bars[:2]] == [[0, 0], [1, 1]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.yaxis_inverted()
    assert legend(figure) == ["none"]


def test_patterns_are_shades_of_one_scale() -> None:
    first, second, bar = figures.patterns(
        {"a": np.eye(2), "b": np.full((2, 3), 0.5)}, xlabel="x", ylabel="y", label="p"
    ).axes
    for ax, shape in ((first, (2, 2)), (second, (2, 3))):
        (image,) = ax.images
        assert np.asarray(image.get_array()).shape == shape
        assert image.get_clim() == (0, 1)
    assert [first.get_title(), second.get_title(), bar.get_ylabel()] == ["a", "b", "p"]


def test_pictures_are_rows_of_images() -> None:
    images = np.linspace(0, 1, 24).reshape(2, 4, 3)
    axes = figures.pictures({"two": images, "one": images[:1]}).axes
    shown = [[np.asarray(image.get_array()) for image in ax.images] for ax in axes]
    np.testing.assert_array_equal([shown[0], shown[1], shown[2]], images[[0, 1, 0], None])
    assert not shown[3]
    assert [ax.get_ylabel() for ax in axes] == ["two", "", "one", ""]
    # Ink is dark, and equally so in all images.
    assert {image.get_clim() for ax in axes for image in ax.images} == {(0.0, 1.0)}
    assert axes[0].images[0].get_cmap()(1.0)[0] < axes[0].images[0].get_cmap()(0.0)[0]


def test_frames_hold_every_picture_and_show_one() -> None:
    table = pd.DataFrame([[1, 0], [20, 3]], index=[1, 2], columns=["query", "key"])
    made = figures.Frames(
        "stated error",
        {value: counts(table) for value in ("0.1", "0.2")},
        {"0.1": "Much rank.", "0.2": "Little <rank>."},
        "0.2",
    )
    bundle = made._repr_mimebundle_()
    assert bundle["text/html"].count("<img") == 2
    assert bundle["text/html"].count(" hidden>") == 1
    assert 'alt="Little &lt;rank&gt;."' in bundle["text/html"]
    assert bundle["text/plain"] == "Little <rank>."
    assert bundle["image/svg+xml"] == made.drawn["0.2"]
    assert not plt.get_fignums()


def counts(table: pd.DataFrame) -> Figure:
    return figures.counts(table, most=20, xlabel="part", ylabel="layer", label="ranks")


def test_counts_are_written_on_their_shades() -> None:
    table = pd.DataFrame([[1, 0], [20, 3]], index=[1, 2], columns=["query", "key"])
    (ax,) = counts(table).axes
    assert [text.get_text() for text in ax.texts] == ["1", "0", "20", "3"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["query", "key"]


def test_a_sphere_is_seen_from_two_sides() -> None:
    seen: list[Any] = []

    def height(points: Any) -> Any:
        seen.append(points)
        return points[2]

    figure = figures.sphere(
        height, {"target": [([1.0, 0.0, 0.0], 0.0)], "frozen": [([0.0, 0.0, 1.0], 0.5)]}, label="z"
    )
    front, behind, *_ = figure.axes
    assert front.get_title() == "from the front"
    assert behind.get_title() == "from behind"
    for points, sign in zip(seen, (1, -1), strict=True):
        inside = np.square(points[:2]).sum(0) < 1
        np.testing.assert_allclose(np.linalg.norm(points[:, inside], axis=0), 1)
        assert (sign * points[2] >= 0).all()
    texts = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert texts == {"target", "frozen"}


IDEAS = (
    figures.adapted_stack,
    figures.adapter_sizes,
    figures.far_token,
    figures.moved_kink,
    figures.paid_ranks,
    figures.paired_losses,
    figures.planning,
    figures.split_product,
    figures.residual_stream,
    figures.transformer_segments,
)


@pytest.mark.parametrize("draw", IDEAS, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("light", [1, 0.88], ids=["light", "dark"])
def test_drawings_can_be_read(draw: Callable[[], Figure], light: float) -> None:
    figure = draw()
    figure.draw_without_rendering()
    hidden = [t for ax in figure.axes if not ax.axison for t in (ax.xaxis, ax.yaxis)]
    unseen = {text for axis in hidden for text in axis.findobj(Text)}
    shown = [
        t for t in figure.findobj(Text) if t.get_visible() and t.get_text() and t not in unseen
    ]
    boxes = [text.get_window_extent() for text in shown]
    edge = figure.bbox.padded(1)
    for i, box in enumerate(boxes):
        name = shown[i].get_text()
        assert edge.x0 <= box.x0 <= box.x1 <= edge.x1, name
        assert edge.y0 <= box.y0 <= box.y1 <= edge.y1, name
        covered = [
            other.get_text() for other, b in zip(shown, boxes, strict=True) if box.overlaps(b)
        ]
        assert covered == [name]
    # In the dark figures stand on a card that is dimmed with them.
    ground = (light, light, light)
    for text in shown:
        color = to_rgb(text.get_color())
        if color != (1, 1, 1):
            red, green, blue = (light * part for part in color)
            assert contrast((red, green, blue), ground) > 4.2, text.get_text()


def test_the_bias_moves_the_kink_to_the_edge() -> None:
    for ax, kink in zip(figures.moved_kink().axes, (-0.25, -1.0), strict=True):
        relu = ax.lines[1]
        x, y = np.asarray(relu.get_xdata()), np.asarray(relu.get_ydata())
        np.testing.assert_allclose(y, np.maximum(x - kink, 0))
        assert ax.lines[2].get_xdata() == [kink]


def test_ranks_pay_as_long_as_they_explain_more_than_they_cost() -> None:
    each, total = figures.paid_ranks().axes
    bars = np.array([bar.get_height() for bar in each.patches if isinstance(bar, Rectangle)])
    (costs,) = lines(each)
    _, _, risk, _ = lines(total)
    np.testing.assert_allclose(np.diff(risk), costs - bars)
    pays = bars > costs
    assert pays[: risk.argmin()].all()
    assert not pays[risk.argmin() :].any()


def test_the_split_product_is_what_descent_of_the_product_finds() -> None:
    product, factors = figures.split_product().axes
    assert lines(product)[1][-1] < 1e-2
    (end,) = [text.xy for text in factors.texts if isinstance(text, Annotation)]
    assert np.prod(end) == pytest.approx(1)
    descent = np.asarray(factors.lines[2].get_xydata())
    assert descent[-1].prod() == pytest.approx(1, abs=1e-3)
    assert np.linalg.norm(descent, axis=1).min() < 0.5, "passes by the saddle"


def test_ink_is_as_dark_as_text_needs() -> None:
    assert contrast("black", "white") == pytest.approx(21)
    assert contrast("#767676", "white") == pytest.approx(4.54, abs=0.01)
    for color, _ in ROLES.values():
        assert contrast(ink(color), "white") >= 4.5


def test_few_lines_have_their_names_beside_them_in_readable_colours() -> None:
    figure = figures.curves(
        [1, 2, 3], {"a": [1, 1, 1], "all weights": [9, 9, 9]}, xlabel="", ylabel="", yscale="linear"
    )
    assert not figure.legends
    figure.draw_without_rendering()
    (ax,) = figure.axes
    at = ax.transData.transform([[0, 1], [0, 9]])[:, 1]
    for i, (name, text) in enumerate(zip(("a", "all weights"), ax.texts, strict=True)):
        assert name == text.get_text()
        assert contrast(text.get_color(), "white") >= 4.5
        middle = text.get_window_extent().get_points()[:, 1].mean()
        assert np.abs(at - middle).argmin() == i


def test_lines_that_coincide_are_named_in_a_legend() -> None:
    same = {"a": [1, 2, 3], "b": [1, 2, 3]}
    figure = figures.curves([1, 2, 3], same, xlabel="", ylabel="")
    (shown,) = figure.legends
    assert [text.get_text() for text in shown.get_texts()] == ["a", "b"]
    assert not figure.axes[0].texts


def test_one_number_at_several_places_is_a_level_line() -> None:
    level = pd.DataFrame({"x": [1, 9], "y": [2.0, 2.0]})
    (ax,) = figures.medians({"p": {"a": level}}, "x", "y", xlabel="", ylabel="").axes
    assert ax.lines[0].get_linestyle() == "-"


def test_panels_may_share_a_scale_and_have_lines_without_markers() -> None:
    tables = {"p": {"a": TABLE}, "q": {"a": TABLE.assign(y=TABLE.y * 100)}}
    axes: dict[str, Any] = {"xlabel": "", "ylabel": "", "markers": False}
    upper, lower = figures.medians(tables, "x", "y", sharey=True, **axes).axes
    assert upper.get_ylim() == lower.get_ylim()
    assert upper.get_ylim()[0] < 2 < 700 < upper.get_ylim()[1]
    assert {line.get_marker() for ax in (upper, lower) for line in ax.lines} == {"None"}
    shifted = {"p": {"a": TABLE.assign(x=TABLE.x - 1)}, "q": {"a": TABLE.assign(x=TABLE.x * 9)}}
    figure = figures.medians(shifted, "x", "y", **axes)
    assert figure.axes[0].get_xlim()[1] >= 18, "a later panel may go on farther"
    (ax,) = figures.medians({"p": {"a": TABLE}}, "x", "y", ylim=(0.1, 50), **axes).axes
    assert ax.get_ylim() == (0.1, 50)


def test_curves_of_markers_alone_leave_guides_in_sight() -> None:
    figure = figures.curves(
        [1, 2], {"a": [1, 2]}, guides={"g": [[1, 5], [2, 6]]}, joined=False, xlabel="", ylabel=""
    )
    (ax,) = figure.axes
    measured, *guides = ax.lines
    assert measured.get_linestyle() == "None"
    assert [np.asarray(line.get_ydata()).tolist() for line in guides] == [[1, 2], [5, 6]]
    assert legend(figure) == ["a", "g"]
