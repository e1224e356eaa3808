"""A stack's position numbering is learned by watching it: slots stand where words would, whatever number it starts at."""

from __future__ import annotations

from typing import Any

import pytest
import real_words
import torch
import transformers as tf
import zoo

import softhooks

TINY: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip


def _bart_decoder() -> Any:
    config = zoo.CONFIGS["bart"]()
    config.is_decoder, config.is_encoder_decoder = True, False
    return tf.BartForCausalLM(config)


def _nystromformer() -> Any:
    return tf.NystromformerForMaskedLM(tf.NystromformerConfig(**TINY, num_landmarks=64, segment_means_seq_len=64))


def _kosmos() -> Any:
    text = {
        "vocab_size": 160, "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = tf.Kosmos2_5Config(
        text_config=text, vision_config={**vision, "head_dim": 8, "patch_embed_hidden_size": 32}
    )
    return tf.Kosmos2_5ForConditionalGeneration(config)


STARTS: dict[str, tuple[Any, int]] = {
    "luke": (lambda: tf.LukeForMaskedLM(tf.LukeConfig(**TINY, entity_vocab_size=8, entity_emb_size=16)), 2),
    "nystromformer": (_nystromformer, 2),
    "yoso": (lambda: tf.YosoForMaskedLM(tf.YosoConfig(**TINY)), 2),
    "roberta": (lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**TINY)), 2),
    "bert": (lambda: tf.BertForMaskedLM(tf.BertConfig(**TINY)), 0),
    "bart decoder": (_bart_decoder, 0),
    "kosmos-2.5": (_kosmos, 1),
}


def _model(name: str) -> Any:
    torch.manual_seed(0)
    model = STARTS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("name", STARTS)
def test_the_first_token_has_the_number_that_the_bare_model_gives_it(name):
    with softhooks.attach(_model(name), softhooks.PromptTuning(3)) as prompt:
        positions = prompt.prompted_model.structure.entry.positions
    assert positions.start == STARTS[name][1]
    assert positions.can_shift


@pytest.mark.parametrize("name", STARTS)
def test_words_as_slots_are_these_words(name):
    assert real_words.slots_gap(_model(name), zoo.text(1, 9), 3) < 1e-5


@pytest.mark.parametrize("name", ["luke", "roberta", "bart decoder"])
def test_padding_does_not_move_words_in_slots(name):
    for padding in ({"left": 3}, {"right": 2}):
        assert real_words.slots_gap(_model(name), zoo.text(1, 9), 3, **padding) < 1e-5


def test_a_decoder_told_at_its_table_takes_prefixes_and_shared_prompts():
    for padding in ({}, {"right": 2}):
        assert real_words.prefix_gap(_model("bart decoder"), zoo.text(1, 9), 3, **padding) < 1e-5
        assert real_words.front_gap(_model("bart decoder"), zoo.text(1, 9), 3, **padding) < 1e-5


@pytest.mark.parametrize("padding", [{}, {"left": 3}, {"right": 2}], ids=["none", "left", "right"])
def test_a_model_that_counts_padding_by_its_id_is_watched_on_words(padding):
    """The padding id stands in the text's config alone; a probe with that id would seem to start at the padding's row."""
    model = _model("kosmos-2.5")
    for measure in (real_words.prefix_gap, real_words.front_gap, real_words.slots_gap):
        assert measure(model, zoo.text(1, 9), 3, **padding) < 1e-5, measure.__name__


def test_a_document_that_was_read_stands_before_the_text_of_a_decoder_told_at_its_table():
    model, ids = _model("bart decoder"), zoo.text(1, 12)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 8:]
        with softhooks.attach(model, softhooks.Cartridge(8, document=ids[0, :8].tolist())) as prompt:
            assert prompt.conventions["shift_positions"]
            torch.testing.assert_close(model(input_ids=ids[:, 8:]).logits, expected, atol=1e-4, rtol=1e-4)
