"""Check during `attach` that attention masks do not depend on the content of the text.

Doge computes its masks from attention values, and DeepSeek-V3.2 and Qwen4-exp from selected keys.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from softhooks.backbone.forward_pass import AttentionFunction, Pass
from softhooks.backbone.probe_inputs import probe_ids, probe_length
from softhooks.backbone.probing import FORWARD_ERRORS, eval_mode
from softhooks.backbone.stack import Site, Stack
from softhooks.errors import UnsupportedMethodError
from softhooks.prompt import SoftPrompt

_DECODER_COLUMNS = 5
"""The number of ids for the decoder if the encoder, which takes no ids, is checked."""


class _MaskPass(Pass):
    """A forward pass that records the mask of each self-attention module.

    Attributes:
        rows: the text's embeddings, [1, T, H].
        masks: the masks, by index of the attention module.
    """

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack)
        self.rows: Tensor | None = None
        self.masks: dict[int, Any] = {}

    def embed(self, output: Tensor) -> Tensor:
        """Start an autograd graph at the embeddings."""
        self.rows = output.detach().requires_grad_(torch.is_grad_enabled())
        return self.rows.clone()  # CTRL scales its embeddings in place, which autograd forbids for a leaf

    def attend(self, site: Site, attention: AttentionFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the mask, and run the attention function."""
        self.has_injected = True
        if site.role == "self":
            self.masks[site.index] = args[4] if len(args) > 4 else kwargs.get("attention_mask")
        return attention(*args, **kwargs)


class _Selections(TorchFunctionMode):
    """Notes whether `topk` is asked for all elements; with `only_one`, such a call returns one element instead.

    A model with sparse attention selects, for example, the best 2048 keys. These are all keys of a short text, so the masks of
    two short texts are equal, although masks depend on the text.
    """

    def __init__(self, only_one: bool) -> None:
        super().__init__()
        self.only_one = only_one
        self.took_all = False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **(kwargs or {}))
        call = inspect.signature(_topk).bind(*args, **(kwargs or {}))
        call.apply_defaults()
        values, k, dim = (call.arguments[name] for name in ("input", "k", "dim"))
        if k == values.shape[dim] > 1:
            self.took_all = True
            call.arguments["k"] = 1 if self.only_one else k
        return func(*call.args, **call.kwargs)


def _topk(input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> None:  # noqa: A002
    """Name the arguments of `torch.topk`."""


def require_common_masks(prompt: SoftPrompt) -> None:
    """If the injection is "attention", check that two inputs get the same masks and that no gradient flows through a mask.

    Without the gradient check, a model with random weights would pass if its masks happened to be equal.
    """
    stack = prompt.prompted_model.structure.entry
    if prompt.injection != "attention":
        return
    limits = [limit for limit in (stack.positions.limit, stack.positions.trained) if limit is not None]
    columns, _ = probe_length(stack.module, min(limits, default=None))
    if stack.features is not None:
        columns = _DECODER_COLUMNS  # the stack takes no ids
    with eval_mode(prompt.model), torch.set_grad_enabled(not torch.is_inference_mode_enabled()):
        with _Selections(only_one=False) as selections:
            depends = _masks_depend(prompt, stack, columns)
        if selections.took_all and not depends:
            with suppress(*FORWARD_ERRORS), _Selections(only_one=True):
                depends = _masks_depend(prompt, stack, columns)
    if depends:
        raise UnsupportedMethodError(
            f"the attention masks of {type(prompt.model).__name__} are computed from the text; a key-value prefix needs masks "
            "that do not depend on the text.",
            "Use a prompt that enters as embeddings, such as PromptTuning.",
            model=f"{type(prompt.model).__name__} ({stack.path or 'the model itself'})",
            method=prompt.method.kind,
            because="the layers compute the masks from the keys or values of the text, and a prefix is not part of the text",
        )


def _masks_depend(prompt: SoftPrompt, stack: Stack, columns: int) -> bool:
    one, other = (_pass(prompt, stack, columns, seed) for seed in (0, 1))
    return any(
        not _are_equal(mask, other.masks.get(index)) or _is_computed_from(one.rows, mask)
        for index, mask in one.masks.items()
    )


def _pass(prompt: SoftPrompt, stack: Stack, columns: int, seed: int) -> _MaskPass:
    """Run the model on an input without the prompt; if the model needs more than ids, run only the stack."""
    forward_pass, structure = _MaskPass(stack), prompt.prompted_model.structure
    by_itself = (structure.is_encoder_decoder and stack.features is None) or structure.example.choices is not None
    ids = probe_ids(prompt.model, structure.vocabulary, columns, seed)
    with stack.state.running(forward_pass):
        if by_itself:
            stack.module(input_ids=ids, attention_mask=torch.ones_like(ids))
        else:
            arguments = structure.example.arguments(ids, torch.ones_like(ids))
            if stack.features is not None and seed:
                name = str(prompt.model.main_input_name)
                arguments[name] = arguments[name].flip(-1)  # another image or sound
            prompt.model(**arguments)
    return forward_pass


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other)


def _is_computed_from(rows: Tensor | None, mask: Any) -> bool:
    if rows is None or not isinstance(mask, Tensor) or not mask.requires_grad:
        return False
    return torch.autograd.grad(mask.float().sum(), rows, allow_unused=True, retain_graph=True)[0] is not None
