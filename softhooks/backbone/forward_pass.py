"""The base class of passes. A pass injects prompts into one forward of a stack; the hooks on the stack call its methods."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from softhooks.backbone.stack import Site, Stack
from softhooks.errors import UnsupportedModeError

AttentionFunction = Callable[..., Any]
CheckAttention = Callable[[Site, AttentionFunction, tuple[Any, ...], dict[str, Any]], None]


def function_name(attention: AttentionFunction) -> str:
    """Return the name of an attention function, or of its class if it is an object. The name tells which masks it accepts."""
    while isinstance(attention, functools.partial):
        attention = attention.func
    return str(getattr(attention, "__name__", type(attention).__name__))


class Pass:
    """One forward of one stack. This class changes nothing; subclasses override the methods for the parts that they change.

    Args:
        stack: the stack; `stack.state.current` is this pass while its forward runs.

    Attributes:
        has_begun: whether the stack's forward has begun. Any later call to the stack is nested in it.
        has_injected: whether the prompt has been injected. If it is still False when the forward ends, an error is raised.
        table_positions: the positions whose embeddings the stack's position table returns, counted from 0, [B, T], or [T] for all
            rows; None for those that the stack asks for.
        layers_pass: the pass in which the backward runs checkpointed layers again, if it is not this one.
        provenance: returns the state of the prompts, which is stored with caches and encoder states.
        check_attention: called with the arguments of `attend` before each attention function; may raise an error.
        allows_checkpointing: whether layers may be checkpointed in this forward.
        keeps_cache: whether checkpointed layers get the cache that the stack passes to them.
        calls: for each module that several layers share, the number of its calls so far, by role and index of its first site.
    """

    allows_checkpointing = True
    keeps_cache = False

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.has_begun = False
        self.has_injected = False
        self.table_positions: Tensor | None = None
        self.layers_pass: Pass | None = None
        self.provenance: Callable[[], Any]
        self.check_attention: CheckAttention | None = None
        self.calls: dict[tuple[str, int], int] = {}

    @property
    def recomputed_in(self) -> Pass | None:
        """The pass in which the backward runs checkpointed layers again, or None for no pass."""
        return self.layers_pass

    def looks_up_text(self, args: tuple[Any, ...]) -> bool:
        """Whether a call to the embedding module with these arguments looks up the tokens of the text."""
        return True

    def embed(self, output: Tensor) -> Tensor:
        """Change the output of the embedding. [B, T, H] -> [B, T, H]."""
        return output

    def site_for_call(self, site: Site) -> Site:
        """Return the site of the current call; `site` is the first of the module's sites, one for each layer that shares it."""
        if len(site.shared_sites) < 2:
            return site
        count = self.calls.get((site.role, site.index), 0)
        if count == len(site.shared_sites):
            raise UnsupportedModeError(
                f"{type(site.module).__name__} ran more than {count} times in one forward; a shared layer must not run more "
                "times than it did when the prompt was attached.",
                "Change the number of layers before you attach the prompt.",
            )
        self.calls[site.role, site.index] = count + 1
        return site.shared_sites[count]

    def enters(self, site: Site) -> bool:
        """Whether the pass reads or changes the keys and values of an attention module."""
        return type(self).attend is not Pass.attend

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the attention function of an attention module; subclasses change its arguments or its output.

        Args:
            args: module, query, key, value, and the mask if it is not in `kwargs`.
        """
        return attention(*args, **kwargs)

    def injected_tensors(self) -> list[Tensor]:
        """Return the tensors that this pass injects into attention, for comparison with those of another pass."""
        return []

    def scale(self, name: str, output: Tensor) -> Tensor | None:
        """Return a new output for a linear layer of the stack, or None to keep `output`. Only some methods hook linear layers."""
        return None

    def leave(self, output: Any) -> Any:
        """Change the output of the stack; not called after an error."""
        return output

    def close(self) -> None:
        """End the forward; also called after an error."""
