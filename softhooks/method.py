"""`Method`, the base class of all methods, which hold options and build encoders."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn
from torch.utils.data import Sampler

from softhooks.backbone.attention_groups import groups_of, require_sites
from softhooks.backbone.stack import ModelStructure, Role, Site, Stack
from softhooks.errors import MAX_VIRTUAL_TOKENS, CheckpointError, check_int
from softhooks.inject.branch.branch import BranchInputs
from softhooks.layout.layout import Layout
from softhooks.objectives.base import Objective, PromptOnModel
from softhooks.prompt_encoder import EMBEDDINGS, PromptEncoder, TableEncoder

METHODS: dict[str, type[Method]] = {}
"""The registered methods by `kind`. Importing `softhooks.methods` registers the methods of softhooks."""

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 4
_SHORT.maxstring, _SHORT.maxother = 40, 80

COLUMN_METHODS: dict[str, list[str]] = {}
"""For each batch column, the registered methods that use it, each followed by the options with which it does so."""


@dataclass(frozen=True)
class Method:
    """A method of soft prompt tuning, with its options.

    A method builds an encoder, which computes the prompt as one or more named tensors, called groups; see `PromptEncoder`. A site
    is an attention module to which keys and values can be added; see `Site`.

    Args:
        num_virtual_tokens: the number of virtual tokens (P).
    """

    kind: ClassVar[str] = ""
    """The name of the method in saved prompts and on the command line."""

    enters: ClassVar[Literal["embeddings", "attention", "branch"]] = "embeddings"
    """Whether the prompt consists of input embeddings, of keys and values, or of a gated branch in each attention module."""

    init_options: ClassVar[tuple[str, ...]] = ()
    """The options that only affect the initialization of a new prompt. A saved prompt is loaded without them."""

    columns: ClassVar[tuple[str, ...]] = ()
    """The batch columns that the method uses. The model's forward accepts them as extra arguments."""

    optional_columns: ClassVar[dict[str, str]] = {}
    """Batch columns that the method uses only with some options, each with a description of these options."""

    sampler_class: ClassVar[type[Any]] = type(None)
    """The class of the method's `sampler`. A Trainer's sampler of this class is not replaced."""

    renders_rows: ClassVar[bool] = False
    """Whether the method has a `render`, whose rows have a label for each token; a Trainer's default collator then pads them."""

    conventions_allowed: ClassVar[dict[str, tuple[Any, ...]]] = {"placement": ("front", "after_first", "end")}
    """The entries of `conventions` that a saved prompt must contain, and their possible values."""

    num_virtual_tokens: int

    def __post_init__(self) -> None:
        check_int("num_virtual_tokens", self.num_virtual_tokens, maximum=MAX_VIRTUAL_TOKENS)

    @property
    def batch_columns(self) -> tuple[str, ...]:
        """The batch columns that the method uses with these options."""
        return self.columns

    def build(self, structure: ModelStructure) -> PromptEncoder:
        """Build and initialize the encoder for a model."""
        raise NotImplementedError(f"{type(self).__name__} must implement `build`.")

    def probe_arguments(self) -> dict[str, Tensor]:
        """Return the batch columns for the row that `attach` runs through the model."""
        return {}

    def has_unused_parameters(self, given: Container[str]) -> bool:
        """Return whether some parameters get no gradient in a training step whose batch has the columns `given`."""
        return False

    @property
    def has_sampler(self) -> bool:
        """Whether a Trainer uses the method's `sampler` instead of its own."""
        return False

    def sampler(self, rows: Any, batch_size: int, seed: int) -> Sampler[int]:
        """Make the sampler for a Trainer.

        Args:
            rows: the dataset.
            batch_size: the batch size of one process.
            seed: the random seed.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `sampler`.")

    def objective(self) -> Objective | None:
        """Return the training objective that replaces or extends the model's own loss, or None to use only that loss."""
        return None

    def check(self, prompt: PromptOnModel) -> None:
        """Raise an error if the method does not support the model or the chosen injection."""

    def sites(self, stack: Stack, role: Role) -> list[Site]:
        """Return the attention modules of a stack that the prompt enters, in the order of their slices of its tensors."""
        return stack.sites_of(role)

    def table_slices(self, structure: ModelStructure, group: str) -> list[TableSlice]:
        """Return the parts of a group's tensor, one for each module; `attach` checks that each part gets a gradient."""
        # Embeddings are not checked, because a text need not use all slots of a layout.
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
        """Compute the virtual tokens and gates of each attention module of a stack.

        Args:
            table: a function that takes the name of one of the encoder's groups and computes its tensor.
            stack: the stack.
            context: the context of each row, [B, ...], or None if the forward pass has none.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `branch_inputs`.")

    # --- a folded prompt ----------------------------------------------------------------------------------------------

    def shapes(self, structure: ModelStructure) -> dict[str, tuple[int, int]]:
        """Return the shape that each group of a folded prompt must have on a model.

        Raises:
            UnsupportedMethodError: the method does not work with this model.
        """
        if self.enters == "embeddings":
            return {EMBEDDINGS: (self.num_virtual_tokens, structure.entry.width)}
        require_sites(structure)
        return {
            group: (self.num_virtual_tokens, sum(site.size for site in self.sites(stack, role)))
            for group, (stack, role) in groups_of(structure).items()
        }

    def check_tables(self, tables: dict[str, Tensor], source: str) -> None:
        """Check the tensors of a saved prompt against its options.

        Raises:
            CheckpointError: the tensors do not match the options.
        """
        rows = sorted({table.shape[0] for table in tables.values()})
        if rows != [self.num_virtual_tokens]:
            raise CheckpointError(
                f"{source} has options for {self.num_virtual_tokens} virtual tokens, but its tensors have {rows} rows."
            )
        if (set(tables) == {EMBEDDINGS}) != (self.enters == "embeddings"):
            raise CheckpointError(
                f"{source} has the tensors {sorted(tables)}, which a {self.kind} prompt does not have."
            )

    def folded_encoder(self, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make the encoder of a folded prompt."""
        return TableEncoder(tables)

    def rebuild(self, structure: ModelStructure, tables: dict[str, Tensor]) -> PromptEncoder:
        """Make an encoder with which a folded prompt can be trained further."""
        return self.folded_encoder(tables)

    @property
    def token_layout(self) -> Layout:
        """Where virtual tokens are inserted in the text."""
        return Layout.placed("front", self.num_virtual_tokens)

    def conventions(self, structure: ModelStructure) -> dict[str, Any]:
        """Return the assumptions about the forward pass that are saved with a prompt and checked by `load`."""
        return {"placement": self.token_layout.form.placement}

    def __str__(self) -> str:
        """Return the method with its number of virtual tokens and the options that differ from their defaults."""
        shown = [
            f"{item.name}={_SHORT.repr(getattr(self, item.name))}"
            for item in dataclasses.fields(self)
            if item.repr and (item.name == "num_virtual_tokens" or getattr(self, item.name) != item.default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def options(self) -> dict[str, Any]:
        """Return the options as JSON values, without tokenizers and tensors, which are only needed to initialize a prompt."""
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


class TableSlice(NamedTuple):
    """The part of one of the prompt's tensors that belongs to one module of the model."""

    name: str
    rows: slice
    columns: slice
    module: nn.Module


def slices_of(parts: list[tuple[str, int, nn.Module]], by_rows: bool = False) -> list[TableSlice]:
    """Divide the columns or the rows of a tensor into consecutive parts with the given names, sizes and modules."""
    found, first = [], 0
    for name, size, module in parts:
        own = slice(first, first + size)
        rows, columns = (own, slice(None)) if by_rows else (slice(None), own)
        found.append(TableSlice(name, rows, columns, module))
        first += size
    return found


def register(methods: list[type[Method]]) -> None:
    """Register methods in `METHODS`, and their batch columns in `COLUMN_METHODS`."""
    for method in methods:
        METHODS[method.kind] = method
        for column, note in {**dict.fromkeys(method.columns, ""), **method.optional_columns}.items():
            COLUMN_METHODS.setdefault(column, []).append(f"{method.__name__} {note}".rstrip())
