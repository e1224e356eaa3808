"""Per-token arguments, such as boxes on a page: virtual slots get the value of padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from torch import Tensor

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, UnsupportedModeError

IDS = zoo.text(2, 8)
MASK = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
ROBERTA = {**zoo.SMALL, "pad_token_id": 1, "bos_token_id": 0}


def _boxes() -> Tensor:
    corner = torch.randint(0, 50, (2, 8, 2), generator=torch.Generator().manual_seed(0))
    return torch.cat([corner, corner + 7], -1)


def _paths() -> Tensor:
    return torch.randint(0, 5, (2, 8, 4), generator=torch.Generator().manual_seed(1))


def _build(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def layoutlm() -> Any:
    return _build(tf.LayoutLMForTokenClassification(tf.LayoutLMConfig(**zoo.SMALL, max_2d_position_embeddings=64)))


def layoutlmv3(**more: Any) -> Any:
    config = tf.LayoutLMv3Config(
        **ROBERTA, max_2d_position_embeddings=64, coordinate_size=6, shape_size=4, input_size=16, patch_size=8, **more
    )
    return _build(tf.LayoutLMv3ForTokenClassification(config))


def lilt() -> Any:
    config = tf.LiltConfig(**{**ROBERTA, "hidden_size": 48}, max_2d_position_embeddings=64, channel_shrink_ratio=2)
    return _build(tf.LiltForTokenClassification(config))


def markuplm() -> Any:
    config = tf.MarkupLMConfig(
        **ROBERTA, max_depth=4, xpath_unit_hidden_size=4, max_xpath_tag_unit_embeddings=12, tag_pad_id=9,
        max_xpath_subs_unit_embeddings=14, subs_pad_id=11,
    )  # fmt: skip
    return _build(tf.MarkupLMForTokenClassification(config))


CASES: dict[str, tuple[Callable[[], Any], dict[str, Tensor], dict[str, int], bool]] = {
    # the model, its arguments, their values at slots, whether keys and values can enter
    "layoutlm": (layoutlm, {"bbox": _boxes()}, {"bbox": 0}, True),
    "layoutlmv3": (layoutlmv3, {"bbox": _boxes()}, {"bbox": 0}, False),
    "lilt": (lilt, {"bbox": _boxes()}, {"bbox": 0}, False),
    "markuplm": (
        markuplm, {"xpath_tags_seq": _paths(), "xpath_subs_seq": _paths()}, {"xpath_tags_seq": 9, "xpath_subs_seq": 11}, True,
    ),
}  # fmt: skip


def by_hand(model: Any, rows: Tensor, given: dict[str, Tensor], values: dict[str, int], name: str) -> Tensor:
    """The model's logits with the rows before each text's embeddings, and padding's argument values before its own."""
    count = rows.shape[0]
    wide = {
        key: torch.cat([torch.full((2, count, value.shape[2]), values[key]), value], 1) for key, value in given.items()
    }
    ids = torch.cat([torch.full((2, count), 40), IDS], 1)
    mask = torch.cat([torch.ones(2, count, dtype=torch.long), MASK], 1)

    def put_in(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return torch.cat([rows.expand(2, -1, -1), output[:, count:]], 1)

    with model.get_input_embeddings().register_forward_hook(put_in):
        logits: Tensor = model(input_ids=ids, attention_mask=mask, **wide).logits
    return logits[:, count:]


@pytest.mark.parametrize("name", CASES)
def test_slots_stand_where_padding_stands(name: str) -> None:
    build, given, values, _ = CASES[name]
    model = build()
    with torch.no_grad():
        bare = model(input_ids=IDS, attention_mask=MASK, **given).logits
        with softhooks.attach(model, PromptTuning(3, init="random"), train_head=False) as prompt:
            assert prompt.injection == "slots"
            next(prompt.encoder.parameters()).normal_()
            found = model(input_ids=IDS, attention_mask=MASK, **given).logits
            plain = model(input_ids=IDS, attention_mask=MASK).logits
            with softhooks.disabled(model):
                torch.testing.assert_close(model(input_ids=IDS, attention_mask=MASK, **given).logits, bare)
                rows = prompt.encoder("embeddings")
                expected = by_hand(model, rows, given, values, name)
        assert not torch.allclose(found, plain, atol=1e-3)
        real = MASK.bool()
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(input_ids=IDS, attention_mask=MASK, **given).logits, bare)


