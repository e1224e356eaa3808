"""Requests to llama.cpp's server whose slot holds a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softhooks.errors import CheckpointError, OptionError, SoftHooksError, is_int
from softhooks.serving.llama_server import URL, LlamaServer, reused_tokens
from softhooks.serving.slot_file import read_slot_tokens

_GIVEN = ("prompt", "id_slot", "cache_prompt")


def slot_request(placeholders: Sequence[int], text: Sequence[int], slot: int = 0, **options: Any) -> dict[str, Any]:
    """Return the JSON body for `/completion`.

    Args:
        placeholders: the tokens in the slot file.
        text: the tokens of the text.
        slot: the slot that holds the prompt.
        options: other fields of the request.

    Raises:
        OptionError: `options` contains a field that selects the prompt.
    """
    if taken := [name for name in _GIVEN if name in options]:
        raise OptionError(f"`{taken[0]}` cannot be passed, because the prompt is selected by it.")
    return {"prompt": [*placeholders, *text], "id_slot": slot, "cache_prompt": True, **options}


def request(path: str | Path, text: Sequence[int], *, slot: int = 0, **options: Any) -> dict[str, Any]:
    """Return the JSON body of a request to `/completion`, for a server whose slot holds the prompt.

    Args:
        path: the slot file.
        text: the token ids of the text, as the model's tokenizer returns them, with those that it adds at the start.
        slot: the slot into which the file was restored.
        options: other fields of the request, such as `n_predict`, `temperature` and `stream`.

    Raises:
        OptionError: the text is empty or is not token ids, or `options` contains a field that selects the prompt.
        CheckpointError: the file is missing, or not a slot file.
    """
    if not len(text) or not all(is_int(token, 0) for token in text):
        raise OptionError(
            f"the text is {text!r:.200}; it must be a list of at least one token id.",
            "`complete` accepts a string, which the server tokenizes.",
        )
    return slot_request(_tokens(Path(path)), text, slot, **options)


def complete(
    path: str | Path, text: str | Sequence[int], *, url: str = URL, slot: int = 0, **options: Any
) -> dict[str, Any]:
    """Restore the prompt into a slot, and let the server continue a text after it.

    Args:
        path: the slot file, in the directory that the server was started with (`--slot-save-path`).
        text: a string, which the server tokenizes, or token ids. For a chat, pass the ids that the chat template returns.
        url: the server's address. If it needs a key, set the environment variable LLAMA_API_KEY.
        slot: the slot. Concurrent calls need different slots.
        options: other fields of the request, such as `n_predict` and `temperature`.

    Returns:
        the server's answer; its `content` is the generated text.

    Raises:
        OptionError: the text is empty, or `options` contains `stream` or a field that selects the prompt.
        CheckpointError: the file is missing, or not a slot file.
        SoftHooksError: the server cannot be reached, refuses the request, or did not use the prompt.
    """
    if options.get("stream"):
        raise OptionError(
            "`stream` cannot be passed to `complete`, which checks the answer.", "Post `request` yourself."
        )
    server = LlamaServer(url)
    ids = server.tokenize(text) if isinstance(text, str) else text
    body = request(path, ids, slot=slot, **options)
    virtual = len(body["prompt"]) - len(ids)
    server.restore(slot, Path(path).name, virtual)
    answer = server.post("/completion", **body)
    if reused_tokens(answer) < virtual:
        raise SoftHooksError(
            f"the server did not use the prompt, because another request took slot {slot} in between.",
            "Let only one request at a time use a slot with a prompt, and send other requests to other slots (`id_slot`).",
            reused_tokens=reused_tokens(answer),
            virtual_tokens=virtual,
        )
    return answer


def _tokens(path: Path) -> tuple[int, ...]:
    try:
        return read_slot_tokens(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}",
            "Write it with `softhooks export PROMPT --to llama.cpp --model MODEL --output DIR`.",
        ) from error
