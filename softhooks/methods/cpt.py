"""Context-aware prompt tuning: train the embeddings of a few-shot context within bounds, except for labels and separators."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from softhooks.backbone.heads import can_generate
from softhooks.backbone.stack import ModelStructure
from softhooks.backbone.word_embeddings import embed_ids
from softhooks.errors import OptionError, UnsupportedMethodError
from softhooks.layout.few_shot import INPUT, Context, ExampleTemplate, whole_numbers
from softhooks.layout.tokenizing import IGNORE_INDEX, tokenizer_of
from softhooks.method import Method
from softhooks.methods.cpt_encoder import ContextEncoder, FoldedContext
from softhooks.methods.leave_one_out import EXAMPLE_IDS
from softhooks.objectives.base import Objective, PromptOnModel
from softhooks.prompt_encoder import EMBEDDINGS

logger = logging.getLogger(__name__)

_WIDTH = 2048
"""The hidden size for which the epsilons are defined."""


@dataclass(frozen=True)
class ContextAwarePromptTuning(Method):
    """Context-aware prompt tuning (CPT): a few-shot context whose embeddings, [P, H], are trained within bounds.

    The context comes before every row, so the initial output is that of in-context learning. The embeddings of labels and
    separators are fixed. The others are projected back into their bounds after each optimizer step.

    The training loss replaces the model's own loss. It is the cross-entropy on the label tokens of the context's examples **and**
    of the row. The row's labels have weight 1, the labels of the last example have weight `decay`, those of the example before it
    `decay` squared, and so on; the sum is divided by the number of label tokens. Rows are weighted by their number of label
    tokens, so gradient accumulation gives the same result as one large batch. Other terms of the model's loss, such as a router's
    load-balancing loss, are left out. In evaluation, the model returns its own loss, which covers only the row.

    The method needs a causal language model that computes the context once for all rows (`prompt.injection` is `shared`); other
    models are refused. To continue the training of a saved prompt, load it with `trainable=True`.

    For training and inference, make rows with `render`, which gives them the format of the examples, without a BOS token. The
    context contains the examples in the given order.

    If the training rows are the examples themselves, use `leave_one_out`: a row does not attend to its own example, and the label
    of this example is left out of the row's loss. The batch column `example_ids` has the example's index, or -1 for a row that
    is not an example. Later examples still depend on the hidden one, because the context is computed once. In evaluation, a row's
    own example is hidden too, if the batch has `example_ids`.

    Start with AdamW and a learning rate of 1e-4 to 1e-3. `attach` logs how far the embeddings may move.

    Source: Blau et al. 2024, arXiv:2410.17222, and the authors' code. Differences: batches may have more than one row, and we add
    `leave_one_out`, as in arXiv:2507.04221.

    Args:
        num_virtual_tokens: P, which is computed from the context; leave it out.
        examples: a list of dictionaries with a string for each field of the template, or of (input, label) pairs.
        template: the format of an example: text with fields in braces, the last of which is `{label}`, and `{sep}` for
            a separator that is not trained.
        tokenizer: the model's tokenizer or its name; required for examples and for `render`.
        separator: the text between examples.
        inner_separator: the text of `{sep}`.
        context_ids, token_types: the token ids and token types of a context, to be passed instead of examples. The tokens of
            example i have the types 4i+1 (format of the input), 4i+2 (input), 4i+3 (format of the label), 4i+4 (label);
            separators have 0.
        epsilon_input, epsilon_format: the largest distance by which the embeddings of input and format tokens may move if the
            hidden size is 2048; this bound is proportional to the square root of the hidden size. None sets no bound.
        decay: the weight of an example's label divided by the weight of the next example's label.
        context_loss: also train on the labels of the context.
        leave_one_out: hide each row's own example; requires `example_ids` during training.

    Raises:
        OptionError: an option is wrong, or the token types are inconsistent.
    """

    kind: ClassVar[str] = "context_aware_prompt_tuning"
    optional_columns: ClassVar[dict[str, str]] = {EXAMPLE_IDS: "with `leave_one_out`"}
    renders_rows: ClassVar[bool] = True

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
        context = self._context_of_ids() if self.examples is None else self._context_of(self.examples)
        kept = {"context_ids": context.ids, "token_types": context.types, "num_virtual_tokens": len(context.ids)}
        if self.num_virtual_tokens not in (0, len(context.ids)):
            raise OptionError(
                f"num_virtual_tokens is {self.num_virtual_tokens!r}, but the context has {len(context.ids)} tokens; leave "
                "num_virtual_tokens out."
            )
        for name in ("epsilon_input", "epsilon_format"):
            kept[name] = _bound(getattr(self, name), name)
        for name, value in (*kept.items(), ("examples", None)):
            object.__setattr__(self, name, value)
        super().__post_init__()
        if self.template is not None:
            self._template()
        if not _is_number(self.decay) or not 0 < self.decay <= 1:
            raise OptionError(f"decay is {self.decay!r}; it must be above 0 and at most 1.")
        if self.context_loss:
            context.check_labels()

    def _context_of_ids(self) -> Context:
        if self.context_ids is None or self.token_types is None:
            raise OptionError(
                "no context is given; it is made from `examples`, or from `context_ids` with `token_types`.",
                "Pass `examples=`, `template=` and `tokenizer=`; or `context_ids=` and `token_types=`.",
                context_ids="missing" if self.context_ids is None else "given",
                token_types="missing" if self.token_types is None else "given",
            )
        return Context(whole_numbers(self.context_ids, "context_ids"), whole_numbers(self.token_types, "token_types"))

    def _context_of(self, examples: Sequence[Any]) -> Context:
        if self.context_ids is not None or self.token_types is not None:
            raise OptionError("examples and a context (context_ids, token_types) are both given; pass only one.")
        if isinstance(examples, (str, Mapping)) or not len(examples):
            raise OptionError(f"examples is {examples!r}; it must be a list of at least one example.")
        if self.template is None or self.tokenizer is None:
            missing = "template" if self.template is None else "tokenizer"
            raise OptionError(f"{missing}= is missing; examples need a template and a tokenizer.")
        return self._template().context(examples, tokenizer_of(self.tokenizer))

    def _template(self) -> ExampleTemplate:
        if self.template is None:
            raise OptionError("the prompt was made without `template=`, which `render` needs.")
        return ExampleTemplate(self.template, self.separator, self.inner_separator)

    @property
    def context(self) -> Context:
        """The context's token ids and their types."""
        return Context(tuple(self.context_ids or ()), tuple(self.token_types or ()))

    @property
    def batch_columns(self) -> tuple[str, ...]:
        """The batch column with the index of each row's own example."""
        return (EXAMPLE_IDS,) if self.leave_one_out else ()

    def options(self) -> dict[str, Any]:
        """Return the options as JSON values, without the examples, because the context contains them."""
        return {name: value for name, value in super().options().items() if name != "examples"}

    # --- rows ---------------------------------------------------------------------------------------------------------

    def render(self, row: Any, label: str | None = None, *, tokenizer: Any = None) -> dict[str, Any]:
        """Render a row in the format of the examples.

        Args:
            row: a dictionary of the template's fields, with or without the label; or a string, if there is only one input field.
            label: the label; a row without a label ends where the model is to generate it.
            tokenizer: the model's tokenizer; required if the method has none, for example after `load`.

        Returns:
            `input_ids` and `attention_mask`. If the row has a label, also `labels`, which are -100 outside the label, and, with
            `leave_one_out`, `example_ids`: the index of the example with the same ids, or -1 if there is none.
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
            raise OptionError(f"the label {fields['label']!r} has no tokens; it must have at least one.")
        rendered["labels"] = [IGNORE_INDEX] * len(ids) + answer
        if self.leave_one_out:
            rendered[EXAMPLE_IDS] = self.context.example_of(ids + answer)
        return rendered

    # --- on a model ---------------------------------------------------------------------------------------------------

    def build(self, structure: ModelStructure) -> ContextEncoder:
        """Make the encoder with the embeddings of the context."""
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
            "the context has %d tokens and %d examples; %d embeddings are trained and may move by %.3g to %.3g of their norm",
            len(context.ids), context.count, len(bounds), low, high,
        )  # fmt: skip
        return encoder

    def check(self, prompt: PromptOnModel) -> None:
        """Refuse a model that is not a causal language model or cannot share its prompt between rows."""
        if prompt.injection == "shared" and can_generate(prompt.model):
            return
        raise UnsupportedMethodError(
            f"{self.kind} needs a causal language model that computes the prompt once for all rows; this is "
            f"{type(prompt.model).__name__} with injection {prompt.injection!r}.",
            "Use a causal language model without `injection=` and without FSDP, or PromptTuning with init='text'.",
            method=self.kind,
            model=type(prompt.model).__name__,
            injection=repr(prompt.injection),
        )

    def objective(self) -> Objective | None:
        """Return an objective that trains on the labels of the context and of the row."""
        if not self.context_loss:
            return None
        context = self.context
        places = context.labels
        weights = [self.decay ** (context.count - context.examples[place]) for place in places]
        from softhooks.objectives.weighted_labels import WeightedLabels  # imports transformers

        return WeightedLabels(places, [context.ids[place] for place in places], weights)

    def folded_encoder(self, tables: dict[str, Tensor]) -> FoldedContext:
        """Make the encoder of a folded context."""
        return FoldedContext(self.context, tables[EMBEDDINGS])

    def rebuild(self, structure: ModelStructure, tables: dict[str, Tensor]) -> ContextEncoder:
        """Split a folded context into the model's embeddings and deltas."""
        encoder = self.build(structure)
        encoder.load_folded(tables[EMBEDDINGS])
        return encoder


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _bound(value: Any, name: str) -> float | None:
    """Check an epsilon; infinity becomes None, which means no bound."""
    if value is None or (_is_number(value) and value == math.inf):
        return None
    if not _is_number(value) or not value >= 0:
        raise OptionError(f"{name} is {value!r}; it must be a number of at least 0, or None.")
    return float(value)
