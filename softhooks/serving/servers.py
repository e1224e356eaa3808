"""Convert input embeddings to those that inference servers expect, for models that multiply embeddings by a factor.

transformers applies the factor either inside the embedding module (Gemma), in which case `inputs_embeds` must include it, or
after this module (Granite), in which case `inputs_embeds` must not. A server that applies the factor elsewhere needs different
embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softhooks.backbone.probe_inputs import text_config
from softhooks.backbone.probing import eval_mode
from softhooks.backbone.stack import Stack
from softhooks.errors import OptionError, UnsupportedModelError

ServerName = Literal["vllm", "sglang"]


@dataclass(frozen=True)
class Server:
    """How a server treats embeddings of models that scale them.

    Attributes:
        label: the name of the server and the version that was tested.
        multiplies: model types whose embedding module applies a factor that the server also applies to embeddings in a request.
        keeps: model types that apply a factor, but for which the server expects the same embeddings as transformers.
    """

    label: str
    multiplies: tuple[str, ...]
    keeps: tuple[str, ...]


SERVERS: dict[str, Server] = {
    # Measured with Gemma, Gemma 2, Gemma 3 and Granite: vLLM scales only the embeddings that it looks up for ids.
    "vllm": Server("vLLM 0.32.0", (), ("gemma", "gemma2", "gemma3", "gemma3_text", "granite")),
    # Measured with the same models: SGLang scales given embeddings too in Gemma and Gemma 2, but not in Gemma 3 and Granite.
    "sglang": Server("SGLang 0.5.23", ("gemma", "gemma2"), ("gemma3", "gemma3_text", "granite")),
}


def for_server(model: nn.Module, stack: Stack, rows: Tensor, name: str) -> Tensor:
    """Convert embeddings for the model's `inputs_embeds` to embeddings for a server, both [N, H]."""
    if name not in SERVERS:
        raise OptionError(f"server is {name!r}; it must be one of {', '.join(map(repr, SERVERS))}.")
    server, kind = SERVERS[name], str(getattr(getattr(model, "config", None), "model_type", ""))
    inside = factor_inside(stack)
    _require_known(model, stack, server, kind, inside)
    if kind not in server.multiplies or inside in (1.0, None):
        return rows
    return (rows.float() / inside).to(rows)


def factor_inside(stack: Stack) -> float | None:
    """Measure the factor by which the embedding module multiplies its weights; return None if it does more than that."""
    weight: Any = stack.embedding.weight
    ids = torch.arange(min(4, weight.shape[0]), device=weight.device)
    with eval_mode(stack.embedding):
        rows, words = stack.embedding(ids[None])[0].float(), weight[ids].detach().float()
    if rows.shape != words.shape:
        return None
    factor = _ratio(rows, words, torch.finfo(weight.dtype).eps)
    declared = getattr(stack.embedding, "embed_scale", None)
    if factor is not None and declared is not None and abs(float(declared) / factor - 1) < 0.01:
        return float(declared)  # exact, while the measured factor is rounded
    return factor


def factor_after(model: nn.Module, stack: Stack) -> float | None:
    """Measure the factor by which the stack multiplies embeddings before its layers; return None if it does more than that."""
    layers = [part for part in stack.module.modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not layers:
        return None
    seen: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [
            value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()
        ]
        seen.extend(given[:1])

    weight: Any = stack.embedding.weight
    ids = torch.arange(min(8, weight.shape[0]), device=weight.device)[None]
    with eval_mode(model):
        rows = stack.embedding(ids)
        handle = layers[0][0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            for given in (rows, 2 * rows):  # added position embeddings cancel in the difference
                model(inputs_embeds=given, use_cache=False)
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run on embeddings alone, which a server requires.",
                "Serve this model with `softhooks.integrations.transformers_serve`.",
                error=f"{type(error).__name__}: {error}",
            ) from error
        finally:
            handle.remove()
    if len(seen) != 2 or seen[0].shape != rows.shape:
        return None
    factor = _ratio(seen[1].float() - seen[0].float(), rows.float(), 2 * torch.finfo(rows.dtype).eps)
    return factor if factor != 0.0 else None  # 0: a norm removes the factor


def _ratio(rows: Tensor, words: Tensor, precision: float) -> float | None:
    """Return the constant factor between two tensors, or None if there is none."""
    factor = float((rows * words).sum() / (words * words).sum().clamp(min=1e-30))
    if abs(factor) < 4 * precision:
        return 0.0
    scale = float(rows.abs().max())
    if not torch.allclose(rows, words * factor, rtol=4 * precision, atol=4 * precision * scale):
        return None
    return 1.0 if abs(factor - 1) < 4 * precision else factor


def _require_known(model: nn.Module, stack: Stack, server: Server, kind: str, inside: float | None) -> None:
    """Refuse models whose embeddings the server may scale differently from transformers."""
    width = getattr(text_config(getattr(model, "config", None)), "hidden_size", stack.width)
    remedy = "Serve this model with `softhooks.integrations.transformers_serve`."
    if width != stack.width:
        raise UnsupportedModelError(
            f"the embeddings have width {stack.width}, but the hidden states have width {width}; no supported server allows "
            "this.",
            remedy,
        )
    factors: dict[str, object] = {}
    if inside != 1.0:
        factors["inside the embedding"] = "more than a factor" if inside is None else inside
    after = factor_after(model, stack)
    if after not in (1.0, None):
        factors["after the embedding"] = round(after or 0.0, 4)
    known = (*server.multiplies, *server.keeps)
    if factors and kind not in known:
        raise UnsupportedModelError(
            f"it is unknown how {server.label} scales the embeddings of the model type {kind!r}.",
            remedy,
            factors=factors,
            known=", ".join(known),
        )
