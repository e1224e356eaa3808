"""Whether a model makes its masks of what a text says: of its values (Doge), or of a selection of its keys (DeepSeek-V3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.forward_pass import AttentionFunction, Pass
from softhooks.backbone.probe_inputs import probe_ids, probe_length
from softhooks.backbone.probing import eval_mode
from softhooks.backbone.stack import Site, Stack
from softhooks.errors import UnsupportedMethodError
from softhooks.prompt import SoftPrompt


class _MaskPass(Pass):
    """Note the mask that each site of self-attention hands to its attention function, and what the text's rows were.

    Attributes:
        rows: the embeddings, [1, T, H], by which masks can be differentiated.
        masks: by the site's index.
    """

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        self.rows: Tensor | None = None
        self.masks: dict[int, Any] = {}

    def embed(self, output: Tensor) -> Tensor:
        """Return the same rows at the start of a graph."""
        self.rows = output.detach().requires_grad_(torch.is_grad_enabled())
        return self.rows.clone()  # CTRL scales its embeddings in place, which a leaf does not allow

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the mask, and go on."""
        self.touched = True
        if site.role == "self":
            self.masks[site.index] = args[4] if len(args) > 4 else kwargs.get("attention_mask")
        return attention(*args, **kwargs)


def require_common_masks(prompt: SoftPrompt) -> None:
    """Check, for a prompt that enters as keys and values, that masks are the same for two texts and have no gradient of theirs.

    Fresh weights may make equal masks of different texts, but the graph shows what they are made of.

    Raises:
        UnsupportedMethodError: they are made of the text, where keys and values of words would not be what these words are.
    """
    stack = prompt.prompted_model.structure.entry
    if prompt.injection != "attention":
        return
    limits = [room for room in (stack.positions.limit, stack.positions.trained) if room is not None]
    columns, _ = probe_length(stack.module, min(limits, default=None))
    with eval_mode(prompt.model), torch.set_grad_enabled(not torch.is_inference_mode_enabled()):
        one, other = (_pass(prompt, stack, columns, seed) for seed in (0, 1))
        own = any(
            not _same(mask, other.masks[index]) or _is_made_of(mask, one.rows) for index, mask in one.masks.items()
        )
    if own:
        raise UnsupportedMethodError(
            "a key-value prefix needs masks that do not depend on what a text says.",
            "Use a prompt that enters as embeddings, such as PromptTuning.",
            model=f"{type(prompt.model).__name__} ({stack.path or 'the model itself'})",
            method=prompt.method.kind,
            found="masks that are computed from the states of the text",
            because="its layers make them of the text's own keys or values, in which a prefix would have no part",
        )


def _pass(prompt: SoftPrompt, stack: Stack, columns: int, seed: int) -> _MaskPass:
    """Run a text without the prompt: through the whole model, or through the stack alone if the model needs more than ids."""
    live, structure = _MaskPass(stack), prompt.prompted_model.structure
    by_itself = structure.is_encoder_decoder or structure.choices is not None
    ids = probe_ids(prompt.model, structure.vocabulary, columns, seed)
    with stack.state.running(live, alone="a prompt's own rows"):
        (stack.module if by_itself else prompt.model)(input_ids=ids, attention_mask=torch.ones_like(ids))
    return live


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other)


def _is_made_of(mask: Any, rows: Tensor | None) -> bool:
    if rows is None or not isinstance(mask, Tensor) or not mask.requires_grad:
        return False
    return torch.autograd.grad(mask.float().sum(), rows, allow_unused=True, retain_graph=True)[0] is not None
