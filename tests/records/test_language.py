"""Fine-tuning: tasks and their metrics, sources of texts, encoders, and runs."""

from __future__ import annotations

import ast
import gzip
import html
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import glue_files
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from lorapower import InputError, randomness
from lorapower.checkpoints import _libraries
from lorapower.checkpoints import _models as hub
from lorapower.experiments import sweeps
from records import language, models, protocols, record, texts, tune
from records.language import TARGETS, Found, Lora, Method, Problem, Setting, Whole
from records.texts import GLUE, METRICS, SENTENCES, Examples, Task, find

WAYS: list[Method] = [Lora(rank=2), *sweeps.grid(Whole, kind=["final", "full", "head", "linear"])]
each_task = pytest.mark.parametrize("task", GLUE.values(), ids=GLUE)
PAIRS = {"mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return glue_files.write(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random RoBERTa with its tokenizer, in a folder."""
    return save_roberta(tmp_path_factory.mktemp("roberta"))


def save_roberta(folder: Path, **changes: Any) -> str:
    from tokenizers import ByteLevelBPETokenizer

    words = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    lines = [*glue_files.ONE, *glue_files.OTHER]
    words.train_from_iterator(lines, vocab_size=400, special_tokens=special, show_progress=False)
    words.save_model(str(folder))
    transformers.RobertaTokenizerFast(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")
    ).save_pretrained(folder)
    sizes: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 34,
        "type_vocab_size": 1,
    }
    config = transformers.RobertaConfig(**sizes | changes)
    with randomness.seeded(0, "RoBERTa"):
        transformers.RobertaModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny(glue: Path, roberta: str) -> Problem:
    values: dict[str, Any] = {"task": "rte", "source": str(glue), "model": roberta}
    return Problem(head="own", epochs=1, batch=4, tokens=16, **values)


def measure(*problems: Problem, method: Method | None = None) -> list[Found]:
    method = method or Lora(rank=2)
    return language.measure([Setting(problem=problem, method=method) for problem in problems])


# Tasks


def test_metrics_have_their_known_values() -> None:
    # 6 true and 1 false positives, 3 true and 2 false negatives.
    wanted = [1] * 8 + [0] * 4
    given = [1] * 6 + [0] * 2 + [1] + [0] * 3
    matthews = (6 * 3 - 1 * 2) / math.sqrt(7 * 8 * 4 * 5)
    found = GLUE["mrpc"].scores(given, wanted)
    assert found["accuracy"] == pytest.approx(9 / 12)
    assert found["f1"] == pytest.approx(2 * 6 / (2 * 6 + 1 + 2))
    assert GLUE["cola"].scores(given, wanted)["score"] == pytest.approx(matthews)
    # Deviations −2 −1 0 1 2 and −2 −1 0 −1 4, ranks 1 2.5 4 2.5 5 for the second.
    found = GLUE["stsb"].scores([1, 2, 3, 2, 7], [1, 2, 3, 4, 5])
    assert found["pearson"] == found["score"] == pytest.approx(12 / math.sqrt(10 * 22))
    assert found["spearman"] == pytest.approx(8 / math.sqrt(10 * 9.5))
    assert math.isnan(found["accuracy"])
    assert set(found) == {*METRICS, "score"}


@each_task
def test_perfect_answers_score_one_and_constant_ones_little(task: Task) -> None:
    labels = np.array([0.0, 1.0, 0.0, 1.0, 0.0])
    assert task.scores(labels, labels)["score"] == pytest.approx(1)
    constant = np.full(5, task.constant([*labels]))
    score = task.scores(constant, labels)["score"]
    assert score == (0.6 if task.metrics[0] == "accuracy" else 0)


@each_task
def test_contributions_have_the_score_as_mean(task: Task) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, task.outputs if task.classes else 6, 200).astype(float)
    same = random.random(200) < 0.7
    given = np.where(same, labels, random.permutation(labels))
    found = task.contributions(given, labels)
    assert found.mean() == pytest.approx(task.scores(given, labels)["score"])
    assert not task.contributions(np.zeros(200), labels + 1).any()


@pytest.mark.parametrize("name", ["stsb", "cola", "rte"])
def test_contributions_have_the_error_of_the_score(name: str) -> None:
    """Against the bootstrap."""
    task, random = GLUE[name], np.random.default_rng(0)
    x = random.normal(size=(2, 1000))
    labels, given = x[0], 0.8 * x[0] + 0.6 * x[1]
    if task.classes:
        labels, given = (labels > 0.3).astype(float), (given > 0.3).astype(float)
    draws = random.integers(0, 1000, (400, 1000))
    scores = [task.scores(given[draw], labels[draw])["score"] for draw in draws]
    error = task.contributions(given, labels).std() / math.sqrt(1000)
    assert error == pytest.approx(np.std(scores), rel=0.12)


# Sources


@each_task
def test_files_are_read_as_they_are_written(task: Task, glue: Path) -> None:
    train = texts.read(task.name, str(glue), "train")
    columns = [glue_files.ONE, glue_files.OTHER][: len(task.texts)]
    pairs = zip(*columns, strict=True)
    assert train.texts == tuple(tuple(text.strip() for text in pair) for pair in pairs)
    wanted: dict[str, list[float]] = {
        "stsb": [round(5 * i / 7, 3) for i in range(8)],
        "mnli": [1.0, 0.0, 2.0] * 2 + [1.0, 0.0],
    }
    assert list(train.labels) == wanted.get(task.name, [0, 1] * 4)
    assert (train.sizes, train.left_out) == ((8,), {})
    validation = texts.read(task.name, str(glue), "validation")
    sets = 2 if task.name == "mnli" else 1
    assert validation.sizes == (8,) * sets
    assert validation.labels == train.labels * sets
    test = texts.read(task.name, str(glue), "test")
    assert test.texts == train.texts * sets
    assert len(test.labels) == 8 * sets
    assert np.isnan(test.labels).all()


