"""Prompt tuning: P trained rows of embeddings before the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

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

_OPTION_OF = {"text": "init_text", "class_labels": "init_labels", "tensor": "init_tensor", "prompt": "init_from"}
"""The option that each `init` needs and all others refuse."""


@dataclass(frozen=True)
class PromptTuning(Method):
    """Prompt tuning: `X' = [P; X]`, where P in R^{P x H} is trained and everything else is frozen.

    In an encoder-decoder the prompt enters the encoder only, as in the paper. In a causal decoder a prompt at the front is
    computed once for all rows of a batch.

    Start with AdamW and a learning rate of 1e-2, and try 1e-3 to 1e-1; the paper's 0.3 is for Adafactor with a constant schedule.
    Rows that are initialized from words of the vocabulary train better than random rows.

    Source: Lester et al. 2021, arXiv:2104.08691; `init="prompt"`: Vu et al. 2022 (SPoT), arXiv:2110.07904. Differs: there is no
    default for P; `whole_vocabulary` is ours.

    Args:
        num_virtual_tokens: P. Quality rises up to about 20 and hardly beyond.
        init: how the rows are initialized:
            `vocab`: embeddings of ids sampled from the first 5,000, the most frequent;
            `random`: U[-0.5, 0.5];
            `text`: the embeddings of `init_text`;
            `class_labels`: one row for each label of `init_labels`, the mean of its tokens;
            `tensor`: `init_tensor`;
            `prompt`: another prompt, `init_from`, such as one that was tuned on a source task (see `most_similar`).
            Rows that a text or labels do not fill are sampled as with `vocab`.
        init_text: the text; its first P tokens are used, without special tokens.
        init_labels: the labels.
        init_tensor: rows, [P, H]. Rows of the embedding's weight stand for their words: if the model scales its embeddings
            (Gemma), so are these rows.
        init_from: another prompt of P virtual tokens: a directory or repository that `load` reads, or a `SoftPrompt`.
        tokenizer: the model's tokenizer or its name, for `text` and `class_labels`.
        whole_vocabulary: sample from all ids with `vocab`.
        placement: `front`, before the text; `after_first`, after its first token (BOS, [CLS]); `end`, after the text.

    Shape:
        the encoder returns [P, H].

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
    init: str = field(default="vocab", kw_only=True)
    init_text: str | None = field(default=None, kw_only=True)
    init_labels: Sequence[str] | None = field(default=None, kw_only=True)
    init_tensor: Tensor | None = field(default=None, kw_only=True, compare=False, repr=False)
    init_from: str | Path | Handle | None = field(default=None, kw_only=True, compare=False)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)
    whole_vocabulary: bool = field(default=False, kw_only=True)
    placement: Placement = field(default="front", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init", self.init, ("vocab", "random", "text", "class_labels", "tensor", "prompt"))
        check_choice("placement", self.placement, ("front", "after_first", "end"))
        for init, option in _OPTION_OF.items():
            given = getattr(self, option) is not None
            if given != (self.init == init):
                state = "is given" if given else "is missing"
                raise OptionError(
                    f"{option} {state}, but init is {self.init!r}; init={init!r} requires it, and no other `init` takes it."
                )
        if self.init in ("text", "class_labels") and self.tokenizer is None:
            raise OptionError(
                f"init={self.init!r} needs a tokenizer; none is given. Pass `tokenizer=`: the model's own, or its name."
            )

    @property
    def token_layout(self) -> Layout:
        """The places of the virtual tokens."""
        return Layout.placed(self.placement, self.num_virtual_tokens)

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the initialized [P, H] parameter."""
        rows, ids = self.initial_rows(structure)
        encoder = TableEncoder({EMBEDDINGS: rows})
        encoder.start_ids = ids
        return encoder

    def initial_rows(self, structure: ModelStructure) -> tuple[Tensor, initializers.WordIds]:
        """Make the rows that the prompt starts from, [P, H], and the word ids of the rows that are embeddings of words."""
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
