"""A tuned model that is a base with adapters of peft on it, read like a checkpoint."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import _checks
from ..errors import InputError
from ..lowrank import LowRank
from ._models import PEFT_CONFIG, Checkpoint, find, listed, public_name, quiet, reason

# Entries of the configuration that make LoRA something other than W + s B A.
_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
)
# With these starts peft changes the base's weights when it loads an adapter.
_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_HEADS = (".classifier.weight", ".classifier.out_proj.weight", ".score.weight")
# Part of a change below which it counts as rounding.
_ROUNDING = 1e-6


class _PeftAdapter:
    """The configuration and the tensors of one adapter of peft."""

    def __init__(self, source: str, folder: Path) -> None:
        from peft import PeftConfig, load_peft_weights

        self.source, self.folder = source, folder
        try:
            with warnings.catch_warnings(action="ignore"):
                self.config: Any = PeftConfig.from_pretrained(str(folder))
        except (KeyError, OSError, TypeError, ValueError) as error:
            allowed = f"an adapter whose {PEFT_CONFIG} peft reads"
            raise self.refuse(allowed, f"with which it fails ({reason(error)})") from error
        self._require_plain()
        try:
            tensors = load_peft_weights(str(folder), device="cpu", local_files_only=True)
        except (EOFError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            given = f"whose file is missing or damaged ({reason(error)})"
            raise self.refuse("an adapter with its weights", given) from error
        for key, tensor in tensors.items():
            if bad := int((~tensor.isfinite()).sum()):
                given = f"whose {key} has {bad} entries that are NaN or infinite"
                remedy = "take a checkpoint from before that"
                raise self.refuse("an adapter of finite numbers", given, remedy)
        # With bias="all" peft writes those of saved modules twice more, and never reads them.
        self.tensors = {
            key: tensor.float()
            for key, tensor in tensors.items()
            if ".modules_to_save." not in key and ".original_module." not in key
        }
        #: The number of classes of a head that the adapter brings.
        self.labels = next((len(v) for key, v in self.tensors.items() if key.endswith(_HEADS)), 0)

    def refuse(self, allowed: str, given: str, remedy: str = "") -> InputError:
        """Make the error for this adapter."""
        given = f"the adapter {self.source!r}, {given}"
        return InputError("tuned", allowed=allowed, given=given, remedy=remedy)

    def _require_plain(self) -> None:
        """Refuse what is not LoRA, ``W + s B A``, on the base's own weights."""
        config = self.config
        allowed = "an adapter by LoRA, W + s B A"
        remedy = "merge it into its base if peft can (merge_and_unload), save that and name it"
        kind = getattr(config.peft_type, "value", None)
        if kind != "LORA":
            raise self.refuse(allowed, f"of type {kind}", remedy)
        if variants := [entry for entry in _VARIANTS if getattr(config, entry, None)]:
            raise self.refuse(allowed, f"of another kind ({listed(variants)})", remedy)
        start = str(config.init_lora_weights).lower()
        if start.startswith(_STARTS):
            raise self.refuse(
                "an adapter that leaves the base's weights as they are",
                f"started by {start}, which changes them",
                "save it with path_initial_model_for_weight_conversion of peft",
            )

    def require_base(self, base: Checkpoint) -> None:
        """Refuse an adapter for a base of another name."""
        given = self.config.base_model_name_or_path
        sources = base.source, public_name(base.source)
        names = {_last_part(name) for name in (*sources, getattr(base.config, "_name_or_path", ""))}
        same = not given or Path(given).resolve() == base.folder.resolve()
        if not same and _last_part(given) not in names:
            raise self.refuse(
                f"an adapter for the base, {base.source!r}",
                f"made for {given!r}",
                "name that base, or say that both are the same (--any-base, any_base=True)",
            )

    def merge(self, network: Any) -> dict[str, LowRank]:
        """Have peft merge the adapter into a network; return the factors that it has merged."""
        from peft import PeftModel, set_peft_model_state_dict
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import ModulesToSaveWrapper

        fitting = f"an adapter for {type(network).__name__} of the base"
        head = network.get_output_embeddings()
        tied = head is not None and head.weight is network.get_input_embeddings().weight
        try:
            wrapped: Any = PeftModel(network, self.config)
            found: Any = set_peft_model_state_dict(wrapped, self.tensors)
        except KeyError as error:
            remedy = "train it with that in modules_to_save, or name a base that has it"
            raise self.refuse(fitting, f"without {error.args[0]}", remedy) from error
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            # The first line of torch's names no parameter.
            lines = str(error).strip().splitlines()
            given = f"which does not fit ({lines[min(1, len(lines) - 1)].strip()})"
            remedy = "name the base that it is for, with the vocabulary that it had in training"
            raise self.refuse(fitting, given, remedy) from error
        if unknown := found.unexpected_keys:
            own = self.config.base_model_name_or_path
            remedy = f"name its own base, {own!r}, or correct its task_type"
            raise self.refuse(fitting, f"with {listed(unknown)}, which it lacks", remedy)
        if missing := [key for key in found.missing_keys if ".lora_" in key]:
            raise self.refuse("an adapter with all its factors", f"without {listed(missing)}")
        shared = (network.get_input_embeddings(), network.get_output_embeddings()) if tied else ()
        factors = {}
        for name, module in wrapped.base_model.model.named_modules():
            if isinstance(module, LoraLayer):
                A, B = module_factors(module)
                factors[name] = LowRank(module.scaling["default"] * B.detach(), A.detach().mT)
            elif not isinstance(module, ModulesToSaveWrapper):
                continue
            if module in shared and not self.config.ensure_weight_tying:
                raise self.refuse(
                    "an adapter that changes embeddings and head as one, as they are in the base",
                    f"which changes {name} alone",
                    "train with ensure_weight_tying=True, or save the base with a head of its own "
                    "(tie_word_embeddings=False) and name that",
                )
        wrapped.base_model.merge_and_unload()
        return factors


