"""Context-aware prompt tuning: the words of a few-shot context, of which all but labels and separators may move a little."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from softhooks.backbone.heads import can_generate
from softhooks.backbone.word_embeddings import embed_ids
from softhooks.encoder import EMBEDDINGS
from softhooks.errors import OptionError, UnsupportedMethodError
from softhooks.layout.few_shot import INPUT, Context, ExampleTemplate, whole_numbers
from softhooks.layout.tokenizing import IGNORE_INDEX, tokenizer_of
from softhooks.method import Method
from softhooks.methods.cpt_encoder import EXAMPLE_IDS, ContextEncoder, FoldedContext

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure
    from softhooks.objectives.base import Objective, PromptOnModel

logger = logging.getLogger(__name__)

_WIDTH = 2048
"""The model width that bounds are given for."""


@dataclass(frozen=True)
class ContextAwarePromptTuning(Method):
    """Context-aware prompt tuning (CPT): a few-shot context whose inputs and formats may move a little; its labels never do.

    It stands in front of every row, as in in-context learning, and at step 0 answers like it. Each token that moves stays within
    a bound around its word: after each step of any optimizer it is brought back, in any loop. The loss is the cross-entropy on
    the label tokens of the context's examples **and** of the row: labels are weighted by 1 for the row's, and from the last
    example to the first by `decay`, its square, and so on; the mean divides by the number of label tokens. The rows of a batch
    are weighted by their label tokens, so that micro-batches equal one batch. It takes the place of the model's own loss in
    training; an evaluation's loss is the model's own, on the row alone. What a model adds to its loss itself (a router's
    balance) is left out.

    The context is computed once a step, and so are its logits, at its labels only; so it needs a causal language model whose
    front prompt can be shared by all rows (`prompt.injection` is `shared`), and is refused elsewhere. A folded context does not
    train on; load it with `trainable=True` for that.

    Rows must read as the examples do: make them with `render`, in training and in use. They follow the context, so they have no
    token that begins a text. The order of the examples is part of the prompt.

    `leave_one_out`: where the rows to train on are the examples themselves, their answers stand in the context. The batch's
    column `example_ids` says which example a row is, counted from 0 (-1: none); the row does not see its keys and values, and its
    label in the context does not count for it. Later examples have read it, and stay visible. A row that brings its id is
    masked in evaluation too.

    Start from a learning rate of 1e-4 to 1e-3 with AdamW, and look at what is logged at attach: how far tokens may move, in
    lengths of their words.

    Source: Blau et al. 2024, arXiv:2410.17222, and the authors' code. Differs: batches of more than one row, and
    `leave_one_out`, are ours (the latter after arXiv:2507.04221).

    Args:
        num_virtual_tokens: P; the context says it, so leave it out.
        examples: mappings of the template's fields to text, or pairs of input and label.
        template: how an example reads: text, fields in braces, `{label}` the last of them, and `{sep}` where nothing moves.
        tokenizer: the model's tokenizer or its name, for examples and for `render`.
        separator: between examples.
        inner_separator: what `{sep}` stands for.
        context_ids, token_types: the context itself, in the place of examples. The tokens of example i have the types 4i+1
            (format of the input), 4i+2 (input), 4i+3 (format of the label), 4i+4 (label); separators have 0.
        epsilon_input, epsilon_format: how far tokens of the input, and of the formats, may move, in a model of width 2048; the
            bound grows with the root of the width. None: as far as they like.
        decay: of the labels' weights, last to first.
        context_loss: train on the context's labels too.
        leave_one_out: ask for `example_ids` in training.

    Shape:
        the encoder returns [P, H].

    Raises:
        OptionError: an option is wrong, or the types do not make sense.
    """

    kind: ClassVar[str] = "context_aware_prompt_tuning"

    num_virtual_tokens: int = field(default=0, kw_only=True)
    examples: Sequence[Any] | None = field(default=None, kw_only=True, compare=False, repr=False)
    template: str | None = field(default=None, kw_only=True)
    tokenizer: Any = field(default=None, kw_only=True, compare=False, repr=False)
    separator: str = field(default="\n\n", kw_only=True)
    inner_separator: str = field(default="\n", kw_only=True)
    context_ids: Sequence[int] | None = field(default=None, kw_only=True)
    token_types: Sequence[int] | None = field(default=None, kw_only=True)
    epsilon_input: float | None = field(default=0.2, kw_only=True)
    epsilon_format: float | None = field(default=0.1, kw_only=True)
    decay: float = field(default=0.95, kw_only=True)
    context_loss: bool = field(default=True, kw_only=True)
    leave_one_out: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Make the context, and check the options against each other."""
        context = self._given() if self.examples is None else self._made(self.examples)
        kept = {"context_ids": context.ids, "token_types": context.types, "num_virtual_tokens": len(context.ids)}
        if self.num_virtual_tokens not in (0, len(context.ids)):
            raise OptionError(
                f"the context says how many virtual tokens there are: {len(context.ids)}; num_virtual_tokens is "
                f"{self.num_virtual_tokens!r}."
            )
        for name in ("epsilon_input", "epsilon_format"):
            kept[name] = _bound(getattr(self, name), name)
        for name, value in (*kept.items(), ("examples", None)):
            object.__setattr__(self, name, value)
        super().__post_init__()
        if self.template is not None:
            self._template()
        if not _is_number(self.decay) or not 0 < self.decay <= 1:
            raise OptionError(f"decay must be above 0 and at most 1; it is {self.decay!r}.")
        if self.context_loss:
            context.check_labels()

    def _given(self) -> Context:
        if self.context_ids is None or self.token_types is None:
            raise OptionError(
                "a context is made of examples, or given as ids and types.",
                "Pass `examples=`, `template=` and `tokenizer=`; or `context_ids=` and `token_types=`.",
                context_ids="missing" if self.context_ids is None else "given",
                token_types="missing" if self.token_types is None else "given",
            )
        return Context(whole_numbers(self.context_ids, "context_ids"), whole_numbers(self.token_types, "token_types"))

    def _made(self, examples: Sequence[Any]) -> Context:
        if self.context_ids is not None or self.token_types is not None:
            raise OptionError("examples and context_ids with token_types say the same thing twice; give one of them.")
        if isinstance(examples, (str, Mapping)) or not len(examples):
            raise OptionError(f"examples must be a list of one example or more; it is {examples!r}.")
        if self.template is None or self.tokenizer is None:
            missing = "template" if self.template is None else "tokenizer"
            raise OptionError(f"examples need a template and a tokenizer; {missing}= is missing.")
        return self._template().context(examples, tokenizer_of(self.tokenizer))

    def _template(self) -> ExampleTemplate:
        if self.template is None:
            raise OptionError(
                "a row is rendered by the template of the context; this one was made without `template=`."
            )
        return ExampleTemplate(self.template, self.separator, self.inner_separator)

    @property
    def context(self) -> Context:
        """The tokens and their types."""
        return Context(tuple(self.context_ids or ()), tuple(self.token_types or ()))

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """The batch column that says which rows are examples."""
        return (EXAMPLE_IDS,) if self.leave_one_out else ()

    def options(self) -> dict[str, Any]:
        """The options as JSON can hold them; the examples are in the context."""
        return {name: value for name, value in super().options().items() if name != "examples"}

    # --- rows ---------------------------------------------------------------------------------------------------------

    def render(self, row: Any, label: str | None = None, *, tokenizer: Any = None) -> dict[str, Any]:
        """Make a row of the template that the context was made of, so that it reads as the examples do.

        Args:
            row: a mapping of fields, or the input where there is one. A mapping may hold the label.
            label: the label; without one the row ends where it is to be generated.
            tokenizer: in the place of the method's; a loaded prompt has none.

        Returns:
            `input_ids` and `attention_mask`; with a label `labels`, -100 outside it, and with `leave_one_out` `example_ids`: the
            example of the context that reads the same, or -1.
        """
        template = self._template()
        single = isinstance(row, str) and len(template.inputs) == 1
        fields = {template.inputs[0]: row} if single else template.fields_of(row)
        if label is not None:
            fields["label"] = label
        known = tokenizer_of(self.tokenizer if tokenizer is None else tokenizer)
        ids, answer = template.row(fields, known)
        rendered: dict[str, Any] = {"input_ids": ids + answer, "attention_mask": [1] * len(ids + answer)}
        if fields.get("label") is None:
            return rendered
        if not answer:
            raise OptionError(f"a label must hold at least one token; it is {fields['label']!r}.")
        rendered["labels"] = [IGNORE_INDEX] * len(ids) + answer
        if self.leave_one_out:
            rendered[EXAMPLE_IDS] = self.context.example_of(ids + answer)
        return rendered

    # --- on a model ---------------------------------------------------------------------------------------------------

    def build(self, structure: ModelStructure) -> ContextEncoder:
        """Look the context's words up, with nothing learned yet."""
        context, width = self.context, structure.entry.width
        words = embed_ids(structure, context.ids)
        limits = [
            self.epsilon_input if context.kinds[place] == INPUT else self.epsilon_format for place in context.movable
        ]
        bounds = [math.inf if limit is None else limit * math.sqrt(width / _WIDTH) for limit in limits]
        encoder = ContextEncoder(context, words, bounds, self.leave_one_out)
        encoder.start_ids = list(context.ids)
        low, high = encoder.reach.min(), encoder.reach.max()
        logger.info(
            "a context of %d tokens and %d examples; %d tokens move, by %.3g to %.3g of the length of their words",
            len(context.ids), context.count, len(bounds), low, high,
        )  # fmt: skip
        return encoder

    def check(self, prompt: PromptOnModel) -> None:
        """Refuse what is no causal language model, or cannot share its prompt.

        Raises:
            UnsupportedMethodError: naming the model and its way in.
        """
        if prompt.injection == "shared" and can_generate(prompt.model):
            return
        raise UnsupportedMethodError(
            "a context needs a causal language model whose front prompt is computed once and shared by all rows.",
            "Leave `injection` out and the model whole (no FSDP), use such a model, or use PromptTuning with init='text'.",
            method=self.kind,
            model=type(prompt.model).__name__,
            injection=repr(prompt.injection),
        )

    def objective(self) -> Objective | None:
        """The labels of the context beside those of the row."""
        if not self.context_loss:
            return None
        context = self.context
        places = context.labels
        weights = [self.decay ** (context.count - context.examples[place]) for place in places]
        from softhooks.objectives.weighted_labels import WeightedLabels  # imports transformers

        return WeightedLabels(places, [context.ids[place] for place in places], weights)

    def folded_encoder(self, tables: dict[str, Tensor]) -> FoldedContext:
        """Make the encoder of a context that is done."""
        return FoldedContext(self.context, tables[EMBEDDINGS])

    def rebuild(self, structure: ModelStructure, tables: dict[str, Tensor]) -> ContextEncoder:
        """Tell the model's words and what was learned apart again."""
        encoder = self.build(structure)
        encoder.take(tables[EMBEDDINGS])
        return encoder


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _bound(value: Any, name: str) -> float | None:
    """A bound; None where there is none."""
    if value is None or (_is_number(value) and value == math.inf):
        return None
    if not _is_number(value) or not value >= 0:
        raise OptionError(f"{name} must be a number of 0 or more, or None; it is {value!r}.")
    return float(value)
