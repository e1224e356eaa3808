"""The context of CPT: training rows as examples, with the token types of their parts."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.quality.baselines import CONTEXT_LIMIT, by_turns
from benchmarks.quality.inputs import DecoderInputs
from benchmarks.quality.task import Row

_INPUT, _LABEL_FORMAT, _LABEL = 2, 3, 4


def context_types_and_ids(
    inputs: DecoderInputs, rows: Sequence[Row], limit: int = CONTEXT_LIMIT
) -> tuple[list[int], list[int]]:
    """Return the token types and ids of as many examples as fit within `limit` tokens.

    The types are those of `ContextAwarePromptTuning`: 4i + 2 to 4i + 4 in example i, and 0 in separators.
    """
    separator = inputs.tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    question = inputs.question_part()
    types: list[int] = []
    ids: list[int] = []
    for number, row in enumerate(by_turns(inputs.task, rows)):
        text = inputs.question_ids(row)[: -len(question)]
        answer = inputs.answer_ids(row)
        if len(ids) + len(text) + len(question) + len(answer) + len(separator) > limit:
            break
        ids += text + question + answer + separator
        types += [4 * number + _INPUT] * len(text) + [4 * number + _LABEL_FORMAT] * len(question)
        types += [4 * number + _LABEL] * len(answer) + [0] * len(separator)
    return types, ids
