"""Figures: one function for each kind, all in one style.

The style is legible on a phone and for colour-blind readers, and opaque, so that it can stand on
a dark page. All raise `InputError` where what is to be drawn is no mapping, or an empty one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from .. import _checks
from ..errors import InputError
from . import _given

MARKERS = "osD^vPX*"
# More entries would hide the curves.
LEGEND_FITS = 4
GUIDES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))


def use_style() -> None:
    """Set matplotlib's defaults to the book's style."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=1.1)
    mpl.rcParams |= {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "figure.figsize": (6.4, 4.4),
        "grid.color": "0.9",
        "legend.edgecolor": "white",
        "legend.framealpha": 0.9,
        "lines.markersize": 6,
        "savefig.facecolor": "white",
        "svg.hashsalt": "lorapower",
    }


def spectrum(singular_values: Mapping[str, ArrayLike]) -> Figure:
    """Singular values ``σ_d`` against ``d``, one line for each entry: median and range.

    Values are ``[samples, k]``; a single sample is a plain line.
    """
    _given.check_some(singular_values=singular_values)
    figure, ax = plt.subplots()
    for (label, values), marker in zip(singular_values.items(), cycle(MARKERS), strict=False):
        sigma = np.atleast_2d(_given.numbers(label, values))
        d = np.arange(1, sigma.shape[1] + 1)
        (line,) = ax.plot(d, np.median(sigma, 0), marker=marker, label=label)
        ax.fill_between(d, sigma.min(0), sigma.max(0), color=line.get_color(), alpha=0.15, lw=0)
    ax.set(xlabel="index $d$", ylabel=r"singular value $\sigma_d$", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return figure


def error_against_rank(
    ranks: Mapping[str, ArrayLike],
    predicted: Mapping[str, ArrayLike],
    measured: Mapping[str, ArrayLike],
    *,
    thresholds: Mapping[str, float] | None = None,
    levels: Mapping[str, float] | None = None,
    xlabel: str = "rank $R$ of each adapter",
    ylabel: str,
) -> Figure:
    """Predicted error (line, where given) and measured error (open markers) against rank.

    Above on a linear axis, below on a logarithmic one. One colour for each entry; its threshold,
    where given, is a dotted vertical line. Levels are dashed horizontal ones, named in the legend.

    Raises `InputError` for what is no mapping, where there is no entry, and where an entry has
    other than as many ranks as measured errors.
    """
    _given.check_named(ranks=ranks, predicted=predicted, measured=measured)
    if not measured or not all(map(np.size, measured.values())):
        raise InputError("measured", allowed="errors at one rank or more", given="none")
    for label, errors in measured.items():
        if label not in ranks or np.shape(ranks[label]) != np.shape(errors):
            raise InputError(
                f"ranks of {label}",
                allowed=f"as many as its errors, of shape {np.shape(errors)}",
                given=f"shape {np.shape(ranks[label])}" if label in ranks else "none",
            )
    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(6.4, 6.8))
    colors = sns.color_palette("colorblind", len(measured))
    styles = zip(measured, colors, cycle(MARKERS), strict=False)
    for i, (label, color, marker) in enumerate(styles):
        # Predictions of exactly 0 have no place on a logarithmic axis: the line ends there.
        line = np.asarray(predicted.get(label, np.full(len(np.asarray(ranks[label])), np.nan)))
        # Markers that coincide stay visible inside one another.
        style = {"ls": "", "marker": marker, "markersize": max(12 - 2.2 * i, 4), "mew": 1.8}
        for ax in axes:
            ax.plot(ranks[label], np.where(line > 0, line, np.nan), color=color, lw=1.5)
            ax.plot(ranks[label], measured[label], color=color, label=label, mfc="none", **style)
            if thresholds:
                ax.axvline(thresholds[label], color=color, ls=":", lw=1.5, zorder=0)
    for ax in axes:
        for label, level in (levels or {}).items():
            ax.axhline(level, color="0.4", ls="--", lw=1.5, zorder=0, label=label)
    axes[0].set(ylabel=ylabel, ylim=(0, None))
    axes[1].set(xlabel=xlabel, ylabel=ylabel, yscale="log")
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend()
    return figure


