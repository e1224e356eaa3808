"""A text with its prompt as one sequence of embedding rows: what servers take that know nothing of prompts.

Rows are what the model's own embedding returns and what its `inputs_embeds` takes, the factor of a scaled embedding included. A
server that multiplies the rows it is given by that factor gets them without it; see `served`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from softhooks.encoder import EMBEDDINGS
from softhooks.errors import OptionError, PromptTooLongError, UnsupportedMethodError, UnsupportedModelError
from softhooks.prompt import SoftPrompt, soft_prompts_of
from softhooks.runtime.continuous_batching import required_columns
from softhooks.runtime.prompted_model import require_prompted_model
from softhooks.serving.servers import ServerName, for_server
from softhooks.switch import disabled


@torch.no_grad()
def sequence_embeddings(
    model: nn.Module, text: str | list[int] | Tensor, tokenizer: Any = None, *, server: ServerName | None = None
) -> Tensor:
    """Make the rows of a text with the prompt that is on.

    Args:
        model: a causal decoder that carries the prompt.
        text: a text, or its ids.
        tokenizer: the model's, for a text; it adds its special tokens.
        server: for `vllm` or `sglang`, rather than for the model's own `inputs_embeds`.

    Shape:
        -> [P + T, H], in the model's precision.

    Raises:
        NotAttachedError: the model carries no prompt.
        UnsupportedMethodError: the prompt is more than embedding rows.
        UnsupportedModelError: the model does not take rows, or it is not known what the server does with them.
        OptionError: there is no text, or no tokenizer for it.
        PromptTooLongError: prompt and text together exceed the model's positions.
    """
    prompt = _require_rows(model)
    stack = prompt.prompted_model.structure.entry
    ids = _ids(text, tokenizer).to(stack.embedding.weight.device)  # type: ignore[arg-type]
    places = prompt.layout.places(torch.ones_like(ids), ids, None, range(1))
    length = ids.shape[1] + int(places.live.sum())
    limit = stack.positions.limit
    if limit is not None and length > limit:
        raise PromptTooLongError(
            "prompt and text together must fit into the model's positions.",
            "Truncate the text.",
            prompt_and_text=length,
            positions=limit,
        )
    with disabled(model):
        words = stack.embedding(ids)[0]
    slots = prompt.encoder.folded()[EMBEDDINGS][prompt.layout.table_rows].to(words)
    rows: list[Tensor] = []
    for column in range(ids.shape[1] + 1):
        here = places.live[0] & (places.offsets[0] == column)
        rows += [slots[here.to(slots.device)], words[column : column + 1]]
    sequence = torch.cat(rows)
    if server is None:
        return sequence
    with disabled(model):
        return for_server(model, stack, sequence, server)


def _require_rows(model: nn.Module) -> SoftPrompt:
    """The prompt that is on, if it is embedding rows and nothing else."""
    prompted = require_prompted_model(model)
    names = [prompted.active] if prompted.rows is None else list(prompted.rows)
    if prompted.rows is not None or prompted.active is None or prompted.disabled:
        raise OptionError(
            f"one prompt must be on, for one text; on are {names!r}{', disabled' if prompted.disabled else ''}."
        )
    prompt = soft_prompts_of(prompted)[prompted.active]
    if prompted.structure.entry.reads_ids:
        raise UnsupportedModelError(
            "a sequence of embedding rows must be all that a model looks at; this one looks at the ids behind them too.",
            "Serve this model with `softhooks.integrations.transformers_serve`.",
            model=type(model).__name__,
        )
    missing = required_columns(prompt)
    causal = prompted.structure.entry.causal and not prompted.structure.is_encoder_decoder
    if prompt.method.enters != "embeddings" or missing or len(prompt.heads) or prompt.added or not causal:
        raise UnsupportedMethodError(
            "a server takes embedding rows for a decoder, and nothing else of a prompt.",
            "Serve prefixes, adapters and heads with `softhooks.integrations.transformers_serve`; of a multitask prompt, "
            "one task.",
            method=prompt.method.kind,
            enters="as embedding rows" if prompt.method.enters == "embeddings" else f"at {prompt.method.enters}",
            heads=", ".join(prompt.heads) or "none",
            needs=missing or ("rows of added tokens" if prompt.added else "nothing more"),
            model=f"{type(model).__name__}, {'a decoder' if causal else 'no decoder alone'}",
        )
    return prompt


def _ids(text: str | list[int] | Tensor, tokenizer: Any) -> Tensor:
    if isinstance(text, str):
        if tokenizer is None:
            raise OptionError("a text needs the model's tokenizer; pass `tokenizer=`, or the text's ids.")
        text = tokenizer(text)["input_ids"]
    ids = torch.as_tensor(text, dtype=torch.long).reshape(1, -1)
    if not ids.shape[1]:
        raise OptionError("a server needs at least one token of text behind the prompt; there is none.")
    return ids
