"""The prompts that a forward uses, the prompt of each row, and a check that a recomputed forward uses the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.errors import NotAttachedError, UnsupportedModeError
from softhooks.runtime.attached_prompt import AttachedPrompt


@dataclass(frozen=True)
class Use:
    """A prompt and one of its variants, such as a task of a multitask prompt; most prompts have a single variant."""

    prompt: AttachedPrompt
    variant: int = 0


@dataclass(frozen=True)
class Selection:
    """The prompts of a batch.

    Attributes:
        uses: the prompts and variants that rows of the batch use; variants of the same prompt are adjacent.
        rows: for each row of the batch, an index into `uses`, or None for no prompt. If all rows use the only entry of `uses`,
            `rows` itself is None.
        given: the extra arguments of this forward, by name.
        lengths: in a continuous batch whose requests use different prompts, the number of tokens of each request; `rows` then has
            one entry for each request, although all of them share one row.
    """

    uses: Sequence[Use]
    rows: Sequence[int | None] | None
    given: dict[str, Tensor] = field(default_factory=dict)
    lengths: Sequence[int] | None = None

    @property
    def prompts(self) -> list[AttachedPrompt]:
        """The prompts that the batch uses, each listed once."""
        return list(dict.fromkeys(use.prompt for use in self.uses))

    def by_prompt(self) -> Iterator[tuple[AttachedPrompt, tuple[int, ...]]]:
        """Yield each prompt with the variants that the batch uses."""
        for prompt, uses in groupby(self.uses, key=lambda use: use.prompt):
            yield prompt, tuple(use.variant for use in uses)

    @property
    def variants(self) -> tuple[int | None, ...]:
        """The variant of each row (None for a row without a prompt), or a single variant for all rows."""
        if self.rows is None:
            return (self.uses[0].variant,)
        return tuple(None if row is None else self.uses[row].variant for row in self.rows)

    def choice_of_prompts(self) -> Sequence[int | None] | None:
        """Return for each row an index into `prompts`, or None for no prompt; return None if `rows` is None."""
        if self.rows is None:
            return None
        prompts = self.prompts
        return [None if row is None else prompts.index(self.uses[row].prompt) for row in self.rows]

    def hidden(self, batch: int, length: int) -> Tensor | None:
        """Return a mask of the virtual tokens that are hidden from each row, [B or 1, length], or None if no token is hidden.

        Prompts with fewer than `length` tokens are aligned at the end: the last entry of each row is the last virtual token.
        """
        found: list[Tensor | None] = []
        for prompt in self.prompts:
            own = prompt.encoder.hidden_tokens(self.given, batch)
            found.append(None if own is None else functional.pad(own, (length - own.shape[-1], 0)))
        present = [mask for mask in found if mask is not None]
        if not present:
            return None
        choice = self.choice_of_prompts()
        if choice is None:
            return found[0]
        nothing = torch.zeros(batch, length, dtype=torch.bool, device=present[0].device)
        masks = [nothing if mask is None else mask.expand(batch, -1) for mask in found]
        return torch.stack([nothing[i] if chosen is None else masks[chosen][i] for i, chosen in enumerate(choice)])


def select_rows(
    prompts: dict[str, AttachedPrompt], names: Sequence[str | None], batch: int, given: dict[str, Tensor]
) -> Selection:
    """Select the prompt, and its variant, for each row of a batch.

    Args:
        prompts: all prompts of the model, by name.
        names: the name of each row's prompt, or one name for all rows.
        batch: the number of rows.
        given: the extra arguments of the forward.
    """
    each = list(names) * batch if len(names) == 1 else list(names)
    used = list(dict.fromkeys(name for name in each if name is not None))
    for name in used:
        if name not in prompts:
            raise NotAttachedError(
                f"`rows` names the prompt {name!r}, which has been removed; attached: {list(prompts)}."
            )
    variants = {name: _variants(prompts[name], given, batch) for name in used}
    keys = [None if name is None else (name, variants[name][row]) for row, name in enumerate(each)]
    distinct = sorted({key for key in keys if key is not None}, key=lambda key: (used.index(key[0]), key[1]))
    uses = [Use(prompts[name], variant) for name, variant in distinct]
    if len(distinct) == 1 and None not in keys:
        return Selection(uses, None, given)
    return Selection(uses, [None if key is None else distinct.index(key) for key in keys], given)


def select_requests(
    prompts: dict[str, AttachedPrompt], names: Sequence[str | None], lengths: Sequence[int], given: dict[str, Tensor]
) -> Selection:
    """Select the prompt of each request of a continuous batch; see `Selection.lengths`."""
    return replace(select_rows(prompts, names, len(names), given), lengths=lengths)


def _variants(prompt: AttachedPrompt, given: dict[str, Tensor], batch: int) -> Sequence[int]:
    chosen = prompt.encoder.choose_variants(given, batch)
    if chosen is None:
        return [0] * batch
    if len(chosen) != batch:
        raise UnsupportedModeError(
            f"an extra argument has {len(chosen)} values for a batch of {batch} rows; give one value for each row.",
            f"Check the columns that {prompt.method.kind} uses: {', '.join(prompt.method.batch_columns)}.",
            prompt=prompt.name,
        )
    return chosen


@dataclass
class RecomputeCheck:
    """Check that a forward that is recomputed in the backward uses the same prompts as in its first run.

    With a gradient checkpoint around the whole model, a forward may be recomputed in another thread, outside of its `with` block
    or after `activate`. It is unknown which forward is recomputed, so all forwards must have used the same prompts.

    Attributes:
        seen: the names of the first forward's prompts, as one string.
        differs: whether later forwards have used different prompts.
    """

    seen: str | None = None
    differs: bool = False

    def note(self, selection: str, training: bool) -> None:
        """Store the prompts of a forward, or check them inside a backward.

        Args:
            selection: the names of the active prompts, as one string.
            training: whether the model is in training mode. If so, the prompts are stored even without gradients, because a
                reentrant checkpoint disables gradients in the first run.

        Raises:
            UnsupportedModeError: the first run may have used different prompts.
        """
        if torch._C._current_graph_task_id() != -1:  # inside a backward
            if self.differs or self.seen != selection:
                raise UnsupportedModeError(
                    "a backward recomputes a forward, but the prompts may have changed since its first run; "
                    "both runs must use the same prompts.",
                    "Checkpoint the layers (`gradient_checkpointing_enable()`) instead of the whole model.",
                    before="several" if self.differs else self.seen or "unknown",
                    now=selection,
                )
        elif training or torch.is_grad_enabled():
            self.differs = self.differs or self.seen not in (None, selection)
            self.seen = selection if self.seen is None else self.seen