def precision(
    x: Sequence[float],
    errors: Mapping[str, ArrayLike],
    *,
    guides: Mapping[str, ArrayLike] | None = None,
    marks: Mapping[str, float] | None = None,
    xlabel: str,
    ylabel: str = "relative rounding error",
    logx: bool = True,
) -> Figure:
    """Errors against what causes them: median and range of ``[len(x), samples]``.

    Guides are dashed lines, named in the legend; so are marks, dotted vertical ones.
    """
    _given.check_some(errors=errors)
    figure, ax = plt.subplots()
    for (label, values), marker in zip(errors.items(), cycle(MARKERS), strict=False):
        samples = _given.numbers(label, values, len(x))
        (line,) = ax.plot(x, np.median(samples, 1), marker=marker, label=label)
        low, high = samples.min(1), samples.max(1)
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.15, lw=0)
    for (label, values), style in zip((guides or {}).items(), cycle(GUIDES), strict=False):
        ax.plot(
            x, _given.numbers(label, values, len(x)), ls=style, color="0.4", lw=1.5, label=label
        )
    for label, position in (marks or {}).items():
        ax.axvline(position, color="0.4", ls=":", lw=1.5, zorder=0, label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel, yscale="log", xscale="log" if logx else "linear")
    if logx:
        # Labels between powers of ten run into each other.
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(ax.get_legend_handles_labels()[0]) > LEGEND_FITS:
        figure.legend(loc="outside upper center", ncols=2)
    else:
        ax.legend()
    return figure


def ranges(groups: Mapping[str, tuple[ArrayLike, ArrayLike]], *, ylabel: str) -> Figure:
    """Lowest and highest value of each unit as a bar, one panel for each group.

    What is below zero, where a ReLU cuts, is shaded.
    """
    _given.check_some(groups=groups)
    figure, axes = plt.subplots(1, len(groups), sharey=True, squeeze=False)
    ends = [(np.asarray(low), np.asarray(high)) for low, high in groups.values()]
    bottom, top = min(low.min() for low, _ in ends), max(high.max() for _, high in ends)
    for ax, title, (low, high) in zip(axes[0], groups, ends, strict=True):
        units = np.arange(1, len(low) + 1)
        ax.bar(units, high - low, bottom=low, width=0.6)
        ax.axhspan(min(bottom, 0) - 0.05 * (top - bottom), 0, color="0.85", zorder=0)
        ax.axhline(0, color="0.2", lw=1)
        ax.set(title=title, xlabel="unit")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(visible=False, axis="x")
    axes[0, 0].set(ylabel=ylabel)
    return figure


