"""The models that adapters are planned for: where their blocks are, and what their outputs mean."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

from ..errors import InputError

Task = Literal["classification", "language", "encoder"]
Kind: TypeAlias = Literal["attention", "mlp", "other"]
#: By ``model_type`` of transformers, where the equal blocks are in the model without its head.
BLOCKS = {
    "bert": "encoder.layer",
    "camembert": "encoder.layer",
    "roberta": "encoder.layer",
    "xlm-roberta": "encoder.layer",
    "distilbert": "transformer.layer",
    "gpt2": "h",
    "llama": "layers",
    "mistral": "layers",
    "phi3": "layers",
    "qwen2": "layers",
    "qwen3": "layers",
}
# What an architecture is for, by the end of its name.
TASKS: dict[str, Task] = {
    "ForSequenceClassification": "classification",
    "ForCausalLM": "language",
    "LMHeadModel": "language",
    "Model": "encoder",
}
#: ``task_type`` of an adapter in peft.
PEFT_TASKS: dict[Task, str] = {
    "classification": "SEQ_CLS",
    "language": "CAUSAL_LM",
    "encoder": "FEATURE_EXTRACTION",
}


class Family(NamedTuple):
    """An architecture: its class in transformers, what it is for, and where its blocks are."""

    architecture: str
    task: Task
    blocks: str


def family(config: Any, name: str) -> Family:
    """The family of a checkpoint with this configuration; ``name`` is the argument it came as.

    Raises `InputError`, by name, for a model type or an architecture that is not supported.
    """
    kind = config.model_type
    if kind not in BLOCKS:
        raise InputError(name, allowed=f"of type {', '.join(BLOCKS)}", given=f"type {kind!r}")
    given = (getattr(config, "architectures", None) or ["nothing"])[0]
    task = next((task for end, task in TASKS.items() if given.endswith(end)), None)
    if task is None:
        raise InputError(
            name,
            allowed=f"an architecture that ends in {', '.join(TASKS)}",
            given=given,
        )
    return Family(given, task, BLOCKS[kind])


def kind(module: str, blocks: str) -> Kind:
    """Of a module, by its name in the model without head: to which half of a block it belongs."""
    inside = module.removeprefix(f"{blocks}.")
    if inside == module:
        return "other"
    half = inside.partition(".")[2].partition(".")[0]
    return "attention" if half in ("attention", "attn", "self_attn") else "mlp"
