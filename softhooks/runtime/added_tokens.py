"""Trainable copies of added tokens' embeddings. The model's own embeddings do not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from softhooks.backbone.added_vocabulary import original_vocabulary
from softhooks.backbone.stack import ModelStructure
from softhooks.compat.offload import device_of
from softhooks.compat.peft import unwrapped
from softhooks.errors import OptionError, PromptMismatchError, UnsupportedModelError

ADDED = "added"
"""The name of `AddedTokens` in a prompt's module."""


class AddedTokens(nn.Module):
    """A prompt's copies of the embeddings of N tokens, in fp32.

    Args:
        ids: the ids of the tokens.
        vocabulary: the number of rows of the model's embedding matrix.
        rows: the input embeddings, [N, E], and also the output embeddings if the two are tied.
        output_rows: the output embeddings, [N, H], or None if they are tied to the input embeddings.
        output_bias: the bias of the output embeddings, [N], or None if they have no bias.
    """

    ids: Tensor
    row_of: Tensor

    def __init__(
        self,
        ids: Sequence[int],
        vocabulary: int,
        rows: Tensor,
        output_rows: Tensor | None = None,
        output_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        row_of = torch.full((vocabulary,), -1)  # for each token id, its index in `rows`, or -1
        row_of[list(ids)] = torch.arange(len(ids))
        self.register_buffer("ids", torch.tensor(list(ids)), persistent=False)
        self.register_buffer("row_of", row_of, persistent=False)
        self.rows = nn.Parameter(rows.detach().float().clone())
        self.output_rows = None if output_rows is None else nn.Parameter(output_rows.detach().float().clone())
        self.output_bias = None if output_bias is None else nn.Parameter(output_bias.detach().float().clone())

    def look_up(self, embedding: nn.Module, ids: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the copied embeddings of `ids`, and a mask of the ids that have a copy."""
        index = self.row_of[ids]
        # The embedding's forward may scale the rows, so run it on a shallow copy whose weight is the prompt's rows.
        own: Any = object.__new__(type(embedding))
        table: Any = embedding.weight
        own.__dict__.update(embedding.__dict__)
        own.__dict__["_parameters"] = {"weight": self.rows.to(table.dtype)}
        own.__dict__["padding_idx"] = None
        found: Tensor = type(embedding).forward(own, index.clamp(min=0))
        return found.to(output.dtype), index >= 0

    def logits(self, hidden: Tensor, output: Tensor) -> Tensor:
        """Compute the logits of the added tokens, [..., N]."""
        rows = self.rows if self.output_rows is None else self.output_rows
        bias = None if self.output_bias is None else self.output_bias.to(hidden.dtype)
        return functional.linear(hidden, rows.to(hidden.dtype), bias).to(output.dtype)

    def tables(self) -> dict[str, Tensor]:
        """Return the copies, keyed by their names in a saved prompt."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


def chosen_ids(requested: Any, model: nn.Module, structure: ModelStructure) -> tuple[int, ...]:
    """Return the ids that `train_added_tokens` selects: the given ids, or the ids of tokens added to the model or a tokenizer.

    Raises:
        OptionError: an id is not in the vocabulary, or it is unknown which tokens were added.
    """
    if requested is False:
        return ()
    if requested is True:
        base = original_vocabulary(model, structure)
        if base is None:
            raise OptionError(
                f"train_added_tokens=True, but it is unknown which rows `resize_token_embeddings` added to "
                f"{type(unwrapped(model)).__name__}.",
                "Pass the ids: `train_added_tokens=tokenizer.convert_tokens_to_ids(new_tokens)`.",
            )
        return tuple(range(base, structure.vocabulary))
    if hasattr(requested, "get_added_vocab"):
        base = original_vocabulary(model, structure)
        # If it is unknown which rows were added to the model, select all tokens that were added to the tokenizer.
        first = requested.vocab_size if base is None else base
        requested = sorted(number for number in requested.get_added_vocab().values() if number >= first)
    try:
        ids = [requested] if isinstance(requested, int) else [number.__index__() for number in requested]
    except (TypeError, AttributeError) as error:
        raise OptionError(
            f"train_added_tokens is {requested!r}; pass True, False, token ids or a tokenizer."
        ) from error
    beyond = [number for number in ids if not 0 <= number < structure.vocabulary]
    if not ids or beyond:
        raise OptionError(
            f"train_added_tokens selects {f'the ids {beyond}' if beyond else 'no ids'}; the model's embedding matrix has "
            f"{structure.vocabulary} rows.",
            "Call `model.resize_token_embeddings(len(tokenizer))` first, or correct the ids.",
        )
    return tuple(sorted(set(ids)))


def copy_rows(ids: Sequence[int], model: nn.Module, structure: ModelStructure) -> AddedTokens:
    """Copy the embeddings of tokens, or refuse the model if hooks cannot replace them."""
    table, head = _input_of(model, structure), output_of(model)
    tables = {id(head), *(id(stack.embedding) for stack in structure.stacks)}
    for module in model.modules():
        is_adapter = hasattr(module, "base_layer") or hasattr(module, "original_module")
        if is_adapter and any(id(part) in tables for part in module.modules()):
            refuse_tables(model, f"its embeddings are in a PEFT adapter ({type(module).__name__})")
    index = torch.tensor(list(ids), device=table.device)
    rows, output_rows, output_bias = table.detach()[index], None, None
    if head is not None:
        weight: Any = getattr(head, "weight", None)
        bias: Any = getattr(head, "bias", None)
        if not _is_table(weight, structure.vocabulary) or (bias is not None and bias.shape != weight.shape[:1]):
            refuse_tables(
                model, f"its output embeddings ({type(head).__name__}) are not a matrix with one row for each token"
            )
        output_rows = None if weight is table else weight.detach()[index]
        output_bias = None if bias is None else bias.detach()[index]
    return AddedTokens(ids, structure.vocabulary, rows, output_rows, output_bias).to(
        device_of(structure.entry.embedding)
    )


def take_rows(own: AddedTokens, tables: dict[str, Tensor], source: str) -> None:
    """Replace a prompt's copies with saved tensors, whose names and shapes must match."""
    expected = {name: list(table.shape) for name, table in own.tables().items()}
    found = {name: list(table.shape) for name, table in tables.items()}
    if expected != found:
        raise PromptMismatchError(
            f"the embeddings of added tokens in {source} do not fit the model's embeddings.",
            "Load the base model that the prompt was trained with.",
            prompt=found,
            model=expected,
        )
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            parameter.copy_(tables[name])


def _input_of(model: nn.Module, structure: ModelStructure) -> Tensor:
    """Return the embedding matrix that all stacks share."""
    tables = [getattr(stack.embedding, "weight", None) for stack in structure.stacks]
    for stack, table in zip(structure.stacks, tables, strict=True):
        if not isinstance(stack.embedding, nn.Embedding) or not _is_table(table, structure.vocabulary):
            refuse_tables(model, f"its embedding ({type(stack.embedding).__name__}) is not a plain `nn.Embedding`")
        if stack.embedding.max_norm is not None:
            refuse_tables(model, "its embedding rescales rows in each forward (max_norm)")
    if any(table is not tables[0] for table in tables):
        refuse_tables(model, "its encoder and decoder have different embeddings")
    table = tables[0]
    assert isinstance(table, Tensor)
    return table


def output_of(model: nn.Module) -> nn.Module | None:
    """Return the output embeddings of a model, or None if it has none."""
    try:
        head = cast("Any", unwrapped(model)).get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def _is_table(weight: Any, rows: int) -> bool:
    is_whole = isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == rows and not weight.is_meta
    return is_whole and weight.is_floating_point() and weight.element_size() >= 2 and not hasattr(weight, "full_tensor")


def refuse_tables(model: nn.Module, reason: str) -> NoReturn:
    """Raise the error for a model whose added tokens cannot be trained."""
    raise UnsupportedModelError(
        f"the added tokens of {type(unwrapped(model)).__name__} cannot be trained: {reason}.",
        "Attach without `train_added_tokens`, and save the resized model next to the prompt.",
    )
