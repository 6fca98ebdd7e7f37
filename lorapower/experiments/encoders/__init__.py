"""Fine-tuning of pretrained and random encoders on rated sentences, and on GLUE's tasks.

``tasks`` says what is asked and how it is scored, ``sources`` reads the texts (``rated`` those of
the archive), ``models`` gives an encoder a head and adapters, ``runs`` trains, ``protocols`` says
which runs are compared, and ``paired`` how sure a difference is.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
