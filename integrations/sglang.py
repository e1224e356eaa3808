"""SGLang: requests that contain a text and its prompt as input embeddings.

SGLang does not support soft prompts, but its endpoint `/generate` accepts the embeddings of the whole input instead of its ids,
as lists of numbers: `input_embeds`. Start the server with `--disable-radix-cache`, because its cache finds inputs by their ids.
`embeddings` computes the embeddings of prompt and text together, and `request` builds the body of the request. From a shell:
`softhooks export DIR --to sglang --model MODEL --text "..." --output OUT`.

Refused with an error: prompts of keys and values and gated branches (prefix tuning, P-tuning v2, context tuning, cartridges,
LLaMA-Adapter), which SGLang does not support; trained heads; multitask prompts with several tasks; `text` or `input_ids` together
with `input_embeds`; models that scale their embeddings, unless it is known where SGLang does so.

For Gemma and Gemma 2 the embeddings are divided by the model's scale, because SGLang multiplies given embeddings by this scale.

Written from SGLang's documentation and source, and not run, because SGLang needs a GPU. The tests check that transformers
generates the same from the embeddings as with the prompt, and that the request has the fields that SGLang 0.5.23 documents.

Versions tested: none; transformers 5.23.0 for the rows.

Example:
    import json
    from softhooks.integrations import sglang

    rows = sglang.embeddings(model, "word5 word6 word7", tokenizer)  # [P + T, H]
    body = sglang.request(rows, sampling_params={"max_new_tokens": 16, "temperature": 0})
    posted = json.dumps(body)  # to http://localhost:30000/generate
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from softhooks.integration_support.serving import sequence_embeddings
from softhooks.integration_support.serving import sglang_request as request

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["embeddings", "request"]


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
    return sequence_embeddings(model, text, tokenizer, server="sglang").cpu()
