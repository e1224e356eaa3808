"""What does a command do, according to a manual? The manual is the help of Python's debugger, which every Python has.

It is a task of the experiments on cartridges: a document to be put into the context, and questions about it.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator

from benchmarks.quality.task import Row, Task, Template

TEMPLATES = (
    Template("What does the debugger command ", " do?\nAnswer:", instructed=False),
    Template("Explain the command ", " of Python's debugger:", instructed=False),
    Template("In pdb, enter ", " for the following.", instructed=False),
    Template("Command: ", "\nDescription:", instructed=False),
)
"""The first is for the test rows, the others for training."""

ANSWER_WORDS = 40
_COMMAND = re.compile(r"^(?P<usage>[a-z(]\S*(?: .*)?)\n\n(?P<body>(?:   .*\n|\n)+)", re.MULTILINE)


def manual() -> Task:
    """Read the task: each command has one row, with its first sentence, for the test, and one for training."""
    document = read_manual()
    entries = list(commands(document))
    return Task(
        "manual",
        "Answer questions about the commands of Python's debugger.",
        TEMPLATES,
        (),
        tuple(Row(name, " ".join(text.split()[:ANSWER_WORDS]), name) for name, text in entries),
        (),
        tuple(Row(name, first_sentence(text), name) for name, text in entries),
        max_length=32,
        max_new_tokens=32,
        provenance={"manual": f"pydoc, Python {platform.python_version()}"},
        document=document,
    )


def read_manual() -> str:
    """Return the part of the debugger's help that describes its commands, some 3,000 tokens."""
    from pydoc_data.topics import topics  # a large module

    text: str = topics["debugger"]
    return text[text.index("h(elp) [command]") :]


def commands(document: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the description of each command, on one line."""
    for found in _COMMAND.finditer(document):
        name = re.sub(r"[()]", "", found["usage"].split()[0])
        text = " ".join(found["body"].split())
        if name.isalpha() and text:
            yield name, text


def first_sentence(text: str) -> str:
    """Return a text up to the first period that ends a sentence."""
    return re.split(r"(?<=[.;:]) ", text, maxsplit=1)[0]
