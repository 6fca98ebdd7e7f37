"""Figures show what they are given."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes

from lorapower import figures

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


def test_figures_are_opaque() -> None:
    assert mpl.rcParams["savefig.facecolor"] == "white"
    assert not mpl.rcParams["savefig.transparent"]