@pytest.mark.parametrize(
    ("task", "file", "old", "new", "message"),
    [
        ("sst2", "SST-2/train", "sentence\tlabel", "text\tlabel", "line 1 must be .*none named"),
        ("cola", "CoLA/train", "gj04\t0", "gj04 0", "line 1 must be without empty texts"),
        ("qnli", "QNLI/dev", "No.\t", "No.\t\t", "readable table.* in line 8"),
        ("rte", "RTE/train", "\tentailment", "\tentails", "line 2: label must be one of ent"),
        ("stsb", "STS-B/train", "5.000", "5.2", "line 9: label must be a number from 0 to 5"),
        ("rte", "RTE/dev", "index", "\udcff", "must be a readable table in UTF-8"),
    ],
)
def test_wrong_files_are_named_with_their_line(
    tmp_path: Path, task: str, file: str, old: str, new: str, message: str
) -> None:
    path = glue_files.write(tmp_path) / f"{file}.tsv"
    content = path.read_bytes()
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode(errors="surrogateescape"), 1))
    part = "validation" if file.endswith("dev") else "train"
    with pytest.raises(InputError, match=message) as info:
        texts.read(task, str(tmp_path), part)
    assert str(path) in str(info.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a folder that holds MNLI.dev_matched\.tsv"):
        texts.read("mnli", str(tmp_path), "validation")


def test_lines_of_windows_and_a_missing_last_end_are_read(tmp_path: Path, glue: Path) -> None:
    path = glue_files.write(tmp_path) / "SST-2" / "train.tsv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    assert texts.read("sst2", str(tmp_path), "train") == texts.read("sst2", str(glue), "train")


def test_spoiled_lines_of_qqp_are_left_out_and_counted(tmp_path: Path) -> None:
    path = glue_files.write(tmp_path) / "QQP" / "dev.tsv"
    whole = path.read_bytes()
    spoiled = (b'7\t1\t2\t"\tWas he a real\n' + b"7\t1\t2\tWas he?\t\t1\n") * 50
    path.write_bytes(whole + spoiled)
    found = texts.read("qqp", str(tmp_path), "validation")
    assert (len(found.labels), found.left_out) == (8, {"spoiled": 100})
    texts.read.cache_clear()
    path.write_bytes(whole + spoiled + b"7\t1\t2\tWas he?\t\t1\n")
    with pytest.raises(InputError, match="line 110 must be without empty texts and labels"):
        texts.read("qqp", str(tmp_path), "validation")


@pytest.mark.parametrize(
    ("task", "source"),
    [
        *(("sst3", "hub"), ("cola", "rated"), ("cola", "code"), ("functions-next", "rated")),
        *(("cola", ""), ("cola", "no/folder")),
    ],
)
def test_sources_without_the_task_are_refused(task: str, source: str) -> None:
    with pytest.raises(InputError, match=r"^(task|source) must be "):
        texts._check(task, source)
    with pytest.raises(InputError, match="part must be one of train, validation, test"):
        texts.read("rte", "hub", "dev")


@each_task
def test_the_hub_gives_the_same_examples(
    task: Task, glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = []

    def load(name: str, config: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        part = split.partition("_")[0]
        examples = texts.read(task.name, str(glue), part)
        half = len(examples.labels) // len(examples.sizes)
        plain = task.regression or part == "test"
        labels = [x if plain else int(x) for x in examples.labels[:half]]
        rows = zip(examples.texts[:half], labels, strict=True)
        return [dict(zip(task.texts, texts, strict=True)) | {"label": y} for texts, y in rows]

    monkeypatch.setattr(datasets, "load_dataset", load)
    texts.read.cache_clear()
    for part in texts.PARTS:
        one, other = (texts.read(task.name, where, part) for where in ("hub", str(glue)))
        assert (one.texts, one.sizes) == (other.texts, other.sizes)
        np.testing.assert_equal(one.labels, other.labels)
    assert {(name, config) for name, config, _ in asked} == {("nyu-mll/glue", task.name)}
    sets = ("_matched", "_mismatched") if task.name == "mnli" else ("",)
    splits = ["train", *(part + end for part in ("validation", "test") for end in sets)]
    assert [split for _, _, split in asked] == splits
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: [dict.fromkeys(task.texts, "x") | {"label": -1}]
    )
    texts.read.cache_clear()
    with pytest.raises(InputError, match="train, row 0: label must be"):
        texts.read(task.name, "hub", "train")
    texts.read.cache_clear()


def test_without_a_network_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for look in (
        lambda: texts.read("cola", "hub", "train"),
        lambda: hub.tokenizer("nobody/has-this-encoder"),
    ):
        with pytest.raises(InputError, match="must be on the hub, or downloaded before") as info:
            look()
        assert "\n" not in str(info.value)


# Each file's distinct texts.
KINDS = {"movies": 10603, "tweets": 4140, "products": 3697, "editorials": 5118}


def archived(file: str) -> str:
    """A file of the archive, read with the command line's own tools."""
    content = b""
    for source, name in ((texts._archive(), "*/hutto*.gz"), ("-", f"*/{file}_GroundTruth.txt")):
        command = ["tar", "--wildcards", "-xzOf", source, name]
        content = subprocess.run(command, input=content, check=True, capture_output=True).stdout
    return content.decode()


def rated_parts(task: str) -> dict[str, Examples]:
    return {part: texts.read(task, "rated", part) for part in texts.PARTS}


@pytest.mark.parametrize(("kind", "distinct"), KINDS.items())
def test_each_rated_sentence_is_in_one_part(kind: str, distinct: int) -> None:
    lines = [line.split("\t") for line in archived(SENTENCES[kind].folder).splitlines()]
    table = pd.DataFrame(lines, columns=["id", "rating", "text"]).astype({"rating": float})
    table["text"] = [html.unescape(html.unescape(text)).strip() for text in table["text"]]
    table["words"] = table["text"].str.casefold().str.split().str.join(" ")
    once = table.drop_duplicates("words")
    assert len(once) == distinct
    means = rated_parts(f"{kind}-rating")
    assert Counter(t for p in means.values() for (t,) in p.texts) == Counter(once["text"])
    ratings = {t: y for p in means.values() for (t,), y in zip(p.texts, p.labels, strict=True)}
    assert ratings == dict(zip(once["text"], once["rating"], strict=True))
    assert sum(p.left_out.get("repeated", 0) for p in means.values()) == len(table) - len(once)
    signs = rated_parts(kind)
    for part, examples in signs.items():
        for (text,), label in zip(examples.texts, examples.labels, strict=True):
            assert (ratings[text] > texts.NEUTRAL) if label else (ratings[text] < -texts.NEUTRAL)
        dropped = examples.left_out.get("neutral", 0)
        assert len(examples.labels) + dropped == len(means[part].labels)
    neutral = once["rating"].abs() <= texts.NEUTRAL
    assert sum(p.left_out["neutral"] for p in signs.values()) == neutral.sum()


def test_parts_have_their_shares_and_share_no_words() -> None:
    parts = rated_parts("movies-rating")
    sizes = np.array([len(part.labels) for part in parts.values()])
    assert np.abs(sizes / sizes.sum() - [*texts.SHARES.values()]).max() < 0.01
    assert len(rated_parts("movies")["test"].labels) >= 1500
    words = [{text.casefold() for (text,) in part.texts} for part in parts.values()]
    assert not words[0] & words[1] | words[0] & words[2] | words[1] & words[2]


def test_another_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = texts._archive().read_bytes()
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    monkeypatch.setattr(texts, "_archive", lambda: path)
    texts.read.cache_clear()
    command = "`pip download --no-deps --no-binary :all: --dest .* vaderSentiment==3.3.2`"
    with pytest.raises(InputError, match=f"archive of rated sentences must be at .*: {command}"):
        texts.read("movies", "rated", "train")
    path.write_bytes(whole[:-1000])
    with pytest.raises(InputError, match=f"got {len(whole) - 1000} bytes of other .*{command}"):
        texts.read("movies", "rated", "train")


def test_texts_are_from_what_is_installed() -> None:
    constraints = Path(__file__).parent.parent / "constraints.txt"
    lines = constraints.read_text(encoding="utf-8").splitlines()
    assert {texts.REQUIREMENT, texts.SYMPY} <= {*lines}


def functions(part: str) -> list[str]:
    return [text for (text,) in texts.read("functions-next", "code", part).texts]


def test_functions_of_a_file_are_in_one_part_and_those_of_a_form_there_once() -> None:
    parts = {part: functions(part) for part in texts.PARTS}
    assert [*map(len, parts.values())] == [2722, 374, 1276]
    left_out = [texts.read("functions-next", "code", part).left_out for part in texts.PARTS]
    assert left_out == [{"repeated": number} for number in (2429, 304, 1135)]
    every = [text for found in parts.values() for text in found]
    assert all(60 <= len(text) <= 200 for text in every)
    # As they stand in a file of the part, but for indentation.
    folder = hub.folder("sympy")
    files = {
        path.relative_to(folder).as_posix(): " ".join(path.read_text(encoding="utf-8").split())
        for path in folder.rglob("*.py")
        if not {"tests", "benchmarks"} & {*path.parts}
    }
    random = np.random.default_rng(0)
    for part, found in parts.items():
        for text in random.choice(found, 20):
            words = " ".join(text.split())
            homes = [name for name, file in files.items() if words in file]
            assert part in {texts._part(home, texts.FILES) for home in homes}

    class Mask(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.Constant:
            return ast.Constant("")

    def mask(text: str) -> str:
        tree = Mask().visit(ast.parse(text))
        return re.sub(r"'\w*'", "_", ast.dump(tree, annotate_fields=False))

    assert len({*map(mask, every)}) == len(every)


def test_functions_of_another_version_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "def double(values):\n    return [2 * value for value in values if value is not None]\n"
    (tmp_path / "one.py").write_text(text)
    monkeypatch.setattr(hub, "folder", lambda package: tmp_path)
    with pytest.raises(InputError, match=r"must be sympy==1\.14\.0 .*got 1 .*`pip install sympy="):
        texts._functions("another")


def test_missing_packages_say_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="pip install --no-deps no-such-package"):
        hub.folder("no_such_package")
    monkeypatch.setitem(_libraries.LIBRARIES, "glue", ("torch", "no_such_library"))
    with pytest.raises(InputError, match="got no no_such_library: install the extra `glue`"):
        measure(Problem())


def test_the_package_needs_no_library_of_the_extra() -> None:
    code = (
        "import sys\n"
        f"for name in {_libraries.LIBRARIES['glue']!r}:\n"
        "    sys.modules[name] = None\n"
        "import lorapower.book\n"
        "from records import language, protocols, texts\n"
        "language.Setting()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Encoders


def test_the_packaged_encoder_is_trained() -> None:
    pairs = [
        ("A man is playing a guitar.", "Someone plays a musical instrument."),
        ("The tablets made me tired.", "I felt sleepy from the medicine."),
        ("A man is playing a guitar.", "The tablets made me tired."),
        ("Someone plays a musical instrument.", "I felt sleepy from the medicine."),
    ]
    same, other = language.similarities("packaged", pairs).split(2)
    assert same.min() > 0.5
    assert other.max() < 0.2


def test_pretrained_weights_are_those_shipped_and_random_ones_are_not(roberta: str) -> None:
    task = GLUE["rte"]
    shipped = models.encoder(roberta).state_dict()
    for pretrained in (True, False):
        own = language._build(roberta, task, pretrained=pretrained, seed=0).base_model.state_dict()
        same = [torch.equal(own[k], shipped[k]) for k in own if "dense.weight" in k]
        assert all(same) if pretrained else not any(same)


def test_heads_and_pooling_layers_that_are_not_shipped_depend_on_the_seed_alone(
    tmp_path: Path,
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1}
    config = transformers.BertConfig(num_attention_heads=2, intermediate_size=12, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)

    def drawn(state: int, **options: Any) -> torch.Tensor:
        with randomness.seeded(state, "state before"):
            network = language._build(str(tmp_path), GLUE["rte"], **options)
        return torch.cat([network.bert.pooler.dense.weight, network.classifier.weight])

    one = drawn(0, pretrained=True, seed=1)
    assert torch.equal(one, drawn(1, pretrained=True, seed=1))
    assert torch.equal(one, drawn(2, pretrained=False, seed=1))
    assert (one != drawn(0, pretrained=True, seed=2)).all()


def tuned(network: Any) -> set[str]:
    return {name for name, p in network.named_parameters() if p.requires_grad}


def test_what_is_tuned(roberta: str) -> None:
    def of(method: Method) -> set[str]:
        network = language._build(roberta, GLUE["rte"], pretrained=False, seed=0)
        return tuned(language._adapt(network, method, seed=0))

    adapters = {t: {n for n in of(Lora(targets=t, rank=2)) if "lora_" in n} for t in TARGETS}
    # Query, key, value and output of two layers; with the two of each perceptron.
    assert (len(adapters["attention"]), len(adapters["all"])) == (2 * 2 * 4, 2 * 2 * 6)
    assert adapters["attention"] | adapters["feed-forward"] == adapters["all"]
    assert not adapters["attention"] & adapters["feed-forward"]
    for names in (of(Lora(rank=2)), of(Whole(kind="final"))):
        assert len([n for n in names if "classifier" in n]) == 4
    final = {n for n in of(Whole(kind="final")) if "classifier" not in n}
    assert final
    assert all("layer.1." in name for name in final)
    network = language._build(roberta, GLUE["rte"], pretrained=False, seed=0)
    assert {name.split(".")[0] for name in of(Whole(kind="head"))} == {"classifier"}
    every = {name for name, _ in network.named_parameters()}
    assert of(Whole()) == every
    linear = {n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    assert of(Whole(kind="linear")) == {n for n in every if n.rpartition(".")[0] in linear}


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Electra"])
def test_encoders_of_other_kinds_can_be_adapted(kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50, hidden_size=8, dim=8, num_hidden_layers=2, n_layers=2,
        num_attention_heads=2, n_heads=2, intermediate_size=12, hidden_dim=12, embedding_size=8,
    )  # fmt: skip
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    methods: list[Method] = [Lora(targets=targets, rank=1) for targets in TARGETS]
    for method in (*methods, *WAYS[1:]):
        network = language._build(str(tmp_path), GLUE["mnli"], pretrained=True, seed=0)
        network = language._adapt(network, method, seed=0)
        ids = torch.arange(6).reshape(2, 3)
        network(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
        got = {n for n, p in network.named_parameters() if p.grad is not None}
        assert tuned(network) == got
        assert any("classifier" in name for name in got)


def test_first_steps_change_weights_as_much_at_each_rank(roberta: str) -> None:
    sizes = []
    for rank in (1, 16):
        size = []
        for seed in range(5):
            network = language._build(roberta, GLUE["rte"], pretrained=True, seed=seed)
            network = language._adapt(network.eval(), Lora(rank=rank), seed=seed)
            steps = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
            loss = network(input_ids=torch.arange(4, 20)[None], labels=torch.tensor([0])).loss
            loss.backward()
            steps.step()
            layers = [m for m in network.modules() if hasattr(m, "get_delta_weight")]
            changes = [m.get_delta_weight("default").detach().norm() for m in layers]
            size.append(float(torch.stack(changes).median()))
        sizes.append(np.median(size))
    assert 0.5 < sizes[0] / sizes[1] < 2


def test_models_that_cannot_be_used_are_refused(roberta: str, tmp_path: Path) -> None:
    network = language._build(roberta, GLUE["rte"], pretrained=False, seed=0)
    plain = torch.nn.Module()
    plain.base_model = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1))
    plain.base_model_prefix = "body"  # type: ignore[assignment]
    for refused, message in (
        (lambda: language._adapt(network, Lora(rank=17), seed=0), r"to 16 \(the weight of .* 17"),
        (lambda: language._adapt(plain, Lora(rank=1), seed=0), "linear layers for .* of Conv1d"),
        (lambda: language._adapt(plain, Whole(kind="final"), seed=0), "a stack of layers"),
        (lambda: hub.tokenizer(str(tmp_path)), "model must be a folder with a configuration"),
        (lambda: hub.tokenizer("./nowhere"), "model must be a folder that exists"),
        (lambda: language.similarities(roberta, []), "pairs must be at least one"),
    ):
        with pytest.raises(InputError, match=message):
            refused()


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Roberta"])
def test_the_mean_head_is_linear_on_the_tokens_that_are_there(kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50, hidden_size=8, dim=8, num_hidden_layers=2, n_layers=2,
        num_attention_heads=2, n_heads=2, intermediate_size=12, hidden_dim=12,
    )  # fmt: skip
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    network = language._build(
        str(tmp_path), GLUE["mnli"], pretrained=True, seed=0, head="mean"
    ).eval()
    ids = torch.arange(4, 10)
    with torch.no_grad():
        hidden = models.encoder(str(tmp_path)).eval()(input_ids=ids[None]).last_hidden_state[0]
        wanted = network.classifier.weight @ hidden.mean(0) + network.classifier.bias
        padded = torch.cat([ids, torch.ones(3, dtype=torch.long)])[None]
        mask = torch.tensor([[1] * 6 + [0] * 3])
        for found in (
            network(input_ids=ids[None]),
            network(input_ids=padded, attention_mask=mask, labels=torch.tensor([2])),
        ):
            torch.testing.assert_close(found["logits"][0], wanted, rtol=1e-4, atol=1e-5)
    wanted_loss = -torch.log_softmax(wanted, 0)[2]
    torch.testing.assert_close(found["loss"], wanted_loss, rtol=1e-4, atol=1e-5)
    rating = language._build(
        str(tmp_path), GLUE["stsb"], pretrained=True, seed=0, head="mean"
    ).eval()
    found = rating(input_ids=ids[None], labels=torch.tensor([3.0]))
    assert found["loss"].item() == pytest.approx((found["logits"].item() - 3) ** 2)


@pytest.mark.parametrize("method", WAYS, ids=lambda method: method.kind)
def test_methods_tune_the_mean_head_too(method: Method, tiny: Problem) -> None:
    problem = tiny.replace(task="stsb", head="mean")
    network = language._network(Setting(problem=problem, method=method))
    assert any("classifier" in name for name in tuned(network))
    assert not any("pooler" in name for name in tuned(network))
    assert math.isfinite(measure(problem, method=method)[0].score)


def test_lacking_and_torn_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_roberta(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    lacking = {name: w for name, w in weights.items() if "layer.1.output.dense" not in name}
    save_file(lacking, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"whose weights are all there; got .* lacks .*layer\.1\."):
        models.encoder(folder)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="model must be a folder with a configuration, weights"):
        models.encoder(folder)


# Runs


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("source", {"problem": {"source": "no/such/folder", "task": "cola"}}),
        ("model", {"problem": {"model": ""}}),
        ("tokens", {"problem": {"tokens": 4}}),
        ("part", {"problem": {"part": "test", "task": "rte", "source": "hub"}}),
        ("head", {"problem": {"task": "movies-next", "head": "mean"}}),
        ("method", {"method": {"kind": "none"}}),
        ("names", {"method": {"kind": "final", "rank": 4}}),
    ],
    ids=str,
)
def test_settings_without_meaning_are_refused(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{field} must be "):
        Setting(**values)


def test_what_is_not_usable_is_found_before_the_first_run(tiny: Problem, tmp_path: Path) -> None:
    tasks = [tiny.replace(task=task) for task in ("cola", "rte")]
    good = sweeps.grid(Setting, problem=tasks, method=sweeps.grid(Lora, rank=[1, 16]))
    language.check(good)
    for wrong, message in (
        (Setting(problem=tiny, method=Lora(rank=17)), "rank must be .* from 1 to 16"),
        (Setting(problem=tiny.replace(tokens=33)), "tokens must be .* 8 to 32"),
        (Setting(problem=tiny.replace(samples=9)), "samples must be .* from 0 to 8"),
    ):
        with pytest.raises(InputError, match=message):
            language.check([wrong, *good])
    source = glue_files.write(tmp_path)
    (source / "RTE" / "dev.tsv").unlink()
    with pytest.raises(InputError, match=r"a folder that holds RTE/dev.tsv"):
        language.check([Setting(problem=task.replace(source=str(source))) for task in tasks])


@pytest.mark.parametrize("task", ["cola", "mrpc", "stsb", "mnli"])
def test_tasks_of_each_kind_run(task: str, tiny: Problem) -> None:
    (found,) = measure(tiny.replace(task=task, tokens=28))
    about = find(task)
    assert {m for m in METRICS if not math.isnan(getattr(found, m))} == set(about.metrics)
    assert found.score == getattr(found, about.metrics[0])
    labels = texts.read(task, tiny.source, "validation").labels
    answers = language.answers(found.answers)
    assert len(answers) == len(labels)
    assert about.scores(answers, labels)["score"] == pytest.approx(found.score, abs=1e-6)
    assert 0 <= found.cut_off < 1
    matched = [found.accuracy_matched, found.accuracy_mismatched]
    if task == "mnli":
        assert np.mean(matched) == pytest.approx(found.accuracy)
    else:
        assert all(map(math.isnan, matched))


def test_runs_repeat_bit_by_bit_and_print_nothing(
    tiny: Problem, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny.replace(tokens=32)  # all that the model takes
    one, again, other = measure(tiny, tiny, tiny.replace(seed=1))
    assert capfd.readouterr() == ("", "")
    assert one.training_loss == again.training_loss
    assert one.training_loss != other.training_loss


def test_training_learns_what_is_easy(tmp_path: Path, roberta: str) -> None:
    lines = [("No.", "0"), ("a gorgeous , witty , seductive movie .", "1")] * 16
    text = "sentence\tlabel\n" + "".join(f"{one}\t{label}\n" for one, label in lines)
    (tmp_path / "SST-2").mkdir()
    for part in ("train", "dev"):
        (tmp_path / "SST-2" / f"{part}.tsv").write_text(text)
    problem = Problem(
        task="sst2", source=str(tmp_path), model=roberta, epochs=10, batch=8, tokens=24
    )
    (found,) = measure(problem, method=Lora(rank=2, learning_rate=1e-2))
    assert found.baseline == 0.5
    assert found.score == 1


@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 3), st.integers(0, 40), st.integers(0, 5)
)
def test_each_epoch_shows_the_same_samples_once(
    texts: int, batch: int, epochs: int, samples: int, seed: int
) -> None:
    problem = Problem(batch=batch, epochs=epochs, samples=samples, seed=seed)
    lengths = np.random.default_rng(seed).integers(3, 40, texts)
    steps = language._batches(problem, lengths)
    size = min(samples or texts, texts)
    each = len(steps) // epochs
    assert each == sum(
        -(-part // batch) for part in np.diff([*range(0, size, language.POOL * batch), size])
    )
    shown = [
        sorted(text for step in steps[i * each : (i + 1) * each] for text in step)
        for i in range(epochs)
    ]
    assert shown == [sorted({*shown[0]})] * epochs
    assert len(shown[0]) == size
    assert max(map(len, steps)) <= batch


def test_batches_depend_on_the_seed_alone_and_have_texts_of_about_one_length() -> None:
    lengths = np.full(100, 20)
    one, again, other = (
        language._batches(Problem(samples=50, seed=seed, pretrained=pretrained), lengths)
        for seed, pretrained in ((0, True), (0, False), (1, True))
    )
    assert one == again != other
    fewer = language._batches(Problem(samples=10), lengths)
    assert {i for step in fewer for i in step} < {i for step in one for i in step}
    lengths = np.random.default_rng(0).integers(5, 60, 4000)
    steps = language._batches(Problem(batch=32, epochs=1), lengths)
    assert sum(len(step) * lengths[step].max() for step in steps) < 1.15 * lengths.sum()
    # Short and long ones come in turn.
    means = np.array([lengths[step].mean() for step in steps])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_numbers_tuned_and_texts_cut_off_are_reported(tiny: Problem) -> None:
    tokenizer = hub.tokenizer(tiny.model)
    pairs = texts.read("rte", tiny.source, "train").texts
    lengths = np.array([len(tokenizer(*pair)["input_ids"]) for pair in pairs])
    head = 16 * 16 + 16 + 2 * 16 + 2
    attention, perceptron = 2 * 4 * 2 * (16 + 16), 2 * 2 * 2 * (16 + 24)
    sizes = {"attention": attention, "feed-forward": perceptron, "all": attention + perceptron}
    for tokens, (targets, size) in zip((16, 24, 28), sizes.items(), strict=True):
        method = Lora(targets=targets, rank=2)  # type: ignore[arg-type]
        (found,) = measure(tiny.replace(tokens=tokens), method=method)
        assert found.parameters == head + size
        assert found.cut_off == np.mean(lengths > tokens)


def test_equal_ranks_have_nearly_as_many_numbers(roberta: str) -> None:
    sizes = {"attention": 2 * 4 * (16 + 16), "feed-forward": 2 * 2 * (16 + 24)}
    whole = sum(sizes.values())
    for rank in (1, 3, 8):
        found = language.equal_ranks(roberta, rank)
        assert found["all"] == rank
        assert max(language.equal_ranks(roberta, 16).values()) <= 16
        for targets, size in sizes.items():
            others = [abs(other * size - rank * whole) for other in range(1, 40)]
            assert found[targets] == 16 or abs(found[targets] * size - rank * whole) == min(others)  # type: ignore[index]


def test_spectra_are_those_of_the_change() -> None:
    before = {name: torch.arange(384.0).reshape(16, 24) for name in ("one", "two")}
    change = torch.zeros(16, 24)
    # 9, 4, 1, 1 of 15: one direction has more than half, three have more than nine tenths.
    change[range(4), range(4)] = torch.tensor([3.0, 2.0, 1.0, 1.0])
    after = {"one": before["one"] + change, "two": before["two"] + 2 * change}
    table = language.spectra(language._changes(before, after))
    assert [*table["layer"]] == ["one", "two"]
    assert table[["half", "most"]].to_numpy().tolist() == [[1, 3]] * 2
    np.testing.assert_allclose(table[["1", "2", "4"]], [[1, 2 / 3, 1 / 3]] * 2, rtol=1e-5)
    assert table[["8", "16"]].abs().to_numpy().max() < 1e-5
    for norm, scale, weight in zip(table["norm"], (1, 2), before.values(), strict=True):
        assert norm == pytest.approx(scale * math.sqrt(15) / float(weight.norm()), rel=1e-5)


def test_tuning_all_weights_tells_what_it_changed(tiny: Problem) -> None:
    (found,) = measure(tiny, method=Whole())
    table = language.spectra(found.changes)
    assert len(table) == 12
    assert (table["norm"] > 0).all()
    weights = {"one": torch.arange(24.0).reshape(4, 6)}
    table = language.spectra(language._changes(weights, weights))
    assert table[["norm", "1", "2", "4"]].to_numpy().tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_the_protocol_compares_like_with_like(profile: str) -> None:
    settings = protocols.compare(profile, ["movies", "tweets"], "rated", "packaged", seed=7)
    grid = protocols.GRIDS[profile]
    seeds, ranks, most = grid["problem"]["seed"], grid["ranks"], grid["samples"][-1]
    assert {s.problem.seed for s in settings} == {*range(7, 7 + len(seeds))}
    assert {s.problem.part for s in settings} == {"test"}
    assert len({*settings}) == len(settings)
    for problem in {s.problem for s in settings}:
        methods = [s.method for s in settings if s.problem == problem]
        adapters = {(m.targets, m.rank) for m in methods if isinstance(m, Lora)}
        if problem.samples not in (0, most):
            assert adapters == {("all", ranks[0]), ("all", ranks[-1])}
        elif problem.pretrained:
            assert {m.kind for m in methods} == {"lora", "final", "full", "head"}
            equal = language.equal_ranks("packaged", ranks[-1], "mean")
            assert {*equal.items(), *(("all", rank) for rank in ranks)} <= adapters
        else:
            assert ("all", ranks[-1]) in adapters


@pytest.mark.parametrize(("task", "source"), [("movies-next", "rated"), ("functions-next", "code")])
def test_a_decoder_is_compared_as_it_is_shipped_and_with_its_own_head(
    task: str, source: str
) -> None:
    settings = protocols.compare("decoder", [task], source, "packaged")
    grid = protocols.GRIDS["decoder"]
    equal = language.equal_ranks("packaged", 4, "own", grid["parts"])
    assert set(equal) == {"attention", "feed-forward", "queries and keys"}
    adapters = [("lora", "all", rank) for rank in (*grid["ranks"], grid["widest"])]
    few = [adapters[0], adapters[-2], ("full", "", 0)]
    parts = [("lora", *part) for part in equal.items()]
    most = [*adapters, *parts, *few[2:], ("linear", "", 0), ("head", "", 0)]
    for seed in grid["problem"]["seed"]:
        for samples, wanted in zip(grid["samples"], (few, most), strict=True):
            methods = [
                (s.method.kind, getattr(s.method, "targets", ""), s.method.rank)
                for s in settings
                if (s.problem.seed, s.problem.samples) == (seed, samples)
            ]
            assert Counter(methods) == Counter(wanted)
    assert {(s.problem.part, s.problem.pretrained, s.problem.head) for s in settings} == {
        ("test", True, "own")
    }
    tried = protocols.search("decoder", [task], source, "packaged")
    assert {(s.problem.part, s.problem.pretrained, s.problem.head) for s in tried} == {
        ("validation", True, "own")
    }
    # Each way has three rates or more; nothing is trained to measure the base.
    ways = Counter((getattr(s.method, "targets", ""), s.method.rank) for s in tried)
    assert {*ways} == {("all", 1), ("all", 64), ("all", 192), ("", 0), *equal.items()}
    assert min(ways.values()) >= 3


def test_not_all_ways_are_run_of_each_task_and_seed() -> None:
    def ways(task: str, source: str, seed: int) -> Counter[tuple[str, int]]:
        about = "decoder", [task], source, hub.LANGUAGE
        chosen = tune.choose(protocols.compare(*about, seed=seed, seeds=1))
        return Counter((getattr(s.method, "targets", s.method.kind), s.method.rank) for s in chosen)

    few = [("all", 1), ("all", 64), ("full", 0)]
    main = [("all", rank) for rank in (1, 4, 16, 64)] + [("full", 0), ("head", 0)]
    more = [("all", 2), ("all", 8)]
    parts = [("attention", 11), ("feed-forward", 6), ("queries and keys", 21)]
    assert ways("movies", "rated", 2) == Counter([*few, *main, *more, *parts])
    assert ways("movies-next", "rated", 2) == Counter([*few, *main, *more, *parts, ("linear", 0)])
    wide = [("all", 192), ("linear", 0)]
    assert ways("functions-next", "code", 0) == Counter([*few, *main, *more, *wide])
    assert ways("movies-next", "rated", 3) == Counter(main)
    assert ways("functions-next", "code", 3) == Counter([*main, *wide])


def test_the_protocol_takes_ranks_seeds_rates_and_samples() -> None:
    def sizes(samples: int) -> set[int]:
        settings = protocols.compare("paper", ["tweets"], "rated", "packaged", samples=samples)
        return {s.problem.samples for s in settings}

    rates = {("lora", True): {1: 0.5, 9: 0.125}, ("lora", False): {1: 0.25}}
    some = protocols.compare(
        "paper", ["tweets"], "rated", "packaged", ranks=[3], seed=4, seeds=2, rates=rates
    )
    assert {s.problem.seed for s in some} == {4, 5}
    everywhere = [s.method for s in some if getattr(s.method, "targets", "") == "all"]
    assert {method.rank for method in everywhere} == {3}
    # Halfway on a logarithmic scale.
    assert [m.learning_rate for m in everywhere] == pytest.approx([0.25] * len(everywhere))
    assert sizes(64) == {64}
    assert sizes(10**6) == {0, 1000, 2000}  # of 2474


def test_rates_are_chosen_on_texts_of_their_own() -> None:
    settings = protocols.search("paper", ["movies"], "rated", "packaged")
    assert {s.problem.part for s in settings} == {"validation"}
    tried = Counter((s.method.kind, s.method.rank, s.problem.pretrained) for s in settings)
    assert set(tried.values()) == {3}
    assert len(tried) == 10
    columns = ["method", "targets", "rank", "pretrained", "learning_rate", "score"]
    rows = [
        ("lora", "all", 1, True, 0.1, 0.8),
        ("lora", "all", 1, True, 0.2, 0.9),
        ("lora", "all", 8, True, 0.3, 0.5),
        ("lora", "all", 1, False, 0.1, 0.7),
        ("lora", "all", 1, False, 0.2, 0.6),
        ("lora", "attention", 8, True, 0.1, 0.9),
        ("lora", "attention", 8, True, 0.2, 0.8),
        ("full", math.nan, math.nan, True, 0.1, 0.5),  # of equal ones the lowest
        ("full", math.nan, math.nan, True, 0.2, 0.5),
    ]
    best = {
        ("lora", True): {1: 0.2, 8: 0.3},
        ("lora", False): {1: 0.1},
        ("attention", True): {8: 0.1},
        ("full", True): {0: 0.1},
    }
    for order in (rows, rows[::-1]):
        assert protocols.best_rates(pd.DataFrame(order, columns=columns)) == best


def test_rates_of_ranks_between_are_between() -> None:
    by_rank = {1: 0.01, 4: 0.005, 16: 0.001}
    for rank, wanted in by_rank.items():
        assert protocols._rate(by_rank, rank) == pytest.approx(wanted)
    assert protocols._rate(by_rank, 2) == pytest.approx(math.sqrt(0.01 * 0.005))
    assert protocols._rate(by_rank, 64) == pytest.approx(0.0002)
    assert protocols._rate({0: 0.3}, 0) == 0.3


RECORDED = pytest.mark.parametrize(
    ("name", "task", "source", "profile", "model", "samples"),
    [
        ("movies", "movies", "rated", "paper", "packaged", 4000),
        ("encoder", "tweets", "rated", "paper", "packaged", 2000),
        ("encoder", "products", "rated", "paper", "packaged", 2000),
        ("decoder", "movies", "rated", "decoder", hub.LANGUAGE, 0),
        ("decoder", "movies-next", "rated", "decoder", hub.LANGUAGE, 0),
        ("decoder", "functions-next", "code", "decoder", hub.LANGUAGE, 0),
    ],
)


@RECORDED
def test_the_recorded_run_is_part_of_the_protocol(
    name: str, task: str, source: str, profile: str, model: str, samples: int
) -> None:
    table = protocols.read_record(name).query("task == @task")
    # The encoder's other tasks have the rates of its first.
    chosen = table if name != "encoder" else protocols.read_record("movies")
    rates = protocols.best_rates(chosen[chosen.part == "validation"])
    about = profile, [task], source, model
    seeds = table.seed.nunique()
    searched = tune.choose(protocols.search(*about))
    settings = [
        *searched,
        *protocols.compare(*about, samples=samples, seeds=seeds, rates=rates),
    ]
    columns = sweeps.columns(Setting)
    known = pd.DataFrame([sweeps._flat(one.model_dump_json()) for one in settings])[columns]
    recorded = table[columns]
    assert not recorded.duplicated().any()
    assert len(recorded.merge(known)) == len(recorded)
    assert (table.part == "validation").sum() == len(searched) * (name != "encoder")


@RECORDED
def test_recorded_scores_are_those_of_the_recorded_answers(
    name: str, task: str, source: str, profile: str, model: str, samples: int
) -> None:
    about = find(task)
    rounding = 1e-6 if about.next_tokens else 0  # of answers that are no classes
    for part, rows in protocols.read_record(name).query("task == @task").groupby("part"):
        labels = np.array(texts.read(task, source, str(part)).labels)
        for score, answers in zip(rows.score, rows.answers, strict=True):
            found = about.scores(language.answers(answers), labels)["score"]
            assert found == pytest.approx(score, rel=rounding, abs=0)


def test_records_do_not_depend_on_the_order_of_files(tiny: Problem, tmp_path: Path) -> None:
    files = []
    for seed in range(2):
        files.append(tmp_path / f"{seed}.sqlite")
        settings = [Setting(problem=tiny.replace(seed=seed), method=Lora(rank=1))]
        sweeps.run(settings, language.measure, files[-1], progress=False)
    places = [tmp_path / "one.csv.gz", tmp_path / "other.csv.gz"]
    for place, order in zip(places, (files, [*files[::-1], files[0]]), strict=True):
        assert len(record.record(order, place)) == 2
    one, other = (gzip.decompress(place.read_bytes()) for place in places)
    assert one == other


# Intervals


def test_intervals_of_known_values() -> None:
    found = protocols.interval([[1, 0, 1, 1]])
    assert found.mean == 0.75
    assert found.error == pytest.approx(math.sqrt(0.25 / 4))
    wide = 3.182446305284263 * 0.25  # Student's distribution, three degrees of freedom
    assert (found.low, found.high) == pytest.approx((0.75 - wide, 0.75 + wide))
    # Seeds that differ, texts that do not: one degree of freedom.
    found = protocols.interval([[1, 1], [0, 0]])
    assert found.error == pytest.approx(0.5)
    assert found.high - found.mean == pytest.approx(12.7062 * 0.5, rel=1e-5)
    assert protocols.interval([[1, 1], [1, 1]])[:2] == (1, 0)


@pytest.mark.parametrize(("seeds", "luck"), [(1, 0), (2, 0.02), (3, 0.02), (3, 0), (5, 0.01)])
def test_intervals_hold_the_mean_as_often_as_they_say(seeds: int, luck: float) -> None:
    """Texts of different difficulty, trainings of different luck; the mean over all is known."""
    random = np.random.default_rng(0)
    held = []
    for _ in range(400):
        texts = random.normal(size=800)
        # Two methods on the same texts, the second 0.05 better; difficulty cancels, luck does not.
        one, other = (
            random.random((seeds, 800))
            < np.clip(0.5 + 0.1 * texts + luck * random.normal(size=(seeds, 1)) + shift, 0, 1)
            for shift in (0, 0.05)
        )
        low, high = protocols.interval(other.astype(float) - one)[2:]
        held.append(low <= 0.05 <= high)
    assert 0.93 <= np.mean(held)


@pytest.mark.parametrize("values", [[1, 0], [[1]], []])
def test_intervals_of_nothing_are_refused(values: list[Any]) -> None:
    with pytest.raises(InputError, match=r"values must be \[seeds, at least two texts\]; got"):
        protocols.interval(values)
