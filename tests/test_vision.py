"""Vision-language models: images, positions and masks are unchanged, and the prompt stands before all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import adapters
import contexts
import oracles
import pytest
import torch
import transformers as tf
import zoo
from torch import Tensor

import softhooks
from softhooks import (
    LlamaAdapter,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    UnsupportedModeError,
)

P, NEW = 3, 4
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
IMAGE = 90
TEXT: dict[str, Any] = {
    "vocab_size": zoo.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _qwen() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2}
    config = tf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**vision, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 1},
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return tf.Qwen2VLForConditionalGeneration(config)


def _gemma() -> Any:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
    }
    config = tf.Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
        vision_config={**vision, "patch_size": 2},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=92,
        eoi_token_index=93,
    )
    return tf.Gemma3ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {"qwen2_vl": _qwen, "gemma3": _gemma}
IDS = torch.tensor([[5, 6, 92, IMAGE, IMAGE, IMAGE, IMAGE, 93, 7, 8, 9]])


@cache
def model_of(name: str) -> Any:
    return zoo.with_large_weights(MODELS[name])


def inputs(name: str, ids: Tensor = IDS) -> dict[str, Tensor]:
    """Text around one image."""
    generator = torch.Generator().manual_seed(3)
    types = (ids == IMAGE).long()
    if name == "qwen2_vl":
        pixels = torch.randn(16, 12, generator=generator)
        grid = torch.tensor([[1, 4, 4]])
        return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": types}
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8, generator=generator), "token_type_ids": types}


def seen_by_the_text_model(model: Any, call: dict[str, Tensor]) -> dict[str, Any]:
    """The inputs that the bare model passes to its text model: embeddings with the image, positions, masks."""
    seen: dict[str, Any] = {}
    text = model.model.language_model
    handle = text.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**call)
    handle.remove()
    return seen


def widened(mask: Any, count: int) -> Any:
    """A prompt in front of a mask of the text, by hand: the text sees all of it, and it sees itself up to each token."""
    if not isinstance(mask, Tensor):
        return {name: widened(one, count) for name, one in mask.items()} if isinstance(mask, dict) else mask
    columns = mask.shape[-1]
    wide = torch.zeros(1, 1, count + columns, count + columns, dtype=torch.bool)
    wide[..., :count, :count] = torch.ones(count, count, dtype=torch.bool).tril()
    wide[..., count:, :count] = True
    wide[..., count:, count:] = mask if mask.dtype == torch.bool else mask == 0
    return wide if mask.dtype == torch.bool else torch.zeros(wide.shape).masked_fill(~wide, torch.finfo(mask.dtype).min)


def by_hand(model: Any, call: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Logits of the text, with the prompt's rows put before what the text model sees."""
    seen, count = seen_by_the_text_model(model, call), rows.shape[0]
    positions = seen.get("position_ids")
    if positions is not None:
        before = torch.arange(count).expand(*positions.shape[:-1], count)
        positions = torch.cat([before, positions + count], -1)
    states = model.model.language_model(
        inputs_embeds=torch.cat([rows[None], seen["inputs_embeds"]], 1),
        position_ids=positions,
        attention_mask=widened(seen["attention_mask"], count),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(states)[:, count:]


def behind(model: Any, call: dict[str, Tensor], prompt: Any) -> Tensor:
    """Logits of the text with a prompt that enters attention put into the text model's by hand."""
    seen, text = seen_by_the_text_model(model, call), model.model.language_model
    given = {"inputs_embeds": seen["inputs_embeds"], "use_cache": False}
    if prompt.method.enters == "branch":
        branches = adapters.branches(text, dict(prompt.encoder.named_parameters()), prompt.method)
        with adapters.patched(branches):
            masked = {key: seen[key] for key in ("attention_mask", "position_ids")}
            return model.lm_head(text(**given, **masked).last_hidden_state)
    keys, values = oracles.cut_table(prompt.encoder("text"), 2, 2)
    positions, masks = seen.get("position_ids"), widened(seen["attention_mask"], P)
    if positions is None:
        positions = torch.arange(IDS.shape[1])[None]
    if masks is None:
        masks = torch.ones(1, P + IDS.shape[1], dtype=torch.long)
    masks = {name: mask[..., P:, :] for name, mask in masks.items()} if isinstance(masks, dict) else masks
    states = text(
        inputs_embeds=seen["inputs_embeds"],
        position_ids=positions + P,
        attention_mask=masks,
        past_key_values=oracles.seeded_cache(text, keys, values),
    ).last_hidden_state
    return model.lm_head(states)


METHODS: dict[str, Callable[[], Any]] = {
    "p-tuning": lambda: PTuning(P),
    "mpt": lambda: MultitaskPromptTuning(P, tasks=2),
    "cpt": contexts.method,
    "p-tuning-v2": lambda: PTuningV2(P),
    "adapter": lambda: LlamaAdapter(P),
}


@torch.no_grad()
def stirred(model: Any, way: str) -> Any:
    """A prompt with an effect."""
    prompt = softhooks.attach(model, METHODS[way]())
    for parameter in prompt.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.4)
    prompt.encoder.eval()
    return prompt


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_case_13_a_prompt_before_an_image_keeps_its_positions_and_its_mask(name: str) -> None:
    """PEFT loses M-RoPE's positions, and the types by which an image attends to itself both ways."""
    model, call = model_of(name), inputs(name)
    with softhooks.attach(model, PromptTuning(P)) as prompt:
        assert prompt.injection == "shared"
        logits, rows = model(**call).logits, prompt.encoder("embeddings")
        with softhooks.disabled(model):
            torch.testing.assert_close(logits, by_hand(model, call, rows), **CLOSE)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_case_13_a_prefix_of_read_words_is_the_prompt_of_these_words(name: str) -> None:
    model, call, words = model_of(name), inputs(name), [11, 12, 13]
    with softhooks.attach(model, PrefixTuning(P, init_ids=words)):
        logits = model(**call).logits
    rows = model.get_input_embeddings()(torch.tensor(words))
    torch.testing.assert_close(logits, by_hand(model, call, rows), **CLOSE)


