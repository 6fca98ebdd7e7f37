from . import claims as claims
from . import figures as figures
from . import outputs as outputs
from .notebook import THREADS as THREADS
from .notebook import quote as quote
from .notebook import quoted as quoted
from .notebook import setup as setup
from .parameters import WIDEST as WIDEST
from .parameters import Blocks as Blocks
from .parameters import Depth as Depth
from .parameters import Heads as Heads
from .parameters import Layers as Layers
from .parameters import Model as Model
from .parameters import Parameters as Parameters
from .parameters import Ranks as Ranks
from .parameters import Seeds as Seeds
from .parameters import Source as Source
from .parameters import Tasks as Tasks
from .parameters import Tokens as Tokens
from .parameters import Width as Width
from .parameters import results as results
from .parameters import whole as whole
from .parameters import wholes as wholes

__all__: list[str]
