"""Check which prompts continuous batching can use, and which of them can share a batch."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from softhooks.errors import NotAttachedError, PromptTooLongError, UnsupportedModeError
from softhooks.runtime.attached_prompt import AttachedPrompt
from softhooks.runtime.prompted_model import PromptedModel, require_prompted_model


def required_columns(prompt: AttachedPrompt) -> str:
    """Return the names of the batch columns that a prompt requires, joined by commas."""
    try:
        prompt.encoder.choose_variants({}, 1)
    except UnsupportedModeError:
        return ", ".join(prompt.method.probe_arguments())
    return ", ".join(prompt.layout.batch_columns)


def require_servable(prompted: PromptedModel) -> None:
    """Refuse prompts that continuous batching cannot use, because it packs many requests into one row.

    Raises:
        UnsupportedModeError: a selected prompt requires a batch column or has an unsupported `injection`, or the prompts that
            `rows` selects cannot share a batch.
    """
    require_servable_together(prompted, prompted.names)


def require_servable_together(prompted: PromptedModel, names: Iterable[str | None]) -> None:
    """Refuse prompts, of which None is the bare model, if continuous batching cannot use them for the requests of one batch."""
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        if name is not None and name not in prompted.prompts:
            raise NotAttachedError(f"`rows` names the prompt {name!r}, which has been removed.")
    prompts = [prompted.prompts[name] for name in chosen if name is not None]
    for prompt in prompts:
        _require_alone(prompt)
    branches = [prompt.injection == "branch" for prompt in prompts]
    if len(set(branches)) == 2:
        raise UnsupportedModeError(
            "a continuous batch cannot mix gated branches with prompts that enter as keys and values.",
            "Serve them with different managers, on copies of the model.",
            prompts=", ".join(f"{prompt.name}: {prompt.injection}" for prompt in prompts),
        )
    with_tokens = [prompt.name for prompt in prompts if prompt.added is not None]
    if with_tokens and len(chosen) > 1:
        raise UnsupportedModeError(
            f"a continuous batch cannot mix {', '.join(map(repr, with_tokens))}, which trains added tokens, with other prompts "
            "or the bare model.",
            "Activate this prompt for all requests of the manager.",
        )


def remaining_tokens(model: nn.Module, name: str | None, length: int) -> int | None:
    """Return how many tokens a model with learned positions can generate after a text; None for any other model.

    Args:
        name: the name of the prompt before the text, or None.
        length: the number of tokens of the text.

    Raises:
        PromptTooLongError: prompt and text fill all positions.
    """
    prompted = require_prompted_model(model)
    limit = prompted.structure.entry.positions.limit
    if limit is None:
        return None
    prompt = None if name is None else require_prompted_model(model, name).prompts[name]
    moves = prompt is not None and prompt.injection != "branch" and prompt.conventions.get("shift_positions", True)
    own = prompt.layout.num_slots if prompt is not None and moves else 0
    if own + length >= limit:
        raise PromptTooLongError(
            f"a prompt of {own} virtual tokens and a text of {length} leave none of the model's {limit} positions for an answer.",
            "Shorten the text.",
        )
    return limit - own - length


def _require_alone(prompt: AttachedPrompt) -> None:
    needs = required_columns(prompt)
    if prompt.injection in ("attention", "shared", "branch") and not needs:
        return
    raise UnsupportedModeError(
        f"{prompt.name!r} ({prompt.method.kind}, injection={prompt.injection!r}) cannot be used in continuous batching: a prompt "
        "must enter as keys and values or as a gated branch, and be the same for every request that uses it.",
        "Use a prefix, `placement='front'` on a model with `injection='shared'`, or a multitask prompt with a single task.",
        **({"each request would need": needs} if needs else {}),
    )
