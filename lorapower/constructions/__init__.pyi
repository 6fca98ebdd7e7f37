from . import fitted as fitted
from . import fnn as fnn
from . import fused as fused
from . import linear as linear
from . import transformer as transformer
from ._blocks import nearest_scores as nearest_scores
from .general import NeededRank as NeededRank
from .general import adapt as adapt
from .general import rank_for_error as rank_for_error
from .linear import Adaptation as Adaptation

__all__: list[str]
