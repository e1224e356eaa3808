"""Models that no prompt can enter raise a softhooks error at attach with its cause, and stay unchanged."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from torch import Tensor, nn

import softhooks
from softhooks import AttachError, LlamaAdapter, PrefixTuning, PromptTuning, UnsupportedModelError

METHODS = [PromptTuning(3), PrefixTuning(3), LlamaAdapter(3)]
ROBERTA = {**zoo.SMALL, "pad_token_id": 1, "bos_token_id": 0}
VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def fsmt() -> Any:
    config = tf.FSMTConfig(
        langs=["en", "de"], src_vocab_size=96, tgt_vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return tf.FSMTForConditionalGeneration(config).eval()


def prophetnet() -> Any:
    config = tf.ProphetNetConfig(
        vocab_size=96, hidden_size=32, encoder_ffn_dim=32, decoder_ffn_dim=32, num_encoder_layers=1, num_decoder_layers=1,
        num_encoder_attention_heads=2, num_decoder_attention_heads=2, max_position_embeddings=64, ngram=2,
    )  # fmt: skip
    return tf.ProphetNetForConditionalGeneration(config).eval()


def prophetnet_decoder() -> Any:
    config = prophetnet().config
    config.is_decoder, config.is_encoder_decoder = True, False
    return tf.ProphetNetForCausalLM(config).eval()


def funnel() -> Any:
    config = tf.FunnelConfig(
        vocab_size=96, block_sizes=[1, 1], d_model=32, n_head=2, d_head=16, d_inner=32, num_decoder_layers=1
    )
    model = tf.FunnelForSequenceClassification(config).eval()
    model(zoo.text(1, 6))  # its first forward sets attributes of its own
    return model


def clip() -> Any:
    text = {**zoo.SMALL, "projection_dim": 16}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 16})).eval()


def vision_encoder_decoder() -> Any:
    decoder = tf.BertConfig(**zoo.SMALL, is_decoder=True, add_cross_attention=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**VISION), decoder)
    config.decoder_start_token_id = config.pad_token_id = 0
    return tf.VisionEncoderDecoderModel(config=config).eval()


def whisper() -> Any:
    config = tf.WhisperConfig(
        vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=16, max_target_positions=32, num_mel_bins=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return tf.WhisperForConditionalGeneration(config).eval()


def idefics() -> Any:
    config = tf.IdeficsConfig(
        **zoo.SMALL, cross_layer_interval=1, additional_vocab_size=0, use_resampler=False,
        vision_config={**VISION, "embed_dim": 32}, perceiver_config={},
    )  # fmt: skip
    return tf.IdeficsForVisionText2Text(config).eval()


class Failing(nn.Module):
    """A model around a small one that fails in a chosen forward."""

    def __init__(self, at: int, error: type[Exception]) -> None:
        super().__init__()
        self.inner = zoo.build("llama")
        self.config = self.inner.config
        self.at, self.error, self.calls = at, error, 0

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.inner.get_input_embeddings()
        return embeddings

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error("out of order")
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


REFUSED: list[Callable[[], Any]] = [
    fsmt,
    prophetnet,
    prophetnet_decoder,
    clip,
    vision_encoder_decoder,
    whisper,
    idefics,
    funnel,
]


def _state(model: nn.Module) -> list[Any]:
    return [
        [(name, len(part._forward_hooks), len(part._forward_pre_hooks), sorted(part.__dict__)) for name, part in
         model.named_modules()],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        [part.training for part in model.modules()],
    ]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)
@pytest.mark.parametrize("build", REFUSED, ids=lambda build: build.__name__)
def test_what_a_model_raises_in_a_probe_is_an_error_of_ours_and_the_model_is_as_it_was(
    build: Callable[[], Any], method: Any
) -> None:
    model = build()
    before = _state(model)
    try:
        softhooks.attach(model, method).remove()
    except AttachError as error:
        _check_remedy(model, method, str(error))
    assert _state(model) == before


def _check_remedy(model: Any, method: Any, message: str) -> None:
    """Apply the remedy in the error's last line."""
    remedy = message.splitlines()[-1]
    inside = re.search(r"`model\.([\w.]+)`", remedy)
    if inside is not None:
        softhooks.attach(model.get_submodule(inside[1]), method).remove()
    named = re.findall("PromptTuning|PrefixTuning|LlamaAdapter", remedy)
    for name in named:
        softhooks.attach(model, getattr(softhooks, name)(2)).remove()
    assert inside or named or re.search("LoRA|no part of this model|softhooks does not support it", remedy), remedy


def test_a_text_model_inside_is_named_and_serves_the_whole() -> None:
    model = clip()
    with pytest.raises(UnsupportedModelError, match=r"`model\.text_model`, a CLIPText"):
        softhooks.attach(model, PromptTuning(3))
    ids, pixels = zoo.text(2, 6), torch.randn(2, 3, 16, 16)
    bare = model(input_ids=ids, pixel_values=pixels).logits_per_image
    with softhooks.attach(model.text_model, PrefixTuning(3, init="random")):
        assert not torch.equal(model(input_ids=ids, pixel_values=pixels).logits_per_image, bare)


def test_a_decoder_that_attends_to_another_part_is_never_advised() -> None:
    with pytest.raises(UnsupportedModelError, match="Attach to another model: no part of this model"):
        softhooks.attach(idefics(), PromptTuning(3))


def test_a_model_whose_states_are_fewer_than_its_tokens_is_told_so() -> None:
    with pytest.raises(UnsupportedModelError, match=r"one state for each of the text's ids"):
        softhooks.attach(funnel(), PromptTuning(3))


@pytest.mark.parametrize("error", [AssertionError, KeyError, ZeroDivisionError, NotImplementedError, StopIteration])
@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)
def test_a_model_may_fail_in_any_probe(method: Any, at: int, error: type[Exception]) -> None:
    model = Failing(at, error)
    before = _state(model.inner)
    try:
        softhooks.attach(model, method).remove()
    except AttachError as raised:
        chain: BaseException | None = raised
        while chain is not None and not isinstance(chain, error):
            chain = chain.__cause__
        assert isinstance(chain, error)
    assert _state(model.inner) == before
