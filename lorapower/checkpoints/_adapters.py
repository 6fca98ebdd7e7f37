"""A tuned model that is a base with adapters of peft on it, read from the adapters' files."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from ..errors import InputError
from ..lowrank import LowRank
from . import _models as hub
from ._peft_files import PEFT_CONFIG, PEFT_WEIGHTS

# What to do with an adapter of another kind.
_MERGE = "merge it into its base if peft can (merge_and_unload), save that and name it"
# Entries of the configuration that make LoRA something other than W + s B A.
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "target_parameters": "factors of parameters that are no module's weight",
}
# With these starts peft changes the base's weights when it loads an adapter.
_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_HEADS = (".classifier.weight", ".classifier.out_proj.weight", ".score.weight")
# Part of a change below which it counts as rounding.
_ROUNDING = 1e-6


class _Change(NamedTuple):
    """What an adapter does to a parameter; ``weight`` times it is added.

    ``"factors"`` are those of a matrix, ``"added"`` a vector; ``"whole"`` is the tuned parameter
    and ``"rows"`` some tuned rows of it, of which the base's are subtracted.
    """

    kind: Literal["factors", "added", "whole", "rows"]
    adapter: _Adapter
    keys: tuple[str, ...]
    weight: float = 1.0
    rows: tuple[int, ...] = ()

    def tensors(self) -> list[Tensor]:
        """Its tensors in float32; of factors the left and the right one, ``[sides, rank]``."""
        tensors = self.adapter.read(*self.keys)
        if self.kind != "factors":
            return tensors
        left, right = tensors[1], tensors[0].mT
        # The weight of an embedding is [tokens, width], the transpose of a linear module's.
        return [right, left] if "lora_embedding" in self.keys[0] else [left, right]


class _Adapter:
    """The files of one adapter of peft, and what it changes by the name of a parameter."""

    def __init__(self, name: str, source: str, folder: Path) -> None:
        self.name, self.source, self.folder = name, source, folder
        self.config = self._configure()
        self._refuse_variants()
        self.shapes = self._check_tensors()

    def refuse(self, allowed: str, given: str, remedy: str = "") -> InputError:
        """The error for this adapter."""
        given = f"the adapter {self.source!r}, {given}"
        return InputError(self.name, allowed=allowed, given=given, remedy=remedy)

    def read(self, *keys: str) -> list[Tensor]:
        """Tensors of the file in float32."""
        with self._open() as file:
            return [file.get_tensor(key).float() for key in keys]

    @cached_property
    def changes(self) -> dict[str, list[_Change]]:
        """Changes by the parameter's name in the network that peft adapted."""
        found: dict[str, list[_Change]] = {}
        for key in self.shapes:
            # With bias="all" peft writes those of saved modules twice more, and never reads them.
            if ".modules_to_save." in key or ".original_module." in key:
                continue
            parameter, change = self._parse(key)
            if change is not None:
                found.setdefault(parameter, []).append(change)
        return found

    def saves(self, module: str) -> bool:
        """Whether a module is saved as a copy of its own, beside the base's."""
        return any(module.endswith(name) for name in self.config.get("modules_to_save") or ())

    def names_body(self, architecture: str | None) -> bool:
        """Whether names begin with that of the model without its head, as if they had one."""
        import transformers

        stem = getattr(transformers, architecture).base_model_prefix if architecture else ""
        return any(name.startswith(f"{stem}.") for name in self.changes)

    def require_base(self, base: hub.Checkpoint) -> None:
        """Refuse an adapter for a base of another name."""
        given = self.config.get("base_model_name_or_path")
        sources = base.source, hub.public_name(base.source)
        names = {_last(name) for name in (*sources, getattr(base.config, "_name_or_path", ""))}
        if given and _last(given) not in names and Path(given).resolve() != base.folder.resolve():
            raise self.refuse(
                f"an adapter for the base, {base.source!r}",
                f"made for {given!r}",
                "name that base, or say that both are the same (--force, force=True)",
            )

    def _configure(self) -> dict[str, Any]:
        try:
            config = json.loads((self.folder / PEFT_CONFIG).read_text(encoding="utf-8"))
            return dict(config)
        except (OSError, TypeError, ValueError) as error:
            allowed = f"an adapter with a readable {PEFT_CONFIG}"
            raise self.refuse(allowed, f"whose {PEFT_CONFIG} is not ({error})") from error

    def _refuse_variants(self) -> None:
        allowed, kind = "an adapter by LoRA, W + s B A", self.config.get("peft_type")
        if kind != "LORA":
            raise self.refuse(allowed, f"of type {kind}", _MERGE)
        for entry, variant in _VARIANTS.items():
            if self.config.get(entry):
                raise self.refuse(allowed, f"of another kind: {variant} ({entry})", _MERGE)
        start = str(self.config.get("init_lora_weights")).lower()
        if start.startswith(_STARTS):
            raise self.refuse(
                "an adapter that leaves the base's weights as they are",
                f"started by {start}, which changes them",
                "save it with path_initial_model_for_weight_conversion of peft, or merge it into "
                "its base and name that",
            )

    @contextmanager
    def _open(self) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        allowed = f"an adapter with a whole {PEFT_WEIGHTS}"
        remedy = "load it with peft and save it again (save_pretrained)"
        path = self.folder / PEFT_WEIGHTS
        if not path.is_file():
            raise self.refuse(allowed, "without that file", remedy)
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise self.refuse(allowed, f"whose file is damaged ({error})", remedy) from error

    def _check_tensors(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors, which must be finite."""
        shapes = {}
        with self._open() as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                shapes[key] = tuple(tensor.shape)
                if bad := int((~tensor.isfinite()).sum()):
                    raise self.refuse(
                        "an adapter of finite numbers",
                        f"whose {key} has {bad} entries that are NaN or infinite",
                        "take a checkpoint from before training diverged",
                    )
        if not shapes:
            raise self.refuse("an adapter that changes something", "without any tensor")
        return shapes

    def _parse(self, key: str) -> tuple[str, _Change | None]:
        """The parameter that a tensor is for, and its change; ``None`` for a second factor."""
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        module, _, part = name.partition(".lora_")
        if not part:
            module, _, part = name.partition(".token_adapter.")
            if part:
                return f"{module}.weight", _Change("rows", self, (key,), rows=self._rows(module))
            return name, _Change("whole", self, (key,))
        if part == "B.bias":
            return f"{module}.bias", _Change("added", self, (key,), self._scale(module))
        ends = re.fullmatch(r"(embedding_|)([AB])(\.weight|)", part)
        if ends is None or len(self.shapes[key]) != 2:
            kind = "of a convolution" if ends else "of another kind"
            allowed = "an adapter of linear modules and embeddings"
            raise self.refuse(allowed, f"with {key}, {kind}", _MERGE)
        other = "B" if ends[2] == "A" else "A"
        pair = key[: len(key) - len(part)] + ends[1] + other + ends[3]
        if pair not in self.shapes:
            raise self.refuse("an adapter with both factors of a module", f"with {key} alone")
        if ends[2] == "B":
            return name, None
        ranks = self.shapes[key][0], self.shapes[pair][1]
        if ranks == (0, 0):
            return name, None
        rank = self._rank(module)
        if ranks != (rank, rank):
            raise self.refuse(
                f"an adapter with the ranks of its {PEFT_CONFIG}, {rank} for {module}",
                f"whose factors have {' and '.join(map(str, ranks))} columns",
                "save it again with peft, which writes both",
            )
        return f"{module}.weight", _Change("factors", self, (key, pair), self._scale(module))

    def _rank(self, module: str) -> int:
        return int(self._number("rank_pattern", "r", module, least=1))

    def _scale(self, module: str) -> float:
        """What the product of a module's factors is multiplied by."""
        rank, alpha = self._rank(module), self._number("alpha_pattern", "lora_alpha", module)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _number(self, patterns: str, default: str, module: str, least: float = -math.inf) -> float:
        """A module's entry of the configuration, as peft finds it."""
        try:
            values = (
                value
                for pattern, value in (self.config.get(patterns) or {}).items()
                if re.match(rf"(.*\.)?({pattern})$", module)
            )
            found = float(next(values, self.config.get(default, 8)))
        except (AttributeError, TypeError, ValueError, re.error):
            found = math.nan
        if not least <= found < math.inf:
            allowed = f"an adapter whose {PEFT_CONFIG} has a number of {default} for each module"
            raise self.refuse(allowed, f"with none for {module}", "correct it")
        return found

    def _rows(self, module: str) -> tuple[int, ...]:
        indices = self.config.get("trainable_token_indices") or ()
        if isinstance(indices, Mapping):
            indices = next((rows for name, rows in indices.items() if module.endswith(name)), ())
        rows = tuple(indices)
        if len({*rows}) != len(rows) or min(rows, default=0) < 0:
            raise self.refuse(
                "an adapter whose trainable_token_indices are different and from 0 on",
                f"with others for {module}",
                "correct them",
            )
        return rows


class Merged:
    """A base with adapters merged into it, each with a weight, read like a `Checkpoint`.

    A parameter is the base's plus, for each adapter, its weight times what the adapter alone would
    change: ``W + Σ_i w_i s_i B_i A_i``, as ``combination_type="cat"`` of peft has it, and alike for
    biases, embeddings and heads. A head that the base lacks is the adapters' own.
    """

    def __init__(
        self, name: str, base: hub.Checkpoint, adapters: Mapping[str, tuple[Path, float]]
    ) -> None:
        self.name, self.base = name, base
        self.adapters = [
            (_Adapter(name, source, folder), weight)
            for source, (folder, weight) in adapters.items()
        ]
        only = len(adapters) == 1 and self.adapters[0][1] == 1
        self.source = " + ".join(
            adapter.source if only else f"{weight:g} × {adapter.source}"
            for adapter, weight in self.adapters
        )
        folders = [adapter.folder for adapter, _ in self.adapters]
        there = (folder for folder in folders if (folder / "tokenizer_config.json").is_file())
        self.folder = next(there, base.folder)
        self.config: Any = self._configure()
        self._changes: dict[str, list[_Change]] = {}
        # The sides of the matrix that factors give, and whether the parameter is its transpose.
        self._sides: dict[str, tuple[int, int]] = {}
        self._transposed: set[str] = set()

    def fit(self, network: Any) -> None:
        """Name changes as a network's parameters; refuse what does not fit or changes nothing."""
        from transformers.pytorch_utils import Conv1D

        sizes = {name: tuple(value.shape) for name, value in network.named_parameters()}
        for name, shape in sizes.items():
            if len(shape) == 2:
                rows, columns = self._sides[name] = shape
                if isinstance(network.get_submodule(name.rpartition(".")[0]), Conv1D):
                    self._transposed.add(name)
                    self._sides[name] = columns, rows
        for adapter, weight in self.adapters:
            for name, changes in self._bind(adapter, network).items():
                weighted = (change._replace(weight=weight * change.weight) for change in changes)
                self._changes.setdefault(name, []).extend(weighted)
        self._refuse_heads(sizes)
        if not any(self._differs(name) for name in self._changes):
            if len(self.adapters) == 1:
                allowed, remedy = "an adapter that changes the base", "name one that was trained"
            else:
                allowed, remedy = "adapters that change the base", "give other weights"
            given = f"{self.source}, of which nothing is left"
            raise InputError(self.name, allowed=allowed, given=given, remedy=remedy)

    def bind(self, parameters: Mapping[str, tuple[int, ...]], prefix: str) -> set[str]:
        """Parameters without a tensor: none, after `fit`."""
        return {name for name in parameters if not self.has(name)}

    def unused(self, parameters: Mapping[str, tuple[int, ...]]) -> set[str]:
        """Tensors that a network with these parameters does not use."""
        return self.base.unused(parameters)

    def has(self, key: str) -> bool:
        """Whether there is a tensor of this name."""
        return key in self._changes or self.base.has(key)

    def bytes(self) -> int:
        """The size of all files of the base."""
        return self.base.bytes()

    def read(self, key: str) -> Tensor:
        """One tensor in float32."""
        if not self.base.has(key):
            return self._changes[key][0].tensors()[0]
        base = total = self.base.read(key)
        for change in self._changes.get(key, ()):
            if change.kind == "factors":
                continue
            (tensor,) = change.tensors()
            if change.kind == "added":
                total = total + change.weight * tensor
            elif change.kind == "rows":
                rows = torch.tensor(change.rows)
                total = total.index_add(0, rows, tensor - base[rows], alpha=change.weight)
            elif total is base:
                total = base.lerp(tensor, change.weight)
            else:
                total = total + change.weight * (tensor - base)
        factors = self._factors(key)
        if not factors.rank:
            return total
        matrix = factors.matrix()
        return total + (matrix.mT if key in self._transposed else matrix)

    def update(self, key: str) -> LowRank | None:
        """Factors of a linear module's change, of rank 0 for none; ``None`` if it has none."""
        if any(change.kind != "factors" for change in self._changes.get(key, ())):
            return None
        return self._factors(key)

    def _factors(self, key: str) -> LowRank:
        """The changes by factors of a parameter, side by side, with the weights on the left."""
        left, right = ([torch.zeros(n, 0)] for n in self._sides.get(key, (0, 0)))
        for change in self._changes.get(key, ()):
            if change.kind == "factors":
                B, A = change.tensors()
                left.append(change.weight * B)
                right.append(A)
        return LowRank(torch.cat(left, 1), torch.cat(right, 1))

    def _configure(self) -> Any:
        """The base's configuration with the architecture and the labels of the adapters."""
        from transformers.models.auto import modeling_auto as auto

        config = copy.deepcopy(self.base.config)
        kinds: dict[str, Mapping[str, Any]] = {
            "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "FEATURE_EXTRACTION": auto.MODEL_MAPPING_NAMES,
        }
        labels = {
            adapter.shapes[change.keys[0]][0]: adapter
            for adapter, _ in self.adapters
            for name, changes in adapter.changes.items()
            for change in changes
            if f".{name}".endswith(_HEADS) and change.kind == "whole"
        }
        tasks = {task: a for a, _ in self.adapters if (task := a.config.get("task_type"))}
        first = self.adapters[0][0]
        if not tasks and labels:
            tasks["SEQ_CLS"] = first
        elif not tasks and not first.names_body(kinds["FEATURE_EXTRACTION"].get(config.model_type)):
            tasks["FEATURE_EXTRACTION"] = first
        for what, values in (("task", tasks), ("number of labels", labels)):
            if len(values) > 1:
                names = ", ".join(f"{value} of {a.source}" for value, a in values.items())
                raise InputError(self.name, allowed=f"adapters of one {what}", given=names)
        for task, adapter in tasks.items():
            if task not in kinds:
                allowed = f"an adapter of a task_type among {', '.join(kinds)}"
                raise adapter.refuse(allowed, f"of {task}")
            # Other types of models are refused with the base's own architecture.
            if architecture := kinds[task].get(config.model_type):
                config.architectures = [architecture]
        for number in labels:
            # Setting it forgets the labels' names.
            if number != config.num_labels:
                config.num_labels = number
        return config

    def _bind(self, adapter: _Adapter, network: Any) -> dict[str, list[_Change]]:
        """An adapter's changes by the names of the network's parameters."""
        named = dict(network.named_parameters(remove_duplicate=False))
        first = {value: name for name, value in network.named_parameters()}
        stem = network.base_model_prefix
        bound: dict[str, list[_Change]] = {}
        tied: dict[str, list[_Change]] = {}
        unknown = []
        for name, changes in adapter.changes.items():
            aliases = (name, f"{stem}.{name}", name.removeprefix(f"{stem}."))
            place = next((alias for alias in aliases if alias in named), None)
            if place is None:
                unknown.append(name)
                continue
            value = named[place]
            if sum(value is other for other in named.values()) > 1:
                self._refuse_untied(adapter, place, changes)
            (bound if place == first[value] else tied)[first[value]] = changes
            for change in changes:
                self._refuse_shapes(place, tuple(value.shape), change)
        if unknown:
            raise adapter.refuse(
                f"an adapter for {type(network).__name__} of the base {self.base.source!r}",
                f"with {hub.some(sorted(unknown))}, which it lacks",
                f"name its own base, {adapter.config.get('base_model_name_or_path')!r}, or correct "
                f"its task_type, {adapter.config.get('task_type')!r}",
            )
        return tied | bound

    def _refuse_untied(self, adapter: _Adapter, name: str, changes: Iterable[_Change]) -> None:
        """Refuse a change of only one of two parameters that the base has as one."""
        module = name.rpartition(".")[0]
        kinds = {change.kind for change in changes}
        alone = "factors" in kinds or ("whole" in kinds and adapter.saves(module))
        if alone and not adapter.config.get("ensure_weight_tying"):
            raise adapter.refuse(
                "an adapter that changes embeddings and head as one, as they are in the base",
                f"which changes {module} alone",
                "train with ensure_weight_tying=True, or save the base with a head of its own "
                "(tie_word_embeddings=False) and name that",
            )

    def _refuse_shapes(self, name: str, shape: tuple[int, ...], change: _Change) -> None:
        """Refuse a change of another shape than the parameter's."""
        shapes, rows = [change.adapter.shapes[key] for key in change.keys], change.rows
        given, expected = shapes[0], shape
        if change.kind == "factors":
            given = shapes[1][0], shapes[0][1]
            if "lora_embedding" in change.keys[0]:
                given = given[::-1]
            expected = self._sides.get(name, shape)
        elif change.kind == "rows":
            expected = (len(rows), *shape[1:])
            if max(rows, default=0) >= shape[0]:
                given, expected = (max(rows) + 1, *shape[1:]), shape
        if given != expected:
            words = "embed" in name or "wte" in name
            raise change.adapter.refuse(
                f"an adapter for the base {self.base.source!r}, {name} {expected}",
                f"with one of {given}",
                "resize both vocabularies alike" if words else "name the base that it is for",
            )

    def _refuse_heads(self, names: Iterable[str]) -> None:
        """Refuse no head, or different ones, where the base has none to compare with."""
        if missing := [name for name in names if not self.has(name)]:
            raise self.adapters[0][0].refuse(
                "an adapter with the head that the base lacks",
                f"without {hub.some(missing)}",
                "train it with that in modules_to_save, or name the base with the head that was "
                "there in training",
            )
        for name, changes in self._changes.items():
            if self.base.has(name):
                continue
            tensors = [change.tensors()[0] for change in changes if change.kind == "whole"]
            if len(tensors) != len(changes) or any(not tensors[0].equal(t) for t in tensors[1:]):
                sources = ", ".join(change.adapter.source for change in changes)
                raise InputError(
                    self.name,
                    allowed="adapters with one head, or for a base with one",
                    given=f"{name} of its own in each of {sources}, and none in the base",
                    remedy="save the base with the head that they started from, and name that",
                )

    def _differs(self, key: str) -> bool:
        """Whether a parameter is not the base's, beyond rounding."""
        update = self.update(key)
        if update is None:
            return not self.base.has(key) or not self.read(key).equal(self.base.read(key))
        left, right = (f.double() for f in (update.balanced().left, update.balanced().right))
        # The norms of the product and, above it, of its factors.
        square = ((left.mT @ left) * (right.mT @ right)).sum().clamp(min=0)
        return bool(square.sqrt() > _ROUNDING * left.norm() * right.norm())


def open_tuned(
    tuned: str | Path | Mapping[str, float], base: hub.Checkpoint, *, force: bool = False
) -> hub.Checkpoint | Merged:
    """A tuned checkpoint, or adapters of the base, see `Pair.open`; ``force`` allows any name."""
    if isinstance(tuned, str | Path):
        source = str(tuned)
        folder = hub.find("tuned", source)
        if not (folder / PEFT_CONFIG).is_file():
            checkpoint = hub.Checkpoint("tuned", str(folder))
            checkpoint.source = source
            return checkpoint
        adapters = {source: (folder, 1.0)}
    else:
        adapters = {source: (hub.find("tuned", source), w) for source, w in _weights(tuned)}
        if checkpoints := [
            s for s, (folder, _) in adapters.items() if not (folder / PEFT_CONFIG).is_file()
        ]:
            raise InputError(
                "tuned",
                allowed="adapters of peft, where several have weights",
                given=f"{hub.some(checkpoints)} without {PEFT_CONFIG}",
                remedy="name a checkpoint alone, without a weight",
            )
    merged = Merged("tuned", base, adapters)
    if not force:
        for adapter, _ in merged.adapters:
            adapter.require_base(base)
    return merged


def _weights(tuned: object) -> Iterator[tuple[str, float]]:
    """Adapters and their weights, which are finite numbers."""
    if not isinstance(tuned, Mapping) or not tuned:
        allowed = "a checkpoint, an adapter, or a mapping of adapters to their weights"
        raise InputError("tuned", allowed=allowed, value=tuned)
    for source, weight in tuned.items():
        yield str(source), _checks.finite(f"weight of {source}", weight)


def _last(source: str) -> str:
    """The last part of a checkpoint's name, also of a folder in the cache of the hub."""
    parts = [part for part in re.split(r"[/\\]", source) if part]
    cached = next((part for part in parts if part.startswith("models--")), None)
    return (cached.rpartition("--")[2] if cached else (parts or [""])[-1]).casefold()
