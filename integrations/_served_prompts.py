"""The prompts that a server offers on one base model: loaded, unloaded and looked up by name while the server runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from softhooks.errors import NameTakenError, NotAttachedError, OptionError, SoftHooksError
from softhooks.integration_support.serving import PromptStore, require_servable_together
from softhooks.load import load
from softhooks.prompt import SoftPrompt
from softhooks.switch import activate, disabled

T = TypeVar("T")

LOAD, UNLOAD = "/v1/load_soft_prompt", "/v1/unload_soft_prompt"
"""The paths of the requests that load and unload a prompt."""

DEFAULT = "default"
"""The name of the prompt that requests for the base model's own name use."""

chosen: ContextVar[str | None] = ContextVar("softhooks_served_prompt", default=None)
"""The prompt of the request that is being handled, by its name on the model; None for the bare model."""


class Turns:
    """A lock on the model that threads get in the order in which they ask, so that a busy batch does not keep others waiting."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._next = self._now = 0

    @contextmanager
    def take(self) -> Iterator[None]:
        """Run the model, or change its prompts, while no other thread does."""
        with self._condition:
            mine = self._next
            self._next += 1
            self._condition.wait_for(lambda: self._now == mine)
        try:
            yield
        finally:
            with self._condition:
                self._now += 1
                self._condition.notify_all()


class ServedPrompts:
    """The prompts of one server.

    Each loaded prompt has a name of its own on the model, so that a prompt can be replaced while requests still use the old one.

    Args:
        prompts: the prompts to serve from the start, by name.
        store: the store whose prompts are served, too, or None.
        tag: serve only the prompts of the store with this tag.
        strict: as in `softhooks.load`.

    Attributes:
        base: the server's name for the base model.
        batches: whether requests run in continuous batches.
        turns: the lock that steps of the model and changes of its prompts take.
        admission: a lock that is held while a request is added to a batch, and while a prompt is removed.
    """

    def __init__(
        self, prompts: Mapping[str, str | Path], store: PromptStore | None, tag: str | None, strict: bool
    ) -> None:
        self.base = ""
        self.batches = False
        self.turns = Turns()
        self.admission = threading.Lock()
        self.model: Any = None
        self._store = store
        self._strict = strict
        self._sources: dict[str, str | Path | None] = dict(prompts)  # None: the store
        for name in [] if store is None else store.names(tag):
            if name in self._sources:
                raise OptionError(
                    f"the prompt {name!r} is both given and in the store.", "Give one of them another name."
                )
            self._sources[name] = None
        self._served: dict[str, SoftPrompt] = {}
        self._retired: list[SoftPrompt] = []
        self._numbers = count(1)

    # --- look up ------------------------------------------------------------------------------------------------------

    def ids(self) -> list[str]:
        """List the model names that requests may use."""
        return [self.base, *(self.id_of(name) for name in sorted(self._served))]

    def id_of(self, name: str) -> str:
        """Return the model name that selects a prompt."""
        return f"{self.base}:{name}"

    def resolve(self, requested: str | None) -> tuple[str | None, str | None]:
        """Return the model name that transformers knows, and the prompt's name on the model.

        Raises:
            NotAttachedError: the server has no prompt with this name.
        """
        own, _, name = (requested or self.base).partition(f"{self.base}:")
        if own or not name:
            plain = self._served.get(DEFAULT) if requested in (None, self.base) else None
            return requested, None if plain is None else plain.name
        return self.base, self._require(name).name

    def _require(self, name: str) -> SoftPrompt:
        if name not in self._served:
            raise NotAttachedError(
                f"the server has no prompt named {name!r}.",
                f"Load it from the server's store with a POST request to {LOAD}, or use one of the models above."
                if self._store is not None
                else "Use one of these models.",
                models=", ".join(self.ids()),
            )
        return self._served[name]

    # --- load and unload ----------------------------------------------------------------------------------------------

    def attach_all(self, model: Any) -> None:
        """Load every prompt onto a model that was loaded just now."""
        self.model = model
        self._served, self._retired = {}, []
        for name, source in self._sources.items():
            self._served[name] = self._attach(name, source)

    def _attach(self, name: str, source: str | Path | None) -> SoftPrompt:
        """Load a prompt onto the model.

        Args:
            source: a directory or a repository on the Hub; None for the store.
        """
        own = f"{name}-{next(self._numbers)}"
        if source is not None:
            prompt = load(self.model, source, own, strict=self._strict)
        else:
            assert self._store is not None
            prompt = self._store.load(self.model, name, as_name=own, strict=self._strict)
        try:
            if self.batches:
                others = [served.name for served in self._served.values()]
                require_servable_together(prompt.prompted_model, [own, *others, None])
        except SoftHooksError:
            prompt.remove()
            raise
        return prompt

    def load(self, name: str) -> None:
        """Load a prompt from the store while the server runs.

        Raises:
            NameTakenError: the prompt is already served.
            SoftHooksError: there is no store, it has no such prompt, or the prompt does not fit the model.
        """
        if self._store is None:
            raise OptionError("the server has no store to load prompts from.", "Start it with `--store FOLDER`.")
        with self.turns.take():
            if name in self._served:  # perhaps by another request, while this one waited
                raise NameTakenError(
                    f"the server already serves a prompt named {name!r}.", "To replace it, unload it first.",
                    model=self.id_of(name),
                )  # fmt: skip
            with _plain_attention(self.model):
                self._served[name] = self._attach(name, None)
            self._sources[name] = None

    def retire(self, name: str) -> None:
        """Refuse new requests for a prompt; it stays on the model until `detach`.

        Raises:
            NotAttachedError: the server has no prompt with this name.
            OptionError: the prompt is the one that requests for the base model's own name use.
        """
        prompt = self._require(name)
        if name == DEFAULT:
            raise OptionError(
                f"the prompt {name!r} is used by requests for {self.base!r}, so it cannot be unloaded.",
                "Start the server with `--prompt NAME=DIR` instead of `--prompt DIR`.",
            )
        del self._served[name], self._sources[name]
        self._retired.append(prompt)

    def detach(self, is_used: Callable[[str], bool]) -> bool:
        """Remove the retired prompts that no request uses, and return whether no request uses a retired prompt any more.

        The last prompt on the model stays, because a batch that runs must keep the model's hooks.
        """
        with self.turns.take(), self.admission:
            for prompt in list(self._retired):
                if not is_used(prompt.name) and len(self._served) + len(self._retired) > 1:
                    prompt.remove()
                    self._retired.remove(prompt)
            return not any(is_used(prompt.name) for prompt in self._retired)

    # --- run ----------------------------------------------------------------------------------------------------------

    @property
    def is_prompted(self) -> bool:
        """Whether there is a prompt on the model."""
        return bool(self._served or self._retired)

    def run(self, name: str | None, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function that runs the model with one of its prompts, or without."""
        with self.turns.take():
            if name is not None:
                activate(self.model, name)
            elif self.is_prompted:
                with disabled(self.model):
                    return function(*args, **kwargs)
            return function(*args, **kwargs)


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """Let `attach` run a model that a continuous batch has switched to paged attention."""
    now = model.config._attn_implementation
    plain = str(now).removeprefix("paged|")
    if plain == now:
        yield
        return
    model.set_attn_implementation(plain)
    try:
        yield
    finally:
        model.set_attn_implementation(now)
