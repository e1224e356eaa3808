"""Few-shot contexts for context-aware prompt tuning (CPT): the tokens of labeled examples, with a type for each token."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from softhooks.errors import OptionError
from softhooks.layout.rendering import encode, text_of
from softhooks.layout.template import parse

SEPARATOR, INPUT_FORMAT, INPUT, LABEL_FORMAT, LABEL = range(5)
"""The kinds of tokens. A token of kind k in example i has the type 4i + k; a separator has the type 0."""

_LABEL, _SEPARATOR = "label", "sep"


@dataclass(frozen=True)
class Context:
    """The tokens of a few-shot context.

    Args:
        ids: the ids, [P].
        types: the type of each token, [P]: 4i + 1 to 4i + 4 in example i, or 0 for a separator.

    Attributes:
        examples: the index of each token's example; for a separator, of the example before it, or -1 if there is none.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    examples: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.types) or not self.ids:
            raise OptionError(
                f"context_ids has {len(self.ids)} entries and token_types has {len(self.types)}; they must have the same "
                "length, at least 1."
            )
        if min(*self.ids, *self.types, 0) < 0:
            raise OptionError("context_ids or token_types contains a negative number; all numbers must be 0 or more.")
        examples: list[int] = []
        last = -1
        for place, token_type in enumerate(self.types):
            own = last if token_type == 0 else (token_type - 1) // 4
            if own not in (last, last + 1):
                raise OptionError(
                    f"token {place} has type {token_type} (example {own}), but the next example is {last + 1}; examples must be "
                    "numbered in order.",
                    "Use types 4i+1 to 4i+4 in example i, and 0 for separators; or pass `examples=`, `template=` and "
                    "`tokenizer=` instead.",
                )
            examples.append(own)
            last = own
        object.__setattr__(self, "examples", tuple(examples))
        if not self.movable:
            raise OptionError(
                f"token_types contains only the types {set(self.types)}; it must contain a type of trained tokens: 4i+1, 4i+2 or "
                "4i+3."
            )

    @property
    def kinds(self) -> list[int]:
        """The kind of each token: `SEPARATOR`, `INPUT_FORMAT`, `INPUT`, `LABEL_FORMAT` or `LABEL`."""
        return [SEPARATOR if token_type == 0 else (token_type - 1) % 4 + 1 for token_type in self.types]

    @property
    def count(self) -> int:
        """The number of examples."""
        return self.examples[-1] + 1

    @property
    def movable(self) -> list[int]:
        """The indices of the tokens that are trained."""
        return [place for place, kind in enumerate(self.kinds) if kind not in (SEPARATOR, LABEL)]

    @property
    def labels(self) -> list[int]:
        """The indices of the label tokens."""
        return [place for place, kind in enumerate(self.kinds) if kind == LABEL]

    def check_labels(self) -> None:
        """Check that every example has a label, and that the context does not start with one."""
        labeled = {self.examples[place] for place in self.labels if place > 0}
        missing = [example for example in range(self.count) if example not in labeled]
        if missing or 0 in self.labels:
            example = missing[0] if missing else 0
            raise OptionError(
                f"example {example} has no label, or its label comes first; the context loss needs a token before each label.",
                "Give the label's tokens the type 4i+4, or pass context_loss=False.",
                types=[t for t, own in zip(self.types, self.examples, strict=True) if own == example],
            )

    def example_of(self, row: Sequence[int]) -> int:
        """Return the index of the example whose ids, up to the end of its label, equal the row, or -1 if there is none."""
        for example in range(self.count):
            labels = [place for place in self.labels if self.examples[place] == example]
            if labels and list(self.ids[self.examples.index(example) : labels[-1] + 1]) == list(row):
                return example
        return -1


