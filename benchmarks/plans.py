"""Seconds and memory of a plan for a made-up language model, and of other commands on the same.

    python benchmarks/plans.py FOLDER [--size 135m] [--texts 200] [--tokens 7] [--error 0.1]
        [--threads 1]
        [--others 'mergekit-extract-lora --model {tuned} --base-model {base} --out-path {out}']

The pair has Llama's architecture and random weights in bfloat16, of which the tuned ones differ by
rank 8 and a little noise; it is made in FOLDER, once for each size. Texts are random words, each a
token. The plan is for the own effect of nine of ten texts; every command is a process of its own. A
row for each is printed and added to FOLDER/costs.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorapower import randomness

# Blocks, width, width inside, heads, heads of keys and values, words, and whether they are tied.
SIZES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "135m": (30, 576, 1536, 9, 3, 49_152, True),
    "362m": (32, 960, 2560, 15, 5, 49_152, True),
    "1.1b": (22, 2048, 5632, 32, 4, 32_000, False),
    "8b": (32, 4096, 14_336, 32, 8, 128_256, False),
}
# Bytes of a file of weights, about.
_SHARD = 2 * 10**9


def make_pair(folder: Path, size: str) -> tuple[Path, Path]:
    """Make a base and what was tuned from it, unless they are there."""
    base, tuned = folder / size / "base", folder / size / "tuned"
    blocks, width, inside, heads, kv, words, tied = SIZES[size]
    config = LlamaConfig(
        num_hidden_layers=blocks,
        hidden_size=width,
        intermediate_size=inside,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=words,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
    )
    if (tuned / "config.json").is_file():
        return base, tuned
    with torch.device("meta"):
        shapes = {n: v.shape for n, v in LlamaForCausalLM(config).named_parameters()}
    draw = randomness.generator(0, "weights of a benchmark")
    both: list[dict[str, torch.Tensor]] = [{}, {}]
    files: list[dict[str, str]] = [{}, {}]
    for place in (base, tuned):
        place.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        for place, weights, names in zip((base, tuned), both, files, strict=True):
            file = f"model-{len(set(names.values())):05}.safetensors"
            save_file(weights, place / file, metadata={"format": "pt"})
            names |= dict.fromkeys(weights, file)
            weights.clear()

    for name, shape in shapes.items():
        weight = changed = torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 2:
            weight = torch.empty(shape).normal_(0, 0.02, generator=draw).bfloat16()
            changed = weight
        if ".layers." in name and len(shape) == 2:
            left, right = (torch.empty(n, 8).normal_(generator=draw) for n in shape)
            noise = torch.empty(shape).normal_(generator=draw)
            change = 0.002 * (left @ right.mT) / 8**0.5 + 0.0002 * noise
            changed = (weight + change).bfloat16()
        for weights, value in zip(both, (weight, changed), strict=True):
            weights[name] = value.clone()
        if sum(2 * value.numel() for value in both[0].values()) > _SHARD:
            write()
    write()
    vocabulary = Tokenizer(models.WordLevel({f"w{k}": k for k in range(words)}, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="w1", eos_token="w1")
    for place, names in zip((base, tuned), files, strict=True):
        index = {"metadata": {}, "weight_map": names}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
        tokenizer.save_pretrained(place)
        config.save_pretrained(place)
    return base, tuned


def write_texts(file: Path, number: int, tokens: int, words: int) -> None:
    """Write lines of random words."""
    draw = randomness.generator(0, "texts of a benchmark")
    ids = torch.randint(2, words, (number, tokens), generator=draw)
    file.write_text("\n".join(" ".join(f"w{k}" for k in line) for line in ids.tolist()))


def measure(command: list[str], threads: int, log: Path) -> dict[str, Any]:
    """Run a command; its seconds, processor seconds, and memory at most, in GB."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        _, status, used = os.wait4(process.pid, 0)
    # A plan that misses its error has status 1.
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        sys.exit(f"{shlex.join(command)} failed: see {log}")
    # Linux counts kilobytes, macOS bytes.
    unit = 1e9 if sys.platform == "darwin" else 1e6
    return {
        "seconds": round(time.perf_counter() - start),
        "processor": round(used.ru_utime + used.ru_stime),
        "memory": round(used.ru_maxrss / unit, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=7)
    parser.add_argument("--error", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--others", nargs="*", default=[], help="other commands, not the plan")
    chosen = parser.parse_args()
    base, tuned = make_pair(chosen.folder, chosen.size)
    name = f"{chosen.size}-{chosen.texts}-{chosen.tokens}-{chosen.threads}"
    texts = chosen.folder / f"{name}.txt"
    write_texts(texts, chosen.texts, chosen.tokens, SIZES[chosen.size][5])
    options = ["--texts", str(texts), "--error", str(chosen.error)]
    command = [sys.executable, "-m", "loraplan", "plan", str(base), str(tuned), *options]
    out = chosen.folder / "out"
    given = {"base": base, "tuned": tuned, "out": out}
    others = [shlex.split(other.format(**given)) for other in chosen.others]
    for each in others or [command]:
        log = chosen.folder / f"{name}-{Path(each[0]).name}.log"
        row = {
            "size": chosen.size,
            "command": "loraplan plan" if each is command else Path(each[0]).name,
            "texts": "" if others else chosen.texts,
            "tokens": "" if others else chosen.tokens,
            "error": "" if others else chosen.error,
            "threads": chosen.threads,
        }
        row |= measure(each, chosen.threads, log)
        for column, said in (("announced", "of memory"), ("read", "to read")):
            found = re.search(rf"([\d.]+) GB {said}", log.read_text())
            row[column] = found[1] if found else ""
        print(row)
        file = chosen.folder / "costs.csv"
        new = not file.is_file()
        with file.open("a", newline="") as opened:
            writer = csv.DictWriter(opened, [*row])
            if new:
                writer.writeheader()
            writer.writerow(row)
        shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
