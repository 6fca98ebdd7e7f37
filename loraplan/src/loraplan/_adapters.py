"""A tuned model that is a base with an adapter of peft on it, read like a checkpoint."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from ._errors import InputError
from ._lowrank import LowRank
from ._models import (
    LOG,
    PEFT_CONFIG,
    Checkpoint,
    Rows,
    find,
    listed,
    public_name,
    quiet,
    reason,
)

# Entries of the configuration that make LoRA something other than W + s B A.
_VARIANTS = "use_dora use_qalora use_bdlora kasa_config monteclora_config arrow_config "
_VARIANTS += "alora_invocation_tokens layer_replication target_parameters"
# With these starts peft changes the base's weights when it loads an adapter.
_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_HEADS = (".classifier.weight", ".classifier.out_proj.weight", ".score.weight")


@contextmanager
def staying() -> Iterator[dict[str, Any]]:
    """Let peft put an adapter into an empty network, and keep its numbers where they are.

    It would move them to the device of the base's weights, which are on none. Yields its options.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    moves = "_move_adapter_to_device_of_base_layer"
    before = getattr(BaseTunerLayer, moves)
    setattr(BaseTunerLayer, moves, lambda *_, **__: None)
    try:
        yield {"low_cpu_mem_usage": True}
    finally:
        setattr(BaseTunerLayer, moves, before)


def variant(config: Any) -> tuple[str, ...]:
    """Why an adapter of peft is no LoRA, ``W + s B A``, on the base's own weights, to refuse it."""
    allowed = "an adapter by LoRA, W + s B A"
    remedy = "merge it into its base if peft can (merge_and_unload), save that and name it"
    kind = getattr(config.peft_type, "value", None)
    if kind != "LORA":
        return allowed, f"of type {kind}", remedy
    if variants := [entry for entry in _VARIANTS.split() if getattr(config, entry, None)]:
        return allowed, f"of another kind ({listed(variants)})", remedy
    start = str(config.init_lora_weights).lower()
    if start.startswith(_STARTS):
        allowed = "an adapter that leaves the base's weights as they are"
        remedy = "save it with path_initial_model_for_weight_conversion of peft"
        return allowed, f"started by {start}, which changes them", remedy
    return ()


def is_adapter(name: str, source: str | Path) -> bool:
    """Whether a folder, or a name on the hub, is an adapter of peft."""
    return (find(name, str(source)) / PEFT_CONFIG).is_file()


def read_config(name: str, source: str, folder: Path) -> Any:
    """Read the configuration of an adapter."""
    from peft import PeftConfig

    try:
        with quiet():
            return PeftConfig.from_pretrained(str(folder))
    except (KeyError, OSError, TypeError, ValueError) as error:
        given = f"the adapter {source!r}, with which it fails ({reason(error)})"
        raise InputError(name, f"an adapter whose {PEFT_CONFIG} peft reads", given) from error


def named_base(source: str | Path) -> str:
    """Find the base that an adapter names."""
    about = read_config("standin", str(source), find("standin", str(source)))
    if not about.base_model_name_or_path:
        remedy = "name the base before it"
        raise InputError("standin", "one that names its base", str(source), remedy)
    return str(about.base_model_name_or_path)


class OneSidedError(InputError):
    """An adapter changes one of two weights that are one in the base."""


