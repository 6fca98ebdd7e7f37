"""Residual transformers from modules of `transformers`, and back."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _checks
from ..errors import InputError
from .transformer import Transformer

M = TypeVar("M", bound=nn.Module)

# The package's names of activations by those of transformers.
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
_FAMILIES = "GPT2Model or OPTModel of transformers, or one with a head"


def from_decoder(
    module: nn.Module, *, dtype: torch.dtype | None = None, final_norm: bool = True
) -> Transformer:
    """Read the blocks and the final norm of a GPT-2 or OPT as a network of tokens.

    ``network(z)`` is the module's last hidden state in evaluation; ``z.mT``, embeddings of tokens
    and positions, enters the first block. The scale of scores is part of ``W_Q``. Biases of keys
    are left out, and those of values are added to ``b_O``: outputs stay. Each head has its own
    weights, so one rank for all weights gives each head of a packed matrix that rank.

    ``dtype`` converts all numbers, which are float32 or float64; in double precision the rounding
    of single precision counts as rank. Without ``final_norm`` outputs are those of the last block.
    Raises `InputError` for other modules, for post-norm ones, and for settings that change blocks.
    """
    kind, blocks, final = _parts(module)
    final = final if _checks.flag("final_norm", final_norm) else None
    read = {"gpt2": _gpt2_block, "opt": _opt_block}[kind]
    config: Any = module.config
    heads = int(config.num_attention_heads)
    stacks: dict[str, list[Tensor]] = {}
    for block in blocks:
        for name, value in read(block, heads).items():
            stacks.setdefault(name, []).append(value.detach())
    values: dict[str, Any] = {name: torch.stack(parts) for name, parts in stacks.items()}
    if final is not None:
        values |= {"g_f": final.weight.detach(), "s_f": final.bias.detach()}
    if dtype is not None:
        values = {name: value.to(_checks.precision(dtype)) for name, value in values.items()}
    return Transformer(
        **values,
        residual=True,
        norm="layer",
        activation=_activation(config),
        final_norm=final is not None,
        causal=True,
        eps=_first_norm(blocks[0]).eps,
    )


@torch.no_grad()
def to_decoder(network: Transformer, module: M) -> M:
    """A copy of a GPT-2 or OPT whose blocks and final norm compute what the network does.

    The module's embeddings, positions, head and type of numbers stay. Biases of keys and values
    become 0. Raises `InputError` for batches, and for a module that `from_decoder` refuses or that
    has other sizes or settings.
    """
    _checks.single(network=network)
    other = from_decoder(module)
    if other.sizes != network.sizes:
        raise InputError("module", allowed=f"of sizes {network.sizes}", given=other.sizes)
    if other.settings != network.settings:
        raise InputError(
            "module", allowed=f"with {network.settings}, like the network", given=other.settings
        )
    copy = deepcopy(module)
    kind, blocks, final = _parts(copy)
    write = {"gpt2": _write_gpt2, "opt": _write_opt}[kind]
    for l, block in enumerate(blocks):
        write(block, network, l)
    if final is not None:
        final.weight.copy_(network.g_f)
        final.bias.copy_(network.s_f)
    return copy


def _parts(module: Any) -> tuple[str, Any, Any]:
    """The family, the blocks and the final norm or ``None``."""
    if not isinstance(module, nn.Module) or not hasattr(module, "config"):
        raise InputError("module", allowed=_FAMILIES, given=type(module).__name__)
    base = getattr(module, "base_model", module)
    config: Any = module.config
    kind = getattr(config, "model_type", None)
    if kind == "gpt2" and hasattr(base, "h"):
        _require(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
        _require(config, add_cross_attention=False)
        return kind, base.h, base.ln_f
    if kind == "opt" and hasattr(base, "decoder"):
        base = base.decoder
    if kind == "opt" and hasattr(base, "layers"):
        _require(config, do_layer_norm_before=True, enable_bias=True)
        _require(config, layer_norm_elementwise_affine=True)
        return kind, base.layers, base.final_layer_norm
    raise InputError(
        "module",
        allowed=_FAMILIES,
        given=f"{type(module).__name__}, of type {kind!r}",
        remedy="blocks that norm what they have added (post-norm) or gate what they pass on differ",
    )


def _require(config: Any, **wanted: bool) -> None:
    for name, value in wanted.items():
        if getattr(config, name, value) != value:
            raise InputError("module", allowed=f"with {name} = {value}", given=not value)


def _activation(config: Any) -> Any:
    name = getattr(config, "activation_function", None)
    if name not in _ACTIVATIONS:
        raise InputError("module", allowed=f"with one of {', '.join(_ACTIVATIONS)}", given=name)
    return _ACTIVATIONS[name]


def _first_norm(block: Any) -> Any:
    return block.ln_1 if hasattr(block, "ln_1") else block.self_attn_layer_norm


def _headed(weights: list[Tensor], biases: list[Tensor], heads: int) -> dict[str, Tensor]:
    """Weights of rows (out, in) and biases of queries, values and outputs, cut into heads."""
    Q, K, V, O = weights
    b_Q, b_V, b_O = biases
    scale = (len(Q) // heads) ** -0.5
    return {
        "W_Q": scale * Q.unflatten(0, (heads, -1)),
        "W_K": K.unflatten(0, (heads, -1)),
        "W_V": V.unflatten(0, (heads, -1)),
        "W_O": O.unflatten(1, (heads, -1)).movedim(1, 0),
        "b_Q": scale * b_Q.unflatten(0, (heads, -1)),
        "b_O": b_O + O @ b_V,
    }


def _norms(first: Any, second: Any) -> dict[str, Tensor]:
    return {"g_1": first.weight, "s_1": first.bias, "g_2": second.weight, "s_2": second.bias}


def _gpt2_block(block: Any, heads: int) -> dict[str, Tensor]:
    attention, mlp = block.attn, block.mlp
    # These layers keep their matrices as rows for inputs.
    packed, bias = attention.c_attn.weight.mT.chunk(3), attention.c_attn.bias.chunk(3)
    weights = [*packed, attention.c_proj.weight.mT]
    parts = _headed(weights, [bias[0], bias[2], attention.c_proj.bias], heads)
    parts |= {"W_1": mlp.c_fc.weight.mT, "b_1": mlp.c_fc.bias}
    parts |= {"W_2": mlp.c_proj.weight.mT, "b_2": mlp.c_proj.bias}
    return parts | _norms(block.ln_1, block.ln_2)


def _opt_block(block: Any, heads: int) -> dict[str, Tensor]:
    own = block.self_attn
    weights = [part.weight for part in (own.q_proj, own.k_proj, own.v_proj, own.out_proj)]
    biases = [part.bias for part in (own.q_proj, own.v_proj, own.out_proj)]
    parts = _headed(weights, biases, heads)
    parts |= {"W_1": block.fc1.weight, "b_1": block.fc1.bias}
    parts |= {"W_2": block.fc2.weight, "b_2": block.fc2.bias}
    return parts | _norms(block.self_attn_layer_norm, block.final_layer_norm)


def _attention(network: Transformer, l: int) -> dict[str, Tensor]:
    """Weights and biases of queries, keys, values and outputs, all heads together."""
    size = network.sizes["query size"] ** 0.5
    zeros = torch.zeros_like(network.b_Q[l].flatten())
    return {
        "Q": size * network.W_Q[l].flatten(0, 1),
        "K": network.W_K[l].flatten(0, 1),
        "V": network.W_V[l].flatten(0, 1),
        "O": network.W_O[l].movedim(0, 1).flatten(1),
        "b_Q": size * network.b_Q[l].flatten(),
        "zeros": zeros,
        "b_O": network.b_O[l],
    }


def _write_norms(first: Any, second: Any, network: Transformer, l: int) -> None:
    for norm, name in ((first, "1"), (second, "2")):
        norm.weight.copy_(getattr(network, f"g_{name}")[l])
        norm.bias.copy_(getattr(network, f"s_{name}")[l])


def _write_gpt2(block: Any, network: Transformer, l: int) -> None:
    part, attention, mlp = _attention(network, l), block.attn, block.mlp
    attention.c_attn.weight.copy_(torch.cat([part["Q"], part["K"], part["V"]]).mT)
    attention.c_attn.bias.copy_(torch.cat([part["b_Q"], part["zeros"], part["zeros"]]))
    attention.c_proj.weight.copy_(part["O"].mT)
    attention.c_proj.bias.copy_(part["b_O"])
    for layer, name in ((mlp.c_fc, "1"), (mlp.c_proj, "2")):
        layer.weight.copy_(getattr(network, f"W_{name}")[l].mT)
        layer.bias.copy_(getattr(network, f"b_{name}")[l])
    _write_norms(block.ln_1, block.ln_2, network, l)


def _write_opt(block: Any, network: Transformer, l: int) -> None:
    part, own = _attention(network, l), block.self_attn
    for layer, weight, bias in (
        (own.q_proj, part["Q"], part["b_Q"]),
        (own.k_proj, part["K"], part["zeros"]),
        (own.v_proj, part["V"], part["zeros"]),
        (own.out_proj, part["O"], part["b_O"]),
        (block.fc1, network.W_1[l], network.b_1[l]),
        (block.fc2, network.W_2[l], network.b_2[l]),
    ):
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    _write_norms(block.self_attn_layer_norm, block.final_layer_norm, network, l)
