"""Build JSON requests for inference servers from the embeddings that `sequence_embeddings` returns."""

from __future__ import annotations

import base64
import io
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softhooks.errors import OptionError

VLLM_CONNECTOR = "SoftPromptConnector"
"""The name of the connector that vLLM loads from `softhooks.integrations.vllm`."""

VLLM_PROMPTS = "prompts"
"""The setting in `kv_connector_extra_config` that holds the directory of the prompts."""


def vllm_request(model: str, rows: Tensor, **options: Any) -> dict[str, Any]:
    """Return the JSON body for `/v1/completions` of vLLM.

    Args:
        model: the server's name for the base model.
        rows: the embeddings, [P + T, H].
        options: other fields of the request, such as `max_tokens`, `temperature` and `stream`.

    Raises:
        OptionError: `options` contains `prompt`, which cannot be combined with embeddings.
    """
    if options.get("prompt"):
        raise OptionError(
            f"`prompt` is {options['prompt']!r}, but the embeddings already contain the text; only one of them can be passed.",
            "Leave `prompt` out.",
        )
    return {"model": model, "prompt_embeds": vllm_encode(rows), **options}


def vllm_encode(rows: Tensor) -> str:
    """Encode a tensor for vLLM: serialize it with `torch.save`, then encode the bytes in base64."""
    buffer = io.BytesIO()
    torch.save(rows.detach().cpu().contiguous().clone(), buffer)  # clone, because a view would save its whole storage
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def vllm_kv_transfer_config(prompts: str | Path) -> dict[str, Any]:
    """Return the value of vLLM's `kv_transfer_config` that makes it serve the prompts in a directory.

    Args:
        prompts: the directory, to which `softhooks export PROMPT... --to vllm` writes.
    """
    return {
        "kv_connector": VLLM_CONNECTOR,
        "kv_connector_module_path": "softhooks.integrations.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {VLLM_PROMPTS: str(Path(prompts).absolute())},
    }


def sglang_command(model: str, prompts: str | Path) -> str:
    """Return the command that starts SGLang with the prompts in a directory, for a POSIX shell.

    Args:
        model: the base model, a directory or a name on the Hub.
        prompts: the directory, to which `softhooks export PROMPT... --to sglang` writes.
    """
    folder = shlex.quote(str(Path(prompts).absolute()))
    server = f"python -m sglang.launch_server --model-path {shlex.quote(model)}"
    return f"SOFTHOOKS_PROMPTS={folder} {server} --radix-cache-backend softhooks"


def sglang_request(rows: Tensor, *, sampling_params: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Return the JSON body for `/generate` of SGLang.

    Args:
        rows: the embeddings, [P + T, H].
        sampling_params: the sampling parameters, such as `max_new_tokens` and `temperature`.
        options: other fields of the request, such as `stream`.

    Raises:
        OptionError: `options` contains `text` or `input_ids`, which cannot be combined with embeddings.
    """
    others = [name for name in ("text", "input_ids") if options.get(name) is not None]
    if others:
        raise OptionError(
            f"{' and '.join(f'`{name}`' for name in others)} cannot be passed: the embeddings already contain the text.",
            "Pass only the embeddings.",
        )
    return {
        "input_embeds": rows.detach().float().cpu().tolist(),
        "sampling_params": dict(sampling_params or {}),
        **options,
    }