class MergedCheckpoint:
    """A base with an adapter of peft on it, read like a `Checkpoint`.

    A head that the base lacks is the adapter's own.
    """

    def __init__(self, base: Checkpoint, source: str, folder: Path, name: str = "tuned") -> None:
        from peft import load_peft_weights

        self.base, self.source, self._name = base, source, name
        #: Where the tokenizer is.
        self.folder = folder if (folder / "tokenizer_config.json").is_file() else base.folder
        self._about = read_config(name, source, folder)
        if why := variant(self._about):
            raise self._refuse(*why)
        try:
            tensors = load_peft_weights(str(folder), device="cpu", local_files_only=True)
        except (EOFError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            given = f"whose file is missing or damaged ({reason(error)})"
            raise self._refuse("an adapter with its weights", given) from error
        for key, tensor in tensors.items():
            if bad := int((~tensor.isfinite()).sum()):
                given = f"whose {key} has {bad} entries that are NaN or infinite"
                remedy = "take a checkpoint from before that"
                raise self._refuse("an adapter of finite numbers", given, remedy)
        # With bias="all" peft writes those of saved modules twice more, and never reads them.
        self._tensors = {
            key: tensor.float()
            for key, tensor in tensors.items()
            if ".modules_to_save." not in key and ".original_module." not in key
        }
        self._warn_of_base()
        self.config: Any = self._choose_architecture()
        # What the adapter changes: factors of parameters, or other values for them.
        self._factors: dict[str, LowRank] = {}
        self._values: dict[str, Tensor] = {}
        # Parameters that are kept as [in, out].
        self._transposed: set[str] = set()

    def _refuse(self, allowed: str, given: str, remedy: str = "") -> InputError:
        return InputError(self._name, allowed, f"the adapter {self.source!r}, {given}", remedy)

    def _warn_of_base(self) -> None:
        """Say so if the adapter names another base."""
        base, given = self.base, self._about.base_model_name_or_path
        sources = base.source, public_name(base.source)
        names = {_last_part(name) for name in (*sources, getattr(base.config, "_name_or_path", ""))}
        same = not given or Path(given).resolve() == base.folder.resolve()
        if not same and _last_part(given) not in names:
            said = "The adapter %r names another base, %r: is it that one by another name?"
            LOG.warning(said, self.source, given)

    def _choose_architecture(self) -> Any:
        """The base's configuration with the architecture and the labels of the adapter."""
        import transformers
        from transformers.models.auto import modeling_auto as auto

        config = copy.deepcopy(self.base.config)
        kinds: dict[str, Mapping[str, Any]] = {
            "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "FEATURE_EXTRACTION": auto.MODEL_MAPPING_NAMES,
        }
        # Classes of a head that the adapter brings.
        labels = next((len(v) for key, v in self._tensors.items() if key.endswith(_HEADS)), 0)
        task = self._about.task_type or ("SEQ_CLS" if labels else "")
        if not task and (body := kinds["FEATURE_EXTRACTION"].get(config.model_type)):
            # Names that begin with that of the body are of a network with a head: the base's.
            start = f"base_model.model.{getattr(transformers, body).base_model_prefix}."
            if not any(key.startswith(start) for key in self._tensors):
                task = "FEATURE_EXTRACTION"
        if task and task not in kinds:
            raise self._refuse(f"an adapter of a task_type among {', '.join(kinds)}", f"of {task}")
        # Other types of models are refused with the base's own architecture.
        if task and (architecture := kinds[task].get(config.model_type)):
            config.architectures = [architecture]
        if labels and labels != config.num_labels:
            # Which forgets the labels' names.
            config.num_labels = labels
        return config

    def _wrap(self, network: Any) -> Any:
        """Have peft put the adapter into an empty network."""
        from peft import PeftModel, set_peft_model_state_dict

        fitting = f"an adapter for {type(network).__name__} of the base"
        try:
            with staying() as options:
                wrapped: Any = PeftModel(network, self._about, **options)
                found: Any = set_peft_model_state_dict(wrapped, self._tensors, **options)
        except KeyError as error:
            remedy = "train it with that in modules_to_save, or name a base that has it"
            raise self._refuse(fitting, f"without {error.args[0]}", remedy) from error
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            # The first line of torch's names no parameter.
            lines = str(error).strip().splitlines()
            given = f"which does not fit ({lines[min(1, len(lines) - 1)].strip()})"
            remedy = "name the base that it is for, with the vocabulary that it had in training"
            raise self._refuse(fitting, given, remedy) from error
        if unknown := found.unexpected_keys:
            own = self._about.base_model_name_or_path
            remedy = f"name its own base, {own!r}, or correct its task_type"
            raise self._refuse(fitting, f"with {listed(unknown)}, which it lacks", remedy)
        if missing := [key for key in found.missing_keys if ".lora_" in key]:
            raise self._refuse("an adapter with all its factors", f"without {listed(missing)}")
        return wrapped.base_model.model

    def fit(self, network: Any) -> None:
        """Find all changes, with an empty network of transformers, which is used up."""
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
        from transformers.pytorch_utils import Conv1D

        head, words = network.get_output_embeddings(), network.get_input_embeddings()
        tied = head is not None and head.weight is words.weight
        self._transposed = {
            f"{name}.weight"
            for name, module in network.named_modules()
            if isinstance(module, Conv1D | nn.Embedding)
        }
        with quiet():
            wrapped = self._wrap(network)
        shared = [wrapped.get_input_embeddings(), wrapped.get_output_embeddings()] * tied
        sides = [s for s in shared if isinstance(s, LoraLayer | ModulesToSaveWrapper)]
        if len(sides) == 1 or (sides and not self._about.ensure_weight_tying):
            allowed = "an adapter that changes embeddings and head as one, as they are in the base"
            alone = "embeddings" if sides[0] is shared[0] else "the head"
            remedy = "train with ensure_weight_tying=True, or save the base with a head of its own "
            remedy += "(tie_word_embeddings=False) and name that"
            given = f"the adapter {self.source!r}, which changes {alone} alone"
            raise OneSidedError(self._name, allowed, given, remedy)
        for name, module in wrapped.named_modules():
            if isinstance(module, LoraLayer):
                (A, B), scale = module_factors(module), module.scaling["default"]
                if A.any() and B.any():
                    self._factors[f"{name}.weight"] = LowRank(scale * B.detach(), A.detach().mT)
                if getattr(self._about, "lora_bias", False):
                    if not self.base.has(f"{name}.bias"):
                        given = f"with lora_bias on {name}, which has no bias"
                        remedy = "train it without lora_bias"
                        raise self._refuse("an adapter that can be merged", given, remedy)
                    shift = scale * module.lora_B["default"].get_parameter("bias").detach()
                    self._values[f"{name}.bias"] = self.base.read(f"{name}.bias") + shift
            elif isinstance(module, ModulesToSaveWrapper):
                for part, value in module.modules_to_save["default"].named_parameters():
                    self._keep_value(f"{name}.{part}", value)
            elif isinstance(module, TrainableTokensWrapper) and self.has(f"{name}.weight"):
                one: Any = module.token_adapter
                key = f"{name}.weight"
                rows = torch.tensor(one.token_indices["default"])
                others = one.trainable_tokens_delta["default"].detach()
                self._keep_value(key, self.base.read(key).index_copy(0, rows, others))
        saved = re.compile(r"\.(lora_|modules_to_save|original_)")
        for name, value in wrapped.named_parameters():
            if name.endswith(".bias") and not saved.search(name):
                self._keep_value(name.replace(".base_layer.", "."), value)
        if self._name == "tuned" and not (self._factors or self._values):
            given, remedy = "of which nothing is left", "name one that was trained"
            raise self._refuse("an adapter that changes the base", given, remedy)

    def _keep_value(self, name: str, value: Tensor) -> None:
        """Keep another value of a parameter, or one that the base lacks, if the file has it."""
        if not value.is_meta and not (self.base.has(name) and value.equal(self.base.read(name))):
            self._values[name] = value.detach()

    def has(self, key: str) -> bool:
        """Whether there is a tensor of this name."""
        return key in self._values or self.base.has(key)

    def read(self, name: str, rows: Rows = None) -> Tensor:
        """Read one tensor, or some of its rows, in float32."""
        if name in self._values:
            return self._values[name] if rows is None else self._values[name][rows]
        value = self.base.read(name, rows)
        if name in self._factors:
            change = self._factors[name].mT if name in self._transposed else self._factors[name]
            left = change.left if rows is None else change.left[rows]
            value = value + left @ change.right.mT
        return value

    def update(self, key: str, shape: tuple[int, int]) -> LowRank | None:
        """The factors of a module's change, of rank 0 for none; ``None`` if it has another one."""
        if key in self._values:
            return None
        return self._factors.get(key, LowRank(*(torch.zeros(side, 0) for side in shape)))


def module_factors(module: Any) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """Find the factors ``A`` and ``B`` of a module that peft has wrapped, ``ΔW = B A``."""
    if isinstance(module.base_layer, nn.Embedding):
        return module.lora_embedding_A["default"], module.lora_embedding_B["default"]
    return module.lora_A["default"].weight, module.lora_B["default"].weight


def _last_part(source: str) -> str:
    """The last part of a checkpoint's name, also of a folder in the cache of the hub."""
    parts = [part for part in re.split(r"[/\\]", source) if part]
    cached = next((part for part in parts if part.startswith("models--")), None)
    return (cached.rpartition("--")[2] if cached else (parts or [""])[-1]).casefold()
