from .data import Data as Data
from .data import Fixed as Fixed
from .data import Fresh as Fresh
from .descent import Newton as Newton
from .descent import descend as descend
from .descent import newton as newton
from .engine import begin as begin
from .engine import train as train
from .fused import FusedTraining as FusedTraining
from .fused import train_fused as train_fused
from .lbfgs import minimize as minimize
from .polishing import polish as polish
from .tuning import Training as Training
from .tuning import Tuning as Tuning

__all__: list[str]
