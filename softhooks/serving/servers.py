"""The scaling of given embeddings by inference servers, and the models for which it is known.

Some models multiply their embeddings by a factor. transformers applies it inside the embedding module (Gemma), so `inputs_embeds`
must include the factor, or after it (Granite), so they must not. A server that applies it elsewhere needs other embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softhooks.backbone.probing import eval_mode
from softhooks.backbone.stack import Stack
from softhooks.errors import OptionError, UnsupportedModelError

ServerName = Literal["vllm", "sglang"]


@dataclass(frozen=True)
class Server:
    """The behavior of a server for models that scale their embeddings.

    Attributes:
        label: the name and the examined version of the server.
        multiplies: the model types that scale inside the embedding module, for which the server also scales given embeddings.
        keeps: the other examined model types with a factor, for which the server takes the same embeddings as transformers.
    """

    label: str
    multiplies: tuple[str, ...]
    keeps: tuple[str, ...]

    @property
    def known(self) -> tuple[str, ...]:
        """The model types that scale their embeddings and for which the server's behavior is known."""
        return (*self.multiplies, *self.keeps)


SERVERS: dict[str, Server] = {
    # Measured with Gemma, Gemma 2, Gemma 3 and Granite: vLLM scales the embeddings of ids only.
    "vllm": Server("vLLM 0.32.0", (), ("gemma", "gemma2", "gemma3", "gemma3_text", "granite")),
    # From its source: Gemma and Gemma 2 scale ids' and given embeddings alike; Gemma 3 has a scaled embedding module.
    "sglang": Server("SGLang 0.5.23", ("gemma", "gemma2"), ("gemma3", "gemma3_text", "granite")),
}


def for_server(model: nn.Module, stack: Stack, rows: Tensor, name: str) -> Tensor:
    """Convert embeddings for the model's `inputs_embeds` to those that a server takes. [N, H] -> [N, H].

    Raises:
        OptionError: the server is not known.
        UnsupportedModelError: the server's handling of this model's embeddings is unknown.
    """
    if name not in SERVERS:
        raise OptionError(f"server is {name!r}; supported are {', '.join(map(repr, SERVERS))}.")
    server, kind = SERVERS[name], _kind(model)
    inside = factor_inside(stack)
    _require_known(model, stack, server, inside)
    if kind not in server.multiplies or inside in (1.0, None):
        return rows
    return (rows.float() / inside).to(rows)


def factor_inside(stack: Stack) -> float | None:
    """Measure the factor by which the embedding module multiplies its weights, or return None if it does something else."""
    weight: Any = stack.embedding.weight
    ids = torch.arange(min(4, weight.shape[0]), device=weight.device)
    with eval_mode(stack.embedding):
        rows, words = stack.embedding(ids[None])[0].float(), weight[ids].detach().float()
    if rows.shape != words.shape:
        return None
    factor = _ratio(rows, words, torch.finfo(weight.dtype).eps)
    declared = getattr(stack.embedding, "embed_scale", None)
    if factor is not None and declared is not None and abs(float(declared) / factor - 1) < 0.01:
        return float(declared)  # exact, where the measured factor is rounded
    return factor


def factor_after(model: nn.Module, stack: Stack) -> float | None:
    """Measure the factor by which the stack multiplies given embeddings before its first layer; return None if it does more."""
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
    """Return the constant factor between two tensors, or None."""
    factor = float((rows * words).sum() / (words * words).sum().clamp(min=1e-30))
    if abs(factor) < 4 * precision:
        return 0.0
    scale = float(rows.abs().max())
    if not torch.allclose(rows, words * factor, rtol=4 * precision, atol=4 * precision * scale):
        return None
    return 1.0 if abs(factor - 1) < 4 * precision else factor


def _kind(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _require_known(model: nn.Module, stack: Stack, server: Server, inside: float | None) -> None:
    """Refuse models for which the server may scale embeddings differently."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", stack.width)
    remedy = "Serve this model with `softhooks.integrations.transformers_serve`."
    if width != stack.width:
        raise UnsupportedModelError(
            f"the model's embeddings are {stack.width} wide but its hidden states {width} wide; no supported server takes them.",
            remedy,
        )
    factors: dict[str, object] = {}
    if inside != 1.0:
        factors["inside the embedding"] = "more than a factor" if inside is None else inside
    after = factor_after(model, stack)
    if after not in (1.0, None):
        factors["after the embedding"] = round(after or 0.0, 4)
    if factors and _kind(model) not in server.known:
        raise UnsupportedModelError(
            f"the scaling of embeddings by {server.label} is unknown for the model type {_kind(model)!r}.",
            remedy,
            factors=factors,
            known=", ".join(server.known),
        )
