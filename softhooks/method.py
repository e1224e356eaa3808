"""What a method is: frozen options, and how they become the encoder that is trained.

A new method is one file in `methods/` with a subclass of `Method`, one line in `methods/__init__.py`, and one line in the tests'
table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from softhooks.errors import CheckpointError, OptionError
from softhooks.groups import groups_of, require_sites
from softhooks.layout.places import Layout
from softhooks.parts import Part, cut

if TYPE_CHECKING:
    from torch.utils.data import Sampler

    from softhooks.anatomy import Anatomy, Role, Site, Stack
    from softhooks.inject.branch import Given
    from softhooks.objectives import Objective
    from softhooks.prompt import SoftPrompt

EMBEDDINGS = "embeddings"
"""The group of an encoder whose prompt enters as embedding rows."""


class PromptEncoder(nn.Module):
    """What is trained: it makes a prompt, without a batch dimension.

    Subclasses list their `groups` and compute each in `forward`. A group is `embeddings`, or the part of the model that keys
    and values enter: `text`, or `encoder`, `decoder` and `cross`. What else a subclass may do has a default here: make one of
    several variants for each row, hide virtual tokens from some rows, keep its parameters within bounds.
    """

    groups: tuple[str, ...] = ()
    start_ids: Sequence[int | None] | None = None
    """The ids of the words that a new prompt's embedding rows are, None where a row is no word; None: no row is one."""

    is_constrained: ClassVar[bool] = False
    """Whether `constrain` must run after each optimizer step."""

    @property
    def unmoved(self) -> frozenset[str]:
        """The names of parameters whose gradient is zero whatever the model does, such as recurrent weights over one row."""
        return frozenset()

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Compute one group's prompt, [P, H] or [P, numbers of the group's sites]."""
        raise NotImplementedError(f"{type(self).__name__} must compute its groups {self.groups}.")

    def choose(self, given: dict[str, Tensor], batch: int) -> Sequence[int] | None:
        """Choose each row's variant by the extra arguments of the forward; None where there is only one."""
        return None

    def hidden(self, given: dict[str, Tensor], batch: int) -> Tensor | None:
        """Which virtual tokens each row does not see in this forward, [B or 1, P] bool; None: it sees all."""
        return None

    def constrain(self) -> None:
        """Bring the parameters back to where they may be, once after each step; runs without gradients."""

    def metrics(self) -> dict[str, float]:
        """What to show in a training log, by name: gates, shares of projected tokens. Asked for only when one is due."""
        return {}

    def folded(self) -> dict[str, Tensor]:
        """Run the reparametrisation once and keep only its result, in fp32."""
        with self._at_rest():
            return {group: self(group).detach().float().clone() for group in self.groups}

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        for tensor in chain(self.parameters(), self.buffers()):
            return tensor.device
        return torch.device("cpu")

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Compute as in evaluation, without gradients, in the parameters' own precision."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            self.train(training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copied or unpickled state; a copy is constrained as the original is."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        from softhooks.constraint import watch

        watch(self)


class TableEncoder(PromptEncoder):
    """A prompt that is its own parameter: prompt tuning, a prefix without an MLP, and every folded prompt.

    Args:
        tables: [P, numbers] for each group.
    """

    def __init__(self, tables: dict[str, Tensor]) -> None:
        super().__init__()
        self.groups = tuple(tables)
        for group, table in tables.items():
            self.register_parameter(group, nn.Parameter(table.detach().float().clone()))

    def forward(self, group: str, variant: int = 0) -> Tensor:
        """Return the parameter itself, [P, numbers]."""
        table: Tensor = getattr(self, group)
        return table


