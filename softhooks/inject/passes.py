"""A pass: what one forward of a stack carries from its first hook to its last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from softhooks.anatomy import Site, Stack

AttentionFunction = Callable[..., Any]


class Pass:
    """One forward of one stack. Subclasses override what they change; this base changes nothing.

    Args:
        stack: the stack whose forward this is. While it runs, `stack.live` is this pass.

    Attributes:
        touched: whether the prompt was put in. A pass that ends untouched is an error, not silence.
        handles: hooks for this forward only.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.touched = False
        self.handles: list[Any] = []

    def embed(self, output: Tensor) -> Tensor:
        """Change what the embedding returns. [B, T, H] -> [B, T, H]."""
        return output

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a site's attention function. `args` are module, query, key, value, mask."""
        return attention(*args, **kwargs)

    def leave(self, output: Any) -> Any:
        """Change what the stack returns, after a forward that did not raise."""
        return output

    def close(self) -> None:
        """Undo what the pass changed on modules, also after a forward that raised."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
