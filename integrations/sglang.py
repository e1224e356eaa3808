"""SGLang: a text with its prompt as input embeddings.

SGLang knows nothing of soft prompts, but its own endpoint `/generate` takes the embeddings of a whole prompt in the place of its
ids, as lists of numbers: `input_embeds`. Start the server with `--disable-radix-cache`: its cache finds prompts by their ids, and
rows have none. `embeddings` makes the rows, slots and words together, and `request` what is posted. Or from a shell:
`softhooks export DIR --to sglang --model MODEL --text "..." --output OUT`.

Refused by name: prompts that enter as keys and values or as a branch (prefix tuning, P-tuning v2, context tuning, cartridges,
LLaMA-Adapter), for which SGLang has no way in; trained heads; multitask prompts of several tasks; `text` or `input_ids` beside
`input_embeds`; models that scale their embeddings in a way of which it is not known where SGLang does it.

For Gemma and Gemma 2 the rows are divided by the factor of the embeddings, for SGLang multiplies given rows by it.

Read from SGLang's documentation and source, and not run: it needs a GPU. What is tested is that transformers, given the rows,
generates what it generates with the prompt, and that the request's fields are those that SGLang 0.5.23 publishes.

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
    """The rows of a text with the prompt that is on, as SGLang takes them.

    Args:
        model: the base model in transformers, with the prompt.
        text: a text, or its ids (of a chat, after its template).
        tokenizer: the model's, for a text.

    Shape:
        -> [P + T, H], on the CPU, in the model's precision.

    Raises:
        SoftHooksError: as `softhooks.serving.embeddings.sequence_embeddings`.
    """
    return sequence_embeddings(model, text, tokenizer, server="sglang").cpu()