def error_and_bounds(
    ranks: ArrayLike,
    measured: ArrayLike,
    bounds: Mapping[str, ArrayLike],
    *,
    ylabel: str,
) -> Figure:
    """Measured errors ``[ranks, samples]`` (median and range) below their bounds (medians)."""
    _given.check_some(bounds=bounds)
    figure, ax = plt.subplots()
    errors = _given.numbers("measured", measured, np.size(ranks))
    (line,) = ax.plot(ranks, np.median(errors, 1), "o", ls="", label="measured")
    low, high = errors.min(1), errors.max(1)
    ax.fill_between(ranks, low, high, color=line.get_color(), alpha=0.15, lw=0)
    colors = sns.color_palette("colorblind", len(bounds) + 1)[1:]
    for (label, values), style, color in zip(bounds.items(), cycle(GUIDES), colors, strict=False):
        ax.plot(
            ranks,
            np.median(_given.numbers(label, values, len(errors)), 1),
            ls=style,
            lw=2,
            color=color,
            label=label,
        )
    ax.set(xlabel="rank $R$ of each adapter", ylabel=ylabel, yscale="log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return figure


def partitions(rows: Mapping[str, Sequence[tuple[int, str]]]) -> Figure:
    """Frozen layers as squares, first layer leftmost, joined to blocks; one partition a row.

    Each block is its number of layers and a text that is written into it.
    """
    _given.check_some(rows=rows)
    figure, ax = plt.subplots(figsize=(6.4, 0.9 + 0.8 * len(rows)))
    for y, blocks in enumerate(rows.values()):
        start = 0
        colors = sns.color_palette("colorblind", len(blocks))
        for (size, text), color in zip(blocks, colors, strict=True):
            ax.barh(y, size - 0.1, left=start + 0.05, height=0.62, color=color, alpha=0.35)
            for layer in range(start + 1, start + size):
                ax.plot([layer, layer], [y - 0.31, y + 0.31], color="white", lw=1.5)
            ax.text(start + size / 2, y, text, ha="center", va="center", fontsize="small")
            start += size
    ax.set(yticks=range(len(rows)), yticklabels=rows, xlabel="frozen layer $l$")
    ax.set(xticks=np.arange(start) + 0.5, xticklabels=range(1, start + 1), xlim=(0, start))
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    return figure


def plane(
    values: Callable[[NDArray[np.float64]], ArrayLike],
    lines: Iterable[tuple[ArrayLike, float]],
    pairs: tuple[ArrayLike, ArrayLike],
    *,
    half_width: float = 3.0,
    label: str,
) -> Figure:
    """A function of two inputs as shades, lines ``w·x + b = 0``, and pairs of inputs, joined.

    ``values`` takes columns ``[2, samples]``; the pairs are two such arrays.
    """
    _checks.function("values", values)
    axis = np.linspace(-half_width, half_width, 201)
    grid = np.stack(np.meshgrid(axis, axis))
    figure, ax = plt.subplots(figsize=(6.4, 5.4))
    shades = np.asarray(values(grid.reshape(2, -1))).reshape(grid.shape[1:])
    mesh = ax.pcolormesh(axis, axis, shades, cmap="cividis", rasterized=True)
    figure.colorbar(mesh, label=label)
    for weight, bias in lines:
        side = np.tensordot(np.asarray(weight), grid, 1) + float(bias)
        ax.contour(axis, axis, side, levels=[0], colors="white", linestyles="--", linewidths=1.5)
    one, other = (np.asarray(inputs) for inputs in pairs)
    ax.plot(*np.stack([one, other], axis=1), color="#ff9e4a", lw=2)
    ax.plot(*np.concatenate([one, other], axis=1), "o", color="#ff9e4a", mec="black", ms=6)
    ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    ax.set(xlim=(-half_width, half_width), ylim=(-half_width, half_width))
    ax.grid(visible=False)
    return figure


def error_against_budget(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    floor: float,
    floor_label: str,
    xlabel: str,
    ylabel: str,
) -> Figure:
    """Errors against what they cost, which is on a logarithmic axis; a floor as a dashed line."""
    _given.check_some(curves=curves)
    figure, ax = plt.subplots()
    for (label, pair), marker in zip(curves.items(), cycle(MARKERS), strict=False):
        ax.plot(*_given.points(label, pair), marker=marker, label=label)
    ax.axhline(floor, color="0.3", ls="--", lw=1.5, label=floor_label)
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log", ylim=(0, None))
    ax.legend()
    return figure


def medians(
    panels: Mapping[str, Mapping[str, pd.DataFrame]],
    x: str,
    y: str,
    *,
    published: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]] | None = None,
    levels: Mapping[str, float] | None = None,
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "log",
) -> Figure:
    """Medians over the rows of equal ``x`` of tables of runs, and their range as a band.

    One panel below the other for each entry, titled by it; a line for each table in it. Published
    values, by panel, are stars, levels dashed horizontal lines; both are named in the legend.
    """
    _given.check_some(panels=panels)
    figure, axes = plt.subplots(
        len(panels), 1, sharex=True, squeeze=False, figsize=(6.4, 1.2 + 3.4 * len(panels))
    )
    labels = list(dict.fromkeys(label for tables in panels.values() for label in tables))
    colors = dict(zip(labels, sns.color_palette("colorblind", len(labels)), strict=True))
    for ax, (title, tables) in zip(axes[:, 0], panels.items(), strict=True):
        _given.check_named(panels=tables)
        for label, table in tables.items():
            if not isinstance(table, pd.DataFrame) or not {x, y} <= {*table.columns}:
                raise InputError(label, allowed=f"a table with {x} and {y}", given=type(table))
            rows = table.groupby(x)[y].agg(["median", "min", "max"])
            i, color = labels.index(label), colors[label]
            # Lines that coincide stay visible by markers inside one another.
            style = {"marker": MARKERS[i % len(MARKERS)], "ms": max(10 - 1.5 * i, 4), "mfc": "none"}
            ax.plot(rows.index, rows["median"], color=color, label=label, mew=1.5, **style)
            ax.fill_between(rows.index, rows["min"], rows["max"], color=color, alpha=0.15, lw=0)
        for label, (at, values) in (published or {}).get(title, {}).items():
            color = colors.get(label.removesuffix(" (published)"), "0.2")
            style = {"ls": "", "marker": "*", "ms": 15, "mec": "0.1", "mew": 0.8}
            ax.plot(at, values, color=color, label=label, **style)
        for label, level in (levels or {}).items():
            ax.axhline(level, color="0.4", ls="--", lw=1.5, zorder=0, label=label)
        ax.set(title=title, ylabel=ylabel, xscale=xscale, yscale=yscale)
        if yscale == "linear":
            ax.set_ylim(0, None)
    axes[-1, 0].set(xlabel=xlabel)
    if xscale == "linear":
        axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    named: dict[str, Artist] = {}
    for ax in axes[:, 0]:
        lines, labels = ax.get_legend_handles_labels()
        named |= dict(zip(labels, lines, strict=True))
    figure.legend([*named.values()], [*named], loc="outside upper center", ncols=2)
    return figure


