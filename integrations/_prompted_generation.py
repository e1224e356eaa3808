"""How `transformers serve` generates with the prompt of each request, one request after another or in continuous batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from softhooks.integration_support.serving import is_waited_for, remaining_tokens
from softhooks.integrations._served_prompts import ServedPrompts, chosen
from softhooks.switch import rows

_KEY = "the pinned model"


def prompted_state(utils: Any, served: ServedPrompts) -> Any:
    """Return a subclass of transformers' `GenerationState` whose managers use the prompt of each request."""
    one_by_one, in_batches = _one_by_one(utils.GenerateManager, served), _in_batches(utils.CBGenerateManager, served)

    class PromptedGenerationState(utils.GenerationState):
        """Has one manager for all prompts; turns off flash attention and CUDA graphs, unless they were requested."""

        _cb_manager: Any

        def __init__(self, continuous_batching: bool = False, cb_config: Any = None, **kwargs: Any) -> None:
            from transformers import ContinuousBatchingConfig

            if continuous_batching:
                cb_config = ContinuousBatchingConfig() if cb_config is None else cb_config
                cb_config.auto_switch_to_flash = False
                cb_config.use_cuda_graph = False if cb_config.use_cuda_graph is None else cb_config.use_cuda_graph
            super().__init__(continuous_batching=continuous_batching, cb_config=cb_config, **kwargs)

        def use_continuous_batching(self, model: Any, modality: Any) -> bool:
            # Requests can only choose a prompt in a batch that was started with one.
            return bool(super().use_continuous_batching(model, modality)) and served.is_prompted

        def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
            if not use_cb:
                if _KEY not in self._generate_managers:
                    self._generate_managers[_KEY] = one_by_one()  # starts a thread
                return self._generate_managers[_KEY]
            if self._cb_manager is None:
                self._cb_manager, self._cb_model_id = in_batches(cb_config=self._cb_config), _KEY
            return self._cb_manager

        def finish_earlier(self) -> None:
            """Wait until the requests that run one after another, and were made before now, have ended."""
            for manager in list(self._generate_managers.values()):
                manager.finish_earlier()

        def uses(self, name: str) -> bool:
            """Whether an unfinished request in a batch uses a prompt."""
            manager = None if self._cb_manager is None else self._cb_manager._cb
            return manager is not None and is_waited_for(manager, name)

    return PromptedGenerationState


def _one_by_one(base: Any, served: ServedPrompts) -> Any:
    class PromptedGenerateManager(base):
        """Runs each call with the prompt of its request."""

        def submit(self, function: Any, *args: Any, **kwargs: Any) -> Any:
            return super().submit(partial(served.run, chosen.get(), function), *args, **kwargs)

        def async_submit(self, function: Any, *args: Any, **kwargs: Any) -> Any:
            return super().async_submit(partial(served.run, chosen.get(), function), *args, **kwargs)

        def finish_earlier(self) -> None:
            super().submit(int).result()

    return PromptedGenerateManager


def _in_batches(base: Any, served: ServedPrompts) -> Any:
    class PromptedCBGenerateManager(base):
        """Adds each request with its prompt to the batch that all requests share."""

        _cb: Any

        def init_cb(self, model: Any, gen_config: Any) -> None:
            if self._cb is not None and self._cb.model is model:
                return
            with served.turns.take(), rows(model, [None]):
                if self._cb is not None:  # the model was loaded again
                    self._cb.stop(block=False)
                manager = model.init_continuous_batching(
                    generation_config=gen_config, continuous_batching_config=self._cb_config
                )
                manager._generation_step = _holding(served.turns.take, manager._generation_step)
                manager.add_request = _holding(lambda: served.admission, manager.add_request)
                manager.start()
                self._cb = manager

        def generate_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **options: Any
        ) -> Any:
            self._hold(request_id)
            with rows(model, [self._fit(model, inputs, gen_config)]):
                return super().generate_streaming(model, processor, inputs, gen_config, request_id, **options)

        def _hold(self, request_id: str) -> None:
            """Pass early tokens on to the handler that transformers registers after it has added the request."""
            router = self._cb.output_router
            own: list[Any] = []

            def pass_on(output: Any) -> None:
                found = router.result_handlers.get(request_id)
                if found is not None and found[0] is not own[0]:
                    found[0](output)

            self._cb.register_result_handler(request_id, pass_on)
            own.append(router.result_handlers[request_id][0])

        async def generate_non_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
        ) -> Any:
            name = self._fit(model, inputs, gen_config)
            with rows(model, [name]):
                return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)

        def _fit(self, model: Any, inputs: Any, gen_config: Any) -> str | None:
            """Limit the number of new tokens to the model's positions, because a text beyond them would end the whole batch."""
            name: str | None = chosen.get()
            room = remaining_tokens(model, name, len(inputs["input_ids"]))
            if room is not None:
                gen_config.max_new_tokens = min(gen_config.max_new_tokens or room, room)
            return name

    return PromptedCBGenerateManager


def _holding(lock: Callable[[], AbstractContextManager[Any]], function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that only one thread at a time runs it."""

    def held(*args: Any, **kwargs: Any) -> Any:
        with lock():
            return function(*args, **kwargs)

    return held
