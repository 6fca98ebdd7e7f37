"""Two checkpoints of one architecture, what tuning changed, and adapters in place of the change."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ._adapters import MergedCheckpoint
from ._errors import InputError
from ._lowrank import LowRank
from ._models import (
    PEFT_CONFIG,
    Checkpoint,
    Rows,
    build,
    find,
    listed,
    quiet,
    require_memory,
    require_name,
    tokenizer,
)

Task = Literal["classification", "language", "encoder"]
# Where the equal blocks are in the model without its head, by ``model_type`` of transformers.
_BLOCKS = {
    **dict.fromkeys(("bert", "camembert", "roberta", "xlm-roberta"), "encoder.layer"),
    "distilbert": "transformer.layer",
    "gpt2": "h",
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama", "mistral", "modernbert"), "layers"),
    **dict.fromkeys(("olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3"), "layers"),
    **dict.fromkeys(("stablelm", "starcoder2"), "layers"),
}
# These count positions from the one after the padding's.
COUNTED_FROM_PADDING = ("camembert", "roberta", "xlm-roberta")
# The task of an architecture, by the end of its name.
_TASKS: dict[str, Task] = {
    "ForSequenceClassification": "classification",
    "ForCausalLM": "language",
    "LMHeadModel": "language",
    "Model": "encoder",
}
KINDS = ("bias", "norm", "embedding", "head")
# Entries of a configuration that are not listed where they differ: names and labels, what only
# training or memory depends on, and what other entries or the weights say too.
_HARMLESS = re.compile(
    "_name_or_path|architectures|transformers_version|unsloth_.*|(torch_)?dtype|task_specific_params"
    "|id2label|label2id|problem_type|finetuning_task|.*_token_id|vocab_size"
    "|.*(dropout|pdrop).*|initializer_.*|gradient_checkpointing|use_cache|chunk_size_feed_forward"
    "|return_dict|output_attentions|output_hidden_states|pretraining_tp|max_window_layers"
    r"|transformers\.js_config|sentence_transformers"
)
# Entries that an adapted network has from the tuned model, as it has the head and the tokenizer.
_HEAD = re.compile("architectures|id2label|label2id|problem_type|vocab_size|.*_token_id")
# What to do where these differ in what cannot be computed.
_OTHER_ENTRIES = (
    "if the tuned model needs these, save the base with them and name that, to plan with and to "
    "serve; if not, correct its config.json"
)
# Rows of embeddings and heads that are compared at a time.
_ROWS = 2**13
#: Answers have at most so many tokens; and as many prompts are answered at a time.
ANSWER, _TOGETHER = 64, 32
#: Matrices of more numbers are not subtracted as wholes.
LARGE = 2**27
# Modules that servers compute as one, by the ends of their names.
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "query", "key", "value"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
}


class Module(NamedTuple):
    """A linear module that can have an adapter, by its name in the network.

    ``kind`` is its half of a block, ``"attention"`` or ``"mlp"``, or ``"other"``; ``"embedding"``
    and ``"head"`` are ``words`` of a `Pair`. ``shape`` is ``(out, in)``; the weight of a
    ``transposed`` one is kept as ``[in, out]``, as those of embeddings are, and in GPT-2 all.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    bias: bool
    transposed: bool

    @property
    def cost(self) -> int:
        """Count the numbers of an adapter of rank 1: ``out + in``."""
        return sum(self.shape)

    @property
    def fused(self) -> str:
        """Name it and those that servers compute together with it, such as all of ``q, k, v``."""
        owner, _, end = self.name.rpartition(".")
        return f"{owner}.{_FUSED.get(end, end)}"


class Reader(Protocol):
    """Finds a network's parameter by its name, or some of its rows."""

    def __call__(self, name: str, rows: Rows = None) -> Tensor: ...


