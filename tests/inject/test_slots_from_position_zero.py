"""Slots in a decoder whose forward numbers tokens from 2 (RoBERTa), while `generate` numbers them from 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import softhooks

PADDING = 1
SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 40, "pad_token_id": PADDING, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
CLASSES = {
    "roberta": (tf.RobertaConfig, tf.RobertaForCausalLM),
    "camembert": (tf.CamembertConfig, tf.CamembertForCausalLM),
    "data2vec": (tf.Data2VecTextConfig, tf.Data2VecTextForCausalLM),
}


def _model(name: str) -> Any:
    torch.manual_seed(0)
    config, model = CLASSES[name]
    made = model(config(**SIZE, is_decoder=True)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def _generated(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> list[list[int]]:
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, **options
    )
    return output[:, ids.shape[1] :].tolist()


def _by_hand(model: Any, row: Tensor, slots: Tensor) -> list[int]:
    """Generate greedily from embeddings: the first word, the slots, and the other words, numbered from 0 as in `generate`."""
    words = model.get_input_embeddings()
    embeddings = torch.cat([words(row[:1]), slots, words(row[1:])])[None]
    made: list[int] = []
    for _ in range(5):
        positions = torch.arange(embeddings.shape[1])[None]
        made.append(int(model(inputs_embeds=embeddings, position_ids=positions).logits[0, -1].argmax()))
        embeddings = torch.cat([embeddings, words(torch.tensor([[made[-1]]]))], 1)
    return made


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_generation(name: str) -> None:
    """Rows with and without padding before them continue as by hand, with a cache, without one, and with beams."""
    model = _model(name)
    ids = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2], ids[0, :2] = 0, PADDING
    with softhooks.attach(model, softhooks.PromptTuning(4, init="random", placement="after_first")) as prompt:
        slots = prompt.embeddings()
        with softhooks.disabled(model):
            expected = [_by_hand(model, ids[0, 2:], slots), _by_hand(model, ids[1], slots)]
        assert _generated(model, ids, mask) == expected
        assert _generated(model, ids, mask, use_cache=False) == expected
        assert _generated(model, ids[1:], mask[1:]) == expected[1:], "`generate` drops a mask of ones"
        assert _generated(model, ids[:1, 2:], mask[:1, 2:]) == expected[:1]
        beams = _generated(model, ids, mask, num_beams=2)
        assert beams == _generated(model, ids, mask, num_beams=2, use_cache=False)


@torch.no_grad()
def test_a_cache_of_another_text_is_refused() -> None:
    """The number of cached tokens is still compared with the positions, counted from the caller's first one."""
    model = _model("roberta")
    ids = torch.randint(5, 60, (1, 6))
    with softhooks.attach(model, softhooks.PromptTuning(4, init="random", placement="after_first")):
        cache = model(input_ids=ids, position_ids=torch.arange(6)[None], use_cache=True).past_key_values
        with pytest.raises(softhooks.UnsupportedModeError, match="does not contain this text"):
            model(input_ids=ids[:, :1], position_ids=torch.tensor([[7]]), past_key_values=cache)
        model(input_ids=ids[:, :1], position_ids=torch.tensor([[6]]), past_key_values=cache)
