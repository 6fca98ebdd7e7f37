"""Names beside lines, in the lines' colours: where all find room, no legend is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from numpy.typing import NDArray

from ._style import ink

# With more lines than these a legend is read faster.
_MOST = 4
# In points: a name stands so far aside from a point of its line, leaves so much between itself and
# the line's markers, and is by so much farther from all else, ample if so many times as far.
_ASIDE = 8
_CLEAR = 1
_APART = 3
_AMPLE = 3
# So many points stand for each line, and so many of them are tried.
_DENSE = 300
_TRIED = 40
_SIDES = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y]

Points = NDArray[np.float64]


@dataclass(frozen=True)
class _Place:
    """Where a name may stand: beside a point of a line, with so much room about it."""

    ax: Axes
    line: Line2D
    point: Points
    side: tuple[int, int]
    box: Points
    room: float


def write_names(figure: Figure) -> dict[str, Line2D]:
    """Write each name beside one of its lines; if one finds no room, return all for a legend.

    All are written in one panel, unless none has all of these lines.
    """
    named: dict[str, list[tuple[Axes, Line2D]]] = {}
    for ax in figure.axes:
        for line in ax.lines:
            if not str(line.get_label()).startswith("_"):
                named.setdefault(str(line.get_label()), []).append((ax, line))
    legend = {name: lines[0][1] for name, lines in named.items()}
    if len(named) > _MOST:
        return legend
    figure.draw_without_rendering()
    whole = [[ax] for ax in figure.axes if all(_has(lines, ax) for lines in named.values())]
    for axes in whole or [figure.axes]:
        if places := _find(named, axes):
            for name, place in places.items():
                _write(place.ax, place.line, name, place.point, place.side)
            return {}
    return legend


def _has(lines: Sequence[tuple[Axes, Line2D]], ax: Axes) -> bool:
    return any(other is ax for other, _ in lines)


def _find(
    named: Mapping[str, Sequence[tuple[Axes, Line2D]]], axes: Sequence[Axes]
) -> dict[str, _Place]:
    """A place in these panels for each name, or none at all."""
    taken = {ax: [_filled(_box(a)) for a in (*ax.texts, *ax.patches)] for ax in axes}
    places: dict[str, _Place] = {}
    for name, lines in named.items():
        inside = [(ax, line) for ax, line in lines if ax in taken]
        found = [place for ax, line in inside for place in _places(ax, line, name, taken[ax])]
        if not found:
            return {}
        best = places[name] = max(found, key=lambda place: place.room)
        taken[best.ax].append(_filled(best.box))
    return places


def _places(ax: Axes, line: Line2D, name: str, taken: Sequence[Points]) -> Iterator[_Place]:
    """All places beside a line, inside of the axes, that are nearer to it than to all else."""
    alike = [other for other in ax.lines if other is line or _belongs(other, line)]
    points = _spread(np.asarray(line.get_xydata(), dtype=float), _TRIED)
    joined = _is_joined(line) or any(map(_is_curve, alike))
    if not (len(points) and joined):
        return
    own = np.concatenate([_drawn(other) for other in alike])
    others = [_drawn(other) for other in ax.lines if other not in alike]
    rest = np.concatenate([*others, *taken, np.full((1, 2), np.inf)])
    unit = ax.figure.dpi / 72
    low, high = _box(ax.patch) + np.array([[1], [-1]]) * _APART * unit
    clear = (_CLEAR + line.get_markersize() / 2) * unit
    text = _write(ax, line, name, points[0], (0, 0))
    size = np.diff(_box(text), axis=0)[0]
    text.remove()
    for point, at in zip(points, line.get_transform().transform(points), strict=True):
        for side in _SIDES:
            corner = at + unit * _aside(side) - size * (1 - np.array(side)) / 2
            box = np.stack([corner, corner + size])
            if (box[0] < low).any() or (box[1] > high).any():
                continue
            near, room = _distance(own, box), _distance(rest, box)
            if near >= clear and room >= near + _APART * unit:
                yield _Place(ax, line, point, side, box, min(room, _AMPLE * near))


def _write(ax: Axes, line: Line2D, name: str, point: Points, side: tuple[int, int]) -> Annotation:
    across, up = side
    return ax.annotate(
        name,
        (point[0], point[1]),
        tuple(_aside(side)),
        xycoords=line.get_transform(),
        textcoords="offset points",
        ha=("center", "left", "right")[across],
        va=("center", "bottom", "top")[up],
        fontsize=mpl.rcParams["legend.fontsize"],
        color=ink(line.get_color()),
    )


def _aside(side: tuple[int, int]) -> Points:
    """From a point to its name's nearest edge or corner, in points."""
    return _ASIDE * np.array(side) / max(float(np.hypot(*side)), 1)


def _belongs(other: Line2D, line: Line2D) -> bool:
    """Whether a line without a name is drawn with this one."""
    return str(other.get_label()).startswith("_") and other.get_color() == line.get_color()


def _is_joined(line: Line2D) -> bool:
    return line.get_linestyle() != "None"


def _is_curve(line: Line2D) -> bool:
    """Whether it leads through points, and is not just a bar or a mark."""
    return _is_joined(line) and len(np.asarray(line.get_xdata())) > 2


def _drawn(line: Line2D) -> Points:
    """Many points of a line where it is drawn, in pixels; markers alone if nothing joins them."""
    points = line.get_transform().transform(np.asarray(line.get_xydata(), dtype=float))
    return _spread(points, _DENSE) if _is_joined(line) else points[np.isfinite(points).all(1)]


def _spread(points: Points, count: int) -> Points:
    """So many points along a line through the given finite ones."""
    points = points[np.isfinite(points).all(1)]
    if len(points) < 2:
        return points
    at = np.linspace(0, len(points) - 1, count)
    return np.stack([np.interp(at, range(len(points)), part) for part in points.T], 1)


def _box(artist: Artist) -> Points:
    """Lower left and upper right corner, in pixels."""
    return artist.get_window_extent().get_points()


def _filled(box: Points) -> Points:
    """Points all over a box."""
    x, y = (np.linspace(low, high, 9) for low, high in box.T)
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


def _distance(points: Points, box: Points) -> float:
    """From a box to the nearest of some points."""
    outside = np.maximum(np.maximum(box[0] - points, points - box[1]), 0)
    return float(np.linalg.norm(outside, axis=1).min(initial=np.inf))
