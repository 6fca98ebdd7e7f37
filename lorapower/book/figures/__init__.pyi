from .curves import curves as curves
from .curves import error_against_budget as error_against_budget
from .curves import error_against_rank as error_against_rank
from .curves import intervals as intervals
from .curves import lines as lines
from .curves import medians as medians
from .curves import scatter as scatter
from .curves import spectrum as spectrum
from .drawings import partitions as partitions
from .drawings import patterns as patterns
from .drawings import pictures as pictures
from .drawings import plane as plane
from .drawings import ranges as ranges
from .drawings import sphere as sphere
from .drawings import transformer_segments as transformer_segments
from .frames import Frames as Frames
from .frames import counts as counts
from .style import Look as Look
from .style import looks as looks
from .style import use_style as use_style
from .touch import Touch as Touch

__all__: list[str]
