"""Learn how a stack numbers its columns, by watching what its position table is asked for and by telling it positions.

No name and no config says that reliably: tables start behind a padding index (RoBERTa, Luke) or at a fixed row (OPT,
Nystromformer), are buffers (M2M100), count from where the model around them starts (PaliGemma), and take `position_ids` that some
forwards ignore.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.position_table import place_at_table
from softhooks.backbone.probing import last_hidden_state
from softhooks.backbone.stack import Positions, Table
from softhooks.compat.offload import read

_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)
"""What a model may raise on positions that it does not take."""


@dataclass
class _Seen:
    """What one forward showed: the stack's states, the positions it was handed, and where each table was read from."""

    states: Tensor
    handed: Any = None
    tables: list[Table] = field(default_factory=list)


def numbering(run: Callable[[int], Any], module: nn.Module, embedding: nn.Module, takes: bool) -> Positions:
    """Find out where a stack's tokens stand, and how it can be told.

    Args:
        run: runs the model on the probe's ids, in so many equal rows.
        module: the stack.
        embedding: its token embedding.
        takes: whether its forward takes `position_ids`.
    """
    watch = _Watch(run, module, embedding)
    bare = watch.look()
    columns = bare.states.shape[1]
    counted = torch.arange(columns, device=bare.states.device)[None]
    start = _start(watch, bare, counted) if takes else None
    found = bare.tables[0] if len({id(table.module) for table in bare.tables}) == 1 else None
    answers = None
    if start is None and found is not None:
        found.by_row = _answers(watch, bare, found, torch.cat([counted, counted + 1]))
        answers = found if found.by_row or _answers(watch, bare, found, counted[0]) else None
    config: Any = getattr(module, "config", None)
    trained = getattr(config, "max_position_embeddings", None)
    limits = [len(getattr(table.module, table.weight)) - table.first for table in bare.tables]
    if not limits and any("embed_positions" in name for name, _ in module.named_buffers()):
        limits = [trained] if isinstance(trained, int) else []
    padding = next((getattr(table.module, "padding_idx", None) for table in bare.tables), None)
    return Positions(
        argument=start is not None,
        table=answers,
        start=start or 0,
        padding=padding if start and padding == start - 1 else None,
        limit=min(limits, default=None),
        trained=trained if isinstance(trained, int) else None,
    )


def _start(watch: _Watch, bare: _Seen, counted: Tensor) -> int | None:
    """The id that a stack gives its first token, where telling it the same changes nothing; None: telling has no effect."""
    if isinstance(bare.handed, Tensor):
        return int(bare.handed.flatten()[0])
    padding = getattr(getattr(watch.module, "config", None), "pad_token_id", None)
    candidates = [0, 1, 2, *([padding + 1] if isinstance(padding, int) else [])]
    try:
        told = watch.look(told=counted)
    except _FAILURES:
        told = None
    if told is not None and told.tables and bare.tables:
        candidates = [bare.tables[0].first - told.tables[0].first, *candidates]
    for start in dict.fromkeys(candidates):
        if start >= 0 and _same(watch, bare, told=counted + start):
            return None if _same(watch, bare, exactly=True, told=2 * counted + start) else start
    return None


def _answers(watch: _Watch, bare: _Seen, table: Table, ids: Tensor) -> bool:
    """Whether a table can be made to answer for ids: [2, T], the first row as in the bare forward, or [T], for all rows."""
    return _same(watch, bare, table=table, ids=ids)


def _same(watch: _Watch, bare: _Seen, exactly: bool = False, **change: Any) -> bool:
    """Whether a change leaves the first row's states as they are; a model that fails on it says no."""
    try:
        states = watch.look(**change).states[:1]
    except _FAILURES:
        return False
    if states.shape != bare.states.shape:
        return False
    if exactly:
        return torch.equal(states, bare.states)
    scale = bare.states.abs().amax().clamp(min=1e-6)
    return bool((states - bare.states).abs().amax() <= 200 * torch.finfo(bare.states.dtype).eps ** 0.9 * scale)


class _Watch:
    """Runs a model under hooks on one of its stacks."""

    def __init__(self, run: Callable[[int], Any], module: nn.Module, embedding: nn.Module) -> None:
        self.run = run
        self.module = module
        # `torch.manual_seed` also notes for CUDA who has called it, which takes as long as a small model's forward.
        on_cpu = all(weight.device.type == "cpu" for weight in module.parameters())
        self._seed = torch.default_generator.manual_seed if on_cpu else torch.manual_seed
        self.parts = [
            part
            for part in module.modules()
            if part is not embedding and not isinstance(part, nn.Linear) and _own(part)
        ]

    def look(self, told: Tensor | None = None, table: Table | None = None, ids: Tensor | None = None) -> _Seen:
        """Run once, every time with the same chances.

        Args:
            told: positions to hand to the stack.
            table, ids: a table, and what it is to answer for, in as many equal rows.
        """
        states: list[Tensor] = []
        handed: list[Any] = []
        tables: list[Table] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            handed.append(kwargs.get("position_ids"))
            return None if told is None else (args, {**kwargs, "position_ids": told})

        def note(part: nn.Module, _args: Any, output: Any) -> None:
            found = _where(part, output)
            if found is not None and all(one.module is not part for one in tables):
                tables.append(found)

        handles = [part.register_forward_hook(note) for part in self.parts]
        handles.append(self.module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(
            self.module.register_forward_hook(lambda _m, _a, out: states.append(last_hidden_state(out).detach()))
        )
        if table is not None and ids is not None:
            place_at_table(table, ids, handles)
        try:
            with torch.random.fork_rng(devices=[]):
                self._seed(0)
                self.run(len(ids) if ids is not None and ids.dim() == 2 else 1)
        finally:
            for handle in handles:
                handle.remove()
        return _Seen(states[-1], handed[-1], tables)


def _own(part: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own matrices, by name."""
    own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
    return [(name, tensor) for name, tensor in own if tensor.dim() == 2 and tensor.is_floating_point()]


def _where(part: nn.Module, output: Any) -> Table | None:
    """Where in a module's own matrix its output's columns stand one after another; None if they do not."""
    if not isinstance(output, Tensor) or output.dim() not in (2, 3):
        return None
    rows = output if output.dim() == 2 else output[0]
    if len(rows) < 2 or torch.equal(rows[0], rows[1]):
        return None
    for name, matrix in _own(part):
        if matrix.shape[1] != rows.shape[1] or len(matrix) < len(rows):
            continue
        matrix = read(part, name, matrix)  # it may be offloaded
        if matrix.is_meta:
            continue
        matrix = matrix.to(rows.device)
        for first in (matrix == rows[0]).all(-1).nonzero().flatten().tolist():
            if torch.equal(matrix[first : first + len(rows)], rows):
                return Table(part, name, first)
    return None
