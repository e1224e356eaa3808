"""SGLang: requests that contain a soft prompt and text as input embeddings.

SGLang does not support soft prompts, but its endpoint `/generate` accepts `input_embeds`, the embeddings of the whole input as
lists of numbers, instead of token ids. Start the server with `--disable-radix-cache`, because the radix cache compares
token ids. `embeddings` computes the embeddings of prompt and text together, and `request` builds the body of the request. From a
shell: `softhooks export DIR --to sglang --model MODEL --text "..." --output OUT`.

These raise an error: prompts that enter as keys and values or as a gated branch (prefix tuning, P-tuning v2, context tuning,
cartridges, LLaMA-Adapter); trained heads; multitask prompts with several tasks; `text` or `input_ids` together with
`input_embeds`; models that scale their embeddings, except Gemma (1 to 3) and Granite. For Gemma and Gemma 2, the embeddings are
divided by the model's scale, because SGLang multiplies `input_embeds` by this scale.

This module is based on SGLang's documentation and source code. The tests do not run SGLang, which needs a GPU: they check that
transformers generates the same tokens from the embeddings as with the prompt, and that the request has the fields that SGLang
0.5.23 documents.

Versions tested: transformers 5.23.0 (SGLang itself has not been run)

Example:
    import json
    from softhooks.integrations import sglang

    rows = sglang.embeddings(model, "word5 word6 word7", tokenizer)  # [P + T, H]
    body = sglang.request(rows, sampling_params={"max_new_tokens": 16, "temperature": 0})
    posted = json.dumps(body)  # to http://localhost:30000/generate
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from softhooks.integration_support.serving import sequence_embeddings
from softhooks.integration_support.serving import sglang_request as request

__all__ = ["embeddings", "request"]


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
