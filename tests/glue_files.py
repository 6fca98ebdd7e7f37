"""Small files in GLUE's own layout: the real names, columns and label words, and real quoting."""

from __future__ import annotations

from pathlib import Path

# Sentences as they occur: with quotation marks that are not closed, commas, and separators of
# lines other than "\n" inside.
ONE = [
    'He said: "I will not go.',
    "Our friends won't buy this analysis, let alone the next one.",
    "a gorgeous , witty , seductive movie .",
    '"" The Matrix Reloaded "" was in its opening weekend .',
    "A man\u2028is playing a flute.",
    "Weisz\x85 is good.",
    "The \u00f6re is a coin.",
    "  It hurts.  ",
]
OTHER = [
    "She said so.",
    'It was "" good "" .',
    "A person is playing an instrument.",
    "What is the Battle of Chojnice?",
    'He\'s a "star"',
    "Nobody left",
    "No.",
    "It is 3 o'clock.",
]
PARSES = "sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
MNLI = f"index promptID pairID genre {PARSES} sentence1 sentence2"
STSB = "index genre filename year old_index source1 source2 sentence1 sentence2"
PLAIN = "index sentence1 sentence2"


def _table(header: str, rows: list[list[str]], sep: str = " ") -> str:
    lines = [header.split(sep)] if header else []
    return "".join("\t".join(line) + "\n" for line in [*lines, *rows])


def write(folder: Path, count: int = 8) -> Path:
    """All nine tasks with ``count`` examples in each file; returns the folder."""
    n = range(count)
    one = [ONE[i % len(ONE)] for i in n]
    other = [OTHER[i % len(OTHER)] for i in n]
    number = [str(i) for i in n]
    bit = [str(i % 2) for i in n]
    entailed = [("entailment", "not_entailment")[i % 2] for i in n]
    three = [("neutral", "entailment", "contradiction")[i % 3] for i in n]
    parses = ["( x )", "( y )", "(ROOT x)", "(ROOT y)"]
    mnli = [[number[i], "31193", "31193n", "government", *parses, one[i], other[i]] for i in n]
    origin = ["main-captions", "MSRvid", "2012test", "0001", "none", "none"]
    stsb = [[number[i], *origin, one[i], other[i]] for i in n]
    mrpc = "#1 ID|#2 ID|#1 String|#2 String"
    strings = [["702876", "702977", one[i], other[i]] for i in n]
    cola = [["gj04", bit[i], "*" if bit[i] == "0" else "", one[i]] for i in n]
    files = {
        "CoLA/train": _table("", cola),
        "CoLA/dev": _table("", cola),
        "CoLA/test": _table("index sentence", [[number[i], one[i]] for i in n]),
        "SST-2/train": _table("sentence label", [[one[i], bit[i]] for i in n]),
        "SST-2/dev": _table("sentence label", [[one[i], bit[i]] for i in n]),
        "SST-2/test": _table("index sentence", [[number[i], one[i]] for i in n]),
        "MRPC/test": _table(f"index|{mrpc}", [[number[i], *strings[i]] for i in n], "|"),
        "STS-B/test": _table(STSB, stsb),
        "QQP/test": _table("id question1 question2", [[number[i], one[i], other[i]] for i in n]),
        "MNLI/train": _table(
            f"{MNLI} label1 gold_label", [[*mnli[i], three[i], three[i]] for i in n]
        ),
    }
    for part in ("train", "dev"):
        files[f"MRPC/{part}"] = "\ufeff" + _table(
            f"Quality|{mrpc}", [[bit[i], *strings[i]] for i in n], "|"
        )
        files[f"STS-B/{part}"] = _table(
            f"{STSB} score", [[*stsb[i], f"{5 * i / max(count - 1, 1):.3f}"] for i in n]
        )
        files[f"QQP/{part}"] = _table(
            "id qid1 qid2 question1 question2 is_duplicate",
            [[number[i], "213221", "213222", one[i], other[i], bit[i]] for i in n],
        )
    for kind in ("matched", "mismatched"):
        labels = " ".join(f"label{i}" for i in range(1, 6))
        files[f"MNLI/dev_{kind}"] = _table(
            f"{MNLI} {labels} gold_label", [[*mnli[i], *[three[i]] * 6] for i in n]
        )
        files[f"MNLI/test_{kind}"] = _table(MNLI, mnli)
    for task, header in (("QNLI", "index question sentence"), ("RTE", PLAIN), ("WNLI", PLAIN)):
        words = bit if task == "WNLI" else entailed
        pairs = [[number[i], one[i], other[i]] for i in n]
        files[f"{task}/test"] = _table(header, pairs)
        for part in ("train", "dev"):
            files[f"{task}/{part}"] = _table(f"{header} label", [[*pairs[i], words[i]] for i in n])
    for name, text in files.items():
        path = folder / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder
