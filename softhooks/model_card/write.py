"""Write a model card into a directory, next to the files of its prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from softhooks.formats.files import replacing
from softhooks.model_card import curves
from softhooks.model_card.card import BEGIN, END, FILE, CardFacts, metadata, text

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


def write_card(facts: CardFacts, folder: Path, present: ModelCard | None = None) -> None:
    """Write `README.md` and, if matplotlib is installed, a picture of the training curves.

    Args:
        present: a card whose metadata is kept. Its text is also kept if softhooks wrote a part of it; this part is replaced.
    """
    picture = None if facts.run is None else curves.draw(facts.run, folder)
    facts = replace(facts, picture=picture is not None)
    own, written = metadata(facts), text(facts)
    if present is not None:
        data: Any = present.data
        kept = {name: value for name, value in data.to_dict().items() if value is not None}
        tags = [*(kept.get("tags") or []), *own["tags"]]
        own = kept | own | {"tags": list(dict.fromkeys(tags))}
        written = _inserted(written, present.text)
    header = yaml.safe_dump(own, sort_keys=False, allow_unicode=True)
    with replacing(folder / FILE) as part:
        part.write_text(f"---\n{header}---\n\n{written.strip()}\n", encoding="utf-8")


def is_ours(card: ModelCard) -> bool:
    """Whether softhooks wrote a part of a card."""
    return BEGIN in card.text and END in card.text.split(BEGIN, 1)[1]


def _inserted(written: str, before: str) -> str:
    """Replace softhooks' part of a text."""
    if BEGIN not in before or END not in before.split(BEGIN, 1)[1]:
        return written
    start, rest = before.split(BEGIN, 1)
    return start + written + rest.split(END, 1)[1]
