"""Prompt tuning: P rows of embeddings before the text are all that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from softhooks.backbone.word_embeddings import embed_ids
from softhooks.encoder import EMBEDDINGS, PromptEncoder, TableEncoder
from softhooks.errors import OptionError
from softhooks.layout.layout import Layout, Placement
from softhooks.layout.tokenizing import tokenize
from softhooks.method import Method, choice
from softhooks.methods import initializers
from softhooks.methods.from_prompt import Handle, rows_of, word_ids_of

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure

_OPTION_OF = {"text": "init_text", "class_labels": "init_labels", "tensor": "init_tensor", "prompt": "init_from"}
"""The option that each `init` needs, and no other may have."""


@dataclass(frozen=True)
class PromptTuning(Method):
    """Prompt tuning: `X' = [P; X]`, with P in R^{P x H} trained and everything else frozen.

    In an encoder-decoder the prompt goes to the encoder only, as in the paper. In a causal decoder a prompt at the front is
    computed once and shared by all rows.

    Start from a learning rate of 1e-2 with AdamW and sweep 1e-3 to 1e-1; the paper's 0.3 is a value for Adafactor with a constant
    schedule. Rows that start as words of the vocabulary train better than random ones.

    Source: Lester et al. 2021, arXiv:2104.08691; `init="prompt"` is Vu et al. 2022, arXiv:2110.07904. Differs: the default P is
    the user's; `whole_vocabulary` is ours.

    Args:
        num_virtual_tokens: P. Quality rises up to about 20 and little beyond.
        init: `vocab` samples rows of the 5,000 most frequent ids; `random` draws from U[-0.5, 0.5]; `text` takes the rows of
            `init_text`; `class_labels` one row a label of `init_labels`, the mean of its tokens; `tensor` takes `init_tensor`;
            `prompt` starts from another prompt, `init_from` (SPoT: one tuned on a source task; see `most_similar`).
            Rows that a text or labels do not fill are sampled from the vocabulary.
        init_text: the text, cut to P tokens, without special tokens.
        init_labels: the labels.
        init_tensor: another prompt's rows, [P, H]. Rows of the embedding's weight are their words: where the embedding multiplies
            them (Gemma), the prompt starts from the products.
        init_from: another prompt of P virtual tokens: a directory or repository that `load` reads, or a handle.
        tokenizer: the model's tokenizer or its name, for `text` and `class_labels`.
        whole_vocabulary: let `vocab` draw from every id.
        placement: `front`, before the text; `after_first`, behind a row's first token (BOS, [CLS]); `end`, behind the text.

    Shape:
        the encoder returns [P, H].

    Raises:
        OptionError: an option is wrong, or missing for the chosen `init`.
    """

    kind: ClassVar[str] = "prompt_tuning"
    enters: ClassVar[Literal["embeddings", "attention"]] = "embeddings"
    start_options: ClassVar[tuple[str, ...]] = (
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
        """Check the options against each other."""
        super().__post_init__()
        choice("init", self.init, ("vocab", "random", "text", "class_labels", "tensor", "prompt"))
        choice("placement", self.placement, ("front", "after_first", "end"))
        for init, option in _OPTION_OF.items():
            given = getattr(self, option) is not None
            if given != (self.init == init):
                state = "is given" if given else "is missing"
                raise OptionError(f"{option} belongs to init={init!r}; init is {self.init!r} and {option} {state}.")
        if self.init in ("text", "class_labels") and self.tokenizer is None:
            raise OptionError(
                f"init={self.init!r} needs a tokenizer; none is given. Pass `tokenizer=`: the model's own, or its name."
            )

    @property
    def where(self) -> Layout:
        """Where the virtual tokens stand."""
        return Layout.placed(self.placement, self.num_virtual_tokens)

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the [P, H] parameter, initialized."""
        rows, words = self.start(structure)
        encoder = TableEncoder({EMBEDDINGS: rows})
        encoder.start_ids = words
        return encoder

    def rows(self, structure: ModelStructure) -> Tensor:
        """Make the rows that the prompt starts from, [P, H]."""
        return self.start(structure)[0]

    def start(self, structure: ModelStructure) -> tuple[Tensor, initializers.Words]:
        """Make the rows that the prompt starts from, [P, H], and tell the ids of those that are words."""
        count = self.num_virtual_tokens
        if self.init == "random":
            return initializers.random_rows(structure, count), None
        if self.init == "text":
            ids = tokenize(self.init_text or "", self.tokenizer, "init_text")
            ids = initializers.filled(structure, count, ids)
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
