"""What a method is: frozen options, and how they become the encoder that is trained.

A new method is one file in `methods/` with a subclass of `Method`, one line in `methods/__init__.py`, and one line in the tests'
table.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from softhooks.errors import OptionError, PromptMismatchError, UnsupportedMethodError, explain
from softhooks.layout import Placement

if TYPE_CHECKING:
    from softhooks.anatomy import Anatomy, Stack

EMBEDDINGS = "embeddings"
"""The group of an encoder whose prompt enters as embedding rows."""


class PromptEncoder(nn.Module):
    """What is trained: it makes a prompt, without a batch dimension.

    Subclasses list their `groups` and compute each in `forward`. A group is `embeddings`, or the part of the model that keys
    and values enter: `text`, or `encoder`, `decoder` and `cross`.
    """

    groups: tuple[str, ...] = ()

    def forward(self, group: str) -> Tensor:
        """Compute one group's prompt, [P, H] or [P, numbers of the group's sites]."""
        raise NotImplementedError(f"{type(self).__name__} must compute its groups {self.groups}.")

    def folded(self) -> dict[str, Tensor]:
        """Run the reparametrisation once and keep only its result, in fp32."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad(), torch.autocast(next(self.parameters()).device.type, enabled=False):
                return {group: self(group).detach().float().clone() for group in self.groups}
        finally:
            self.train(training)


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

    def forward(self, group: str) -> Tensor:
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
    enters: ClassVar[Literal["embeddings", "attention"]] = "embeddings"
    start_options: ClassVar[tuple[str, ...]] = ()
    """The options that only say where a prompt starts; a saved prompt has no use for them."""

    num_virtual_tokens: int

    def __post_init__(self) -> None:
        """Check what every method shares."""
        count = self.num_virtual_tokens
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise OptionError(f"num_virtual_tokens must be a whole number of 1 or more; it is {count!r}.")

    def build(self, anatomy: Anatomy) -> PromptEncoder:
        """Make the encoder for a model, initialised."""
        raise NotImplementedError(f"{type(self).__name__} must build its encoder.")

    @property
    def where(self) -> Placement:
        """Where the virtual tokens stand."""
        return "front"

    def conventions(self, anatomy: Anatomy) -> dict[str, Any]:
        """What a prompt trained so takes for granted about the model's pass; stored with it."""
        return {"placement": self.where}

    def options(self) -> dict[str, Any]:
        """The options as JSON can hold them; tokenizers and tensors are left out, their result is saved."""
        kept: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, (tuple, list)) and all(isinstance(part, (str, int)) for part in value):
                kept[item.name] = list(value)
            elif value is None or isinstance(value, (bool, int, float, str)):
                kept[item.name] = value
        return kept


def choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Check an option that takes one of a few words.

    Raises:
        OptionError: naming the words.
    """
    if value not in allowed:
        raise OptionError(f"{name} must be one of {', '.join(map(repr, allowed))}; it is {value!r}.")


def groups_of(anatomy: Anatomy) -> dict[str, tuple[Stack, Literal["self", "cross"]]]:
    """Name the places that keys and values can enter: `text`, or `encoder`, `decoder` and `cross`."""
    groups: dict[str, tuple[Stack, Literal["self", "cross"]]] = {}
    for stack in anatomy.stacks:
        groups[stack.name] = (stack, "self")
        if stack.sites_of("cross"):
            groups["cross"] = (stack, "cross")
    return groups


def check_tables(anatomy: Anatomy, tables: dict[str, Tensor], source: str) -> None:
    """Check that a prompt fits a model.

    Raises:
        PromptMismatchError: groups or widths differ.
        UnsupportedMethodError: keys and values for a model that they cannot enter.
    """
    expected: dict[str, int] = {}
    if set(tables) == {EMBEDDINGS}:
        expected[EMBEDDINGS] = anatomy.entry.width
    else:
        require_sites(anatomy)
        for group, (stack, role) in groups_of(anatomy).items():
            expected[group] = sum(site.numbers for site in stack.sites_of(role))
    for group in sorted(set(expected) | set(tables)):
        table = tables.get(group)
        shape = "absent" if table is None else str(list(table.shape))
        if table is None or table.dim() != 2 or table.shape[1] != expected.get(group):
            raise PromptMismatchError(
                explain(
                    "a prompt must be as wide as the model that it enters.",
                    "Load it onto the base model that it was trained with.",
                    prompt=f"{group} {shape} ({source})",
                    model=f"{group} [P, {expected[group]}]"
                    if group in expected
                    else f"no {group} ({sorted(expected)})",
                )
            )


def require_sites(anatomy: Anatomy) -> None:
    """Check that keys and values can enter every stack.

    Raises:
        UnsupportedMethodError: naming the stack that they cannot enter.
    """
    for stack in anatomy.stacks:
        if stack.through is None:
            raise UnsupportedMethodError(
                explain(
                    "a key-value prefix needs attention that goes through transformers' attention interface or a cache.",
                    "Use a method that enters as embeddings, such as PromptTuning.",
                    model=f"{type(stack.module).__name__}, whose attention does neither",
                )
            )
