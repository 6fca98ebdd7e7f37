"""Decoders from modules of `transformers`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import _checks
from ..errors import InputError
from .attention import Settings
from .decoder import Decoder

M = TypeVar("M", bound=nn.Module)

# The package's names of activations by those of transformers.
_ACTIVATIONS: dict[str, Any] = {
    **{"relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu"},
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), "gelu_tanh"),
}
# The kinds that a block has once, and the vectors beside them.
_BESIDE = {"W_1": "b_1", "W_3": "b_3", "W_2": "b_2", "g_1": "s_1", "g_2": "s_2"}


class _Family(NamedTuple):
    """Where models of a family have blocks and a final norm, and blocks their layers by kind."""

    blocks: str
    final_norm: str
    layers: dict[str, str]


_GPT2_LAYERS = {
    **dict.fromkeys(("W_Q", "W_K", "W_V"), "attn.c_attn"),
    **{"W_O": "attn.c_proj", "W_1": "mlp.c_fc", "W_2": "mlp.c_proj"},
    **{"g_1": "ln_1", "g_2": "ln_2"},
}
_LLAMA_LAYERS = {
    **{f"W_{name}": f"self_attn.{name.lower()}_proj" for name in "QKVO"},
    **{"W_1": "mlp.gate_proj", "W_3": "mlp.up_proj", "W_2": "mlp.down_proj"},
    **{"g_1": "input_layernorm", "g_2": "post_attention_layernorm"},
}
_GPT2 = _Family("h", "ln_f", _GPT2_LAYERS)
_LLAMA = _Family("layers", "norm", _LLAMA_LAYERS)
_FAMILIES = {"gpt2": _GPT2, "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA}


class _Layer(NamedTuple):
    """A layer's weight, of rows for outputs, and its bias; or a norm's gain and shift.

    Both are views: what is written into them is written into the module.
    """

    weight: Tensor
    bias: Tensor | None

    def filled_bias(self) -> Tensor:
        """Get the bias, which is 0 where the layer has none."""
        return self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias

    def write(self, weight: Tensor, bias: Tensor, name: str) -> None:
        """Replace the numbers; a bias that the layer lacks must be 0."""
        self.weight.copy_(weight)
        if self.bias is not None:
            self.bias.copy_(bias)
        elif bias.any():
            allowed, norm = "0, as the module has no such vector", float(bias.norm())
            raise InputError(f"network's {name}", allowed=allowed, given=f"one of norm {norm:.2g}")


@torch.no_grad()
def from_decoder(module: nn.Module, *, final_norm: bool = True) -> Decoder:
    """Read the blocks and the final norm of a GPT-2, Llama, Mistral or Qwen2.

    ``network(z)`` is the module's last hidden state in evaluation; ``z.mT``, embeddings of tokens
    and, but for rotary ones, positions, enters the first block. The scale of scores is part of
    ``W_Q``. Biases of keys are left out without rotary positions, and those of values are added to
    ``b_O``: outputs stay. Each head has its own weights, so one rank for all weights gives each
    head of a packed matrix that rank. SmolLM2 is a Llama. Without ``final_norm`` outputs are those
    of the last block.

    Raises `InputError` for other modules, for numbers other than float32 and float64, for adapters
    that are not merged into the weights, and for settings that change blocks: scaled or partial
    rotary positions, windows shorter than the longest sequence.
    """
    family, blocks, final = _parts(module)
    config: Any = module.config
    rotary, heads = _rotary(config), int(config.num_attention_heads)
    read = [_read(_layers(family, block), heads, rotary is not None) for block in blocks]
    parameters = {kind: torch.stack([parts[kind] for parts in read]) for kind in read[0]}
    if final_norm:
        parameters |= {"g_f": final.weight, "s_f": final.filled_bias()}
    norm: Any = blocks[0].get_submodule(family.layers["g_1"])
    is_layer_norm = isinstance(norm, nn.LayerNorm)
    name = getattr(config, "activation_function", getattr(config, "hidden_act", ""))
    _checks.choice("module's activation", name, tuple(_ACTIVATIONS))
    settings = Settings(
        residual=True,
        norm="layer" if is_layer_norm else "rms",
        activation=_ACTIVATIONS[name],
        final_norm=final_norm,
        causal=True,
        gated="W_3" in parameters,
        rotary=rotary,
        eps=norm.eps if is_layer_norm else norm.variance_epsilon,
    )
    return Decoder(parameters, settings)


@torch.no_grad()
def to_decoder(network: Decoder, module: M) -> M:
    """Copy a module, and make its blocks and final norm compute what the network does.

    The module's embeddings, positions, head and type of numbers stay. Biases of values become 0,
    and so do those of keys without rotary positions. Where outputs have no bias, as in a Qwen2,
    biases of values make up ``b_O``. Raises `InputError` for batches, for a module that
    `from_decoder` refuses or that has other sizes or settings, and for vectors that are not 0, or
    not in reach, where the module has none.
    """
    _checks.single(network=network)
    other = from_decoder(module)
    for aspect in ("sizes", "settings"):
        given, needed = (getattr(one, aspect) for one in (other, network))
        if given != needed:
            raise InputError("module", allowed=f"of the network's {aspect}, {needed}", given=given)
    copy = deepcopy(module)
    family, blocks, final = _parts(copy)
    for l, block in enumerate(blocks):
        _write(_layers(family, block), network, l)
    final.write(network.g_f, network.s_f, "s_f")
    return copy


def _parts(module: Any) -> tuple[_Family, Any, _Layer]:
    """Find the family, the blocks and the final norm."""
    config: Any = getattr(module, "config", None)
    family = _FAMILIES.get(getattr(config, "model_type", ""))
    base: Any = getattr(module, "base_model", module)
    if family is None or not hasattr(base, family.blocks):
        allowed = "a GPT-2, Llama, Mistral or Qwen2 of transformers, perhaps with a head"
        raise InputError("module", allowed=allowed, given=type(module).__name__)
    if any(hasattr(part, "base_layer") for part in module.modules()):
        allowed = "without adapters beside its weights"
        remedy = "model.merge_and_unload() of peft adds them to the weights"
        raise InputError("module", allowed=allowed, given="some", remedy=remedy)
    # Where a model has these settings, they change what blocks compute.
    _require("scale_attn_weights", getattr(config, "scale_attn_weights", True), True)
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        _require(name, getattr(config, name, False), False)
    window, longest = getattr(config, "sliding_window", None), config.max_position_embeddings
    if window is not None and window < longest:
        allowed = f"with a sliding_window of None, or at least the longest sequence, {longest}"
        raise InputError("module", allowed=allowed, given=window)
    final = getattr(base, family.final_norm)
    return family, getattr(base, family.blocks), _Layer(final.weight, getattr(final, "bias", None))


def _require(name: str, given: Any, wanted: Any) -> None:
    if given != wanted:
        raise InputError("module", allowed=f"with {name} = {wanted}", given=given)


def _rotary(config: Any) -> float | None:
    """Read the base of rotary positions, if there are any."""
    rotary: Mapping[str, Any] | None = getattr(config, "rope_parameters", None)
    if rotary is None:
        return None
    _require("rope_type", rotary.get("rope_type", "default"), "default")
    _require("partial_rotary_factor", rotary.get("partial_rotary_factor") or 1.0, 1.0)
    return float(rotary["rope_theta"])


def _layers(family: _Family, block: nn.Module) -> dict[str, _Layer]:
    """Find the block's layers and norms by kind."""
    layers = {}
    for kind, place in family.layers.items():
        layer: Any = block.get_submodule(place)
        weight: Any = layer.weight
        bias: Any = getattr(layer, "bias", None)
        if family is _GPT2 and weight.ndim == 2:
            weight = weight.mT  # These layers have rows for inputs.
        if place == "attn.c_attn":
            weight, bias = (part.chunk(3)["QKV".index(kind[-1])] for part in (weight, bias))
        layers[kind] = _Layer(weight, bias)
    return layers