class Sliced(NamedTuple):
    """A matrix as it is ``stored``, or its transpose, of which some rows are read at a time."""

    read: Callable[[slice], Tensor]
    stored: tuple[int, ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)``."""
        return self.stored[::-1] if self.transposed else self.stored

    @property
    def mT(self) -> Sliced:  # noqa: N802
        """The transpose."""
        return self._replace(transposed=not self.transposed)

    def __matmul__(self, columns: Float[Tensor, "in k"]) -> Float[Tensor, "out k"]:
        """Multiply columns."""
        parts = [slice(start, start + _ROWS) for start in range(0, self.stored[0], _ROWS)]
        if not self.transposed:
            return torch.cat([self.read(some).to(columns) @ columns for some in parts])
        products = (self.read(some).to(columns).mT @ columns[some] for some in parts)
        return functools.reduce(torch.add, products)


class _Other(NamedTuple):
    """A parameter that tuning changed and no adapter of low rank carries, as ``size`` numbers."""

    name: str
    kind: str
    size: int


class Adapter(NamedTuple):
    """Factors of modules by name, none of rank 0, and what is carried beside them.

    Other parameters that tuning changed (`Pair`) are as tuned if their kind is ``carried``, as all
    are unless some are named. ``biases`` of modules are not the tuned ones. An adapter made of the
    candidates of a `Planner` has the ``gains`` of these.
    """

    factors: dict[str, LowRank]
    biases: dict[str, Float[Tensor, " out"]]
    carried: Collection[str] = KINDS
    gains: Float[Tensor, " directions"] = torch.zeros(0)

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks by module."""
        return {name: factors.rank for name, factors in self.factors.items()}

    @property
    def parameters(self) -> int:
        """How many numbers the factors have."""
        return sum(factors.parameter_count for factors in self.factors.values())


