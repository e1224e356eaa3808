"""Models that replace their own modules in a forward are refused, and get these modules back."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as models
import torch
import zoo
from torch import Tensor, nn
from untouched import untouched

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, UnsupportedModelError


@pytest.mark.parametrize("method", [PromptTuning(3), PrefixTuning(3), LlamaAdapter(3)], ids=lambda method: method.kind)
@pytest.mark.parametrize(
    ("arch", "task", "owner"), [("big_bird", "masked", "bert"), ("bigbird_pegasus", "seq2seq", "model.encoder")]
)
def test_block_sparse_attention_stays_and_is_refused(arch: str, task: str, owner: str, method: Any) -> None:
    """On a text as short as a probe the model would change to full attention, for all later texts too."""
    model = models.build(arch, task, attention_type="block_sparse").train()
    attention = [module for module in model.modules() if "BlockSparse" in type(module).__name__]
    match = rf"replaces some of its modules(.|\n)*BlockSparseAttention\nCall `model\.{owner}\.set_attention_type\('original_full"
    with untouched(model), pytest.raises(UnsupportedModelError, match=match):
        softhooks.attach(model, method)
    assert [module for module in model.modules() if "BlockSparse" in type(module).__name__] == attention
    assert all(module.training for module in attention)
    assert model.get_submodule(owner).attention_type == "block_sparse"
    model.get_submodule(owner).set_attention_type("original_full")
    softhooks.attach(model, method).remove()


class _Lazy(nn.Module):
    """Replaces a module in its first forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: Tensor) -> Tensor:
        self.inner = nn.Linear(32, 32) if isinstance(self.inner, nn.Identity) else self.inner
        return self.inner(states)


def test_any_other_model_is_told_to_run_once() -> None:
    model = zoo.build("bert", "tokens")
    model.classifier = nn.Sequential(_Lazy(nn.Identity()), model.classifier)
    with untouched(model), pytest.raises(UnsupportedModelError, match=r"replaced: Identity\nRun the model once"):
        softhooks.attach(model, PromptTuning(3))
    with torch.no_grad():
        model(zoo.text(1, 4))
    softhooks.attach(model, PromptTuning(3)).remove()
