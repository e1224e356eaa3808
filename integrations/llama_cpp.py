"""llama.cpp's HTTP server: requests with plain text that a soft prompt precedes, in a slot restored from a file.

`export`, or `softhooks export PROMPT... --to llama.cpp --model MODEL --output DIR`, needs a running server that was started with
`llama-server -m MODEL.gguf --slots --slot-save-path DIR`, on the same machine. The server fills a slot with placeholder tokens
and saves it to DIR; a copy of this file with the keys and values of the prompt is written to DIR/NAME.bin. `complete` restores
the file into a slot and sends a text with the placeholders before it, so that the server continues after the prompt; `request`
builds the body of such a request to `/completion`.

These raise an error: models other than Llama, Mistral, Qwen2, Qwen3, Phi-3 and Granite, and models with sliding windows; a
server that computes other keys for the placeholders, because it runs another model; quantized caches
(`--cache-type-k q8_0`); slot files of another version than 4; gated branches, trained heads, slots within the text, prefixes in
only some layers or that do not shift positions, and multitask prompts with several tasks; answers for which the server did not
use the prompt, because another request took the slot.

One slot holds one prompt at a time. `complete` restores it before each request, and cannot stream. Requests of other programs
must restore the slot, name it (`id_slot`), and begin with the placeholders; without a restored slot, the server reads the
placeholders as words. `make test-llama-cpp` compares the server with transformers on a CPU.

Versions tested: xllamacpp 2026.10.11549 (llama.cpp of October 2026), transformers 5.23.0

Example:
    from softhooks.integrations import llama_cpp

    path = llama_cpp.export(model, folder, "en", url=url)  # the active prompt, to the server's --slot-save-path
    body = llama_cpp.request(path, [5, 6, 7], n_predict=16, temperature=0)  # to http://localhost:8080/completion
    answer = llama_cpp.complete(path, "word5 word6 word7", url=url, n_predict=16, temperature=0)
    print(answer["content"])
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from softhooks.integration_support.serving import LLAMA_SERVER_URL, LlamaServer, export_slot
from softhooks.integration_support.serving import slot_complete as complete
from softhooks.integration_support.serving import slot_request as request

__all__ = ["complete", "export", "request"]


def export(model: nn.Module, folder: str | Path, name: str, *, url: str = LLAMA_SERVER_URL, slot: int = 0) -> Path:
    """Write the active prompt to a slot file, with the help of a running server.

    Args:
        model: the transformers model with the prompt, and with the weights that the server runs; the server's may be quantized.
        folder: the directory that the server was started with (`--slot-save-path`).
        name: the file's name, without the suffix `.bin`.
        url: the server's address. If it needs a key, set the environment variable LLAMA_API_KEY.
        slot: the slot that is used for this, and then holds the prompt.

    Returns:
        the path of the file.

    Raises:
        SoftHooksError: the prompt or the model cannot be served in this way, the server cannot be reached or runs another model,
            or its slot files are not supported.
    """
    return export_slot(model, Path(folder), name, LlamaServer(url), slot).path
