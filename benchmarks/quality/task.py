"""A task: texts with their answers, split by source, and samples of a few training rows of each class."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

ROWS_PER_SHOT = 8
"""The training rows of one shot, if answers are generated and there are no classes."""


@dataclass(frozen=True)
class Row:
    """A text and its answer.

    Attributes:
        text: the text; names that would give the answer away are masked.
        answer: the name of the class, or the text to generate.
        source: the file, package or synset that the row is from; all rows of a source are in the same part.
    """

    text: str
    answer: str
    source: str


@dataclass(frozen=True)
class Template:
    """The texts around a row in a language model's input: `before + text + question`, then a space and the answer.

    Attributes:
        before: such as "Definition: ".
        question: such as "\\nPackage:".
        instructed: whether a context begins with the task's instruction.
    """

    before: str
    question: str
    instructed: bool = True


@dataclass(frozen=True)
class Task:
    """The rows of a task in three parts, and the texts around a row in a language model's input.

    Attributes:
        name: the name of the task.
        instruction: what to do, in a sentence or two, with the names of all classes; for contexts and initial prompts.
        templates: everything that is trained uses the first; zero-shot and few-shot baselines use the best of all on the
            development rows.
        labels: the names of the classes, in order; empty if the answer is generated.
        train, development, test: the rows. Learning rates are chosen on `development`.
        max_length: longer texts are truncated to this many tokens.
        max_new_tokens: the length of a generated answer.
        provenance: where the rows are from: versions, or a file's SHA-256.
        document: a text that contains the answers, for cartridges. Then the first template is for the test, and the others for
            training.
    """

    name: str
    instruction: str
    templates: tuple[Template, ...]
    labels: tuple[str, ...]
    train: tuple[Row, ...]
    development: tuple[Row, ...]
    test: tuple[Row, ...]
    max_length: int
    max_new_tokens: int = 4
    provenance: dict[str, str] = field(default_factory=dict)
    document: str = ""

    @property
    def generates(self) -> bool:
        """Whether the answer is a generated text instead of a class."""
        return not self.labels

    def with_template(self, index: int) -> Task:
        """Return the task with one of its templates as the only one."""
        return replace(self, templates=(self.templates[index],))

    def sample(self, shots: int, seed: int) -> list[Row]:
        """Draw training rows.

        These are `shots` of each class (all, if a class has fewer), or `ROWS_PER_SHOT * shots` rows if answers are generated.
        """
        generator = random.Random(f"{self.name} {seed}")
        if self.generates:
            rows = generator.sample(self.train, min(ROWS_PER_SHOT * shots, len(self.train)))
        else:
            rows = [row for label in self.labels for row in draw(self.of_class(label), shots, generator)]
        generator.shuffle(rows)
        return rows

    def of_class(self, label: str) -> list[Row]:
        """Return the training rows of a class."""
        return [row for row in self.train if row.answer == label]

    def without_class_names(self) -> bool:
        """Return whether no text contains the name of its own class."""
        return not any(
            row.answer.casefold() in row.text.casefold() for row in self.train + self.development + self.test
        )


def draw(rows: Sequence[Row], count: int, generator: random.Random) -> list[Row]:
    """Draw rows without replacement; all of them, if there are fewer."""
    return generator.sample(rows, min(count, len(rows)))


def split(
    rows: Sequence[Row], development: float, test: float, seed: int, key: Callable[[Row], str] = lambda row: row.source
) -> tuple[list[Row], list[Row], list[Row]]:
    """Split rows into training, development and test rows, so that all rows of a source are in the same part.

    Args:
        development, test: the share of the sources in these parts.
        key: what stays together.
    """
    sources = sorted({key(row) for row in rows})
    random.Random(seed).shuffle(sources)
    ends = [round(len(sources) * test), round(len(sources) * (test + development))]
    part = {source: (index >= ends[0]) + (index >= ends[1]) for index, source in enumerate(sources)}
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row in rows:
        parts[part[key(row)]].append(row)
    return parts[2], parts[1], parts[0]
