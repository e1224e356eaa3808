"""Prompt tuning: trained embeddings before the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from softhooks.backbone.stack import ModelStructure
from softhooks.backbone.word_embeddings import embed_ids
from softhooks.errors import OptionError, check_choice
from softhooks.layout.layout import Layout, Placement
from softhooks.layout.tokenizing import tokenize
from softhooks.method import Method
from softhooks.methods import initializers
from softhooks.methods.from_prompt import Handle, rows_of, word_ids_of
from softhooks.prompt_encoder import EMBEDDINGS, PromptEncoder, TableEncoder

Init = Literal["vocab", "random", "text", "class_labels", "tensor", "prompt"]
_OPTION_OF = {"text": "init_text", "class_labels": "init_labels", "tensor": "init_tensor", "prompt": "init_from"}
"""The option that each value of `init` requires, and that no other value accepts."""


@dataclass(frozen=True)
class PromptTuning(Method):
    """Prompt tuning: `X' = [P; X]`, where X are the text's embeddings, P [P, H] is trained, and the model is frozen.

    In an encoder-decoder, the prompt is added only to the encoder's input, as in the paper.

    Start with AdamW and a learning rate of 3e-2, and try 1e-3 to 1e-1; the paper's 0.3 is for Adafactor with a constant schedule.

    Source: Lester et al. 2021, arXiv:2104.08691; `init="prompt"`: Vu et al. 2022 (SPoT), arXiv:2110.07904. Differences: P has no
    default; we add `whole_vocabulary`.

    Args:
        num_virtual_tokens: P; more than about 20 virtual tokens rarely help.
        init: the initial embeddings:
            `vocab`: those of ids sampled from the first 5,000, which are the most frequent in most vocabularies;
            `random`: sampled from U[-0.5, 0.5], which trains worse than embeddings of words;
            `text`: those of `init_text`;
            `class_labels`: for each label in `init_labels`, the mean of its tokens' embeddings;
            `tensor`: `init_tensor`;
            `prompt`: those of another prompt, `init_from`, such as one tuned on a source task (see `most_similar`).
            With fewer than P tokens or labels, the remaining virtual tokens are initialized as with `vocab`.
        init_text: a string; its first P tokens are used, without special tokens.
        init_labels: the class labels.
        init_tensor: the embeddings, [P, H]. Rows copied from the model's embedding matrix are scaled if the model scales its
            embeddings (Gemma).
        init_from: another prompt of P virtual tokens: a directory or repository that `load` reads, or a `SoftPrompt`.
        tokenizer: the model's tokenizer or its name; required for `text` and `class_labels`.
        whole_vocabulary: with `vocab`, sample from all ids.
        placement: `front`, before the text; `after_first`, after its first token (BOS, [CLS]); `end`, after the text.

    Raises:
        OptionError: an option is wrong, or missing for the chosen `init`.
    """

    kind: ClassVar[str] = "prompt_tuning"
    enters: ClassVar[Literal["embeddings", "attention"]] = "embeddings"
    init_options: ClassVar[tuple[str, ...]] = (
        "init",
        "init_text",
        "init_labels",
        "init_tensor",
        "init_from",
        "whole_vocabulary",
    )

    num_virtual_tokens: int
    init: Init = field(default="vocab", kw_only=True)
    init_text: str | None = field(default=None, kw_only=True)
    init_labels: Sequence[str] | None = field(default=None, kw_only=True)
    init_tensor: Tensor | None = field(default=None, kw_only=True, compare=False, repr=False)
    init_from: str | Path | Handle | None = field(default=None, kw_only=True, compare=False)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)
    whole_vocabulary: bool = field(default=False, kw_only=True)
    placement: Placement = field(default="front", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init", self.init, get_args(Init))
        check_choice("placement", self.placement, get_args(Placement))
        for init, option in _OPTION_OF.items():
            given = getattr(self, option) is not None
            if given and self.init != init:
                raise OptionError(f"{option} is given, but init is {self.init!r}; only init={init!r} accepts it.")
            if not given and self.init == init:
                raise OptionError(f"{option} is missing; init={init!r} requires it.")
        if self.init in ("text", "class_labels") and self.tokenizer is None:
            raise OptionError(
                f"init={self.init!r} needs a tokenizer, but none is given. Pass `tokenizer=`, the model's tokenizer or its name."
            )

    @property
    def token_layout(self) -> Layout:
        """Where the virtual tokens are placed in the text."""
        return Layout.placed(self.placement, self.num_virtual_tokens)

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the encoder with the initial embeddings."""
        rows, ids = self.initial_rows(structure)
        encoder = TableEncoder({EMBEDDINGS: rows})
        encoder.start_ids = ids
        return encoder

    def initial_rows(self, structure: ModelStructure) -> tuple[Tensor, initializers.WordIds]:
        """Return the initial embeddings, [P, H], and the ids of those that come from the vocabulary."""
        count = self.num_virtual_tokens
        if self.init == "random":
            return initializers.random_rows(structure, count), None
        if self.init == "text":
            ids = tokenize(self.init_text or "", self.tokenizer, "init_text")
            ids = initializers.fill_ids(structure, count, ids)
            return embed_ids(structure, ids), ids
        if self.init == "class_labels":
            return initializers.label_rows(structure, count, self.init_labels or (), self.tokenizer)
        if self.init == "tensor":
            return initializers.given_rows(structure, count, self.init_tensor), None
        if self.init == "prompt":
            rows = initializers.tensor_rows(structure, count, rows_of(self.init_from, structure=structure), "init_from")
            return rows, word_ids_of(self.init_from)
        sampled = initializers.vocabulary_ids(structure, count, whole=self.whole_vocabulary)
        return embed_ids(structure, sampled), sampled.tolist()
