"""What softhooks changes in SGLang's requests: those that name a prompt get placeholders before their text.

SGLang has no hook for this, so its plugins' wrappers are put around two methods: the one that makes a request from a text's ids
in the server's process, where an error is answered with HTTP 400, and the one by which a scheduler takes the request.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from softhooks.errors import OptionError, SoftHooksError, UnsupportedModeError
from softhooks.integration_support.serving import FoundPrefix, PromptFolder
from softhooks.integrations._sglang_settings import BACKEND, prompt_folder, served_model

FIELD = "soft_prompt"
"""The field of `custom_params` that names a request's prompt."""

PLACEHOLDER = 0
"""The id of a virtual token in SGLang's lists of ids; penalties for repetition regard only the answer."""

_UNSUPPORTED = (
    "lora_path",
    "session_params",
    "session_id",
    "cache_salt",
    "extra_key",
    "image_data",
    "video_data",
    "audio_data",
)
_folder = lru_cache(maxsize=1)(prompt_folder)


def name_in(custom_params: object) -> object:
    """Return the name of the prompt in `custom_params`, or None."""
    return custom_params.get(FIELD) if isinstance(custom_params, dict) else None


def salt_of(found: FoundPrefix) -> str:
    """Return the salt that separates a prompt's entries in the prefix cache from all others."""
    return f"softhooks {found.name} {found.digest}"


def require_servable(folder: PromptFolder, name: object, request: Any, length: int, model: Any) -> FoundPrefix:
    """Return the prompt that a request names.

    Args:
        length: the number of tokens of the text.
        model: SGLang's configuration of the model.

    Raises:
        SoftHooksError: the request cannot be served.
    """
    found = folder.find(name)
    served = served_model(model)
    served.require_fit(found)
    wrong = [feature for feature in _UNSUPPORTED if getattr(request, feature, None)]
    if wrong:
        raise UnsupportedModeError(
            f"the request has {', '.join(f'`{feature}`' for feature in wrong)}, which cannot be combined with a prompt.",
            f"Leave it out, or leave {FIELD!r} out of `custom_params`.",
        )
    served.require_room(found, length)
    return found


def make_request(
    original: Callable[..., Any], self: Any, obj: Any, text: Any, ids: Any, *more: Any, **named: Any
) -> Any:
    """Wrap `TokenizerManager._create_tokenized_object`: put virtual tokens before the text of a request with a prompt.

    Raises:
        ValueError: the request cannot be served; SGLang answers with status 400.
    """
    from sglang.srt.runtime_context import get_memory

    name = name_in((obj.sampling_params or {}).get("custom_params"))
    if name is None or get_memory().radix_cache_backend != BACKEND:
        return original(self, obj, text, ids, *more, **named)
    try:
        if ids is None:
            raise OptionError("the request has no text; a prompt needs at least one token of text.")
        found = require_servable(_folder(), name, obj, len(ids), self.model_config)
    except SoftHooksError as error:
        raise ValueError(str(error)) from error
    virtual = found.prefix.facts.num_virtual_tokens
    request = original(self, obj, text, [PLACEHOLDER] * virtual + list(ids), *more, **named)
    request.cache_salt = salt_of(found)
    if request.logprob_start_len is not None and request.logprob_start_len >= 0:
        request.logprob_start_len += virtual
    return request


def take_request(original: Callable[..., Any], self: Any, request: Any, **named: Any) -> Any:
    """Wrap `Scheduler.handle_generate_request`: have the request's prompt in the cache, or answer with status 500."""
    name = name_in(request.sampling_params.custom_params)
    if name is not None and hasattr(self.tree_cache, "admit"):
        try:
            self.tree_cache.admit(name, request.cache_salt)
        except SoftHooksError as error:
            request.cache_salt = None
            named["mm_input_error"] = str(error)  # the only argument that makes the method refuse a request
    return original(self, request, **named)