@dataclass(frozen=True)
class Method:
    """The options of a method, checked when they are given.

    Args:
        num_virtual_tokens: P.
    """

    kind: ClassVar[str] = ""
    enters: ClassVar[Literal["embeddings", "attention", "branch"]] = "embeddings"
    start_options: ClassVar[tuple[str, ...]] = ()
    """The options that only say where a prompt starts; a saved prompt has no use for them."""

    columns: ClassVar[tuple[str, ...]] = ()
    """Extra arguments of the model's forward that the method takes: columns of the batch, which the model never sees."""

    conventions_allowed: ClassVar[dict[str, tuple[Any, ...]]] = {"placement": ("front", "after_first", "end")}
    """What a saved prompt must say about the pass, and may say."""

    num_virtual_tokens: int

    def __post_init__(self) -> None:
        """Check what every method shares."""
        count = self.num_virtual_tokens
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise OptionError(f"num_virtual_tokens must be a whole number of 1 or more; it is {count!r}.")

    def build(self, anatomy: Anatomy) -> PromptEncoder:
        """Make the encoder for a model, initialised."""
        raise NotImplementedError(f"{type(self).__name__} must build its encoder.")

    def probe_arguments(self) -> dict[str, Tensor]:
        """The extra arguments that a forward of one row cannot do without, for the checks at attach."""
        return {}

    def has_idle(self, given: Container[str]) -> bool:
        """Whether some parameters have no part in a training step.

        Args:
            given: the names of the extra arguments that its forwards bring.
        """
        return False

    @property
    def draws_rows(self) -> bool:
        """Whether a Trainer's rows come in the order of the method's `sampler`, and not in its own."""
        return False

    def sampler(self, rows: Any, batch_size: int, seed: int) -> Sampler[int]:
        """Make the order in which a Trainer draws its rows.

        Args:
            rows: the data set.
            batch_size: of one process.
            seed: of the draws.
        """
        raise NotImplementedError(f"{type(self).__name__} must order the rows.")

    def objective(self) -> Objective | None:
        """What to train on beside, or in the place of, the model's own loss; None: the model's loss."""
        return None

    def check(self, prompt: SoftPrompt) -> None:
        """Refuse a model, or a way into it, that the method cannot serve; at attach, once the way in is known."""
        if prompt.objective is not None and any(q.requires_grad for q in prompt.encoder.parameters()):
            prompt.objective.check(prompt)

    def sites(self, stack: Stack, role: Role) -> list[Site]:
        """The sites of a stack that this method enters; a table of keys and values holds theirs, in this order."""
        return stack.sites_of(role)

    def parts(self, anatomy: Anatomy, group: str) -> list[Part]:
        """The parts of a group that each must get a gradient when the prompt trains.

        Of keys and values, those of each site. Embedding rows have none: a layout need not use all of them in every text.
        """
        if self.enters != "attention":
            return []
        stack, role = groups_of(anatomy)[group]
        sites = self.sites(stack, role)
        return cut([(f"the keys and values of {group} {role}-attention {s.index}", s.numbers, s.module) for s in sites])

    # --- a prompt that enters as a gated branch -----------------------------------------------------------------------

    @property
    def scales_linears(self) -> bool:
        """Whether the prompt also scales the model's linear layers."""
        return False

    def branch_given(self, table: Callable[[str], Tensor], stack: Stack, context: Tensor | None) -> Given:
        """What a stack gets.

        Args:
            table: computes one of the encoder's groups.
            context: the rows' own context, [B, ...], where the forward brings one.
        """
        raise NotImplementedError(f"{type(self).__name__} must make its rows and gates.")

    # --- a folded prompt ----------------------------------------------------------------------------------------------

    def shapes(self, anatomy: Anatomy) -> dict[str, tuple[int, int]]:
        """The tables of a folded prompt and their shapes, on a model.

        Raises:
            UnsupportedMethodError: the prompt cannot enter the model.
        """
        if self.enters == "embeddings":
            return {EMBEDDINGS: (self.num_virtual_tokens, anatomy.entry.width)}
        require_sites(anatomy)
        return {
            group: (self.num_virtual_tokens, sum(site.numbers for site in self.sites(stack, role)))
            for group, (stack, role) in groups_of(anatomy).items()
        }

    def check_tables(self, tables: dict[str, Tensor], source: str) -> None:
        """Check what a file holds against the options that it names, before there is a model.

        Raises:
            CheckpointError: they contradict each other.
        """
        rows = sorted({table.shape[0] for table in tables.values()})
        if rows != [self.num_virtual_tokens]:
            raise CheckpointError(
                f"{source} says {self.num_virtual_tokens} virtual tokens; its tensors have {rows} rows."
            )
        if (set(tables) == {EMBEDDINGS}) != (self.enters == "embeddings"):
            raise CheckpointError(f"{source} must hold what {self.kind} trains; it holds {sorted(tables)}.")

    def folded_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder of a prompt that is folded."""
        return TableEncoder(tables)

    def rebuild(self, anatomy: Anatomy, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder that goes on training a folded prompt."""
        return self.folded_encoder(tables)

    @property
    def where(self) -> Layout:
        """Where the virtual tokens stand."""
        return Layout.placed("front", self.num_virtual_tokens)

    def conventions(self, anatomy: Anatomy) -> dict[str, Any]:
        """What a prompt trained so takes for granted about the model's pass; stored with it."""
        return {"placement": self.where.placement}

    def options(self) -> dict[str, Any]:
        """The options as JSON can hold them; tokenizers and tensors are left out, their result is saved."""
        kept: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, (tuple, list)) and all(isinstance(part, (str, int)) for part in value):
                kept[item.name] = list(value)
            elif value is None or isinstance(value, (bool, int, float, str)):
                kept[item.name] = value
            elif isinstance(value, Layout):
                kept[item.name] = value.to_json()
        return kept


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Check an option that takes one of a few words.

    Raises:
        OptionError: naming the words.
    """
    if value not in allowed:
        raise OptionError(f"{name} must be one of {', '.join(map(repr, allowed))}; it is {value!r}.")
