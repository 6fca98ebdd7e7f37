from .curves import curves as curves
from .curves import error_against_rank as error_against_rank
from .curves import intervals as intervals
from .curves import medians as medians
from .curves import scatter as scatter
from .drawings import counts as counts
from .drawings import partitions as partitions
from .drawings import patterns as patterns
from .drawings import pictures as pictures
from .drawings import plane as plane
from .drawings import ranges as ranges
from .drawings import sphere as sphere
from .ideas import adapted_stack as adapted_stack
from .ideas import adapter_sizes as adapter_sizes
from .ideas import far_token as far_token
from .ideas import moved_kink as moved_kink
from .ideas import paid_ranks as paid_ranks
from .ideas import paired_losses as paired_losses
from .ideas import planning as planning
from .ideas import residual_stream as residual_stream
from .ideas import split_product as split_product
from .ideas import transformer_segments as transformer_segments
from .widgets import Frames as Frames
from .widgets import Touch as Touch

__all__: list[str]
