from .descent import Newton as Newton
from .descent import descend as descend
from .descent import minimize as minimize
from .descent import newton as newton
from .engine import begin as begin
from .engine import train as train
from .fused import FusedTraining as FusedTraining
from .fused import polish as polish
from .fused import train_fused as train_fused
from .tuning import Data as Data
from .tuning import Fixed as Fixed
from .tuning import Fresh as Fresh
from .tuning import Training as Training
from .tuning import Tuning as Tuning

__all__: list[str]
