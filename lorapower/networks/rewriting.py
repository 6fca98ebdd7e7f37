"""The same function with other weights: hidden units, coordinates in heads, more units."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .. import _checks, randomness
from ..errors import InputError
from .transformer import SHAPES, Transformer

_SETTINGS = ("residual", "norm", "activation", "gated", "rotary")

# Below this an activation is 0 in double precision.
_SILENT = {"relu": 0.0, "gelu": 40.0, "gelu_tanh": 40.0, "silu": 760.0}


def align(target: Transformer, frozen: Transformer, *, seed: int = 0) -> Transformer:
    """Order and rescale the target's units, which saves one rank on every ``W_1`` and ``W_3``.

    On the sphere of normalized tokens ReLU units have normals ``a_k`` (frozen) and ``b_k``
    (target). Some ``x`` has as many positive ``a_k·x`` as ``b_k·x``. Paired by sign and rescaled by
    ``λ_k = a_k·x / b_k·x > 0``, all differences vanish on ``x``: ``W_1`` needs one rank less than
    normalized tokens have dimensions [thm-inner-rank]. In gated layers, with any activation,
    ``W_3`` is rescaled against ``W_2`` in the same way, with factors of either sign
    [thm-gated-rank]. The target's gains count. Raises `InputError` for networks that do not fit,
    for other activations unless gated, and where no ``x`` is found, as may be where normals of the
    target are parallel.
    """
    target.require_like(frozen, _SETTINGS, ("blocks", "width", "hidden"))
    _checks.single(target=target, frozen=frozen)
    _require_norms(target)
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
            for kind in _of_units(target):
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


def pack(target: Transformer, frozen: Transformer, *, seed: int = 0) -> Transformer:
    """Choose coordinates in the target's heads that leave packed weights less to change.

    A head is the same for ``G W_Q``, ``G^{-T} W_K``, and for ``G W_V``, ``W_O G^{-1}``. Here ``G``
    is such that with all heads in one matrix, as PEFT adapts them, target and frozen weights agree
    on as many directions as a head has coordinates, for three heads or more that fill the width:
    their differences, on what is read with the target's gains, have rank ``D − d`` [prop-packed].
    For two heads they agree on a third of the directions. Raises `InputError` for networks that do
    not fit, for batches, for grouped heads and rotary positions, and where ``G`` would be singular,
    as for a head of zeros.
    """
    target.require_like(frozen, _SETTINGS, ("blocks", "heads", "query size", "value size"))
    _checks.single(target=target, frozen=frozen)
    _require_norms(target)
    if target.settings.rotary is not None or target.groups < target.heads:
        words = "without rotary positions and with keys and values of its own for each head"
        raise InputError("target", allowed=words, given=target)
    generator = randomness.generator(_checks.seed(seed), "coordinates")
    parts, V = {kind: part.clone() for kind, part in target.parameters.items()}, target.basis()
    for l in range(target.depth):
        read = target.g_1[l][:, None] * V
        ours, theirs = (
            {kind: getattr(network, kind)[l] for kind in ("W_Q", "W_K", "W_V", "W_O")}
            for network in (frozen, target)
        )
        sides = [(w["W_Q"] @ read, (w["W_K"] @ read).mT) for w in (ours, theirs)]
        G = _coordinates(sides, generator)
        parts["W_Q"][l] = G @ theirs["W_Q"]
        parts["b_Q"][l] = (G @ target.b_Q[l][..., None])[..., 0]
        parts["W_K"][l] = torch.linalg.solve(G.mT, theirs["W_K"])
        sides = [(w["W_V"] @ read, w["W_O"]) for w in (ours, theirs)]
        G = _coordinates(sides, generator)
        parts["W_V"][l] = G @ theirs["W_V"]
        parts["W_O"][l] = torch.linalg.solve(G, theirs["W_O"], left=False)
    return Transformer(parts, target.settings)


def _coordinates(
    sides: Sequence[tuple[Tensor, Tensor]], generator: torch.Generator
) -> Float[Tensor, "heads size size"]:
    """Find ``G`` with which ``G Ȳ`` and ``X̄ G^{-1}`` are the frozen ones on some directions."""
    (Y, X), (Y_target, X_target) = sides
    heads, size, m = Y.shape
    n = X.shape[-2]
    apart = X_target @ Y_target - X @ Y
    # Directions that neither first head reads; or else any.
    inner = min(size, m - 2 * size)
    outer = min(size, n - (heads - 1) * inner)
    others, least = apart[1:], min(size, m // (heads + 1), n // (heads + 1))
    if min(inner, outer) >= max(least, 1):
        N = torch.linalg.svd(torch.cat([Y[0], Y_target[0]])).Vh[m - inner :].mT
    else:
        inner, outer = least, min(size, n - heads * least)
        drawn = randomness.normal(generator, m, inner, dtype=Y.dtype).to(Y)
        N, others = torch.linalg.qr(drawn)[0], apart
    images = (others @ N).movedim(0, 1).flatten(1)
    N_out = torch.linalg.svd(images).U[:, images.shape[1] :][:, :outer]
    # G A = B and Gᵀ C = F, which agree since N_outᵀ (X̄ Ȳ − X Y) N = 0.
    A, B, C, F = Y_target @ N, Y @ N, X.mT @ N_out, X_target.mT @ N_out
    noise = 1e3 * m * torch.finfo(Y.dtype).eps * torch.linalg.matrix_norm(Y_target)
    A_inverse = torch.linalg.pinv(A, atol=noise, rtol=torch.zeros_like(noise))
    C_inverse = torch.linalg.pinv(C.mT)
    identity = torch.eye(size, dtype=Y.dtype, device=Y.device)
    right, left = identity - A @ A_inverse, identity - C_inverse @ C.mT
    fixed = B @ A_inverse + C_inverse @ F.mT @ right
    scale = torch.linalg.matrix_norm(fixed, ord=2)[:, None, None]
    scale = torch.where(scale > 0, scale, 1)
    found = [fixed + scale * left @ right]
    for _ in range(8):
        turn = torch.linalg.qr(randomness.normal(generator, size, size, dtype=Y.dtype).to(Y))[0]
        found.append(fixed + scale * left @ turn @ right)
    trials = torch.stack(found, 1)
    best = torch.linalg.cond(trials).nan_to_num(torch.inf).argmin(1)
    chosen = trials[torch.arange(heads, device=best.device), best]
    values = torch.linalg.svdvals(chosen)
    if values.min() <= 1e3 * m * torch.finfo(Y.dtype).eps * values.max():
        raise InputError(
            "weights of heads",
            allowed="of full rank in frozen network and target",
            given=f"singular values of coordinates down to {float(values.min()):.1e}",
            remedy="perturb them",
        )
    return chosen


def enlarge(
    target: Transformer,
    frozen: Transformer,
    places: Sequence[int] | None = None,
) -> Transformer:
    """Give the target as many hidden units, heads and blocks as the frozen network has.

    New hidden units are the frozen ones, switched off by biases, since what they read is bounded;
    they need no rank. New heads have the frozen patterns and ``W_O W_V = 0``. New blocks are frozen
    ones with gains, shifts and biases 0: they pass tokens on, at no rank [prop-sizes]. The target's
    stand in the frozen ``places``, counted from 1, by default the first. The width stays; narrower
    tokens need a frozen ``ε`` smaller in proportion. Raises `InputError` for batches, a target
    larger than the frozen network, heads of another size, and wrong places.
    """
    _checks.single(target=target, frozen=frozen)
    _require_norms(target)
    if not target.settings.residual:
        raise InputError("target", allowed="with residual connections", given="none")
    sizes, larger = target.sizes, frozen.sizes
    for side in ("blocks", "heads", "hidden", "width"):
        if sizes[side] > larger[side]:
            allowed = f"at most {larger[side]}"
            raise InputError(f"target's {side}", allowed=allowed, given=sizes[side])
    settings = (*_SETTINGS, "final_norm", "causal")
    target.require_like(frozen, settings, ("query size", "value size"))
    of_target, of_frozen = (network.heads // network.groups for network in (target, frozen))
    if of_target != of_frozen:
        allowed = f"with {of_frozen} heads a group, like the frozen network"
        raise InputError("target", allowed=allowed, given=of_target)
    chosen = [
        _checks.integer("places", place, 1, frozen.depth, limit="the frozen blocks")
        for place in (range(1, target.depth + 1) if places is None else places)
    ]
    if len(chosen) != target.depth or any(a >= b for a, b in pairwise(chosen)):
        raise InputError("places", allowed=f"{target.depth} rising numbers of blocks", given=chosen)
    parts = {}
    for kind, stack in frozen.parameters.items():
        sides = SHAPES[kind]
        if "width" in sides:
            stack = stack.narrow(sides.index("width"), 0, target.width)
        parts[kind] = stack.clone()
        if kind in target.bias_kinds and kind not in ("b_Q", "b_K"):
            parts[kind].zero_()
    parts |= {kind: target.parameters[kind] for kind in ("g_f", "s_f") if kind in target.kinds}
    for k, place in enumerate(chosen):
        l = place - 1
        for kind in ("W_V", "W_O"):
            parts[kind][l].zero_()
        for kind in ("b_O", "b_2", "g_1", "s_1", "g_2", "s_2"):
            parts[kind][l] = target.parameters[kind][k]
        for kind in target.kinds:
            if kind in ("W_Q", "W_K", "b_Q", "b_K", "W_V", "W_O"):
                given = target.parameters[kind][k]
                parts[kind][l, : len(given)] = given
        ours, theirs = _units(frozen, l, target.width), _units(target, k, target.width)
        distances = (ours[:, None] - theirs).square().sum(-1)
        kept, units = map(torch.as_tensor, linear_sum_assignment(distances.cpu()))
        for kind in _of_units(target):
            parts[kind][l, kept] = target.parameters[kind][k, units]
        parts["W_2"][l][:, kept] = target.W_2[k][:, units]
        idle = torch.ones(larger["hidden"], dtype=torch.bool).to(target.device)
        idle[kept] = False
        rows, gain, shift = parts["W_1"][l, idle], parts["g_2"][l], parts["s_2"][l]
        normals = rows * gain
        if target.settings.norm == "layer":
            normals = normals - normals.mean(-1, keepdim=True)
        # Up to rounding, no more than this enters an idle unit.
        size = target.width**0.5 * torch.linalg.vector_norm(normals, dim=-1)
        most = size * (1 + 1e-9) + rows @ shift
        parts["b_1"][l, idle] = -most - _SILENT[target.settings.activation]
    return Transformer(parts, target.settings)


def _of_units(network: Transformer) -> list[str]:
    """List the kinds of parameters with a row for each hidden unit."""
    return [kind for kind in network.kinds if SHAPES[kind][:2] == ("blocks", "hidden")]


def _units(network: Transformer, l: int, width: int) -> Float[Tensor, "units n"]:
    """Collect the numbers of each unit of a block, in rows; of matrices the first columns."""
    parts = [network.parameters[kind][l] for kind in _of_units(network)]
    parts = [part[:, None] if part.ndim == 1 else part[:, :width] for part in parts]
    return torch.cat([*parts, network.W_2[l].mT[:, :width]], 1)


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


def _require_norms(target: Transformer) -> None:
    if target.settings.norm is None:
        raise InputError(
            "target", allowed="with norms, whose gains and spheres are used", given="none"
        )
