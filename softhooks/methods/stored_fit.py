"""Whether a saved prompt fits a model: its stacks, their direction, the shape of their attention, the prompt's own shape."""

from __future__ import annotations

from torch import Tensor

from softhooks.backbone.added_vocabulary import require_rows
from softhooks.backbone.stack import ModelStructure
from softhooks.errors import PromptMismatchError
from softhooks.formats import peft_llama_adapter
from softhooks.formats.stack_outline import in_words, outline
from softhooks.formats.stored import StoredPrompt
from softhooks.method import Method

_REMEDY = "Load it onto the base model that it was trained with."
_PEFT_POOLS = (
    "In an encoder PEFT classifies the prompt's first virtual token, softhooks the text's own. Train the prompt with "
    "softhooks."
)


def check_fit(stored: StoredPrompt, method: Method, structure: ModelStructure, *, strict: bool = True) -> None:
    """Compare the model that a saved prompt was made for with one that it shall enter.

    Args:
        strict: compare the sizes of the vocabularies too.

    Raises:
        PromptMismatchError: they differ in what the prompt depends on.
    """
    enters_rows = method.enters == "embeddings"
    _check_stacks(stored, structure, directions_only=enters_rows)
    if strict:
        require_rows(stored.base.vocabulary, structure, stored.source)
    if stored.base.task is not None and enters_rows and structure.entry.reads_ids:
        raise PromptMismatchError(
            "PEFT hands a model embeddings without ids, and this model's states depend on ids too.",
            "Train the prompt with softhooks.",
            prompt=stored.source,
            model=type(structure.entry.module).__name__,
        )
    if stored.adapter_layers:
        peft_llama_adapter.check_fit(stored.adapter_layers, structure, stored.source)
    _check_tables(stored.tables, method, structure, stored.source)


def _check_stacks(stored: StoredPrompt, structure: ModelStructure, *, directions_only: bool) -> None:
    """Compare what is known of the base's stacks; embedding rows depend on no shape of attention."""
    model, known = outline(structure), stored.stacks
    if directions_only:
        known = {name: {k: v for k, v in stack.items() if k == "causal"} for name, stack in known.items()}
    same = set(known) == set(model) and all(
        model[name].get(key) == value for name, stack in known.items() for key, value in stack.items()
    )
    if not same:
        compared = {
            name: {k: v for k, v in stack.items() if k in known.get(name, stack)} for name, stack in model.items()
        }
        raise PromptMismatchError(
            "a prompt must enter a model of the kind that it was trained with.",
            _PEFT_POOLS if directions_only and stored.base.task == "SEQ_CLS" else _REMEDY,
            prompt=f"{in_words(known)} ({stored.source})",
            model=in_words(compared),
        )


def _check_tables(tables: dict[str, Tensor], method: Method, structure: ModelStructure, source: str) -> None:
    """Compare the shapes of a folded prompt with those that the method has on the model."""
    expected = method.shapes(structure)
    for group in sorted(set(expected) | set(tables)):
        table = tables.get(group)
        if table is None or tuple(table.shape) != expected.get(group):
            shape = "absent" if table is None else str(list(table.shape))
            raise PromptMismatchError(
                "a prompt must be as wide as the model that it enters.",
                _REMEDY,
                prompt=f"{group} {shape} ({source})",
                model=f"{group} {list(expected[group])}" if group in expected else f"no {group} ({sorted(expected)})",
            )
