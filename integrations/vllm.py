"""vLLM: a text with its prompt as prompt embeddings.

vLLM knows nothing of soft prompts, but takes the embeddings of a whole prompt in the place of its ids: `LLM(...,
enable_prompt_embeds=True)` as `{"prompt_embeds": rows}`, and a server started with `vllm serve MODEL --enable-prompt-embeds` in
`/v1/completions` as `prompt_embeds`, a tensor written by `torch.save`, in base64. `embeddings` makes the rows, slots and words
together, and `request` what is posted. Or from a shell: `softhooks export DIR --to vllm --model MODEL --text "..." --output OUT`.

Refused by name: prompts that enter as keys and values or as a branch (prefix tuning, P-tuning v2, context tuning, cartridges,
LLaMA-Adapter), for which vLLM has no way in; trained heads; multitask prompts of several tasks; `prompt` beside
`prompt_embeds`, which is a second prompt to the server and not the rest of the first; models that scale their embeddings in a way
of which it is not known where vLLM does it. `/v1/chat/completions` puts a template around what it is given: use completions, and
the template before the rows are made.

Rows are those of transformers' own `inputs_embeds`, also for Gemma and Gemma 2: vLLM multiplies the rows of ids, and not those it
is given (measured with 0.32.0 on a CPU). The tests do not run vLLM. They check that transformers, given the
rows, generates what it generates with the prompt, and that the request's fields are those that vLLM 0.33.0 publishes.

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
    """The rows of a text with the prompt that is on, as vLLM takes them.

    Args:
        model: the base model in transformers, with the prompt.
        text: a text, or its ids (of a chat, after its template).
        tokenizer: the model's, for a text.

    Shape:
        -> [P + T, H], on the CPU, in the model's precision.

    Raises:
        SoftHooksError: as `softhooks.serving.embeddings.sequence_embeddings`.
    """
    return sequence_embeddings(model, text, tokenizer, server="vllm").cpu()
