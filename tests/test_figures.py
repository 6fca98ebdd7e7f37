"""Figures show what they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lorapower import InputError
from lorapower.book import figures

mpl.use("agg")


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with mpl.rc_context():
        figures.use_style()
        yield
    plt.close("all")


def lines(ax: Axes) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]


def legend(ax: Axes) -> list[str]:
    shown = ax.get_legend()
    assert shown is not None
    return [text.get_text() for text in shown.get_texts()]


MANY = [f"line {i}" for i in range(12)]


def twelve(values: Any) -> dict[str, Any]:
    return dict.fromkeys(MANY, values)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.spectrum(twelve([2, 1])),
        lambda: figures.error_against_rank(twelve([0, 1]), {}, twelve([2, 1]), ylabel="e"),
        lambda: figures.precision([1, 2], twelve([[1], [2]]), xlabel="x"),
        lambda: figures.precision([1, 2], {"a": [[1], [2]]}, guides=twelve([1, 2]), xlabel="x"),
        lambda: figures.error_and_bounds([0, 1], [[1], [2]], twelve([[3], [4]]), ylabel="e"),
        lambda: figures.error_against_budget(
            twelve(([1, 2], [1, 2])), floor=1, floor_label="f", xlabel="x", ylabel="y"
        ),
        lambda: figures.medians(
            {"a": twelve(pd.DataFrame({"x": [1, 2], "y": [1, 2]}))}, "x", "y", xlabel="", ylabel=""
        ),
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
    legends = [*drawn.legends, *filter(None, (ax.get_legend() for ax in drawn.axes))]
    assert set(MANY) <= {text.get_text() for shown in legends for text in shown.get_texts()}


@pytest.mark.parametrize("errors", [{}, {"a": []}])
def test_error_against_rank_of_nothing_is_refused(errors: dict[str, list[float]]) -> None:
    with pytest.raises(InputError, match="measured must be errors at one rank or more; got none"):
        figures.error_against_rank(errors, {}, errors, ylabel="e")


@pytest.mark.parametrize(
    ("ranks", "measured", "said"),
    [
        ([0, 1], {"a": [2, 1]}, "ranks must be a mapping from labels to values; got list"),
        ({"a": [0, 1]}, [2, 1], "measured must be a mapping from labels to values; got list"),
        ({}, {"a": [2, 1]}, r"ranks of a must be as many .* of shape \(2,\); got none"),
        ({"a": [0]}, {"a": [2, 1]}, r"ranks of a must be .* \(2,\); got shape \(1,\)"),
    ],
)
def test_error_against_rank_says_what_does_not_fit(ranks: Any, measured: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        figures.error_against_rank(ranks, {}, measured, ylabel="e")


def test_error_against_rank_draws_a_single_rank() -> None:
    for ax in figures.error_against_rank({"a": [1]}, {"a": [0]}, {"a": [2]}, ylabel="e").axes:
        assert [line.tolist() for line in lines(ax)][1] == [2]


def test_spectrum_shows_medians_from_index_one() -> None:
    values = np.array([[3.0, 1.0], [5.0, 2.0], [4.0, 0.0]])
    (ax,) = figures.spectrum({"a": values, "b": values[0]}).axes
    np.testing.assert_array_equal(lines(ax), [[4, 1], [3, 1]])
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [1, 2])
    assert legend(ax) == ["a", "b"]


def test_error_against_rank_leaves_out_predictions_of_zero() -> None:
    figure = figures.error_against_rank(
        {"a": [0, 1, 2]},
        {"a": [1, 0.5, 0]},
        {"a": [1, 0.5, 1e-16]},
        thresholds={"a": 2},
        ylabel="e",
    )
    linear, logarithmic = figure.axes
    assert (linear.get_yscale(), logarithmic.get_yscale()) == ("linear", "log")
    for ax in figure.axes:
        predicted, measured, threshold = lines(ax)
        np.testing.assert_array_equal(predicted, [1, 0.5, np.nan])
        np.testing.assert_array_equal(measured, [1, 0.5, 1e-16])
        np.testing.assert_array_equal(ax.lines[2].get_xdata(), [2, 2])
        assert threshold.tolist() == [0, 1]


@pytest.mark.parametrize(("logx", "scale"), [(True, "log"), (False, "linear")])
def test_precision_shows_medians_and_guides(logx: bool, scale: str) -> None:
    figure = figures.precision(
        [1, 2], {"a": [[1, 2, 9], [3, 4, 5]]}, guides={"g": [7, 8]}, xlabel="x", logx=logx
    )
    (ax,) = figure.axes
    np.testing.assert_array_equal(lines(ax), [[2, 4], [7, 8]])
    assert legend(ax) == ["a", "g"]
    assert ax.get_xscale() == scale


def test_precision_marks_and_moves_a_long_legend_out() -> None:
    few = figures.precision([1, 2], {"a": [[1], [2]]}, marks={"m": 1.5}, xlabel="x")
    assert legend(few.axes[0]) == ["a", "m"]
    np.testing.assert_array_equal(few.axes[0].lines[1].get_xdata(), [1.5, 1.5])
    many = figures.precision([1, 2], {name: [[1], [2]] for name in "abcde"}, xlabel="x")
    assert many.axes[0].get_legend() is None
    assert [text.get_text() for text in many.legends[0].get_texts()] == list("abcde")


def test_ranges_are_bars_from_lowest_to_highest() -> None:
    before, after = figures.ranges(
        {"before": ([-1, -2], [3, 4]), "after": ([0, 0], [4, 6])}, ylabel="y"
    ).axes
    boxes = [bar.get_bbox() for bar in before.patches[:2] if isinstance(bar, Rectangle)]
    assert [(box.y0, box.y1) for box in boxes] == [(-1, 3), (-2, 4)]
    assert before.get_ylim() == after.get_ylim()
    assert (before.get_title(), after.get_title()) == ("before", "after")


def test_error_and_bounds_shows_medians() -> None:
    (ax,) = figures.error_and_bounds(
        [0, 1], [[1, 2, 9], [1, 1, 1]], {"b": [[5, 6, 7], [3, 3, 3]]}, ylabel="e"
    ).axes
    np.testing.assert_array_equal(lines(ax), [[2, 1], [6, 3]])
    assert legend(ax) == ["measured", "b"]


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
    assert (shades.min(), shades.max()) == (-6, 6)


def test_error_against_budget_shows_curves_and_floor() -> None:
    (ax,) = figures.error_against_budget(
        {"a": ([1, 10], [2, 0])}, floor=0.5, floor_label="f", xlabel="x", ylabel="y"
    ).axes
    np.testing.assert_array_equal(lines(ax), [[2, 0], [0.5, 0.5]])
    assert legend(ax) == ["a", "f"]
    assert ax.get_ylim()[0] == 0


def test_figures_are_opaque() -> None:
    assert mpl.rcParams["savefig.facecolor"] == "white"
    assert not mpl.rcParams["savefig.transparent"]


def test_error_against_rank_without_predictions_names_its_levels() -> None:
    figure = figures.error_against_rank(
        {"a": [0, 1]}, {}, {"a": [3, 0.5]}, levels={"constant": 1.0}, ylabel="e"
    )
    assert legend(figure.axes[0]) == ["a", "constant"]
    for ax in figure.axes:
        predicted, measured, level = lines(ax)
        assert np.isnan(predicted).all()
        assert measured.tolist() == [3, 0.5]
        assert level.tolist() == [1, 1]


def test_scatter_shows_every_point_and_the_guide() -> None:
    (ax,) = figures.scatter(
        {"a": ([1, 10], [2, 3]), "b": ([5], [6])},
        guides={"g": ([1, 10], [1, 10])},
        xlabel="x",
        ylabel="y",
    ).axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [line.tolist() for line in lines(ax)] == [[2, 3], [6], [1, 10]]
    assert legend(ax) == ["a", "b", "g"]


def test_patterns_are_shades_of_one_scale() -> None:
    first, second, bar = figures.patterns(
        {"a": np.eye(2), "b": np.full((2, 3), 0.5)}, xlabel="x", ylabel="y", label="p"
    ).axes
    for ax, shape in ((first, (2, 2)), (second, (2, 3))):
        (image,) = ax.images
        assert np.asarray(image.get_array()).shape == shape
        assert image.get_clim() == (0, 1)
    assert [first.get_title(), second.get_title(), bar.get_ylabel()] == ["a", "b", "p"]


def test_transformer_segments_name_every_weight() -> None:
    (ax,) = figures.transformer_segments().axes
    shown = " ".join(text.get_text() for text in ax.texts)
    for part in ("W_Q", "W_K", "W_V", "W_O", "W_1", "W_2", "out", "softmax", "ReLU"):
        assert part in shown


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
