"""What inference servers do with embedding rows that they are given, and which models they are known to serve rightly.

Some models multiply their embeddings by a factor. transformers has it inside the embedding module (Gemma), so that rows are given
to it with the factor, or behind it (Granite), so that they are given without. A server that has it elsewhere needs other rows.
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
    """What one server does.

    Attributes:
        label: its name and the version of which this is known.
        multiplies: the model types whose factor it applies to given rows too, where transformers has it inside the embedding.
        keeps: the other model types with a factor of which it is known that it takes rows as transformers does.
    """

    label: str
    multiplies: tuple[str, ...]
    keeps: tuple[str, ...]

    @property
    def known(self) -> tuple[str, ...]:
        """The model types with a factor that it serves rightly."""
        return (*self.multiplies, *self.keeps)


SERVERS: dict[str, Server] = {
    # Run: rows of Gemma, Gemma 2, Gemma 3 and Granite as transformers takes them; vLLM multiplies the rows of ids only.
    "vllm": Server("vLLM 0.32.0", (), ("gemma", "gemma2", "gemma3", "gemma3_text", "granite")),
    # Read: `hidden_states *= normalizer` behind either in Gemma and Gemma 2; a scaled embedding module in Gemma 3.
    "sglang": Server("SGLang 0.5.23", ("gemma", "gemma2"), ("gemma3", "gemma3_text", "granite")),
}


def for_server(model: nn.Module, stack: Stack, rows: Tensor, name: str) -> Tensor:
    """Bring rows, as the model's `inputs_embeds` takes them, into the form that a server takes. [N, H] -> [N, H].

    Raises:
        OptionError: there is no such server.
        UnsupportedModelError: it is not known what the server does with the rows.
    """
    if name not in SERVERS:
        raise OptionError(f"server must be one of {', '.join(map(repr, SERVERS))}; it is {name!r}.")
    server, kind = SERVERS[name], _kind(model)
    inside = factor_inside(stack)
    _require_known(model, stack, server, inside)
    if kind not in server.multiplies or inside in (1.0, None):
        return rows
    return (rows.float() / inside).to(rows)


def factor_inside(stack: Stack) -> float | None:
    """What the embedding module multiplies its weights by, measured; 1.0 where it does not, None where it does something else."""
    weight: Any = stack.embedding.weight
    ids = torch.arange(min(4, weight.shape[0]), device=weight.device)
    with eval_mode(stack.embedding):
        rows, words = stack.embedding(ids[None])[0].float(), weight[ids].detach().float()
    if rows.shape != words.shape:
        return None
    factor = _ratio(rows, words, torch.finfo(weight.dtype).eps)
    told = getattr(stack.embedding, "embed_scale", None)
    if factor is not None and told is not None and abs(float(told) / factor - 1) < 0.01:
        return float(told)  # without the rounding of the rows
    return factor


def factor_behind(model: nn.Module, stack: Stack) -> float | None:
    """What the stack multiplies given rows by before its first layer, measured; None where it does more or it cannot be seen."""
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
            for given in (rows, 2 * rows):  # positions that are added to both fall out of their difference
                model(inputs_embeds=given, use_cache=False)
        except Exception as error:
            raise UnsupportedModelError(
                "a server takes embedding rows; so must the model.",
                "Serve this model with `softhooks.integrations.transformers_serve`.",
                model=type(model).__name__,
                cause=f"{type(error).__name__}: {error}",
            ) from error
        finally:
            handle.remove()
    if len(seen) != 2 or seen[0].shape != rows.shape:
        return None
    factor = _ratio(seen[1].float() - seen[0].float(), rows.float(), 2 * torch.finfo(rows.dtype).eps)
    return factor if factor != 0.0 else None  # a norm makes the same of both


def _ratio(rows: Tensor, words: Tensor, precision: float) -> float | None:
    """The one factor between two tensors, if there is one."""
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
    """Refuse models whose rows the server may take for something else."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", stack.width)
    factors: dict[str, object] = {}
    if inside != 1.0:
        factors["inside the embedding"] = "more than a factor" if inside is None else inside
    behind = factor_behind(model, stack) if width == stack.width else 1.0
    if behind not in (1.0, None):
        factors["behind the embedding"] = round(behind or 0.0, 4)
    if (factors and _kind(model) not in server.known) or width != stack.width:
        raise UnsupportedModelError(
            "the rows must mean to a server what they mean to transformers.",
            "Serve this model with `softhooks.integrations.transformers_serve`.",
            model=_kind(model),
            factors=factors or "none",
            known=f"of {server.label}: {', '.join(server.known)}",
            width=f"{stack.width} of rows, {width} of states",
        )
