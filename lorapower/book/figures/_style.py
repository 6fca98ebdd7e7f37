"""Set how figures look: each method has a colour and a marker, the same in the whole book."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.rcsetup import cycler
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.typing import ColorType, LineStyleType

GREY = "0.4"
DARK = "0.15"
# Seaborn's palette for the colour-blind.
_PALETTE = (
    *("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc"),
    *("#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9"),
)

#: Colour and marker of each method. The keys are patterns: a label, or a part of it between commas,
#: begins with one. What is computed and not measured has no marker.
ROLES: dict[str, tuple[ColorType, str]] = {
    "construction": (_PALETTE[0], "o"),
    "fitted": (_PALETTE[2], "D"),
    "trained": (_PALETTE[3], "s"),
    "final layers?": (_PALETTE[4], "^"),
    "all weights": (_PALETTE[1], "v"),
    "random": (_PALETTE[5], "P"),
    "pretrained": (_PALETTE[9], "X"),
    "target": (DARK, ""),
    "frozen": (GREY, ""),
    "bound": (DARK, ""),
    "floor": (GREY, ""),
    "best constant": (GREY, ""),
    "by effect": (_PALETTE[0], "o"),
    "by norm|same rank": (GREY, "s"),
}
#: The colours alone, for drawings in cells of chapters.
COLORS = {role: color for role, (color, _) in ROLES.items()}
#: Levels, and what there is before any adaptation, are dashed everywhere.
_DASHED = ("floor", "best constant", "frozen")
#: These words beside a role leave its line as it is: a bound is a line, what is measured markers.
_PLAIN = ("", "bound", "measured")
#: Starts of trainings are roles by themselves, and beside a role always the same kind of line.
_STARTS = ("random", "pretrained")
_DEPTH = re.compile(r"depth (\d+)|(\d+) blocks?")
_DEEPEST = 16
#: Labels without a role take these colours, which have no meaning elsewhere.
_FREE = ("#882255", "#999933", "#661100", "#AA4499", "#6699CC", "#117733", "#DDCC77", "#CC6677")
MARKERS = "osD^vPX"
LINES: tuple[LineStyleType, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
_FILLS = ("none", "full", "left", "bottom", "right")


@dataclass(frozen=True)
class Look:
    """Colour, marker and kind of a line, and how far its marker is filled."""

    color: ColorType
    marker: str
    line: LineStyleType = "-"
    fill: str = "none"

    def style(self, size: float = 7) -> dict[str, Any]:
        """Return matplotlib's settings for a line with markers of this size."""
        marker = {"marker": self.marker, "fillstyle": self.fill, "ms": size, "mew": 1.5}
        return {"color": self.color, "ls": self.line, **marker}


def use_style() -> None:
    """Set matplotlib's defaults to the book's style."""
    mpl.rcParams |= {
        "axes.axisbelow": True,
        "axes.edgecolor": DARK,
        "axes.grid": True,
        "axes.labelcolor": DARK,
        "axes.linewidth": 1.25,
        "axes.prop_cycle": cycler(color=_PALETTE),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": "medium",
        "figure.constrained_layout.use": True,
        "figure.figsize": (5.0, 3.2),  # so that phones show ticks of 11 pixels
        "font.size": 13.2,
        "grid.color": "0.9",
        "grid.linewidth": 1.0,
        "legend.edgecolor": "white",
        "legend.fontsize": 12.1,
        "legend.framealpha": 0.9,
        "lines.solid_capstyle": "round",
        "patch.edgecolor": "white",
        "patch.force_edgecolor": True,
        "savefig.facecolor": "white",
        "svg.hashsalt": "lorapower",
        "text.color": DARK,
        "xtick.color": DARK,
        "xtick.labelsize": 12.1,
        "xtick.major.size": 6,
        "xtick.major.width": 1.25,
        "ytick.color": DARK,
        "ytick.labelsize": 12.1,
        "ytick.major.size": 6,
        "ytick.major.width": 1.25,
    }


def looks(labels: Collection[str]) -> dict[str, Look]:
    """Choose the look of each line: its role gives the colour, the rest of its label the line."""
    read = {label: _read(label) for label in labels}
    extras = dict.fromkeys("" if extra in _PLAIN else extra for _, extra in read.values())
    starts = _STARTS if any(start in extras for start in _STARTS) else ()
    plain = [""] if "" in extras else []
    kinds = {extra: i for i, extra in enumerate(dict.fromkeys([*plain, *starts, *extras]))}
    unnamed = dict.fromkeys(role for role, _ in read.values() if _fixed(role) is None)
    free = dict(zip(unnamed, zip(cycle(_FREE), cycle(MARKERS), strict=False), strict=False))
    found = {}
    for label, (role, extra) in read.items():
        color, marker = _fixed(role) or free[role]
        kind = kinds.get(extra, 0)
        line, fill = LINES[kind % len(LINES)], _FILLS[kind % len(_FILLS)]
        if role in _DASHED:
            line = "--"
        elif extra == "bound":
            marker = ""
        elif extra == "measured":
            line = ""
        found[label] = Look(color, marker, line, fill)
    return found


def _read(label: str) -> tuple[str, str]:
    """Split a label into the role that it names, or else its first part, and the rest."""
    parts = re.split(r", (?![^(]*\))", label)
    for i, part in enumerate(parts):
        if _DEPTH.fullmatch(part):
            return part, ", ".join(parts[:i] + parts[i + 1 :])
    for role in ROLES:
        for i, part in enumerate(parts):
            if named := re.match(rf"{role}(?: adapters)?\b", part):
                rest = [*parts[:i], part[named.end() :].strip(), *parts[i + 1 :]]
                return role, ", ".join(filter(None, rest))
    return parts[0], ", ".join(parts[1:])


def _fixed(role: str) -> tuple[ColorType, str] | None:
    """Return the colour and the marker of a role that has them in the whole book."""
    if depth := _DEPTH.fullmatch(role):
        L = int(depth[1] or depth[2])
        shade = 0.8 * min(math.log(max(L, 1)) / math.log(_DEEPEST), 1)
        return mpl.colormaps["viridis"](shade), MARKERS[(L - 1) % len(MARKERS)]
    return ROLES.get(role)


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