@dataclass(frozen=True, eq=False, repr=False)
class Pair:
    """A base and what was tuned from it; see `Pair.open`.

    The ``task`` is ``"classification"``, ``"language"`` or ``"encoder"``. ``modules`` are linear
    and can have adapters. ``others`` are all other parameters that differ, each with a ``name``, a
    ``kind`` (``"bias"``, ``"norm"``, ``"embedding"``, or ``"head"``, which the base may lack) and a
    ``size``; embeddings count only the rows that differ. Of these, ``words`` could be modules too
    (`with_words`): word
    embeddings and a language model's head, where what differs is more than an adapter of rank 1
    has; tied ones are one, by the embeddings' name. ``prefix`` begins names in the model without
    its head, such as ``"bert."``, and ``blocks`` those of its blocks. The base and adapted networks
    have the base's own ``config``, with which adapters are served; ``differing`` are its entries of
    which the tuned model has others, with both values.
    """

    base: Checkpoint
    tuned: Checkpoint | MergedCheckpoint
    architecture: str
    task: Task
    prefix: str
    blocks: str
    config: Any
    differing: dict[str, tuple[Any, Any]]
    modules: dict[str, Module]
    others: tuple[_Other, ...] = ()
    words: dict[str, Module] = field(default_factory=dict)

    @classmethod
    def open(cls, base: str | Path, tuned: str | Path) -> Pair:
        """Open a base and what was tuned from it: a checkpoint, or an adapter by LoRA.

        Each is a folder, a name on the hub, or ``"packaged"``, this book's encoder. The
        architecture, and a head that the base lacks, are from ``tuned``. Weights are read later,
        one at a time. Raises `InputError` for checkpoints that are missing, quantized, incomplete,
        not supported, or of different architecture, size or configuration, and for adapters that
        are no LoRA, do not fit, or change nothing.
        """
        for name, model in (("base", base), ("tuned", tuned)):
            require_name(name, model)
        base_files = Checkpoint("base", str(base))
        tuned_files: Checkpoint | MergedCheckpoint
        folder = find("tuned", str(tuned))
        if (folder / PEFT_CONFIG).is_file():
            tuned_files = MergedCheckpoint(base_files, str(tuned), folder)
        else:
            tuned_files = Checkpoint("tuned", str(tuned), folder)
        architecture, task = _describe(tuned_files.config)
        kind, tuned_kind = base_files.config.model_type, tuned_files.config.model_type
        if kind != tuned_kind:
            raise InputError("tuned", f"of type {kind!r}, like the base", tuned_kind)
        differing = _compare_configurations(base_files.config, tuned_files.config, task)
        config = _with_head(base_files.config, tuned_files.config)
        network = build(config, architecture, empty=True)
        sizes = {name: tuple(value.shape) for name, value in network.named_parameters()}
        stem, body = network.base_model_prefix, network.base_model
        prefix = "" if body is network else f"{stem}."
        plain = [each for each in (base_files, tuned_files) if isinstance(each, Checkpoint)]
        new, *_ = [each.bind(sizes, stem) for each in plain]
        blocks = prefix + _BLOCKS[kind]
        if differing:
            empty = build(tuned_files.config, architecture, empty=True)
            _require_parameters(empty, sizes, differing)
        if deep := sorted(name for name in new if name.startswith(f"{blocks}.")):
            raise InputError("base", "with all weights of the blocks", f"no {listed(deep)}")
        for each in plain:
            _require_used(each, network, _BLOCKS[kind])
            each.require_finite(sizes)
        if isinstance(tuned_files, MergedCheckpoint):
            tuned_files.fit(build(tuned_files.config, architecture, empty=True))
        elif extra := sorted(tuned_files.unused - base_files.unused):
            allowed = f"with nothing but weights of {architecture}"
            raise InputError("tuned", allowed, f"one with {listed(extra)}")
        if missing := sorted(name for name in sizes if not tuned_files.has(name)):
            allowed, given = f"with all weights of {architecture}", f"one without {listed(missing)}"
            raise InputError("tuned", allowed, given)
        modules = {
            module.name: module
            for module in _linear_modules(body, prefix, blocks, task)
            if not new & {f"{module.name}.weight", f"{module.name}.bias"}
        }
        about = architecture, task, prefix, blocks, config, differing, modules
        pair = cls(base_files, tuned_files, *about)
        others, words = pair._compare(network, new)
        return replace(pair, others=others, words=words)

    def with_words(self, names: Collection[str]) -> Pair:
        """Take some of ``words`` as modules, so that they get factors too."""
        taken = {name: self.words[name] for name in self.words if name in names}
        weights = {f"{name}.weight" for name in taken}
        others = tuple(other for other in self.others if other.name not in weights)
        return replace(self, modules=self.modules | taken, others=others)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tuned checkpoint's tokenizer, which pads texts on the right."""
        found = tokenizer(str(self.tuned.folder))
        found.pad_token = found.pad_token or found.eos_token
        if found.pad_token is None:
            allowed = "with a tokenizer that has a token to pad with"
            raise InputError("tuned", allowed, self.tuned.source)
        found.padding_side = "right"
        return found

    @property
    def padding(self) -> int:
        """The token to pad with, by which a classifier on a decoder finds where texts end."""
        own = getattr(self.tuned.config, "pad_token_id", None)
        # Some configurations have -1, which no embedding has.
        return int(self.tokenizer.pad_token_id if own is None or own < 0 else own)

    @property
    def not_low_rank(self) -> dict[str, int]:
        """How many numbers are carried beside factors, by kind of parameter."""
        sizes = {kind: sum(o.size for o in self.others if o.kind == kind) for kind in KINDS}
        return {kind: size for kind, size in sizes.items() if size}

    def change(self, name: str) -> Float[Tensor, "out in"]:
        """Compute ``ΔW`` of a module, the tuned weight minus the base's, in float32."""
        module = self.modules[name]
        return self.weight("tuned", module) - self.weight("base", module)

    def multiplier(self, name: str) -> Float[Tensor, "out in"] | LowRank | Sliced:
        """Find ``ΔW`` as what multiplies columns: an adapter's factors are not multiplied out.

        Nor are all words of large embeddings and heads in memory at once.
        """
        module, key = self.modules[name], f"{name}.weight"
        if isinstance(self.tuned, MergedCheckpoint):
            update = self.tuned.update(key, module.shape)
            if update is not None:
                return update
        if math.prod(module.shape) <= LARGE:
            return self.change(name)

        def read(some: slice) -> Tensor:
            return self.tuned.read(key, some) - self.base.read(key, some)

        return Sliced(read, self.base.shape(key), module.transposed)

    def weight(self, which: str, module: Module) -> Float[Tensor, "out in"]:
        """Read a module's weight in ``"base"`` or ``"tuned"``."""
        weight = self.read(which, f"{module.name}.weight")
        return weight.mT if module.transposed else weight

    def read(self, which: str, name: str, rows: Rows = None) -> Tensor:
        """Read a parameter, or some of its rows, of ``"base"`` or ``"tuned"``.

        Of a head that the base lacks it is the tuned one.
        """
        checkpoint = self.tuned if which == "tuned" or not self.base.has(name) else self.base
        return checkpoint.read(name, rows)

    def reader(self, which: str | Adapter) -> Reader:
        """Find what reads the parameters of a network, as `read`, or of one with an adapter."""
        if isinstance(which, str):
            return functools.partial(self.read, which)
        kinds = {other.name: other.kind for other in self.others}

        def read(name: str, rows: Rows = None) -> Tensor:
            owner, _, part = name.rpartition(".")
            if part == "bias" and owner in which.biases:
                return which.biases[owner].float()
            carried = kinds.get(name) in which.carried
            value = self.read("tuned" if carried else "base", name, rows)
            if part != "weight" or owner not in which.factors:
                return value
            left, right = which.factors[owner].left.float(), which.factors[owner].right.float()
            if self.modules[owner].transposed:
                left, right = right, left
            return value + (left if rows is None else left[rows]) @ right.mT

        return read

    def keeps_head(self, which: str | Adapter) -> bool:
        """Whether a language model's head in the base, or in an adapted network, is the tuned one.

        An adapter carries it unless that is a module, or left as it is.
        """
        if self.task != "language" or "final_logit_softcapping" in self.differing:
            return False
        carried = () if isinstance(which, str) else which.carried
        differing = {other.name for other in self.others if other.kind not in carried}
        return not self.head & (differing | {f"{name}.weight" for name in self.modules})

    @functools.cached_property
    def head(self) -> frozenset[str]:
        """Names of a language model's head, which word embeddings may be too."""
        network = self.skeleton("base")
        head = network.get_output_embeddings() if self.task == "language" else None
        parts = {id(value) for value in head.parameters()} if head is not None else set()
        return frozenset(n for n, value in network.named_parameters() if id(value) in parts)

    @property
    def decides(self) -> bool:
        """Whether it has classes or next tokens."""
        one = self.task == "classification" and self.tuned.config.num_labels < 2
        return self.task != "encoder" and not one

    @property
    def ends(self) -> list[int]:
        """The tokens with which answers of a language model end."""
        own = getattr(self.tuned.config, "eos_token_id", None)
        own = self.tokenizer.eos_token_id if own is None else own
        return [own] if isinstance(own, int) else [*(own or [self.padding])]

    @torch.no_grad()
    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        report: Callable[[int, int], None] = lambda *_: None,
    ) -> list[list[int]]:
        """Generate the tuned model's greedy answers to prompts, with the whole network.

        Nothing but the largest logit decides: no penalty of a ``generation_config.json`` does.
        """
        from transformers import GenerationConfig

        require_memory(4.0 * sum(value.numel() for value in self.skeleton().parameters()))
        network = self.network("tuned")
        ends = self.ends
        about: dict[str, Any] = {"max_new_tokens": ANSWER, "do_sample": False, "use_cache": True}
        about |= {"eos_token_id": ends, "pad_token_id": self.padding}
        answers: dict[int, list[int]] = {}
        # Those of about one length together, on the left of which little is filled up.
        order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
        for start in range(0, len(order), _TOGETHER):
            report(start, len(order))
            part = order[start : start + _TOGETHER]
            ids = [torch.tensor(prompts[k]).flip(0) for k in part]
            given, there = (
                pad_sequence(each, True, value).flip(1)
                for each, value in ((ids, self.padding), ([x.new_ones(len(x)) for x in ids], 0))
            )
            with quiet():
                made = network.generate(
                    given, attention_mask=there, generation_config=GenerationConfig(**about)
                )
            for k, new in zip(part, made[:, given.shape[1] :].tolist(), strict=True):
                stop = next((i for i, token in enumerate(new) if token in ends), len(new))
                answers[k] = new[: stop + 1]
        report(len(order), len(order))
        return [answers[k] for k in range(len(prompts))]

    def skeleton(self, which: str = "tuned") -> Any:
        """A network without weights, of the ``"base"`` as adapted ones are, or the ``"tuned"``."""
        return self._skeletons["tuned" if which == "tuned" or not self.differing else "base"]

    @functools.cached_property
    def _skeletons(self) -> dict[str, Any]:
        return {which: self.build(which, empty=True) for which in ("tuned", "base")}

    def build(self, which: str = "base", *, empty: bool = False) -> Any:
        """Make a network with the configuration of one of both; an ``empty`` one has no weights."""
        return self._build(self.tuned.config if which == "tuned" else self.config, empty=empty)

    def _build(self, config: Any, *, empty: bool) -> Any:
        network = build(config, self.architecture, empty=empty)
        network.eval().requires_grad_(False)
        network.config.pad_token_id = self.padding
        # Each text is passed once, and keys of one pass must not get into another.
        network.config.use_cache = False
        return network

    def open_standin(self, source: str) -> tuple[Any, Reader]:
        """Open a checkpoint in place of the tuned one: its network without weights, and a reader.

        Raises `InputError` for checkpoints that are not of its architecture, and whole.
        """
        files = Checkpoint("standin", source)
        kind, tuned_kind = files.config.model_type, self.tuned.config.model_type
        if kind != tuned_kind:
            raise InputError("standin", f"of type {tuned_kind!r}, like the tuned model", kind)
        network = self._build(_with_head(files.config, self.tuned.config), empty=True)
        sizes = {name: tuple(value.shape) for name, value in network.named_parameters()}
        if missing := sorted(files.bind(sizes, network.base_model_prefix)):
            allowed = f"with all weights of {self.architecture}"
            raise InputError("standin", allowed, f"one without {listed(missing)}")
        _require_used(files, network, _BLOCKS[kind])
        files.require_finite(sizes)
        return network, files.read

    def network(self, which: str | Adapter = "tuned", read: Reader | None = None) -> Any:
        """Make a whole network of transformers: ``"base"``, ``"tuned"``, or the base adapted."""
        network = self.build("tuned" if which == "tuned" else "base")
        read = read or self.reader(which)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(read(name))
        return network

    def differing_rows(self, name: str) -> list[int]:
        """Find the rows of a parameter, such as word embeddings, that tuning changed."""
        found: list[int] = []
        number = self.base.shape(name)[0]
        for start in range(0, number, _ROWS):
            some = slice(start, start + _ROWS)
            differs = self.base.read(name, some) != self.tuned.read(name, some)
            rows = differs.reshape(len(differs), -1).any(1).nonzero().flatten()
            found += (start + rows).tolist()
        return found

    def _compare(
        self, network: Any, new: Collection[str]
    ) -> tuple[tuple[_Other, ...], dict[str, Module]]:
        """What differs beside weights of modules, with what the base lacks (``new``), and words."""
        from transformers.pytorch_utils import Conv1D

        others, words = list[_Other](), dict[str, Module]()
        embedding = network.get_input_embeddings()
        head = network.get_output_embeddings() if self.task == "language" else None
        for name, value in network.named_parameters():
            place, _, part = name.rpartition(".")
            if place in self.modules and part == "weight":
                continue
            rows = [] if name in new else self.differing_rows(name)
            if name not in new and not rows:
                continue
            owner, size = network.get_submodule(place), value.numel()
            if isinstance(owner, nn.Embedding):
                kind = "embedding"
                if name not in new:
                    size = len(rows) * value.shape[1]
            elif isinstance(owner, nn.Linear | Conv1D) and place not in self.modules:
                kind = "head"
            else:
                kind = "bias" if part == "bias" else "norm"
            others.append(_Other(name, kind, size))
            embeds = owner is embedding
            known = name not in new and part == "weight" and (embeds or owner is head)
            if known and size > sum(value.shape):
                shape = tuple(value.shape[::-1] if embeds else value.shape)
                bias = getattr(owner, "bias", None) is not None
                words[place] = Module(place, kind, shape, bias, embeds)
        return tuple(others), words


