"""Curves: what is measured and what is predicted; medians are `book.median`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation
from numpy.typing import ArrayLike, NDArray

from ._names import write_names
from ._style import GREY, LINES, Look, looks, squeeze_rounding

_LEVEL: dict[str, Any] = {"color": GREY, "ls": "--", "lw": 1.5, "zorder": 0.5}
_DARK = "0.15"
_MARK: dict[str, Any] = {"color": GREY, "ls": ":", "lw": 1.5, "zorder": 0.5}
# Neighbours stand so many points apart where they would cover one another.
_ASIDE = 8
# A panel's width in points, about, and how much of it is left free at either end.
_WIDTH = 400
_MARGIN = 0.05
# Three names of so many letters are as wide as a figure.
_SHORT = 15
# So many points are not joined by a line, which would say more than they do.
_FEW = 3
# Of more points than these some are without markers, which would hide the line.
_MARKED = 20


def curves(
    x: Sequence[float],
    samples: Mapping[str, ArrayLike],
    *,
    guides: Mapping[str, ArrayLike] | None = None,
    marks: Mapping[str, float] | None = None,
    rounding: float | None = None,
    markers: bool = True,
    joined: bool = True,
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "log",
) -> Figure:
    """Numbers against x, one line for each entry: the median of its samples, their range as a band.

    Samples are ``[len(x)]`` or ``[len(x), samples]``. Guides are grey curves ``[len(x)]``, or
    several alike ``[len(x), curves]``; marks are dotted vertical lines. All are named. NaN is left
    out, and values below ``rounding`` are in a strip. Without ``markers``, lines are functions; not
    ``joined``, markers stand alone.
    """
    figure, ax = plt.subplots()
    for label, look, size in _in_turn(samples):
        style = look.style(size) if markers else {"color": look.color, "ls": look.line, "lw": 2}
        style |= {} if joined else {"ls": ""}
        _draw_band(ax, _rows(x, samples[label]).dropna(), label, style)
    _draw_guides(ax, {label: (x, values) for label, values in (guides or {}).items()})
    for label, position in (marks or {}).items():
        ax.axvline(position, label=label, **_MARK)
    _label(ax, xlabel, ylabel, xscale=xscale, yscale=yscale, rounding=rounding)
    _name(figure)
    return figure


def error_against_rank(
    ranks: Mapping[str, ArrayLike],
    predicted: Mapping[str, ArrayLike],
    measured: Mapping[str, ArrayLike],
    *,
    thresholds: Mapping[str, float] | None = None,
    levels: Mapping[str, float] | None = None,
    line: str = "predicted",
    rounding: float = 1e-9,
    yscale: str = "linear",
    xlabel: str = "rank $R$ of each adapter",
    ylabel: str,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Predicted error (line) and measured error (marker) against rank.

    Errors are ``[ranks]``, or ``[ranks, samples]``, of which medians are shown; below ``rounding``
    they are in a strip, without predictions. Each entry has its colour; its threshold is a dotted
    vertical line. Levels are dashed horizontal lines. ``line`` names predictions in the legend.
    ``size`` is in inches.
    """
    figure, ax = plt.subplots(figsize=size)
    for label, look, marker in _in_turn(measured):
        if label in predicted:
            expected = _rows(ranks[label], predicted[label])["median"]
            expected = expected.where(expected >= rounding)
            ax.plot(expected, color=look.color, ls=look.line, lw=1.5)
        shown = look.style(marker + 1) | {"ls": ""}
        medians = _rows(ranks[label], measured[label])["median"]
        ax.plot(medians, label=label, markevery=1 + len(medians) // _MARKED, **shown)
        if thresholds:
            ax.axvline(thresholds[label], **_MARK | {"color": look.color})
    _draw_levels(ax, levels)
    _label(ax, xlabel, ylabel, yscale=yscale, rounding=rounding)
    kinds: dict[str, dict[str, Any]] = {}
    if predicted:
        kinds = {"measured": {"marker": "o", "mfc": "none", "ls": ""}, line: {"ls": "-"}}
    kinds |= {"threshold": {"ls": ":"}} if thresholds else {}
    _name(figure, {name: Line2D([], [], color=GREY, **kind) for name, kind in kinds.items()})
    return figure


def medians(
    panels: Mapping[str, Mapping[str, pd.DataFrame]],
    x: str,
    y: str,
    *,
    published: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    levels: Mapping[str, float] | None = None,
    rounding: float | None = None,
    bands: bool = True,
    markers: bool = True,
    sharey: bool = False,
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "log",
    ylim: tuple[float, float] | None = None,
) -> Figure:
    """Medians over the rows of equal ``x`` of tables of runs, and their range as a band.

    Each entry has a panel, with a line for each table; up to three points are not joined, and have
    bars beside one another. Without ``bands`` a bar behind the last x shows the range there;
    without ``markers``, lines are functions. Values below ``rounding`` are in a strip of their own.
    Published values, by panel and line (or another name), are stars with numbers; levels are dashed
    horizontal lines.
    """
    figure, axes = plt.subplots(
        len(panels),
        1,
        sharex=True,
        sharey=sharey,
        squeeze=False,
        figsize=(6.4, 1.2 + 2.4 * len(panels)),
    )
    labels = list(dict.fromkeys(label for tables in panels.values() for label in tables))
    look_of = looks(labels)
    for ax, (title, tables) in zip(axes[:, 0], panels.items(), strict=True):
        for i, (label, look, size) in enumerate(_in_turn(labels)):
            if label not in tables:
                continue
            rows = tables[label].groupby(x)[y].agg(["median", "min", "max"])
            aside = _ASIDE * (i - (len(labels) - 1) / 2)
            if not markers:
                _draw_band(ax, rows, label, {"color": look.color, "ls": look.line, "lw": 2})
            elif bands and len(rows) <= _FEW and look.marker and not _is_level(rows):
                _draw_bars(ax, rows, label, look.style(size) | {"ls": ""}, aside)
            elif bands:
                _draw_band(ax, rows, label, look.style(size))
            else:
                ax.plot(rows["median"], label=label, **look.style(size))
                _draw_bars(ax, rows[-1:], "_", look.style(5), _ASIDE * (i + 1.5))
        stars = (published or {}).get(title, {})
        for label, (at, value) in stars.items():
            color = look_of[label].color if label in look_of else GREY
            # Numbers of stars at one x stay apart: the highest has its own above it.
            above = value == max(value for _, value in stars.values())
            _draw_star(ax, at, value, color, 5 if above else -14)
        _draw_levels(ax, levels)
        _label(ax, "", ylabel, xscale=xscale, yscale=yscale, rounding=rounding)
        ax.set_title(title)
        if ylim:
            ax.set_ylim(ylim)
    axes[-1, 0].set(xlabel=xlabel)
    _name(figure)
    return figure


def scatter(
    points: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    guides: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    levels: Mapping[str, float] | None = None,
    joined: bool = False,
    xlabel: str,
    ylabel: str,
    yscale: str = "log",
) -> Figure:
    """Points (x, y), x on a logarithmic axis, one colour and marker for each entry.

    If ``joined``, lines lead from point to point, and y may be ``[len(x), samples]``, of which
    medians and ranges are shown. Guides and horizontal levels are dashed, and named in the legend.
    """
    figure, ax = plt.subplots()
    for label, look, size in _in_turn(points):
        if joined:
            _draw_band(ax, _rows(*points[label]), label, look.style(size))
        else:
            ax.plot(*points[label], label=label, **look.style(size) | {"ls": ""})
    _draw_guides(ax, guides or {})
    _draw_levels(ax, levels)
    _label(ax, xlabel, ylabel, xscale="log", yscale=yscale)
    _name(figure)
    return figure


def intervals(
    rows: Mapping[str, Sequence[float]],
    *,
    levels: Mapping[str, float] | None = None,
    xlabel: str,
    xscale: str = "linear",
) -> Figure:
    """A row for each entry (mean, low, high): the mean, and a bar between the limits.

    Levels are dashed vertical lines, named in the legend.
    """
    figure, ax = plt.subplots(figsize=(6.4, 0.9 + 0.34 * len(rows)))
    for y, (mean, low, high) in enumerate(rows.values()):
        ax.plot([low, high], [y, y], color=_DARK, lw=2)
        ax.plot(mean, y, "o", color=_DARK, ms=7)
    for label, level in (levels or {}).items():
        ax.axvline(level, label=label, **_LEVEL)
    ax.set(xlabel=xlabel, xscale=xscale, ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), [*rows])
    if xscale == "linear":
        ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid(axis="y", visible=False)
    if levels:
        _name(figure)
    return figure