def scatter(
    points: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    guides: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    xlabel: str,
    ylabel: str,
) -> Figure:
    """Points on two logarithmic axes, one colour and marker for each entry; guides are dashed."""
    _given.check_some(points=points)
    figure, ax = plt.subplots()
    for (label, pair), marker in zip(points.items(), cycle(MARKERS), strict=False):
        ax.plot(*_given.points(label, pair), marker, ls="", mfc="none", mew=1.5, label=label)
    for (label, pair), style in zip((guides or {}).items(), cycle(GUIDES), strict=False):
        ax.plot(*_given.points(label, pair), ls=style, color="0.4", lw=1.5, label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
    ax.legend()
    return figure


def patterns(matrices: Mapping[str, ArrayLike], *, xlabel: str, ylabel: str, label: str) -> Figure:
    """Matrices of numbers from 0 to 1 side by side, as shades."""
    _given.check_some(matrices=matrices)
    figure, axes = plt.subplots(1, len(matrices), squeeze=False, figsize=(6.4, 3.6), sharey=True)
    for ax, (title, matrix) in zip(axes[0], matrices.items(), strict=True):
        shades = np.asarray(matrix)
        n, m = shades.shape
        image = ax.imshow(
            shades, vmin=0, vmax=1, cmap="cividis", extent=(0.5, m + 0.5, n + 0.5, 0.5)
        )
        ax.set(title=title, xlabel=xlabel)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(visible=False)
    axes[0, 0].set(ylabel=ylabel)
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    return figure


def pictures(rows: Mapping[str, ArrayLike]) -> Figure:
    """Images of grey values from 0 (paper) to 1 (ink), ``[images, height, width]`` in each row."""
    _given.check_some(rows=rows)
    images = [np.asarray(row) for row in rows.values()]
    most = max(map(len, images))
    figure, axes = plt.subplots(
        len(rows), most, squeeze=False, figsize=(6.4, 0.2 + 0.62 * len(rows))
    )
    for line, label, row in zip(axes, rows, images, strict=True):
        for ax, image in zip(line, row, strict=False):
            ax.imshow(image, vmin=0, vmax=1, cmap="Greys")
        for ax in line:
            ax.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    return figure


def transformer_segments() -> Figure:
    """One block of a transformer and what follows it, cut at its non-linearities.

    Weights are boxes in the colour of their segment, those with adapters framed twice as thick.
    """
    figure, ax = plt.subplots(figsize=(6.4, 6.6))
    query_key, value_output, after = sns.color_palette("colorblind", 3)
    weights = [
        (1.4, 1.6, "$W_Q,\\ W_K$", query_key, True),
        (4.6, 1.6, "$W_V$", value_output, True),
        (4.6, 3.8, "$W_O$", value_output, True),
        (4.6, 5.0, "$W_1,\\ b_1$", value_output, False),
        (4.6, 7.4, "$W_2,\\ b_2$", after, True),
        (4.6, 8.6, r"$W_{\rm out}$", after, True),
    ]
    steps = [(1.4, 2.8, "softmax"), (4.6, 6.2, "ReLU")]
    for x, y, text, color, adapted in weights:
        box = {"boxstyle": "round,pad=0.45", "fc": (*color, 0.25), "ec": color}
        ax.text(x, y, text, ha="center", va="center", bbox=box | {"lw": 3 if adapted else 1})
    for x, y, text in steps:
        box = {"boxstyle": "round4,pad=0.45", "fc": "white", "ec": "0.2"}
        ax.text(x, y, text, ha="center", va="center", bbox=box)
        ax.plot([x - 1.6, x], [y, y], color="0.2", ls="--", lw=1.5, zorder=0)
    ax.text(4.6, 2.8, r"$\times$", ha="center", va="center", fontsize="x-large")
    ax.text(3.0, 0.3, "tokens", ha="center", va="center")
    ax.text(4.6, 9.8, "output", ha="center", va="center")
    arrow = {"arrowstyle": "->", "color": "0.3", "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
    paths = [((2.7, 0.55), (1.4, 1.1)), ((3.3, 0.55), (4.6, 1.1)), ((1.4, 2.1), (1.4, 2.35))]
    paths += [((2.3, 2.8), (4.3, 2.8))]
    levels = [
        (2.1, 2.55),
        (3.05, 3.3),
        (4.3, 4.5),
        (5.5, 5.75),
        (6.65, 6.9),
        (7.9, 8.1),
        (9.1, 9.6),
    ]
    paths += [((4.6, low), (4.6, high)) for low, high in levels]
    for start, end in paths:
        ax.annotate("", xy=end, xytext=start, arrowprops=arrow)
    ax.text(5.3, 3.8, "summed over heads", ha="left", va="center", fontsize="small", color="0.3")
    ax.set(xlim=(-0.4, 7.6), ylim=(0, 10.1))
    ax.axis("off")
    return figure
