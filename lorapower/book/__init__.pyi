from . import claims as claims
from . import figures as figures
from .chapter import THREADS as THREADS
from .chapter import WIDEST as WIDEST
from .chapter import Blocks as Blocks
from .chapter import Depth as Depth
from .chapter import Heads as Heads
from .chapter import Layers as Layers
from .chapter import Parameters as Parameters
from .chapter import Ranks as Ranks
from .chapter import Seeds as Seeds
from .chapter import Tokens as Tokens
from .chapter import Width as Width
from .chapter import dead as dead
from .chapter import median as median
from .chapter import named as named
from .chapter import quote as quote
from .chapter import quoted as quoted
from .chapter import results as results
from .chapter import setup as setup
from .chapter import share as share
from .chapter import whole as whole

__all__: list[str]
