"""The prompts of a model: all prompts by name, the active prompts, and the hooks and patches on the model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from softhooks.backbone import attention_interface
from softhooks.backbone.container import CONTAINER, Container, is_prompt_key
from softhooks.backbone.probe_inputs import ordinary_ids
from softhooks.backbone.stack import ModelStructure
from softhooks.base_model.fingerprint import Fingerprint
from softhooks.base_model.frozen_record import FrozenRecord
from softhooks.base_model.gradients import StashedGradients
from softhooks.compat.peft import unwrapped
from softhooks.errors import NotAttachedError, UnsupportedModeError
from softhooks.inject.provenance import Provenance, token_of
from softhooks.inject.replaced_modules import ExpectedModules, modules_entered
from softhooks.method import COLUMN_METHODS
from softhooks.patching.patches import Patches
from softhooks.runtime.arguments import refuse_unused
from softhooks.runtime.attached_prompt import AttachedPrompt
from softhooks.runtime.label_names import LabelNames
from softhooks.runtime.optimizer_check import checked_models
from softhooks.runtime.running import RunningCalls
from softhooks.runtime.selection import RecomputeCheck, Selection, select_requests, select_rows
from softhooks.runtime.with_blocks import choice_of, repeats_of


class PromptedModel:
    """The prompts of one model. The hooks that `softhooks.runtime.install` registers read this state.

    Args:
        model: the model that was passed to `attach`.
        structure: its stacks, embeddings and attention layers.

    Attributes:
        prompts: the attached prompts, by name.
        labels: the label names in the model's config.
        running: the calls that are running on the model.
        recompute_check: checks that a forward that is recomputed in the backward uses the same prompts as in its first run.
        freeze_dropout: whether the stacks run without dropout in training.
        was_trainable: `requires_grad` of every parameter before the first prompt was attached.
        stashed_gradients: the gradients that parameters had before they were frozen.
        token: a unique id of the model, stored on caches to recognize those of other models.
        record: the digests of the frozen tensors, if they were computed.
        fingerprint: the fingerprint of the base model, computed when the first prompt was attached, before any sharding.
        loaded_state: the last loaded state dict that contains prompts, with its weights on the meta device.
        placeholder_id: the id of an ordinary token.
        patches: hooks and attributes on the model, removed with the last prompt. A copy of the model has them too.
        outside_patches: patches on other objects (an optimizer, a Trainer's logs). A copy of the model does not have them.
        embedding_hooks: the hooks that insert virtual tokens into the embeddings.
        files: the names of the Python modules with the model's attention functions; empty if no hooks are installed.
        expected_modules: for each stack, the modules that prompts need; a forward raises an error if one was replaced.
        expected_heads: the heads that prompts have copies of; a forward raises an error if one was replaced.
        has_added_tokens: whether the hooks on the embeddings of added tokens are installed.
    """

    def __init__(self, model: nn.Module, structure: ModelStructure) -> None:
        self.model = model
        self.structure = structure
        self.prompts: dict[str, AttachedPrompt] = {}
        self.labels = LabelNames(model, self.prompts)
        self.running = RunningCalls()  # also knows the active prompt
        self.recompute_check = RecomputeCheck()
        self.freeze_dropout = False
        self.was_trainable: dict[str, bool] = {}
        self.stashed_gradients = StashedGradients()
        self.token = token_of(model)
        self.record: FrozenRecord | None = None
        self.fingerprint: Fingerprint | None = None
        self.loaded_state: dict[str, Tensor] | None = None
        self.placeholder_id = ordinary_ids(model, structure.entry, structure.vocabulary)[0]
        self.patches = Patches()
        self.outside_patches = Patches()
        self.embedding_hooks: list[RemovableHandle] = []
        self.has_added_tokens = False
        self.files: frozenset[str] = frozenset()
        self.expected_modules = {stack.name: ExpectedModules(modules_entered(stack)) for stack in structure.stacks}
        self.expected_heads = ExpectedModules()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle."""
        return self.__dict__ | {"outside_patches": Patches()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.files:
            self.join_shared_patches()

    def join_shared_patches(self) -> None:
        """Start using the process-wide patches: wrapped attention functions, and a hook on optimizer steps."""
        # A copy calls this before its model is complete, perhaps in another process, so import the modules by name.
        for name in self.files:
            with suppress(ImportError):
                import_module(name)
        attention_interface.users.add(self, self.files)
        checked_models.add(self)

    def leave_shared_patches(self) -> None:
        """Stop using the process-wide patches."""
        self.files = frozenset()
        attention_interface.users.discard(self)
        checked_models.discard(self)

    # --- the selected prompts -----------------------------------------------------------------------------------------

    @property
    def active(self) -> str | None:
        """The name of the active prompt outside of `softhooks.rows`. Setting it updates the label names in the model's config.

        A forward that is running in another thread keeps the prompt with which it began.
        """
        only = choice_of(self.model).only
        return self.running.active_here if only is None else only

    @active.setter
    def active(self, name: str | None) -> None:
        self.running.activate(name)
        self.show_labels()

    @property
    def rows(self) -> Sequence[str | None] | None:
        """The name of each row's prompt in `softhooks.rows`, or None outside it."""
        return choice_of(self.model).rows

    @property
    def disabled(self) -> bool:
        """Whether `softhooks.disabled` has turned off all prompts."""
        return choice_of(self.model).off

    @property
    def given(self) -> dict[str, Tensor]:
        """The extra arguments of the forward that is running in this thread."""
        forward = self.running.forward
        return {} if forward is None else forward.given

    @property
    def is_on(self) -> bool:
        """Whether prompts are on. True in `softhooks.rows` even if no row has a prompt."""
        rows, off, only, _ = choice_of(self.model)
        return (
            not off
            and bool(self.prompts)
            and (rows is not None or only is not None or self.running.active_here is not None)
        )

    @property
    def is_in_use(self) -> bool:
        """Whether a forward would use a prompt for at least one row."""
        rows, off, only, _ = choice_of(self.model)
        if off or not self.prompts:
            return False
        if rows is not None:
            return any(name is not None for name in rows)
        return only is not None or self.running.active_here is not None

    def select(self, batch: int, given: dict[str, Tensor] | None = None) -> Selection:
        """Select the prompt of each row of a batch.

        Args:
            batch: the number of rows.
            given: the extra arguments; None means those of the running forward.

        Raises:
            UnsupportedModeError: the number of names in `rows` does not match the batch size.
            NotAttachedError: `rows` names a prompt that has been removed.
        """
        given, choice = self.given if given is None else given, choice_of(self.model)
        rows = choice.rows
        if rows is None:
            return select_rows(self.prompts, [self.active], batch, given)
        if choice.lengths is not None:
            return select_requests(self.prompts, rows, choice.lengths, given)
        forward = self.running.forward
        named = len(rows) * (1 if forward is None else forward.choices)
        if batch not in (named, named * repeats_of(self.model)):
            raise UnsupportedModeError(
                f"`rows` names {len(rows)} prompts for a batch of {batch} rows; name one prompt for each row.",
                "In `generate`, name one prompt for each row of the input, however many beams or samples it has.",
            )
        each = [name for name in rows for _ in range(batch // len(rows))]
        return select_rows(self.prompts, each, batch, given)

    @property
    def names(self) -> Sequence[str | None]:
        """The name of each row's prompt, or a single name for all rows."""
        rows = self.rows
        return [self.active] if rows is None else rows

    def show_labels(self) -> None:
        """Write the active prompt's label names into the model's config, or the model's own if no prompt is active.

        While another thread runs the model, the block `disabled` of this thread has no effect on the config.
        """
        name = None if self.disabled else self.active
        if name != self.running.active and self.running.runs_elsewhere():
            name = self.running.active
        self.labels.show(name)

    def active_prompts(self) -> list[AttachedPrompt]:
        """Return the active prompts, without duplicates."""
        return [self.prompts[name] for name in dict.fromkeys(self.names) if name is not None and name in self.prompts]

    @property
    def selection_text(self) -> str:
        """The names of the active prompts for messages: one name for all rows, or one for each row."""
        names = self.names
        return repr(names[0] if len(set(names)) == 1 else names)

    def provenance(self, selection: Selection | None = None) -> Provenance:
        """Return the names and states of the active prompts, to be stored on caches and encoder outputs.

        Args:
            selection: the selection whose variants are included, or None to leave variants out.
        """
        names = dict.fromkeys(self.names)
        on = tuple((name, self.prompts[name].snapshot()) for name in names if name)
        return Provenance(self.selection_text, self.token, on, None if selection is None else selection.variants)

    # --- extra arguments of a forward ---------------------------------------------------------------------------------

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the extra arguments that the model's prompts use."""
        return tuple(dict.fromkeys(name for prompt in self.prompts.values() for name in prompt.method.batch_columns))

    def accepted(self) -> tuple[str, ...]:
        """Return the names of the extra arguments that the active prompts use, or that any prompt uses if none is active."""
        names = dict.fromkeys(self.names) if self.is_in_use else self.prompts
        used = [self.prompts[name] for name in names if name in self.prompts]
        return tuple(dict.fromkeys(name for prompt in used for name in prompt.method.batch_columns))

    def refuse_unused(self, call: dict[str, Any], own: Sequence[str] = ()) -> None:
        """Refuse extra arguments that no active prompt uses. See `softhooks.runtime.arguments.refuse_unused`."""
        columns = self.columns
        if (COLUMN_METHODS.keys().isdisjoint(call) and call.keys().isdisjoint(columns)) or not self.is_in_use:
            return
        named = (
            inspect.signature(type(unwrapped(self.model)).forward).parameters if call.keys() & COLUMN_METHODS else {}
        )
        refuse_unused(call, self.accepted(), columns, (*own, *named))

    def embed_last(self) -> None:
        """Make the hooks on the embeddings run last, after hooks that were registered later (such as NEFTune's noise)."""
        for hook in self.embedding_hooks:
            hooks = hook.hooks_dict_ref()
            if hooks is not None and hook.id in hooks:
                hooks.move_to_end(hook.id)

    def note_loaded_state(self, _model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        """If a loaded state dict contains prompts, store it for a Trainer callback, with its weights on the meta device."""
        if not prefix and any(is_prompt_key(key) for key in state):
            self.loaded_state = {key: v if v.dtype == torch.uint8 else v.to("meta") for key, v in state.items()}


def prompted_model_of(model: nn.Module) -> PromptedModel | None:
    """Return a model's `PromptedModel`, or None if it has no prompt.

    The model may be compiled, inside a wrapper (`module`) or inside a SentenceTransformer.
    """
    for holder in (model, *(getattr(model, inside, None) for inside in ("_orig_mod", "module", "transformers_model"))):
        container = holder._modules.get(CONTAINER) if isinstance(holder, nn.Module) else None
        if isinstance(container, Container):
            prompted: PromptedModel = container.prompted_model
            return prompted
    return None


def require_prompted_model(model: nn.Module, name: str | None = None) -> PromptedModel:
    """Return a model's `PromptedModel`.

    Raises:
        NotAttachedError: the model has no prompt, or no prompt of this name.
    """
    prompted = prompted_model_of(model)
    if prompted is None:
        raise NotAttachedError(f"{type(model).__name__} has no prompt; attach or load one first.")
    if name is not None and name not in prompted.prompts:
        raise NotAttachedError(
            f"no prompt named {name!r} is attached to {type(model).__name__}.",
            "Attach or load it under this name first.",
            attached=", ".join(map(repr, prompted.prompts)),
        )
    return prompted
