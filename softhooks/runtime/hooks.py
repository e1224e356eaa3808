"""The hooks on a model, its stacks and its heads.

They are bound methods, so that a deep copy of a model gets its own hooks. A stack is the module that runs all layers on the text;
an encoder-decoder has two. A pass is the object that injects the prompts into one forward of a stack.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.forward_pass import Pass
from softhooks.backbone.heads import run_head, run_heads_by_row
from softhooks.backbone.stack import Stack
from softhooks.backbone.stack_state import RunningPass
from softhooks.errors import PromptNotReachedError, UnsupportedModeError
from softhooks.inject.cache_notes import encoded_slots, note_caches, note_encoded, require_encoded
from softhooks.inject.checkpointing import CheckpointedPass, UnchangedPass
from softhooks.inject.slots.cross_attention import strip_encoder_state
from softhooks.inject.slots.slot_pass import SlotPass
from softhooks.inject.text_positions import OUTER_ARGUMENTS
from softhooks.objectives.base import Finish
from softhooks.runtime.arguments import choices_of, for_each_choice, take
from softhooks.runtime.attached_prompt import AttachedPrompt
from softhooks.runtime.exclusive_forwards import needs_model_alone
from softhooks.runtime.prompted_model import PromptedModel
from softhooks.runtime.running_call import Call, module_call
from softhooks.runtime.stack_forward import begin_stack_forward
from softhooks.runtime.untrained_loss import mark_frozen, refuse_backward
from softhooks.runtime.unused_parameters import require_unused_search
from softhooks.runtime.with_blocks import choice_of


@dataclass(eq=False)
class ModelHooks:
    """The outermost hooks of a model's forward: they handle extra arguments and objectives, and check that the prompt is used."""

    prompted: PromptedModel

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begin the call: remove the extra arguments, store masks and position ids, and let an objective change the arguments."""
        prompted = self.prompted
        if _is_own_call(prompted):
            return None
        what, alone = f"the forward of {type(module).__name__}", lambda: needs_model_alone(prompted)
        call = prompted.running.begin(self, what, module_call(), is_model=True, is_exclusive=alone)
        if call.outer is None and choice_of(prompted.model).only is None:
            prompted.show_labels()
        call.is_on = prompted.is_on
        prompted.refuse_unused(kwargs)
        if prompted.is_in_use:
            prompted.expected_heads.check(prompted.model)
        call.given = take(kwargs, prompted.columns)
        named = kwargs
        if args:
            named = dict(zip(inspect.signature(prompted.model.forward).parameters, args, strict=False)) | kwargs
        call.model_arguments = {name: named.get(name) for name in OUTER_ARGUMENTS}
        if prompted.structure.example.choices is not None:
            _note_choices(call, args, kwargs)
        encoded = kwargs.get("encoder_outputs")
        if prompted.is_in_use and encoded is not None and prompted.structure.is_encoder_decoder:
            require_encoded(encoded, prompted.provenance())  # the encoder states must come from the same prompts
        call.encoded = encoded_slots(encoded)
        if call.runs_without_objective or not prompted.is_in_use or not torch.is_grad_enabled():
            return args, kwargs
        trainable = [prompt for prompt in prompted.active_prompts() if prompt.takes_gradients]
        require_unused_search(trainable, call.given)
        trained = next((prompt for prompt in trainable if prompt.objective is not None), None)
        if trained is not None and prompted.model.training:
            call.finish = _begin_objective(prompted, trained, named, call.given)
            return (), named
        if trained is not None:
            call.finish = refuse_backward(trained.method, prompted.model)
        elif not trainable:
            call.finish = mark_frozen
        return args, kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self, _module: nn.Module, _args: Any, _kwargs: dict[str, Any], output: Any) -> Any:
        """Check that the call used the prompt, and let an objective change the output.

        If the forward raised an error, `output` is None, and this hook only ends the call.
        """
        prompted = self.prompted
        call = prompted.running.find(self, module_call())
        if call is None:
            return None
        try:
            if output is None or not call.is_on or not prompted.is_on:
                return None
            if call.batch is None:
                raise PromptNotReachedError(
                    f"this forward of {type(prompted.model).__name__} bypassed the prompt.",
                    "Call the model with `input_ids` or `inputs_embeds`, or disable the prompt with `softhooks.disabled(model)`.",
                    stacks=", ".join(stack.path or "the model itself" for stack in prompted.structure.stacks),
                )
            if prompted.structure.is_encoder_decoder and call.batch:
                selection = prompted.select(call.batch)
                if selection.uses and selection.prompts[0].injection == "slots":
                    output = strip_encoder_state(output, prompted.structure.entry)
            return output if call.finish is None else call.finish(output)
        finally:
            prompted.running.end(call)


def _is_own_call(prompted: PromptedModel) -> bool:
    """Return whether softhooks is running a stack on the virtual tokens alone.

    If the model itself is the stack, its `ModelHooks` are called in such a run, too.
    """
    passes = (stack.state.current for stack in prompted.structure.stacks)
    return any(current is not None and not current.has_begun for current in passes)


def _note_choices(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """In multiple choice, repeat extra arguments and flatten masks, because each choice is a row of the stack's batch."""
    rows, call.choices = choices_of(args, kwargs)
    call.given = for_each_choice(call.given, rows, call.choices)
    for name, value in (call.model_arguments or {}).items():
        if isinstance(value, Tensor) and value.dim() == 3 and call.model_arguments is not None:
            call.model_arguments[name] = value.flatten(0, 1)


