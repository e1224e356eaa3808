"""Embed text together with a soft prompt, as one sequence, for servers that do not support soft prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from softhooks.errors import OptionError, PromptTooLongError, UnsupportedMethodError, UnsupportedModelError
from softhooks.prompt import SoftPrompt
from softhooks.prompt_encoder import EMBEDDINGS
from softhooks.runtime.servable import required_columns
from softhooks.serving.active_prompt import active_prompt
from softhooks.serving.servers import ServerName, for_server
from softhooks.switch import disabled


@torch.no_grad()
def sequence_embeddings(
    model: nn.Module, text: str | list[int] | Tensor, tokenizer: Any = None, *, server: ServerName | None = None
) -> Tensor:
    """Return the input embeddings of the text and of the active prompt's virtual tokens, as one sequence.

    Args:
        model: a causal decoder with the prompt.
        text: a string, or token ids.
        tokenizer: the model's tokenizer, required if `text` is a string.
        server: "vllm" or "sglang", or None for embeddings that the model itself takes as `inputs_embeds`.

    Shape:
        -> [P + T, H]: P virtual tokens, T tokens of the text and embedding size H, in the dtype of the model's embeddings.

    Raises:
        NotAttachedError: the model has no prompt.
        UnsupportedMethodError: the prompt does not consist of input embeddings alone.
        UnsupportedModelError: the model does not run on embeddings alone, or it is unknown how the server scales embeddings.
        OptionError: the text is empty or needs a tokenizer, or there is not exactly one active prompt.
        PromptTooLongError: the prompt and the text together have more tokens than the model has positions.
    """
    prompt = _require_rows(model)
    stack = prompt.prompted_model.structure.entry
    ids = _ids(text, tokenizer).to(stack.embedding.weight.device)  # type: ignore[arg-type]
    places = prompt.layout.places(torch.ones_like(ids), ids, None, range(1))
    length = ids.shape[1] + int(places.live.sum())
    limit = stack.positions.limit
    if limit is not None and length > limit:
        raise PromptTooLongError(
            f"the prompt and the text together have {length} tokens, but the model has only {limit} positions.",
            "Truncate the text.",
        )
    with disabled(model):
        words = stack.embedding(ids)[0]
    slots = prompt.encoder.folded()[EMBEDDINGS][prompt.layout.form.table_rows].to(words)
    rows: list[Tensor] = []
    for column in range(ids.shape[1] + 1):
        here = places.live[0] & (places.offsets[0] == column)  # the slots before this column
        rows += [slots[here.to(slots.device)], words[column : column + 1]]
    sequence = torch.cat(rows)
    if server is None:
        return sequence
    with disabled(model):
        return for_server(model, stack, sequence, server)


def _require_rows(model: nn.Module) -> SoftPrompt:
    """Return the active prompt, and refuse a prompt that does not consist of input embeddings for a decoder."""
    prompt = active_prompt(model)
    structure = prompt.structure
    if structure.entry.reads_ids:
        raise UnsupportedModelError(
            "the model needs token ids in addition to embeddings, but a server passes only embeddings.",
            "Serve this model with `softhooks.integrations.transformers_serve`.",
            model=type(model).__name__,
        )
    missing = required_columns(prompt)
    causal = structure.entry.causal and not structure.is_encoder_decoder
    if prompt.method.enters != "embeddings" or missing or len(prompt.heads) or prompt.added or not causal:
        raise UnsupportedMethodError(
            f"a request cannot contain this prompt ({prompt.method.kind}); it can contain only input embeddings for a decoder.",
            "Export prefixes for vLLM without a text. Serve adapters and heads with `softhooks.integrations.transformers_serve`; "
            "use a multitask prompt with only one task.",
            enters="as input embeddings" if prompt.method.enters == "embeddings" else f"at {prompt.method.enters}",
            heads=", ".join(prompt.heads) or "none",
            needs=missing or ("embeddings of added tokens" if prompt.added else "nothing more"),
            model=f"{type(model).__name__}, {'a decoder' if causal else 'not a decoder-only model'}",
        )
    return prompt


def _ids(text: str | list[int] | Tensor, tokenizer: Any) -> Tensor:
    if isinstance(text, str):
        if tokenizer is None:
            raise OptionError(
                "the text is a string, but no tokenizer was passed; pass `tokenizer=`, or the token ids of the text."
            )
        text = tokenizer(text)["input_ids"]
    ids = torch.as_tensor(text, dtype=torch.long).reshape(1, -1)
    if not ids.shape[1]:
        raise OptionError("the text is empty; a server needs at least one token of text after the prompt.")
    return ids
