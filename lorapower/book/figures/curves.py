"""Draw tidy tables of what is measured and what is predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from ._style import COLORS, DARK, GREY, LINES, look, mark_rounding

_MEDIANS: dict[str, Any] = {"estimator": "median", "errorbar": ("pi", 100), "legend": False}
_MEDIANS["err_kws"] = {"alpha": 0.15, "lw": 0}
_LEVEL: dict[str, Any] = {"color": GREY, "lw": 1.5, "zorder": 0.5}
_MARK: dict[str, Any] = _LEVEL | {"ls": ":"}
# Three names of so many letters are as wide as a figure.
_SHORT = 15
# Relative errors below this are rounding.
_ROUNDING = 1e-9


def tidy(
    x: ArrayLike | Mapping[Any, ArrayLike], **columns: Mapping[Any, ArrayLike]
) -> pd.DataFrame:
    """Tabulate samples of methods, one a row, in columns ``method``, ``x`` and those named.

    A column has, by method, numbers ``[len(x)]`` or ``[len(x), samples]``; x is the same for all
    methods, or has its own for each. An integer stands for a depth, in a method's place.

    Examples
    --------
    >>> tidy([1, 2], error={"trained": [[0.5, 0.7], [0.1, 0.3]]})
        method    x  error
    0  trained  1.0    0.5
    1  trained  1.0    0.7
    2  trained  2.0    0.1
    3  trained  2.0    0.3
    """
    tables = []
    for method in next(iter(columns.values())):
        at = np.asarray(x[method] if isinstance(x, Mapping) else x, dtype=float)
        named = {"x": at} | {name: np.asarray(column[method]) for name, column in columns.items()}
        rows = np.broadcast_arrays(*(array.reshape(len(at), -1) for array in named.values()))
        flat = {name: array.ravel() for name, array in zip(named, rows, strict=True)}
        tables.append(pd.DataFrame({"method": method, **flat}))
    return pd.concat(tables, ignore_index=True)


def curves(
    data: pd.DataFrame,
    x: str,
    y: str,
    *,
    hue: str = "method",
    style: str | None = None,
    label: str | None = None,
    panel: str | None = None,
    levels: Mapping[str, float] | None = None,
    marks: Mapping[str, float] | None = None,
    published: pd.DataFrame | None = None,
    rounding: float | None = None,
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "log",
) -> Figure:
    """Draw column ``y`` of a tidy table against ``x``: medians, with their range as a band.

    There is a line for each method in the column ``hue``, in its colour (`COLORS`), and kind in
    the column ``style``, in the table's order; and a panel for each title in the column ``panel``.
    The legend names a line as ``label`` says, a format of columns, by default
    ``"{method}, {style}"``. Levels are dashed horizontal lines, marks dotted vertical ones, both
    named in the legend. Published values, a table alike, are stars with their numbers. NaN is left
    out, and values below ``rounding`` are in a strip at the foot.
    """
    titles = data[panel].unique() if panel else [""]
    size = 5, 0.4 + 2.8 * len(titles)
    figure, axes = plt.subplots(len(titles), 1, sharex=True, squeeze=False, figsize=size)
    for ax, title in zip(axes[:, 0], titles, strict=True):
        for rows, aspect in _lines(data, hue, style, label):
            shown = rows[rows[panel] == title] if panel else rows
            sns.lineplot(shown, x=x, y=y, ax=ax, **_MEDIANS, **aspect)
        if published is not None:
            stars = published[published[panel] == title] if panel else published
            _draw_stars(ax, stars[x], stars[y], stars[hue])
        for (name, level), line in zip((levels or {}).items(), cycle(LINES[1:]), strict=False):
            ax.axhline(level, label=name, **_LEVEL | {"ls": line})
        for name, position in (marks or {}).items():
            ax.axvline(position, label=name, **_MARK)
        _finish(ax, rounding, xscale, yscale, xlabel="", ylabel=ylabel, title=title)
    axes[-1, 0].set(xlabel=xlabel)
    _name(figure)
    return figure


def error_against_rank(
    data: pd.DataFrame,
    *,
    x: str = "x",
    label: str | None = None,
    thresholds: Mapping[Any, float] | None = None,
    line: str = "predicted",
    yscale: str = "linear",
    xlabel: str = "rank $R$ of each adapter",
    ylabel: str,
) -> Figure:
    """Draw medians of the columns ``predicted`` (lines) and ``measured`` (markers) against rank.

    Measured errors below 1e-9 are in a strip at the foot, predicted ones are left out. Each method
    has its colour; its threshold is a dotted vertical line. The legend names it as ``label`` says,
    a format of columns, and predictions as ``line``.
    """
    figure, ax = plt.subplots()
    for rows, aspect in _lines(data, "method", None, label):
        medians = rows.groupby(x)[[*{"measured", "predicted"} & {*rows}]].median()
        if "predicted" in medians:
            predicted = medians.predicted.where(medians.predicted >= _ROUNDING)
            ax.plot(predicted, color=aspect["color"], lw=1.5)
        # More than twenty markers would hide the line.
        apart = {"linestyle": "", "markevery": 1 + len(medians) // 20}
        ax.plot(medians.measured, **aspect | apart | {"ms": aspect["ms"] + 1})
        if thresholds:
            threshold = thresholds[rows.method.iloc[0]]
            ax.axvline(threshold, **_MARK | {"color": aspect["color"]})
    if "predicted" in data:
        ax.plot([], [], "o", color=GREY, mfc="none", label="measured")
        ax.plot([], [], "-", color=GREY, label=line)
    if thresholds:
        ax.plot([], [], ":", color=GREY, label="threshold")
    _finish(ax, _ROUNDING, "linear", yscale, xlabel=xlabel, ylabel=ylabel)
    _name(figure)
    return figure


def intervals(rows: Mapping[str, Sequence[float]], *, xlabel: str) -> Figure:
    """Draw differences (mean, low, high), a row each: the mean, and a bar between the limits."""
    figure, ax = plt.subplots(figsize=(6.4, 0.9 + 0.34 * len(rows)))
    for y, (mean, low, high) in enumerate(rows.values()):
        ax.plot([low, high], [y, y], color=DARK, lw=2)
        ax.plot(mean, y, "o", color=DARK, ms=7)
    ax.axvline(0, label="no difference", **_LEVEL | {"ls": "--"})
    ax.set(xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), [*rows])
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid(axis="y", visible=False)
    _name(figure)
    return figure


def _lines(
    data: pd.DataFrame, hue: str, style: str | None, label: str | None
) -> Iterator[tuple[pd.DataFrame, dict[str, Any]]]:
    """Yield the rows of each line and its looks; markers get smaller: those that coincide show."""
    keys = [hue, style] if style else [hue]
    methods, kinds = ([*data[key].unique()] for key in (hue, style or hue))
    groups = data.groupby(keys, sort=False)
    sizes = np.linspace(11, 4, len(groups)) if len(groups) > 2 else (9, 6)
    for ((method, *kind), rows), size in zip(groups, sizes, strict=False):
        first = {str(key): rows[key].iloc[0] for key in rows}
        name = (label or ", ".join(f"{{{key}}}" for key in keys)).format_map(first)
        aspect = look(method, methods, kinds.index(kind[0]) if kind else 0)
        yield rows, aspect | {"label": name, "ms": size, "mec": aspect["color"], "mew": 1.5}


def _draw_stars(ax: Axes, x: pd.Series, y: pd.Series, methods: pd.Series) -> None:
    for at, value, method in zip(x, y, methods, strict=True):
        color = COLORS.get(method, GREY)
        ax.plot(at, value, "*", color=color, label="published", ms=15, mec="0.1", zorder=3)
        # Numbers of stars at one x stay apart: the highest has its own above it.
        above = 5 if value == y.max() else -14
        edge = [withStroke(linewidth=3, foreground="white")]
        offset: dict[str, Any] = {"xytext": (9, above), "textcoords": "offset points"}
        ax.annotate(f"{value:g}", (at, value), fontsize="small", path_effects=edge, **offset)


def _finish(ax: Axes, rounding: float | None, xscale: str, yscale: str, **labels: str) -> None:
    """Set scales, labels and ticks, and draw what is below rounding in a strip."""
    # Only now: seaborn would take medians of logarithms.
    ax.set(xscale=xscale, yscale=yscale, **labels)
    low, high = ax.dataLim.intervaly
    if yscale == "linear" and low >= 0:
        # Markers at 0 are seen whole.
        ax.set_ylim(-0.05 * high if low < 0.05 * high else 0, None)
    if xscale == "linear" and ax.dataLim.xmin == 0:
        # Another panel may go on farther.
        ax.set_xlim(left=-0.05 * ax.dataLim.xmax, auto=True)
    if xscale == "log":
        # Labels between powers of ten run into each other.
        ax.xaxis.set_minor_formatter(NullFormatter())
    elif all(float(x).is_integer() for line in ax.lines for x in np.asarray(line.get_xdata())):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if rounding is not None:
        mark_rounding(ax, rounding)


def _name(figure: Figure) -> None:
    """Add a legend above the panels, where it hides no curve, with each name once."""
    shown: dict[str, Artist] = {}
    for line in (line for ax in figure.axes for line in ax.lines):
        if not str(line.get_label()).startswith("_"):
            shown.setdefault(str(line.get_label()), line)
    columns = 3 if max(map(len, shown)) <= _SHORT else 2
    figure.legend([*shown.values()], [*shown], loc="outside upper center", ncols=columns)
