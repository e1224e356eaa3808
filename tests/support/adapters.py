"""A naive LLaMA-Adapter, without softhooks: each layer's projections called by name, each row on its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional

import softhooks
from softhooks import LlamaAdapter, SoftPrompt

CASES = [
    zoo.Case("llama", "causal"), zoo.Case("gpt2", "causal"), zoo.Case("gemma3", "causal"), zoo.Case("bert", "masked"),
    zoo.Case("t5", "seq2seq"), zoo.Case("bart", "seq2seq"),
]  # fmt: skip

Branch = tuple[Tensor, Tensor, Tensor]
"""Keys [B or 1, Hq, K, D], values [B or 1, Hq, K, D] and gates [Hq] of one layer."""


def attentions(model: Any) -> dict[str, list[nn.Module]]:
    """The self-attention modules of each stack, found by their names."""
    found: dict[str, list[nn.Module]] = {"text": [], "encoder": [], "decoder": []}
    for name, module in model.named_modules():
        if name.endswith((".self_attn", ".attn", ".attention.self", ".SelfAttention")):
            found["decoder" if "decoder" in name else "encoder" if model.config.is_encoder_decoder else "text"].append(
                module
            )
    if not model.config.is_encoder_decoder:
        found = {"text": found["text"] + found["decoder"]}
    return {stack: modules for stack, modules in found.items() if modules}


def project(attention: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of rows by a layer's own weights. [K, H] -> [Hk, K, D] each."""
    if hasattr(attention, "c_attn"):
        _, key, value = attention.c_attn(rows).split(rows.shape[-1], dim=-1)
    else:
        names = next(
            pair for pair in (("k_proj", "v_proj"), ("key", "value"), ("k", "v")) if hasattr(attention, pair[0])
        )
        key, value = (getattr(attention, name)(rows) for name in names)
    key, value = (part.view(rows.shape[0], -1, 8).transpose(0, 1) for part in (key, value))  # every D of the zoo is 8
    return attention.k_norm(key) if hasattr(attention, "k_norm") else key, value


def branches(
    model: Any, tables: dict[str, Tensor], method: LlamaAdapter, context: Tensor | None = None
) -> list[Branch | None]:
    """The branch of each call of the attention function, in the order of the calls.

    Args:
        tables: the prompt's parameters.
        context: [B, H] or [B, K, H], as wide as the model.
    """
    found: list[Branch | None] = []
    for stack, modules in attentions(model).items():
        prompted = len(modules) - method.early_fusion if method.num_layers is None else method.num_layers
        prompts = tables[f"{stack}_prompts"].view(prompted, method.num_virtual_tokens, -1)
        gates = tables[f"{stack}_gates"].view(-1, 4)  # every model of the zoo has 4 heads
        gates = gates.tanh() if method.gate == "tanh" else gates
        for number, attention in enumerate(modules):
            own = number - (len(modules) - prompted)
            rows = None if own < 0 else prompts[own][None]
            if context is not None:
                vectors = context[:, None] if context.dim() == 2 else context
                if number < method.early_fusion:
                    rows = vectors
                elif rows is not None and not method.early_fusion:
                    rows = torch.stack([rows[0] + vector for vector in vectors])
            branch = None
            if rows is not None:
                pairs = [project(attention, row) for row in rows]
                wide = [
                    torch.stack([pair[i].repeat_interleave(4 // pair[i].shape[0], 0) for pair in pairs]) for i in (0, 1)
                ]
                gate = gates[number if number < method.early_fusion else method.early_fusion + own]
                branch = (wide[0], wide[1], gate)
            found.append(branch)
            if stack == "decoder":
                found.append(None)  # cross-attention follows
    return found


@contextmanager
def patched(found: Sequence[Branch | None]) -> Iterator[None]:
    """Let the n-th call of torch's attention add the n-th branch to its output, row by row and head by head."""
    pending = list(found)
    original = functional.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, scale: float | None = None, **kwargs: Any
    ) -> Tensor:
        output = original(query, key, value, *args, scale=scale, **kwargs)
        branch = pending.pop(0)
        if branch is None:
            return output
        keys, values, gates = branch
        wide = [part.expand(len(query), -1, -1, -1) for part in (keys, values)]
        added = [
            [gate * (q @ k.T * scale).softmax(-1) @ v for q, k, v, gate in zip(*row, gates, strict=True)]
            for row in zip(query, *wide, strict=True)
        ]
        return output + torch.stack([torch.stack(heads) for heads in added])

    with mock.patch.object(functional, "scaled_dot_product_attention", attend):
        yield
    assert not pending, "the model called attention less often than it has branches"


def naive(model: Any, prompt: SoftPrompt, context: Tensor | None = None, **call: Any) -> Tensor:
    """The logits of the bare model with the branches of a prompt added by hand."""
    method = prompt.method
    assert isinstance(method, LlamaAdapter)
    with softhooks.disabled(model), patched(branches(model, dict(prompt.encoder.named_parameters()), method, context)):
        logits: Tensor = model(**call).logits
        return logits


@torch.no_grad()
def stir(prompt: SoftPrompt, scale: float = 0.5) -> SoftPrompt:
    """Set the gates, and everything else that is initialized to zero, to other values."""
    for name, parameter in prompt.encoder.named_parameters():
        if not name.endswith("prompts"):
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return prompt


def prompted(case: zoo.Case, **options: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    """A frozen model with an adapter of three rows per layer and nonzero gates, and a call of three rows of text."""
    model = zoo.build(case.arch, case.head).requires_grad_(False)
    return model, stir(softhooks.attach(model, LlamaAdapter(3, **options))), zoo.inputs(case, zoo.text(3, 7))
