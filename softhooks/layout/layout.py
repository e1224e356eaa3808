"""`Layout`: the positions of virtual tokens in a text: at its ends, next to anchors, or as in a template."""

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
    """Compute positions from the mask, so that they do not depend on padding.

    Args:
        mask: 1 for a real column, 0 for padding.

    Shape:
        [B, T] -> [B, T]; padding gets the position of the last real column before it, or 0.
    """
    return (mask.long().cumsum(-1) - 1).clamp_(min=0)


class Layout:
    """The order of virtual tokens (slots), fixed text and the fields of the data in a row.

    For data that is not tokenized yet, a template: `"{premise} Question: {hypothesis}? {soft:3} Answer: {mask}"`.
    - Text outside braces is an anchor, which is tokenized and keeps its frozen embeddings.
    - `{mask}` is the tokenizer's mask token.
    - `{soft:3}` are three slots. `{soft:"some words"}` are as many slots as the words have tokens, initialized from their
      embeddings. `{soft:2, name=a}` are tied: slots of the same name share their virtual tokens.
    - Any other `{name}` is a field.

    A list of chat messages with templates as contents goes through the tokenizer's chat template. `mapper` (for `datasets.map`)
    and `collator` make rows of ids without slots, and a column `soft_slots` with the places of the slots.

    For tokenized data, `insert`; the script that tokenizes the data does not change.

    Args:
        template: the template, or messages with `role` and `content`.
        tokenizer: the model's tokenizer or its name, for slots that are initialized from words; or pass it to the method.

    Raises:
        OptionError: the template cannot be parsed, has no slot, or slots of one name differ.
    """

    def __init__(self, template: Source, *, tokenizer: Any = None) -> None:
        self._form: Template | Insertion = Template(template)
        if tokenizer is not None:
            self._form = self._form.bound(tokenizer)

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
        """Insert slots into tokenized rows. The order of the arguments is the order of the slots in the prompt.

        Args:
            start: the number of slots before a row's first token.
            after, before: anchors, with the number of slots next to each. An anchor is a token or words (as the tokenizer encodes
                them at the start of a text or after a space), an id, or a tuple of ids. `generate` searches only its input.
            end: the number of slots after a row's last token.
            which: use the `first` or the `last` match of an anchor in a row.
            missing: `error` refuses a row without an anchor; `skip` omits the anchor's slots in such a row.
            tokenizer: the model's tokenizer or its name, for anchors that are words; or pass it to the method.

        Raises:
            OptionError: a number or an anchor is wrong, or there are no slots.
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
        """Put all slots in one place."""
        return cls._of(Insertion((Group(_AT[placement], count),)))

    @classmethod
    def _of(cls, form: Template | Insertion) -> Layout:
        layout = cls.__new__(cls)
        layout._form = form
        return layout

    # --- slots --------------------------------------------------------------------------------------------------------

    @property
    def placement(self) -> str:
        """The name that is saved with a prompt: `front`, `after_first`, `end`, or `layout` for any other placement."""
        return self._form.placement

    @property
    def batch_columns(self) -> tuple[str, ...]:
        """The batch columns that the layout needs."""
        return (COLUMN,) if isinstance(self._form, Template) else ()

    @property
    def may_skip(self) -> bool:
        """Whether rows without an anchor skip its slots."""
        return self._form.may_skip

    @property
    def searches(self) -> bool:
        """Whether the places of slots depend on the row's tokens or length: next to anchors, or at the end."""
        return self._form.searches

    @property
    def has_tail(self) -> bool:
        """Whether slots come last, after the text."""
        return self._form.has_tail

    @property
    def ids(self) -> list[int]:
        """The token ids of all anchors, or of all words from which slots are initialized."""
        return self._form.ids

    @property
    def table_rows(self) -> list[int]:
        """The row of the prompt's table that each slot takes, in the order of the layout; tied slots share rows."""
        return self._form.table_rows

    @property
    def starts(self) -> dict[int, int]:
        """The rows of the table that are initialized from words, mapped to the ids of those words."""
        return self._form.starts

    @property
    def num_slots(self) -> int:
        """The number of slots in a row (S)."""
        return len(self.table_rows)

    @property
    def num_virtual_tokens(self) -> int:
        """The number of rows of the prompt's table (P), which is less than the number of slots (S) if slots are tied."""
        return max(self.table_rows) + 1

    def bound(self, tokenizer: Any) -> Layout:
        """Return the layout with the ids of all its words.

        Raises:
            OptionError: the layout has words, and there is no tokenizer.
        """
        if self._form.is_bound:
            return self
        if tokenizer is None:
            raise OptionError(
                "the layout has words and needs a tokenizer, but none is given.",
                "Pass `tokenizer=` to the layout or to the method: the model's own, or its name.",
                layout=self,
            )
        return self._of(self._form.bound(tokenizer))

    def places(self, mask: Tensor, ids: Tensor | None, given: Tensor | None, rows: Sequence[int]) -> Places:
        """Find the place of every slot in the rows of a batch.

        Args:
            mask: 1 for real tokens, [B, T].
            ids: the ids of the text, [B, T], or None if the call has embeddings.
            given: the column `soft_slots` of a template, [B, S].
            rows: the numbers of the rows in the batch, for errors.

        Raises:
            UnsupportedModeError: a row has no anchor, or the column is missing or does not fit the rows.
        """
        return self._form.places(mask, ids, given, rows)

    def probe(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the ids and batch columns for a test forward. [1, T] -> [1, T']."""
        return self._form.probe(ids)

    # --- rendering ----------------------------------------------------------------------------------------------------

    def render(
        self, tokenizer: Any, fields: Mapping[str, Any], *, max_length: int | None = None, **chat: Any
    ) -> dict[str, list[int]]:
        """Make a row from the template's fields.

        Each anchor and field is tokenized separately, so no token spans two parts, and an anchor's tokens do not depend on the
        fields. Spaces before a field belong to the field; spaces before slots, the mask and the end are dropped. A tokenizer that
        starts every text as a new word (SentencePiece) does so for each part.

        Args:
            tokenizer: the model's tokenizer.
            fields: the text of each field.
            max_length: the maximum length of the row with its slots. Longer rows lose tokens of their fields, one by one from
                the longest field, at the tokenizer's `truncation_side`; anchors and slots are never truncated.
            chat: arguments of `apply_chat_template` for a chat, such as `add_generation_prompt`.

        Returns:
            `input_ids` without slots, `attention_mask`, `token_type_ids` if the tokenizer has them, and `soft_slots`.

        Raises:
            OptionError: a field is missing, or anchors and slots alone exceed `max_length`.
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
        """Make a function for `datasets.map`, batched or not, that renders each row.

        Args:
            tokenizer, max_length, chat: as in `render`.
            target: the field to predict: rows get `labels` with its ids, and -100 elsewhere.
            verbalizer: maps classes to words: rows get `labels` with the word of their class at the mask, and -100 elsewhere.
            label: the column of the class, for the verbalizer.

        Raises:
            OptionError: the layout is not a template, or does not have the field or a mask.
        """
        form = self.bound(tokenizer)._form
        if not isinstance(form, Template):
            raise OptionError(
                f"{self!r} is not a template, so there is nothing to render; the model inserts the slots into the ids of a batch."
            )
        return Mapper(form, tokenizer, max_length, target, verbalizer, label, chat)

    def collator(self, tokenizer: Any, **options: Any) -> Collator:
        """Make a data collator for rows of fields, or for rows rendered by `mapper`; takes the options of `mapper`."""
        return Collator(self.mapper(tokenizer, **options))

    # --- as JSON ------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Return the layout as JSON values."""
        return self._form.to_json()

    @classmethod
    def from_json(cls, stored: Any) -> Layout:
        """Make the layout from the values that `to_json` returned.

        Raises:
            OptionError: the values are not a layout.
        """
        if not isinstance(stored, dict) or ("template" in stored) == ("insert" in stored):
            raise OptionError(f"the stored layout {stored!r} must have either a template or slots to insert.")
        form = Template.from_json(stored) if "template" in stored else Insertion.from_json(stored)
        if not form.is_bound or form.to_json() != stored:
            raise OptionError(f"the stored layout {stored!r} has missing or unknown entries.")
        return cls._of(form)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(repr(self.to_json()))

    def __repr__(self) -> str:
        return repr(self._form)
