"""Few-shot contexts of context-aware prompt tuning: conversion of examples to ids, with a type for every token."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from softhooks.errors import OptionError
from softhooks.layout.rendering import encode, text_of
from softhooks.layout.template import Part, parse

SEPARATOR, INPUT_FORMAT, INPUT, LABEL_FORMAT, LABEL = range(5)
"""The kinds of tokens. The type of a token in example i is 4i + its kind; the type of a separator is 0."""

_LABEL, _SEPARATOR = "label", "sep"


@dataclass(frozen=True)
class Context:
    """The tokens of a few-shot context.

    Args:
        ids: the ids, [P].
        types: the types of the tokens, [P].

    Attributes:
        examples: the example of each token; a separator belongs to the example before it, or to -1.

    Raises:
        OptionError: ids and types do not match, examples are not numbered 0, 1, 2, ..., or no token is movable.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    examples: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the types against each other."""
        if len(self.ids) != len(self.types) or not self.ids:
            raise OptionError(
                f"context_ids has {len(self.ids)} entries and token_types {len(self.types)}; both must have the same length, "
                "1 or more."
            )
        if min(*self.ids, *self.types, 0) < 0:
            raise OptionError("context_ids or token_types has a negative number; all must be 0 or more.")
        examples: list[int] = []
        last = -1
        for place, token_type in enumerate(self.types):
            own = last if token_type == 0 else (token_type - 1) // 4
            if own not in (last, last + 1):
                raise OptionError(
                    f"token_types goes from example {last} to example {own}; examples are numbered in order, with types 4i+1 to "
                    "4i+4 in example i, and 0 for separators.",
                    "Pass `examples=`, `template=` and `tokenizer=` instead, or number the examples from 0 without a gap.",
                    token=f"{place}, of type {token_type}",
                    example=own,
                    after_example=last,
                )
            examples.append(own)
            last = own
        object.__setattr__(self, "examples", tuple(examples))
        if not self.movable:
            raise OptionError(
                f"token_types has the types {set(self.types)}; it must have a token of type 4i+1, 4i+2 or 4i+3, which is movable."
            )

    @property
    def kinds(self) -> list[int]:
        """The kind of each token."""
        return [SEPARATOR if token_type == 0 else (token_type - 1) % 4 + 1 for token_type in self.types]

    @property
    def count(self) -> int:
        """The number of examples."""
        return self.examples[-1] + 1

    @property
    def movable(self) -> list[int]:
        """The places of the tokens that are trained."""
        return [place for place, kind in enumerate(self.kinds) if kind not in (SEPARATOR, LABEL)]

    @property
    def labels(self) -> list[int]:
        """The places of label tokens."""
        return [place for place, kind in enumerate(self.kinds) if kind == LABEL]

    def check_labels(self) -> None:
        """Check that every example has a label, with a token before it that predicts it.

        Raises:
            OptionError: an example has no such label; the error names it.
        """
        labeled = {self.examples[place] for place in self.labels if place > 0}
        missing = [example for example in range(self.count) if example not in labeled]
        if missing or 0 in self.labels:
            example = missing[0] if missing else 0
            raise OptionError(
                f"example {example} has no label (type 4i+4) with a token before it, which the loss over the context needs.",
                "Mark the labels, or choose context_loss=False.",
                example=example,
                types=[t for t, own in zip(self.types, self.examples, strict=True) if own == example],
            )

    def example_of(self, row: Sequence[int]) -> int:
        """Return the number of the example whose ids up to the end of its label equal a row, or -1 if there is none."""
        for example in range(self.count):
            own = [place for place, number in enumerate(self.examples) if number == example]
            labels = [place for place in own if place in set(self.labels)]
            if labels and list(self.ids[own[0] : labels[-1] + 1]) == list(row):
                return example
        return -1


class ExampleTemplate:
    """The template of an example: text with fields in braces; the last field is `{label}`.

    Text before the last input is the format of the input, and text after it is the format of the label. `{sep}` is a separator,
    which never moves and ends the format of the input. Each part is tokenized separately, so that no token spans two parts;
    spaces before a field belong to the field.

    Args:
        template: such as "Text: {input}{sep}Label: {label}".
        separator: the text between examples and after the last example.
        inner: the text of `{sep}`.

    Raises:
        OptionError: the template cannot be parsed, has no input, or `{label}` is not its last field.
    """

    def __init__(self, template: str, separator: str, inner: str) -> None:
        if not isinstance(template, str):
            raise OptionError(f"template is {template!r}; it must be a text with fields, such as 'Text: {{input}}'.")
        self.separator = separator
        self.inner = inner
        self.parts = parse(template)
        fields = [part.text for part in self.parts if part.kind == "field" and part.text != _SEPARATOR]
        self.inputs = list(dict.fromkeys(name for name in fields if name != _LABEL))
        other = [part.kind for part in self.parts if part.kind not in ("text", "field")]
        if fields.count(_LABEL) != 1 or fields[-1] != _LABEL or not self.inputs or other:
            raise OptionError(
                f"the fields of the template are {fields}; they must be inputs and then one {{label}}, without slots or masks.",
                "Use a template such as 'Text: {input}{sep}Label: {label}'.",
                template=repr(template),
                fields=", ".join(fields) or "none",
            )

    def context(self, examples: Iterable[Any], tokenizer: Any) -> Context:
        """Concatenate examples after the tokenizer's BOS token, if it has one.

        Args:
            examples: mappings with the template's fields, or pairs of input and label.
            tokenizer: the tokenizer.
        """
        begin = getattr(tokenizer, "bos_token_id", None)
        ids = [] if begin is None else [int(begin)]
        types = [SEPARATOR] * len(ids)
        for number, example in enumerate(examples):
            pieces = self._pieces(self.fields_of(example), tokenizer)
            pieces.append((encode(self.separator, tokenizer), SEPARATOR))
            if not any(own for own, kind in pieces if kind == LABEL):
                raise OptionError(f"example {number} of the context has no label: {example!r}.")
            for own, kind in pieces:
                ids += own
                types += [kind and 4 * number + kind] * len(own)
        return Context(tuple(ids), tuple(types))

    def row(self, fields: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
        """Return the ids of a row up to its label, without BOS, and the ids of its label."""
        pieces = self._pieces(fields, tokenizer)
        end = next((place for place, (_, kind) in enumerate(pieces) if kind == LABEL), None)
        if end is None:
            raise OptionError(f"the template has no label for the row {fields!r}.")
        return [token for own, _ in pieces[:end] for token in own], pieces[end][0]

    def fields_of(self, example: Any) -> dict[str, Any]:
        """Return the fields of an example, which may be a pair of input and label.

        Raises:
            OptionError: the example is neither a mapping nor a pair, or it is a pair but the template has several inputs.
        """
        if isinstance(example, Mapping):
            return dict(example)
        is_pair = isinstance(example, Sequence) and not isinstance(example, str) and len(example) == 2
        if is_pair and len(self.inputs) == 1:
            return {self.inputs[0]: example[0], _LABEL: example[1]}
        raise OptionError(
            "an example must be a mapping with the template's fields, or a pair of input and label if there is one input; it is "
            f"{example!r}.",
            "Pass an example such as {'input': 'a text', 'label': 'its label'}.",
            fields=", ".join([*self.inputs, _LABEL]),
            example=repr(example),
        )

    def _pieces(self, fields: Mapping[str, Any], tokenizer: Any) -> list[tuple[list[int], int]]:
        """Return the ids and the kind of each part; if a row has no label, the part for the label has no ids."""
        if tokenizer is None:
            raise OptionError(
                "a template needs a tokenizer, but none is given. Pass `tokenizer=`: the model's tokenizer or its name."
            )
        last = max(place for place, part in enumerate(self.parts) if part.text in self.inputs and part.kind == "field")
        seps = [place for place, part in enumerate(self.parts) if part.kind == "field" and part.text == _SEPARATOR]
        turn = next((place for place in seps if place > last), last)  # the label's format starts after this part
        pieces = []
        for place, part in enumerate(self.parts):
            if part.kind == "text":
                pieces.append((encode(part.text, tokenizer), LABEL_FORMAT if place > turn else INPUT_FORMAT))
            elif part.text == _SEPARATOR:
                pieces.append((encode(part.space + self.inner, tokenizer), SEPARATOR))
            elif part.text == _LABEL:
                pieces.append((encode(_label_of(part, fields), tokenizer), LABEL))
            else:
                pieces.append((encode(text_of(part, fields), tokenizer), INPUT))
        return pieces


def _label_of(part: Part, fields: Mapping[str, Any]) -> str:
    return "" if fields.get(_LABEL) is None else text_of(part, fields)


def whole_numbers(value: Any, option: str) -> tuple[int, ...]:
    """Copy a sequence or a tensor of whole numbers to a tuple.

    Raises:
        OptionError: a value is not a whole number.
    """
    listed = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(listed, Iterable) or isinstance(listed, str):
        raise OptionError(f"{option} is {value!r}; it must be a list of whole numbers.")
    numbers = []
    for item in listed:
        if isinstance(item, bool) or not hasattr(item, "__index__"):
            raise OptionError(f"{option} contains {item!r}; it must be a list of whole numbers.")
        numbers.append(operator.index(item))
    return tuple(numbers)
