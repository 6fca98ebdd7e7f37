"""Figures that are no curves: bars, blocks, shades, images and numbers in a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray


def ranges(groups: Mapping[str, tuple[ArrayLike, ArrayLike]], *, ylabel: str) -> Figure:
    """Lowest and highest value of each unit as a bar, a panel for each group; shaded below zero."""
    figure, axes = plt.subplots(1, len(groups), sharey=True, squeeze=False)
    ends = [(np.asarray(low), np.asarray(high)) for low, high in groups.values()]
    bottom, top = min(low.min() for low, _ in ends), max(high.max() for _, high in ends)
    for ax, title, (low, high) in zip(axes[0], groups, ends, strict=True):
        units = np.arange(1, len(low) + 1)
        ax.bar(units, high - low, bottom=low, width=0.6)
        ax.axhspan(min(bottom, 0) - 0.05 * (top - bottom), 0, color="0.85", zorder=0)
        ax.axhline(0, color="0.2", lw=1)
        ax.set(title=title, xlabel="unit", xlim=(0.2, len(low) + 0.8))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(visible=False, axis="x")
    axes[0, 0].set(ylabel=ylabel)
    return figure


def partitions(rows: Mapping[str, Sequence[tuple[int, str]]]) -> Figure:
    """Frozen layers as squares, joined to blocks (number of layers, text), one partition a row."""
    figure, ax = plt.subplots(figsize=(6.4, 0.8 + 0.55 * len(rows)))
    for y, blocks in enumerate(rows.values()):
        start = 0
        for size, text in blocks:
            ax.barh(y, size - 0.1, left=start + 0.05, height=0.62, color="0.85")
            for layer in range(start + 1, start + size):
                for side in (-1, 1):
                    ends = [y + 0.31 * side, y + 0.18 * side]
                    ax.plot([layer, layer], ends, color="white", lw=1.5)
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
    label: str,
) -> Figure:
    """A function of two inputs as shades, lines ``w·x + b = 0``, and pairs of inputs, joined.

    ``values`` takes columns ``[2, samples]``; the pairs are two such arrays.
    """
    one, other = (np.asarray(inputs) for inputs in pairs)
    half_width = 1.05 * max(np.abs(one).max(), np.abs(other).max())
    axis = np.linspace(-half_width, half_width, 201)
    grid = np.stack(np.meshgrid(axis, axis))
    figure, ax = plt.subplots(figsize=(6.4, 4.6))
    shades = np.asarray(values(grid.reshape(2, -1))).reshape(grid.shape[1:])
    mesh = ax.pcolormesh(axis, axis, shades, cmap="cividis", rasterized=True)
    figure.colorbar(mesh, label=label)
    _draw_zeros(ax, axis, grid, lines, "--")
    ax.plot(*np.stack([one, other], axis=1), color="#ff9e4a", lw=2)
    ax.plot(*np.concatenate([one, other], axis=1), "o", color="#ff9e4a", mec="black", ms=6)
    ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    ax.set(xlim=(-half_width, half_width), ylim=(-half_width, half_width))
    ax.grid(visible=False)
    return figure


def sphere(
    values: Callable[[NDArray[np.float64]], ArrayLike],
    circles: Mapping[str, Iterable[tuple[ArrayLike, float]]],
    *,
    label: str,
) -> Figure:
    """A function on the unit sphere of three dimensions as shades, seen from two sides.

    ``values`` takes columns ``[3, points]``. Planes ``w·x + b = 0`` cut circles from the sphere;
    each group has its own kind of line, named in the legend.
    """
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.9))
    axis = np.linspace(-1, 1, 241)
    across, up = np.meshgrid(axis, axis)
    inside = across**2 + up**2 < 1
    height = np.sqrt(np.where(inside, 1 - across**2 - up**2, 0))
    sides = {
        title: np.stack([sign * across, up, sign * height])
        for title, sign in {"from the front": 1, "from behind": -1}.items()
    }
    shades = {
        title: np.where(inside, np.asarray(values(x.reshape(3, -1))).reshape(inside.shape), np.nan)
        for title, x in sides.items()
    }
    top = max(np.nanmax(shade) for shade in shades.values())
    for ax, (title, x) in zip(axes, sides.items(), strict=True):
        mesh = ax.pcolormesh(
            axis, axis, shades[title], cmap="cividis", vmin=0, vmax=top, rasterized=True
        )
        # Its edge is smooth, unlike that of the shades.
        ax.add_patch(Circle((0, 0), 1, fill=False, ec="white", lw=3))
        for (name, planes), line in zip(circles.items(), ("-", ":"), strict=False):
            _draw_zeros(ax, axis, np.where(inside, x, np.nan), planes, line)
            ax.plot([], [], color="0.4", ls=line, lw=1.5, label=name)
        ax.set(title=title, aspect="equal", xticks=[], yticks=[], frame_on=False)
        ax.grid(visible=False)
    figure.colorbar(mesh, ax=axes, label=label, shrink=0.8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _draw_zeros(
    ax: Axes,
    axis: NDArray[np.float64],
    grid: NDArray[np.float64],
    planes: Iterable[tuple[ArrayLike, float]],
    line: str,
) -> None:
    """Where ``w·x + b = 0`` on a grid of points ``x``."""
    for weight, bias in planes:
        side = np.tensordot(np.asarray(weight), grid, 1) + float(bias)
        ax.contour(axis, axis, side, levels=[0], colors="white", linestyles=line, linewidths=1.5)


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


def counts(
    table: pd.DataFrame,
    *,
    most: float,
    xlabel: str,
    ylabel: str,
    label: str,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Whole numbers in a grid, each on a shade of its size; ``most`` has the darkest, 0 none.

    ``size`` is in inches.
    """
    figure, ax = plt.subplots(figsize=size or (6.4, 0.9 + 0.42 * len(table)))
    shades = {"vmin": 0, "vmax": most**0.5, "cmap": "Blues", "cbar": False}
    sns.heatmap(np.sqrt(table.astype(float)), annot=table, fmt=".0f", ax=ax, **shades)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=label)
    ax.tick_params(length=0, rotation=0)
    return figure


def pictures(rows: Mapping[str, ArrayLike]) -> Figure:
    """Images of grey values from 0 (paper) to 1 (ink), ``[images, height, width]`` in each row."""
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
