"""Small decoders of transformers with random numbers."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from lorapower import randomness


def decoder(name: str, heads: int = 2, groups: int = 2, *, seed: int = 0, **options: Any) -> Any:
    """Draw a decoder of a class in double precision, all numbers normal of deviation 0.4.

    It has two blocks with heads of 4, for keys and values in groups where the class has groups, and
    40 hidden units; ``options`` are others of its configuration.
    """
    kind: Any = getattr(transformers, name)
    sizes: dict[str, Any] = {"hidden_size": 4 * heads, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": 50}
    sizes |= dict.fromkeys(("intermediate_size", "n_inner"), 40) | {"max_position_embeddings": 32}
    sizes |= {"sliding_window": None, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    module = kind(kind.config_class(**sizes | options)).double().eval()
    generator = randomness.generator(seed, "decoder", name, "module")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * randomness.normal(generator, *parameter.shape))
    return module
