"""What softhooks keeps on one model: the hooks, the prompts by name, and which of them is on.

One host serves all prompts of a model. Its hooks decide, forward by forward, which pass to open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from softhooks.anatomy import Anatomy, Stack, probe_ids
from softhooks.errors import NotAttachedError, PromptNotReachedError, UnsupportedModeError, explain
from softhooks.frozen import FrozenRecord
from softhooks.hooks import HeadHooks, StackHooks
from softhooks.inject.cross import strip_encoder_state
from softhooks.inject.entry import open_pass
from softhooks.inject.interface import close_interface, mark, open_interface, unmark
from softhooks.inject.passes import Pass
from softhooks.inject.provenance import require_encoded, require_own_cache
from softhooks.inject.slots import Slots

if TYPE_CHECKING:
    from softhooks.prompt import SoftPrompt

CONTAINER = "soft_prompt"
"""The name of the submodule that holds every prompt's parameters."""


_ABSENT = object()


class Container(nn.ModuleDict):
    """The one submodule that is added to a model: each prompt's encoder and heads, by name.

    Attributes:
        host: the host of the model; not a module, so not in the state dict.
    """

    host: Host

    def _apply(self, fn: Any, recurse: bool = True) -> Container:
        """Follow the model to another device, but stay in fp32: these are the master weights."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self


class Host:
    """The prompts of one model and the hooks that serve them.

    Args:
        model: the model as the user holds it.
        anatomy: what it is made of.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model = model
        self.anatomy = anatomy
        self.prompts: dict[str, SoftPrompt] = {}
        self.active: str | None = None
        self.rows: Sequence[str | None] | None = None
        self.repeats = 1  # how many rows of the batch each named row stands for: its beams or samples, in generate
        self.disabled = 0
        self.freeze_dropout = False
        self.was_trainable: dict[str, bool] = {}
        self.record: FrozenRecord | None = None
        self.placeholder = int(probe_ids(model, anatomy.vocabulary, columns=2)[0, 0])
        self._handles: list[Any] = []
        self._overridden: dict[str, Any] = {}
        self._reached = False
        self._batch = 0
        self._resting: list[nn.Module] = []

    # --- which prompts are on -----------------------------------------------------------------------------------------

    @property
    def is_on(self) -> bool:
        """Whether a forward now meets a prompt."""
        return not self.disabled and bool(self.prompts) and (self.rows is not None or self.active is not None)

    @property
    def is_in_use(self) -> bool:
        """Whether a forward now meets a prompt in some row."""
        return self.is_on and (self.rows is None or any(name is not None for name in self.rows))

    @property
    def enters_attention(self) -> bool:
        """Whether a prompt that is on enters as keys and values."""
        names = [self.active] if self.rows is None else self.rows
        return self.is_on and any(name is not None and self.prompts[name].injection != "slots" for name in names)

    def in_use(self, batch: int) -> tuple[list[SoftPrompt], Sequence[int | None] | None]:
        """The prompts of a forward, and for each row which of them; None where one serves all rows.

        Raises:
            UnsupportedModeError: other rows than the batch has were named.
            NotAttachedError: a prompt that was named has been removed.
        """
        if self.rows is None:
            assert self.active is not None
            return [self.prompts[self.active]], None
        if batch not in (len(self.rows), len(self.rows) * self.repeats):
            raise UnsupportedModeError(
                explain(
                    "`rows` must name one prompt for each row of the batch (in generate, beams and samples are their row's).",
                    "Name as many prompts as the batch has rows.",
                    rows=len(self.rows),
                    batch=batch,
                )
            )
        each = [name for name in self.rows for _ in range(batch // len(self.rows))]
        names = list(dict.fromkeys(name for name in each if name is not None))
        for name in names:
            if name not in self.prompts:
                raise NotAttachedError(
                    f"`rows` names {name!r}, which has been removed; it may name {list(self.prompts)}."
                )
        return [self.prompts[name] for name in names], [None if name is None else names.index(name) for name in each]

    # --- hooks --------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Register every hook and mark every attention site."""
        add = self._handles.append
        add(self.model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        for stack in self.anatomy.stacks:
            stack.owner = self
            hooks = StackHooks(self, stack)
            add(stack.module.register_forward_pre_hook(hooks.enter, with_kwargs=True))
            add(stack.module.register_forward_hook(hooks.leave, always_call=True))
            add(stack.embedding.register_forward_hook(hooks.embed))
            pooler = getattr(stack.module, "pooler", None)
            if isinstance(pooler, nn.Module):
                add(pooler.register_forward_pre_hook(hooks.pool))
        add(self.model.register_forward_hook(self._leave_model, with_kwargs=True))
        mark(self.anatomy.stacks)
        open_interface(self, (m for stack in self.anatomy.stacks for m in stack.module.modules()))

    def add_head(self, path: str) -> None:
        """Let the prompts' own heads answer in the place of one of the model's."""
        hooks = HeadHooks(self, path.replace(".", "/"))
        self._handles.append(self.model.get_submodule(path).register_forward_hook(hooks.answer, with_kwargs=True))

    def keep(self, handle: Any) -> None:
        """Remove a hook of the model with the last prompt."""
        self._handles.append(handle)

    def override(self, attribute: str, value: Any) -> None:
        """Set an attribute on the model's instance until the last prompt is removed."""
        self._overridden.setdefault(attribute, self.model.__dict__.get(attribute, _ABSENT))
        self.model.__dict__[attribute] = value

    def uninstall(self) -> None:
        """Take every hook and mark away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for attribute, value in self._overridden.items():
            if value is _ABSENT:
                self.model.__dict__.pop(attribute, None)
            else:
                self.model.__dict__[attribute] = value
        self._overridden.clear()
        for stack in self.anatomy.stacks:
            stack.owner = None
        unmark(self.anatomy.stacks)
        close_interface(self)

    @property
    def _inside(self) -> bool:
        """Whether a forward of a stack is under way: where the model is the stack, the prompt's own rows come by here."""
        return any(stack.live is not None for stack in self.anatomy.stacks)

    @property
    def selection(self) -> str:
        """The prompts that are on, in words: one for all rows, or one a row."""
        names = [self.active] if self.rows is None else list(self.rows)
        return repr(names[0] if len(set(names)) == 1 else names)

    def _enter_model(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if self._inside:
            return
        self._reached = False
        if self.is_in_use and kwargs.get("encoder_outputs") is not None:
            require_encoded(kwargs["encoder_outputs"], self.selection)

    def _leave_model(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not self.is_on or self._inside:
            return None
        if not self._reached:
            raise PromptNotReachedError(
                explain(
                    "every forward of a model with a prompt must go through the prompt.",
                    "Call the model with `input_ids` or `inputs_embeds`, or turn the prompt off with "
                    "`softhooks.disabled(model)`.",
                    model=type(self.model).__name__,
                    stacks=", ".join(stack.path or "the model itself" for stack in self.anatomy.stacks),
                )
            )
        if self.anatomy.is_encoder_decoder and self._batch:
            prompts, rows = self.in_use(self._batch)
            if prompts and prompts[0].injection == "slots":
                slots = Slots([prompt.embeddings() for prompt in prompts], rows, prompts[0].placement)
                return strip_encoder_state(output, self.anatomy.entry, slots, kwargs.get("attention_mask"))
        return None

    def reached(self, batch: int) -> None:
        """Note that a pass of this forward put a prompt in."""
        self._reached = True
        self._batch = batch

    # --- passes -------------------------------------------------------------------------------------------------------

    def open(self, stack: Stack, call: dict[str, Any]) -> Pass | None:
        """Open the pass of a forward of a stack, if a prompt is on."""
        require_own_cache(call.get("past_key_values"), self.selection if self.is_in_use else None)
        if not self.is_on:
            return None
        text = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
        batch = text.shape[0] if isinstance(text, Tensor) else 0
        prompts, rows = self.in_use(batch)
        self.reached(batch)
        if not prompts:
            return None
        if self.freeze_dropout:
            self._rest(stack)
        try:
            return open_pass(stack, call, prompts, rows, self.placeholder)
        except BaseException:
            self.wake()
            raise

    def _rest(self, stack: Stack) -> None:
        self._resting = [module for module in stack.module.modules() if module.training]
        for module in self._resting:
            module.training = False

    def wake(self) -> None:
        """Put a backbone that was set to rest back into training mode."""
        for module in self._resting:
            module.training = True
        self._resting = []