def _begin_objective(
    prompted: PromptedModel, prompt: AttachedPrompt, call: dict[str, Any], given: dict[str, Tensor]
) -> Finish | None:
    """Let the prompt's objective change the call's arguments, and return the function that puts the loss into the output."""
    assert prompt.objective is not None
    has_labels = call.get("labels") is not None
    if prompted.rows is not None or not has_labels:
        found = f"`rows` selects {prompted.selection_text}" if has_labels else "the call has no `labels`"
        raise UnsupportedModeError(
            f"{found}; {prompt.method.kind} has its own objective, which needs `labels` and trains one prompt at a time.",
            "Pass `labels` to the model, without `softhooks.rows`, and train on `output.loss`. In a Trainer, turn off label "
            "smoothing and `compute_loss_func`, which remove the labels from the call.",
        )
    return prompt.objective.begin(prompt, call, given)


@dataclass(eq=False)
class StackHooks:
    """The hooks of one stack."""

    prompted: PromptedModel
    stack: Stack

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Create the pass for this forward, and change the call's arguments."""
        own = self.stack.state.current
        if own is not None and not own.has_begun:
            own.has_begun = True  # softhooks is running the stack by itself, without the prompt
            if self.stack.features is None:
                return None
            return (), self._embedded(own, dict(zip(self.stack.parameters, args, strict=False)) | kwargs)
        outer, what = self.prompted.running.call, f"the forward of {type(module).__name__}"
        alone = None if outer is not None and outer.is_model else lambda: needs_model_alone(self.prompted)
        begun = self.prompted.running.begin(self, what, module_call(), is_exclusive=alone)
        call = dict(zip(self.stack.parameters, args, strict=False)) | kwargs
        begun.opened = begin_stack_forward(self.prompted, self.stack, call)
        self._make_current(begun, UnchangedPass(self.stack) if begun.opened is None else begun.opened)
        if begun.opened is None:
            return None if call.keys() >= kwargs.keys() else ((), call)  # the model does not accept the extra arguments
        return (), self._embedded(begun.opened, call)

    def _embedded(self, live: RunningPass, call: dict[str, Any]) -> dict[str, Any]:
        """Let a pass change the features; those of a text are changed by the hook on the embedding."""
        name = self.stack.features
        return call if name is None else call | {name: live.embed(call[name])}

    def _make_current(self, begun: Call, live: Pass) -> None:
        """Make a pass the current pass of the stack until the call ends."""
        stack, outer = self.stack, self.stack.state.current

        def restore() -> None:
            stack.state.current = outer
            live.close()

        begun.cleanups.append(restore)
        live.has_begun = True
        stack.state.current = live
        if not stack.module.training or not torch.is_grad_enabled():
            return
        if isinstance(live, UnchangedPass):
            live.follow_checkpointing()
        elif not isinstance(live, CheckpointedPass):
            layers = UnchangedPass(stack)  # checkpointed layers run again in the backward, and need this pass
            begun.cleanups.append(layers.close)
            layers.follow_checkpointing()
            live.layers_pass = layers

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Close the pass, and change the output.

        If the forward raised an error, `output` is None, and this hook only closes the pass.
        """
        begun = self.prompted.running.find(self, module_call())
        if begun is None:
            return None
        opened = begun.opened
        try:
            if opened is None or output is None:
                return None
            changed = opened.leave(output)
            if not opened.has_injected and not _drops_layers(self.stack):
                raise PromptNotReachedError(
                    f"the forward of {type(self.stack.module).__name__} did not use the prompt.",
                    "Register attention functions before you attach the prompt, and do not replace the embedding afterwards.",
                    stack=self.stack.path or "the model itself",
                    injection=type(opened).__name__,
                )
            if self.stack.name == "encoder":
                note_encoded(changed, opened.provenance())
            else:
                note_caches(changed, opened.provenance)
            if begun.forward is not begun or not torch.is_grad_enabled():
                return changed
            # The stack was called directly, not by the model.
            is_trained = any(prompt.takes_gradients for prompt in self.prompted.active_prompts())
            return changed if is_trained else mark_frozen(changed)
        finally:
            self.prompted.running.end(begun)

    def embed(self, _module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Let the current pass change the output of the embedding."""
        live = self.stack.state.current
        return None if live is None or not live.looks_up_text(args) else live.embed(output)

    def pool(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Remove the slots from the input of a pooler inside the stack."""
        live = self.stack.state.current
        if isinstance(live, SlotPass):
            return (live.pooled(args[0]), *args[1:])
        return None

    def strip_slots(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Remove the slots from the hidden states before the stack selects the token for its pooler."""
        return self.stack.state.current.leave(output) if isinstance(self.stack.state.current, SlotPass) else None


def _drops_layers(stack: Stack) -> bool:
    """Whether a stack skips layers at random (layerdrop), perhaps all those that a prompt enters."""
    rates = getattr(getattr(stack.module, "config", None), "__dict__", {})
    return stack.module.training and any("layerdrop" in name and rate for name, rate in rates.items())


@dataclass(eq=False)
class HeadHooks:
    """The hook of one of the model's heads."""

    prompted: PromptedModel
    key: str

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def answer(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Compute the output of each row with its prompt's copy of the head."""
        prompted = self.prompted
        if not prompted.is_on or not isinstance(output, Tensor):
            return None
        selection = prompted.select(output.shape[0])
        heads = [prompt.head(self.key) for prompt in selection.prompts]
        choice = selection.choice_of_prompts()
        if choice is not None:
            return run_heads_by_row(heads, choice, args, kwargs, output)
        return output if heads[0] is None else run_head(heads[0], args, kwargs, output)
