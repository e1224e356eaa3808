"""SGLang: requests that contain a text and its prompt as input embeddings.

SGLang does not support soft prompts, but its endpoint `/generate` accepts `input_embeds`, the embeddings of the whole input as
lists of numbers, instead of token ids. Start the server with `--disable-radix-cache`, because its cache compares ids.
`embeddings` computes the embeddings of prompt and text together, and `request` builds the body of the request. From a shell:
`softhooks export DIR --to sglang --model MODEL --text "..." --output OUT`.

These raise an error: prompts of keys and values or gated branches (prefix tuning, P-tuning v2, context tuning, cartridges,
LLaMA-Adapter); trained heads; multitask prompts with several tasks; `text` or `input_ids` together with `input_embeds`; models
that scale their embeddings, except Gemma (1 to 3) and Granite. For Gemma and Gemma 2, the embeddings are divided by the model's
scale, because SGLang multiplies `input_embeds` by this scale.

This module was written from SGLang's documentation and source. The tests do not run SGLang, which needs a GPU: they check that
transformers generates the same from the embeddings as with the prompt, and that the request has the fields that SGLang 0.5.23
documents.

Versions tested: none of SGLang; transformers 5.23.0

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
    """Compute the embeddings of a text with the active prompt.

    Args:
        model: the transformers model with the prompt.
        text: a text, or its ids. For a chat, apply the chat template first.
        tokenizer: the model's tokenizer; not needed for ids.

    Shape:
        -> [P + T, H], on the CPU, in the model's dtype.

    Raises:
        SoftHooksError: the server cannot use the prompt, or the text does not fit.
    """
    return sequence_embeddings(model, text, tokenizer, server="sglang").cpu()
