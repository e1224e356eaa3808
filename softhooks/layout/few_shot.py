"""Few-shot contexts: examples and a template become ids, and a type for every token."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from softhooks.errors import OptionError
from softhooks.layout.rendering import encode
from softhooks.layout.template import Part, parse

SEPARATOR, INPUT_FORMAT, INPUT, LABEL_FORMAT, LABEL = range(5)
"""What a token is. Its type is 0 for a separator, and else 4i + this, in example i."""

_LABEL, _SEPARATOR = "label", "sep"


@dataclass(frozen=True)
class Context:
    """The tokens of a few-shot context.

    Args:
        ids: of the tokens, [P].
        types: of the tokens, [P].

    Attributes:
        examples: for each token the example that it belongs to, a separator to the one before it; -1 before the first.

    Raises:
        OptionError: ids and types do not match, examples are not counted 0, 1, 2, ..., or no token may move.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    examples: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the types against each other."""
        if len(self.ids) != len(self.types) or not self.ids:
            raise OptionError(
                f"context_ids and token_types must be as long as each other, 1 or more; they have {len(self.ids)} and "
                f"{len(self.types)}."
            )
        if min(*self.ids, *self.types, 0) < 0:
            raise OptionError("context_ids and token_types must be 0 or more; one of them is negative.")
        examples: list[int] = []
        last = -1
        for place, token_type in enumerate(self.types):
            own = last if token_type == 0 else (token_type - 1) // 4
            if own not in (last, last + 1):
                raise OptionError(
                    "token_types must count the examples in order: those of example i are 4i+1 to 4i+4, separators 0.",
                    "Make them with `examples=`, `template=` and `tokenizer=`, or count from 0 without a gap.",
                    token=f"{place}, of type {token_type}",
                    example=own,
                    after_example=last,
                )
            examples.append(own)
            last = own
        object.__setattr__(self, "examples", tuple(examples))
        if not self.movable:
            raise OptionError(f"token_types must let a token move: types 4i+1, 4i+2, 4i+3; they are {set(self.types)}.")

    @property
    def kinds(self) -> list[int]:
        """What each token is."""
        return [SEPARATOR if token_type == 0 else (token_type - 1) % 4 + 1 for token_type in self.types]

    @property
    def count(self) -> int:
        """How many examples there are."""
        return self.examples[-1] + 1

    @property
    def movable(self) -> list[int]:
        """Where the tokens stand that are trained."""
        return [place for place, kind in enumerate(self.kinds) if kind not in (SEPARATOR, LABEL)]

    @property
    def labels(self) -> list[int]:
        """Where the label tokens stand."""
        return [place for place, kind in enumerate(self.kinds) if kind == LABEL]

    def check_labels(self) -> None:
        """Check that every example has a label that something predicts.

        Raises:
            OptionError: naming the example.
        """
        told = {self.examples[place] for place in self.labels if place > 0}
        missing = [example for example in range(self.count) if example not in told]
        if missing or 0 in self.labels:
            example = missing[0] if missing else 0
            raise OptionError(
                "a loss over the context needs a label in every example (type 4i+4), and a token before it.",
                "Mark the labels, or choose context_loss=False.",
                example=example,
                types=[t for t, own in zip(self.types, self.examples, strict=True) if own == example],
            )

    def example_of(self, row: Sequence[int]) -> int:
        """Which example reads as a row does, up to its label; -1 where none does."""
        for example in range(self.count):
            own = [place for place, number in enumerate(self.examples) if number == example]
            labels = [place for place in own if place in set(self.labels)]
            if labels and list(self.ids[own[0] : labels[-1] + 1]) == list(row):
                return example
        return -1


class ExampleTemplate:
    """How an example reads: text with fields in braces, `{label}` the last of them.

    Text before the last input is its format, text behind it that of the label. `{sep}` is a separator, which never moves, and
    ends the input's format. Each part is tokenized alone, so that no token spans two of them; blanks before a field belong to it.

    Args:
        template: such as "Text: {input}{sep}Label: {label}".
        separator: between examples, and behind the last.
        inner: what `{sep}` stands for.

    Raises:
        OptionError: it cannot be understood, has no input, or `{label}` is not its last field.
    """

    def __init__(self, template: str, separator: str, inner: str) -> None:
        if not isinstance(template, str):
            raise OptionError(f"template must be a text with fields, such as 'Text: {{input}}'; it is {template!r}.")
        self.separator = separator
        self.inner = inner
        self.parts = parse(template)
        fields = [part.text for part in self.parts if part.kind == "field" and part.text != _SEPARATOR]
        self.inputs = list(dict.fromkeys(name for name in fields if name != _LABEL))
        other = [part.kind for part in self.parts if part.kind not in ("text", "field")]
        if fields.count(_LABEL) != 1 or fields[-1] != _LABEL or not self.inputs or other:
            raise OptionError(
                "the template of a context must have an input or more and, behind them, {label} once; slots and masks "
                "have no place in it.",
                "Write it such as 'Text: {input}{sep}Label: {label}'.",
                template=repr(template),
                fields=", ".join(fields) or "none",
            )

    def context(self, examples: Iterable[Any], tokenizer: Any) -> Context:
        """Put examples behind each other, and what the tokenizer begins a text with before the first.

        Args:
            examples: mappings with the template's fields, or pairs of input and label.
        """
        begin = getattr(tokenizer, "bos_token_id", None)
        ids = [] if begin is None else [int(begin)]
        types = [SEPARATOR] * len(ids)
        for number, example in enumerate(examples):
            pieces = self._pieces(self.fields_of(example), tokenizer)
            pieces.append((_encode(self.separator, tokenizer), SEPARATOR))
            if not any(own for own, kind in pieces if kind == LABEL):
                raise OptionError(f"every example of a context needs a label; example {number} is {example!r}.")
            for own, kind in pieces:
                ids += own
                types += [kind and 4 * number + kind] * len(own)
        return Context(tuple(ids), tuple(types))

    def row(self, fields: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
        """The ids of a row as far as its label, without a token that begins a text; and its label's."""
        pieces = self._pieces(fields, tokenizer)
        end = next((place for place, (_, kind) in enumerate(pieces) if kind == LABEL), None)
        if end is None:
            raise OptionError(f"a row needs its label's field; {self!r} has none for {fields!r}.")
        return [token for own, _ in pieces[:end] for token in own], pieces[end][0]

    def fields_of(self, example: Any) -> dict[str, Any]:
        """The fields of an example, which may be a pair.

        Raises:
            OptionError: it is neither mapping nor pair, or a pair for several inputs.
        """
        if isinstance(example, Mapping):
            return dict(example)
        is_pair = isinstance(example, Sequence) and not isinstance(example, str) and len(example) == 2
        if is_pair and len(self.inputs) == 1:
            return {self.inputs[0]: example[0], _LABEL: example[1]}
        raise OptionError(
            "an example must be a mapping of the template's fields; a pair of input and label where there is one input.",
            "Give it such as {'input': 'a text', 'label': 'its label'}.",
            fields=", ".join([*self.inputs, _LABEL]),
            example=repr(example),
        )

    def _pieces(self, fields: Mapping[str, Any], tokenizer: Any) -> list[tuple[list[int], int]]:
        """The ids of each part, and what they are; without a label its piece is empty."""
        if tokenizer is None:
            raise OptionError(
                "a template needs a tokenizer; none is given. Pass `tokenizer=`: the model's, or its name."
            )
        last = max(place for place, part in enumerate(self.parts) if part.text in self.inputs and part.kind == "field")
        seps = [place for place, part in enumerate(self.parts) if part.kind == "field" and part.text == _SEPARATOR]
        turn = next((place for place in seps if place > last), last)
        pieces = []
        for place, part in enumerate(self.parts):
            if part.kind == "text":
                pieces.append((encode(part.text, tokenizer), LABEL_FORMAT if place > turn else INPUT_FORMAT))
            elif part.text == _SEPARATOR:
                pieces.append((_encode(part.space + self.inner, tokenizer), SEPARATOR))
            else:
                kind = LABEL if part.text == _LABEL else INPUT
                pieces.append((_encode(_value(part, fields), tokenizer), kind))
        return pieces


def _encode(text: str, tokenizer: Any) -> list[int]:
    return encode(text, tokenizer) if text else []


def _value(part: Part, fields: Mapping[str, Any]) -> str:
    value = fields.get(part.text)
    if value is None and part.text == _LABEL:
        return ""
    if not isinstance(value, str):
        raise OptionError(
            "every field of a template must be given as text.",
            "Rename the field in the template, or write numbers as words.",
            field=part.text,
            found="nothing" if value is None else repr(value),
            given=", ".join(map(str, fields)),
        )
    return part.space + value if value else ""


def whole_numbers(value: Any, option: str) -> tuple[int, ...]:
    """Copy a sequence or a tensor of whole numbers.

    Raises:
        OptionError: it holds something else.
    """
    listed = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(listed, Iterable) or isinstance(listed, str):
        raise OptionError(f"{option} must be a list of whole numbers; it is {value!r}.")
    numbers = []
    for item in listed:
        if isinstance(item, bool) or not hasattr(item, "__index__"):
            raise OptionError(f"{option} must be a list of whole numbers; it holds {item!r}.")
        numbers.append(operator.index(item))
    return tuple(numbers)
