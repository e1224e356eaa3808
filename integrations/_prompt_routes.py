"""The HTTP side of a server with prompts: model names in requests, the list of models, and loading and unloading."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from softhooks.errors import NotAttachedError, OptionError, SoftHooksError
from softhooks.integrations._served_prompts import LOAD, UNLOAD, ServedPrompts, chosen

_FIELD = "prompt_name"
_POLL = 0.02  # seconds


def prompted_server(build_server: Callable[..., Any], served: ServedPrompts) -> Callable[..., Any]:
    """Return a replacement for transformers' `build_server` whose app takes prompts as models."""

    def build(model_manager: Any, *handlers: Any, generation_state: Any, **others: Any) -> Any:
        for handler in (*handlers, *others.values()):
            if hasattr(handler, "_resolve_model"):
                handler._resolve_model = partial(_resolve, served, handler._resolve_model)
        app = build_server(model_manager, *handlers, generation_state=generation_state, **others)
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != "/v1/models"]
        _add_routes(app, model_manager, generation_state, served)
        return app

    return build


def _resolve(served: ServedPrompts, original: Callable[..., Any], body: dict[str, Any]) -> Any:
    """Load the base model of a request, and note its prompt; in the answer, `model` is the name that was requested."""
    requested = body.get("model")
    if requested is not None and not isinstance(requested, str):
        raise OptionError(f"`model` is {requested!r}; it must be a string.")
    body["model"], _ = served.resolve(requested)
    _, model, processor = original(body)  # may load the model again, with prompts of other names
    chosen.set(served.resolve(requested)[1])
    return requested or served.base, model, processor


def _add_routes(app: Any, model_manager: Any, generation_state: Any, served: ServedPrompts) -> None:
    from fastapi.responses import JSONResponse, PlainTextResponse

    async def refuse(_request: Any, error: SoftHooksError) -> Any:
        status, kind = (404, "NotFoundError") if isinstance(error, NotAttachedError) else (400, "BadRequestError")
        return JSONResponse({"error": {"message": str(error), "type": kind, "code": status}}, status_code=status)

    def list_models() -> Any:
        facts = {"object": "model", "created": 0, "owned_by": "", "root": served.base}
        data = [{"id": name, **facts, "parent": None if name == served.base else served.base} for name in served.ids()]
        return JSONResponse({"object": "list", "data": data})

    async def load(body: dict[str, Any]) -> Any:
        name = _name_in(body)
        await asyncio.to_thread(_load, model_manager, served, name)
        await asyncio.to_thread(served.detach, generation_state.uses)
        return PlainTextResponse(f"Success: the prompt {name!r} is served as {served.id_of(name)!r}.")

    async def unload(body: dict[str, Any]) -> Any:
        name = _name_in(body)
        served.retire(name)
        await asyncio.to_thread(generation_state.finish_earlier)
        while not await asyncio.to_thread(served.detach, generation_state.uses):
            await asyncio.sleep(_POLL)
        return PlainTextResponse(f"Success: the prompt {name!r} is no longer served.")

    app.add_exception_handler(SoftHooksError, refuse)
    app.add_api_route("/v1/models", list_models, methods=["GET", "OPTIONS"])
    app.add_api_route(LOAD, load, methods=["POST"])
    app.add_api_route(UNLOAD, unload, methods=["POST"])


def _load(model_manager: Any, served: ServedPrompts, name: str) -> None:
    model_manager.load_pinned()  # it may have been dropped by `/reset`
    served.load(name)


def _name_in(body: dict[str, Any]) -> str:
    name = body.get(_FIELD)
    if not isinstance(name, str) or set(body) != {_FIELD}:
        raise OptionError(
            f'the request must be {{"{_FIELD}": NAME}}.',
            "Prompts are loaded from the server's store, so a request names no path.",
            found=", ".join(map(repr, body)) or "nothing",
        )
    return name
