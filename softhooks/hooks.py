"""The hooks that a host registers. Bound methods, so that a deep copy of the model copies them with it."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softhooks.anatomy import Stack
from softhooks.choices import choices_of, for_each_choice
from softhooks.columns import take
from softhooks.errors import PromptNotReachedError, UnsupportedModeError, explain
from softhooks.heads import answer, answer_rows
from softhooks.idle import require_search
from softhooks.inject.cross import note_of, strip_encoder_state
from softhooks.inject.passes import Pass
from softhooks.inject.provenance import note_caches, note_encoded, require_encoded
from softhooks.inject.slots import SlotPass
from softhooks.objectives import Finish, refuse_backward

if TYPE_CHECKING:
    from softhooks.host import Host
    from softhooks.prompt import SoftPrompt


class ModelHooks:
    """The first and the last hook of a model's forward: extra arguments, objectives, and whether the prompt was reached."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._reached = False
        self._batch = 0
        self._finish: Finish | None = None
        self._aside = 0

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has: no forward is under way in it."""
        return {"host": self.host, "_reached": False, "_batch": 0, "_finish": None, "_aside": 0}

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the extra arguments out of the call, and let an objective join it."""
        host = self.host
        if host.inside:
            host.end_aborted()
        if host.inside:
            return None
        self._reached, self._batch, self._finish = False, 0, None
        host.refuse_unused(kwargs)
        host.given = take(kwargs, host.columns)
        host.positions = kwargs.get("position_ids")
        if host.anatomy.choices is not None:
            self._note_choices(args, kwargs)
        encoded = kwargs.get("encoder_outputs")
        if host.is_in_use and encoded is not None:
            require_encoded(encoded, host.selection)
        host.anatomy.entry.encoded = note_of(encoded)
        if self._aside or not host.is_in_use or not torch.is_grad_enabled():
            return args, kwargs
        trainable = self._trainable()
        require_search(trainable, host.given)
        trained = next((prompt for prompt in trainable if prompt.objective is not None), None)
        if trained is None:
            return args, kwargs
        if not host.model.training:
            self._finish = refuse_backward(trained)
            return args, kwargs
        return self._begin(trained, args, kwargs)

    def leave(self, _module: nn.Module, _args: Any, _kwargs: dict[str, Any], output: Any) -> Any:
        """Check that the prompt was reached, and finish the output; runs after an error too, with no output then."""
        host = self.host
        if host.inside:
            return None
        try:
            if output is None or not host.is_on:
                return None
            self._require_reached()
            if host.anatomy.is_encoder_decoder and self._batch:
                selection = host.in_use(self._batch)
                if selection.uses and selection.prompts[0].injection == "slots":
                    output = strip_encoder_state(output, host.anatomy.entry)
            return output if self._finish is None else self._finish(output)
        finally:
            self._finish = None
            host.given = {}
            host.choices = 1
            host.anatomy.entry.encoded = None
            host.positions = None
            for prompt in host.prompts.values():
                prompt.forget()

    def _note_choices(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let what is said for a row hold for each of its choices, which the stack meets as rows of their own."""
        host = self.host
        rows, host.choices = choices_of(args, kwargs)
        host.given = for_each_choice(host.given, rows, host.choices)
        if isinstance(host.positions, Tensor) and host.positions.dim() == 3:
            host.positions = host.positions.flatten(0, 1)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let an objective run the model again inside a forward: that run has no objective, and this one goes on after."""
        kept = self._reached, self._batch, self._finish, self.host.given
        self._aside += 1
        try:
            yield
        finally:
            self._aside -= 1
            self._reached, self._batch, self._finish, self.host.given = kept

    def reached(self, batch: int) -> None:
        """Note that a pass of this forward put a prompt in."""
        self._reached = True
        self._batch = batch

    def _trainable(self) -> list[SoftPrompt]:
        """The prompts in use that are not frozen."""
        host = self.host
        names = [host.active] if host.rows is None else host.rows
        used = [host.prompts[name] for name in dict.fromkeys(names) if name is not None and name in host.prompts]
        return [prompt for prompt in used if any(p.requires_grad for p in prompt.encoder.parameters())]

    def _begin(
        self, prompt: SoftPrompt, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let a prompt's objective join the call."""
        host, objective = self.host, prompt.objective
        assert objective is not None
        call = dict(zip(inspect.signature(host.model.forward).parameters, args, strict=False)) | kwargs
        if host.rows is not None or call.get("labels") is None:
            raise UnsupportedModeError(
                explain(
                    "a method with an objective of its own trains one prompt, in forwards that bring their labels.",
                    "Pass `labels` to the model and train on `output.loss`; a Trainer's label smoothing and "
                    "`compute_loss_func` would keep them from it.",
                    method=prompt.method.kind,
                    labels="given" if call.get("labels") is not None else "not given",
                    prompts=host.selection,
                )
            )
        self._finish = objective.begin(prompt, call, host.given)
        return (), call

    def _require_reached(self) -> None:
        if self._reached:
            return
        host = self.host
        raise PromptNotReachedError(
            explain(
                "every forward of a model with a prompt must go through the prompt.",
                "Call the model with `input_ids` or `inputs_embeds`, or turn the prompt off with `softhooks.disabled(model)`.",
                model=type(host.model).__name__,
                stacks=", ".join(stack.path or "the model itself" for stack in host.anatomy.stacks),
            )
        )


class StackHooks:
    """The hooks of one stack."""

    def __init__(self, host: Host, stack: Stack) -> None:
        self.host = host
        self.stack = stack
        self.open: list[Pass | None] = []
        self._thread = 0

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has: no forward is under way in it."""
        return {"host": self.host, "stack": self.stack, "open": [], "_thread": 0}

    def end_aborted(self) -> None:
        """Close the pass of a forward that has ended without its last hook: of a KeyboardInterrupt torch tells no hook.

        A stack's forward never runs inside itself: a pass that stands open when another one begins was left behind.

        Raises:
            UnsupportedModeError: the other forward runs in another thread, and would meet this one's pass.
        """
        live = self.stack.live
        if live is None or not any(live is one for one in self.open):
            return
        if self._runs_elsewhere():
            raise UnsupportedModeError(
                explain(
                    "a model with a prompt runs one forward at a time; what it puts in belongs to that one.",
                    "Call it under a lock, or give each thread a model of its own.",
                    running=f"in another thread, through {type(self.stack.module).__name__}",
                )
            )
        self.open.clear()
        self.stack.live = None
        live.close()
        self.host.wake()

    def _runs_elsewhere(self) -> bool:
        """Whether the pass that stands open belongs to another thread, which is in the stack's forward."""
        frame = None if self._thread == threading.get_ident() else sys._current_frames().get(self._thread)
        while frame is not None:
            if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is self.stack.module:
                return True
            frame = frame.f_back
        return False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Open the pass and change the call's arguments."""
        self.end_aborted()
        self.open.append(None)
        if self.stack.live is not None:
            return None  # the prompt's own rows on their way through
        call = dict(zip(self.stack.parameters, args, strict=False)) | kwargs
        opened = self.host.open(self.stack, call)
        if opened is None:
            return None if call.keys() >= kwargs.keys() else ((), call)  # the model never sees extra arguments
        self._thread = threading.get_ident()
        self.open[-1] = self.stack.live = opened
        return (), call

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Close the pass and change the output; runs after an error too, with no output then."""
        if self.stack.live is not None and self._runs_elsewhere():
            return None  # this thread's forward was refused
        opened = self.open.pop() if self.open else None
        if opened is None:
            return None
        self.stack.live = None
        try:
            if output is None:
                return None
            changed = opened.leave(output)
            if not opened.touched:
                raise PromptNotReachedError(
                    explain(
                        "a prompt must be put in once the forward of its stack is under way.",
                        "Register attention functions before the prompt is attached; do not replace the embedding after.",
                        stack=f"{type(self.stack.module).__name__} ({self.stack.path or 'the model itself'})",
                        way=type(opened).__name__,
                    )
                )
            if self.stack.name == "encoder":
                note_encoded(changed, self.host.selection)
            else:
                note_caches(changed, self.host.selection)
            return changed
        finally:
            opened.close()
            self.host.wake()

    def embed(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """Change the embedding's output where a pass asks for it."""
        return None if self.stack.live is None else self.stack.live.embed(output)

    def pool(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Keep virtual slots from a pooler inside the stack."""
        live = self.stack.live
        if isinstance(live, SlotPass):
            return (live.pooled(args[0]), *args[1:])
        return None

    def unslot(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Strip virtual slots before a pooler, where it is handed one column and cannot tell a slot from text."""
        return self.stack.live.leave(output) if isinstance(self.stack.live, SlotPass) else None


class HeadHooks:
    """The hook of one of the model's heads."""

    def __init__(self, host: Host, key: str) -> None:
        self.host = host
        self.key = key

    def answer(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Answer with the prompt's own head, or each row with its prompt's."""
        host = self.host
        if not host.is_on or not isinstance(output, Tensor):
            return None
        selection = host.in_use(output.shape[0])
        heads = [prompt.head(self.key) for prompt in selection.prompts]
        choice = selection.choice_of_prompts()
        if choice is not None:
            return answer_rows(heads, choice, args, kwargs, output)
        return output if heads[0] is None else answer(heads[0], args, kwargs, output)
