"""Rows that begin with padding, in a generation with a static cache, whose masks `generate` prepares before the forward."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import tiny_models as models
import torch
from inline_families import loud

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning


@pytest.mark.parametrize("method", [LlamaAdapter(3), PrefixTuning(3), PromptTuning(3)], ids=lambda method: method.kind)
@pytest.mark.parametrize("arch", ["trocr", "bart", "gpt2", "gptj", "bloom", "mistral", "gemma3", "exaone4_5"])
def test_a_padded_row_generates_what_it_generates_alone(arch: str, method: Any) -> None:
    """All layers of the tiny exaone4_5 have sliding windows, and its text model gets no position ids."""
    task = "image_text" if arch == "exaone4_5" else "causal"
    model = naive.endless(models.build(arch, task)).requires_grad_(False)
    ids = torch.randint(10, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with softhooks.attach(model, method) as prompt:
        loud(prompt)
        for cache in ("static", "dynamic"):
            together = model.generate(input_ids=ids, attention_mask=mask, cache_implementation=cache, **options)
            alone = model.generate(input_ids=ids[1:, 3:], cache_implementation=cache, **options)
            for ours, theirs in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(ours[1:], theirs, rtol=1e-4, atol=1e-4)
