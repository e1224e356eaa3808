"""The interface of a method: its options, and how they become the encoder that is trained.

A simple method is one file in `methods/` with a subclass of `Method`, one line in `methods/__init__.py`, and one line in the
table of the tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from softhooks.backbone.attention_groups import groups_of, require_sites
from softhooks.backbone.table_slices import TableSlice, slices_of
from softhooks.errors import CheckpointError, check_int
from softhooks.layout.layout import Layout
from softhooks.prompt_encoder import EMBEDDINGS, PromptEncoder, TableEncoder

if TYPE_CHECKING:
    from torch.utils.data import Sampler

    from softhooks.backbone.stack import ModelStructure, Role, Site, Stack
    from softhooks.inject.branch.branch import BranchInputs
    from softhooks.objectives.base import Objective, PromptOnModel


METHODS: dict[str, type[Method]] = {}
"""The methods by kind, the name in saved prompts and on the command line. `softhooks.methods` registers them."""

COLUMN_METHODS: dict[str, list[str]] = {}
"""For each batch column, a description of the registered methods and options that take the column."""


@dataclass(frozen=True)
class Method:
    """The options of a method, checked when it is made.

    Args:
        num_virtual_tokens: P.
    """

    kind: ClassVar[str] = ""
    enters: ClassVar[Literal["embeddings", "attention", "branch"]] = "embeddings"
    """The form of the prompt: rows of embeddings, keys and values at attention, or a gated branch next to attention."""

    init_options: ClassVar[tuple[str, ...]] = ()
    """The options that only concern the initialization of a new prompt; a saved prompt is loaded without them."""

    columns: ClassVar[tuple[str, ...]] = ()
    """Batch columns that the method takes. They are extra arguments of the model's forward."""

    optional_columns: ClassVar[dict[str, str]] = {}
    """Batch columns that the method only takes with some options, with a description of these options."""

    sampler_class: ClassVar[type[Any]] = type(None)
    """The class of the method's `sampler`, or None; a Trainer's sampler of this class is not replaced."""

    conventions_allowed: ClassVar[dict[str, tuple[Any, ...]]] = {"placement": ("front", "after_first", "end")}
    """The conventions that a saved prompt must have, and their possible values."""

    num_virtual_tokens: int

    def __post_init__(self) -> None:
        """Check the options that all methods share."""
        check_int("num_virtual_tokens", self.num_virtual_tokens)

    @property
    def batch_columns(self) -> tuple[str, ...]:
        """The batch columns that the method takes with these options."""
        return self.columns

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Build the initialized encoder for a model."""
        raise NotImplementedError(f"{type(self).__name__} must implement `build`.")

    def probe_arguments(self) -> dict[str, Tensor]:
        """Return the batch columns that a forward of one row needs, for the checks at attach."""
        return {}

    def has_unused_parameters(self, given: Container[str]) -> bool:
        """Return whether some parameters get no gradient in a training step.

        Args:
            given: the names of the batch columns that its forwards have.
        """
        return False

    @property
    def has_sampler(self) -> bool:
        """Whether a Trainer draws its rows by the method's `sampler` instead of its own."""
        return False

    def sampler(self, rows: Any, batch_size: int, seed: int) -> Sampler[int]:
        """Make the sampler by which a Trainer draws its rows.

        Args:
            rows: the data set.
            batch_size: the batch size of one process.
            seed: the seed.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `sampler`.")

    def objective(self) -> Objective | None:
        """Make the training objective that adds to, or replaces, the model's own loss; return None to keep that loss alone."""
        return None

    def check(self, prompt: PromptOnModel) -> None:
        """Refuse a model or an injection that the method does not support. Called at attach, after the choice of injection."""

    def sites(self, stack: Stack, role: Role) -> list[Site]:
        """Return the attention layers of a stack that the prompt enters, in the order of the tables of keys and values."""
        return stack.sites_of(role)

    def table_slices(self, structure: ModelStructure, group: str) -> list[TableSlice]:
        """Return the parts of a group that must each get a gradient when the prompt is trained; attach checks it.

        Keys and values have a part for each attention layer. Embedding rows have none: a text need not use all of a layout.
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

    def branch_inputs(self, table: Callable[[str], Tensor], stack: Stack, context: Tensor | None) -> BranchInputs:
        """Compute the rows and gates of a stack.

        Args:
            table: computes one of the encoder's groups.
            stack: the stack.
            context: a context for each row of the batch, [B, ...], if the forward has one.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `branch_inputs`.")

    # --- a folded prompt ----------------------------------------------------------------------------------------------

    def shapes(self, structure: ModelStructure) -> dict[str, tuple[int, int]]:
        """Return the shapes of a folded prompt's tables on a model.

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
        """Check the tables of a file against its options, before a model is known.

        Raises:
            CheckpointError: tables and options do not match.
        """
        rows = sorted({table.shape[0] for table in tables.values()})
        if rows != [self.num_virtual_tokens]:
            raise CheckpointError(
                f"{source} has options for {self.num_virtual_tokens} virtual tokens, but its tensors have {rows} rows."
            )
        if (set(tables) == {EMBEDDINGS}) != (self.enters == "embeddings"):
            raise CheckpointError(
                f"the tensors {sorted(tables)} in {source} do not match the tensors of a {self.kind} prompt."
            )

    def folded_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder of a folded prompt."""
        return TableEncoder(tables)

    def rebuild(self, structure: ModelStructure, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder that continues the training of a folded prompt."""
        return self.folded_encoder(tables)

    @property
    def token_layout(self) -> Layout:
        """The places of the virtual tokens."""
        return Layout.placed("front", self.num_virtual_tokens)

    def conventions(self, structure: ModelStructure) -> dict[str, Any]:
        """Return the prompt's assumptions about the forward pass, which are saved with the prompt and checked by `load`."""
        return {"placement": self.token_layout.placement}

    def options(self) -> dict[str, Any]:
        """Return the options as JSON values, without tokenizers and tensors, because the saved prompt has their results."""
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


def register(methods: list[type[Method]]) -> None:
    """Add methods to `METHODS`, and their batch columns to `COLUMN_METHODS`."""
    for method in methods:
        METHODS[method.kind] = method
        for column, note in {**dict.fromkeys(method.columns, ""), **method.optional_columns}.items():
            COLUMN_METHODS.setdefault(column, []).append(f"{method.__name__} {note}".rstrip())
