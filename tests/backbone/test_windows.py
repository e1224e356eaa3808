"""Prefixes in layers whose sliding windows and chunks show only in their masks."""

from __future__ import annotations

from typing import Any

import pytest
import real_words
import torch
import transformers as tf
import zoo

import softhooks
from softhooks import PrefixTuning, UnsupportedModeError

_SIZES: dict[str, Any] = {**zoo.SMALL, "num_key_value_heads": 2}
_MOE: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 2}


@torch.no_grad()
def _wide(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.2)
    return model.eval()


def _phimoe(attention: str, window: int | None = 6) -> Any:
    config = tf.PhimoeConfig(**_SIZES, **_MOE, sliding_window=window, attn_implementation=attention)
    return _wide(tf.PhimoeForCausalLM(config))


def _llama4() -> Any:
    """Make a model with chunks longer than the probes at attach."""
    sizes = {**_SIZES, "max_position_embeddings": 256}
    return _wide(tf.Llama4ForCausalLM(tf.Llama4TextConfig(**sizes, **_MOE, head_dim=8, attention_chunk_size=160)))


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("gap", [real_words.prefix_gap, real_words.front_gap], ids=lambda gap: gap.__name__)
def test_a_window_that_is_in_the_masks_alone_counts_for_a_prefix(gap: Any, attention: str, left: int) -> None:
    """PhiMoE passes a windowed mask to its attention function, but no window size."""
    assert gap(_phimoe(attention), zoo.text(1, 16), 4, left=left) < 1e-5


def test_without_a_window_every_token_sees_the_prefix() -> None:
    assert real_words.prefix_gap(_phimoe("sdpa", window=None), zoo.text(1, 16), 4) < 1e-5


def test_the_config_keeps_its_window_when_a_prompt_is_attached() -> None:
    model = _phimoe("sdpa")
    with softhooks.attach(model, PrefixTuning(4)):
        assert model.config.sliding_window == 6


def test_a_text_that_fits_into_a_chunk_with_its_prefix_is_right() -> None:
    assert real_words.prefix_gap(_llama4(), zoo.text(1, 160), 4, left=3) < 1e-5


def test_a_text_that_leaves_the_chunk_of_its_prefix_is_refused() -> None:
    """Llama 4 divides only the text into chunks; with words before it the boundaries would be elsewhere."""
    model = _llama4()
    with softhooks.attach(model, PrefixTuning(4)):
        model(zoo.text(2, 156))
        with pytest.raises(UnsupportedModeError, match="one chunk of a model with chunked attention"):
            model(zoo.text(2, 157))
        cache = model(zoo.text(2, 156), use_cache=True).past_key_values
        with pytest.raises(UnsupportedModeError, match="one chunk of a model with chunked attention"):
            model(zoo.text(2, 1), past_key_values=cache)


def test_a_prefix_that_every_token_sees_goes_with_any_chunk() -> None:
    model = _llama4()
    with softhooks.attach(model, PrefixTuning(4, windowed=False)):
        model(zoo.text(2, 200))
