"""Checks that must hold for every prompt on every model, each returning a number that is 0, or not 0, if it holds.

All checks call the model as a script does; none looks inside the library. Gaps are relative to the size of what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import softhooks
from softhooks import SoftPrompt

ROWS, COLUMNS, PADDING, VIRTUAL = 2, 20, 5, 4
"""More columns than the windows and chunks of the tiny models, so that some tokens lie outside."""

ROUNDING = 2e-4
"""The relative tolerance of two ways of computing the same value."""


@dataclass(frozen=True)
class Text:
    """A batch of ordinary ids, [B, T], and the other inputs of the model's forward."""

    ids: Tensor
    extra: dict[str, Any]

    def call(self, ids: Tensor | None = None, mask: Tensor | None = None) -> dict[str, Any]:
        """The arguments of a forward; the mask is all ones where none is given."""
        ids = self.ids if ids is None else ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask, **self.extra}

    def padded(self, side: str, pad: int) -> tuple[dict[str, Any], slice]:
        """The same batch with padding on one side, described by the mask only; and where the text stands in it."""
        blank = torch.full_like(self.ids[:, :PADDING], pad)
        ones = torch.ones_like(self.ids)
        parts = [(blank, blank * 0), (self.ids, ones)]
        parts = parts if side == "left" else parts[::-1]
        ids, mask = (torch.cat([part[i] for part in parts], dim=1) for i in (0, 1))
        where = slice(PADDING, None) if side == "left" else slice(0, self.ids.shape[1])
        call = self.call(ids, mask)
        if "token_type_ids" in call:
            width = (PADDING, 0) if side == "left" else (0, PADDING)
            call["token_type_ids"] = torch.nn.functional.pad(call["token_type_ids"], width)
        return call, where


def text_for(model: Any, task: str, brings: Sequence[str] = (), seed: int = 0) -> Text:
    """Random words for a model, without its special ids.

    Args:
        model: the model.
        task: the task of its head.
        brings: what else each forward brings: `token_type_ids`, `encoder_hidden_states`.
        seed: of the words.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 90, (ROWS, COLUMNS), generator=generator)
    extra: dict[str, Any] = {}
    if hasattr(model.config, "question_token_id"):  # Splinter's head looks for it
        ids[:, 3] = model.config.question_token_id
    if task == "seq2seq":
        extra["decoder_input_ids"] = torch.randint(10, 90, (ROWS, 6), generator=generator)
    elif task == "sequence" and getattr(model.config, "is_encoder_decoder", False):
        ids[:, -1] = model.config.eos_token_id
    if "token_type_ids" in brings:
        extra["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator)
    if "encoder_hidden_states" in brings:
        width = model.get_input_embeddings().weight.shape[1]
        extra["encoder_hidden_states"] = torch.randn(ROWS, 7, width, generator=generator)
    return Text(ids, extra)


def answer(model: Any, call: dict[str, Any]) -> Tensor:
    """The logits of a call, or the last states of a model without a head."""
    with torch.no_grad():
        output = model(**call)
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], -1).float()
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).float()


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number expected."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def loud(prompt: SoftPrompt, seed: int = 1) -> None:
    """Draw every value of a prompt anew, gates that start at zero too, so that all of it matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


# --- one number a check -----------------------------------------------------------------------------------------------


def effect(model: Any, text: Text) -> float:
    """How far the prompt moves the output; must not be 0."""
    found = answer(model, text.call())
    with softhooks.disabled(model):
        return gap(found, answer(model, text.call()))


def dead(model: Any, prompt: SoftPrompt, text: Text, unread: int = 0) -> list[str]:
    """Name the columns of the prompt's parameters that get no gradient, and the base's parameters that do.

    A column of a prefix belongs to one number of one layer's keys or values: a layer that the prefix does not reach shows.

    Args:
        unread: the number of columns on which the output does not depend.
    """
    model.zero_grad()
    output = model(**text.call())
    target = output.start_logits if hasattr(output, "start_logits") else getattr(output, "logits", output[0])
    target.float().pow(2).sum().backward()
    found = []
    for name, parameter in prompt.encoder.named_parameters():
        columns = 0 if parameter.grad is None else int(parameter.grad.flatten(0, -2).any(0).sum())
        if columns < parameter.shape[-1] - unread:
            found.append(f"{name}: {columns} of {parameter.shape[-1]} columns have a gradient")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not name.startswith("soft_prompt."):
            found.append(f"{name} of the base has one")
    model.zero_grad()
    return found


def padding(model: Any, text: Text, side: str, pad: int) -> float:
    """How far padding, described by the mask only, moves the output at the text."""
    call, where = text.padded(side, pad)
    found, expected = answer(model, call), answer(model, text.call())
    per_token = expected.dim() == 3 and "decoder_input_ids" not in text.extra
    return gap(found[:, where] if per_token else found, expected)


def reach(model: Any, text: Text) -> tuple[float, float]:
    """How far the last word moves what stands before it, and the last but two words' own output. -> (earlier, own)"""
    other = text.ids.clone()
    other[:, -1] = torch.where(other[:, -1] == 50, 51, 50)
    found, expected = answer(model, text.call(other)), answer(model, text.call())
    size = expected.abs().max().clamp(min=1e-6)
    moved = (found - expected).abs().amax((0, 2)) / size
    return float(moved[:-1].max()), float(moved[-1])


def by_hand(model: Any, prompt: SoftPrompt, text: Text) -> float:
    """The gap to the prompt's rows written before the text's embeddings, in the bare model."""
    found = answer(model, text.call())
    with softhooks.disabled(model), torch.no_grad():
        rows = prompt.embeddings().detach()
        embedded = model.get_input_embeddings()(text.ids)
        whole = torch.cat([rows.to(embedded).expand(ROWS, -1, -1), embedded], dim=1)
        extra = {
            name: torch.nn.functional.pad(value, (VIRTUAL, 0)) if name == "token_type_ids" else value
            for name, value in text.extra.items()
        }
        mask = torch.ones(whole.shape[:2], dtype=torch.long)
        expected = answer(model, {"inputs_embeds": whole, "attention_mask": mask, **extra})
    return gap(found, expected[:, rows.shape[0] :] if "decoder_input_ids" not in text.extra else expected)


def cached(model: Any, text: Text) -> float:
    """The gap between decoding token by token and the whole text at once."""
    whole = answer(model, text.call())
    with torch.no_grad():
        columns = text.ids.shape[1]
        half = columns // 2
        ones = torch.ones_like(text.ids)
        first = model(input_ids=text.ids[:, :half], attention_mask=ones[:, :half], use_cache=True)
        parts, cache = [first.logits], first.past_key_values
        for column in range(half, columns):
            step = model(
                input_ids=text.ids[:, column : column + 1],
                attention_mask=ones[:, : column + 1],
                past_key_values=cache,
                use_cache=True,
            )
            parts.append(step.logits)
            cache = step.past_key_values
    return gap(torch.cat(parts, dim=1).float(), whole)
