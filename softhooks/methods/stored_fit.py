"""Check that a saved prompt fits a model: its stacks, their direction and attention, and the shapes of the prompt's tables."""

from __future__ import annotations

from torch import Tensor

from softhooks.backbone.added_vocabulary import require_vocabulary
from softhooks.backbone.stack import ModelStructure
from softhooks.errors import PromptMismatchError
from softhooks.formats import peft_llama_adapter
from softhooks.formats.stack_shapes import on_one_line, outline
from softhooks.formats.stored import StoredPrompt
from softhooks.method import Method

_REMEDY = "Load it onto the base model that it was trained with."
_PEFT_POOLS = (
    "In an encoder PEFT classifies the prompt's first virtual token, softhooks the text's first. Train the prompt with "
    "softhooks."
)


def check_fit(stored: StoredPrompt, method: Method, structure: ModelStructure, *, strict: bool = True) -> None:
    """Check that a model meets the requirements of a saved prompt.

    Args:
        strict: compare the sizes of the vocabularies too.
    """
    enters_rows = method.enters == "embeddings"
    _check_stacks(stored, structure, directions_only=enters_rows)
    if strict:
        require_vocabulary(stored.base.vocabulary, structure, stored.source)
    if stored.base.task is not None and enters_rows and structure.entry.reads_ids:
        raise PromptMismatchError(
            "the states of this model depend on token ids, which PEFT does not pass with a prompt's embeddings.",
            "Train the prompt with softhooks.",
            prompt=stored.source,
            model=type(structure.entry.module).__name__,
        )
    if stored.adapter_layers:
        peft_llama_adapter.check_fit(stored.adapter_layers, structure, stored.source)
    _check_tables(stored.tables, method, structure, stored.source)


def _check_stacks(stored: StoredPrompt, structure: ModelStructure, *, directions_only: bool) -> None:
    """Compare the model's stacks with the saved facts about the base model; embedding rows only depend on directions."""
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
            "the stacks of this model differ from those that the prompt was trained with.",
            _PEFT_POOLS if directions_only and stored.base.task == "SEQ_CLS" else _REMEDY,
            prompt=f"{on_one_line(known)} ({stored.source})",
            model=on_one_line(compared),
        )


def _check_tables(tables: dict[str, Tensor], method: Method, structure: ModelStructure, source: str) -> None:
    """Compare the shapes of the tables with the method's shapes on the model."""
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
