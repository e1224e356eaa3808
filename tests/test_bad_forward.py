"""A forward that cannot be served is refused, and the next one works as if nothing had happened."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import naive
import pytest
import torch
import transformers as tf
import zoo
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from untouched import untouched

import softhooks
from softhooks import PrefixTuning, PromptNotReachedError, PromptTooLongError, PromptTuning, UnsupportedModeError
from softhooks.inject.prefix.prefix_pass import refuse_attention

P = 4
IDS = zoo.text(2, 6)
AS_SLOTS = {"slots": PromptTuning(P, placement="after_first")}
IN_ENCODERS = {"front": PromptTuning(P), "end": PromptTuning(P, placement="end"), "prefix": PrefixTuning(P)}
WITH_TABLES = [
    ("gpt2", "causal"), ("opt", "causal"), ("gptj", "causal"), ("bert", "masked"), ("roberta", "masked"), ("bart", "seq2seq"),
]  # fmt: skip
AS_KEYS = {"shared": PromptTuning(P), "attention": PrefixTuning(P)}


def refused(model: Any, error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    """The call raises, and the model and its prompt stay unchanged."""
    with torch.no_grad():
        expected = zoo.main_output(model(IDS))
        with untouched(model), pytest.raises(error, match=message):
            call()
        assert torch.equal(zoo.main_output(model(IDS)), expected)


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["prompt", "prefix", "after-first"])
@pytest.mark.parametrize(("arch", "head"), WITH_TABLES)
def test_text_and_prompt_beyond_the_last_position(arch: str, head: str, way: str) -> None:
    methods = {
        "prompt": PromptTuning(P),
        "prefix": PrefixTuning(P),
        "after-first": PromptTuning(P, placement="after_first"),
    }
    model = zoo.build(arch, head)
    limit = 94 if arch == "roberta" else 96
    moves = way != "prefix" or head == "causal"  # a prefix of an encoder takes no position
    more = {"decoder_input_ids": zoo.text(1, 3)} if arch == "bart" else {}
    long = zoo.text(1, limit - P + 1)
    with softhooks.attach(model, methods[way]):
        assert zoo.main_output(model(long[:, 1:], **more)).isfinite().all()
        if not moves:
            assert zoo.main_output(model(zoo.text(1, limit), **more)).isfinite().all()
            return
        sizes = rf"prompt: *{P}\ntext: *{limit - P + 1}\npositions: *{limit}\nTruncate"
        message = rf"exceed the model's {limit} positions(.|\n)*{sizes}"
        with untouched(model), pytest.raises(PromptTooLongError, match=message):
            model(long, **more)
        padded = naive.left_padded([long[0, 1:]], columns=limit, pad=zoo.pad_id(model))
        alone, together = model(long[:, 1:], **more), model(**padded, **more)  # padding takes no position
        own = zoo.main_output(together) if more else zoo.main_output(together)[:, P:]
        torch.testing.assert_close(own, zoo.main_output(alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["prompt", "prefix", "after-first"])
def test_generating_beyond_the_last_position(way: str) -> None:
    methods = {
        "prompt": PromptTuning(P),
        "prefix": PrefixTuning(P),
        "after-first": PromptTuning(P, placement="after_first"),
    }
    model = naive.endless(zoo.build("gpt2"))
    with softhooks.attach(model, methods[way]):
        # the last token generated is read by nobody, so it needs no position
        assert model.generate(zoo.text(1, 90), max_new_tokens=3, do_sample=False).shape == (1, 93)
        with pytest.raises(PromptTooLongError, match=r"prompt: *4\ntext: *93\npositions: *96"):
            model.generate(zoo.text(1, 90), max_new_tokens=4, do_sample=False)


# --- past the hooks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [*AS_KEYS, *AS_SLOTS])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_a_forward_past_the_hooks(arch: str, way: str) -> None:
    model = zoo.build(arch)
    with softhooks.attach(model, (AS_KEYS | AS_SLOTS)[way]) as prompt:
        assert prompt.injection == way
        stack = prompt.prompted_model.structure.entry.module
        message = r"^\w*Attention ran outside a call to the model, so(.|\n)*softhooks\.disabled"
        refused(model, PromptNotReachedError, message, lambda: stack.forward(IDS))
        assert torch.equal(model.forward(IDS).logits, model(IDS).logits)  # only the model's own hooks are skipped
        with softhooks.disabled(model):
            stack.forward(IDS)


def test_an_encoders_forward_past_the_hooks() -> None:
    model = zoo.build("bert", "tokens")
    for method in (PromptTuning(P), PrefixTuning(P)):
        with softhooks.attach(model, method):
            refused(model, PromptNotReachedError, "outside a call to the model", lambda: model.bert.forward(IDS))


def test_a_model_that_skips_its_stack() -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, PromptTuning(P)):
        states = torch.zeros(1, 3, 32)
        stack, model.model = model.model, torch.nn.Identity()
        model.forward = lambda input_ids: model.lm_head(states)  # somebody's shortcut
        message = (
            r"forward of LlamaForCausalLM bypassed the prompt(.|\n)*"
            r"stacks: *model\n(.|\n)*Call the model with `input_ids`"
        )
        with pytest.raises(PromptNotReachedError, match=message):
            model(IDS)
        del model.forward
        model.model = stack
        model(IDS)


@pytest.mark.parametrize("way", [*AS_KEYS, *AS_SLOTS])
def test_a_checkpoint_of_ones_own_that_runs_layers_again(way: str) -> None:
    """Keys and values cannot follow; slots are in the states and need not."""
    model = zoo.build("llama")

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        return next(prompt.encoder.parameters()).grad.clone()

    with softhooks.attach(model, (AS_KEYS | AS_SLOTS)[way]) as prompt:
        expected = gradient()
        for layer in model.model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if way in AS_SLOTS:
            torch.testing.assert_close(gradient(), expected)
        else:
            with pytest.raises(
                PromptNotReachedError, match=r"checkpoint its layers with `gradient_checkpointing_enable\(\)`"
            ):
                gradient()
        for layer in model.model.layers:
            del layer.forward
        torch.testing.assert_close(gradient(), expected)


# --- an encoder that ran without the prompt ---------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("form", ["output", "tuple"])
@pytest.mark.parametrize("method", IN_ENCODERS.values(), ids=IN_ENCODERS)
@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_encoder_outputs_without_the_prompt(arch: str, method: Any, form: str, masked: bool) -> None:
    model = zoo.build(arch, "seq2seq")
    mask = {"attention_mask": torch.ones_like(IDS)} if masked else {}
    foreign = model.get_encoder()(IDS, **mask)
    foreign = (foreign[0],) if form == "tuple" else foreign
    with torch.no_grad(), softhooks.attach(model, method):
        decoder = {"decoder_input_ids": zoo.text(2, 3)}
        expected = model(input_ids=IDS, **decoder, **mask).logits
        message = r"must run with the same prompts(.|\n)*call the encoder while the prompt is active"
        with untouched(model), pytest.raises(PromptNotReachedError, match=message):
            model(encoder_outputs=foreign, **decoder, **mask)
        own = model.get_encoder()(IDS, **mask)
        own = (own[0],) if form == "tuple" else own
        torch.testing.assert_close(model(encoder_outputs=own, **decoder, **mask).logits, expected)
        with softhooks.disabled(model):
            model(encoder_outputs=foreign, **decoder, **mask)


# --- what slots cannot take along -------------------------------------------------------------------------------------


def test_packed_positions_and_slots() -> None:
    model = zoo.build("llama")
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    with softhooks.attach(model, AS_SLOTS["slots"]):
        message = (
            r"\[2, 6\] do not count each row's tokens(.|\n)*once per row, not once per document(.|\n)*Put each document"
        )
        refused(model, UnsupportedModeError, message, lambda: model(IDS, position_ids=packed))
        plain = model(IDS).logits
        assert torch.equal(model(IDS, position_ids=torch.arange(6)[None]).logits, plain)
        later = torch.arange(3, 9)[None]  # the caller says where to start; rotary distances stay
        torch.testing.assert_close(model(IDS, position_ids=later).logits, plain, rtol=1e-4, atol=1e-5)


def test_a_mask_of_four_dimensions_and_slots() -> None:
    model = zoo.build("llama")
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    with softhooks.attach(model, AS_SLOTS["slots"]):
        message = r"one value per token(.|\n)*mask: *\[2, 1, 6, 6\]\nexpected: *\[2, 6\]\nUse a dynamic cache"
        refused(model, UnsupportedModeError, message, lambda: model(IDS, attention_mask=mask))


@pytest.mark.parametrize(("name", "more"), [
    ("flex_attention_forward", {}), ("paged_attention_forward", {}), ("flash_attention_forward", {"cu_seq_lens_q": 1}),
])  # fmt: skip
def test_attention_functions_without_a_mask_to_widen(name: str, more: dict[str, Any]) -> None:
    with pytest.raises(
        UnsupportedModeError,
        match=rf"attention function {name}.* has no mask that can be extended(.|\n)*set_attn_implementation",
    ):
        refuse_attention(name, more)
    refuse_attention("sdpa_attention_forward", more)


@pytest.mark.parametrize(
    "method", [PromptTuning(P), PrefixTuning(P), AS_SLOTS["slots"]], ids=["shared", "attention", "slots"]
)
def test_a_backbone_at_rest_wakes_up_after_a_refusal(method: Any) -> None:
    model = zoo.build("gpt2").train()
    with softhooks.attach(model, method, freeze_dropout=True):
        with untouched(model), pytest.raises(PromptTooLongError):
            model(zoo.text(1, 93))
        assert all(module.training for module in model.modules())


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [*AS_KEYS, *AS_SLOTS])
def test_a_forward_after_one_that_was_interrupted(way: str) -> None:
    """torch runs no hook after a KeyboardInterrupt; the next forward cleans up."""
    model, bare = zoo.build("llama").train(), zoo.build("llama")
    with softhooks.attach(model, (AS_KEYS | AS_SLOTS)[way], freeze_dropout=True), torch.no_grad():
        expected = model(IDS).logits
        layer = model.model.layers[1]
        for after in (contextlib.nullcontext, lambda: softhooks.disabled(model)):
            handle = layer.register_forward_pre_hook(_interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(zoo.text(3, 5))
            handle.remove()
            with after():
                found = model(IDS).logits
            assert torch.equal(found, expected if after is contextlib.nullcontext else bare(IDS).logits)
            assert all(module.training for module in model.modules())
        assert torch.equal(model(IDS).logits, expected)


def _interrupt(*_call: Any) -> None:
    raise KeyboardInterrupt


# --- attention functions without a name -------------------------------------------------------------------------------


class _Attention:
    """Somebody's attention, as an object."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)


@pytest.mark.parametrize("function", [partial(sdpa_attention_forward), _Attention()], ids=["partial", "object"])
@pytest.mark.parametrize("way", [*AS_KEYS])
def test_attention_functions_without_a_name(way: str, function: Any) -> None:
    model = zoo.build("llama")
    tf.AttentionInterface.register("nameless", function)
    tf.AttentionMaskInterface.register("nameless", sdpa_mask)
    try:
        with softhooks.attach(model, AS_KEYS[way]), torch.no_grad():
            expected = model(IDS).logits
            model.set_attn_implementation("nameless")
            torch.testing.assert_close(model(IDS).logits, expected)
    finally:
        for interface in (tf.AttentionInterface, tf.AttentionMaskInterface):
            del interface._global_mapping["nameless"]
