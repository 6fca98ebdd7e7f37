from ._measuring import LEAST_TEXTS as LEAST_TEXTS
from ._measuring import Measured as Measured
from ._measuring import read_texts as read_texts
from .pair import Adapter as Adapter
from .pair import Module as Module
from .pair import Other as Other
from .pair import Pair as Pair
from .planner import METHODS as METHODS
from .planner import PATHS as PATHS
from .planner import Planner as Planner
from .planner import compare as compare
from .workflow import Plan as Plan
from .workflow import check as check
from .workflow import extract as extract
from .workflow import plan as plan

__all__: list[str]
