"""A pass: what one forward of a stack does with a prompt, from its first hook to its last."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from softhooks.backbone.stack import Site, Stack
from softhooks.errors import UnsupportedModeError

AttentionFunction = Callable[..., Any]


def function_name(attention: AttentionFunction) -> str:
    """The name of an attention function, which tells the form of its masks; that of the class, for a callable object."""
    while isinstance(attention, functools.partial):
        attention = attention.func
    return str(getattr(attention, "__name__", type(attention).__name__))


class Pass:
    """One forward of one stack. Subclasses override what they change; this class changes nothing.

    Args:
        stack: the stack. While its forward runs, `stack.state.current` is this pass.

    Attributes:
        thread: the number of the thread in which the forward runs. In other threads the pass is invisible.
        has_begun: whether the stack's forward has begun. Another call of the stack is then a call inside it.
        has_injected: whether the prompt has entered. If it has not when the forward ends, an error is raised.
        handles: hooks for this forward only.
        provenance: returns the state of the prompts, to be recorded on caches and encoder states.
        calls: how often each module that serves several layers was called, by the role and index of its first site.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.thread = threading.get_ident()
        self.has_begun = False
        self.has_injected = False
        self.handles: list[Any] = []
        self.provenance: Callable[[], Any]
        self.calls: dict[tuple[str, int], int] = {}

    def looks_up_text(self, args: tuple[Any, ...]) -> bool:
        """Whether a call of the embedding with these arguments looks up the text."""
        return True

    def embed(self, output: Tensor) -> Tensor:
        """Change the output of the embedding. [B, T, H] -> [B, T, H]."""
        return output

    def site_for_call(self, site: Site) -> Site:
        """Choose the site of a module's call: a module that serves several layers has one for each, in order of its calls.

        Raises:
            UnsupportedModeError: the module is called more often than in the probe at attach.
        """
        if len(site.shared_sites) < 2:
            return site
        count = self.calls.get((site.role, site.index), 0)
        if count == len(site.shared_sites):
            raise UnsupportedModeError(
                f"{type(site.module).__name__} ran more than {count} times in one forward; a layer that is shared must run as "
                "often as when the prompt was attached.",
                "Attach the prompt after the model's number of layers is settled.",
            )
        self.calls[site.role, site.index] = count + 1
        return site.shared_sites[count]

    def enters(self, site: Site) -> bool:
        """Whether the pass reads or changes the keys and values of a site."""
        return type(self).attend is not Pass.attend

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the attention function of a site.

        Args:
            args: module, query, key, value, and the mask if it is not among the keyword arguments.
        """
        return attention(*args, **kwargs)

    def injected_tensors(self) -> list[Tensor]:
        """The tensors that enter at attention, to be compared with those of another pass."""
        return []

    def scale(self, name: str, output: Tensor) -> Tensor | None:
        """Change the output of a linear layer of the stack; None leaves it. Only some methods have linear layers hooked."""
        return None

    def leave(self, output: Any) -> Any:
        """Change the output of the stack, after a forward that did not raise."""
        return output

    def close(self) -> None:
        """Remove the hooks of this forward, also after one that raised."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
