from . import samples as samples
from .final_layers import Floor as Floor
from .final_layers import colliding_inputs as colliding_inputs
from .final_layers import final_layers_floor as final_layers_floor
from .layers import OptimalPartition as OptimalPartition
from .layers import first_order as first_order
from .layers import fnn_data_threshold as fnn_data_threshold
from .layers import fnn_error as fnn_error
from .layers import fnn_error_on as fnn_error_on
from .layers import fnn_threshold as fnn_threshold
from .layers import least_error as least_error
from .layers import least_rank as least_rank
from .layers import linear_error as linear_error
from .layers import linear_threshold as linear_threshold
from .layers import variance as variance
from .transformer import AttentionFloor as AttentionFloor
from .transformer import FeedForwardFloor as FeedForwardFloor
from .transformer import attention_floor as attention_floor
from .transformer import directions as directions
from .transformer import feed_forward_floor as feed_forward_floor
from .transformer import inner_rank as inner_rank
from .transformer import packed_rank as packed_rank
from .transformer import transformer_error as transformer_error
from .transformer import transformer_errors as transformer_errors
from .transformer import transformer_ranks as transformer_ranks
from .transformer import transformer_threshold as transformer_threshold

__all__: list[str]
