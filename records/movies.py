"""Fine-tune the packaged encoder in every way that its appendix compares.

Each run is kept in a folder as it ends, so that the same command goes on after an interruption;
when all are done, they are recorded. The record of 120 runs has a part of them: of adapters on some
layers those of rank 8 and those of equal size, and of random weights rank 8 alone::

    python -m records.movies FOLDER
"""

from __future__ import annotations

from lorapower.experiments import sweeps
from records import language, models, protocols, texts
from records.tables import begin, merge, put


def run() -> list[str]:
    """Choose rates, then run everything; name the files."""
    about = "encoder", "movies", texts.RATED, models.PACKAGED
    files = ["rates.sqlite", "runs.sqlite"]
    trials = sweeps.run(protocols.search(*about), language.measure, files[0], size=1)
    settings = protocols.compare(*about, rates=protocols.best_rates(trials))
    sweeps.run(settings, language.measure, files[1], size=1)
    return files


if __name__ == "__main__":
    begin()
    put(merge(run(), language.TextRun), "movies")