@pytest.mark.parametrize("method", [PrefixTuning(3), LlamaAdapter(3)], ids=lambda m: m.kind)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3]])
def test_what_enters_attention_takes_them_as_they_are(name: str, method: Any) -> None:
    build, given, _, _ = CASES[name]
    model = build()
    with softhooks.attach(model, method):
        logits = model(input_ids=IDS, attention_mask=MASK, **given).logits
        assert logits.shape[:2] == IDS.shape
        assert not torch.allclose(logits, model(input_ids=IDS, attention_mask=MASK).logits, atol=1e-3)


def test_an_image_beside_the_text_is_refused_where_its_columns_cannot_be_told_from_slots() -> None:
    model = layoutlmv3(has_relative_attention_bias=False, has_spatial_attention_bias=False)
    image = torch.randn(2, 3, 16, 16)
    with softhooks.attach(model, PromptTuning(3)):
        with pytest.raises(UnsupportedModeError, match=r"must return one per position(.|\n)*text only"):
            model(input_ids=IDS, attention_mask=MASK, bbox=_boxes(), pixel_values=image)
        assert model(input_ids=IDS, attention_mask=MASK, bbox=_boxes()).logits.shape[:2] == IDS.shape


def test_an_argument_without_a_known_value_is_refused_by_name() -> None:
    model = layoutlm()
    with softhooks.attach(model, PromptTuning(3)) as prompt:
        stack = prompt.prompted_model.structure.entry.module
        with pytest.raises(UnsupportedModeError, match=r"argument: token_scores \[2, 8\]\nLeave .*PrefixTuning"):
            stack(input_ids=IDS, attention_mask=MASK, token_scores=torch.ones(2, 8))


# --- TAPAS: positions that begin anew in each cell of a table -----------------------------------------------------------


def test_positions_that_a_model_makes_of_a_table_are_left_to_it() -> None:
    config = tf.TapasConfig(**zoo.SMALL, type_vocab_sizes=[3, 16, 16, 2, 2, 4, 4], num_labels=3)
    whole = _build(tf.TapasForSequenceClassification(config))
    model = whole.tapas
    cells = torch.zeros(2, 8, 7, dtype=torch.long)
    cells[:, 3:, 0], cells[:, 3:5, 1:3], cells[:, 5:, 1], cells[:, 5:, 2] = 1, 1, 2, 1
    with torch.no_grad(), softhooks.attach(whole, PromptTuning(3)) as prompt:
        next(prompt.encoder.parameters()).normal_()
        found = model(input_ids=IDS, attention_mask=MASK, token_type_ids=cells).last_hidden_state
        with pytest.raises(UnsupportedModeError, match=r"begin with text(.|\n)*Pad on the right"):
            model(input_ids=IDS, attention_mask=MASK.flip(1), token_type_ids=cells)
        rows = prompt.encoder("embeddings")
        with softhooks.disabled(whole):

            def put_in(_module: Any, _args: Any, output: Tensor) -> Tensor:
                return torch.cat([rows.expand(2, -1, -1), output[:, 3:]], 1)

            ids = torch.cat([torch.full((2, 3), 40), IDS], 1)
            mask = torch.cat([torch.ones(2, 3, dtype=torch.long), MASK], 1)
            types = torch.cat([torch.zeros(2, 3, 7, dtype=torch.long), cells], 1)
            with model.get_input_embeddings().register_forward_hook(put_in):
                expected = model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state[:, 3:]
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-4)


# --- XLM: languages, lengths, segments in the table of the words ------------------------------------------------------