@pytest.mark.parametrize("way", METHODS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_case_13_every_other_method_beside_an_image(name: str, way: str) -> None:
    model, call = model_of(name), inputs(name)
    plain = model(**call).logits
    with stirred(model, way) as prompt:
        given = {"task_ids": torch.tensor([1])} if way == "mpt" else {}
        logits = model(**call, **given).logits
        with softhooks.disabled(model):
            if prompt.injection == "shared":
                expected = by_hand(model, call, prompt.encoder("embeddings", 1 if given else 0))
            else:
                expected = behind(model, call, prompt)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert float((logits - plain).abs().max()) > 0.1


GENERATED = [(name, way) for name in MODELS for way in ("prompt", "prefix")]
GENERATED += [("qwen2_vl", "mpt"), ("qwen2_vl", "p-tuning-v2"), ("gemma3", "p-tuning"), ("gemma3", "cpt")]
GENERATED += [("qwen2_vl", "adapter")]


@pytest.mark.parametrize(("name", "way"), GENERATED)
@torch.no_grad()
def test_generation_behind_an_image(name: str, way: str) -> None:
    model = model_of(name)
    plain = {"prompt": PromptTuning(P), "prefix": PrefixTuning(P)}
    given = {"task_ids": torch.tensor([1])} if way == "mpt" else {}
    more = {"suppress_tokens": [IMAGE, 91, 92, 93]}  # a second image would have no pixels
    with softhooks.attach(model, plain[way]) if way in plain else stirred(model, way):
        found = model.generate(**inputs(name), **given, **more, max_new_tokens=NEW, do_sample=False)
        row = IDS
        for _ in range(NEW):
            logits = model(**inputs(name, row), **given, use_cache=False).logits[:, -1]
            logits[:, more["suppress_tokens"]] = -torch.inf
            row = torch.cat([row, logits.argmax(-1)[:, None]], 1)
    assert torch.equal(found, row)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_the_prompt_and_the_base_stays(name: str) -> None:
    model, call = model_of(name), inputs(name)
    with softhooks.attach(model, PromptTuning(P)) as prompt:
        model(**call, labels=IDS).loss.backward()
        (rows,) = prompt.parameters()
        assert bool((rows.grad.abs().sum(-1) > 0).all())
        assert all(q.grad is None for n, q in model.named_parameters() if not n.startswith("soft_prompt."))
        prompt.verify_frozen()


def test_slots_among_an_image_whose_tokens_see_ahead_are_refused() -> None:
    """Gemma 3 passes its text model a prepared mask in which an image's tokens see each other."""
    model = model_of("gemma3")
    with pytest.raises(UnsupportedModeError), softhooks.attach(model, PromptTuning(P), injection="slots"):
        model(**inputs("gemma3"))
    assert not hasattr(model, "soft_prompt")


@torch.no_grad()
def test_slots_before_an_image_equal_the_prompt_computed_once() -> None:
    logits = []
    for injection in ("shared", "slots"):
        model = model_of("qwen2_vl")
        with softhooks.attach(model, PromptTuning(P), injection=injection) as prompt:
            for parameter in prompt.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).sin().view_as(parameter))
            logits.append(model(**inputs("qwen2_vl")).logits)
    torch.testing.assert_close(*logits, **CLOSE)
