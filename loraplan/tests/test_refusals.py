"""Bad input of the command: each in one line, with status 2, before any text is passed."""

from __future__ import annotations

import functools
import gzip
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import checkpoint_files as files
import huggingface_hub
import peft
import pytest
import torch
import transformers
from checkpoint_files import Patch
from test_tuned_adapters import train
from torch import Tensor

import loraplan
from loraplan import __main__, _models, planner
from loraplan._measuring import TunedOutputs
from loraplan._models import quiet

BERT, LLAMA, GPT = "BertForSequenceClassification", "LlamaForCausalLM", "GPT2LMHeadModel"
CONFIG, FACTORS, WHOLE = "adapter_config.json", "adapter_model.safetensors", "model.safetensors"
MANY, FEW = "\n".join(files.texts(140)), "\n".join(files.texts(121))
LINES = "--size 0.02 --texts texts/lines.txt"
PLAN = f"plan base tuned {LINES}"
Change = Callable[[Path], Any]


class Row(NamedTuple):
    """A command, words of what is said, and what is done before to the folder where it runs."""

    command: str
    said: str
    change: Change = lambda folder: None


def put(name: str, written: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(
        written if isinstance(written, bytes) else written.encode("utf-8", "surrogatepass")
    )


def drop(pattern: str) -> Change:
    return lambda folder: [*map(Path.unlink, folder.glob(pattern))]


def cut(name: str, size: int) -> Change:
    return lambda folder: os.truncate(folder / name, size)


def entries(**values: Any) -> Change:
    return functools.partial(files.configure, **values)


def tensors(change: Callable[[dict[str, Tensor]], Any], **values: Any) -> Change:
    return functools.partial(files.alter, change=change, **values)


def within(name: str, command: str, rows: list[tuple[str, Change]]) -> list[Row]:
    """Rows of one command that change a folder of this name."""
    return [Row(command, said, lambda p, c=change: c(p / name)) for said, change in rows]  # type: ignore[misc]


# Files of texts


def content(name: str, said: str, *written: str | bytes) -> list[Row]:
    """A file, and maybe flags after its name."""
    command, file = f"plan base tuned --size 0.02 --texts {name}", name.split()[0]
    return [Row(command, said, put(file, each)) for each in written]


def chats(said: str, *messages: object, template: str = "{{ messages[0].content }}") -> list[Row]:
    def change(folder: Path, written: str) -> None:
        (folder / "one.jsonl").write_text(written)
        (folder / "tuned" / "chat_template.jinja").write_text(template)

    written = (json.dumps({"messages": each}) for each in messages)
    command = "plan base tuned --size 0.02 --texts one.jsonl"
    return [Row(command, said, functools.partial(change, written=w)) for w in written]


def labelled(label: object) -> str:
    """A wrong label of one of many texts, and a text of half a character in the last line."""
    given = [{"text": text, "label": 0} for text in files.texts(140)]
    given[7]["label"] = label
    return "\n".join(map(json.dumps, given))


def grouped(of: int | None) -> str:
    """Texts of so many groups, or without any group."""
    given = ({"text": text, "of": of and i % of} for i, text in enumerate(files.texts(140)))
    return "\n".join(map(json.dumps, given))


HALF = labelled(0) + '\n{"text": "half of one \\ud83d"}'
SAY = [{"role": "user", "content": "hello"}]
FIELDS = "texts must be entries with a field text"
KINDS = "texts must be of a kind that is read: .txt, .jsonl, .csv"
WIDE = "rows of as many fields as the header has"
TEXTS = [
    *[
        Row(f"plan base tuned --size 0.02 --texts {rest}", said)
        for rest, said in {
            "nowhere.txt": "a text file in UTF-8; got nowhere.txt (no such file)",
            "texts": "a text file in UTF-8; got texts ([Errno 21]",
            "tuned/config.json": "to a .jsonl file",
            "texts/lines.txt --held-out nowhere.txt": "got nowhere.txt (no such file)",
            "texts/lines.txt --held-out texts": "got texts ([Errno 21]",
            "texts/lines.txt --held-out texts/lines.txt": "held_out must be of texts that are not",
        }.items()
    ],
    Row(f"{PLAN} --held-out one.txt", "held_out must be at least 61", put("one.txt", FEW[:300])),
    Row("check base lora tuned --texts one.txt", "at least 1 text", put("one.txt", "\n")),
    *content("one.txt", "texts must be at least 122 texts", "", "\n \n\t\n", FEW, FEW[:300] * 9),
    *content("one.txt", "texts must be of at least 122 groups", MANY.replace("\nw1", "\n\nw1")),
    *content("one.jsonl --group of", "texts must be of at least 122 groups", grouped(121)),
    *content("one.jsonl --group by", "with a field by, a name or a number", grouped(61)),
    *content("one.jsonl --group of", "with a field of", grouped(None), '{"text": "a", "of": []}'),
    *content(
        "one.csv --group of", "with a field of, a name or a number", "text\na\n", "text,of\na,\n"
    ),
    Row(
        f"{PLAN} --group of",
        "group must be given for .jsonl or .csv; got texts/lines.txt: separate",
    ),
    *content("one.csv", "texts must be at least", "", "text\n"),
    *content("one.jsonl", "texts must be at least", "", "\n"),
    *content("one.txt", "got one.txt ('utf-8' codec", MANY.encode("utf-16"), b"na\xefve"),
    *content("one.txt", "got one.txt ('utf-8' codec", gzip.compress(MANY.encode())),
    *content("one.txt", "got one.txt (it has bytes of zeros)", MANY.encode("utf-16-le")),
    *content("one.json", "write each text as an object on a line of its own", "[]"),
    *content("one.tsv", "save it with commas, as .csv", "text\none"),
    *[row for end in ("gz", "parquet", "xlsx", "pdf") for row in content(f"a.{end}", KINDS, "")],
    *content("one.jsonl", "lines of JSON; got one.jsonl, line 1", "{", "one", "[" * 100_000),
    *content("one.jsonl", "lines of JSON; got one.jsonl, line 3", '\n{"text": "a"}\n{"text": "b'),
    *content("one.jsonl", FIELDS, '["one"]', '"one"', "null", '{"Text": "a"}', '{"prompt": "a"}'),
    *content("one.jsonl", FIELDS, *(f'{{"text": {x}}}' for x in ("null", "3", "[]", "{}", "true"))),
    *content("one.jsonl", "chats have a field messages", '{"conversations": []}'),
    *content("one.jsonl", "texts must be of whole characters", HALF),
    Row(f"{PLAN} --held-out a.jsonl", "held_out must be of whole", put("a.jsonl", HALF)),
    *content("one.csv", FIELDS, "one\ntwo\n", "text;label\na;1\n"),
    *content("one.csv", "names each field once", "text,text\na,b\n"),
    *content("one.csv", WIDE, "text,label\na,b,1\n", "text,label\na\n"),
    *content("one.csv", "rows of .csv; got one.csv, line", 'text\n"a"b\n', 'text\n"a'),
    *content("one.csv", "field larger than field limit", "text\n" + "a" * 200_000),
    *chats("texts must be chats of one message or more", "hello", {}, [], ["hello"]),
    *chats('give each a "role" and a "content"', [{"content": "hello"}], [{"role": "user"}]),
    *content("one.jsonl", "no template for them", json.dumps({"messages": SAY})),
    *chats("the tuned model's template takes", SAY, template="{{ raise_exception('no') }}"),
    *chats("the tuned model's template takes", SAY, template="{{ 3 + messages }}"),
    *chats("the tuned model's template takes", SAY, template="{% if %}"),
    *[
        row
        for label in (2, -1, 0.5, True, "good", "2", "-1", ["0"], {"a": 0})
        for row in content("one.jsonl", "label must be a class, 0 to 1, or", labelled(label))
    ],
]

# Flags

SHARES = [f"{flag} {x}" for flag in ("--same", "--same-answers") for x in ("0", "1", "nan", "-1")]
FLAGS = {
    "error must be above 0 and below 1": [f"--error {x}" for x in ("0", "-0.1", "1.1", "nan")],
    "must be above 0 and below 1": SHARES,
    "Invalid value for '--error'": [f"--error {x}" for x in ("abc", "10%", "0,1")],
    "size must be a number of megabytes above 0": [
        f"--size {x}" for x in ("0", "-1", "nan", "inf")
    ],
    "Invalid value for '--size'": ["--size 1MB"],
    "Invalid value for '--one-rank'": ["--one-rank 1.5", "--one-rank many"],
    "No such option: --dtype": ["--size 1 --dtype bfloat16"],
    "one_rank must be an integer from 1 to 64": [f"--one-rank {x}" for x in (0, 65, -1)],
    "tokens must be an integer from 8": [f"--size 1 --tokens {x}" for x in (7, 0, -1)],
    "same, error, same_answers must be given alone": ["--error 0.1 --same 0.9"],
    "same, error, same_answers and size must be given alone": ["--size 1 --same 0.9"],
    "same_answers must be asked of a language model": ["--same-answers 0.5"],
    "device must be one that": [f"--size 1 --device {x}" for x in ("cuda:99", "meta", "x", "''")],
    "modules must be all, attention, mlp, or a regular": [
        f"--size 1 --modules {x}" for x in ("nothing", "(", "*", "layer.9")
    ],
    "No such option: --force": ["--force"],
}
COMMANDS = [
    *[Row(f"plan base tuned --texts texts/lines.txt {f}", s) for s in FLAGS for f in FLAGS[s]],
    Row("plan base tuned", "texts must be given (--texts FILE)"),
    Row(
        "plan gpt/base gpt/base --texts texts/lines.txt --same-answers 0.5",
        "answers must be left out for a model of as few positions",
    ),
    Row("plans base tuned", "No such command 'plans'"),
]

# Checkpoints

WEIGHT = "bert.encoder.layer.0.attention.self.query.weight"
WORDS = "bert.embeddings.word_embeddings.weight"
INDEX = f"{WHOLE}.index.json"
MODEL = "model must be a folder with a configuration, weights and a tokenizer"


def two(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / f"{name}.gguf").touch()


def headless(weights: dict[str, Tensor]) -> None:
    for name in [name for name in weights if "classifier" in name]:
        del weights[name]


def deep(folder: Path) -> None:
    for place in map(Path, files.pair(folder / "other", LLAMA, num_hidden_layers=3)):
        files.configure(place, num_hidden_layers=2)


def untied(folder: Path) -> None:
    def head(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1

    for place in map(Path, files.pair(folder / "other", LLAMA, tie_word_embeddings=True)):
        files.alter(place, head)


WEIGHTS = "with a configuration for the base's weights; got"
PADDING = "with the base's pad_token_id, 0, as adapters are served with that; got"


def another(architecture: str, said: str, **values: Any) -> list[Row]:
    """Tuned models with whose configuration the base's weights cannot be computed."""

    def change(folder: Path, **entry: Any) -> None:
        _, tuned = files.pair(folder / "other", architecture, pad_token_id=0)
        files.configure(Path(tuned), **entry)

    command = f"plan other/base other/tuned {LINES}"
    each = values.items()
    return [Row(command, f"{said} {n} {v!r}", functools.partial(change, **{n: v})) for n, v in each]


TUNED: list[tuple[str, Change]] = [
    ("a folder without config.json: name the folder", drop("config.json")),
    *[(MODEL, put("config.json", written)) for written in ("{", "[]", "{}")],
    (f"a folder without {WHOLE}", drop(WHOLE)),
    *[("which is damaged", put(WHOLE, written)) for written in ("", "damaged", b"\xff" * 99)],
    ("which is damaged", cut(WHOLE, 9_999)),
    *[
        (f"{INDEX}, which is damaged", put(INDEX, written))
        for written in ("", "{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}')
    ],
    ("a folder without gone", put(INDEX, '{"weight_map": {"a": "gone"}}')),
    ("model must be a folder with a tokenizer", drop("*token*")),
    (
        "a token to pad with",
        put("tokenizer_config.json", '{"tokenizer_class": "TokenizersBackend"}'),
    ),
    ("of one shape with the other", tensors(lambda w: w.update({WEIGHT: torch.ones(3, 3)}))),
    ("resize both vocabularies", tensors(lambda w: w.update({WORDS: torch.ones(70, 24)}))),
    (f"got one without {WEIGHT}", tensors(lambda w: w.pop(WEIGHT))),
    ("got one without classifier", tensors(headless)),
    ("got one with strange", tensors(lambda w: w.update(strange=torch.ones(2)))),
    (f"got {WEIGHT} with 2", tensors(lambda w: w[WEIGHT].view(-1)[:2].fill_(torch.nan))),
    ("1 entries that are NaN", tensors(lambda w: w[WORDS].view(-1)[:1].fill_(torch.inf))),
    ("weights of type i8", tensors(lambda w: w.update(q=torch.ones(2).char()))),
    ("type f8_e4m3", tensors(lambda w: w.update(q=torch.ones(2).to(torch.float8_e4m3fn)))),
    ("quantized by gptq: take", entries(quantization_config={"quant_method": "gptq"})),
    ("quantized by bitsandbytes", entries(quantization_config={"load_in_8bit": True})),
    ("quantized by some method", entries(quantization_config={"bits": 3})),
    *[(f"type '{kind}'", entries(model_type=kind)) for kind in ("albert", "qwen3_moe", "gemma3")],
    (MODEL, entries(model_type="nothing of this name")),
    *[(f"got {a}", entries(architectures=[a])) for a in ("BertForMaskedLM", "MyBertModel")],
    ("got nothing", entries(architectures=[])),
    ("got multi_label", entries(problem_type="multi_label_classification")),
    ("for field 'num_hidden_layers'", entries(num_hidden_layers="two")),
]
BASE: list[tuple[str, Change]] = [
    ("base must be with all weights of the blocks", tensors(lambda w: w.pop(WEIGHT))),
    ("base must be a checkpoint of transformers with weights", drop(WHOLE)),
    ("base must be of finite weights", tensors(lambda w: w[WORDS].fill_(torch.nan))),
]
CHECKPOINTS = [
    *[
        Row(f"plan {models} {LINES}", said)
        for models, said in {
            "./nowhere tuned": "base must be a folder that exists",
            "base ./nowhere": "tuned must be a folder that exists",
            "base /nowhere": "tuned must be a folder that exists",
            "base a/b/c": "tuned must be a folder that exists",
            "base ''": "tuned must be a folder, a file in GGUF",
            "base texts/lines.txt": "the hub did not give it",
            "base somebody/other": "'somebody/other': no such folder, and the hub did not give it",
            "somebody/other tuned": "base must be a folder that exists, or a name on the hub",
            "base no:name": "no such folder, and the hub did not give it",
            "base one.gguf": "model must be a file that exists; got 'one.gguf'",
            "base texts": "'texts', a folder without config.json",
            "texts tuned": "base must be a checkpoint of transformers with weights in safetensors",
            "lora tuned": "base must be a checkpoint with all its weights; got 'lora', an adapter",
            "tuned gpt/tuned": "tuned must be of type 'bert', like the base; got gpt2",
        }.items()
    ],
    Row(f"plan base a.gguf {LINES}", "a file in GGUF of a language model", put("a.gguf", "GGUF")),
    *within("texts", f"plan base texts {LINES}", [("one.gguf, two.gguf: name one", two)]),
    *within("tuned", PLAN, TUNED),
    *within("base", PLAN, BASE),
    *within("base", f"{PLAN} --one-rank 8", [("with the tuned model's", tensors(headless))]),
    Row(f"plan other/base other/tuned {LINES}", "as many blocks as its config.json says", deep),
    Row(f"plan other/base other/tuned {LINES}", "as tie_word_embeddings says; got two", untied),
    *another("BertModel", WEIGHTS, num_hidden_layers=1, max_position_embeddings=32),
    *another("RobertaModel", PADDING, pad_token_id=1),
    *another("GPT2ForSequenceClassification", PADDING, pad_token_id=7),
    *another(LLAMA, WEIGHTS, tie_word_embeddings=True),
    *another("Qwen3ForCausalLM", WEIGHTS, head_dim=4),
    *another("StableLmForCausalLM", WEIGHTS, use_parallel_residual=True),
]

# Adapters, in place of the tuned model and to check

KEY = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
STRANGE = {"base_model.model.strange.weight": torch.ones(2)}


def untrained(factors: dict[str, Tensor]) -> None:
    headless(factors)
    for name in factors:
        if "lora_B" in name:
            factors[name].zero_()


def renamed(factors: dict[str, Tensor]) -> None:
    for name in [*factors]:
        factors[name.replace(".layer.", ".layers.")] = factors.pop(name)


def prompts(folder: Path, kind: Any) -> None:
    with quiet():
        network: Any = transformers.BertForSequenceClassification.from_pretrained("base")
        shutil.rmtree(folder)
        made = peft.get_peft_model(network, kind(task_type="SEQ_CLS", num_virtual_tokens=3))
        made.save_pretrained(str(folder))


SHRUNK: list[tuple[str, Change]] = [
    ("another kind (use_dora): merge it", entries(use_dora=True)),
    ("(alora_invocation_tokens)", entries(alora_invocation_tokens=[1, 2])),
    *[(f"of type {kind}: merge it", entries(peft_type=kind)) for kind in ("LOHA", "IA3")],
    ("started by pissa_niter_4", entries(init_lora_weights="pissa_niter_4")),
    ("of TOKEN_CLS", entries(task_type="TOKEN_CLS")),
    *[("does not fit", entries(**{n: v})) for n, v in (("r", 4), ("r", 0), ("lora_alpha", "x"))],
    ("does not fit", entries(target_modules=["nothing"])),
    (f"{KEY} has 2 entries", tensors(lambda t: t[KEY].view(-1)[:2].fill_(torch.nan))),
    ("1 entries that are NaN or inf", tensors(lambda t: t[KEY].view(-1)[:1].fill_(-torch.inf))),
    ("with all its factors", tensors(lambda t: t.pop(KEY))),
    ("name the base that it is for", tensors(lambda t: t.update({KEY: torch.ones(3, 9)}))),
    ("train it with that in modules_to_save", tensors(dict.clear)),
    ("with base_model.model.strange.weight, which it lacks", tensors(lambda t: t.update(STRANGE))),
    ("of which nothing is left: name one", tensors(untrained, modules_to_save=None)),
    ("of type None: merge it", put(CONFIG, "{}")),
    *[("config.json peft reads", put(CONFIG, written)) for written in ("{", "[]")],
    ("config.json peft reads", entries(peft_type="MINE")),
    ("file is missing or damaged", drop(FACTORS)),
    ("file is missing or damaged", put(FACTORS, "no")),
    ("file is missing or damaged", cut(FACTORS, 999)),
]
READ = "standin must be one that peft reads into the base"
CHECKED: list[tuple[str, Change]] = [
    ("got 'lora', a folder without config.json", drop(CONFIG)),
    *[("config.json peft reads", put(CONFIG, written)) for written in ("{", "[]")],
    ("config.json peft reads", entries(peft_type="MINE")),
    ("does not fit", entries(r=4)),
    ("does not fit", entries(target_modules=["nothing"])),
    ("file is missing or damaged", drop(FACTORS)),
    ("file is missing or damaged", put(FACTORS, "no")),
    ("file is missing or damaged", cut(FACTORS, 999)),
    ("standin must be an adapter", tensors(lambda t: t.update({KEY: torch.ones(3, 9)}))),
    ("which it lacks", tensors(renamed)),
    ("that are NaN or infinite", tensors(lambda t: t[KEY].fill_(torch.nan))),
    # Of other kinds, which peft computes.
    (READ, entries(use_dora=True, r=4)),
    (READ, entries(peft_type="LOHA")),
    *[
        (f"changes weights; got lora, of type {kind}", functools.partial(prompts, kind=made))
        for kind, made in {
            "PROMPT_TUNING": peft.PromptTuningConfig,
            "P_TUNING": peft.PromptEncoderConfig,
            "PREFIX_TUNING": peft.PrefixTuningConfig,
        }.items()
    ],
]
SCORES = [
    Row(f"check --scores a.csv{more}", said, put("a.csv", written))
    for said, written, more in (
        ("rows with tuned and standin, numbers", "tuned,other\n1,1\n", ""),
        ("rows with tuned and standin, numbers", "tuned,standin\n1,yes\n", ""),
        ("scores must be from 0 to 1", "tuned,standin\n1,2\n", ""),
        ("scores must be at least one row", "tuned,standin\n", ""),
        ("given without models and texts", "tuned,standin\n1,1\n", " --texts a.csv"),
        ("given without models and texts", "tuned,standin\n1,1\n", " --error 0.1"),
    )
] + [Row("check --scores a.txt", "of a kind that is read: .jsonl, .csv", put("a.txt", "1"))]
ADAPTERS = [
    *within("lora", f"shrink base lora --out new {LINES}", SHRUNK),
    Row(f"plan gpt/base lora {LINES}", "tuned must be an adapter for GPT2"),
    *within("lora", "check base lora tuned --texts texts/lines.txt", CHECKED),
    *[
        Row(f"check {rest}", said)
        for rest, said in {
            "base ./nowhere tuned --texts texts/lines.txt": "standin must be a folder that exists",
            "base gpt/base tuned --texts texts/lines.txt": "standin must be of type 'bert', like",
            "tuned --texts texts/lines.txt": "models must be a stand-in and a tuned model, maybe",
            "base lora tuned --same 1 --texts texts/lines.txt": "same must be above 0 and below 1",
            "base lora tuned --error 0 --texts texts/lines.txt": "error must be above 0 and below",
            "base tuned --error 0.1 --texts texts/lines.txt": "error must be asked with a base",
            "base lora tuned --same-answers 0.5 --texts texts/lines.txt": "same_answers must be",
            "base gpt/lora tuned --texts texts/lines.txt": "name the base that it is for",
            "base lora ./nowhere --texts texts/lines.txt": "tuned must be a folder that exists",
            "lora lora tuned --texts texts/lines.txt": "base must be a checkpoint with all its",
            "base lora tuned --texts nowhere.txt": "(no such file)",
            "base lora tuned --texts texts/lines.txt --device x": "device must be one that",
            "base lora tuned --texts texts/lines.txt --tokens 3": "tokens must be an integer",
        }.items()
    ],
]

# Folders to write to

# Inputs, and the options that name outputs.
APART = [
    ("extract ./base ./link", "--out ./tuned"),
    ("extract ./base ./tuned", "--out ./tuned/adapter"),
    ("extract ./base ./tuned", "--out ."),
    ("extract ./base ./tuned", "--out ./texts"),
    ("extract ./base ./tuned --held-out ./texts/lines.txt", "--out ./texts/lines.txt"),
    ("shrink ./base ./adapter", "--out ./adapter"),
]
EXTRACT, FILE = f"extract base tuned {LINES} --out", put("file", "")
FOLDERS = [
    *[Row(f"{i} {LINES} --overwrite {o}", "must be apart from all that is read") for i, o in APART],
    Row(f"{EXTRACT} adapter", "or replace it with --overwrite"),
    Row(f"{EXTRACT} lora", "out must be a new folder"),
    Row(f"{EXTRACT} lora --overwrite", "out must be a new folder"),
    Row(f"{EXTRACT} file", "out must be a new folder", FILE),
    Row(f"{EXTRACT} file/new", "out must be in a folder that can be written to", FILE),
    Row(f"{EXTRACT} adapter --overwrite", "adapter, with notes", put("adapter/notes", "mine")),
    Row("example texts", "DIR must be a new folder, or an empty one; got texts"),
    Row("example file", "DIR must be a new folder, or an empty one; got file", FILE),
    Row("example file/new", "DIR must be in a folder that can be written to", FILE),
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pairs, adapters, texts, and a link."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "texts").mkdir()
    (folder / "texts" / "lines.txt").write_text(MANY)
    pair = files.pair(folder)
    train(folder / "lora", pair[0], BERT)
    loraplan.extract(*pair, MANY.split("\n"), folder / "adapter", size=0.015)
    other, _ = files.pair(folder / "gpt", GPT)
    train(folder / "gpt" / "lora", other, GPT)
    (folder / "link").symlink_to("tuned", target_is_directory=True)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    "row",
    [*TEXTS, *COMMANDS, *CHECKPOINTS, *ADAPTERS, *SCORES, *FOLDERS],
    ids=lambda row: f"{row.said} {row.command}"[:90],
)
def test_bad_input_is_one_line(
    row: Row, given: Path, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(given, tmp_path / "own", symlinks=True))
    monkeypatch.chdir(folder)
    row.change(folder)
    capsys.readouterr()
    before = contents(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(_models, "_places", lambda: (tmp_path / "here", tmp_path / "cache"))
    for place, name in ((planner, "advance"), (TunedOutputs, "record")):
        monkeypatch.setattr(place, name, lambda *_: pytest.fail("texts are passed"))
    words = [word.strip("'") for word in row.command.split()]
    monkeypatch.setattr(sys, "argv", ["loraplan", *words])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    out, err = capsys.readouterr()
    assert (out, ended.value.code, err.count("\n")) == ("", 2, 1), err
    assert err.startswith("error: ")
    assert row.said in err
    assert contents(folder) == before


ONES: Any = [1] * 140
ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("error must be above 0 and below 1", {"error": "0.1"}),
    ("same must be above 0 and below 1", {"same": True}),
    ("size must be a number of megabytes", {"size": "1"}),
    ("texts must be of str or Text; got 1", {"texts": ONES}),
    ("texts must be of str or Text; got ('w1', 0): write Text", {"texts": [("w1", 0)] * 140}),
    ("texts must be of str or Text", {"texts": [loraplan.Text(*ONES[:1])] * 140}),
    ("texts must be of groups with a str", {"texts": [loraplan.Text("w1", group=ONES[0])]}),
    ("texts must be a list of texts", {"texts": 5}),
    ("held_out must be of str or Text", {"held_out": ONES}),
    ("modules must be all, attention, mlp, or", {"modules": 3}),
    ("carry must be one of 'chosen', 'all', 'none'", {"carry": "some"}),
    ("carry must be left out with one_rank", {"carry": "all", "one_rank": 8}),
    ("max_rank must be an integer from 1", {"max_rank": 0}),
    ("thorough must be True or False; got 'no'", {"thorough": "no"}),
    ("device must be one that torch finds", {"device": ["cpu"]}),
    ("base must be a folder, a file in GGUF", {"base": 3}),
    ("tuned must be a folder, a file in GGUF", {"tuned": None}),
    ("options must be among held_out, modules, ", {"module": "all"}),
]


@pytest.mark.parametrize(("said", "arguments"), ARGUMENTS, ids=str)
def test_bad_arguments_are_refused_by_name(
    said: str, arguments: dict[str, Any], given: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(planner, "advance", lambda *_: pytest.fail("texts are passed"))
    models = {name: str(given / name) for name in ("base", "tuned")}
    usable = models | {"texts": MANY.split("\n")}
    with pytest.raises(loraplan.InputError) as refused:
        loraplan.plan(**usable | arguments)
    assert str(refused.value).startswith(said)