def xlm() -> Any:
    config = tf.XLMConfig(
        vocab_size=96, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=96, n_langs=3, use_lang_emb=True, pad_index=2,
        pad_token_id=2, bos_index=0, eos_index=1, mask_index=3,
    )  # fmt: skip
    return _build(tf.XLMWithLMHeadModel(config))


def test_a_slot_has_the_language_of_its_row() -> None:
    model, langs = xlm(), torch.tensor([[1] * 8, [2] * 8])
    with torch.no_grad(), softhooks.attach(model, PromptTuning(3)) as prompt:
        next(prompt.encoder.parameters()).normal_()
        found = model(input_ids=IDS, langs=langs).logits
        assert not torch.allclose(found, model(input_ids=IDS).logits, atol=1e-3)
        rows = prompt.encoder("embeddings")
        with softhooks.disabled(model):

            def put_in(_module: Any, _args: Any, output: Tensor) -> Tensor:
                return torch.cat([rows.expand(2, -1, -1), output[:, 3:]], 1)

            wide = torch.cat([torch.full((2, 3), 40), IDS], 1)
            with model.get_input_embeddings().register_forward_hook(put_in):
                expected = model(input_ids=wide, langs=torch.cat([langs[:, :3], langs], 1)).logits[:, 3:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_lengths_are_a_mask() -> None:
    model = xlm()
    with torch.no_grad(), softhooks.attach(model, PromptTuning(3)):
        found = model(input_ids=IDS, lengths=torch.tensor([8, 6])).logits
        expected = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["xlm", "gpt2"])
def test_segments_that_are_looked_up_in_the_table_of_words_do_not_bring_the_prompt_again(arch: str) -> None:
    model = xlm() if arch == "xlm" else zoo.build("gpt2")
    segments = torch.tensor([[0, 0, 5, 5, 5, 5, 5, 5]] * 2)
    with torch.no_grad(), softhooks.attach(model, PromptTuning(2, placement="after_first")) as prompt:
        assert prompt.injection == "slots"
        next(prompt.encoder.parameters()).normal_()
        found = model(input_ids=IDS, token_type_ids=segments).logits
        rows = prompt.encoder("embeddings")
        with softhooks.disabled(model):
            calls: list[int] = []

            def put_in(_module: Any, _args: Any, output: Tensor) -> Tensor | None:
                calls.append(1)
                if len(calls) > 1:
                    return None
                return torch.cat([output[:, :1], rows.expand(2, -1, -1), output[:, 3:]], 1)

            wide = torch.cat([IDS[:, :1], torch.full((2, 2), 40), IDS[:, 1:]], 1)
            types = torch.cat([segments[:, :1], torch.zeros(2, 2, dtype=torch.long), segments[:, 1:]], 1)
            with model.get_input_embeddings().register_forward_hook(put_in):
                expected = model(input_ids=wide, token_type_ids=types).logits
    torch.testing.assert_close(found[:, 1:], expected[:, 3:], rtol=1e-4, atol=1e-4)


def test_positions_that_point_at_words_are_refused_beside_slots() -> None:
    """Luke's entities refer to the columns of their words, which slots shift."""
    config = tf.LukeConfig(**ROBERTA, entity_vocab_size=8, entity_emb_size=16)
    model = _build(tf.LukeModel(config))
    entities = {"entity_ids": torch.tensor([[1, 2]] * 2), "entity_position_ids": torch.tensor([[[1, 2], [3, -1]]] * 2)}
    bare = model(IDS, attention_mask=MASK, **entities).last_hidden_state
    with softhooks.attach(model, PromptTuning(3)):
        model(IDS, attention_mask=MASK)
        with pytest.raises(UnsupportedModeError, match="which refers to words by their indices"):
            model(IDS, attention_mask=MASK, **entities)
        with softhooks.disabled(model):
            assert torch.equal(model(IDS, attention_mask=MASK, **entities).last_hidden_state, bare)
