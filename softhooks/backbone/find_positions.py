"""Find out which positions a stack gives to its tokens by observing its position tables and passing `position_ids`.

Names and configs are unreliable here: positions start after a padding index (RoBERTa, Luke), at an offset (OPT, Nystromformer)
or where the outer model chooses (PaliGemma); some position tables are buffers (M2M100); some forwards ignore `position_ids`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.find_stack import ModuleCall
from softhooks.backbone.position_table import set_table_positions
from softhooks.backbone.probing import FORWARD_ERRORS, are_close, recorded_states, seeded
from softhooks.backbone.stack import Positions, PositionTable
from softhooks.compat.offload import read_tensor
from softhooks.patching.patches import Patches


@dataclass
class _Forward:
    """Observations from one forward: the last hidden states, `position_ids` and position tables of the stack."""

    states: Tensor
    position_ids: Any = None
    tables: list[PositionTable] = field(default_factory=list)


def find_positions(
    run: Callable[[int], Any], calls: Iterable[ModuleCall], module: nn.Module, embedding: nn.Module, takes_ids: bool
) -> Positions:
    """Find out which positions a stack gives to its tokens, and how to give them other positions.

    Args:
        run: runs the model on the given number of identical rows of probe ids.
        calls: the module calls in a forward of one row.
        module: the module of the stack.
        embedding: its token embedding.
        takes_ids: whether its forward has the argument `position_ids`.
    """
    probe = _Probe(run, module, embedding)
    plain = probe.observed(calls)
    counted = torch.arange(plain.states.shape[1], device=plain.states.device)[None]
    start = _start(probe, plain, counted) if takes_ids else None
    table = plain.tables[0] if len({id(table.module) for table in plain.tables}) == 1 else None
    if start is not None:
        table = None
    if table is not None:
        # Run two rows with different positions: if the first row's states change, the table cannot give each row its own.
        table.by_row = _is_same(probe, plain, table=table, ids=torch.cat([counted, counted + 1]))
        if not table.by_row and not _is_same(probe, plain, table=table, ids=counted[0]):
            table = None
    config: Any = getattr(module, "config", None)
    trained = getattr(config, "max_position_embeddings", None)
    limits = [len(getattr(table.module, table.weight)) - table.first for table in plain.tables]
    if not limits and any("embed_positions" in name for name, _ in module.named_buffers()):
        limits = [trained] if isinstance(trained, int) else []
    padding = next((getattr(table.module, "padding_idx", None) for table in plain.tables), None)
    return Positions(
        takes_position_ids=start is not None,
        table=table,
        start=start or 0,
        padding=padding if start and padding == start - 1 else None,
        limit=min(limits, default=None),
        trained=trained if isinstance(trained, int) else None,
        for_each_row=start is not None and not _takes_one_row(probe, plain, counted + start),
    )


def _takes_one_row(probe: _Probe, plain: _Forward, position_ids: Tensor) -> bool:
    """Whether one row of `position_ids` can be passed for two rows of text."""
    try:
        return probe.run(position_ids, rows=2).states.shape[1:] == plain.states.shape[1:]
    except FORWARD_ERRORS:
        return False


def _start(probe: _Probe, plain: _Forward, counted: Tensor) -> int | None:
    """Find the position id of the first token: passing `position_ids` that count up from it leaves the states unchanged.

    Returns:
        the id, or None if none is found or if other ids leave the states unchanged too (the stack ignores `position_ids`).
    """
    if isinstance(plain.position_ids, Tensor):
        return int(plain.position_ids.flatten()[0])
    padding = getattr(getattr(probe.module, "config", None), "pad_token_id", None)
    candidates = [0, 1, 2, *([padding + 1] if isinstance(padding, int) else [])]
    try:
        from_zero = probe.run(position_ids=counted)
    except FORWARD_ERRORS:
        from_zero = None
    if from_zero is not None and from_zero.tables and plain.tables:
        candidates = [plain.tables[0].first - from_zero.tables[0].first, *candidates]
    for start in dict.fromkeys(candidates):
        if start == 0:
            is_start = from_zero is not None and are_close(from_zero.states, plain.states)
        else:
            is_start = start > 0 and _is_same(probe, plain, position_ids=counted + start)
        if is_start:
            return None if _is_same(probe, plain, exactly=True, position_ids=2 * counted + start) else start
    return None


def _is_same(probe: _Probe, plain: _Forward, exactly: bool = False, **change: Any) -> bool:
    """Whether the states of the first row stay the same with other positions; False if the model fails on these."""
    try:
        states = probe.run(**change).states[:1]
    except FORWARD_ERRORS:
        return False
    return torch.equal(states, plain.states) if exactly else are_close(states, plain.states)


class _Probe:
    """Runs a model and observes one of its stacks. See `find_positions` for the arguments."""

    def __init__(self, run: Callable[[int], Any], module: nn.Module, embedding: nn.Module) -> None:
        self._run = run
        self.module = module
        self._tables = [
            part
            for part in module.modules()
            if part is not embedding and not isinstance(part, nn.Linear) and _matrices(part)
        ]

    def observed(self, calls: Iterable[ModuleCall]) -> _Forward:
        """Return the observations from the module calls in a forward."""
        by_end = sorted(calls, key=lambda call: call.end)
        own = [call for call in by_end if call.module is self.module][-1]
        assert own.state is not None
        found = _Forward(own.state, own.position_ids)
        for call in by_end:
            if isinstance(call.output, Tensor) and any(call.module is part for part in self._tables):
                _add_table(found.tables, call.module, call.state)
        return found

    def run(
        self,
        position_ids: Tensor | None = None,
        table: PositionTable | None = None,
        ids: Tensor | None = None,
        rows: int = 1,
    ) -> _Forward:
        """Run the model once, with a fixed random seed, and return the observations.

        Args:
            position_ids: passed to the stack.
            table, ids: a position table, and the positions whose rows it must return, [T] or [B, T].
            rows: the number of rows of text, if `ids` does not give it.
        """
        given: list[Any] = []
        tables: list[PositionTable] = []

        def give(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given.append(kwargs.get("position_ids"))
            return None if position_ids is None else (args, {**kwargs, "position_ids": position_ids})

        with Patches() as patches, recorded_states(self.module) as states, seeded(self.module):
            for part in self._tables:
                patches.keep(part.register_forward_hook(lambda part, _args, output: _add_table(tables, part, output)))
            patches.keep(self.module.register_forward_pre_hook(give, with_kwargs=True))
            if table is not None and ids is not None:
                patches.keep(set_table_positions(table, ids))
            self._run(len(ids) if ids is not None and ids.dim() == 2 else rows)
        return _Forward(states[-1], given[-1], tables)


def _add_table(tables: list[PositionTable], part: nn.Module, output: Any) -> None:
    """Add a module to `tables` if its output consists of consecutive rows of its matrix, unless it is already listed."""
    found = _consecutive_rows(part, output)
    if found is not None and all(table.module is not part for table in tables):
        tables.append(found)


def _matrices(part: nn.Module) -> list[tuple[str, Tensor]]:
    own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
    return [(name, tensor) for name, tensor in own if tensor.dim() == 2 and tensor.is_floating_point()]


def _consecutive_rows(part: nn.Module, output: Any) -> PositionTable | None:
    """Return a `PositionTable` if a module's output consists of consecutive rows of one of its matrices, otherwise None."""
    if not isinstance(output, Tensor) or output.dim() not in (2, 3):
        return None
    rows = output if output.dim() == 2 else output[0]
    if len(rows) < 2 or torch.equal(rows[0], rows[1]):
        return None
    for name, matrix in _matrices(part):
        if matrix.shape[1] != rows.shape[1] or len(matrix) < len(rows):
            continue
        matrix = read_tensor(part, name, matrix)  # it may be offloaded
        if matrix.is_meta:
            continue
        matrix = matrix.to(rows.device)
        for first in (matrix == rows[0]).all(-1).nonzero().flatten().tolist():
            if torch.equal(matrix[first : first + len(rows)], rows):
                return PositionTable(part, name, first)
    return None
