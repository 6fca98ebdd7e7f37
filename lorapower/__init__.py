"""The expressive power of low-rank adaptation: networks, adapters, constructions and bounds.

`adapt` makes the adapters that a theorem promises, and `rank_for_error` says which rank an error
needs. From the ground up:

- `errors`, `randomness`, `lowrank`, `regions` and `regression` know no network.
- `networks` has linear and ReLU networks, transformers, and what adapters have to make up for.
- `adapters` merges, counts, reads and writes updates.
- `bounds` says what no adapters of a rank can reach; `constructions` makes those that reach it.
- `training` finds adapters by gradient.
- `experiments` repeats the study; `checkpoints` plans, extracts and checks adapters of language
  models, as does the command ``lorapower``; `book` serves the chapters.

One word means one thing, in names and in texts:

- **frozen**: the network that is adapted. Of checkpoints it is the *base*.
- **target**: the network that the adapted one should equal. Of checkpoints it is *tuned*.
- **update**: the change ``ΔW = A Bᵀ`` of one weight, a `lowrank.LowRank`.
- **adapters**: an update for each weight of a network, and tuned biases: `adapters.Adapters`.
- **ranks**: of the updates; one number for all weights, or one for each.
- **segment**: a product of weights between two nonlinearities of a network.
- **gap**: a frozen segment against the target's, ``E = W̄ − ∏_l W_l``: `networks.Gap`.
- **region**: a bounded convex set of inputs on which a construction holds.
- **fit, select, test**: three parts of data, to compute from, to choose by, and to judge on.

Inputs and samples are columns, ``[..., width, samples]``, and weights act from the left,
``[..., out, in]``; everything broadcasts over leading batch dimensions. Layers and blocks count
from 1 in texts and errors. ``W_l`` is the frozen weight of layer ``l``, ``W̄`` the target's,
``R_l`` the rank of layer ``l``, ``σ_d`` the ``d``-th singular value, and ``LR_r(M)`` the best
approximation of ``M`` of rank ``r``. Results depend on seeds alone, and are on the device of their
inputs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
