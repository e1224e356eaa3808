"""What the tasks share: masks, duplicates, and the choice of rows for each part."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from benchmarks.quality.task import Row, draw, split

TRAIN, DEVELOPMENT, TEST = 4000, 200, 320
DEVELOPMENT_SHARE, TEST_SHARE = 0.15, 0.25
MIN_WORDS = 4
MASK = "_"

Parts = tuple[tuple[Row, ...], tuple[Row, ...], tuple[Row, ...]]


def class_names(labels: Iterable[str], *more: str) -> re.Pattern[str]:
    """Return a pattern of the words that contain the name of a class.

    Args:
        more: regular expressions of other words to mask, such as other forms of the names.
    """
    containing = rf"\w*(?:{'|'.join(map(re.escape, labels))})\w*"
    words = "|".join([containing, *(rf"(?:{word})\b" for word in more)])
    return re.compile(rf"\b(?:{words})", re.IGNORECASE)


def whole_names(*names: str) -> re.Pattern[str]:
    """Return a pattern of names, such as a package's; they are not masked where they are only a part of a word."""
    choices = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(rf"(?<!\w)(?:{choices})(?!\w)", re.IGNORECASE)


def first_words(text: str, count: int) -> str:
    """Return the first words of a text, so that all contestants see the same text."""
    return " ".join(text.split()[:count])


def normalized(text: str) -> str:
    """Return what texts have in common that differ only in case, spaces and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold().replace(MASK, " ")))


def distinct(rows: Sequence[Row]) -> list[Row]:
    """Keep one row of each text, and none of texts with different answers."""
    answers: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        answers[normalized(row.text)].add(row.answer)
    kept: dict[str, Row] = {}
    for row in rows:
        text = normalized(row.text)
        if len(answers[text]) == 1 and len(row.text.split()) >= MIN_WORDS:
            kept.setdefault(text, row)
    return list(kept.values())


def make_parts(rows: Sequence[Row], labels: Sequence[str], seed: int = 0) -> Parts:
    """Split rows by source, and draw the rows of each part."""
    return choose(*split(rows, DEVELOPMENT_SHARE, TEST_SHARE, seed), labels, seed)


def choose(
    train: Sequence[Row], development: Sequence[Row], test: Sequence[Row], labels: Sequence[str], seed: int = 0
) -> Parts:
    """Draw the rows of each part, in random order."""
    return (
        balanced(train, labels, TRAIN, seed),
        balanced(development, labels, DEVELOPMENT, seed),
        balanced(test, labels, TEST, seed),
    )


def balanced(rows: Sequence[Row], labels: Sequence[str], count: int, seed: int) -> tuple[Row, ...]:
    """Draw equally many rows of each class; if a class has too few, the others make up for them.

    Args:
        labels: the classes; without, the rows are drawn from all.
    """
    generator = random.Random(f"{count} {seed}")
    classes = [[row for row in rows if row.answer == label] for label in labels] or [list(rows)]
    classes.sort(key=len)  # the smallest class first; the order of equal classes is that of the labels
    chosen: list[Row] = []
    for index, members in enumerate(classes):
        chosen += draw(members, (count - len(chosen)) // (len(classes) - index), generator)
    generator.shuffle(chosen)
    return tuple(chosen)
