"""A comparison of adapters of a tuned language model, done once, with what each loses by text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorapower import _checks, randomness
from lorapower._records import unpack
from lorapower.checkpoints._measuring import ratio, upper_limit

if TYPE_CHECKING:
    import pandas as pd

# Tables of adapters, and of what they lose on each text.
TABLES = ("plans.csv", "plan-texts.csv")
# And what tuning changes, part by part.
PARTS = "parts.csv.gz"
# And adapters of one size.
SIZES = "sizes.csv.gz"
# What is summed over each text.
_SUMMED = ("squares", "effect", "equal", "divergence", "decisions")


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
        return pd.Series(_summarize(*(rows[name].to_numpy() for name in _SUMMED)))

    by_adapter: Any = texts.groupby(keys, sort=False)
    measured = by_adapter.apply(summarize, include_groups=False)
    return adapters.join(measured, on=keys), texts


def read_parts() -> pd.DataFrame:
    """What tunings of all weights of the packaged language model change, part by part.

    Three are of `read_record`; of ``movies-next``, which `read_sizes` has, there is no ``effect``.
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


def read_sizes(file: Path | str = "") -> pd.DataFrame:
    """Adapters of equal size of a language model: trained, extracted, shrunk, and cut.

    For each ``seed``, in the package's record 0, 3 and 4, the packaged model was tuned on the next
    tokens of movie snippets. All adapters but one way are nothing but factors of the blocks' linear
    layers; embeddings and norms are the base's, though full tuning changed them too. One that is
    made from another has at most as many parameters as the uniform ``rank`` in these layers.

    Parameters
    ----------
    file : Path or str
        A table that ``records/sizes.py`` wrote; without, that of the package.

    Returns
    -------
    table : DataFrame
        A row for each network. Its ``way`` is

        - ``trained`` at this rank, on all linear layers, or (seed 0) ``attention``,
          ``feed-forward`` or ``queries and keys`` alone, with about as many parameters as rank 4 on
          all; ``full``, or ``full again``, with another seed; the ``base``; or ``blocks``, which
          has all that full tuning changed in these layers, and the base's embeddings and norms;
        - from full tuning, ``extracted`` by method ``effect`` of `METHODS`, ``svd`` by ``uniform``,
          ``extracted whole`` by ``effect`` too, with factors of embeddings and norms as tuned;
        - from the adapter trained at rank 64, ``shrunk`` by ``effect``, ``cut`` by ``uniform``,
          and ``cut by norm`` by ``energy``.

        ``squares``, ``effect``, ``equal``, ``divergence`` and ``decisions`` are arrays over 256
        held-out texts, the same for all, as in `read_record`, against the full tuning of the same
        seed; ``error``, ``error_upper``, ``agreement`` and ``kl`` are computed from them. With
        ``_64`` they are against the adapter trained at rank 64, for the base and what is made from
        that adapter. ``losses`` of all test texts are another array, in nats a token, and ``loss``
        is their mean. ``parameters`` counts numbers that are not the base's; ``seconds`` were spent
        on choosing factors, by ``effect`` also on derivatives, once for each seed and source.
    """
    import pandas as pd

    table = pd.read_csv(_checks.path("file", file)) if file else _read(SIZES)
    names = [name + end for name in ("squares", "equal", "divergence") for end in ("", "_64")]
    names += ["decisions", "losses"]
    table[names] = table[names].map(unpack, na_action="ignore")
    for end in ("", "_64"):
        bases = table[table.way == "base"].set_index("seed")[f"squares{end}"]
        table[f"effect{end}"] = table.seed.map(bases)
        rows = table[table[f"squares{end}"].notna()]
        names = [*(f"{name}{end}" for name in _SUMMED[:-1]), "decisions"]
        found = [_summarize(*each) for each in rows[names].itertuples(index=False)]
        table = table.join(pd.DataFrame(found, rows.index).add_suffix(end))
    return table.assign(loss=table.losses.map(np.mean))


def _summarize(
    squares: NDArray[np.float64],
    effect: NDArray[np.float64],
    equal: NDArray[np.float64],
    divergence: NDArray[np.float64],
    decisions: NDArray[np.float64],
) -> dict[str, float]:
    number = decisions.sum()
    return {
        "error": ratio(squares, effect),
        "error_upper": upper_limit(squares, effect),
        "agreement": float(equal.sum() / number),
        "kl": float(divergence.sum() / number),
    }


def _read(name: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(Path(__file__).parent / name)


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
