"""Encode rows for a language model: a text and its answer, or the answers of a chat. The loss is computed on answers only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase

from softhooks.errors import OptionError
from softhooks.layout.tokenizing import IGNORE_INDEX
from softhooks.recipe.encoded import Encoded, best_ids, majority, padded, share_of_right_rows
from softhooks.recipe.options import TrainOptions
from softhooks.recipe.table import MESSAGES, Table

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Example:
    """The ids that the model reads, and the ids that it learns to write after them."""

    prompt: list[int]
    answer: list[int]


class Encoder:
    """Turns the rows of a table into examples.

    Args:
        is_encoder_decoder: whether the answers go to a decoder.

    Attributes:
        truncated: the number of prompts that were too long; they lose their beginning, so that the answer follows the same words
            as in shorter rows.
    """

    def __init__(
        self, table: Table, tokenizer: PreTrainedTokenizerBase, options: TrainOptions, *, is_encoder_decoder: bool
    ) -> None:
        self.table = table
        self.tokenizer = tokenizer
        self.max_length = options.max_length
        self.is_encoder_decoder = is_encoder_decoder
        self.truncated = 0
        if table.is_chat and tokenizer.chat_template is None:
            raise OptionError(
                f"the rows are chats, but the tokenizer of {options.model!r} has no chat template.",
                "Use the instruct version of the model, or set `chat_template` in the tokenizer's config.",
            )

    def encode(self, rows: Dataset) -> Dataset:
        """Return the rows for a Trainer."""
        from datasets import Dataset

        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for number, row in enumerate(rows):
            for example in self._examples(row, number, rows):
                start = self._start(example, number)
                if self.is_encoder_decoder:
                    columns["input_ids"].append(start)
                    columns["labels"].append(example.answer)
                else:
                    columns["input_ids"].append(start + example.answer)
                    columns["labels"].append([IGNORE_INDEX] * len(start) + example.answer)
        return Dataset.from_dict(columns)

    def _examples(self, row: dict[str, Any], number: int, rows: Dataset) -> Iterator[Example]:
        if self.table.is_chat:
            yield from self._chat(row[MESSAGES], number)
            return
        text, answer = self.table.render(row), self.table.answer(rows, row[str(self.table.label)])
        yield self._separate(text, answer) if self.is_encoder_decoder else self._continued(text, answer)

    def _continued(self, text: str, answer: str) -> Example:
        """Tokenize the answer as a continuation of the text; a space separates them, unless the text ends with white space."""
        whole = self._ids(text + ("" if text[-1:].isspace() else " ") + answer)
        prompt = self._ids(text)
        common = 0
        while common < min(len(prompt), len(whole)) and prompt[common] == whole[common]:
            common += 1
        return Example([*self._first(), *whole[:common]], [*whole[common:], *self._last()])

    def _separate(self, text: str, answer: str) -> Example:
        inputs: Any = self.tokenizer(text)
        targets: Any = self.tokenizer(text_target=answer)
        return Example(list(inputs["input_ids"]), list(targets["input_ids"]))

    def _chat(self, messages: list[dict[str, Any]], number: int) -> Iterator[Example]:
        """Yield an example for each answer: the ids that the model gets to write the answer, and the answer."""
        turns = [place for place, message in enumerate(messages) if message.get("role") == "assistant"]
        if not turns:
            raise OptionError(
                f"row {number} has no message of the role 'assistant', so it has no answer to learn from."
            )
        for turn in turns:
            prompt = self._template(messages[:turn], add_generation_prompt=True)
            whole = self._template(messages[: turn + 1])
            if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
                raise OptionError(
                    f"row {number}: the chat template does not write the answer after the prompt that it writes for generation.",
                    "Give texts and answers in the columns `text` and `label` instead of `messages`.",
                    generation_prompt=repr(self.tokenizer.decode(prompt[-20:])),
                    with_answer=repr(self.tokenizer.decode(whole[max(len(prompt) - 20, 0) : len(prompt) + 20])),
                )
            yield Example(prompt, _up_to_end(whole[len(prompt) :], self.tokenizer.eos_token_id))

    def _template(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        plain = [{name: value for name, value in message.items() if value is not None} for message in messages]
        ids: Any = self.tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False, **options)
        return list(ids)

    def _start(self, example: Example, number: int) -> list[int]:
        """Return the prompt, without its beginning if the row is too long."""
        room = self.max_length - (0 if self.is_encoder_decoder else len(example.answer))
        if len(example.answer) > self.max_length or room < 1:
            raise OptionError(
                f"the answer of row {number} has {len(example.answer)} tokens, which leaves no room for its text.",
                "Increase --max-length, or shorten the answer.",
                max_length=self.max_length,
            )
        if len(example.prompt) <= room:
            return example.prompt
        self.truncated += 1
        first = 0 if self.table.is_chat or self.is_encoder_decoder else len(self._first())
        return example.prompt[:first] + example.prompt[len(example.prompt) - room + first :]

    def _ids(self, text: str) -> list[int]:
        encoded: Any = self.tokenizer(text, add_special_tokens=False)
        return list(encoded["input_ids"])

    def _first(self) -> list[int]:
        """Return the beginning-of-sequence token, if the tokenizer adds one."""
        encoded: Any = self.tokenizer("")
        return [id_ for id_ in encoded["input_ids"][:1] if id_ == self.tokenizer.bos_token_id]

    def _last(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [] if end is None else [int(end)]


def _up_to_end(ids: list[int], end: int | None) -> list[int]:
    """Cut what a template writes after the last end-of-sequence token, such as a line break."""
    return ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids


def encode(
    table: Table, tokenizer: PreTrainedTokenizerBase, options: TrainOptions, *, is_encoder_decoder: bool
) -> Encoded:
    """Encode the rows; the labels of everything but the answers are -100."""
    encoder = Encoder(table, tokenizer, options, is_encoder_decoder=is_encoder_decoder)
    parts = [encoder.encode(rows) for rows in table.parts()]
    pad = tokenizer.pad_token_id
    shift = 0 if is_encoder_decoder else 1

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = padded([row["input_ids"] for row in rows], pad)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": padded([row["labels"] for row in rows], IGNORE_INDEX),
        }

    def exact_match(evaluated: EvalPrediction) -> dict[str, float]:
        labels: Any = evaluated.label_ids
        return {"exact_match": share_of_right_rows(evaluated.predictions, labels, shift)}

    validation = parts[1] if len(parts) > 1 else None
    answers = [] if validation is None else [str([i for i in row if i != IGNORE_INDEX]) for row in validation["labels"]]
    return Encoded(
        train=parts[0],
        validation=validation,
        collate=collate,
        metric="exact_match",
        compute_metrics=exact_match,
        keep=best_ids,
        majority=majority(answers) if answers else None,
        truncated=encoder.truncated,
    )
