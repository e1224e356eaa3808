"""A prompt of real words acts as these words do in the text, also after padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.survey.check import ROUNDING, Bare, Check, Subject
from benchmarks.survey.kinds import VIRTUAL
from softhooks.errors import UnsupportedModeError
from tests.support import real_words

_COMPARE = {"prompt": real_words.front_gap, "prefix": real_words.prefix_gap}


def _real_words(subject: Subject, has_words: dict[str, bool]) -> Iterator[str]:
    if subject.refused or not has_words[subject.kind.name]:
        return
    refused: UnsupportedModeError | None = None
    for left in (0, 3) if subject.bare.heeds_masks else (0,):
        try:
            moved = _COMPARE[subject.kind.name](subject.model, subject.example.ids[:1], VIRTUAL, left=left)
        except UnsupportedModeError as error:
            refused = error
            continue
        if moved > ROUNDING:
            yield f"differs by {moved:.1g} from the words themselves ({left} columns of padding)"
    if refused:
        raise refused


def _applies(bare: Bare) -> Any:
    return (
        {"prompt": True, "prefix": not _is_apart(bare)}
        if bare.task.output == "tokens" and not bare.case.brings
        else None
    )


def _is_apart(bare: Bare) -> bool:
    """Whether a prefix differs from words by definition, or cannot be compared with them.

    Recurrent and convolutional layers read the text alone, a prefix has no relative bias, words that are joined with their
    neighbors at the embedding have none, and in an encoder every token sees the whole prefix, whatever its window. Heads for
    questions let no cache through, by which some models' keys are read.
    """
    config = bare.model.config.get_text_config()
    if (
        hasattr(config, "relative_attention_num_buckets")
        or getattr(config, "has_relative_attention_bias", False)
        or hasattr(config, "conv_kernel_size")
        or getattr(config, "trigram_input", False)
        or bare.case.task == "qa"
    ):
        return True
    kinds = set(getattr(config, "layer_types", None) or ()) | set(getattr(config, "layers_block_type", None) or ())
    is_hybrid = bool(kinds - {"full_attention", "sliding_attention", "chunked_attention", "attention"})
    has_window = any(getattr(config, name, None) for name in ("local_attention", "sliding_window"))
    return is_hybrid or (has_window and bare.case.task not in ("causal", "image_text"))


CHECKS = (
    Check(
        "real words",
        "the embeddings, or keys and values, of real words act as these words in the text",
        _real_words,
        _applies,
        kinds=("prompt", "prefix"),
        phase="removed",
    ),
)
