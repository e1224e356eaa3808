"""What a method is: frozen options, and how they become the encoder that is trained.

A new method is one file in `methods/` with a subclass of `Method`, one line in `methods/__init__.py`, and one line in the tests'
table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from softhooks.backbone.entry_points import groups_of, require_sites
from softhooks.backbone.table_slices import TableSlice, slices_of
from softhooks.encoder import EMBEDDINGS, PromptEncoder, TableEncoder
from softhooks.errors import CheckpointError, OptionError
from softhooks.layout.layout import Layout

if TYPE_CHECKING:
    from torch.utils.data import Sampler

    from softhooks.backbone.stack import ModelStructure, Role, Site, Stack
    from softhooks.inject.branch.branch import BranchInputs
    from softhooks.objectives.base import Objective, PromptOnModel


METHODS: dict[str, type[Method]] = {}
"""The methods by the name that saved prompts and the command line have for them; `softhooks.methods` lists them."""


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

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Make the encoder for a model, initialized."""
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

    def check(self, prompt: PromptOnModel) -> None:
        """Refuse a model or an injection that the method does not support. Called at attach, once the injection is known."""

    def sites(self, stack: Stack, role: Role) -> list[Site]:
        """The sites of a stack that this method enters; a table of keys and values holds theirs, in this order."""
        return stack.sites_of(role)

    def parts(self, structure: ModelStructure, group: str) -> list[TableSlice]:
        """The parts of a group that each must get a gradient when the prompt trains.

        Of keys and values, those of each site. Embedding rows have none: a layout need not use all of them in every text.
        """
        if self.enters != "attention":
            return []
        stack, role = groups_of(structure)[group]
        sites = self.sites(stack, role)
        return slices_of(
            [(f"the keys and values of {group} {role}-attention {s.index}", s.size, s.module) for s in sites]
        )

    # --- a prompt that enters as a gated branch -----------------------------------------------------------------------

    @property
    def scales_linears(self) -> bool:
        """Whether the prompt also scales the model's linear layers."""
        return False

    def branch_given(self, table: Callable[[str], Tensor], stack: Stack, context: Tensor | None) -> BranchInputs:
        """What a stack gets.

        Args:
            table: computes one of the encoder's groups.
            context: the rows' own context, [B, ...], where the forward brings one.
        """
        raise NotImplementedError(f"{type(self).__name__} must make its rows and gates.")

    # --- a folded prompt ----------------------------------------------------------------------------------------------

    def shapes(self, structure: ModelStructure) -> dict[str, tuple[int, int]]:
        """The tables of a folded prompt and their shapes, on a model.

        Raises:
            UnsupportedMethodError: the prompt cannot enter the model.
        """
        if self.enters == "embeddings":
            return {EMBEDDINGS: (self.num_virtual_tokens, structure.entry.width)}
        require_sites(structure)
        return {
            group: (self.num_virtual_tokens, sum(site.size for site in self.sites(stack, role)))
            for group, (stack, role) in groups_of(structure).items()
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

    def rebuild(self, structure: ModelStructure, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder that goes on training a folded prompt."""
        return self.folded_encoder(tables)

    @property
    def where(self) -> Layout:
        """Where the virtual tokens stand."""
        return Layout.placed("front", self.num_virtual_tokens)

    def conventions(self, structure: ModelStructure) -> dict[str, Any]:
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
