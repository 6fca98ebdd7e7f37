"""Residual transformers from modules of `transformers`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
# Where a block has its projections, layers and norms.
_LLAMA = {
    **{name: f"self_attn.{name.lower()}_proj" for name in "QKVO"},
    **{"1": "mlp.gate_proj", "3": "mlp.up_proj", "2": "mlp.down_proj"},
    **{"norm 1": "input_layernorm", "norm 2": "post_attention_layernorm"},
}
_PLACES = {
    "gpt2": {
        **dict.fromkeys("QKV", "attn.c_attn"),
        **{"O": "attn.c_proj", "1": "mlp.c_fc", "2": "mlp.c_proj"},
        **{"norm 1": "ln_1", "norm 2": "ln_2"},
    },
    "opt": {
        **_LLAMA,
        **{"O": "self_attn.out_proj", "1": "fc1", "2": "fc2"},
        **{"norm 1": "self_attn_layer_norm", "norm 2": "final_layer_norm"},
    },
    **dict.fromkeys(("llama", "mistral", "qwen2"), _LLAMA),
}
del _PLACES["opt"]["3"]
# What the settings of a family have to be.
_SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "opt": {"do_layer_norm_before": True, "layer_norm_elementwise_affine": True},
}
_FAMILIES = (
    "GPT2Model, OPTModel, LlamaModel, MistralModel or Qwen2Model of transformers, or one with a "
    "head"
)

# A layer's weight, of rows for outputs, and its bias, open to writing; a norm's gain and shift.
_Layer = tuple[Tensor, Tensor | None]


class DoublePrecision(TorchFunctionMode):
    """A context in which modules compute in double precision what they force to single.

    Those of transformers do so with norms, positions and, without a fused kernel, the softmax:
    a module built and run within it, after ``module.double()``, has all digits.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = Tensor.double if func is Tensor.float else func
        named = {name: widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(widened, args), **named)


def from_decoder(
    module: nn.Module, *, dtype: torch.dtype | None = None, final_norm: bool = True
) -> Transformer:
    """Read the blocks and the final norm of a GPT-2, OPT, Llama, Mistral or Qwen2.

    ``network(z)`` is the module's last hidden state in evaluation; ``z.mT``, embeddings of tokens
    and, but for rotary ones, positions, enters the first block. The scale of scores is part of
    ``W_Q``. Biases of keys are left out without rotary positions, and those of values are added to
    ``b_O``: outputs stay. Each head has its own weights, so one rank for all weights gives each
    head of a packed matrix that rank. SmolLM2 is a Llama.

    ``dtype`` converts all numbers, which are otherwise float32 or float64; the rounding of less
    precise ones, such as bfloat16's, then counts as rank. Without ``final_norm`` outputs are those
    of the last block.

    Raises `InputError` for other modules, for post-norm ones, for adapters that are not merged into
    the weights, and for settings that change blocks:
    scaled or partial rotary positions, windows shorter than the longest sequence, projections
    around the blocks.
    """
    kind, blocks, final = _parts(module)
    final = final if _checks.flag("final_norm", final_norm) else None
    config: Any = module.config
    heads = int(config.num_attention_heads)
    rotary = _rotary(config)
    stacks: dict[str, list[Tensor]] = {}
    for block in blocks:
        for name, value in _read(_layers(kind, block), heads, rotary is not None).items():
            stacks.setdefault(name, []).append(value.detach())
    values: dict[str, Any] = {name: torch.stack(parts) for name, parts in stacks.items()}
    if final is not None:
        gain, shift = _filled((final.weight, getattr(final, "bias", None)))
        values |= {"g_f": gain.detach(), "s_f": shift.detach()}
    if dtype is not None:
        values = {name: value.to(_checks.precision(dtype)) for name, value in values.items()}
    elif (given := values["W_Q"].dtype) not in (torch.float32, torch.float64):
        raise InputError(
            "module",
            allowed="of float32 or float64",
            given=given,
            remedy="dtype=torch.float32 converts what is read",
        )
    norm = blocks[0].get_submodule(_PLACES[kind]["norm 1"])
    is_layer = isinstance(norm, nn.LayerNorm)
    return Transformer(
        **values,
        residual=True,
        norm="layer" if is_layer else "rms",
        activation=_activation(config),
        final_norm=final is not None,
        causal=True,
        gated="W_3" in values,
        rotary=rotary,
        eps=norm.eps if is_layer else norm.variance_epsilon,
    )


