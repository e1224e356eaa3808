"""Text: language models, encoders and encoder-decoders on token ids, and image-text models without an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.survey.case import Case
from benchmarks.survey.kinds import ANCHOR
from benchmarks.survey.modality import Modality, Task
from benchmarks.survey.tiny import tiny_model

ROWS, COLUMNS, PADDING, SHORTER = 2, 20, 5, 3
"""More columns than the windows and chunks of the tiny models, so that some tokens lie outside; padding at the longest row; and
by how many columns each row of a ragged batch is shorter than the one before it."""

TASKS = (
    Task("causal", "causal LM", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "tokens"),
    Task("seq2seq", "seq2seq LM", "AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "decoder"),
    Task(
        "sequence",
        "sequence classification",
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "pooled",
    ),
    Task(
        "tokens",
        "token classification",
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "tokens",
    ),
    Task(
        "qa",
        "question answering",
        "AutoModelForQuestionAnswering",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        "tokens",
    ),
    Task("masked", "masked LM", "AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "tokens"),
    Task(
        "image_text",
        "image-text (text only)",
        "AutoModelForImageTextToText",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "tokens",
    ),
)


@dataclass(frozen=True)
class Text:
    """A batch of token ids, [B, T].

    Attributes:
        per_token: other inputs with a value for each token, [B, T].
        per_row: other inputs with a part for each row, [B, ...].
    """

    ids: Tensor
    per_token: dict[str, Tensor]
    per_row: dict[str, Tensor]

    def call(self, ids: Tensor | None = None) -> dict[str, Any]:
        """The arguments of a forward, with a mask of ones; with other ids if they are given."""
        ids = self.ids if ids is None else ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.per_token, **self.per_row}

    def row(self, index: int) -> Text:
        """One row of the ragged batch by itself, [1, t]: row n without its first n * `SHORTER` tokens."""
        rows, columns = slice(index, index + 1), slice(index * SHORTER, None)
        return Text(
            self.ids[rows, columns],
            {name: value[rows, columns] for name, value in self.per_token.items()},
            {name: value[rows] for name, value in self.per_row.items()},
        )

    def ragged(self, side: str, pad: int) -> tuple[dict[str, Any], list[slice]]:
        """Rows of different lengths, with padding on one side of each; also return where the text of each row stands."""
        width = self.ids.shape[1] + PADDING
        calls, places = [], []
        for index in range(len(self.ids)):
            call = self.row(index).call()
            length = call["input_ids"].shape[1]
            around = (width - length, 0) if side == "left" else (0, width - length)
            fill = {"input_ids": pad} | dict.fromkeys(("attention_mask", *self.per_token), 0)
            for name, value in fill.items():
                call[name] = nn.functional.pad(call[name], around, value=value)
            calls.append(call)
            places.append(slice(around[0], around[0] + length))
        return {name: torch.cat([call[name] for call in calls]) for name in calls[0]}, places

    def longer(self, count: int) -> Text:
        """The text with more columns, which repeat the first ones (of other inputs: the value 0)."""
        return Text(
            torch.cat([self.ids, self.ids[:, :count]], dim=1),
            {name: nn.functional.pad(value, (0, count)) for name, value in self.per_token.items()},
            self.per_row,
        )


@dataclass(frozen=True)
class TextModality(Modality):
    """Models that take token ids."""

    def build(self, case: Case) -> nn.Module:
        """Make the model."""
        return tiny_model(case, next(task for task in self.tasks if task.name == case.task))

    def example(self, model: Any, case: Case) -> Text:
        """Random words, without special ids, and the anchor once in each row."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, ANCHOR, (ROWS, COLUMNS), generator=generator)
        for row in range(ROWS):
            ids[row, 5 + 4 * row] = ANCHOR
        per_token: dict[str, Tensor] = {}
        per_row: dict[str, Tensor] = {}
        encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
        if hasattr(model.config, "question_token_id"):  # Splinter's head looks for it
            ids[:, 3] = model.config.question_token_id
        if case.task == "seq2seq" and encoder_decoder:
            per_row["decoder_input_ids"] = torch.randint(10, ANCHOR, (ROWS, 6), generator=generator)
        elif case.task == "sequence" and encoder_decoder:
            ids[:, -1] = model.config.eos_token_id  # which the head pools
        if (case.arch, case.task) == ("big_bird", "qa"):  # its head makes them of the first column's id
            per_token["token_type_ids"] = torch.zeros_like(ids)
        if "token_type_ids" in case.brings:
            per_token["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator)
        if "encoder_hidden_states" in case.brings:
            width = model.get_input_embeddings().weight.shape[1]
            per_row["encoder_hidden_states"] = torch.randn(ROWS, 7, width, generator=generator)
        return Text(ids, per_token, per_row)


TEXT = TextModality(
    TASKS,
    checks=(
        "closed gates",
        "effect",
        "shapes",
        "gradients",
        "row order",
        "padding",
        "causality",
        "checkpointing",
        "rows by hand",
        "cache",
        "generation",
        "static cache",
        "removal",
        "real words",
    ),
    kinds=("prompt", "prefix", "adapter", "slots", "anchors"),
)
