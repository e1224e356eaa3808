"""Of which kind is a noun with this definition? The kinds are the lexicographer files of WordNet."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quality.sources import read_nouns
from benchmarks.quality.task import Row, Task, Template
from benchmarks.quality.tasks.rows import MASK, class_names, distinct, make_parts

# After a space, each name is one token for SmolLM2.
LABELS = {
    "04": "action",
    "05": "animal",
    "06": "artifact",
    "08": "body",
    "10": "communication",
    "13": "food",
    "15": "location",
    "18": "person",
    "20": "plant",
    "27": "substance",
}
"""The names of the classes by the number of the lexicographer file; 04 is noun.act."""

TEMPLATES = (
    Template("Definition: ", "\nKind:"),
    Template("A thing that is ", ". This is a kind of", instructed=False),
    Template("Definition: ", "\nThis is a kind of", instructed=False),
)
_NAMES = class_names(LABELS.values(), r"act(?:s|ed|ing)?", r"bodies", r"(?:communicat|locat)\w+", "people")


def glosses(cache: Path | None = None) -> Task:
    """Read the task.

    Args:
        cache: the directory for fetched files, by default in the user's cache directory.
    """
    nouns, provenance = read_nouns(cache)
    labels = tuple(LABELS.values())
    return Task(
        "glosses",
        f"Name the kind of thing ({', '.join(labels)}) that this definition describes.",
        TEMPLATES,
        labels,
        *make_parts(gloss_rows(nouns), labels),
        max_length=48,
        provenance=provenance,
    )


def gloss_rows(nouns: str) -> list[Row]:
    """Make a row of each synset of these kinds, with the names of the classes masked, and without examples.

    Args:
        nouns: the text of `data.noun`: a line for each synset, with its offset, the number of its file, its words, its pointers,
            and after a bar its definition and examples.
    """
    rows = []
    for line in nouns.splitlines():
        if line.startswith(" "):  # the license
            continue
        data, _, gloss = line.partition(" | ")
        offset, file, _ = data.split(" ", maxsplit=2)
        definition = gloss.partition('; "')[0].strip()
        if file in LABELS:
            rows.append(Row(_NAMES.sub(MASK, definition), LABELS[file], offset))
    return distinct(rows)