@torch.no_grad()
def to_decoder(network: Transformer, module: M) -> M:
    """A copy of a module whose blocks and final norm compute what the network does.

    The module's embeddings, positions, head and type of numbers stay. Biases of values become 0,
    and so do those of keys without rotary positions. Where outputs have no bias, as in a Qwen2,
    biases of values make up ``b_O``. Raises `InputError` for batches, for a module that
    `from_decoder` refuses or that has other sizes or settings, and for vectors that are not 0, or
    not in reach, where the module has none.
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
    for l, block in enumerate(blocks):
        _write(_layers(kind, block), network, l)
    if final is not None:
        place = (final.weight, getattr(final, "bias", None))
        _put(place, network.g_f, network.s_f, "s_f")
    return copy


def _parts(module: Any) -> tuple[str, Any, Any]:
    """The family, the blocks and the final norm or ``None``."""
    if not isinstance(module, nn.Module) or not hasattr(module, "config"):
        raise InputError("module", allowed=_FAMILIES, given=type(module).__name__)
    if any(hasattr(part, "base_layer") for part in module.modules()):
        raise InputError(
            "module",
            allowed="without adapters beside its weights",
            given=f"{type(module).__name__} with some",
            remedy="model.merge_and_unload() of peft adds them to the weights",
        )
    base: Any = getattr(module, "base_model", module)
    config: Any = module.config
    kind = getattr(config, "model_type", None)
    base = getattr(base, "decoder", base) if kind == "opt" else base
    blocks = getattr(base, "h" if kind == "gpt2" else "layers", None)
    if kind not in _PLACES or blocks is None:
        raise InputError(
            "module",
            allowed=_FAMILIES,
            given=f"{type(module).__name__}, of type {kind!r}",
            remedy="other families differ: they norm what they have added (post-norm), read side "
            "by side, turn a part of queries and keys, scale gains otherwise, or choose experts",
        )
    for name, value in _SETTINGS.get(kind, {}).items():
        _require(name, getattr(config, name, value), value)
    if kind == "opt":
        _require("word_embed_proj_dim", config.word_embed_proj_dim, config.hidden_size)
    window, longest = getattr(config, "sliding_window", None), config.max_position_embeddings
    if window is not None and window < longest:
        allowed = f"with a sliding_window of None, or at least the longest sequence, {longest}"
        remedy = "setting None changes nothing for sequences that are shorter than the window"
        raise InputError("module", allowed=allowed, given=window, remedy=remedy)
    final = {"gpt2": "ln_f", "opt": "final_layer_norm"}.get(kind, "norm")
    return kind, blocks, getattr(base, final)


def _require(name: str, given: Any, wanted: Any) -> None:
    if given != wanted:
        raise InputError("module", allowed=f"with {name} = {wanted}", given=given)


def _activation(config: Any) -> Any:
    name = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
    if name not in _ACTIVATIONS:
        raise InputError("module", allowed=f"with one of {', '.join(_ACTIVATIONS)}", given=name)
    return _ACTIVATIONS[name]


def _rotary(config: Any) -> float | None:
    """The base of rotary positions, if there are any."""
    rotary: Mapping[str, Any] | None = getattr(config, "rope_parameters", None)
    if rotary is None:
        return None
    _require("rope_type", rotary.get("rope_type", "default"), "default")
    _require("partial_rotary_factor", rotary.get("partial_rotary_factor") or 1.0, 1.0)
    return float(rotary["rope_theta"])


def _layers(kind: str, block: nn.Module) -> dict[str, _Layer]:
    """The block's layers and norms by name: ``Q`` to ``O``, ``1`` to ``3``, ``norm 1``, ``norm 2``.

    Views, so that what is written into them is written into the block.
    """
    found: dict[str, _Layer] = {}
    for name, place in _PLACES[kind].items():
        layer: Any = block.get_submodule(place)
        weight: Any = layer.weight
        bias: Any = getattr(layer, "bias", None)
        if kind == "gpt2" and weight.ndim == 2:
            # These layers keep their matrices as rows for inputs.
            weight = weight.mT
        if place.endswith("c_attn"):
            weight, bias = (part.chunk(3)["QKV".index(name)] for part in (weight, bias))
        found[name] = weight, bias
    return found


def _filled(layer: _Layer) -> tuple[Tensor, Tensor]:
    """A layer's weight and its bias, which is 0 where it has none."""
    weight, bias = layer
    return weight, weight.new_zeros(len(weight)) if bias is None else bias


def _read(layers: Mapping[str, _Layer], heads: int, rotary: bool) -> dict[str, Tensor]:
    """A block's parameters."""
    (Q, b_Q), (K, b_K), (V, b_V), (O, b_O) = (_filled(layers[name]) for name in "QKVO")
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
    for name in {"1", "2", "3"} & {*layers}:
        parts[f"W_{name}"], parts[f"b_{name}"] = _filled(layers[name])
    for name in "12":
        parts[f"g_{name}"], parts[f"s_{name}"] = _filled(layers[f"norm {name}"])
    return parts


def _write(layers: Mapping[str, _Layer], network: Transformer, l: int) -> None:
    """Put the parameters of block ``l`` into a module's block."""
    parts = {kind: stack[l] for kind, stack in network.parts.items() if kind[-1] != "f"}
    scale = network.sizes["query size"] ** 0.5
    none = torch.zeros_like(network.W_V[l, ..., 0])
    b_O, values = parts["b_O"], none
    if layers["O"][1] is None and layers["V"][1] is not None:
        values, b_O = _through_values(network, l)
    _put(layers["Q"], scale * parts["W_Q"].flatten(0, 1), scale * parts["b_Q"].flatten(), "b_Q")
    b_K = parts.get("b_K", torch.zeros_like(network.W_K[l, ..., 0]))
    _put(layers["K"], parts["W_K"].flatten(0, 1), b_K.flatten(), "b_K")
    _put(layers["V"], parts["W_V"].flatten(0, 1), values.flatten(), "b_V")
    _put(layers["O"], parts["W_O"].movedim(0, 1).flatten(1), b_O, "b_O")
    for name in {"1", "2", "3"} & {*layers}:
        _put(layers[name], parts[f"W_{name}"], parts[f"b_{name}"], f"b_{name}")
    for name in "12":
        _put(layers[f"norm {name}"], parts[f"g_{name}"], parts[f"s_{name}"], f"s_{name}")


def _through_values(network: Transformer, l: int) -> tuple[Tensor, Tensor]:
    """Biases of values that come nearest to ``b_O``, and what they leave of it."""
    O, b_O = network.W_O[l], network.b_O[l]
    # Heads of a group share their values.
    outputs = O.unflatten(0, (network.groups, -1)).sum(1).movedim(0, 1).flatten(1)
    values = torch.linalg.pinv(outputs) @ b_O
    left = b_O - outputs @ values
    noise = torch.finfo(b_O.dtype).eps ** 0.75 * torch.linalg.vector_norm(b_O)
    return values, torch.where(torch.linalg.vector_norm(left) <= noise, 0, left)


def _put(layer: _Layer, weight: Tensor, bias: Tensor, name: str) -> None:
    """Write a layer; a bias that it lacks must be 0."""
    layer[0].copy_(weight)
    if layer[1] is not None:
        layer[1].copy_(bias)
    elif bias.any():
        raise InputError(
            f"network's {name}",
            allowed="0, as the module has no such vector",
            given=f"one of norm {float(torch.linalg.vector_norm(bias)):.2g}",
        )
