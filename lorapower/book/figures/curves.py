"""Draw what is measured and what is predicted, as curves, points and intervals."""

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

from ._style import DARK, GREY, LINES, Look, looks, mark_rounding

Points = Mapping[str, tuple[ArrayLike, ArrayLike]]
_LEVEL: dict[str, Any] = {"color": GREY, "ls": "--", "lw": 1.5, "zorder": 0.5}
_MARK: dict[str, Any] = _LEVEL | {"ls": ":"}
# Medians that would cover one another are drawn so many points apart.
_ASIDE = 8
# Three names of so many letters are as wide as a figure.
_SHORT = 15
# A line through no more points than these would say more than they do.
_FEW = 3
# Relative errors below this are rounding.
_ROUNDING = 1e-9


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
    """Draw numbers against x: for each entry the median of its samples, with their range as a band.

    Samples are ``[len(x)]`` or ``[len(x), samples]``. Guides are grey curves ``[len(x)]``, or
    several of one kind, ``[len(x), curves]``; marks are dotted vertical lines. The legend names
    them all. NaN is left out, and values below ``rounding`` are in a strip at the foot.
    """
    figure, ax = plt.subplots()
    for label, look, size in _in_turn(samples):
        style = look.style(size) if markers else {"color": look.color, "ls": look.line, "lw": 2}
        style |= {} if joined else {"ls": ""}
        _draw_band(ax, _rows(x, samples[label]).dropna(), label, style)
    _draw_guides(ax, {label: (x, values) for label, values in (guides or {}).items()}, None)
    for label, position in (marks or {}).items():
        ax.axvline(position, label=label, **_MARK)
    _finish(ax, rounding, xscale, yscale, xlabel=xlabel, ylabel=ylabel)
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
    yscale: str = "linear",
    xlabel: str = "rank $R$ of each adapter",
    ylabel: str,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Draw predicted errors (lines) and measured errors (markers) against rank.

    Errors are ``[ranks]``, or ``[ranks, samples]``, of which medians are shown. Measured errors
    below 1e-9 are in a strip at the foot, predicted ones are left out. Each entry has its colour;
    its threshold is a dotted vertical line, levels are dashed horizontal ones. ``line`` names
    predictions in the legend; ``size`` is in inches.
    """
    figure, ax = plt.subplots(figsize=size)
    for label, look, marker in _in_turn(measured):
        if label in predicted:
            expected = _rows(ranks[label], predicted[label])["median"]
            expected = expected.where(expected >= _ROUNDING)
            ax.plot(expected, color=look.color, ls=look.line, lw=1.5)
        found = _rows(ranks[label], measured[label])["median"]
        # More than twenty markers would hide the line.
        shown = look.style(marker + 1) | {"ls": "", "markevery": 1 + len(found) // 20}
        ax.plot(found, label=label, **shown)
        if thresholds:
            ax.axvline(thresholds[label], **_MARK | {"color": look.color})
    _draw_guides(ax, None, levels)
    _finish(ax, _ROUNDING, "linear", yscale, xlabel=xlabel, ylabel=ylabel)
    kinds: dict[str, dict[str, Any]] = {}
    if predicted:
        kinds = {"measured": {"marker": "o", "mfc": "none", "ls": ""}, line: {"ls": "-"}}
    if thresholds:
        kinds["threshold"] = {"ls": ":"}
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
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "log",
    ylim: tuple[float, float] | None = None,
) -> Figure:
    """Draw medians over the rows of equal ``x`` of tables of runs, and their range as a band.

    Each entry has a panel, with a line for each table. Up to three points are not joined, and have
    bars beside one another. Without ``bands`` a bar after the last x shows the range there. Values
    below ``rounding`` are in a strip at the foot. Published values, by panel and line (or another
    name), are stars with numbers; levels are dashed horizontal lines.
    """
    size = 6.4, 1.2 + 2.4 * len(panels)
    figure, axes = plt.subplots(len(panels), 1, sharex=True, squeeze=False, figsize=size)
    labels = list(dict.fromkeys(label for tables in panels.values() for label in tables))
    look_of = looks(labels)
    for ax, (title, tables) in zip(axes[:, 0], panels.items(), strict=True):
        for i, (label, look, width) in enumerate(_in_turn(labels)):
            if label not in tables:
                continue
            rows = tables[label].groupby(x)[y].agg(["median", "min", "max"])
            is_level = len(rows) > 1 and rows["median"].nunique() == 1
            aside = _ASIDE * (i - (len(labels) - 1) / 2)
            if bands and len(rows) <= _FEW and look.marker and not is_level:
                _draw_bars(ax, rows, label, look.style(width) | {"ls": ""}, aside)
            elif bands:
                _draw_band(ax, rows, label, look.style(width))
            else:
                ax.plot(rows["median"], label=label, **look.style(width))
                _draw_bars(ax, rows[-1:], "_", look.style(5), _ASIDE * (i + 1.5))
        stars = (published or {}).get(title, {})
        for label, (at, value) in stars.items():
            color = look_of[label].color if label in look_of else GREY
            ax.plot(at, value, "*", color=color, label="published", ms=15, mec="0.1", zorder=3)
            # Numbers of stars at one x stay apart: the highest has its own above it.
            above = 5 if value == max(value for _, value in stars.values()) else -14
            edge = [withStroke(linewidth=3, foreground="white")]
            text = {"textcoords": "offset points", "fontsize": "small", "path_effects": edge}
            ax.annotate(f"{value:g}", (at, value), (9, above), **text)
        _draw_guides(ax, None, levels)
        _finish(ax, rounding, xscale, yscale, ylabel=ylabel, title=title)
        if ylim:
            ax.set_ylim(ylim)
    axes[-1, 0].set(xlabel=xlabel)
    _name(figure)
    return figure


def scatter(
    points: Points,
    *,
    guides: Points | None = None,
    levels: Mapping[str, float] | None = None,
    joined: bool = False,
    xlabel: str,
    ylabel: str,
    yscale: str = "log",
) -> Figure:
    """Draw points (x, y), x on a logarithmic axis, in one colour and marker for each entry.

    If ``joined``, lines lead from point to point, and y may be ``[len(x), samples]``, of which
    medians and ranges are shown. Guides and horizontal levels are dashed, and named in the legend.
    """
    figure, ax = plt.subplots()
    for label, look, size in _in_turn(points):
        if joined:
            _draw_band(ax, _rows(*points[label]), label, look.style(size))
        else:
            ax.plot(*points[label], label=label, **look.style(size) | {"ls": ""})
    _draw_guides(ax, guides, levels)
    _finish(ax, None, "log", yscale, xlabel=xlabel, ylabel=ylabel)
    _name(figure)
    return figure


def intervals(
    rows: Mapping[str, Sequence[float]],
    *,
    levels: Mapping[str, float] | None = None,
    xlabel: str,
    xscale: str = "linear",
) -> Figure:
    """Draw a row for each entry (mean, low, high): the mean, and a bar between the limits.

    Levels are dashed vertical lines, named in the legend.
    """
    figure, ax = plt.subplots(figsize=(6.4, 0.9 + 0.34 * len(rows)))
    for y, (mean, low, high) in enumerate(rows.values()):
        ax.plot([low, high], [y, y], color=DARK, lw=2)
        ax.plot(mean, y, "o", color=DARK, ms=7)
    for label, level in (levels or {}).items():
        ax.axvline(level, label=label, **_LEVEL)
    ax.set(xlabel=xlabel, xscale=xscale, ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), [*rows])
    if xscale == "linear":
        ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid(axis="y", visible=False)
    _name(figure)
    return figure


def _in_turn(labels: Collection[str]) -> Iterator[tuple[str, Look, float]]:
    """Yield labels, looks and sizes, each smaller than the last: markers that coincide show."""
    sizes = np.linspace(11, 4, len(labels)) if len(labels) > 2 else (9, 6)
    for (label, look), size in zip(looks(labels).items(), sizes, strict=False):
        yield label, look, float(size)


def _rows(x: ArrayLike, values: ArrayLike) -> pd.DataFrame:
    """Compute median, least and largest, by x, of ``[len(x)]`` or ``[len(x), ...]``."""
    samples: NDArray[np.float64] = np.asarray(values, dtype=float)
    samples = samples.reshape(len(samples), -1)
    columns = {"median": np.median(samples, 1), "min": samples.min(1), "max": samples.max(1)}
    return pd.DataFrame(columns, index=np.asarray(x))


def _draw_band(ax: Axes, rows: pd.DataFrame, label: str, style: Mapping[str, Any]) -> None:
    ax.plot(rows["median"], label=label, **style)
    ax.fill_between(rows.index, rows["min"], rows["max"], color=style["color"], alpha=0.15, lw=0)


def _draw_bars(
    ax: Axes, rows: pd.DataFrame, label: str, style: Mapping[str, Any], aside: float
) -> None:
    """Draw medians as markers, so many points aside from x, on bars of the range."""
    moved = ScaledTranslation(aside / 72, 0, ax.figure.dpi_scale_trans)
    shown = dict(style) | {"transform": ax.transData + moved}
    bar = shown | {"marker": "", "ls": "-", "lw": 2, "label": "_"}
    for x, low, high in zip(rows.index, rows["min"], rows["max"], strict=True):
        if low < high:
            ax.add_artist(Line2D([x, x], [low, high], **bar))
        ax.update_datalim([(x, low), (x, high)])
    ax.add_artist(Line2D(rows.index, rows["median"], label=label, **shown))
    ax.margins(x=max(ax.get_xmargin(), 0.05 + abs(aside) / 250))
    ax.autoscale_view()


def _draw_guides(ax: Axes, guides: Points | None, levels: Mapping[str, float] | None) -> None:
    for (label, points), ls in zip((guides or {}).items(), cycle(LINES[1:]), strict=False):
        ax.plot(*points, label=label, **_LEVEL | {"ls": ls})
    for label, level in (levels or {}).items():
        ax.axhline(level, label=label, **_LEVEL)


def _finish(ax: Axes, rounding: float | None, xscale: str, yscale: str, **labels: str) -> None:
    """Set scales, labels and ticks, and draw what is below rounding in a strip."""
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


def _name(figure: Figure, more: Mapping[str, Artist] | None = None) -> None:
    """Add a legend above the panels, where it hides no curve, with each name once."""
    shown: dict[str, Artist] = {}
    for line in (line for ax in figure.axes for line in ax.lines):
        if not str(line.get_label()).startswith("_"):
            shown.setdefault(str(line.get_label()), line)
    shown |= more or {}
    if shown:
        columns = 3 if max(map(len, shown)) <= _SHORT else 2
        figure.legend([*shown.values()], [*shown], loc="outside upper center", ncols=columns)
