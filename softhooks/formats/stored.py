"""A prompt as a file holds it: read, checked in itself, and checked against a model, before anything is attached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.added_vocabulary import require_rows
from softhooks.backbone.entry_points import check_tables
from softhooks.backbone.stack import ModelStructure
from softhooks.base_model.check import fingerprint_of
from softhooks.encoder import PromptEncoder, TableEncoder
from softhooks.errors import CheckpointError, PromptMismatchError, SoftHooksError
from softhooks.formats.conventions import read_conventions
from softhooks.formats.files import parse_json, read_tensors
from softhooks.formats.stack_outline import in_words, outline
from softhooks.method import Method
from softhooks.methods import METHODS
from softhooks.runtime.added_tokens import read_ids
from softhooks.runtime.label_names import Labels, read_labels

FORMAT = "softhooks"
"""The key in a file's metadata under which it describes itself."""

FORMAT_VERSION = 1
PROMPT, HEAD, ADDED = "prompt.", "head.", "added."

_STACKS = ({"text"}, {"encoder", "decoder"})
_ROLES = ("self", "cross")
"""What a file may say about each stack of its base, beside its direction."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Stored:
    """A prompt as a file holds it, sound in itself but not yet on a model.

    Attributes:
        method: its options, without those that only say where it started.
        tables: the folded prompt by group, [P, numbers].
        heads: state dicts of its heads, by path.
        conventions: what it takes for granted about the pass.
        source: where it was read.
        stacks: what is known of the base, as `outline` tells it of a model; what is unknown is left out.
        remedy: what to do if the model is another.
        also_trained: names of base parameters that were trained beside it, and are not in the file.
        also_fits: raises if the file means something else on a model.
        base: `class`, `name_or_path`, `revision`, `quantization`, `fingerprint`, `width`, `vocabulary` of its model and whether
            its windows slide (`slides`), as far as they are known; where PEFT wrote it the `task` stands for the class.
        added: the prompt's own rows of the vocabulary, by name; and `added_ids`, of which tokens.
        labels: the names of its heads' labels, where they are known.
        is_file: whether it was read, so that its numbers are checked; one that is to be written may have diverged.
    """

    method: Method
    tables: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]
    conventions: dict[str, Any]
    source: str
    stacks: dict[str, dict[str, Any]]
    remedy: str = "Load it onto the base model that it was trained with."
    also_trained: list[str] = field(default_factory=list)
    also_fits: Callable[[ModelStructure], None] | None = None
    base: dict[str, Any] = field(default_factory=dict)
    labels: Labels | None = None
    added: dict[str, Tensor] = field(default_factory=dict)
    added_ids: tuple[int, ...] = ()
    is_file: bool = True

    @property
    def base_class(self) -> str:
        """The class of its model; empty if it is not known."""
        value = self.base.get("class")
        return value if isinstance(value, str) else ""

    @property
    def slides(self) -> bool | None:
        """Whether its model has sliding windows; None if it is not known."""
        value = self.base.get("slides")
        return value if isinstance(value, bool) else None

    @property
    def task(self) -> str:
        """The task that PEFT was told; empty if it was not."""
        value = self.base.get("task")
        return value if isinstance(value, str) else ""

    @property
    def base_name(self) -> str:
        """The name or the path of its model; empty if it is not known."""
        value = self.base.get("name_or_path")
        return value if isinstance(value, str) else ""

    def __post_init__(self) -> None:
        """Check that the numbers are numbers."""
        if not self.is_file:
            return
        named = {
            **self.tables,
            **self.added,
            **{f"{path}:{name}": t for path, head in self.heads.items() for name, t in head.items()},
        }
        for name, tensor in named.items():
            if tensor.dtype not in _FLOATS or not bool(torch.isfinite(tensor).all()):
                kind = tensor.dtype if tensor.dtype not in _FLOATS else "numbers that are infinite or not a number"
                raise CheckpointError(
                    "a prompt must consist of finite floating-point numbers.",
                    "Use a checkpoint from before the training diverged.",
                    file=self.source,
                    tensor=name,
                    holds=kind,
                )

    def encoder(self, structure: ModelStructure, trainable: bool) -> PromptEncoder:
        """Make the encoder: folded, or one that goes on training."""
        if trainable:
            return self.method.rebuild(structure, self.tables)
        return self.method.folded_encoder(self.tables).requires_grad_(False)

    def check_fit(self, structure: ModelStructure, *, strict: bool = True) -> None:
        """Compare the model that the prompt was made for with one that it shall enter.

        Raises:
            PromptMismatchError: stacks, their direction, the shape of their attention, or the prompt's own shape differ.
        """
        self._check_kind(structure)
        if strict:
            require_rows(self.base.get("vocabulary"), structure, self.source)
        if "task" in self.base and self.method.enters == "embeddings" and structure.entry.reads_ids:
            raise PromptMismatchError(
                "PEFT hands a model embeddings without ids, and this model's states depend on ids too.",
                "Train the prompt with softhooks.",
                prompt=self.source,
                model=type(structure.entry.module).__name__,
            )
        if self.also_fits is not None:
            self.also_fits(structure)
        check_tables(self.method.shapes(structure), self.tables, self.source)

    def _check_kind(self, structure: ModelStructure) -> None:
        model = outline(structure)
        if self.method.enters == "embeddings":
            known = {name: {k: v for k, v in stack.items() if k == "causal"} for name, stack in self.stacks.items()}
        else:
            known = self.stacks
        same = set(known) == set(model) and all(
            model[name].get(key) == value for name, stack in known.items() for key, value in stack.items()
        )
        if not same:
            raise PromptMismatchError(
                "a prompt must enter a model of the kind that it was trained with.",
                self.remedy,
                prompt=f"{in_words(known)} ({self.source})",
                model=in_words(
                    {
                        name: {k: v for k, v in stack.items() if k in known.get(name, stack)}
                        for name, stack in model.items()
                    }
                ),
            )


# --- our own format ---------------------------------------------------------------------------------------------------


def read_own(path: Path) -> Stored:
    """Read `soft_prompt.safetensors`.

    Raises:
        CheckpointError: it is truncated, foreign, or not what it says.
    """
    tensors, metadata = read_tensors(path)
    source = str(path)
    if FORMAT not in metadata:
        raise CheckpointError(f"{source} must be written by softhooks; its metadata does not say so.")
    told = parse_json(metadata[FORMAT], source)
    if told.get("format_version") != FORMAT_VERSION:
        version = told.get("format_version")
        raise CheckpointError(
            f"{source} has format version {version!r}; this softhooks reads {FORMAT_VERSION}. Upgrade it."
        )
    if told.get("tensors") != {name: list(tensor.shape) for name, tensor in tensors.items()}:
        raise CheckpointError(
            f"{source} must hold the tensors that it names, in the shapes that it names; it does not."
        )
    added = {name.removeprefix(ADDED): tensor for name, tensor in tensors.items() if name.startswith(ADDED)}
    tables, heads = _sort({name: tensor for name, tensor in tensors.items() if not name.startswith(ADDED)}, source)
    method = _method(told, tables, source)
    also, base = told.get("also_trained"), _of(told.get("base"))
    stacks = base.get("stacks")
    if not isinstance(also, list) or not all(isinstance(name, str) for name in also):
        raise CheckpointError(f"{source} must list what was trained beside the prompt; it says {also!r}.")
    if not isinstance(stacks, dict) or set(stacks) not in _STACKS or not all(map(_is_told, stacks.values())):
        raise CheckpointError(f"{source} must describe the base model; it does not.")
    fingerprint_of(base, source)
    conventions, labels = (
        read_conventions(told.get("conventions"), method, source),
        read_labels(told.get("labels"), heads, source),
    )
    return Stored(
        method,
        tables,
        heads,
        conventions,
        source,
        stacks,
        also_trained=also,
        base=base,
        labels=labels,
        added=added,
        added_ids=read_ids(told.get("added_tokens"), added, source),
    )


def _is_told(stack: Any) -> bool:
    """Whether a file describes a stack: its direction and, where they are known, runs of `[layers, heads, key, value]`."""
    if not isinstance(stack, dict) or not isinstance(stack.get("causal"), bool) or set(stack) - {"causal", *_ROLES}:
        return False
    runs = [stack[role] for role in _ROLES if role in stack]
    return all(isinstance(run, list) for run in runs) and all(_is_run(one) for run in runs for one in run)


def _is_run(run: Any) -> bool:
    return isinstance(run, list) and len(run) == 4 and all(type(number) is int and number > 0 for number in run)


def _of(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _sort(tensors: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Tell the prompt's tables from its heads."""
    tables: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    taken = TableEncoder({})
    for name, tensor in tensors.items():
        group = name.removeprefix(PROMPT)
        if name.startswith(PROMPT) and group.isidentifier() and not hasattr(taken, group) and tensor.dim() == 2:
            tables[group] = tensor
        elif name.startswith(HEAD) and ":" in name:
            head, parameter = name.removeprefix(HEAD).split(":", 1)
            heads.setdefault(head, {})[parameter] = tensor
        else:
            shape = list(tensor.shape)
            raise CheckpointError(f"{source} must hold a prompt's tables and heads only; it holds {name!r} {shape}.")
    return tables, heads


