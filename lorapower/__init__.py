"""The expressive power of low-rank adaptation: networks, adapters, constructions and bounds.

From the ground up:

- `errors`, `randomness`, `lowrank`, `regions` and `regression` know no network.
- `networks` has linear and ReLU networks, transformers, and the gap that adapters have to close.
- `adapters` merges low-rank updates into networks and counts their numbers.
- `bounds` says what no adapters of a rank can reach, and `constructions` makes adapters that reach
  it: `constructions.adapt` for any network or module, `constructions.rank_for_error` for the rank
  to choose.
- `training` finds adapters by gradient.
- `book` serves the chapters.

The same words mean the same things in names and texts:

- **frozen**: the network that is adapted.
- **target**: the network that the adapted one should equal.
- **update**: the change ``ΔW = A Bᵀ`` of one weight, a `lowrank.LowRank`.
- **adapters**: an update for each weight of a network, and tuned biases: `adapters.Adapters`.
- **ranks**: of the updates; one number for all weights, or one for each.
- **segment**: a product of weights between two nonlinearities of a network.
- **gap**: the difference of a target's segment from the frozen one, ``E = W̄ − ∏_l W_l``.
- **region**: a bounded convex set of inputs on which a construction holds.
- **fit, select, test**: three parts of data: to compute from, to choose by, and to judge on.

Inputs and samples are columns, ``[..., width, samples]``, and weights act from the left,
``[..., out, in]``; everything broadcasts over leading batch dimensions. Layers and blocks count
from 1 in texts and errors. ``W_l`` is the frozen weight of layer ``l``, ``W̄`` the target's,
``R_l`` the rank of layer ``l``, ``σ_d`` the ``d``-th singular value, and ``LR_r(M)`` the best
approximation of ``M`` of rank ``r``. Results depend on seeds alone, and are on the device of their
inputs. Nothing is imported here but the errors: import the modules that you use.
"""

from .errors import InputError, LorapowerError, PrecisionError, ResultsError, SingularError

__all__ = ["InputError", "LorapowerError", "PrecisionError", "ResultsError", "SingularError"]
