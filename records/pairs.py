"""Texts for a pair of checkpoints, and the tuned one of it, made in minutes."""

from __future__ import annotations

from pathlib import Path

from records import language, models
from records import texts as sources


def texts(kind: str, part: str) -> list[str]:
    """Read the rated sentences of a kind in a part, without ratings, those near neutral too."""
    return [text for (text,) in sources.read(f"{kind}-rating", sources.RATED, part).texts]


def encoder(folder: Path | str, *, samples: int = 640, epochs: int = 2, seed: int = 0) -> None:
    """Tune all weights of the packaged encoder to tell the sign of movie snippets, and save it.

    ``folder`` is a checkpoint like others, with the head of ``transformers``; its base is
    ``"packaged"``.
    """
    setting = language.Setting(
        problem=language.Problem(head="own", samples=samples, epochs=epochs, seed=seed),
        method=language.Whole(kind="full", learning_rate=2e-4),
    )
    language.tune(setting, lambda network: models.save(network, models.PACKAGED, folder))
