from . import models as models
from . import paired as paired
from . import protocols as protocols
from . import rated as rated
from . import runs as runs
from . import sources as sources
from . import tasks as tasks

__all__: list[str]
