"""Random networks for the tests: sizes from hypothesis, weights from its seeds."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from lorapower import lowrank
from lorapower.networks import LinearNetwork

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64])
batch_shapes = st.sampled_from([(), (1,), (3,), (2, 2)])


def conditioned(
    depth: int,
    width: int,
    *,
    kappa: float = 3.0,
    batch_shape: tuple[int, ...] = (),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LinearNetwork:
    """A network whose layers all have the condition number `kappa`."""
    return LinearNetwork(
        lowrank.random_matrix(
            width,
            width,
            condition_number=kappa,
            batch_shape=(*batch_shape, depth),
            seed=seed,
            dtype=dtype,
        )
    )
