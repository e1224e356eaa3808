"""Where virtual slots stand among a text: at its ends, next to anchors, or where a template has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from softhooks.errors import OptionError
from softhooks.layout.anchors import Which, anchors_from, count_of
from softhooks.layout.insertion import At, Group, Insertion, Missing
from softhooks.layout.slot_map import Places
from softhooks.layout.template import COLUMN, Source, Template

if TYPE_CHECKING:
    from softhooks.layout.collate import Collator, Mapper
    from softhooks.layout.verbalizer import Verbalizer

Placement = Literal["front", "after_first", "end"]
_AT: dict[Placement, At] = {"front": "start", "after_first": "first", "end": "end"}


def text_positions(mask: Tensor) -> Tensor:
    """Count each column's position from the mask, so that padding does not move the text.

    Args:
        mask: 1 for a real column, 0 for padding.

    Shape:
        [B, T] -> [B, T]; padding gets the position of the last real column before it, or 0.
    """
    return (mask.long().cumsum(-1) - 1).clamp_(min=0)


class Layout:
    """Where virtual slots, hard anchors and the input's parts stand.

    As a template, for data still to be tokenized: `"{premise} Question: {hypothesis}? {soft:3} Answer: {mask}"`. Text outside
    braces is an anchor with its frozen embeddings; `{mask}` is the tokenizer's mask; `{soft:3}` are three slots, `{soft:"some
    words"}` as many as the words have tokens, which start as they are, `{soft:2, name=a}` slots that are the same wherever they
    have this name; any other `{name}` is a field. Messages of a chat whose contents are templates go through the tokenizer's
    chat template. `mapper` (for `datasets.map`) and `collator` make rows of ids without slots, and a column that says where the
    slots go.

    Or with `insert`, for ids that exist already: nothing changes in the script that made them.

    Args:
        template: the template, or messages with role and content.
        tokenizer: the model's, or its name, for slots that start as words; it may also be given to the method.

    Raises:
        OptionError: the template cannot be understood, has no slot, or slots of one name differ.
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
        """Insert slots into ids that exist already. The order of the arguments is the order of the slots in the prompt.

        Args:
            start: how many before a row's first token.
            after, before: how many next to an anchor: a token or words (found as the tokenizer writes them at the start of a
                text or behind a blank), an id, or a tuple of ids. In generation only the prompt is searched.
            end: how many behind a row's last token.
            which: the anchor's `first` place in a row, or its `last`.
            missing: an anchor that a row lacks is an `error`; `skip` leaves its slots out of that row.
            tokenizer: the model's, or its name, for anchors that are words; it may also be given to the method.

        Raises:
            OptionError: a number or an anchor is wrong, or there is no slot.
        """
        groups = [Group("start", count_of(start, "start"))]
        groups += [Group("after", count, anchor) for anchor, count in anchors_from(after or {}, "after", tokenizer)]
        groups += [Group("before", count, anchor) for anchor, count in anchors_from(before or {}, "before", tokenizer)]
        groups += [Group("end", count_of(end, "end"))]
        return cls._of(Insertion(tuple(group for group in groups if group.count), which, missing))

    @classmethod
    def placed(cls, placement: Placement, count: int) -> Layout:
        """All slots at one place."""
        return cls._of(Insertion((Group(_AT[placement], count),)))

    @classmethod
    def _of(cls, form: Template | Insertion) -> Layout:
        layout = cls.__new__(cls)
        layout._form = form
        return layout

    # --- what it holds ------------------------------------------------------------------------------------------------

    @property
    def placement(self) -> str:
        """Its name among the conventions: `front`, `after_first`, `end`, or `layout` for any other."""
        return self._form.placement

    @property
    def batch_columns(self) -> tuple[str, ...]:
        """The columns that it needs in a batch."""
        return (COLUMN,) if isinstance(self._form, Template) else ()

    @property
    def may_skip(self) -> bool:
        """Whether a row may leave slots out."""
        return self._form.may_skip

    @property
    def searches(self) -> bool:
        """Whether its slots are placed by what a batch holds: next to anchors, or at its end."""
        return self._form.searches

    @property
    def has_tail(self) -> bool:
        """Whether slots stand behind everything else."""
        return self._form.has_tail

    @property
    def ids(self) -> list[int]:
        """Every id that it names: of anchors to be found, and of words that slots start as."""
        return self._form.ids

    @property
    def table_rows(self) -> list[int]:
        """Which row of the prompt's table each slot takes, in the order of the layout; tied slots take the same."""
        return self._form.table_rows

    @property
    def starts(self) -> dict[int, int]:
        """Which rows of the table start as which id."""
        return self._form.starts

    @property
    def columns(self) -> int:
        """S, how many slots stand in a row."""
        return len(self.table_rows)

    @property
    def num_virtual_tokens(self) -> int:
        """P, how many rows the prompt's table has; fewer than slots where some are tied."""
        return max(self.table_rows) + 1

    def bound(self, tokenizer: Any) -> Layout:
        """The layout with every slot and anchor known.

        Raises:
            OptionError: it has words, and there is no tokenizer to make ids of them.
        """
        if self._form.is_bound:
            return self
        if tokenizer is None:
            raise OptionError(
                "a layout with words needs the tokenizer that makes ids of them.",
                "Pass `tokenizer=` to the layout or to the method: the model's own, or its name.",
                layout=self,
            )
        return self._of(self._form.bound(tokenizer))

    def places(self, mask: Tensor, ids: Tensor | None, given: Tensor | None, rows: Sequence[int]) -> Places:
        """Find the place of every slot in the rows of a batch.

        Args:
            mask: 1 for real tokens, [B, T].
            ids: the text's, [B, T]; None where it came as embeddings.
            given: the column of a template, [B, S].
            rows: the rows' numbers in the batch, for errors.

        Raises:
            UnsupportedModeError: a row lacks an anchor, or the column is missing or belongs to other rows.
        """
        return self._form.places(mask, ids, given, rows)

    def probe(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Ids for a probe of a model, and the columns that go with them. [1, T] -> [1, T']."""
        return self._form.probe(ids)

    # --- rendering ----------------------------------------------------------------------------------------------------

    def render(
        self, tokenizer: Any, fields: Mapping[str, Any], *, max_length: int | None = None, **chat: Any
    ) -> dict[str, list[int]]:
        """Make a row of a template's fields.

        Anchors and fields are tokenized each on its own, so that nothing merges across them: an anchor's tokens are the same
        whatever stands beside it. Blanks before a field go with the field; those before slots, the mask and the end are dropped.
        A tokenizer that begins every text as a new word (SentencePiece) begins each of them so.

        Args:
            tokenizer: the model's.
            fields: the text of each field.
            max_length: of the row with its slots. What exceeds it is taken from the fields, token by token from the longest, at
                the tokenizer's `truncation_side`; never from an anchor or a slot.
            chat: for a chat, more arguments of `apply_chat_template`, such as `add_generation_prompt`.

        Returns:
            `input_ids` without slots, `attention_mask`, `token_type_ids` where the tokenizer has them, and `soft_slots`.

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
        """Make a function for `datasets.map`, with batches or without; it renders each row.

        Args:
            tokenizer, max_length, chat: as in `render`.
            target: the field that is to be predicted: rows get `labels`, which are its ids, and -100 elsewhere.
            verbalizer: rows get `labels`, which are the word of their class at the mask, and -100 elsewhere.
            label: the column of the class, for the verbalizer.

        Raises:
            OptionError: the layout is no template, or has no such field or no mask.
        """
        from softhooks.layout.collate import Mapper

        form = self.bound(tokenizer)._form
        if not isinstance(form, Template):
            raise OptionError(
                f"{self!r} has nothing to render: it inserts into ids, which the model takes as they are."
            )
        return Mapper(form, tokenizer, max_length, target, verbalizer, label, chat)

    def collator(self, tokenizer: Any, **options: Any) -> Collator:
        """Make a collator of rows of fields, or of rows that `mapper` has rendered; the options are those of `mapper`."""
        from softhooks.layout.collate import Collator

        return Collator(self.mapper(tokenizer, **options))

    # --- as JSON ------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The layout as JSON can hold it."""
        return self._form.to_json()

    @classmethod
    def from_json(cls, told: Any) -> Layout:
        """The layout of what `to_json` gave.

        Raises:
            OptionError: it is nothing of the kind.
        """
        if not isinstance(told, dict) or ("template" in told) == ("insert" in told):
            raise OptionError(f"a stored layout must hold a template, or what to insert; it holds {told!r}.")
        form = Template.from_json(told) if "template" in told else Insertion.from_json(told)
        if not form.is_bound or form.to_json() != told:
            raise OptionError(f"a stored layout must say all that a layout says, and no more; it says {told!r}.")
        return cls._of(form)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(repr(self.to_json()))

    def __repr__(self) -> str:
        return repr(self._form)
