"""Fine-tuning of pretrained and random encoders on GLUE's tasks, and on reviews that a package has.

``tasks`` says what is asked and how it is scored, ``sources`` reads the texts, ``encoders`` loads
a model and makes adapters for it, ``runs`` trains. The libraries that do the work are the extra
``glue`` of this package, and are imported only when they are used.
"""

from . import encoders, runs, sources, tasks

__all__ = ["encoders", "runs", "sources", "tasks"]
