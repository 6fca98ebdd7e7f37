from .core import Adapters as Adapters
from .core import Tuned as Tuned

__all__: list[str]
