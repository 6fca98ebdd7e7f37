"""A comparison of adapters of a tuned language model, done once, with what each loses by text."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import randomness
from ._measuring import ratio, upper_limit

if TYPE_CHECKING:
    import pandas as pd

# Tables of adapters, and of what they lose on each text.
TABLES = ("plans.csv", "plan-texts.csv")
# And what tuning changes, part by part.
PARTS = "parts.csv.gz"


def read_record() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Adapters of tunings of the packaged language model, and what they lose on each text.

    Returns
    -------
    adapters : DataFrame
        A row for each adapter. ``tuning`` is the kind of sentences of ``pairs.language``, or of the
        adapter that it trained; ``method`` is another tool's name, one of `METHODS`, or
        ``least effect`` and ``least uniform`` for the fewest parameters with the error ``asked``,
        on texts for choosing. Else ``asked`` is the uniform rank whose number of parameters in
        blocks was the limit. With ``of blocks`` only these have factors, and embeddings that tuning
        changed are carried as a whole. ``parameters`` counts factors, ``carried`` all numbers of
        the file; ``seconds`` were spent on this adapter alone, after texts were passed. Then come
        ``error``, ``error_upper``, ``agreement`` and ``kl`` as in `Measured`, recomputed from the
        other table, and versions.
    texts : DataFrame
        A row for each adapter and held-out text: ``squares``, ``‖f̂ − f̄‖²``; ``effect``,
        ``‖f_0 − f̄‖²``; equal next tokens, their divergence, and their number, ``decisions``.
    """
    import pandas as pd

    adapters, texts = (_read(f"{name}.gz") for name in TABLES)
    keys = ["tuning", "method", "asked"]

    def summarize(rows: Any) -> pd.Series[float]:
        squares, effect = rows.squares.to_numpy(), rows.effect.to_numpy()
        number = rows.decisions.sum()
        return pd.Series(
            {
                "error": ratio(squares, effect),
                "error_upper": upper_limit(squares, effect),
                "agreement": rows.equal.sum() / number,
                "kl": rows.divergence.sum() / number,
            }
        )

    by_adapter: Any = texts.groupby(keys, sort=False)
    measured = by_adapter.apply(summarize, include_groups=False)
    return adapters.join(measured, on=keys), texts


def read_parts() -> pd.DataFrame:
    """What three tunings of all weights of the packaged language model change, part by part.

    A row has a ``value`` for a ``tuning``, a ``block`` (-1 for all), a ``part``, ``"attention"``,
    ``"mlp"`` or a weight (empty for all), and a ``quantity``; versions follow. By ``stage``:

    - ``weights``: how many singular values of changes ``half`` and ``nine`` tenths of the squared
      norm need, how many are above a thousandth of the largest (``numerical``), and how many
      ``directions`` there are.
    - ``floors``, on tokens of sentences: the norm that a part has ``added``, over the token's own,
      and the cosine by which a block, or all, ``turn`` tokens. ``floor`` is the share of the
      variance of one block's change that the other part cannot make up: for ``"attention"`` what
      is not affine in what the feed-forward layer reads [prop-floor-attention], for ``"mlp"`` what
      other tokens decide in attention [prop-floor-feed-forward]. ``far floor`` is the share of all
      blocks' change, both parts, for far tokens with directions as behind this block. ``free`` is
      the share of a change's squared norm that other weights of the same function would save.
    - ``effect``, on held-out sentences: the ``error`` if only a part is as tuned; ``none`` and
      ``few`` with the names of `Measured` for no module's change, and for the smallest adapter
      found that loses at most ``√.1`` on other sentences, with so many directions ``taken``. Of
      the squared effect, what is one shift, ``alike`` at all tokens. And how many singular
      directions have, ``alone``, nine tenths of what a weight's adds, squared, to first order.
    """
    return _read(PARTS)


def _read(name: str) -> pd.DataFrame:
    import pandas as pd

    with resources.as_file(resources.files(__package__) / name) as path:
        return pd.read_csv(path)


def measure_coverage(
    squares: NDArray[np.float64],
    effect: NDArray[np.float64],
    *,
    texts: int,
    draws: int = 20,
    seed: int = 0,
) -> tuple[float, float]:
    """How often the limit ``error_upper`` of `Measured` holds, for errors as these are.

    Parameters
    ----------
    squares, effect : array [n]
        ``‖f̂ − f̄‖²`` and ``‖f_0 − f̄‖²`` of texts.
    texts : int
        How many of them the limit is computed from.
    draws : int
        How often these are drawn.

    Returns
    -------
    others : float
        The share of draws without replacement in which the limit is at least the error of all
        texts that were not drawn, which is itself an estimate.
    all : float
        The share of draws with replacement in which it is at least the error of all texts, the
        truth for such draws.
    """
    draw = np.random.default_rng(randomness.number(seed, "coverage"))
    whole = ratio(squares, effect)
    held = np.zeros(2)
    for _ in range(draws):
        order = draw.permutation(len(squares))
        some, rest = order[:texts], order[texts:]
        limit = upper_limit(squares[some], effect[some], seed=seed)
        held[0] += limit >= ratio(squares[rest], effect[rest])
        again = draw.integers(len(squares), size=texts)
        held[1] += upper_limit(squares[again], effect[again], seed=seed) >= whole
    others, everywhere = held / draws
    return float(others), float(everywhere)
