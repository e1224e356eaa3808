"""Hooks that use a prompt's copies of added tokens' embeddings instead of the model's own, and a check of these copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.probing import eval_mode
from softhooks.patching.patches import Patches
from softhooks.runtime.added_tokens import AddedTokens, output_of, refuse_tables
from softhooks.runtime.attached_prompt import AttachedPrompt
from softhooks.runtime.prompted_model import PromptedModel
from softhooks.runtime.with_blocks import Block


class AddedTokenHooks:
    """The hooks on a model's input and output embeddings."""

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
        """Replace the embeddings of added tokens."""
        ids = args[0] if args else kwargs["input"]
        changed = output
        for added, rows in self._uses(ids.shape[0]):
            own, here = added.look_up(module, ids, output)
            here = here if rows is None else here & rows.view(-1, *[1] * (ids.dim() - 1))
            changed = torch.where(here.unsqueeze(-1), own, changed)
        return None if changed is output else changed

    def replace_logits(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Replace the logits of added tokens."""
        hidden = args[0] if args else next(iter(kwargs.values()))
        for added, rows in self._uses(output.shape[0]):
            own = added.logits(hidden, output)
            if rows is not None:
                own = torch.where(rows.view(-1, *[1] * (output.dim() - 1)), own, output[..., added.ids])
            output = output.index_copy(-1, added.ids, own)
        return output

    def _uses(self, batch: int) -> Iterator[tuple[AddedTokens, Tensor | None]]:
        """Yield each active prompt's added tokens, and a mask [B] of the rows that use the prompt (None if all do)."""
        prompted, rows = self.prompted, self.prompted.rows
        if not prompted.is_on:
            return
        if rows is not None and (not rows or batch % len(rows)):
            return  # softhooks is running a stack on the virtual tokens alone
        for prompt in prompted.active_prompts():
            if prompt.added is None:
                continue
            if rows is None:
                yield prompt.added, None
            else:
                chosen = torch.tensor([name == prompt.name for name in rows], device=prompt.added.ids.device)
                yield prompt.added, chosen.repeat_interleave(batch // len(rows))


def check_added_rows(prompt: AttachedPrompt, inputs: dict[str, Tensor]) -> None:
    """Check that a prompt's copies give the same embeddings and logits as the originals, before training changes the copies.

    Args:
        inputs: the arguments for a forward of the model.

    Raises:
        UnsupportedModelError: the results differ, a second embedding module looks up the input ids, or the logits do not come
            from the output embeddings.
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
                refuse_tables(model, f"a second embedding ({type(module).__name__}) looks up the input ids")

    with eval_mode(model), Patches() as patches:
        for module in model.modules():
            patches.keep(module.register_forward_hook(listen, with_kwargs=True))
        with Block(prompt.model, off=True):
            answered = model(**inputs)
            for embedding in tables.values():
                expected = embedding(added.ids[None])
                if not torch.equal(added.look_up(embedding, added.ids[None], expected)[0], expected):
                    refuse_tables(model, f"its embedding ({type(embedding).__name__}) does more than look up rows")
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
