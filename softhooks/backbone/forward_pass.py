"""A pass: what one forward of a stack carries from its first hook to its last."""

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
    """What an attention function is called, by which its masks are known; of a partial one, what it calls.

    A callable object has the name of its class.
    """
    while isinstance(attention, functools.partial):
        attention = attention.func
    return str(getattr(attention, "__name__", type(attention).__name__))


class Pass:
    """One forward of one stack. Subclasses override what they change; this base changes nothing.

    Args:
        stack: the stack whose forward this is. While it runs, `stack.state.current` is this pass.

    Attributes:
        thread: the number of the thread whose forward this is; nobody else meets the pass.
        entered: whether the stack's forward that it is for has begun. A call of the stack after that is another one, inside.
        touched: whether the prompt was put in. A pass that ends untouched is an error, not silence.
        handles: hooks for this forward only.
        made: returns the state of the prompts that the pass puts in, for notes on caches and encoder states.
        calls: how often each module that serves several layers was called, by its first site's role and index.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.thread = threading.get_ident()
        self.entered = False
        self.touched = False
        self.handles: list[Any] = []
        self.made: Callable[[], Any]
        self.calls: dict[tuple[str, int], int] = {}

    def embed(self, output: Tensor) -> Tensor:
        """Change what the embedding returns. [B, T, H] -> [B, T, H]."""
        return output

    def is_text(self, args: tuple[Any, ...]) -> bool:
        """Whether a call of the embedding with these arguments looks up the text, and nothing else."""
        return True

    def turn(self, site: Site) -> Site:
        """Tell which site a module's call is: one that serves several layers has a site for each, in the order of its calls.

        Raises:
            UnsupportedModeError: it is called more often than in the probe at attach.
        """
        if len(site.turns) < 2:
            return site
        count = self.calls.get((site.role, site.index), 0)
        if count == len(site.turns):
            raise UnsupportedModeError(
                "a layer that is shared must run as often in every forward as it did when the prompt was attached.",
                "Attach the prompt after the model's number of layers is settled.",
                layer=type(site.module).__name__,
                calls=f"more than {count}",
            )
        self.calls[site.role, site.index] = count + 1
        return site.turns[count]

    def enters(self, site: Site) -> bool:
        """Tell whether the pass wants to see a site's keys and values."""
        return type(self).attend is not Pass.attend

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a site's attention function. `args` are module, query, key, value, mask."""
        return attention(*args, **kwargs)

    def injected(self) -> list[Tensor]:
        """What the pass puts in at attention, to be compared with what another one did."""
        return []

    def scale(self, name: str, output: Tensor) -> Tensor | None:
        """Change the output of one of the stack's linear layers, which are hooked where a method asks for it."""
        return None

    def leave(self, output: Any) -> Any:
        """Change what the stack returns, after a forward that did not raise."""
        return output

    def close(self) -> None:
        """Undo what the pass changed on modules, also after a forward that raised."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