class ExampleTemplate:
    """A template for examples: text with input fields in braces, and `{label}` as the last field.

    `{sep}` is a separator, which is not trained. Text before the last input, or before the separator that follows it, is the
    format of the input; later text is the format of the label. Each part is tokenized separately, so that no token spans two
    parts. Spaces before a field are tokenized with the field.

    Args:
        template: the template, such as "Text: {input}{sep}Label: {label}".
        separator: the text after each example.
        inner: the text that replaces `{sep}`.
    """

    def __init__(self, template: str, separator: str, inner: str) -> None:
        if not isinstance(template, str):
            raise OptionError(
                f"template is {template!r}; it must be a string such as 'Text: {{input}} Label: {{label}}'."
            )
        self.separator = separator
        self.inner = inner
        self.parts = parse(template)
        fields = [part.text for part in self.parts if part.kind == "field" and part.text != _SEPARATOR]
        self.inputs = list(dict.fromkeys(name for name in fields if name != _LABEL))
        other = [part.kind for part in self.parts if part.kind not in ("text", "field")]
        if fields.count(_LABEL) != 1 or fields[-1] != _LABEL or not self.inputs or other:
            raise OptionError(
                f"the template has the fields {fields}; it must have one or more inputs, followed by one {{label}}, and no slots "
                "or masks.",
                "Use a template such as 'Text: {input}{sep}Label: {label}'.",
                template=repr(template),
            )

    def context(self, examples: Iterable[Any], tokenizer: Any) -> Context:
        """Concatenate the tokenizer's BOS token, if it has one, and the examples. See `fields_of` for the form of an example."""
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
        """Return the ids of a row up to its label, without BOS, and the ids of the label."""
        pieces = self._pieces(fields, tokenizer)
        end = next(place for place, (_, kind) in enumerate(pieces) if kind == LABEL)
        return [token for own, _ in pieces[:end] for token in own], pieces[end][0]

    def fields_of(self, example: Any) -> dict[str, Any]:
        """Return the fields of an example, which is a mapping of fields or an (input, label) pair."""
        if isinstance(example, Mapping):
            return dict(example)
        is_pair = isinstance(example, Sequence) and not isinstance(example, str) and len(example) == 2
        if is_pair and len(self.inputs) == 1:
            return {self.inputs[0]: example[0], _LABEL: example[1]}
        raise OptionError(
            f"an example is {example!r}; it must be a mapping with the template's fields or, if there is one input, a pair of "
            "input and label.",
            "Pass an example such as {'input': 'a text', 'label': 'its label'}.",
            fields=", ".join([*self.inputs, _LABEL]),
        )

    def _pieces(self, fields: Mapping[str, Any], tokenizer: Any) -> list[tuple[list[int], int]]:
        """Return the ids and the kind of each part. Without a label in `fields`, the label part has no ids."""
        if tokenizer is None:
            raise OptionError(
                "a template needs a tokenizer, but none is given. Pass `tokenizer=`: the model's tokenizer or its name."
            )
        last = max(place for place, part in enumerate(self.parts) if part.text in self.inputs and part.kind == "field")
        seps = [place for place, part in enumerate(self.parts) if part.kind == "field" and part.text == _SEPARATOR]
        turn = next((place for place in seps if place > last), last)  # the format of the label begins after this part
        pieces = []
        for place, part in enumerate(self.parts):
            if part.kind == "text":
                pieces.append((encode(part.text, tokenizer), LABEL_FORMAT if place > turn else INPUT_FORMAT))
            elif part.text == _SEPARATOR:
                pieces.append((encode(part.space + self.inner, tokenizer), SEPARATOR))
            elif part.text == _LABEL:
                label = "" if fields.get(_LABEL) is None else text_of(part, fields)
                pieces.append((encode(label, tokenizer), LABEL))
            else:
                pieces.append((encode(text_of(part, fields), tokenizer), INPUT))
        return pieces


def whole_numbers(value: Any, option: str) -> tuple[int, ...]:
    """Convert a sequence or a tensor of integers to a tuple."""
    listed = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(listed, Iterable) or isinstance(listed, str):
        raise OptionError(f"{option} is {value!r}; it must be a list of integers.")
    numbers = []
    for item in listed:
        if isinstance(item, bool) or not hasattr(item, "__index__"):
            raise OptionError(f"{option} contains {item!r}; it must be a list of integers.")
        numbers.append(operator.index(item))
    return tuple(numbers)
