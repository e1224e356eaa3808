"""The prompt of each request of a continuous batch.

A request uses the prompt that `softhooks.rows` selects where the request is added; without `rows`, the prompt that was active
where the manager was made. The name travels with the request, also if transformers forks it, or runs it again after it ran out of
memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from threading import local
from typing import Any
from weakref import WeakKeyDictionary

from softhooks.errors import OptionError, UnsupportedModeError
from softhooks.runtime.attached_prompt import AttachedPrompt
from softhooks.runtime.prompted_model import PromptedModel
from softhooks.runtime.servable import require_servable_together
from softhooks.runtime.with_blocks import Block

_ATTRIBUTE = "_softhooks_requests"
_STRIDE = 2**20  # more than any vocabulary
_MOST_SALTS = 2**31 // _STRIDE - 1


class _NamedOptions(dict[str, Any]):
    """The options of a request's logits processors, which transformers copies with the request, with the name of its prompt."""

    softhooks_prompt: str | None = None


class RequestPrompts:
    """The prompts of the requests of one manager of continuous batching.

    Args:
        prompted: the model's prompts.
        manager: transformers' `ContinuousBatchingManager`, whose methods are replaced.

    Attributes:
        default: the name of the prompt of requests that are added outside of `rows`, or None.
        by_request: whether any request was added inside `rows`. Until then, forwards run as with a single prompt.
    """

    def __init__(self, prompted: PromptedModel, manager: Any) -> None:
        self.prompted = prompted
        self.default = None if prompted.disabled else prompted.active
        self.by_request = prompted.rows is not None
        self._names: set[str | None] = set() if self.by_request else {self.default}
        self._adding = local()
        self._unfinished: dict[str, str | None] = {}
        self._cancelled: set[str] = set()
        self._salts: WeakKeyDictionary[AttachedPrompt, int] = WeakKeyDictionary()
        self._unused_salts = count(2)
        kind = type(manager)
        manager.add_request = partial(self._add_request, kind.add_request.__get__(manager, kind))
        manager.add_requests = partial(self._add_requests, kind.add_requests.__get__(manager, kind))
        manager.cancel_request = partial(self._cancel, kind.cancel_request.__get__(manager, kind))
        router = manager.output_router
        router.deliver = partial(self._deliver, type(router).deliver.__get__(router, type(router)))
        router.deliver_batch = partial(self._deliver_batch, type(router).deliver_batch.__get__(router, type(router)))
        queue = manager.input_queue
        queue.put = partial(self._put, type(queue).put.__get__(queue, type(queue)))
        create = kind._create_batch_processor.__get__(manager, kind)
        manager._create_batch_processor = partial(self._create_processor, create)
        setattr(manager, _ATTRIBUTE, self)

    # --- adding requests ----------------------------------------------------------------------------------------------

    def _add_requests(
        self, original: Callable[..., Any], inputs: Sequence[list[int]], *args: Any, **kwargs: Any
    ) -> Any:
        rows = self.prompted.rows
        if rows is None:
            return original(inputs, *args, **kwargs)
        require_name_each(rows, len(inputs))
        self._use(rows)
        own = [list(ids) for ids in inputs]  # transformers sorts them; the names are found again by the list object
        self._adding.names = {id(ids): name for ids, name in zip(own, rows, strict=True)}
        try:
            return original(own, *args, **kwargs)
        finally:
            self._adding.names = None

    def _add_request(self, original: Callable[..., Any], input_ids: list[int], *args: Any, **kwargs: Any) -> Any:
        rows, names = self.prompted.rows, getattr(self._adding, "names", None)
        if names is None and rows is not None and len(rows) != 1:
            raise OptionError(
                f"`rows` names {len(rows)} prompts for one request; name one.",
                "Add each request inside its own `with softhooks.rows(model, [name])`, or all with `add_requests`.",
            )
        if rows is None:
            if self.by_request:
                self._use([self.default])
            return original(input_ids, *args, **kwargs)
        name = rows[0] if names is None else names[id(input_ids)]
        self._use([name])
        self._adding.name = name
        try:
            return original(input_ids, *args, **kwargs)
        finally:
            del self._adding.name

    def _use(self, names: Sequence[str | None]) -> None:
        """Check that the prompts can share batches with those of all other requests."""
        present = {name for name in self._names if name is None or name in self.prompted.prompts}
        require_servable_together(self.prompted, [*present, *names])
        self._names = present | {*names}
        self.by_request = True

    def _put(self, original: Callable[..., Any], state: Any, *args: Any, **kwargs: Any) -> None:
        options = state.logit_processor_kwargs = _NamedOptions(state.logit_processor_kwargs)
        options.softhooks_prompt = getattr(self._adding, "name", self.default)
        self._unfinished[state.request_id] = self.name_of(state)
        try:
            original(state, *args, **kwargs)
        except BaseException:  # the queue is full
            del self._unfinished[state.request_id]
            raise

    def name_of(self, state: Any) -> str | None:
        """Return the name of a request's prompt, or None if it uses none."""
        name: str | None = state.logit_processor_kwargs.softhooks_prompt
        return name

    # --- unfinished requests ------------------------------------------------------------------------------------------

    def _cancel(self, original: Callable[..., Any], request_id: str) -> None:
        self._cancelled.add(request_id)
        self._unfinished.pop(request_id, None)
        original(request_id)

    def _deliver(self, original: Callable[..., Any], output: Any) -> None:
        self._note_end([output])
        original(output)

    def _deliver_batch(self, original: Callable[..., Any], outputs: Sequence[Any]) -> None:
        self._note_end(outputs)
        original(outputs)

    def _note_end(self, outputs: Sequence[Any]) -> None:
        for output in outputs:
            if output.error is not None or output.is_finished():
                self._unfinished.pop(output.request_id, None)

    def is_waited_for(self, processor: Any, name: str) -> bool:
        """Whether there are unfinished requests with a prompt, or forks of them, apart from cancelled ones."""
        scheduler = None if processor is None else processor.scheduler
        held = [] if scheduler is None else [scheduler.active_requests, scheduler.waiting_requests]
        states = [state for states in held for state in list(states.values())]
        own = {self.name_of(state) for state in states if state.request_id not in self._cancelled}
        return name in own or name in list(self._unfinished.values())

    # --- running batches ----------------------------------------------------------------------------------------------

    def _create_processor(self, original: Callable[..., Any]) -> Any:
        processor = original()
        kind = type(processor)
        processor._generation_step = partial(self._step, processor, kind._generation_step.__get__(processor, kind))
        cache = processor.cache
        if getattr(cache, "use_prefix_sharing", False):
            self._separate_blocks(processor, cache)
        return processor

    def _step(self, processor: Any, original: Callable[..., Any], *args: Any) -> Any:
        if not self.by_request:
            return original(*args)
        requests = _requests_in(processor.inputs_and_outputs)
        names = [self.name_of(request.state) for request in requests]
        if self._cancelled:
            names = self._without_cancelled(requests, names, processor.scheduler)
        lengths = [request.query_length for request in requests]
        with Block(self.prompted.model, rows=names, lengths=lengths):
            return original(*args)

    def _without_cancelled(self, requests: Sequence[Any], names: list[str | None], scheduler: Any) -> list[str | None]:
        """Run cancelled requests whose prompt has been removed without it; forget those that have left."""
        ids = [request.state.request_id for request in requests]
        present = {*ids, *scheduler.active_requests, *scheduler.waiting_requests}
        self._cancelled = gone = {one for one in self._cancelled if one in present}
        prompts = self.prompted.prompts
        return [None if one in gone and name not in prompts else name for one, name in zip(ids, names, strict=True)]

    # --- blocks that requests share -----------------------------------------------------------------------------------

    def _separate_blocks(self, processor: Any, cache: Any) -> None:
        """Let only requests with the same prompt share cached blocks, which transformers finds by their token ids."""
        kind = type(cache)
        cache.search_prefix_match = partial(self._search, processor, kind.search_prefix_match.__get__(cache, kind))
        mark = "mark_complete_blocks" if hasattr(kind, "mark_complete_blocks") else "mark_shareable_blocks_as_complete"
        setattr(cache, mark, partial(self._mark, getattr(kind, mark).__get__(cache, kind)))

    def _search(self, processor: Any, original: Callable[..., Any], request_id: str, prompt_ids: list[int]) -> Any:
        scheduler = processor.scheduler
        state = scheduler.waiting_requests.get(request_id) or scheduler.active_requests.get(request_id)
        salt = None if state is None else self._salt(state)
        return 0 if salt is None else original(request_id, _salted(prompt_ids, salt))

    def _mark(self, original: Callable[..., Any], state: Any, *args: Any) -> Any:
        salt = self._salt(state)
        if salt is None:
            return None
        own = copy.copy(state)
        own.initial_tokens = _salted(state.initial_tokens, salt)
        return original(own, *args)

    def _salt(self, state: Any) -> int | None:
        """Return a number for a request's prompt; None if there are too many prompts, so that its blocks are not shared."""
        name = self.name_of(state)
        if name == self.default:
            return 0
        if name is None:
            return 1
        prompt = self.prompted.prompts.get(name)
        if prompt is None:
            return None
        if prompt not in self._salts:
            self._salts[prompt] = next(self._unused_salts)
        return self._salts[prompt] if self._salts[prompt] <= _MOST_SALTS else None


def is_waited_for(manager: Any, name: str) -> bool:
    """Whether a manager has unfinished requests with a prompt, apart from cancelled ones."""
    prompts: RequestPrompts = getattr(manager, _ATTRIBUTE)
    return prompts.is_waited_for(manager.batch_processor, name)


def require_name_each(names: Sequence[str | None], requests: int) -> None:
    """Raise an `UnsupportedModeError` if there is not one name for each request."""
    if len(names) != requests:
        raise UnsupportedModeError(
            f"`rows` names {len(names)} prompts for {requests} requests; name one prompt for each request."
        )


def _salted(ids: list[int], salt: int) -> list[int]:
    """Replace the first id, on which the hash of every block depends, by one that no other prompt's requests have."""
    return [-1 - ids[0] - _STRIDE * salt, *ids[1:]] if salt and ids else ids


def _requests_in(batch: Any) -> Sequence[Any]:
    """Return the requests of the batch that is about to run, in order."""
    pairs = getattr(batch, "io_pairs", None)
    found: Sequence[Any] = (batch if pairs is None else pairs[batch.current_pair].host_io).requests_in_batch
    return found
