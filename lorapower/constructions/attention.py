"""Adapters of attention alone, for the least error far out [prop-floor-attention]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank
from ..adapters import Adapters
from ..bounds.floors import attention_floor
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.decoder import Decoder


@torch.no_grad()
def adapt_attention(
    frozen: Decoder,
    target: Decoder,
    tokens: Float[Tensor, "width samples"],
    ranks: int | Sequence[int] | None = None,
) -> Adapters:
    """Adapt attention alone, and ``b_O``, with the least error on single tokens far out.

    ``W_V`` and ``W_O`` take the singular triplets of the slope of `attention_floor` in turn.
    On normalized tokens ``W_O ΔW_V diag(g_1)`` is such a part, and so is ``ΔW_O Ŵ_V diag(g_1)``
    with what ``W_V`` has become. So the error tends to the floor. A total rank, by default any,
    goes to ``W_O`` of the first head of the first block.

    Raises what `attention_floor` raises, and `InputError` for batches, for heads narrower than the
    tokens, and for weights and gains that hide directions. Source: as `attention_floor`.

    Examples
    --------
    >>> from lorapower import randomness
    >>> from lorapower.bounds import attention_floor, far_error
    >>> from lorapower.constructions import adapt_attention
    >>> from lorapower.networks import Decoder
    >>> kind = {"residual": True, "norm": "layer"}
    >>> frozen, target = (Decoder.random(1, 6, 2, seed=s, **kind) for s in (0, 1))
    >>> tokens = randomness.normal(randomness.generator(0, "example"), 6, 500)
    >>> adapted = adapt_attention(frozen, target, tokens).merge(frozen)
    >>> error, _ = far_error(adapted, target, tokens, 1e4)
    >>> round(float(error / attention_floor(frozen, target, tokens).value), 3)
    1.0
    """
    best, given = attention_floor(frozen, target, tokens, ranks), frozen.value_ranks(ranks)
    _checks.single(frozen=frozen, target=target)
    if (size := frozen.sizes["value size"]) < frozen.width:
        # Narrower ones cannot add every linear map.
        raise InputError("frozen", allowed="with heads as wide as the tokens", given=size)
    V, values = frozen.basis(), frozen.W_V.clone()
    # Heads of a group share their values.
    outputs = frozen.W_O.unflatten(1, (frozen.groups, -1)).sum(2)
    updates = {
        name: LowRank(w[:, :0], w.mT[:, :0])
        for name, w in zip(frozen.weight_names, frozen.weights, strict=True)
    }
    U, S, right = lowrank.svd(best.slope @ V)
    left, offset = U * S, best.offset.clone()
    used = 0
    for kind in ("W_V", "W_O"):
        names = [n for n, k in zip(updates, frozen.kind_of_weight, strict=True) if k == kind]
        for i, name in enumerate(names):
            l, h = divmod(i, len(names) // frozen.depth)
            columns = slice(used, used + given.get(name, 0))
            used = columns.stop
            out, into = left[:, columns], right[:, columns]
            if not out.any():
                continue
            read = (frozen.g_1[l][:, None] * V).mT
            if kind == "W_V":
                into = _solve(read, into, f"gains before {name}")
                updates[name] = LowRank(_solve(outputs[l, h], out, f"partner of {name}"), into)
                values[l, h] += updates[name].matrix()
            else:
                of_head = values[l, h * frozen.groups // frozen.heads]
                into = _solve(read @ of_head.mT, into, f"partner of {name}, or the gains")
                updates[name], into = LowRank(out, into), of_head.mT @ into
            offset -= out @ (into.mT @ frozen.s_1[l])
    changes = [torch.zeros_like(b) for b in frozen.biases]
    changes[frozen.bias_names.index("b_O of block 1")] = offset
    return Adapters(tuple(updates.values()), tuple(changes))


def _solve(matrix: Tensor, columns: Tensor, name: str) -> Tensor:
    """Find the least columns that a matrix maps to these; refuse if there are none."""
    eps = torch.finfo(matrix.dtype).eps
    solution = torch.linalg.pinv(matrix, rtol=eps ** (2 / 3)) @ columns
    if (matrix @ solution - columns).norm() > eps**0.5 * columns.norm():
        given = "one that hides directions"
        raise InputError(f"frozen's {name}", allowed="of full rank", given=given)
    return solution
