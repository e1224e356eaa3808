"""SGLang: requests with plain text that select a soft prompt by name, or that contain it as input embeddings.

`export`, or `softhooks export PROMPT... --to sglang --model MODEL --output DIR`, computes the keys and values of prompts, one
file per prompt. SGLang serves the files in the directory that the environment variable `SOFTHOOKS_PROMPTS` names, if it is
started with `--radix-cache-backend softhooks`; `command` returns the whole command. A request to `/generate` selects a prompt
with `"custom_params": {"soft_prompt": NAME}` in its `sampling_params`, one to `/v1/completions` or `/v1/chat/completions` with
the same field beside `model`; one without it gets the bare model. Files that are added, replaced or deleted take effect with
the next request. The virtual tokens count as tokens of the input; the cache holds them, also those of replaced files, until it
is flushed.

The cache serves prefix tuning, P-tuning v2, cartridges, context tuning, and embeddings before the text. These raise an error:
releases of SGLang other than 0.5.23; models other than Llama, Qwen3 and Gemma 3 (text); gated branches, trained heads,
slots within the text, prefixes in only some layers or that do not shift positions, and multitask prompts with several tasks;
prefixes with `windowed=False` under a sliding window; tensor, pipeline, data and context parallelism, pages of several tokens,
speculative decoding, quantized caches, hierarchical caches, `--json-model-override-args`, and sliding windows without
`--disable-hybrid-swa-memory`. Requests with an unknown name, LoRA, a session, `cache_salt`, `extra_key`, images or too long a
text are answered with status 400.

`embeddings` computes the embeddings of prompt and text together, and `request` builds the body of a request to `/generate` with
these `input_embeds`. From a shell: `softhooks export DIR --to sglang --model MODEL --text "..." --output OUT`. This refuses
prompts that do not enter as embeddings, trained heads, multitask prompts with several tasks, `text` or `input_ids` together with
`input_embeds`, and models that scale their embeddings, except Gemma (1 to 3) and Granite; for Gemma and Gemma 2, the embeddings
are divided by the model's scale, because SGLang multiplies them by it. The server needs `--disable-radix-cache` and `--dtype
bfloat16`: SGLang converts the embeddings to bfloat16, and stops if the model has another dtype. It also stops if a request with
embeddings and one with text arrive at the same time, so do not send text to this server.

`make test-sglang` compares SGLang with transformers on a CPU without AMX; GPUs and SGLang's own kernels were not tried. Gemma 2
could not be compared, because SGLang's attention on such a CPU leaves out the cap of the attention logits.

Versions tested: sglang 0.5.23 (on a CPU, with torch's kernels), transformers 5.19.0 (with SGLang) and 5.23.0

Example:
    import json
    from softhooks.integrations import sglang

    path = sglang.export(model, folder, "en")  # the active prompt
    start = sglang.command("the/base-model", folder)  # SOFTHOOKS_PROMPTS=... python -m sglang.launch_server ...
    rows = sglang.embeddings(model, "word5 word6 word7", tokenizer)  # [P + T, H]
    body = sglang.request(rows, sampling_params={"max_new_tokens": 16, "temperature": 0})
    posted = json.dumps(body)  # to http://localhost:30000/generate
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softhooks.integration_support.serving import prefix_of, sequence_embeddings, write_prefix
from softhooks.integration_support.serving import sglang_command as command
from softhooks.integration_support.serving import sglang_request as request

__all__ = ["command", "embeddings", "export", "request"]


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
    return sequence_embeddings(model, text, tokenizer, server="sglang").cpu()


def export(model: nn.Module, folder: str | Path, name: str) -> Path:
    """Write the keys and values of the active prompt to a directory of prompts that SGLang serves.

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
