"""Pairs of checkpoints, made here in minutes: a base, and what was tuned from it.

The bases of the encoder and the language model are real ones. The decoders are small, but their
weights are trained, unless they are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorapower import _checks, randomness
from lorapower.checkpoints import _libraries
from lorapower.checkpoints import _models as hub
from lorapower.errors import InputError
from records import models

from . import language as runs
from . import texts as sources

# Of the decoders: tokens in their vocabulary, and to which texts are cut off.
VOCABULARY, TOKENS = 2000, 64
END = "<end>"
# Learning rates of a language model, for all weights and for adapters.
RATES = (5e-5, 4e-4)


def texts(kind: str, part: str) -> list[str]:
    """The rated sentences of a kind in a part, without ratings, those near neutral too."""
    return [text for (text,) in sources.read(f"{kind}-rating", sources.RATED, part).texts]


def encoder(
    folder: Path | str, *, samples: int = 640, epochs: int = 2, rate: float = 2e-4, seed: int = 0
) -> None:
    """Tune all weights of the packaged encoder to tell the sign of movie snippets, and save it.

    ``folder`` is a checkpoint like others, with the head of ``transformers``; its base is
    ``"packaged"``. Raises `InputError` for what `runs.measure` of experiments refuses.
    """
    place = _checks.path("folder", folder)
    problem = runs.Problem(head="own", samples=samples, epochs=epochs, seed=seed)
    method = runs.Whole(kind="full", learning_rate=rate)
    setting = runs.Setting(problem=problem, method=method)
    runs.tune(setting, lambda network: _save(network, hub.tokenizer(hub.PACKAGED), place))


def language(
    folder: Path | str,
    *,
    base: str = hub.LANGUAGE,
    kind: str = "movies",
    steps: int = 100,
    rank: int = 0,
    rate: float | None = None,
    seed: int = 0,
) -> None:
    """Tune a language model to tell the next tokens of sentences of a kind, and save it.

    A step takes 8 sentences, cut off after 64 tokens, by AdamW without weight decay; the rate rises
    for 10 steps and falls linearly. Passes are in bfloat16 where the processor has it.

    Parameters
    ----------
    folder : Path or str
        Gets a checkpoint with all its weights, or, with a ``rank``, an adapter of peft.
    base : str
        The packaged language model, a folder, a file in GGUF, or a name on the hub.
    kind : str
        Of the rated sentences: ``"editorials"``, ``"movies"``, ``"products"`` or ``"tweets"``.
    rank : int
        0 tunes all weights; else all linear modules of blocks get adapters of this rank by LoRA.
    rate : float, optional
        Learning rate; 5e-5 for all weights and 4e-4 for adapters unless given.

    Raises `InputError` for unusable arguments and for a base that cannot be loaded.
    """
    from transformers import DataCollatorForSeq2Seq

    place = _checks.path("folder", folder)
    _checks.integer("steps", steps, 1)
    _checks.integer("rank", rank, 0)
    rate = RATES[rank > 0] if rate is None else _checks.positive("rate", rate)
    sentences = texts(kind, "train")
    tokenizer, network = hub.tokenizer(base), models.language(base)
    end = tokenizer.eos_token
    if end is None:
        allowed = "with a tokenizer that has a token to end with"
        raise InputError("base", allowed=allowed, given=base)
    tokenizer.pad_token = tokenizer.pad_token or end
    tokenizer.padding_side = "right"
    if rank:
        network = _with_adapters(network, rank, seed)
    found = tokenizer([text + end for text in sentences], truncation=True, max_length=TOKENS)
    _train(
        network,
        # Labels of their own, since padding is told from the end by them alone.
        [{"input_ids": tokens, "labels": tokens} for tokens in found["input_ids"]],
        DataCollatorForSeq2Seq(tokenizer),
        seed,
        learning_rate=rate,
        max_steps=steps,
        warmup_steps=10,
        per_device_train_batch_size=8,
        **models.passes(),
    )
    if rank:
        network.peft_config["default"].base_model_name_or_path = hub.public_name(base)
        # Asks the hub otherwise whether words were added.
        _save(network, tokenizer, place, save_embedding_layers=False)
    else:
        _save(network, tokenizer, place)


def _with_adapters(network: Any, rank: int, seed: int) -> Any:
    """Give all linear modules of a language model's blocks adapters of a rank, by peft."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with randomness.seeded(seed, "factors of a language model"), _libraries.quiet():
        return get_peft_model(network, config)


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
    from transformers import DataCollatorForLanguageModeling, GPT2Config, GPT2LMHeadModel

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
        tokens = tokenizer([END + text + END for text in kind], truncation=True)["input_ids"]
        _train(
            network,
            [{"input_ids": each} for each in tokens],
            DataCollatorForLanguageModeling(tokenizer, mlm=False),
            seed,
            learning_rate=rate,
            num_train_epochs=_checks.integer("epochs", times, 1),
            per_device_train_batch_size=32,
        )
        _save(network, tokenizer, place)


def drawn(name: str, *, seed: int = 0, purpose: str = "module", **options: Any) -> Any:
    """Draw a small decoder of ``transformers`` in double precision, for evaluation.

    ``name`` is a class, such as ``"LlamaModel"``, and ``options`` are its configuration's: by
    default two blocks of width 24 with 6 heads, for keys and values in 2 groups where the class has
    groups, 40 hidden units, and no sliding window. All numbers are normal of deviation 0.4. Raises
    `InputError` for other names.
    """
    _libraries.require("checkpoints", "transformers")
    import transformers

    kind: Any = getattr(transformers, name, None)
    if not hasattr(kind, "config_class"):
        raise InputError("name", allowed="a class of transformers, such as LlamaModel", given=name)
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 32}
    sizes |= dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 40)
    sizes |= {"sliding_window": None, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    sizes |= options
    sizes = {"word_embed_proj_dim": sizes["hidden_size"]} | sizes
    module = kind(kind.config_class(**sizes)).double().eval()
    generator = randomness.generator(seed, "decoder", name, purpose)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * randomness.normal(generator, *parameter.shape))
    return module


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


def _train(network: Any, samples: Sequence[Any], collator: Any, seed: int, **options: Any) -> None:
    """Teach a language model to tell each sentence's next tokens."""
    from transformers import Trainer

    order = randomness.number(seed, "order of sentences")
    models.train(Trainer, network, samples, collator, seed=order, **options)


def _save(network: Any, tokenizer: Any, folder: Path, **options: Any) -> None:
    with _libraries.quiet():
        network.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
