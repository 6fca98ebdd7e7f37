"""Pairs of checkpoints, made here in minutes: a base, and what was tuned from it.

The base of the encoder is a real one. The decoders are small, but their weights are trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorapower import randomness
from records import language, models
from records import texts as sources

# Of the decoders: tokens in their vocabulary, to which texts are cut off, and their sizes.
VOCABULARY, TOKENS, WIDTH, BLOCKS = 2000, 64, 64, 4
END = "<end>"


def texts(kind: str, part: str) -> list[str]:
    """Read the rated sentences of a kind in a part, without ratings, those near neutral too."""
    return [text for (text,) in sources.read(f"{kind}-rating", sources.RATED, part).texts]


def encoder(folder: Path | str, *, samples: int = 640, epochs: int = 2, seed: int = 0) -> None:
    """Tune all weights of the packaged encoder to tell the sign of movie snippets, and save it.

    ``folder`` is a checkpoint like others, with the head of ``transformers``; its base is
    ``"packaged"``.
    """
    setting = language.Setting(
        problem=language.Problem(head="own", samples=samples, epochs=epochs, seed=seed),
        method=language.Whole(kind="full", learning_rate=2e-4),
    )
    language.tune(setting, lambda network: models.save(network, models.PACKAGED, folder))


def decoders(base: Path | str, tuned: Path | str, *, samples: int = 0, seed: int = 0) -> None:
    """Train a small GPT-2 on newspaper editorials, tune it on movie snippets, and save both.

    ``base`` and ``tuned`` are folders. Tokens are learned from both kinds of sentences, of each of
    which at most ``samples`` are used, 0 for all.
    """
    from transformers import DataCollatorForLanguageModeling, GPT2Config, GPT2LMHeadModel

    sentences = [texts(kind, "train")[: samples or None] for kind in ("editorials", "movies")]
    tokenizer = _learn_tokenizer([*sentences[0], *sentences[1]])
    end = tokenizer.convert_tokens_to_ids(END)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=TOKENS,
        n_embd=WIDTH,
        n_layer=BLOCKS,
        n_head=WIDTH // 16,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    with randomness.seeded(seed, "decoder"):
        network = GPT2LMHeadModel(config)
    for kind, epochs, rate, folder in zip(
        sentences, (2, 1), (3e-3, 1e-3), (base, tuned), strict=True
    ):
        tokens = tokenizer([END + text + END for text in kind], truncation=True)["input_ids"]
        models.train(
            network,
            [{"input_ids": each} for each in tokens],
            DataCollatorForLanguageModeling(tokenizer, mlm=False),
            seed=randomness.number(seed, "order of sentences"),
            learning_rate=rate,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
        )
        with models.quiet():
            network.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


def _learn_tokenizer(sentences: list[str]) -> Any:
    """Learn byte-pair encoding from the sentences."""
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
