"""The same function with its hidden units in another order and of other sizes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, randomness
from ..errors import InputError
from .transformer import SHAPES, Transformer

_SETTINGS = ("residual", "norm", "activation", "gated", "rotary")


def align(target: Transformer, frozen: Transformer, *, seed: int = 0) -> Transformer:
    """Order and rescale the target's units, which saves one rank on every ``W_1`` and ``W_3``.

    ReLU units with normals ``b_k`` are paired with frozen ones ``a_k`` and rescaled so that all
    differences vanish on one ``x`` of normalized tokens [thm-inner-rank]. In gated layers, with any
    activation, ``W_3`` is rescaled against ``W_2`` in the same way, with factors of either sign
    [thm-gated-rank]. The target's gains count. Raises `InputError` for networks that do not fit,
    for other activations unless gated, and where no ``x`` is found, as may be where normals of the
    target are parallel.
    """
    target.require_like(frozen, _SETTINGS, ("blocks", "width", "hidden"))
    _checks.single(target=target, frozen=frozen)
    if target.settings.norm is None:
        words = "with norms, whose gains and spheres are used"
        raise InputError("target", allowed=words, given="none")
    _checks.integer("width", target.width, 2)
    is_relu, is_gated = target.settings.activation == "relu", target.settings.gated
    if not is_relu and not is_gated:
        raise InputError("target", allowed="with ReLUs or gated layers", given=target)
    generator = randomness.generator(_checks.seed(seed), "alignment")
    parts, V = {kind: part.clone() for kind, part in target.parameters.items()}, target.basis()
    for l in range(target.depth):
        read = target.g_2[l][:, None] * V
        if is_relu:
            order, scale = _pair(frozen.W_1[l] @ read, target.W_1[l] @ read, generator, l)
            for kind in [k for k in target.kinds if SHAPES[k][:2] == ("blocks", "hidden")]:
                parts[kind][l] = parts[kind][l][order]
            parts["W_1"][l] *= scale[:, None]
            parts["b_1"][l] *= scale
            parts["W_2"][l] = parts["W_2"][l][:, order] / scale
        if is_gated:
            # Of some directions the one with the mildest factors.
            y = randomness.normal(generator, V.shape[1], 64, dtype=read.dtype).to(read)
            factors = (frozen.W_3[l] @ read @ y) / (parts["W_3"][l] @ read @ y)
            factor = factors[:, factors.abs().log().abs().amax(0).argmin()]
            parts["W_3"][l] *= factor[:, None]
            parts["b_3"][l] *= factor
            parts["W_2"][l] /= factor
    return Transformer(parts, target.settings)


def _pair(a: Tensor, b: Tensor, generator: torch.Generator, l: int) -> tuple[Tensor, Tensor]:
    """Find an order of the target's normals, and factors, with no difference on some ``x``."""
    for _ in range(64):
        x = _balanced(a, b, generator)
        if x is not None:
            break
    else:
        raise InputError(
            "target",
            allowed="such that some direction has as many units on its side as on the frozen's",
            given="none found",
        )
    of_frozen, of_target = a @ x, b @ x
    # Sorted, positive meets positive, and large meets large.
    order = torch.empty_like(of_frozen, dtype=torch.long)
    order[of_frozen.argsort()] = of_target.argsort()
    scale = of_frozen / of_target[order]
    if not (scale.isfinite() & (scale > 0)).all():
        raise InputError(
            "hidden units",
            allowed="such that each reads something",
            given=f"one in block {l + 1} that does not",
        )
    return order, scale


def _balanced(
    a: Float[Tensor, "units m"], b: Float[Tensor, "units m"], generator: torch.Generator
) -> Float[Tensor, " m"] | None:
    """Look for a direction with equally many positive products with the rows of both."""
    u, v = (randomness.normal(generator, a.shape[1], dtype=a.dtype).to(a) for _ in range(2))
    rows = torch.cat([a, b])
    side = torch.cat([a.new_ones(len(a)), -b.new_ones(len(b))])
    # Each row changes sign once, at the angle where cos·(row u) + sin·(row v) = 0.
    along, across = rows @ u, rows @ v
    angle = torch.atan2(-along, across) % torch.pi
    turned = angle.argsort()
    steps = -2 * side * along.sign()
    counts = torch.cat([(side * along.sign()).sum()[None], steps[turned]]).cumsum(0)
    ends = torch.cat([angle.new_zeros(1), angle[turned], angle.new_full((1,), torch.pi)])
    widths = torch.where(counts == 0, ends.diff(), 0)
    if not widths.max() > 0:
        return None
    place = widths.argmax()
    middle = (ends[place] + ends[place + 1]) / 2
    return middle.cos() * u + middle.sin() * v
