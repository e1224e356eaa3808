"""vLLM: requests that contain a soft prompt and text as prompt embeddings.

vLLM does not support soft prompts, but accepts the embeddings of the whole input instead of token ids. `embeddings` computes the
embeddings of prompt and text together. Pass them to `generate` of `LLM(..., enable_prompt_embeds=True)` as
`{"prompt_embeds": rows}`. For a server started with `vllm serve MODEL --enable-prompt-embeds`, `request` builds the body of a
request to `/v1/completions`; `/v1/chat/completions` cannot be used. From a shell:
`softhooks export DIR --to vllm --model MODEL --text "..." --output OUT`.

These raise an error: prompts that enter as keys and values or as a gated branch (prefix tuning, P-tuning v2, context tuning,
cartridges, LLaMA-Adapter); trained heads; multitask prompts with several tasks; `prompt` together with `prompt_embeds`, which the
server would treat as two inputs; models that scale their embeddings, except Gemma (1 to 3) and Granite.

The tests do not run vLLM: they check that transformers generates the same tokens from the embeddings as with the prompt, and
that the request has the fields that vLLM 0.33.0 documents.

Versions tested: vllm 0.32.0 (`embeddings`, by hand on a CPU), transformers 5.23.0

Example:
    import json
    from softhooks.integrations import vllm

    rows = vllm.embeddings(model, "word5 word6 word7", tokenizer)  # [P + T, H]
    body = vllm.request("the/base-model", rows, max_tokens=16, temperature=0)
    posted = json.dumps(body)  # to http://localhost:8000/v1/completions
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from softhooks.integration_support.serving import sequence_embeddings
from softhooks.integration_support.serving import vllm_encode as encode
from softhooks.integration_support.serving import vllm_request as request

__all__ = ["embeddings", "encode", "request"]


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
