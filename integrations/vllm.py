"""vLLM: requests that contain a text and its prompt as prompt embeddings.

vLLM does not support soft prompts, but accepts the embeddings of the whole input instead of its ids: `LLM(...,
enable_prompt_embeds=True)` as `{"prompt_embeds": rows}`, and a server started with `vllm serve MODEL --enable-prompt-embeds` as
`prompt_embeds` of `/v1/completions`, a tensor written by `torch.save`, in base64. `embeddings` computes the embeddings of prompt
and text together, and `request` builds the body of the request. From a shell:
`softhooks export DIR --to vllm --model MODEL --text "..." --output OUT`.

Refused with an error: prompts of keys and values and gated branches (prefix tuning, P-tuning v2, context tuning, cartridges,
LLaMA-Adapter), which vLLM does not support; trained heads; multitask prompts with several tasks; `prompt` with `prompt_embeds`,
which the server would answer as two inputs; models that scale their embeddings, unless it is known where vLLM does so.
`/v1/chat/completions` applies a chat template to its input: use completions, and apply the template before `embeddings`.

The embeddings equal transformers' `inputs_embeds`, even for Gemma and Gemma 2: vLLM scales the embeddings of ids, but not given
embeddings (measured with 0.32.0 on a CPU). The tests do not run vLLM. They check that transformers generates the same from the
embeddings as with the prompt, and that the request has the fields that vLLM 0.33.0 documents.

Versions: rows of vLLM 0.32.0; transformers 5.23.0.

Example:
    import json
    from softhooks.integrations import vllm

    rows = vllm.embeddings(model, "word5 word6 word7", tokenizer)  # [P + T, H]
    body = vllm.request("the/base-model", rows, max_tokens=16, temperature=0)
    posted = json.dumps(body)  # to http://localhost:8000/v1/completions
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from softhooks.integration_support.serving import sequence_embeddings
from softhooks.integration_support.serving import vllm_encode as encode
from softhooks.integration_support.serving import vllm_request as request

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["embeddings", "encode", "request"]


def embeddings(model: nn.Module, text: str | list[int] | Tensor, tokenizer: Any = None) -> Tensor:
    """Compute the embeddings of a text with the active prompt.

    Args:
        model: the transformers model with the prompt.
        text: a text, or its ids; for a chat, the text after applying the chat template.
        tokenizer: the model's tokenizer, needed if `text` is not ids.

    Shape:
        -> [P + T, H], on the CPU, in the model's dtype.

    Raises:
        SoftHooksError: as `softhooks.serving.embeddings.sequence_embeddings`.
    """
    return sequence_embeddings(model, text, tokenizer, server="vllm").cpu()
