"""Fine-tuning of pretrained and random encoders on GLUE's tasks, and on reviews that a package has.

``tasks`` says what is asked and how it is scored, ``sources`` reads the texts, ``models`` gives an
encoder a head and adapters, ``runs`` trains.
"""

from . import models, runs, sources, tasks

__all__ = ["models", "runs", "sources", "tasks"]
