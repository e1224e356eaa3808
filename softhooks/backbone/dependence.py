"""Measure whether hidden states depend on later tokens, and whether they depend on token ids or only on embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.probe_inputs import ordinary_ids, probe_ids
from softhooks.backbone.probing import eval_mode, probing, recorded_states, relative_difference
from softhooks.backbone.stack import ModelStructure
from softhooks.backbone.stack_state import StackState
from softhooks.patching.patches import Patches

_COLUMNS = 5


def reads_ids(model: nn.Module, structure: ModelStructure) -> bool:
    """Whether a model's states depend on token ids and not only on embeddings, as in Gemma 3n; measured once per model."""
    stack = structure.entry
    if stack.reads_ids is None:
        stack.reads_ids = _states_differ(model, structure)
    return stack.reads_ids


def _states_differ(model: nn.Module, structure: ModelStructure) -> bool:
    """Whether two inputs with different ids but the same embeddings produce different states."""
    stack, vocabulary = structure.entry, structure.vocabulary
    ordinary = ordinary_ids(model, stack, vocabulary)
    if len(ordinary) < 2:
        return True  # no second text to compare with
    end = probe_ids(model, vocabulary, 1)  # some heads look for this id
    shifts = (0, max(1, min(_COLUMNS, len(ordinary) // 2)))
    texts = [
        torch.cat([torch.tensor([[ordinary[(k + shift) % len(ordinary)] for k in range(_COLUMNS)]]).to(end), end], 1)
        for shift in shifts
    ]

    def run(ids: Tensor) -> None:
        decoder = texts[0].roll(1, dims=-1).expand(len(ids), -1)
        model(**structure.example.arguments(ids, torch.ones_like(ids), decoder))

    def differ(*forwards: Tensor) -> bool:
        first_embeddings: list[Tensor] = []  # of the first text, one per call to the embedding
        states: list[Tensor] = []
        dtype = torch.float32

        def replace(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            nonlocal dtype
            dtype = output.dtype
            if len(forwards) == 1:  # the texts are rows of one forward
                half = output.shape[0] // 2
                return torch.cat([output[:half]] * 2) if output.shape[0] == 2 * half else None
            if not states:
                first_embeddings.append(output)
                return None
            return first_embeddings.pop(0) if first_embeddings else None

        with Patches() as patches, recorded_states(stack.module) as recorded:
            patches.keep(stack.embedding.register_forward_hook(replace))
            for ids in forwards:
                run(ids)
                states.append(recorded[-1])
        first, second = torch.cat(states).chunk(2)
        return relative_difference(second, first) > 16 * torch.finfo(dtype).eps

    with eval_mode(model), probing(model):
        # Try both texts as two rows of one forward first. Some models take only one row; in some, rows influence each other.
        with suppress(Exception):
            if not differ(torch.cat(texts)):
                return False
        return differ(*texts)


def change_before(
    module: nn.Module, column: int, forwards: Sequence[Callable[[], object]], state: StackState | None = None
) -> float:
    """Return the largest difference between the states of two inputs before token `column`, relative to the largest value.

    Args:
        module: the module that returns the states.
        column: the index of the first token at which the inputs differ.
        forwards: two functions that each run the model on one input, or one that runs it on both as two rows of a batch.
        state: as in `recorded_states`.
    """
    rows: list[Tensor] = []
    with recorded_states(module, state) as states:
        for forward in forwards:
            forward()
            rows.append(states[-1][:, :column])
    first, second = torch.cat(rows).chunk(2)
    return relative_difference(second, first)


def is_rounding(change: float, dtype: torch.dtype) -> bool:
    """Whether a relative change is small enough to come from summing floating-point numbers in a different order."""
    return change <= max(1e-5, 8 * torch.finfo(dtype).eps)
