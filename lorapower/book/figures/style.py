"""The style of figures, and what lines mean in all of them: one role, one colour, one marker.

A line's label says what it means. One of its parts, between commas, names its role, which gives
colour and marker; what else the label says gives the kind of line and the filling of the marker.
The style is legible on a phone and for colour-blind readers, and opaque, so that it can stand on
a dark page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.typing import ColorType, LineStyleType

from ...errors import InputError, brief

GREY = "0.4"
_PALETTE = sns.color_palette("colorblind").as_hex()

#: What lines mean in the whole book. Keys are the names in labels, patterns that a part begins
#: with; values are colours and markers, none for what is computed rather than measured.
ROLES: dict[str, tuple[ColorType, str]] = {
    "construction": (_PALETTE[0], "o"),
    "fitted": (_PALETTE[2], "D"),
    "trained(?: adapters)?": (_PALETTE[3], "s"),
    "final layers?": (_PALETTE[4], "^"),
    "all weights": (_PALETTE[1], "v"),
    "random": (_PALETTE[5], "P"),
    "pretrained": (_PALETTE[9], "X"),
    "target": ("0.15", ""),
    "frozen": (GREY, ""),
    "bound": ("0.15", ""),
    "floor": (GREY, ""),
    "best constant": (GREY, ""),
}
#: Levels, which are no curves, and what is before any adaptation are dashed everywhere.
_DASHED = ("floor", "best constant", "frozen")
#: Said of the plain kind of a line; beside one another, a bound is a line, the measured markers.
_PLAIN = ("", "bound", "measured")
#: Starts of trainings: a role of their own, or else always these kinds of a method's line.
_STARTS = ("random", "pretrained")
_DEPTH = re.compile(r"depth (\d+)|(\d+) blocks?")
_DEEPEST = 16
#: Roles of one figure alone take these, which mean nothing elsewhere.
_FREE = ("#882255", "#999933", "#661100", "#AA4499", "#6699CC", "#117733", "#DDCC77", "#CC6677")
MARKERS = "osD^vPX"
LINES: tuple[LineStyleType, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
_FILLS = ("none", "full", "left", "bottom", "right")


@dataclass(frozen=True)
class Look:
    """How a line is drawn: colour, marker, kind of line, and how far its marker is filled."""

    color: ColorType
    marker: str
    line: LineStyleType = "-"
    fill: str = "none"

    def style(self, size: float = 7) -> dict[str, Any]:
        """Of a line of matplotlib, with markers of this size."""
        return {
            "color": self.color,
            "marker": self.marker,
            "ls": self.line,
            "fillstyle": self.fill,
            "ms": size,
            "mew": 1.5,
        }


def use_style() -> None:
    """Set matplotlib's defaults to the book's style."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=1.1)
    mpl.rcParams |= {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "figure.figsize": (6.4, 3.7),
        "grid.color": "0.9",
        "legend.edgecolor": "white",
        "legend.framealpha": 0.9,
        "lines.markersize": 6,
        "savefig.facecolor": "white",
        "svg.hashsalt": "lorapower",
    }


def looks(labels: Collection[str]) -> dict[str, Look]:
    """The look of each line of a figure, by its label.

    Lines of one role differ by what else their labels say, equally in all roles of the figure.
    Raises `InputError` for a label that is no text.
    """
    if not all(isinstance(label, str) for label in labels):
        raise InputError("labels", allowed="texts", given=brief(labels))
    read = {label: _read(label) for label in labels}
    said = dict.fromkeys("" if rest in _PLAIN else rest for _, rest in read.values())
    first = [rest for rest in ("", *_STARTS) if rest in said or (rest and said.keys() & {*_STARTS})]
    kinds = {rest: i for i, rest in enumerate(dict.fromkeys([*first, *said]))}
    own = dict.fromkeys(role for role, _ in read.values() if _fixed(role) is None)
    free = dict(zip(own, zip(cycle(_FREE), cycle(MARKERS), strict=False), strict=False))
    found = {}
    for label, (role, rest) in read.items():
        color, marker = _fixed(role) or free[role]
        kind = kinds.get(rest, 0)
        line, fill = LINES[kind % len(LINES)], _FILLS[kind % len(_FILLS)]
        if role in _DASHED:
            line = "--"
        elif rest == "bound":
            marker = ""
        elif rest == "measured":
            line = ""
        found[label] = Look(color, marker, line, fill)
    return found


def _read(label: str) -> tuple[str, str]:
    """The role that a label names, or else its first part, and what else it says."""
    parts = re.split(r", (?![^(]*\))", label)
    for i, part in enumerate(parts):
        if _DEPTH.fullmatch(part):
            return part, ", ".join(parts[:i] + parts[i + 1 :])
    for role in ROLES:
        for i, part in enumerate(parts):
            if named := re.match(rf"{role}\b", part):
                rest = [*parts[:i], part[named.end() :].strip(), *parts[i + 1 :]]
                return role, ", ".join(filter(None, rest))
    return parts[0], ", ".join(parts[1:])


def _fixed(role: str) -> tuple[ColorType, str] | None:
    """Colour and marker of a role that has them in the whole book."""
    if depth := _DEPTH.fullmatch(role):
        L = int(depth[1] or depth[2])
        shade = 0.8 * min(math.log(max(L, 1)) / math.log(_DEEPEST), 1)
        return mpl.colormaps["viridis"](shade), MARKERS[(L - 1) % len(MARKERS)]
    return ROLES.get(role)
