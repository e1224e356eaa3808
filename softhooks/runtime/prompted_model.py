"""The state of a model's prompts: the prompts by name, the active prompts, and all hooks and patches on the model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.attention_interface import unwrap_attention_functions, wrap_attention_functions
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
from softhooks.patching.movable_hook import MovableHook
from softhooks.patching.patches import Patches
from softhooks.runtime.arguments import refuse_unused
from softhooks.runtime.attached_prompt import AttachedPrompt
from softhooks.runtime.label_names import LabelNames
from softhooks.runtime.optimizer_check import unwatch_steps, watch_steps
from softhooks.runtime.recomputed_forward import RecomputeCheck
from softhooks.runtime.running import RunningCalls
from softhooks.runtime.selection import Selection, select_rows
from softhooks.runtime.with_blocks import choice_of, repeats_of


class PromptedModel:
    """The prompts of one model and their selection. The hooks that `softhooks.runtime.install` registers read this state.

    Args:
        model: the model, as the user gave it.
        structure: its stacks, embeddings and attention layers.

    Attributes:
        prompts: every attached prompt, by name.
        labels: the label names that the model's config shows.
        running: the calls that run on the model.
        recompute_check: the prompts that earlier forwards used, for forwards that a backward runs again.
        freeze_dropout: whether the backbone's dropout is off while it trains.
        was_trainable: `requires_grad` of every parameter before the first prompt.
        record: the digests of the frozen tensors, if they were taken.
        fingerprint: the fingerprint of the base model, computed when the first prompt was attached, before any sharding.
        loaded_state: the last loaded state dict with prompts, with its weights on the meta device.
        placeholder_id: an ordinary id of the vocabulary.
        patches: hooks and attributes on the model, undone with the last prompt; copies of the model keep them.
        outside_patches: patches on other objects (an optimizer, a Trainer's logs), which copies of the model do not keep.
        embedding_hooks: the hooks that put virtual tokens into the embeddings.
        files: the names of the Python modules with the attention functions that the model calls; empty if nothing is installed.
        expected_modules: by stack, the modules at which prompts enter; forwards are refused if a module was replaced.
        expected_heads: the model's heads that prompts have copies of; forwards are refused if a head was replaced.
        has_added_tokens: whether hooks for rows of added tokens are registered.
    """

    def __init__(self, model: nn.Module, structure: ModelStructure) -> None:
        self.model = model
        self.structure = structure
        self.prompts: dict[str, AttachedPrompt] = {}
        self.labels = LabelNames(model, self.prompts)
        self.running = RunningCalls()
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
        self.embedding_hooks: list[MovableHook] = []
        self.has_added_tokens = False
        self.files: frozenset[str] = frozenset()
        self._active: str | None = None
        self.expected_modules = {stack.name: ExpectedModules(modules_entered(stack)) for stack in structure.stacks}
        self.expected_heads = ExpectedModules()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle, without the patches on other objects."""
        return self.__dict__ | {"outside_patches": Patches()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.files:
            self.join_shared_patches()

    def join_shared_patches(self) -> None:
        """Use the process-wide patches: wrapped attention functions, and a hook on the steps of optimizers.

        A copy calls this while its model is still incomplete, so the attention functions are found by the names of their modules,
        which may not be imported yet in another process.
        """
        for name in self.files:
            with suppress(ImportError):
                import_module(name)
        wrap_attention_functions(self, self.files)
        watch_steps(self)

    def leave_shared_patches(self) -> None:
        """Stop using the process-wide patches; they are undone if no other model uses them."""
        self.files = frozenset()
        unwrap_attention_functions(self)
        unwatch_steps(self)

    # --- the selected prompts -----------------------------------------------------------------------------------------

    @property
    def active(self) -> str | None:
        """The name of the prompt for rows that do not choose one; setting it updates the label names in the model's config."""
        only = choice_of(self.model).only
        return self._active if only is None else only

    @active.setter
    def active(self, name: str | None) -> None:
        self._active = name
        self.show_labels()

    @property
    def rows(self) -> Sequence[str | None] | None:
        """The name of each row's prompt inside `softhooks.rows`, or None outside of it."""
        return choice_of(self.model).rows

    @property
    def disabled(self) -> bool:
        """Whether all prompts are off because of `softhooks.disabled`."""
        return choice_of(self.model).off

    @property
    def given(self) -> dict[str, Tensor]:
        """The extra arguments of the forward that is running in this thread."""
        forward = self.running.forward
        return {} if forward is None else forward.given

    @property
    def is_on(self) -> bool:
        """Whether a prompt is selected; True inside `softhooks.rows` even if it selects no prompt for any row."""
        rows, off, only = choice_of(self.model)
        return not off and bool(self.prompts) and (rows is not None or only is not None or self._active is not None)

    @property
    def is_in_use(self) -> bool:
        """Whether a forward would use a prompt in at least one row."""
        rows, off, only = choice_of(self.model)
        if off or not self.prompts:
            return False
        if rows is not None:
            return any(name is not None for name in rows)
        return only is not None or self._active is not None

    def select(self, batch: int, given: dict[str, Tensor] | None = None) -> Selection:
        """Select the prompts that a forward uses, and the prompt of each row.

        Args:
            batch: the number of rows.
            given: the extra arguments, or None to use the extra arguments of the running forward.

        Raises:
            UnsupportedModeError: `rows` does not fit the batch.
            NotAttachedError: `rows` names a prompt that has been removed.
        """
        given, rows = self.given if given is None else given, self.rows
        if rows is None:
            return select_rows(self.prompts, [self.active], batch, given)
        forward = self.running.forward
        named = len(rows) * (1 if forward is None else forward.choices)
        if batch not in (named, named * repeats_of(self.model)):
            raise UnsupportedModeError(
                f"`rows` names {len(rows)} prompts for a batch of {batch} rows; name one prompt for each row.",
                "In `generate`, beams and samples belong to their row: name one prompt for each row of its input.",
            )
        each = [name for name in rows for _ in range(batch // len(rows))]
        return select_rows(self.prompts, each, batch, given)

    @property
    def _names(self) -> Sequence[str | None]:
        """The selected name of each row, or a single name for all rows."""
        rows = self.rows
        return [self.active] if rows is None else rows

    def show_labels(self) -> None:
        """Show the active prompt's label names in the model's config, or the model's own names if no prompt is active."""
        self.labels.show(None if self.disabled else self.active)

    def active_prompts(self) -> list[AttachedPrompt]:
        """Return the active prompts, without duplicates."""
        return [self.prompts[name] for name in dict.fromkeys(self._names) if name is not None and name in self.prompts]

    @property
    def selection_text(self) -> str:
        """The names of the active prompts for messages: one name for all rows, or one for each row."""
        names = self._names
        return repr(names[0] if len(set(names)) == 1 else names)

    def provenance(self, selection: Selection | None = None) -> Provenance:
        """Return the state of the active prompts, to be noted on the caches and encoder outputs that a forward returns.

        Args:
            selection: the prompt of each row, or None to use the selected names.
        """
        names = dict.fromkeys(self._names)
        on = tuple((name, self.prompts[name].snapshot()) for name in names if name)
        return Provenance(self.selection_text, self.token, on, None if selection is None else selection.variants)

    # --- extra arguments of a forward -------------------------------------------------------------------------------------

    @property
    def columns(self) -> tuple[str, ...]:
        """The extra arguments that the model's prompts take."""
        return tuple(dict.fromkeys(name for prompt in self.prompts.values() for name in prompt.method.batch_columns))

    def accepted(self) -> tuple[str, ...]:
        """Return the extra arguments that a call may have now: the columns of the prompts in use, or of all if none is in use."""
        names = dict.fromkeys(self._names) if self.is_in_use else self.prompts
        used = [self.prompts[name] for name in names if name in self.prompts]
        return tuple(dict.fromkeys(name for prompt in used for name in prompt.method.batch_columns))

    def refuse_unused(self, call: dict[str, Any], own: Sequence[str] = ()) -> None:
        """Refuse extra arguments that no prompt in use takes. See `softhooks.runtime.arguments.refuse_unused`."""
        columns = self.columns
        if (COLUMN_METHODS.keys().isdisjoint(call) and call.keys().isdisjoint(columns)) or not self.is_in_use:
            return
        model = (
            inspect.signature(type(unwrapped(self.model)).forward).parameters if call.keys() & COLUMN_METHODS else {}
        )
        refuse_unused(call, self.accepted(), columns, (*own, *model))

    def embed_last(self) -> None:
        """Move the hooks on the embeddings after hooks that other code has registered since, such as NEFTune's noise."""
        for hook in self.embedding_hooks:
            hook.move_last()

    def note_loaded_state(self, _model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        """Store a loaded state dict with prompts, its weights on the meta device, for a Trainer callback that is added later."""
        if not prefix and any(is_prompt_key(key) for key in state):
            self.loaded_state = {key: v if v.dtype == torch.uint8 else v.to("meta") for key, v in state.items()}


def prompted_model_of(model: nn.Module) -> PromptedModel | None:
    """Return the state of a model's prompts, or None. The model may be compiled, wrapped (`module`) or in a sentence model."""
    for holder in (model, *(getattr(model, inside, None) for inside in ("_orig_mod", "module", "transformers_model"))):
        container = holder._modules.get(CONTAINER) if isinstance(holder, nn.Module) else None
        if isinstance(container, Container):
            prompted: PromptedModel = container.prompted_model
            return prompted
    return None


def require_prompted_model(model: nn.Module, name: str | None = None) -> PromptedModel:
    """Return the state of a model's prompts.

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
