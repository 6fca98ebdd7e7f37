"""Fine-tuning of pretrained and random encoders on rated sentences, and on GLUE's tasks.

``tasks`` says what is asked and how it is scored, ``sources`` reads the texts (``rated`` those of
the archive), ``models`` gives an encoder a head and adapters, ``runs`` trains, ``protocols`` says
which runs are compared, and ``paired`` how sure a difference is.
"""

from . import models, paired, protocols, rated, runs, sources, tasks

__all__ = ["models", "paired", "protocols", "rated", "runs", "sources", "tasks"]
