"""Members of batches, by an index of the batch dimensions alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import InputError, brief


def positions(batch_shape: torch.Size, index: Any, device: torch.device) -> Tensor:
    """Where in the flattened batch the members are that an index of the batch dimensions selects.

    Raises `InputError` for an index that the batch does not have.
    """
    try:
        return torch.arange(batch_shape.numel(), device=device).reshape(batch_shape)[index]
    except IndexError as error:
        raise InputError(
            "index", allowed=f"one into batch shape {tuple(batch_shape)}", given=brief(index)
        ) from error


def first(batch_shape: torch.Size) -> int:
    """Length of the first batch dimension; raises `InputError` where there is none."""
    if not batch_shape:
        raise InputError("batch", allowed="of a dimension or more to go through", given="none")
    return batch_shape[0]
