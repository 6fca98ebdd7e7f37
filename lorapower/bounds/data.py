"""What adapted networks miss on given inputs, to first order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jaxtyping import Float
from torch import Tensor
from torch.autograd.functional import jvp

from .. import _checks
from ..networks.base import Network
from ..networks.fnn import FNN
from ..networks.fnn import behind as behind_layer
from ..networks.linear import LinearNetwork
from ..networks.residual.network import ResidualTransformer
from ..networks.transformer import Transformer, fed_forward, mixed, scores
from ..networks.transformer import behind as behind_block


def first_order(
    adapted: Network, target: Network, inputs: Float[Tensor, "*batch width n"]
) -> Float[Tensor, ""]:
    """``E‖Σ_s J_s δ_s‖²`` over the variance of the target's outputs: an error to first order.

    ``δ_s`` is what segment ``s`` of the adapted network makes of the target's activations before
    it, less what the target's makes of them, and ``J_s`` the derivative of all that is behind ``s``
    in the adapted network, at the target's activations. A segment ends before a ReLU, a softmax,
    or the next block. Relative, like `constructions.fitted`'s errors; of linear networks exact. No
    finite number where the target's outputs do not vary on the inputs.

    Raises `InputError` for networks of two kinds or of different sizes.

    Source: [prop-first-order].

    Parameters
    ----------
    adapted, target : Network
        Networks of one kind and of equal sizes, one of each, such as those of a
        `constructions.fused.Fused`.
    inputs : Tensor
        Columns, of transformers sequences, as the networks take them.
    """
    _checks.kind(LinearNetwork, FNN, Transformer, ResidualTransformer, adapted=adapted)
    _checks.kind(type(adapted), target=target)
    _checks.same_sizes(adapted, target)
    x = target.as_inputs(inputs, "inputs")
    # Twice backward: forward, torch would compile what it deprecates.
    moved = sum(jvp(behind, at, missed)[1] for behind, at, missed in _pieces(adapted, target, x))
    return moved.square().mean() / variance(target(x))


def variance(outputs: Float[Tensor, "*samples out n"]) -> Float[Tensor, ""]:
    """The mean squared error of the best constant: each output's variance, and their mean.

    Over all samples and tokens. Raises `InputError` for numbers that are not finite.
    """
    y = _checks.real_tensor("outputs", outputs, min_dims=2)
    return y.movedim(-2, 0).flatten(1).var(-1, correction=0).mean()


# A function, where it is differentiated, and in which direction.
Piece = tuple[Callable[[Tensor], Tensor], Tensor, Tensor]


def _pieces(adapted: Network, target: Network, x: Tensor) -> Iterator[Piece]:
    if isinstance(adapted, Transformer):
        assert isinstance(target, Transformer)
        yield from _transformer(adapted, target, x)
    elif isinstance(adapted, ResidualTransformer):
        assert isinstance(target, ResidualTransformer)
        yield from _residual(adapted, target, x)
    elif isinstance(adapted, FNN):
        assert isinstance(target, FNN)
        z = x
        for l, p in enumerate(target.preactivations(x)):
            ours = adapted.weights[l] @ z + adapted.biases[l][:, None]
            yield lambda p, l=l: behind_layer(adapted, l, p), p, ours - p  # type: ignore[misc]
            z = p.relu()
    else:
        wanted = target(x)
        yield lambda p: p, wanted, adapted(x) - wanted


def _transformer(adapted: Transformer, target: Transformer, z: Tensor) -> Iterator[Piece]:
    for l in range(target.depth):
        attending = scores(target, l, z)
        hidden = mixed(target, l, z, attending)
        after = fed_forward(target, l, hidden)

        def by_scores(attending: Tensor, l: int = l, z: Tensor = z) -> Tensor:
            return by_hidden(mixed(adapted, l, z, attending), l)

        def by_hidden(hidden: Tensor, l: int = l) -> Tensor:
            return behind_block(adapted, l + 1, fed_forward(adapted, l, hidden))

        yield by_scores, attending, scores(adapted, l, z) - attending
        yield by_hidden, hidden, mixed(adapted, l, z, attending) - hidden
        yield (
            lambda z, l=l: behind_block(adapted, l + 1, z),  # type: ignore[misc]
            after,
            fed_forward(adapted, l, hidden) - after,
        )
        z = after
    wanted = target.W_out @ z
    yield lambda y: y, wanted, adapted.W_out @ z - wanted


def _residual(
    adapted: ResidualTransformer, target: ResidualTransformer, z: Tensor
) -> Iterator[Piece]:
    for l in range(target.depth):
        attending = target.scores(l, target.reads(z, "1", l))
        u = target.attended(l, z, target.patterns(attending))
        hidden = target.hidden(l, u)
        after = target.fed_forward(l, u, hidden)

        def by_scores(attending: Tensor, l: int = l, z: Tensor = z) -> Tensor:
            return by_tokens(adapted.attended(l, z, adapted.patterns(attending)), l)

        def by_tokens(u: Tensor, l: int = l) -> Tensor:
            return by_hidden(adapted.hidden(l, u), l, u)

        def by_hidden(hidden: Tensor, l: int = l, u: Tensor = u) -> Tensor:
            return adapted.behind(l + 1, adapted.fed_forward(l, u, hidden))

        yield by_scores, attending, adapted.scores(l, adapted.reads(z, "1", l)) - attending
        yield by_tokens, u, adapted.attended(l, z, target.patterns(attending)) - u
        yield by_hidden, hidden, adapted.hidden(l, u) - hidden
        yield (
            lambda z, l=l: adapted.behind(l + 1, z),  # type: ignore[misc]
            after,
            adapted.fed_forward(l, u, hidden) - after,
        )
        z = after
    wanted = target.ended(z)
    yield lambda y: y, wanted, adapted.ended(z) - wanted
