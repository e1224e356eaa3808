"""What softhooks keeps on one model: the hooks, the prompts by name, and which of them is on.

One object serves all prompts of a model. Its hooks decide, forward by forward, which pass to open.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softhooks.backbone.attention_interface import close_interface, files_of, mark, open_interface, unmark
from softhooks.backbone.container import CONTAINER, Container, is_prompt_key
from softhooks.backbone.probe_inputs import ordinary_ids
from softhooks.backbone.stack import ModelStructure, Stack
from softhooks.base_model.digest import FrozenRecord
from softhooks.base_model.fingerprint import Fingerprint
from softhooks.base_model.gradients import SetAside
from softhooks.compat.peft import unwrapped
from softhooks.errors import NotAttachedError, UnsupportedModeError
from softhooks.inject.provenance import Provenance, token_of
from softhooks.inject.replaced_modules import Standing, entered
from softhooks.patching.patches import Patches
from softhooks.runtime.added_token_hooks import AddedHooks
from softhooks.runtime.arguments import TAKEN_BY, SignedForward, refuse_unused
from softhooks.runtime.contexts import choice_of, repeats_of
from softhooks.runtime.continuous_batching import watch_batching
from softhooks.runtime.copying import reopen, state_of
from softhooks.runtime.direct_forward import DirectForward
from softhooks.runtime.generate import watch_generate
from softhooks.runtime.hooks import HeadHooks, ModelHooks, StackHooks
from softhooks.runtime.label_names import LabelNames
from softhooks.runtime.recomputed_forward import Met
from softhooks.runtime.running import Running
from softhooks.runtime.selection import Selection, select
from softhooks.runtime.training_loop import unwatch_steps, watch_steps

if TYPE_CHECKING:
    from softhooks.runtime.attached_prompt import AttachedPrompt


class PromptedModel:
    """The prompts of one model and the hooks that serve them.

    Args:
        model: the model as the user holds it.
        structure: what it is made of.
    """

    def __init__(self, model: nn.Module, structure: ModelStructure) -> None:
        self.model = model
        self.structure = structure
        self.prompts: dict[str, AttachedPrompt] = {}
        self.labels = LabelNames(self)
        self.running = Running()
        self.met = Met()
        self._active: str | None = None
        self.freeze_dropout = False
        self.was_trainable: dict[str, bool] = {}
        self.set_aside = SetAside()
        self.token = token_of(model)
        self._standing = {stack.name: Standing(entered(stack)) for stack in structure.stacks}
        self._answering = Standing()  # heads, which stand outside of the stacks
        self.record: FrozenRecord | None = None
        self.fingerprint: Fingerprint | None = None  # of the base when the first prompt came, before it may be sharded
        self.noted: dict[str, Tensor] | None = None  # the shapes of the last state dict with prompts that was loaded
        self.placeholder = ordinary_ids(model, structure.entry, structure.vocabulary)[0]
        self.outermost = ModelHooks(self)
        self._handles: list[Any] = []
        self._embedding: list[tuple[Stack, StackHooks, Any]] = []
        self._added: AddedHooks | None = None
        self.patches = Patches()
        self._stays: list[Any] = []
        self._files: frozenset[str] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        return state_of(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._files:
            reopen(self, self._files)

    # --- which prompts are on -----------------------------------------------------------------------------------------

    @property
    def active(self) -> str | None:
        """The prompt that is on where no row names another; the model's config shows its labels' names."""
        alone = choice_of(self.model).alone
        return self._active if alone is None else alone

    @active.setter
    def active(self, name: str | None) -> None:
        self._active = name
        self.labels.show()

    @property
    def rows(self) -> Sequence[str | None] | None:
        """One prompt name a row, in this thread or task."""
        return choice_of(self.model).rows

    @property
    def disabled(self) -> bool:
        """Whether every prompt is off, in this thread or task."""
        return choice_of(self.model).off

    @property
    def given(self) -> dict[str, Tensor]:
        """The extra arguments of this thread's forward that is under way."""
        forward = self.running.forward
        return {} if forward is None else forward.given

    @property
    def is_on(self) -> bool:
        """Whether a forward now meets a prompt."""
        rows, off, alone = choice_of(self.model)
        return not off and bool(self.prompts) and (rows is not None or alone is not None or self._active is not None)

    @property
    def is_in_use(self) -> bool:
        """Whether a forward now meets a prompt in some row."""
        rows, off, alone = choice_of(self.model)
        if off or not self.prompts:
            return False
        if rows is not None:
            return any(name is not None for name in rows)
        return alone is not None or self._active is not None

    def in_use(self, batch: int, given: dict[str, Tensor] | None = None) -> Selection:
        """The prompts of a forward, and for each row which of them.

        Args:
            batch: the number of rows.
            given: the extra arguments; None: those of the model's forward that is under way.

        Raises:
            UnsupportedModeError: other rows than the batch has were named.
            NotAttachedError: a prompt that was named has been removed.
        """
        given, rows = self.given if given is None else given, self.rows
        if rows is None:
            return select(self.prompts, [self.active], batch, given)
        forward = self.running.forward
        named = len(rows) * (1 if forward is None else forward.choices)
        if batch not in (named, named * repeats_of(self.model)):
            raise UnsupportedModeError(
                "`rows` must name one prompt for each row of the batch (in generate, beams and samples are their row's).",
                "Name as many prompts as the batch has rows.",
                rows=len(rows),
                batch=batch,
            )
        each = [name for name in rows for _ in range(batch // len(rows))]
        return select(self.prompts, each, batch, given)

    # --- hooks --------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Register every hook and mark every attention site."""
        add = self._handles.append
        add(self.model.register_forward_pre_hook(self.outermost.enter, with_kwargs=True))
        for stack in self.structure.stacks:
            stack.state.owner = self
            hooks = StackHooks(self, stack)
            add(stack.module.register_forward_pre_hook(hooks.enter, with_kwargs=True))
            add(stack.module.register_forward_hook(hooks.leave, always_call=True))
            self._embedding.append((stack, hooks, stack.embedding.register_forward_hook(hooks.embed)))
            pooler = getattr(stack.module, "pooler", None)
            if stack.pooled is not None:
                add(stack.pooled.register_forward_hook(hooks.unslot))
            elif isinstance(pooler, nn.Module):
                add(pooler.register_forward_pre_hook(hooks.pool))
        add(self.model.register_load_state_dict_pre_hook(self._note))
        add(self.model.register_forward_hook(self.outermost.leave, with_kwargs=True, always_call=True))
        mark(self.structure.stacks)
        watch_batching(self)
        watch_generate(self)
        self._files = files_of(m for stack in self.structure.stacks for m in stack.module.modules())
        open_interface(self, self._files)
        watch_steps(self)

    def add_head(self, path: str) -> None:
        """Let the prompts' own heads answer in the place of one of the model's."""
        hooks, head = HeadHooks(self, path.replace(".", "/")), self.model.get_submodule(path)
        self._handles.append(head.register_forward_hook(hooks.answer, with_kwargs=True))
        self._answering.add([head])

    def add_tokens(self) -> None:
        """Let the prompts' own rows of the vocabulary stand in the place of the model's."""
        if self._added is None:
            self._added = AddedHooks(self)
            self._answering.add([] if self._added.head is None else [self._added.head])

    def require_standing(self) -> None:
        """Check that the heads that prompts answer for are the model's still, while a prompt is in use.

        Raises:
            UnsupportedModeError: one has been replaced.
        """
        if self.is_in_use:
            self._answering.check(self.model)

    def require_place_of(self, stack: Stack) -> None:
        """Check that the modules of a stack that prompts enter at are the model's still.

        Raises:
            UnsupportedModeError: one has been replaced.
        """
        self._standing[stack.name].check(stack.module)

    def watch_parts(self, stack: Stack, modules: Iterable[nn.Module]) -> None:
        """Refuse forwards in which one of a stack's modules has been replaced."""
        self._standing[stack.name].add(modules)

    def keep(self, handle: Any, *, is_copied: bool = True) -> None:
        """Remove a hook with the last prompt.

        Args:
            is_copied: whether copies and pickles of the model have it too; False for what hangs on something else: a Trainer's
                logs, an optimizer, an Accelerator.
        """
        (self._handles if is_copied else self._stays).append(handle)

    def _note(self, _model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        """Remember what was loaded, for a callback that meets the model only afterwards; of weights only the shapes."""
        if not prefix and any(is_prompt_key(key) for key in state):
            self.noted = {key: v if v.dtype == torch.uint8 else v.to("meta") for key, v in state.items()}

    def override(self, attribute: str, value: Any, module: nn.Module | None = None) -> None:
        """Set an attribute on the instance of the model, or of a module of it, until the last prompt is removed."""
        self.patches.set(self.model if module is None else module, attribute, value)

    def restore(self, attribute: str) -> None:
        """Take back what was set last on the instance of the model under a name, if anything was."""
        self.patches.restore(self.model, attribute)

    def sign(self) -> None:
        """Let the signature of the model's forward name the columns that its prompts take."""
        signed = []
        for module in {id(m): m for m in (self.model, unwrapped(self.model))}.values():
            known = getattr(module.__dict__.get("forward"), "names", ())
            new = [name for name in self.columns if name not in known]
            if new:
                signed.append((module, SignedForward(module, new, self.accepted)))  # raises where it cannot
        for module, forward in signed:
            self.override("forward", forward, module)

    def heed_direct_calls(self) -> None:
        """Let callers of `model.forward`, who go past every hook, meet the prompts like callers of the model."""
        if not any(isinstance(value, DirectForward) for value in self.patches.values()):
            direct = DirectForward(self.model)
            self.override("forward", direct)
            self.keep(self.model.register_forward_pre_hook(direct.enter))
            self.keep(self.model.register_forward_hook(direct.leave, always_call=True))

    @property
    def columns(self) -> tuple[str, ...]:
        """The extra arguments that the model's prompts take."""
        return tuple(dict.fromkeys(name for prompt in self.prompts.values() for name in prompt.method.columns))

    def accepted(self) -> tuple[str, ...]:
        """Those that a call may bring now: of the prompts in use, or of all where none is, for the same batch is run bare too."""
        names = dict.fromkeys([self.active] if self.rows is None else self.rows) if self.is_in_use else self.prompts
        used = [self.prompts[name] for name in names if name in self.prompts]
        return tuple(dict.fromkeys(name for prompt in used for name in prompt.method.columns))

    def refuse_unused(self, call: dict[str, Any], own: Sequence[str] = ()) -> None:
        """Refuse columns in a call that no prompt in use takes. See `softhooks.runtime.arguments.refuse_unused`."""
        columns = self.columns
        if (TAKEN_BY.keys().isdisjoint(call) and call.keys().isdisjoint(columns)) or not self.is_in_use:
            return
        model = inspect.signature(type(unwrapped(self.model)).forward).parameters if call.keys() & TAKEN_BY else {}
        refuse_unused(call, self.accepted(), columns, (*own, *model))

    def embed_last(self) -> None:
        """Put a prompt's rows in after everybody else's hooks on the embedding, such as NEFTune's noise."""
        for number, (stack, hooks, handle) in enumerate(self._embedding):
            handle.remove()
            self._embedding[number] = (stack, hooks, stack.embedding.register_forward_hook(hooks.embed))

    def uninstall(self) -> None:
        """Take every hook and mark away."""
        for _, _, handle in self._embedding:
            handle.remove()
        self._embedding.clear()
        for handle in (*self._handles, *self._stays):
            handle.remove()
        self._handles.clear()
        self._stays.clear()
        self._files = frozenset()
        self.patches.undo()
        for stack in self.structure.stacks:
            stack.state.owner = None
        unmark(self.structure.stacks)
        close_interface(self)
        unwatch_steps(self)

    @property
    def is_own_call(self) -> bool:
        """Whether the call that begins is of the prompt's own rows: where the model is the stack, they come by the model."""
        return any(
            live is not None and not live.entered for live in (stack.state.current for stack in self.structure.stacks)
        )

    @property
    def selection(self) -> str:
        """The prompts that are on, in words: one for all rows, or one a row."""
        names = [self.active] if self.rows is None else list(self.rows)
        return repr(names[0] if len(set(names)) == 1 else names)

    def made(self, selection: Selection | None = None) -> Provenance:
        """The state of the prompts that are on, for a note on what a forward makes with them.

        Args:
            selection: which row meets which, if that is known.
        """
        names = dict.fromkeys([self.active] if self.rows is None else self.rows)
        on = tuple((name, self.prompts[name].snapshot()) for name in names if name)
        return Provenance(self.selection, self.token, on, None if selection is None else selection.variants)


def prompted_model_of(model: nn.Module) -> PromptedModel | None:
    """The state of a model's prompts, if it has any; also through `torch.compile`, a wrapper's `module` and a sentence model."""
    for holder in (model, *(getattr(model, inside, None) for inside in ("_orig_mod", "module", "transformers_model"))):
        container = holder._modules.get(CONTAINER) if isinstance(holder, nn.Module) else None
        if isinstance(container, Container):
            prompted: PromptedModel = container.prompted_model
            return prompted
    return None


def require_prompted_model(model: nn.Module, name: str | None = None) -> PromptedModel:
    """The state of a model that must carry a prompt.

    Raises:
        NotAttachedError: it carries none, or none of that name.
    """
    prompted = prompted_model_of(model)
    if prompted is None:
        raise NotAttachedError(f"{type(model).__name__} carries no prompt; attach or load one first.")
    if name is not None and name not in prompted.prompts:
        raise NotAttachedError(
            "a prompt must be attached before it is used.",
            "Load it under this name first.",
            asked=repr(name),
            attached=", ".join(map(repr, prompted.prompts)),
        )
    return prompted
