"""Figures: one function for each kind, all in one style.

The style is legible on a phone and for colour-blind readers, and opaque, so that it can stand on
a dark page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

MARKERS = "osD^vPX*"


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
    figure, ax = plt.subplots()
    for (label, values), marker in zip(singular_values.items(), MARKERS, strict=False):
        sigma = np.atleast_2d(np.asarray(values))
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
    """
    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(6.4, 6.8))
    colors = sns.color_palette("colorblind", len(measured))
    for i, (label, color) in enumerate(zip(measured, colors, strict=True)):
        # Predictions of exactly 0 have no place on a logarithmic axis: the line ends there.
        line = np.asarray(predicted.get(label, np.full(len(np.asarray(ranks[label])), np.nan)))
        # Markers that coincide stay visible inside one another.
        style = {"ls": "", "marker": MARKERS[i], "markersize": max(12 - 2.2 * i, 4), "mew": 1.8}
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
    xlabel: str,
    ylabel: str = "relative rounding error",
    logx: bool = True,
) -> Figure:
    """Rounding errors against what causes them: median and range of ``[len(x), samples]``.

    Guides are dashed lines, named in the legend.
    """
    figure, ax = plt.subplots()
    for (label, values), marker in zip(errors.items(), MARKERS, strict=False):
        samples = np.asarray(values)
        (line,) = ax.plot(x, np.median(samples, 1), marker=marker, label=label)
        low, high = samples.min(1), samples.max(1)
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.15, lw=0)
    for (label, values), style in zip((guides or {}).items(), ("--", ":"), strict=False):
        ax.plot(x, np.asarray(values), style, color="0.4", lw=1.5, label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel, yscale="log", xscale="log" if logx else "linear")
    if not logx:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return figure


def scatter(
    points: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    guides: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    xlabel: str,
    ylabel: str,
) -> Figure:
    """Points on two logarithmic axes, one colour and marker for each entry; guides are dashed."""
    figure, ax = plt.subplots()
    for (label, (x, y)), marker in zip(points.items(), MARKERS, strict=False):
        ax.plot(np.asarray(x), np.asarray(y), marker, ls="", mfc="none", mew=1.5, label=label)
    for (label, (x, y)), style in zip((guides or {}).items(), ("--", ":"), strict=False):
        ax.plot(np.asarray(x), np.asarray(y), style, color="0.4", lw=1.5, label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
    ax.legend()
    return figure


def patterns(matrices: Mapping[str, ArrayLike], *, xlabel: str, ylabel: str, label: str) -> Figure:
    """Matrices of numbers from 0 to 1 side by side, as shades."""
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