def _describe(config: Any) -> tuple[str, Task]:
    """The architecture of a tuned checkpoint, and its task."""
    import transformers

    if config.model_type not in _BLOCKS:
        raise InputError("tuned", f"of type {', '.join(_BLOCKS)}", f"type {config.model_type!r}")
    architecture = (getattr(config, "architectures", None) or ["nothing"])[0]
    task = next((task for end, task in _TASKS.items() if architecture.endswith(end)), None)
    if task is None or not hasattr(transformers, architecture):
        allowed = f"an architecture of transformers that ends in {', '.join(_TASKS)}"
        raise InputError("tuned", allowed, architecture)
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise InputError("tuned", "a classifier into one class of several", config.problem_type)
    return architecture, task


def _with_head(config: Any, tuned: Any) -> Any:
    """Copy a configuration, with entries of the tuned model's that go with its head."""
    made = copy.deepcopy(config)
    for name, value in tuned.to_dict().items():
        if _HEAD.fullmatch(name) and value is not None:
            setattr(made, name, getattr(tuned, name))
    return made


def _compare_configurations(base: Any, tuned: Any, task: Task) -> dict[str, tuple[Any, Any]]:
    """Find entries of which the tuned model has others than the base, with both values.

    Adapters carry weights alone, and are served with the configuration of the base: networks are
    computed so, and what that loses counts. Raises `InputError` for another padding that is read.
    """
    own, other = (config.to_dict() for config in (base, tuned))
    paddings = [entries.get("pad_token_id") for entries in (own, other)]
    # Classifiers of decoders look for the last token by it. Without one they take one text.
    is_read = task == "classification" or tuned.model_type in COUNTED_FROM_PADDING
    if is_read and None not in paddings and paddings[0] != paddings[1]:
        allowed = f"with the base's pad_token_id, {paddings[0]}, as adapters are served with that"
        raise InputError("tuned", allowed, f"pad_token_id {paddings[1]}", _OTHER_ENTRIES)
    names = sorted(name for name in own | other if own.get(name) != other.get(name))
    return {n: (own.get(n), other.get(n)) for n in names if not _HARMLESS.fullmatch(n)}


