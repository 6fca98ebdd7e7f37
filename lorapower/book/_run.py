"""What the notebook that runs was given where the book's record has something else."""

from __future__ import annotations

from typing import Any

#: By name, the parameters that are not the recorded ones; all are where it is empty.
changed: dict[str, Any] = {}


def say(values: dict[str, Any]) -> str:
    """Name parameters with their values, as ``width 24, ranks 1 4``."""
    texts = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in values.items()
    }
    return ", ".join(f"{name} {text}" for name, text in texts.items())
