"""Long runs, done once: `read` gives tables of language models, `sweep` those of chapters.

The commands ``again``, ``plans`` and ``parts`` of this folder make the tables beside them; each
keeps its runs by `lorapower.experiments.sweeps.run` in one file of a folder. ``pairs`` has what the
command prints.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lorapower import book
from lorapower.errors import InputError
from lorapower.experiments import sweeps

_HERE = Path(__file__).parent
TABLES = sorted(file.name.removesuffix(".csv.gz") for file in _HERE.glob("*.csv.gz"))
# What is compared on each text.
_COMPARED = ("squares", "effect", "equal", "divergence", "decisions")


def read(name: str) -> pd.DataFrame:
    """Read a recorded table.

    ``"movies"`` and ``"decoder"`` have a row for each training, as `sweeps.run` gives it: the
    fields of `language.TextRun` and `language.TextResults`, where ``answers`` is for `unpack`.
    ``"movies"`` is the task of this name with the packaged encoder, ``"decoder"`` has all tasks of
    the packaged language model. Rows with ``part`` ``"validation"`` are of the search for rates,
    with one seed and fewer samples, the others of the comparison, all on one thread.

    ``"rates"`` has what chose rates of ``"decoder"`` again, as ``rates.md`` says: the runs at the
    rates used before, and a run of all weights repeated. Rows without a ``seed`` are means of runs
    that were not kept, on a processor with bfloat16: of seeds 0 to 2 on the validation part, where
    rates were chosen, and of seeds 0 to 7 at these rates on the test part.

    ``"recipes"`` has a row for each training on the task of sentences by a recipe of peft at rank
    4, or at rank 16 of the adapter that Chapter 12 advises and with PEFT's default scale, as
    ``recipes.md`` says: the fields of `language.TextRun` and `again.RecipeResults`.

    ``"facts"`` has a row for each training on random facts: the fields of `facts.FactRun` and
    `facts.FactResults`, where ``losses`` is for `unpack`. ``facts.md`` says which there are.

    ``"plans"`` has a row for each adapter of four ``tuning`` of the packaged language model: all
    weights tuned on one kind of sentences, or an adapter trained. ``method`` is ``mergekit``, one
    of the `RULES` of other tools in `neighbours`, ``effect`` or ``uniform``, or ``least`` and one
    of these for the fewest parameters with the error ``asked``, on texts for choosing. Otherwise
    ``asked`` is the uniform rank whose parameters in blocks were the limit. ``plans.md`` says
    which other tools were run.
    Other tools' adapters, and those ``of blocks``, have factors for these alone, and embeddings
    that tuning changed are carried whole. ``parameters`` counts factors, ``carried`` all
    numbers of the file, of size ``bytes``; ``seconds`` were spent on this adapter alone, after
    texts were passed. Arrays over held-out texts are ``squares``, ``‖f̂ − f̄‖²``; ``effect``,
    ``‖f_0 − f̄‖²``; ``equal`` next tokens, their ``divergence``, and their number, ``decisions``.
    Where ``variation`` is recorded, it is their total variation. ``error``, ``agreement`` and
    ``kl``, as in `Measured`, are computed from these. Adapters by effect
    were planned thoroughly.

    ``"parts"`` has what the tunings of all weights of ``"plans"`` change. A row has a ``value`` for
    a ``tuning``, a ``block`` (-1 for all), a ``part``, ``"attention"``, ``"mlp"`` or a weight
    (empty for all), and a ``quantity``. By ``stage``:

    - ``weights``: how many singular values of changes ``nine`` tenths of the squared norm need,
      how many are above a thousandth of the largest (``numerical``), and how many ``directions``
      there are.
    - ``heads``, of one tuning [thm-every-network]: for ``scores`` and ``values``, by how many
      singular values above a thousandth of the largest the heads of a block differ at least
      (``numerical``); in all blocks, how many pairs of a head of the base and one of the tuned
      model are ``dependent``, and may differ by less than the full rank; the largest ``cosine`` of
      two tuned heads, and their ``shortest`` vector of scores over the median.
    - ``turns``, on tokens of sentences: the cosine by which a block, or all, ``turn`` tokens.
    - ``effect``, on held-out sentences: adapters of so many ``directions`` by a ``part``, of the
      largest singular values of all changes (``norm``), of one ``rank`` everywhere, and chosen by
      ``effect`` with multipliers; embeddings and norms are as tuned, with ``none`` of them too.
      Their ``error`` and ``agreement`` are those of `Measured`; ``unshifted`` is the error if what
      they lose, and the effect, are taken without their means over tokens, one shift of the logits.
      Of the squared effect this shift is ``alike``. The ``smallest`` found loses at most ``√.1`` on
      other sentences, with so many directions ``taken`` of a weight, and ``smallest unshifted`` so
      much without the shift. Also the ``error`` if only a half is as tuned; how many directions
      have, ``alone``, nine tenths of what a weight's adds, squared, to first order; and of what the
      blocks lose with rank 1 everywhere, to first order, the ``product`` of each with each (in
      ``part``) and the sum of squares over weights (``apart``), in units of the squared effect.

    ``precision`` is the one in which tunings were made.

    ``"commands"`` has a row for each command of the quick start on the example of seed 0: its
    ``name`` and what it ``printed``, its ``seconds`` beside another process, its ``memory`` in
    gigabytes, and the megabytes of weights ``read``, of the tuned model or adapter, and
    ``written``. ``python -m records.pairs`` makes it.

    ``"costs"`` has a row for each ``command`` that ``benchmarks/plans.py`` timed on made-up models
    of a ``size``: the number of ``texts`` and their ``tokens``, ``threads``, ``seconds``,
    ``processor`` seconds, and in gigabytes the ``memory`` at most, files that the system keeps
    mapped included, the ``limit`` that the system set to it, the memory that a plan ``announced``,
    and what it said it would ``read``. Values for 8 billion weights were read off while it ran.

    Raises `InputError` for other names.
    """
    if name not in TABLES:
        raise InputError("name", allowed=f"one of {', '.join(TABLES)}", given=repr(name))
    texts: dict[str, type] = {"changes": str, "revision": str}  # also where all are empty
    return complete(pd.read_csv(_HERE / f"{name}.csv.gz", dtype=texts))


def sweep(
    name: str,
    settings: Sequence[Any],
    work: Callable[[list[Any]], Sequence[Any]],
    results: Path | None,
    profile: str,
    *,
    protocol: str,
    repeat: int | Sequence[int] = 0,
) -> pd.DataFrame:
    """Give the runs of a chapter's sweep from ``sweeps/NAME.jsonl.gz``, as `sweeps.recorded` does.

    In profile paper they are made again, on as many processors as the chapter may take, or on the
    dask cluster at the address in the environment's ``DASK_SCHEDULER_ADDRESS``.
    """
    with _processors():
        return sweeps.recorded(
            _HERE / "sweeps" / f"{name}.jsonl.gz",
            settings,
            work,
            results,
            protocol=protocol,
            again=profile == "paper",
            repeat=repeat,
        )


@contextmanager
def _processors() -> Iterator[None]:
    if "DASK_SCHEDULER_ADDRESS" in os.environ:
        from distributed import Client

        with Client(), joblib.parallel_config("dask"):
            yield
    else:
        with joblib.parallel_config("loky", n_jobs=book.THREADS, inner_max_num_threads=1):
            yield


def complete(table: pd.DataFrame) -> pd.DataFrame:
    """Unpack arrays over texts, where a table has them, and compute what `read` says of them."""
    if "squares" not in table:
        return table.fillna({"changes": "", "revision": ""})
    there = [*_COMPARED, "variation"]
    texts = table[there]
    table[there] = texts.mask(texts == "").map(unpack, na_action="ignore")
    sums = (table[name].map(np.sum).astype(float) for name in _COMPARED)
    squares, effect, equal, divergence, decisions = sums
    table["error"] = np.sqrt(squares / effect)
    table["agreement"] = equal / decisions
    table["kl"] = divergence / decisions
    return table


def pack(values: ArrayLike) -> str:
    """Write numbers, in single precision, as a text that a result can be."""
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def unpack(text: str) -> NDArray[np.float64]:
    """Read the numbers that `pack` was given."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)
