from . import adapters as adapters
from . import bounds as bounds
from . import constructions as constructions
from . import lowrank as lowrank
from . import networks as networks
from . import regions as regions
from .constructions import adapt as adapt
from .constructions import rank_for_error as rank_for_error
from .errors import InputError as InputError
from .errors import LorapowerError as LorapowerError
from .errors import PrecisionError as PrecisionError
from .errors import ResultsError as ResultsError
from .errors import SingularError as SingularError

__all__: list[str]
