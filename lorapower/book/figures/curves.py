"""Curves: what is measured, what is predicted, and what either depends on.

Medians are numpy's: of an even number of samples, the mean of the two in the middle.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from ...errors import InputError
from .._given import check_named, check_some, numbers
from .._given import points as coordinates
from .rounding import strip
from .style import GREY, LINES, Look, looks

_LEVEL: dict[str, Any] = {"color": GREY, "ls": "--", "lw": 1.5, "zorder": 0.5}
_MARK: dict[str, Any] = {"color": GREY, "ls": ":", "lw": 1.5, "zorder": 0.5}
# On logarithmic axes neighbours stand so far apart, where they would cover one another.
_ASIDE = 1.07
# Three names of so many letters are as wide as a figure.
_SHORT = 18


def spectrum(singular_values: Mapping[str, ArrayLike]) -> Figure:
    """Singular values ``σ_d`` against ``d``, one line for each entry: median and range.

    Values are ``[samples, k]``; a single sample is a plain line.
    """
    check_some(singular_values=singular_values)
    figure, ax = plt.subplots()
    for label, look, size in _in_turn(singular_values):
        sigma = np.atleast_2d(numbers(label, singular_values[label])).T
        _band(ax, np.arange(1, len(sigma) + 1), _middle_and_ends(sigma), label, look, size)
    ax.set(xlabel="index $d$", ylabel=r"singular value $\sigma_d$", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure)
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
) -> Figure:
    """Predicted error (line, where given) and measured error (marker) against rank.

    Errors are ``[ranks]``, or ``[ranks, samples]``, of which medians are shown. Those below
    ``rounding`` are in a strip of their own, in which no line is predicted. Each entry has its
    colour; its threshold, where given, is a dotted vertical line; ``line`` is what the legend
    calls the predictions. Levels are dashed horizontal lines, named in the legend.

    Raises `InputError` for what is no mapping, where there is no entry, and where an entry has
    other than as many ranks as measured errors.
    """
    check_named(ranks=ranks, predicted=predicted, measured=measured)
    if not measured or not all(map(np.size, measured.values())):
        raise InputError("measured", allowed="errors at one rank or more", given="none")
    for label, errors in measured.items():
        shape = np.shape(errors)[:1]
        if label not in ranks or np.shape(ranks[label]) != shape:
            raise InputError(
                f"ranks of {label}",
                allowed=f"as many as its errors, of shape {shape}",
                given=f"shape {np.shape(ranks[label])}" if label in ranks else "none",
            )
    figure, ax = plt.subplots()
    for label, look, size in _in_turn(measured):
        if label in predicted:
            expected = _median(predicted[label])
            expected = np.where(expected >= rounding, expected, np.nan)
            ax.plot(ranks[label], expected, color=look.color, ls=look.line, lw=1.5)
        shown = look.style(size + 1) | {"ls": ""}
        ax.plot(ranks[label], _median(measured[label]), label=label, **shown)
        if thresholds:
            ax.axvline(thresholds[label], **_MARK | {"color": look.color})
    for label, level in (levels or {}).items():
        ax.axhline(level, label=label, **_LEVEL)
    _label(ax, xlabel, ylabel, yscale=yscale, rounding=rounding)
    kinds: dict[str, dict[str, Any]] = {"measured": {"marker": "o", "mfc": "none", "ls": ""}}
    kinds |= {line: {"ls": "-"}} if predicted else {}
    kinds |= {"threshold": {"ls": ":"}} if thresholds else {}
    _legend(figure, {name: Line2D([], [], color=GREY, **kind) for name, kind in kinds.items()})
    return figure


def curves(
    x: Sequence[float],
    samples: Mapping[str, ArrayLike],
    *,
    guides: Mapping[str, ArrayLike] | None = None,
    marks: Mapping[str, float] | None = None,
    rounding: float | None = None,
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
) -> Figure:
    """Numbers ``[len(x), samples]``, on a logarithmic axis, against x: median and range.

    Guides are grey lines, named in the legend; so are marks, dotted vertical ones. What is below
    ``rounding`` is in a strip of its own.
    """
    check_some(samples=samples)
    figure, ax = plt.subplots()
    for label, look, size in _in_turn(samples):
        found = numbers(label, samples[label], len(x))
        _band(ax, x, _middle_and_ends(found), label, look, size)
    for (label, values), ls in zip((guides or {}).items(), cycle(LINES[1:]), strict=False):
        ax.plot(x, numbers(label, values, len(x)), label=label, **_LEVEL | {"ls": ls})
    for label, position in (marks or {}).items():
        ax.axvline(position, label=label, **_MARK)
    _label(ax, xlabel, ylabel, xscale=xscale, yscale="log", rounding=rounding)
    _legend(figure)
    return figure


def lines(
    x: ArrayLike,
    values: Mapping[str, ArrayLike],
    *,
    marks: Mapping[str, float] | None = None,
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
) -> Figure:
    """Functions of x as lines without markers; marks are dotted vertical lines, named."""
    check_some(values=values)
    figure, ax = plt.subplots()
    places = numbers("x", x)
    for label, look, _ in _in_turn(values):
        y = numbers(label, values[label], len(places))
        ax.plot(places, y, label=label, color=look.color, ls=look.line, lw=2)
    for label, position in (marks or {}).items():
        ax.axvline(position, label=label, **_MARK)
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale)
    _legend(figure)
    return figure


def error_against_budget(
    budgets: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    floor: float,
    floor_label: str,
    xlabel: str,
    ylabel: str,
) -> Figure:
    """Errors against what they cost, which is on a logarithmic axis; a floor as a dashed line."""
    check_some(budgets=budgets)
    figure, ax = plt.subplots()
    for label, look, size in _in_turn(budgets):
        x, y = coordinates(label, budgets[label])
        ax.plot(x, _median(y), label=label, **look.style(size))
    ax.axhline(floor, label=floor_label, **_LEVEL)
    _label(ax, xlabel, ylabel, xscale="log")
    _legend(figure)
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
) -> Figure:
    """Medians over the rows of equal ``x`` of tables of runs, and their range as a band.

    One panel below the other for each entry, titled by it; a line for each table in it. Without
    ``bands`` the range is shown at the last x alone, by a bar beside it. What is below
    ``rounding`` is in a strip of its own.

    Published values, by panel and line, or else of no line, are stars with their numbers. Levels
    are dashed horizontal lines. Both are named in the legend.
    """
    check_some(panels=panels)
    for tables in panels.values():
        check_named(panels=tables)
    figure, axes = plt.subplots(
        len(panels), 1, sharex=True, squeeze=False, figsize=(6.4, 1.2 + 2.4 * len(panels))
    )
    labels = list(dict.fromkeys(label for tables in panels.values() for label in tables))
    look_of = looks(labels)
    for ax, (title, tables) in zip(axes[:, 0], panels.items(), strict=True):
        for label, look, size in _in_turn(labels):
            if label not in tables:
                continue
            table = tables[label]
            if not isinstance(table, pd.DataFrame) or not {x, y} <= {*table.columns}:
                raise InputError(label, allowed=f"a table with {x} and {y}", given=type(table))
            rows = table.groupby(x)[y].agg(["median", "min", "max"])
            if bands:
                _band(ax, rows.index, [*rows.T.to_numpy()], label, look, size)
            else:
                ax.plot(rows.index, rows["median"], label=label, **look.style(size))
                aside = rows.index[-1] * _ASIDE ** (1 + labels.index(label))
                ax.vlines(aside, *rows.iloc[-1][["min", "max"]], color=look.color, lw=2)
        stars = (published or {}).get(title, {})
        for label, (at, value) in stars.items():
            color = look_of[label].color if label in look_of else GREY
            # Numbers of stars at one x stay apart: the highest has its own above it.
            above = value == max(value for _, value in stars.values())
            _star(ax, at, value, color, 5 if above else -14)
        for label, level in (levels or {}).items():
            ax.axhline(level, label=label, **_LEVEL)
        _label(ax, "", ylabel, xscale=xscale, yscale=yscale, rounding=rounding)
        ax.set_title(title)
    axes[-1, 0].set(xlabel=xlabel)
    _legend(figure)
    return figure


def intervals(
    rows: Mapping[str, Sequence[float]],
    *,
    levels: Mapping[str, float] | None = None,
    xlabel: str,
) -> Figure:
    """A row for each entry, from above: a mean, and a bar from the lower to the upper limit.

    Entries are (mean, low, high). Levels are dashed vertical lines, named in the legend.
    """
    check_some(rows=rows)
    figure, ax = plt.subplots(figsize=(6.4, 0.9 + 0.34 * len(rows)))
    for y, (label, look) in enumerate(looks(rows).items()):
        mean, low, high = numbers(label, rows[label], 3)
        ax.plot([low, high], [y, y], color=look.color, lw=2)
        ax.plot(mean, y, **look.style() | {"ls": ""})
    for label, level in (levels or {}).items():
        ax.axvline(level, label=label, **_LEVEL)
    ax.set(xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), [*rows])
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid(axis="y", visible=False)
    if levels:
        _legend(figure)
    return figure


def scatter(
    points: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    guides: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    xlabel: str,
    ylabel: str,
) -> Figure:
    """Points on two logarithmic axes, one colour and marker for each entry; guides are dashed."""
    check_some(points=points)
    figure, ax = plt.subplots()
    for label, look, size in _in_turn(points):
        ax.plot(*coordinates(label, points[label]), label=label, **look.style(size) | {"ls": ""})
    for (label, pair), ls in zip((guides or {}).items(), cycle(LINES[1:]), strict=False):
        ax.plot(*coordinates(label, pair), label=label, **_LEVEL | {"ls": ls})
    _label(ax, xlabel, ylabel, xscale="log", yscale="log")
    _legend(figure)
    return figure


def _in_turn(labels: Collection[str]) -> Iterable[tuple[str, Look, float]]:
    """Labels and looks; markers that coincide stay visible, as each is smaller than the last."""
    for i, (label, look) in enumerate(looks(labels).items()):
        yield label, look, max(9 - 1.2 * i, 4)


def _median(values: ArrayLike) -> NDArray[np.float64]:
    """Over all axes but the first."""
    found = np.asarray(values, dtype=float)
    return np.median(found.reshape(len(found), -1), 1)


def _middle_and_ends(values: ArrayLike) -> Sequence[NDArray[np.float64]]:
    """Median, lowest and highest of ``[len(x), samples]``."""
    found = np.asarray(values, dtype=float)
    return _median(found), found.min(1), found.max(1)


def _band(
    ax: Axes,
    x: ArrayLike,
    samples: Sequence[NDArray[np.float64]],
    label: str,
    look: Look,
    size: float,
) -> None:
    """A line of medians, and a band about it from the lowest to the highest."""
    middle, low, high = samples
    ax.plot(x, middle, label=label, **look.style(size))
    ax.fill_between(x, low, high, color=look.color, alpha=0.15, lw=0)


def _star(ax: Axes, at: float, value: float, color: Any, aside: float) -> None:
    """A published value, with its number aside by so many points upwards."""
    ax.plot(at, value, "*", color=color, label="published", ms=15, mec="0.1", mew=0.8, zorder=3)
    ax.annotate(f"{value:g}", (at, value), (9, aside), textcoords="offset points", fontsize="small")


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
    if yscale == "linear":
        ax.set_ylim(0, None)
    if xscale == "linear":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        # Labels between powers of ten run into each other.
        ax.xaxis.set_minor_formatter(NullFormatter())
    if rounding is not None:
        strip(ax, rounding)


def _legend(figure: Figure, more: Mapping[str, Artist] | None = None) -> None:
    """Each name once, above the panels, where it hides no curve."""
    named: dict[str, Artist] = {}
    for ax in figure.axes:
        lines, labels = ax.get_legend_handles_labels()
        named = dict(zip(labels, lines, strict=True)) | named
    named |= more or {}
    columns = 3 if max(map(len, named)) <= _SHORT else 2
    figure.legend([*named.values()], [*named], loc="outside upper center", ncols=columns)
