"""Check requests where vLLM receives them, so that those that cannot be served are answered with HTTP 400.

vLLM has no hook for this that knows the length of the text. So the methods that every request passes in the server's own process
are wrapped when vLLM imports the connector, which it does only if the connector is configured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from softhooks.errors import OptionError, SoftHooksError, UnsupportedModeError
from softhooks.integration_support.serving import VLLM_CONNECTOR, PromptFolder
from softhooks.integrations._vllm_scheduler import FIELD
from softhooks.integrations._vllm_settings import folder_of, served_model

PARAMS = "kv_transfer_params"


def require_servable(config: Any, params: Any, length: int, **features: object) -> int:
    """Check a request, and return the number of its virtual tokens.

    Args:
        config: vLLM's configuration.
        params: the request's sampling parameters.
        length: the number of tokens of the text.
        features: what else the request contains, by name; a true value cannot be combined with a prompt.

    Raises:
        SoftHooksError: the request names a prompt and cannot be served.
    """
    given = (getattr(params, "extra_args", None) or {}).get(PARAMS)
    if not given:
        return 0
    if not isinstance(given, dict) or set(given) != {FIELD}:
        raise OptionError(f"`{PARAMS}` is {given!r}; it must have the one field {FIELD!r}, the name of a prompt.")
    folder: PromptFolder = folder_of(config)
    found = folder.find(given[FIELD])
    model = served_model(config)
    model.require_fit(found)
    scored = getattr(params, "prompt_logprobs", None) is not None  # also sets `skip_reading_prefix_cache`
    features["prompt_logprobs"] = scored
    features["skip_reading_prefix_cache"] = not scored and getattr(params, "skip_reading_prefix_cache", None)
    wrong = [name for name, value in features.items() if value]
    if wrong:
        raise UnsupportedModeError(
            f"the request has {', '.join(f'`{name}`' for name in wrong)}, which cannot be combined with a prompt.",
            f"Leave it out, or leave `{PARAMS}` out.",
        )
    model.require_room(found, length)
    return int(found.prefix.facts.num_virtual_tokens)


def install() -> None:
    """Wrap the methods of vLLM that receive requests. Only the first call has an effect."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    def refuse(error: SoftHooksError) -> Exception:
        refused: Exception = VLLMValidationError(str(error), parameter=f"{PARAMS}.{FIELD}")
        return refused

    _wrap(InputProcessor, "process_inputs", functools.partial(_processing, refuse))
    _wrap(AsyncLLM, "generate", functools.partial(_generating, refuse))
    for request in (ChatCompletionRequest, CompletionRequest):
        _wrap(request, "to_beam_search_params", functools.partial(_searching, refuse))


Refuse = Callable[[SoftHooksError], Exception]


def _wrap(owner: type, name: str, replacement: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if hasattr(original, "_softhooks_original"):
        return

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(original, self, *args, **kwargs)

    vars(wrapper)["_softhooks_original"] = original
    setattr(owner, name, wrapper)


def _is_configured(config: Any) -> bool:
    return config.kv_transfer_config is not None and config.kv_transfer_config.kv_connector == VLLM_CONNECTOR


def _processing(refuse: Refuse, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace `InputProcessor.process_inputs`: check the finished request, and limit the length of the answer."""
    request = original(self, *args, **kwargs)
    if not _is_configured(self.vllm_config) or request.sampling_params is None:
        return request
    length = len(request.prompt_token_ids or ())
    try:
        virtual = require_servable(
            self.vllm_config,
            request.sampling_params,
            length,
            prompt_embeds=request.prompt_embeds is not None,
            lora_request=request.lora_request,
            images=request.mm_features,
            streamed_input=request.resumable,
        )
    except SoftHooksError as error:
        raise refuse(error) from error
    if virtual:
        room = self.vllm_config.model_config.max_model_len - virtual - length
        request.sampling_params.max_tokens = min(request.sampling_params.max_tokens, room)
    return request


def _generating(
    refuse: Refuse,
    original: Callable[..., Any],
    self: Any,
    prompt: Any,
    sampling_params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Replace `AsyncLLM.generate`: check a request before the server begins to stream the answer with status 200."""
    if _is_configured(self.vllm_config) and isinstance(prompt, dict) and "type" in prompt:
        features = {"prompt_embeds": prompt["type"] == "embeds", "lora_request": kwargs.get("lora_request")}
        try:
            require_servable(self.vllm_config, sampling_params, len(prompt.get("prompt_token_ids") or ()), **features)
        except SoftHooksError as error:
            raise refuse(error) from error
    return original(self, prompt, sampling_params, *args, **kwargs)


def _searching(refuse: Refuse, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace `to_beam_search_params` of requests: vLLM would drop the name of the prompt."""
    if self.kv_transfer_params:
        error = UnsupportedModeError("the request has `use_beam_search`, which cannot be combined with a prompt.")
        raise refuse(error) from error
    return original(self, *args, **kwargs)
