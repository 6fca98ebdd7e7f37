"""Set how figures look: each method has a colour and a marker, the same in the whole book."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.typing import ColorType

from .. import _run

GREY = "0.4"
DARK = "0.15"
_BLUE, _YELLOW, _GREEN, _ORANGE, _PINK, _BROWN, *_, _SKY = sns.color_palette("colorblind")

# What is computed and not measured has no marker.
_LOOKS: dict[str, tuple[ColorType, str]] = {
    "construction": (_BLUE, "o"),
    "fitted": (_GREEN, "D"),
    "trained": (_ORANGE, "s"),
    "final layers": (_PINK, "^"),
    "all weights": (_YELLOW, "v"),
    "random": (_BROWN, "P"),
    "pretrained": (_SKY, "X"),
    "by effect": (_BLUE, "o"),
    "by norm": (GREY, "s"),
    "same rank": (GREY, "s"),
    "target": (DARK, ""),
    "frozen": (GREY, ""),
    "bound": (DARK, ""),
    "predicted": (GREY, ""),
    "floor": (GREY, ""),
}
#: Colour of each method, by its name in the column of methods.
COLORS = {method: color for method, (color, _) in _LOOKS.items()}
# Depths are shades up to this one.
_DEEPEST = 16
# Methods of one chapter alone take these colours, which have no meaning elsewhere.
_FREE = ("#882255", "#999933", "#661100", "#AA4499", "#6699CC", "#117733", "#DDCC77", "#CC6677")
_SHAPES = "osD^vPX"
LINES = ("-", "--", ":", "-.")


def use_style() -> None:
    """Set matplotlib's defaults to the book's style."""
    own = {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "figure.hooks": [f"{__name__}:name_parameters"],
        "figure.figsize": (5.0, 3.2),  # so that phones show ticks of 11 pixels
        "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
        "grid.color": "0.9",
        "legend.edgecolor": "white",
        "legend.framealpha": 0.9,
        "savefig.facecolor": "white",
        "svg.hashsalt": "lorapower",
    }
    sns.set_theme(style="ticks", palette="colorblind", font_scale=1.1, rc=own)


def name_parameters(figure: Figure) -> None:
    """Write below a figure with which parameters it was drawn, where these are not the book's."""
    if _run.changed:
        text = _run.say(_run.changed)
        figure.text(0.99, 0, text, ha="right", va="top", color=GREY, fontsize="x-small")


def look(method: Any, methods: Sequence[Any], kind: int) -> dict[str, Any]:
    """Choose colour and marker of one of the methods, and its kind of line; depths are integers."""
    free = [other for other in methods if isinstance(other, str) and other not in COLORS]
    if method in COLORS:
        color, marker = _LOOKS[method]
    elif method in free:
        place = free.index(method)
        color, marker = _FREE[place % len(_FREE)], _SHAPES[place % len(_SHAPES)]
    else:
        shade = 0.8 * min(math.log(max(method, 1)) / math.log(_DEEPEST), 1)
        color, marker = mpl.colormaps["viridis"](shade), _SHAPES[(method - 1) % len(_SHAPES)]
    kind = 2 if method == "predicted" else kind
    lines = {"linestyle": LINES[kind % len(LINES)], "fillstyle": "full" if kind % 2 else "none"}
    return {"color": color, "marker": marker} | lines


def mark_rounding(ax: Axes, level: float) -> None:
    """Draw all that lies below ``level`` at one height, in a shaded strip at the axis' foot."""
    lines = [line for line in ax.lines if _follows_data(ax, line)]
    # Arrays of the paths themselves, which are changed in place.
    bands = [np.asarray(path.vertices) for band in ax.collections for path in band.get_paths()]
    heights = [np.asarray(line.get_ydata(), dtype=float) for line in lines]
    drawn = np.concatenate([*heights, *(points[:, 1] for points in bands), []])
    above, below = drawn[drawn >= level], drawn[drawn < level]
    if not (above.size and below.size):
        return
    low, high = above.min(), above.max()
    if ax.get_yscale() == "log":
        edge = low / 1.5
        foot, top = edge / max(high / edge, 3) ** 0.18, high * max(high / edge, 3) ** 0.06
        middle = math.sqrt(foot * edge)
    else:
        edge, foot, top = 0.0, -0.15 * high, 1.05 * high
        middle = foot / 2
    for line, y in zip(lines, heights, strict=True):
        line.set_ydata(np.where(y < level, middle, y))
    for points in bands:
        points[:, 1] = np.where(points[:, 1] < level, middle, points[:, 1])
    ax.set_ylim(foot, top)
    ticks = [tick for tick in ax.get_yticks() if edge <= tick <= top]
    if ax.get_yscale() == "log" and len(ticks) < 2:
        ticks = [t for t in LogLocator(subs=(1, 2, 5)).tick_values(edge, top) if edge <= t <= top]
        ax.yaxis.set_major_formatter("{x:g}")
    ax.set_yticks(ticks)
    ax.yaxis.set_minor_locator(NullLocator())
    ax.axhspan(foot, edge, color="0.88", lw=0, zorder=0)
    left = ax.get_yaxis_transform()
    ax.text(0.01, middle, "rounding", color="0.3", fontsize="small", va="center", transform=left)


def _follows_data(ax: Axes, line: Any) -> bool:
    """Say whether a line's heights are data, unlike those of a vertical line across the axes."""
    return bool(line.get_transform().contains_branch_seperately(ax.transData)[1])