def _method(told: dict[str, Any], tables: dict[str, Tensor], source: str) -> Method:
    """Rebuild the options; how the prompt was started no longer matters."""
    kind, options = told.get("method"), told.get("options")
    if not isinstance(kind, str) or kind not in METHODS or not isinstance(options, dict):
        raise CheckpointError(
            f"{source} must name one of the methods {sorted(METHODS)} and its options; it names {kind!r}."
        )
    cls = METHODS[kind]
    fields = {item.name: item for item in dataclasses.fields(cls)}
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise CheckpointError(
            f"{source} has options of {kind} that this softhooks does not know: {unknown}. Upgrade it."
        )
    kept = {key: value for key, value in options.items() if fields[key].compare and key not in cls.start_options}
    for key, value in kept.items():
        default = fields[key].default
        if value is None and str(fields[key].type).endswith("| None"):
            continue
        if isinstance(default, (bool, int, float, str)) and not _is_like(value, default):
            raise CheckpointError(f"{source} must say {key} as a {type(default).__name__}; it says {value!r}.")
    try:
        method = cls(**kept)
    except (SoftHooksError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} must hold valid options for {kind}; it does not: {error}") from error
    method.check_tables(tables, source)
    return method


def _is_like(value: Any, default: object) -> bool:
    """Whether a value has the type of an option's default; a whole number may stand for a fraction."""
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(default)