class MergedCheckpoint:
    """A base with adapters on it, each with a weight, read like a `Checkpoint`.

    A parameter is the base's plus, for each adapter, its weight times what the adapter alone would
    change: ``W + Σ_i w_i s_i B_i A_i``, as ``combination_type="cat"`` of peft has it, and alike for
    biases, embeddings and heads. A head that the base lacks is the adapters' own.
    """

    def __init__(self, base: Checkpoint, adapters: Mapping[str, tuple[Path, float]]) -> None:
        self.base = base
        self.adapters = [(_PeftAdapter(s, folder), w) for s, (folder, w) in adapters.items()]
        if [weight for _, weight in self.adapters] == [1]:
            self.source = self.adapters[0][0].source
        else:
            self.source = " + ".join(f"{weight:g} × {a.source}" for a, weight in self.adapters)
        folders = (adapter.folder for adapter, _ in self.adapters)
        has_tokenizer = (f for f in folders if (f / "tokenizer_config.json").is_file())
        self.folder = next(has_tokenizer, base.folder)
        self.config: Any = self._choose_architecture()
        # What the adapters change of a parameter, by factors or not; and a head of their own.
        self._changes: dict[str, LowRank | Tensor] = {}
        self._own: dict[str, Tensor] = {}
        # Parameters that are kept as [in, out].
        self._transposed: set[str] = set()

    def _choose_architecture(self) -> Any:
        """The base's configuration with the architecture and the labels of the adapters."""
        import transformers
        from transformers.models.auto import modeling_auto as auto

        config = copy.deepcopy(self.base.config)
        kinds: dict[str, Mapping[str, Any]] = {
            "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "FEATURE_EXTRACTION": auto.MODEL_MAPPING_NAMES,
        }
        adapters = [adapter for adapter, _ in self.adapters]
        tasks = {a.config.task_type: a.source for a in adapters if a.config.task_type}
        labels = {a.labels: a.source for a in adapters if a.labels}
        for what, values in (("task", tasks), ("number of labels", labels)):
            if len(values) > 1:
                names = ", ".join(f"{value} of {source}" for value, source in values.items())
                raise InputError("tuned", allowed=f"adapters of one {what}", given=names)
        task = next(iter(tasks), "SEQ_CLS" if labels else "")
        if not task and (body := kinds["FEATURE_EXTRACTION"].get(config.model_type)):
            # Names that begin with that of the body are of a network with a head: the base's.
            start = f"base_model.model.{getattr(transformers, body).base_model_prefix}."
            if not any(key.startswith(start) for key in adapters[0].tensors):
                task = "FEATURE_EXTRACTION"
        if task and task not in kinds:
            allowed = f"an adapter of a task_type among {', '.join(kinds)}"
            raise adapters[0].refuse(allowed, f"of {task}")
        # Other types of models are refused with the base's own architecture.
        if task and (architecture := kinds[task].get(config.model_type)):
            config.architectures = [architecture]
        number = next(iter(labels), config.num_labels)
        if number != config.num_labels:
            # Which forgets the labels' names.
            config.num_labels = number
        return config

    def fit(self, network: Any) -> None:
        """Find all changes, with a network of transformers whose weights are used up."""
        from transformers.pytorch_utils import Conv1D

        self._transposed = {
            f"{name}.weight"
            for name, module in network.named_modules()
            if isinstance(module, Conv1D | nn.Embedding)
        }
        names = [name for name, _ in network.named_parameters()]
        changes: dict[str, list[LowRank | Tensor]] = {}
        heads: dict[str, list[Tensor]] = {}
        for adapter, weight in self.adapters:
            with torch.no_grad():
                for name, value in network.named_parameters():
                    # An adapter may bring what the base lacks.
                    value.copy_(self.base.read(name) if self.base.has(name) else torch.nan)
            with quiet(), warnings.catch_warnings(action="ignore"):
                factors = adapter.merge(network)
            merged = dict(network.named_parameters())
            for name in names:
                value, module = merged[name].detach(), name.removesuffix(".weight")
                if not self.base.has(name):
                    heads.setdefault(name, []).append(value.clone())
                elif module in factors:
                    update = LowRank(weight * factors[module].left, factors[module].right)
                    changes.setdefault(name, []).append(update)
                elif not value.equal(base := self.base.read(name)):
                    changes.setdefault(name, []).append(weight * (value - base))
        for name, values in heads.items():
            if any(not value.allclose(values[0], 0, 0, equal_nan=True) for value in values):
                raise InputError(
                    "tuned",
                    allowed="adapters with one head, or for a base with one",
                    given=f"{name} of each adapter's own, and none in the base",
                    remedy="save the base with the head that they started from, and name that",
                )
            if not values[0].isnan().any():
                self._own[name] = values[0]
        for name, parts in changes.items():
            self._add_up(name, parts)
        if not self._changes and not self._own:
            several = len(self.adapters) > 1
            raise InputError(
                "tuned",
                allowed="adapters that change the base",
                given=f"{self.source}, of which nothing is left",
                remedy="give other weights" if several else "name one that was trained",
            )

    def _add_up(self, name: str, parts: list[LowRank | Tensor]) -> None:
        """Keep the sum of changes, as factors if all are, unless they cancel up to rounding."""
        matrices = torch.stack([self._matrix(name, part) for part in parts])
        if matrices.sum(0).norm() <= _ROUNDING * max(matrix.norm() for matrix in matrices):
            return
        factors = [part for part in parts if isinstance(part, LowRank)]
        if len(factors) == len(parts):
            left, right = ([getattr(f, side) for f in factors] for side in ("left", "right"))
            self._changes[name] = LowRank(torch.cat(left, 1), torch.cat(right, 1))
        else:
            self._changes[name] = matrices.sum(0)

    def _matrix(self, name: str, change: LowRank | Tensor) -> Tensor:
        """A change as it is added to a parameter."""
        if isinstance(change, Tensor):
            return change
        return change.matrix().mT if name in self._transposed else change.matrix()

    def has(self, key: str) -> bool:
        """Whether there is a tensor of this name."""
        return key in self._own or self.base.has(key)

    def read(self, key: str) -> Tensor:
        """Read one tensor in float32."""
        if key in self._own:
            return self._own[key]
        base = self.base.read(key)
        return base + self._matrix(key, self._changes[key]) if key in self._changes else base

    def update(self, key: str, shape: tuple[int, int]) -> LowRank | None:
        """The factors of a module's change, of rank 0 for none; ``None`` if it has another one."""
        change = self._changes.get(key, LowRank(*(torch.zeros(side, 0) for side in shape)))
        return change if isinstance(change, LowRank) else None


