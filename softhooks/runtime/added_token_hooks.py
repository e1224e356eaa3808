"""Hooks that replace the model's vocabulary rows by a prompt's own rows, and a check that both give the same results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softhooks.backbone.probing import eval_mode
from softhooks.runtime.added_tokens import AddedTokens, output_of, refuse_tables
from softhooks.runtime.with_blocks import Block

if TYPE_CHECKING:
    from softhooks.runtime.attached_prompt import AttachedPrompt
    from softhooks.runtime.prompted_model import PromptedModel

# --- in a forward -----------------------------------------------------------------------------------------------------


class AddedTokenHooks:
    """The hooks that replace the model's vocabulary rows by the prompts' own rows.

    Args:
        prompted: the state of the model's prompts.
    """

    def __init__(self, prompted: PromptedModel) -> None:
        self.prompted = prompted
        tables = {id(stack.embedding): stack.embedding for stack in prompted.structure.stacks}
        for embedding in tables.values():
            prompted.patches.keep(embedding.register_forward_hook(self.replace_embeddings, with_kwargs=True))
        self.head = output_of(prompted.model)
        if self.head is not None:
            prompted.patches.keep(self.head.register_forward_hook(self.replace_logits, with_kwargs=True))

    def replace_embeddings(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Replace the embeddings of added tokens by the prompt's own rows."""
        ids = args[0] if args else kwargs["input"]
        changed = output
        for added, rows in self._uses(ids.shape[0]):
            own, here = added.look_up(module, ids, output)
            here = here if rows is None else here & rows.view(-1, *[1] * (ids.dim() - 1))
            changed = torch.where(here.unsqueeze(-1), own, changed)
        return None if changed is output else changed

    def replace_logits(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Replace the logits of added tokens by the logits of the prompt's own rows."""
        hidden = args[0] if args else next(iter(kwargs.values()))
        for added, rows in self._uses(output.shape[0]):
            own = added.logits(hidden, output)
            if rows is not None:
                own = torch.where(rows.view(-1, *[1] * (output.dim() - 1)), own, output[..., added.ids])
            output = output.index_copy(-1, added.ids, own)
        return output

    def _uses(self, batch: int) -> Iterator[tuple[AddedTokens, Tensor | None]]:
        """Yield the added tokens of each prompt in use and a mask [B] of the rows that use it (None if all do)."""
        prompted = self.prompted
        if not prompted.is_on:
            return
        if prompted.rows is None:
            added = _added_of(prompted, prompted.active)
            if added is not None:
                yield added, None
            return
        if not prompted.rows or batch % len(prompted.rows):
            return  # the library runs a prompt alone
        for name in dict.fromkeys(prompted.rows):
            added = _added_of(prompted, name)
            if added is not None:
                chosen = torch.tensor([one == name for one in prompted.rows], device=added.ids.device)
                yield added, chosen.repeat_interleave(batch // len(prompted.rows))


def _added_of(prompted: PromptedModel, name: str | None) -> AddedTokens | None:
    prompt = prompted.prompts.get(name) if name is not None else None
    return None if prompt is None else prompt.added


# --- the check --------------------------------------------------------------------------------------------------------


def check_added_rows(prompt: AttachedPrompt, inputs: dict[str, Tensor]) -> None:
    """Check that a prompt's copies, which still equal the model's rows, give the same embeddings and logits.

    Args:
        inputs: the arguments of a call of the model.

    Raises:
        UnsupportedModelError: the results differ, a second table reads the ids, or the logits do not come from the output
            embeddings.
    """
    added, model = prompt.added, prompt.model
    if added is None:
        return
    head = output_of(model)
    ids = next(value for value in inputs.values() if not value.is_floating_point())
    tables: dict[int, nn.Module] = {id(stack.embedding): stack.embedding for stack in prompt.structure.stacks}
    seen: list[tuple[Tensor, Tensor]] = []

    def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module is head:
            seen.append(((args or tuple(kwargs.values()))[0], output))
        elif isinstance(module, nn.Embedding) and id(module) not in tables:
            given = (args or tuple(kwargs.values()))[0]
            if isinstance(given, Tensor) and given.shape == ids.shape and torch.equal(given, ids):
                refuse_tables(model, f"a second table reads the ids ({type(module).__name__})")

    with eval_mode(model), _hooked(model, listen):
        with Block(prompt.model, off=True):
            answered = model(**inputs)
            for embedding in tables.values():
                expected = embedding(added.ids[None])
                if not torch.equal(added.look_up(embedding, added.ids[None], expected)[0], expected):
                    refuse_tables(model, f"its embedding ({type(embedding).__name__}) does more than look rows up")
        logits = getattr(answered, "logits", None)
        is_vocabulary = isinstance(logits, Tensor) and logits.shape[-1] == prompt.structure.vocabulary
        if is_vocabulary and not seen:
            refuse_tables(model, "its logits are not computed by its output embeddings")
        for hidden, output in seen:
            mine, theirs = added.logits(hidden, output), output[..., added.ids]
            if float((mine - theirs).abs().max()) > 1e-2 * float(theirs.abs().max()) + 1e-6:
                refuse_tables(
                    model, f"its output embeddings ({type(head).__name__}) do more than multiply by their rows"
                )


@contextmanager
def _hooked(model: nn.Module, listen: Any) -> Iterator[None]:
    handles = [module.register_forward_hook(listen, with_kwargs=True) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
