"""Draw figures in which readers choose what they see.

Matplotlib draws all that can be chosen, once. A script adds a slider for each choice, and shows the
parts that belong to what is chosen; without scripts the page shows the first choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from io import BytesIO, StringIO
from itertools import count
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.figure import Figure

_NUMBERS = count()
# Matplotlib writes these into a picture; on a page they would count as text.
_ABOUT = ("Creator", "Date", "Format", "Type")
_PART = re.compile(r'<g id="shown-([\d_]+)-\d+"')


def show_at(artist: Artist, *places: int | None) -> None:
    """Show an artist only where each slider is at its place; None stands for any place."""
    wanted = "_".join("" if place is None else str(place) for place in places)
    artist.set_gid(f"shown-{wanted}-{next(_NUMBERS)}")


@dataclass(frozen=True, eq=False, repr=False)
class Choices:
    """A figure with a slider for each entry of ``choices``, which has its values by its label.

    Artists that were given to `show_at` are seen only at their places. Each slider is at its place
    in ``start`` at first. ``sentences`` has, by places, what is read aloud above the figure.
    """

    figure: Figure
    choices: Mapping[str, Sequence[Any]]
    sentences: Mapping[tuple[int, ...], str]
    start: tuple[int, ...]

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        file, picture = StringIO(), BytesIO()
        self.figure.savefig(file, format="svg", metadata=dict.fromkeys(_ABOUT))
        self._show_first()
        self.figure.savefig(picture, format="png", bbox_inches="tight")
        plt.close(self.figure)
        svg = _PART.sub(self._hide, file.getvalue()[file.getvalue().index("<svg") :])
        sentence = self.sentences[self.start]
        data = {
            "labels": [*self.choices],
            "values": [[str(value) for value in values] for values in self.choices.values()],
            "start": self.start,
            "sentences": {",".join(map(str, at)): said for at, said in self.sentences.items()},
        }
        style, script = (
            resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
            for name in ("choices.css", "choices.js")
        )
        return {
            "text/html": f'<div class="choices"><style>{style}</style>\n'
            f'<div class="picture" role="img" aria-label="{escape(sentence)}">{svg}</div>\n'
            f'<script type="application/json">{json.dumps(data)}</script>\n'
            f"<script>{script}</script></div>",
            # Where notebooks are not trusted, no script runs.
            "image/png": picture.getvalue(),
            "text/plain": sentence,
        }

    def _show_first(self) -> None:
        """Hide the artists of all other choices."""
        for artist in self.figure.findobj(lambda artist: bool(artist.get_gid())):
            if part := _PART.match(f'<g id="{artist.get_gid()}"'):
                artist.set_visible(self._is_first(part[1]))

    def _hide(self, part: re.Match[str]) -> str:
        """Hide a part of the picture that belongs to other choices than the first."""
        return part[0] if self._is_first(part[1]) else f'{part[0]} style="display: none"'

    def _is_first(self, places: str) -> bool:
        """Say whether a part at these places belongs to the first choice."""
        wanted = zip(places.split("_"), self.start, strict=True)
        return all(place in ("", str(chosen)) for place, chosen in wanted)
