"""The hooks that a host registers. Bound methods, so that a deep copy of the model copies them with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softhooks.anatomy import Stack
from softhooks.errors import PromptNotReachedError, explain
from softhooks.heads import answer, answer_rows
from softhooks.inject.passes import Pass
from softhooks.inject.provenance import note_caches, note_encoded
from softhooks.inject.slots import SlotPass

if TYPE_CHECKING:
    from softhooks.host import Host


class StackHooks:
    """The hooks of one stack."""

    def __init__(self, host: Host, stack: Stack) -> None:
        self.host = host
        self.stack = stack
        self.open: list[Pass | None] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Open the pass and change the call's arguments."""
        self.open.append(None)
        if self.stack.live is not None:
            return None  # the prompt's own rows on their way through
        call = dict(zip(self.stack.parameters, args, strict=False)) | kwargs
        opened = self.host.open(self.stack, call)
        if opened is None:
            return None
        self.open[-1] = self.stack.live = opened
        return (), call

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Close the pass and change the output; runs after an error too, with no output then."""
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
        prompts, rows = host.in_use(output.shape[0])
        heads = [prompt.head(self.key) for prompt in prompts]
        if rows is not None:
            return answer_rows(heads, rows, args, kwargs, output)
        return output if heads[0] is None else answer(heads[0], args, kwargs, output)
