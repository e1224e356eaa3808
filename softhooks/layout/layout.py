"""`Layout`, which defines where virtual tokens are inserted into the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from softhooks.errors import OptionError, check_int
from softhooks.layout.anchors import Which, anchors_from
from softhooks.layout.collate import Collator, Mapper
from softhooks.layout.insertion import At, Group, Insertion, Missing
from softhooks.layout.slot_map import Places
from softhooks.layout.template import COLUMN, Source, Template
from softhooks.layout.verbalizer import Verbalizer

Placement = Literal["front", "after_first", "end"]
_AT: dict[Placement, At] = {"front": "start", "after_first": "first", "end": "end"}


def text_positions(mask: Tensor) -> Tensor:
    """Compute position ids from an attention mask; padding gets the position of the token before it, or 0. [B, T] -> [B, T]."""
    return (mask.long().cumsum(-1) - 1).clamp_(min=0)


class Layout:
    """The order of slots, fixed words and data fields in the text. A slot is a place for a virtual token.

    For data that is not tokenized yet, pass a template, such as `"{premise} Question: {hypothesis}? {soft:3} Answer: {mask}"`.
    - Text outside braces is an anchor: fixed words that are not trained.
    - `{mask}` is the tokenizer's mask token or, with a verbalizer for a causal language model, the word of the row's class.
    - `{soft:3}` stands for three slots, and `{soft:"some words"}` for one slot per token of the words. Each of these tokens
      initializes the virtual token of its slot. Slots with the same name, such as `{soft:2, name=a}`, are tied: they share their
      virtual tokens.
    - Any other name in braces is a field of the data.

    For a chat, pass a list of messages with templates as contents; the tokenizer's chat template is applied to them. `mapper`
    and `collator` return ids that contain no slots, and a column `soft_slots` with the number of tokens before each slot.

    For data that is already tokenized, use `Layout.insert`.

    Args:
        template: the template, or messages with `role` and `content`.
        tokenizer: the model's tokenizer or its name, for slots that are initialized from words; or pass it to `PTuning`.

    Attributes:
        form: the template, or the slots to insert.

    Raises:
        OptionError: the template cannot be parsed or has no slot, or tied slots differ in number or words.
    """

    def __init__(self, template: Source, *, tokenizer: Any = None) -> None:
        self.form: Template | Insertion = Template(template)
        if tokenizer is not None:
            self.form = self.form.bound(tokenizer)

    @classmethod
    def insert(
        cls,
        *,
        start: int = 0,
        after: Mapping[Any, int] | None = None,
        before: Mapping[Any, int] | None = None,
        end: int = 0,
        which: Which = "first",
        missing: Missing = "error",
        tokenizer: Any = None,
    ) -> Layout:
        """Create a layout that inserts slots into tokenized rows.

        Virtual tokens are assigned to slots in the order of the arguments.

        Args:
            start: the number of slots before a row's first token.
            after, before: anchors, and the number of slots after or before each. An anchor is an id, a tuple of ids, or a string,
                which is tokenized both with and without a space before it. `generate` does not search new tokens for anchors.
            end: the number of slots after a row's last token.
            which: whether to use the `first` or the `last` match of an anchor in a row.
            missing: `error` refuses rows without an anchor; `skip` omits the anchor's slots in these rows.
            tokenizer: the model's tokenizer or its name, for anchors that are strings; or pass it to `PTuning`.

        Raises:
            OptionError: a number or an anchor is invalid, or there are no slots.
        """
        check_int("start", start, 0)
        check_int("end", end, 0)
        groups = [Group("start", start)]
        groups += [Group("after", count, anchor) for anchor, count in anchors_from(after or {}, "after", tokenizer)]
        groups += [Group("before", count, anchor) for anchor, count in anchors_from(before or {}, "before", tokenizer)]
        groups += [Group("end", end)]
        return cls._of(Insertion(tuple(group for group in groups if group.count), which, missing))

    @classmethod
    def placed(cls, placement: Placement, count: int) -> Layout:
        """Return a layout with all slots in one place."""
        return cls._of(Insertion((Group(_AT[placement], count),)))

    @classmethod
    def _of(cls, form: Template | Insertion) -> Layout:
        layout = cls.__new__(cls)
        layout.form = form
        return layout

    @property
    def batch_columns(self) -> tuple[str, ...]:
        """The batch columns that the layout needs."""
        return (COLUMN,) if isinstance(self.form, Template) else ()

    @property
    def num_slots(self) -> int:
        """The number of slots in a row (S)."""
        return len(self.form.table_rows)

    @property
    def num_virtual_tokens(self) -> int:
        """The number of virtual tokens (P), which is less than the number of slots (S) if slots are tied."""
        return max(self.form.table_rows) + 1

    def bound(self, tokenizer: Any) -> Layout:
        """Return the layout with its words encoded by the tokenizer."""
        if self.form.is_bound:
            return self
        if tokenizer is None:
            raise OptionError(
                "the layout contains words and needs a tokenizer, but none is given.",
                "Pass `tokenizer=`, the model's tokenizer or its name, to the layout or to `PTuning`.",
                layout=self,
            )
        return self._of(self.form.bound(tokenizer))

    def places(self, mask: Tensor, ids: Tensor | None, given: Tensor | None, rows: Sequence[int]) -> Places:
        """Find the place of every slot in the rows of a batch.

        Args:
            mask: the attention mask of the text, [B, T].
            ids: the ids of the text, [B, T], or None if the call passes embeddings.
            given: the batch column `soft_slots`, [B, S], for a template.
            rows: the indices of the rows in the batch, for error messages.

        Raises:
            UnsupportedModeError: a row does not contain an anchor, or `soft_slots` is missing or does not match the rows.
        """
        return self.form.places(mask, ids, given, rows)

    def render(
        self, tokenizer: Any, fields: Mapping[str, Any], *, max_length: int | None = None, **chat: Any
    ) -> dict[str, list[int]]:
        """Fill in the template's fields, and tokenize the text.

        Each anchor and field is tokenized separately, so the tokens of an anchor are the same in all rows. Spaces before a field
        are tokenized with the field; spaces before slots, before the mask and at the end are dropped. If the tokenizer adds a
        space before every string, as SentencePiece does, then each anchor and each field gets this space.

        Args:
            tokenizer: the model's tokenizer.
            fields: the text of each field.
            max_length: the maximum length of the row, including its slots. In a longer row, the longest field is truncated, one
                token at a time, on the tokenizer's `truncation_side`.
            chat: arguments of `apply_chat_template` for a chat, such as `add_generation_prompt`.

        Returns:
            `input_ids` without slots, `attention_mask`, `soft_slots`, and `token_type_ids` if the tokenizer returns them.

        Raises:
            OptionError: a field is missing, or the row would exceed `max_length` even without its fields.
        """
        return self.mapper(tokenizer, max_length=max_length, **chat).render(fields)

    def mapper(
        self,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        target: str | None = None,
        verbalizer: Verbalizer | None = None,
        label: str = "label",
        **chat: Any,
    ) -> Mapper:
        """Return a function for `datasets.map`, batched or not, that renders each row.

        Args:
            tokenizer, max_length, chat: as in `render`.
            target: the field to predict. The rows get `labels` with the field's ids, and -100 elsewhere.
            verbalizer: the words of the classes to predict. The rows get `labels` with the id of their class's word at the mask,
                and -100 elsewhere. With `Verbalizer(causal=True)`, the word replaces the mask, and a row without a class ends
                before it and gets no `labels`.
            label: the column with the class of each row, an integer from 0, for the verbalizer.

        Raises:
            OptionError: the layout is not a template, or the template does not contain the field or the mask to predict.
        """
        form = self.bound(tokenizer).form
        if not isinstance(form, Template):
            raise OptionError(
                f"{self!r} is not a template, so it cannot render text; tokenize the text as usual, and pass its ids to the "
                "model."
            )
        return Mapper(form, tokenizer, max_length, target, verbalizer, label, chat)

    def collator(self, tokenizer: Any, **options: Any) -> Collator:
        """Return a data collator, which also renders the rows that `mapper` has not rendered yet.

        Args:
            tokenizer: the model's tokenizer, which also defines the padding side.
            options: the options of `mapper`.
        """
        return Collator(self.mapper(tokenizer, **options))

    def to_json(self) -> dict[str, Any]:
        """Return the layout as a JSON-serializable dict."""
        return self.form.to_json()

    @classmethod
    def from_json(cls, stored: Any) -> Layout:
        """Create a layout from the result of `to_json`."""
        if not isinstance(stored, dict) or ("template" in stored) == ("insert" in stored):
            raise OptionError(f"the saved layout is {stored!r}; it must contain either a template or slots to insert.")
        form = Template.from_json(stored) if "template" in stored else Insertion.from_json(stored)
        if not form.is_bound or form.to_json() != stored:
            raise OptionError(f"the saved layout {stored!r} has missing or unknown entries.")
        return cls._of(form)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(repr(self.to_json()))

    def __repr__(self) -> str:
        return repr(self.form)
