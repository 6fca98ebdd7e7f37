"""Pairs of checkpoints, made here in a minute: a base, and what was tuned from it.

The encoder's base is a real one. The decoders are small, but their weights are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import _checks, randomness
from .. import _hub as hub
from . import encoders
from . import texts as sources

# Of the decoders: tokens in their vocabulary, and to which texts are cut off.
VOCABULARY, TOKENS = 2000, 64
END = "<end>"


def texts(kind: str, part: str) -> list[str]:
    """The rated sentences of a kind in a part, without ratings, those near neutral too."""
    return [text for (text,) in sources.read(f"{kind}-rating", hub.RATED, part).texts]


def encoder(
    folder: Path | str, *, samples: int = 640, epochs: int = 2, rate: float = 2e-4, seed: int = 0
) -> None:
    """Tune all weights of the packaged encoder to tell the sign of movie snippets, and save it.

    ``folder`` is a checkpoint like others, with the head of ``transformers``; its base is
    ``"packaged"``. Raises `InputError` for what `encoders.measure` refuses.
    """
    place = _checks.path("folder", folder)
    problem = encoders.Problem(head="own", samples=samples, epochs=epochs, seed=seed)
    method = encoders.Whole(kind="full", learning_rate=rate)
    network = encoders.tune(encoders.Setting(problem=problem, method=method))
    _save(network, hub.tokenizer(hub.PACKAGED), place)


def decoders(
    base: Path | str,
    tuned: Path | str,
    *,
    kinds: tuple[str, str] = ("editorials", "movies"),
    samples: int = 0,
    epochs: tuple[int, int] = (2, 1),
    width: int = 64,
    layers: int = 4,
    seed: int = 0,
) -> None:
    """Train a small GPT-2 on sentences of one kind, tune it on another, and save both.

    ``base`` and ``tuned`` are folders. Tokens are learned from both kinds, of each of which at most
    ``samples`` training sentences are used, 0 for all. A head is 16 wide. Raises `InputError` for
    unusable sizes and kinds.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    places = [_checks.path(name, place) for name, place in (("base", base), ("tuned", tuned))]
    _checks.integer("width", width, 16)
    most = _checks.integer("samples", samples, 0) or None
    sentences = [texts(kind, "train")[:most] for kind in kinds]
    tokenizer = _learn_tokenizer([*sentences[0], *sentences[1]])
    end = tokenizer.convert_tokens_to_ids(END)
    with randomness.seeded(seed, "decoder"):
        network = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=TOKENS,
                n_embd=width,
                n_layer=_checks.integer("layers", layers, 1),
                n_head=width // 16,
                bos_token_id=end,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
    for kind, times, rate, place in zip(sentences, epochs, (3e-3, 1e-3), places, strict=True):
        _train(network, tokenizer, kind, _checks.integer("epochs", times, 1), rate, seed)
        _save(network, tokenizer, place)


def _learn_tokenizer(sentences: Sequence[str]) -> Any:
    """Byte-pair encoding learned from the sentences."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(
        sentences, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=learner._tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=TOKENS,
    )


def _train(
    network: Any, tokenizer: Any, sentences: Sequence[str], epochs: int, rate: float, seed: int
) -> None:
    """Teach a language model to tell each sentence's next tokens."""
    from transformers import DataCollatorForLanguageModeling, Trainer

    tokens = tokenizer([END + text + END for text in sentences], truncation=True)["input_ids"]
    hub.train(
        Trainer,
        network,
        [{"input_ids": each} for each in tokens],
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        learning_rate=rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        seed=randomness.number(seed, "order of sentences"),
    )


def _save(network: Any, tokenizer: Any, folder: Path) -> None:
    with hub.quiet():
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