def open_tuned(
    tuned: str | Path | Mapping[str, float], base: Checkpoint, *, any_base: bool = False
) -> Checkpoint | MergedCheckpoint:
    """Open a tuned checkpoint, or adapters of the base, or of ``any_base`` (`Pair.open`)."""
    if not isinstance(tuned, str | Path | Mapping) or not tuned:
        allowed = "a checkpoint, an adapter, or a mapping of adapters to their weights"
        raise InputError("tuned", allowed=allowed, value=tuned)
    weights = tuned if isinstance(tuned, Mapping) else {str(tuned): 1.0}
    adapters = {
        source: (find("tuned", source), _checks.finite(f"weight of {source}", weight))
        for source, weight in weights.items()
    }
    if others := [s for s, (f, _) in adapters.items() if not (f / PEFT_CONFIG).is_file()]:
        if isinstance(tuned, Mapping):
            allowed = "adapters of peft, where several have weights"
            remedy = "name a checkpoint alone, without a weight"
            given = f"{listed(others)} without {PEFT_CONFIG}"
            raise InputError("tuned", allowed=allowed, given=given, remedy=remedy)
        return Checkpoint("tuned", str(tuned), adapters[str(tuned)][0])
    merged = MergedCheckpoint(base, adapters)
    if not any_base:
        for adapter, _ in merged.adapters:
            adapter.require_base(base)
    return merged


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