def _read(layers: Mapping[str, _Layer], heads: int, rotary: bool) -> dict[str, Tensor]:
    """Read a block's parameters."""
    attention = [layers[f"W_{name}"] for name in "QKVO"]
    Q, K, V, O = (layer.weight for layer in attention)
    b_Q, b_K, b_V, b_O = (layer.filled_bias() for layer in attention)
    size = len(Q) // heads
    groups, scale = len(K) // size, size**-0.5
    values = b_V.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0)
    parts = {
        "W_Q": scale * Q.unflatten(0, (heads, -1)),
        "W_K": K.unflatten(0, (groups, -1)),
        "W_V": V.unflatten(0, (groups, -1)),
        "W_O": O.unflatten(1, (heads, -1)).movedim(1, 0),
        "b_Q": scale * b_Q.unflatten(0, (heads, -1)),
        "b_O": b_O + O @ values.flatten(),
    }
    if rotary:
        parts["b_K"] = b_K.unflatten(0, (groups, -1))
    for kind in filter(layers.get, _BESIDE):
        parts |= {kind: layers[kind].weight, _BESIDE[kind]: layers[kind].filled_bias()}
    return parts


def _write(layers: Mapping[str, _Layer], network: Decoder, l: int) -> None:
    """Put the parameters of block ``l`` into a module's block."""
    parts = {kind: stack[l] for kind, stack in network.parameters.items() if kind[-1] != "f"}
    scale = network.sizes["query size"] ** 0.5
    b_V, b_O = torch.zeros_like(parts["W_V"][..., 0]), parts["b_O"]
    b_K = parts.get("b_K", torch.zeros_like(parts["W_K"][..., 0]))
    if layers["W_O"].bias is None and layers["W_V"].bias is not None:
        b_V, b_O = _through_values(network, l)
    W_Q, W_K, W_V = (parts[kind].flatten(0, 1) for kind in ("W_Q", "W_K", "W_V"))
    layers["W_Q"].write(scale * W_Q, scale * parts["b_Q"].flatten(), "b_Q")
    layers["W_K"].write(W_K, b_K.flatten(), "b_K")
    layers["W_V"].write(W_V, b_V.flatten(), "b_V")
    layers["W_O"].write(parts["W_O"].movedim(0, 1).flatten(1), b_O, "b_O")
    for kind in filter(layers.get, _BESIDE):
        layers[kind].write(parts[kind], parts[_BESIDE[kind]], _BESIDE[kind])


def _through_values(network: Decoder, l: int) -> tuple[Tensor, Tensor]:
    """Find biases of values that come nearest to ``b_O``, and what they leave of it."""
    O, b_O = network.W_O[l], network.b_O[l]
    # Heads of a group share their values.
    outputs = O.unflatten(0, (network.groups, -1)).sum(1).movedim(0, 1).flatten(1)
    values = torch.linalg.pinv(outputs) @ b_O
    missing = b_O - outputs @ values
    rounding = torch.finfo(b_O.dtype).eps ** 0.75 * torch.linalg.vector_norm(b_O)
    return values, torch.where(torch.linalg.vector_norm(missing) <= rounding, 0, missing)