def _require_parameters(
    tuned: Any, sizes: dict[str, tuple[int, ...]], differing: dict[str, tuple[Any, Any]]
) -> None:
    """Refuse an empty tuned network with other parameters than one of the base has."""
    if sizes != {name: tuple(value.shape) for name, value in tuned.named_parameters()}:
        each = differing.items()
        given = ", ".join(f"{name} {other!r} instead of {own!r}" for name, (own, other) in each)
        raise InputError(
            "tuned", "with a configuration for the base's weights", given, _OTHER_ENTRIES
        )


def _require_used(checkpoint: Checkpoint, network: Any, blocks: str) -> None:
    """Refuse weights of a network with another configuration than the checkpoint's own."""
    if deep := sorted(k for k in checkpoint.unused if re.search(rf"(^|\.){blocks}\.", k)):
        allowed = "of as many blocks as its config.json says, with weights of the same names"
        raise InputError(checkpoint.name, allowed, listed(deep))
    first: dict[int, str] = {}
    for name, value in network.named_parameters(remove_duplicate=False):
        same = first.setdefault(id(value), name)
        if name in checkpoint.unused and not checkpoint.read(name).equal(checkpoint.read(same)):
            allowed = f"with one weight for {name} and {same}, as tie_word_embeddings says"
            remedy = "set it to false in config.json, or save the model with one weight"
            raise InputError(checkpoint.name, allowed, "two", remedy)


def _linear_modules(body: nn.Module, prefix: str, blocks: str, task: Task) -> Iterable[Module]:
    """The linear modules of the blocks, and a pooling layer that a classifier reads."""
    from transformers.pytorch_utils import Conv1D

    for name, module in body.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        name, kind = prefix + name, "other"
        if name.startswith(f"{blocks}."):
            # After the number of the block.
            part = name.removeprefix(f"{blocks}.").split(".")[1]
            kind = "attention" if part in ("attention", "attn", "self_attn") else "mlp"
        elif name != f"{prefix}pooler.dense" or task != "classification":
            # The last hidden states do not depend on a pooling layer.
            continue
        transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.shape
        shape = (columns, rows) if transposed else (rows, columns)
        yield Module(name, kind, shape, module.bias is not None, transposed)
