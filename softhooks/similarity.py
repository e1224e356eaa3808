"""One prompt as the start of another: what a stored prompt's rows are, and which stored prompt is nearest to a task.

Source: Vu et al. 2022 (SPoT), arXiv:2110.07904: a prompt tuned on a source task starts a target's; which source is best is told
by the cosine of the prompts' mean-pooled tokens, the target's taken early in its own tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional

from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.encoder import EMBEDDINGS
from softhooks.errors import OptionError, PromptMismatchError

if TYPE_CHECKING:
    from softhooks.backbone.stack import ModelStructure
    from softhooks.prompt import SoftPrompt


_START = "a prompt can be the start of another only if it folds to rows of embeddings."
_COMPARED = "prompts can be compared only if they fold to rows of embeddings."


def rows_of(source: Any, rule: str = _START, *, structure: ModelStructure | None = None) -> Tensor:
    """The rows of a prompt that enters as embeddings, [P, H].

    Args:
        source: a handle; or a directory or repository that `load` reads, also one of PEFT; or the rows themselves.
        structure: of the model that they are to enter, which must be the base that they were trained with.
        rule: what an error says of a prompt that has no rows.

    Raises:
        OptionError: it is none of these, or a prompt that does not fold to rows of embeddings.
        CheckpointError: nothing that can be read is there.
        PromptMismatchError: it was trained with another base.
    """
    from softhooks.base_model.check import require_base
    from softhooks.formats.find import find
    from softhooks.load import stored_of
    from softhooks.prompt import SoftPrompt

    if isinstance(source, Tensor):
        return source.detach().float()
    if isinstance(source, SoftPrompt):
        stored = stored_of(source) if source.is_attached else None
        tables, what = source.encoder.folded(), f"{source.name!r}: {source.method.kind}"
    elif isinstance(source, (str, Path)):
        stored = find(source)
        tables, what = stored.tables, f"{stored.source}: {stored.method.kind}"
    else:
        raise OptionError(f"a prompt must be a handle, a directory or a tensor; it is a {type(source).__name__}.")
    if set(tables) != {EMBEDDINGS}:
        raise OptionError(
            rule,
            "Take a prompt of PromptTuning or of another method that enters as embeddings.",
            prompt=what,
            holds=", ".join(sorted(tables)),
        )
    fits = structure is not None and tables[EMBEDDINGS].shape[1] == structure.entry.width
    if structure is not None and fits and stored is not None:
        require_base(stored, structure.entry.module, structure, override="or start from its rows alone, as a tensor")
    return tables[EMBEDDINGS].detach().float()


def ids_behind(source: Any) -> list[int] | None:
    """The ids behind a prompt's virtual tokens, where its model looked at them; None: they are not known."""
    from softhooks.formats.find import find
    from softhooks.prompt import SoftPrompt

    if isinstance(source, SoftPrompt):
        ids = source.stored_conventions.get(BUFFER)
    else:
        ids = find(source).conventions.get(BUFFER) if isinstance(source, (str, Path)) else None
    return None if ids is None else list(ids)


def most_similar(
    prompts: Mapping[str, str | Path | Tensor | SoftPrompt] | Sequence[str], to: str | Path | Tensor | SoftPrompt
) -> list[tuple[str, float]]:
    """Rank prompts by how near they are to one: the cosine of their mean-pooled tokens.

    Tune the target's own prompt for a short while, ask which stored prompt is the nearest, and start from that with
    `PromptTuning(init="prompt", init_from=...)`.

    Args:
        prompts: prompts of one base model by name, or a list of their directories; their lengths may differ.
        to: the prompt to compare with.

    Returns:
        each name with its cosine, the nearest first.

    Raises:
        OptionError: none is given, or one of them does not fold to rows of embeddings.
        PromptMismatchError: their widths differ, so that they are of different models.
    """
    named: Mapping[str, Any] = prompts if isinstance(prompts, Mapping) else {str(source): source for source in prompts}
    if isinstance(prompts, str) or not named:
        raise OptionError(f"prompts must be one or more, by name or in a list; it is {prompts!r}.")
    goal = rows_of(to, _COMPARED).mean(0).cpu()
    pooled = {name: rows_of(source, _COMPARED).mean(0).cpu() for name, source in named.items()}
    foreign = {name: list(mean.shape) for name, mean in pooled.items() if mean.shape != goal.shape}
    if foreign:
        raise PromptMismatchError(
            "prompts can be compared only if they are of one base model.",
            "Leave the others out.",
            to=f"width {list(goal.shape)}",
            prompts=foreign,
        )
    cosines = {name: float(functional.cosine_similarity(mean, goal, dim=0)) for name, mean in pooled.items()}
    return sorted(cosines.items(), key=lambda item: -item[1])
