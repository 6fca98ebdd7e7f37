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
PARSES = "sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse"
MNLI = f"index|promptID|pairID|genre|{PARSES}|sentence1|sentence2"
STSB = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2"
STRINGS = "#1 ID|#2 ID|#1 String|#2 String"
QUESTIONS = "index|question|sentence"
PLAIN = "index|sentence1|sentence2"
# Columns of the training and validation files, and of the test files.
COLUMNS = {
    "CoLA": ("source|label|star|sentence", "index|sentence"),
    "SST-2": ("sentence|label", "index|sentence"),
    "MRPC": (f"Quality|{STRINGS}", f"index|{STRINGS}"),
    "STS-B": (f"{STSB}|score", STSB),
    "QQP": ("id|qid1|qid2|question1|question2|is_duplicate", "id|question1|question2"),
    "MNLI": (f"{MNLI}|label1|gold_label", MNLI),
    "QNLI": (f"{QUESTIONS}|label", QUESTIONS),
    "RTE": (f"{PLAIN}|label", PLAIN),
    "WNLI": (f"{PLAIN}|label", PLAIN),
}
BARE = {"CoLA/train", "CoLA/dev"}  # without the line that names columns
MARKED = {"MRPC/train", "MRPC/dev"}  # with a mark of byte order


def write(folder: Path, count: int = 8) -> Path:
    """All nine tasks with ``count`` examples in each file; returns the folder."""
    n = range(count)
    one, other = ([texts[i % len(texts)] for i in n] for texts in (ONE, OTHER))
    first = dict.fromkeys(("sentence", "sentence1", "question", "question1", "#1 String"), one)
    second = dict.fromkeys(("sentence2", "question2", "#2 String"), other)
    labels = {key: [str(i % 2) for i in n] for key in ("label", "Quality", "is_duplicate")}
    labels["score"] = [f"{5 * i / max(count - 1, 1):.3f}" for i in n]
    labels["gold_label"] = [("neutral", "entailment", "contradiction")[i % 3] for i in n]
    for task, columns in COLUMNS.items():
        values = first | second | labels
        if task == "QNLI":
            values["sentence"] = other
        if task in ("QNLI", "RTE"):
            values["label"] = [("entailment", "not_entailment")[i % 2] for i in n]
        both = [""] if task != "MNLI" else ["_matched", "_mismatched"]
        for name in ("train", *(part + end for part in ("dev", "test") for end in both)):
            header = columns[name.startswith("test")].split("|")
            lines = [[values.get(column, ["gj04"] * count)[i] for column in header] for i in n]
            file = f"{task}/{name}"
            if file not in BARE:
                lines.insert(0, header)
            text = "\ufeff" * (file in MARKED) + "".join("\t".join(x) + "\n" for x in lines)
            path = folder / f"{file}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
    return folder