def _in_turn(labels: Collection[str]) -> Iterator[tuple[str, Look, float]]:
    """Labels, looks and sizes, each smaller than the last: markers that coincide stay visible."""
    sizes = np.linspace(11, 4, len(labels)) if len(labels) > 2 else (9, 6)
    for (label, look), size in zip(looks(labels).items(), sizes, strict=False):
        yield label, look, float(size)


def _rows(x: ArrayLike, values: ArrayLike) -> pd.DataFrame:
    """Median, least and largest, by x, of ``[len(x)]`` or ``[len(x), ...]``."""
    samples: NDArray[np.float64] = np.asarray(values, dtype=float)
    samples = samples.reshape(len(samples), -1)
    columns = {"median": np.median(samples, 1), "min": samples.min(1), "max": samples.max(1)}
    return pd.DataFrame(columns, index=np.asarray(x))


def _draw_band(ax: Axes, rows: pd.DataFrame, label: str, style: Mapping[str, Any]) -> None:
    ax.plot(rows["median"], label=label, **style)
    ax.fill_between(rows.index, rows["min"], rows["max"], color=style["color"], alpha=0.15, lw=0)


def _is_level(rows: pd.DataFrame) -> bool:
    """Whether medians are one number at several x, and are to be a level line."""
    return len(rows) > 1 and rows["median"].nunique() == 1


def _draw_bars(
    ax: Axes, rows: pd.DataFrame, label: str, style: Mapping[str, Any], aside: float
) -> None:
    """Medians as markers, so many points aside from x, on bars of the range."""
    moved = ScaledTranslation(aside / 72, 0, ax.figure.dpi_scale_trans)
    shown = dict(style) | {"transform": ax.transData + moved}
    bar = shown | {"marker": "", "ls": "-", "lw": 2, "label": "_"}
    for x, low, high in zip(rows.index, rows["min"], rows["max"], strict=True):
        if low < high:
            ax.add_artist(Line2D([x, x], [low, high], **bar))
        ax.update_datalim([(x, low), (x, high)])
    ax.add_artist(Line2D(rows.index, rows["median"], label=label, **shown))
    ax.margins(x=max(ax.get_xmargin(), _MARGIN + 1.5 * abs(aside) / _WIDTH))
    ax.autoscale_view()


def _draw_guides(ax: Axes, guides: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> None:
    for (label, points), ls in zip(guides.items(), cycle(LINES[1:]), strict=False):
        ax.plot(*points, label=label, **_LEVEL | {"ls": ls})


def _draw_levels(ax: Axes, levels: Mapping[str, float] | None) -> None:
    for label, level in (levels or {}).items():
        ax.axhline(level, label=label, **_LEVEL)


def _draw_star(ax: Axes, at: float, value: float, color: Any, aside: float) -> None:
    """A published value, with its number aside by so many points upwards."""
    ax.plot(at, value, "*", color=color, label="published", ms=15, mec="0.1", mew=0.8, zorder=3)
    number = ax.annotate(
        f"{value:g}", (at, value), (9, aside), textcoords="offset points", fontsize="small"
    )
    number.set_path_effects([withStroke(linewidth=3, foreground="white")])


def _label(
    ax: Axes,
    xlabel: str,
    ylabel: str,
    *,
    xscale: str = "linear",
    yscale: str = "linear",
    rounding: float | None = None,
) -> None:
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale)
    low, high = ax.dataLim.intervaly
    if yscale == "linear" and low >= 0:
        # Markers at 0 are seen whole.
        ax.set_ylim(-_MARGIN * high if low < _MARGIN * high else 0, None)
    if xscale == "linear" and ax.dataLim.xmin == 0:
        # Bars behind the last x ask for room there only, and further panels may go on farther.
        ax.set_xlim(left=-_MARGIN * ax.dataLim.xmax, auto=True)
    if xscale == "log":
        # Labels between powers of ten run into each other.
        ax.xaxis.set_minor_formatter(NullFormatter())
    elif all(float(x).is_integer() for line in ax.lines for x in np.asarray(line.get_xdata())):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if rounding is not None:
        squeeze_rounding(ax, rounding)


def _name(figure: Figure, more: Mapping[str, Artist] | None = None) -> None:
    """Each name once: beside its line, or else above the panels, where it hides no curve."""
    shown: dict[str, Artist] = {**write_names(figure), **(more or {})}
    if shown:
        columns = 3 if max(map(len, shown)) <= _SHORT else 2
        figure.legend([*shown.values()], [*shown], loc="outside upper center", ncols=columns)
