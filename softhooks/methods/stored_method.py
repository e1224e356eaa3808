"""Create the method of a saved prompt, and check that the prompt is compatible with a model."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from softhooks.backbone.added_vocabulary import require_vocabulary
from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.backbone.stack import ModelStructure
from softhooks.errors import CheckpointError, PromptMismatchError, SoftHooksError
from softhooks.formats import peft_llama_adapter
from softhooks.formats.stored import StoredPrompt, on_one_line, outline
from softhooks.method import METHODS, Method

_REMEDY = "Load it onto the base model that it was trained with."
_PEFT_POOLS = (
    "To classify with an encoder, PEFT reads the first virtual token, but softhooks reads the first token of the text. Train the "
    "prompt with softhooks."
)


def method_of(stored: StoredPrompt) -> Method:
    """Create the method of a saved prompt; options that only affect the initialization keep their defaults."""
    kind, source = stored.kind, stored.source
    if kind not in METHODS:
        raise CheckpointError(f"{source} has the method {kind!r}, which is not one of {sorted(METHODS)}.")
    cls = METHODS[kind]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(stored.options) - set(fields))
    if unknown:
        raise CheckpointError(
            f"{source} has options of {kind} that this version of softhooks does not know: {unknown}. Upgrade softhooks."
        )
    options = {
        key: value for key, value in stored.options.items() if fields[key].compare and key not in cls.init_options
    }
    for key, value in options.items():
        _check_type(fields[key], value, source)
    try:
        method = cls(**options)
    except (SoftHooksError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{source} has invalid options for {kind}: {error}") from error
    method.check_tables(stored.tables, source)
    _check_conventions(stored.conventions, method, source)
    return method


def _check_type(field: dataclasses.Field[Any], value: object, source: str) -> None:
    """Check that a value has the same type as its option's default; an int is accepted for a float."""
    default = field.default
    if not isinstance(default, (bool, int, float, str)) or (value is None and str(field.type).endswith("| None")):
        return
    is_like = type(value) in (int, float) if isinstance(default, float) else type(value) is type(default)
    if not is_like:
        raise CheckpointError(f"{source} has {field.name}={value!r}; it must be of type {type(default).__name__}.")


def _check_conventions(conventions: dict[str, Any], method: Method, source: str) -> None:
    """Check that the `conventions` in a file (its assumptions about the forward pass) match its method and options."""
    allowed = {}
    for key, values in method.conventions_allowed.items():
        option = getattr(method, key, None)
        allowed[key] = (option,) if option in values else values  # a missing option or None allows every value
    if "placement" in allowed:
        allowed["placement"] = (method.token_layout.form.placement,)
    found = {key: value for key, value in conventions.items() if key != BUFFER}
    if set(found) != set(allowed) or not all(found[key] in allowed[key] for key in allowed):
        raise CheckpointError(
            f"the `conventions` in {source} do not match the method {method.kind} and its options.",
            "If a newer version of softhooks wrote the file, upgrade softhooks.",
            expected={key: list(values) for key, values in allowed.items()},
            found=conventions,
        )
    if BUFFER not in conventions:
        return
    ids, count = conventions[BUFFER], method.num_virtual_tokens
    are_ids = isinstance(ids, list) and len(ids) == count and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    if not are_ids or method.enters != "embeddings":
        raise CheckpointError(
            f"{source} has ids that do not match its virtual tokens; a prompt of embeddings may have one id for each "
            "virtual token, and any other prompt none.",
            "Save the prompt again.",
            expected=f"{count} ids" if method.enters == "embeddings" else "none",
            found=str(ids)[:80],
        )


def check_fit(stored: StoredPrompt, method: Method, structure: ModelStructure, *, strict: bool = True) -> None:
    """Check that a saved prompt is compatible with a model; with `strict`, also that the vocabulary is large enough."""
    enters_rows = method.enters == "embeddings"
    _check_stacks(stored, structure, directions_only=enters_rows)
    if strict:
        require_vocabulary(stored.base.vocabulary, structure, stored.source)
    if stored.base.task is not None and enters_rows and structure.entry.reads_ids:
        raise PromptMismatchError(
            "this model needs token ids in addition to embeddings, but a PEFT prompt has no ids.",
            "Train the prompt with softhooks.",
            prompt=stored.source,
            model=type(structure.entry.module).__name__,
        )
    if stored.adapter_layers:
        peft_llama_adapter.check_fit(stored.adapter_layers, structure, stored.source)
    _check_tables(stored.tables, method, structure, stored.source)


def _check_stacks(stored: StoredPrompt, structure: ModelStructure, *, directions_only: bool) -> None:
    """Compare the model's attention with the description of the base model in the file."""
    known = stored.stacks
    if directions_only:
        known = {name: {k: v for k, v in stack.items() if k == "causal"} for name, stack in known.items()}
    model = {
        name: {k: v for k, v in stack.items() if k in known.get(name, stack)}
        for name, stack in outline(structure).items()
    }
    if model != known:
        raise PromptMismatchError(
            "this model's attention differs from that of the prompt's base model.",
            _PEFT_POOLS if directions_only and stored.base.task == "SEQ_CLS" else _REMEDY,
            prompt=f"{on_one_line(known)} ({stored.source})",
            model=on_one_line(model),
        )


def _check_tables(tables: dict[str, Tensor], method: Method, structure: ModelStructure, source: str) -> None:
    """Compare the shapes of the prompt's tensors with those of a new prompt on this model."""
    expected = method.shapes(structure)
    for group in sorted(set(expected) | set(tables)):
        table = tables.get(group)
        if table is None or tuple(table.shape) != expected.get(group):
            shape = "absent" if table is None else str(list(table.shape))
            raise PromptMismatchError(
                "the shapes of the prompt's tensors do not fit this model.",
                _REMEDY,
                prompt=f"{group} {shape} ({source})",
                model=f"{group} {list(expected[group])}" if group in expected else f"no {group} ({sorted(expected)})",
            )
