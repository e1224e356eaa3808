"""Heads and poolers that read a column by its number: they never read a virtual token, or the prompt is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from torch import Tensor

import softhooks
from softhooks import PrefixTuning, PromptTuning
from softhooks.errors import AttachError, UnsupportedMethodError

LENGTH = 4


def _siglip() -> Any:
    small = {key: zoo.SMALL[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    torch.manual_seed(0)
    return tf.SiglipTextModel(
        tf.SiglipTextConfig(**small, num_attention_heads=4, max_position_embeddings=64, projection_size=32)
    ).eval()


class _Reader(tf.BertModel):
    """An encoder that pools a given column without a module named pooler."""

    column = 0

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        **kwargs: Any,
    ) -> Any:
        output = super().forward(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        output.pooler_output = output.last_hidden_state[:, self.column].tanh()
        return output


def _reader(column: int) -> Any:
    torch.manual_seed(0)
    model = _Reader(tf.BertConfig(**zoo.SMALL), add_pooling_layer=False).eval()
    model.column = column
    return model


@pytest.mark.parametrize(
    ("column", "placement", "reads"),
    [
        (0, "front", True),
        (0, "after_first", False),
        (0, "end", False),
        (-1, "front", False),
        (-1, "end", True),
        (2, "after_first", True),
    ],
)
@torch.no_grad()
def test_a_pooler_that_would_read_a_slot_is_refused_at_attach(column: int, placement: Any, reads: bool) -> None:
    model, bare = _reader(column), _reader(column)
    if reads:
        with pytest.raises(
            UnsupportedMethodError,
            match=r"pooler_output` depends on the hidden state of a slot; .* must not read virtual tokens",
        ):
            softhooks.attach(model, PromptTuning(LENGTH, placement=placement))
        assert not hasattr(model, "soft_prompt")
        ids = zoo.text(1, 6)
        torch.testing.assert_close(model(ids).pooler_output, bare(ids).pooler_output, rtol=0, atol=0)
        softhooks.attach(model, PrefixTuning(LENGTH))  # what the message says to use
        return
    prompt = softhooks.attach(model, PromptTuning(LENGTH, placement=placement))
    ids = zoo.text(1, 6)
    embedded = bare.get_input_embeddings()(ids)
    cut = {"front": 0, "after_first": 1, "end": 6}[placement]
    wide = torch.cat([embedded[:, :cut], prompt.embeddings()[None], embedded[:, cut:]], 1)
    torch.testing.assert_close(model(ids).pooler_output, bare(inputs_embeds=wide).pooler_output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", ["front", "after_first"])
@torch.no_grad()
def test_a_pooler_that_takes_the_last_column_takes_the_texts(placement: Any) -> None:
    model, bare = _siglip(), _siglip()
    prompt = softhooks.attach(model, PromptTuning(LENGTH, placement=placement))
    ids = zoo.text(1, 6)
    embedded = (
        bare.text_model.embeddings.token_embedding(ids)
        if hasattr(bare, "text_model")
        else bare.embeddings.token_embedding(ids)
    )
    cut = {"front": 0, "after_first": 1}[placement]
    wide = torch.cat([embedded[:, :cut], prompt.embeddings()[None], embedded[:, cut:]], 1)
    want = _with_embeddings(bare, wide)
    torch.testing.assert_close(model(input_ids=ids).pooler_output, want, rtol=1e-4, atol=1e-5)


def _with_embeddings(model: Any, rows: Tensor) -> Tensor:
    """Run a model that takes ids alone on given rows."""
    table = next(part for name, part in model.named_modules() if name.endswith("token_embedding"))
    handle = table.register_forward_hook(lambda *_: rows)
    try:
        return model(input_ids=torch.ones(rows.shape[:2], dtype=torch.long)).pooler_output
    finally:
        handle.remove()


def test_siglip_refuses_slots_behind_the_text() -> None:
    with pytest.raises(UnsupportedMethodError, match="must not read virtual tokens"):
        softhooks.attach(_siglip(), PromptTuning(LENGTH, placement="end"))


@pytest.mark.parametrize("eos", [2, 5], ids=["highest", "named"])
@torch.no_grad()
def test_clip_finds_the_end_of_the_text_with_a_prompt_before_it(eos: int) -> None:
    small = {key: zoo.SMALL[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = tf.CLIPTextConfig(**small, num_attention_heads=4, max_position_embeddings=64, eos_token_id=eos)
    for injection in ("shared", "slots"):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(tf.CLIPTextModel(config).eval())
        model, bare = models
        prompt = softhooks.attach(model, PromptTuning(LENGTH), injection=injection)
        ids = torch.tensor([[7, 9, 30, 5 if eos == 5 else 95, 8, 8]])  # the end, and what may stand behind it
        table = next(part for name, part in bare.named_modules() if name.endswith("token_embedding"))
        wide = torch.cat([prompt.embeddings()[None], table(ids)], 1)
        handle = table.register_forward_hook(lambda *_, wide=wide: wide)
        want = bare(input_ids=torch.zeros(1, LENGTH + 6, dtype=torch.long)).last_hidden_state[:, LENGTH + 3]
        handle.remove()
        torch.testing.assert_close(model(input_ids=ids).pooler_output, want, rtol=1e-4, atol=1e-5)


def _funnel(kind: str) -> Any:
    torch.manual_seed(0)
    config = tf.FunnelConfig(
        vocab_size=zoo.VOCABULARY, d_model=32, n_head=4, d_head=8, d_inner=48, block_sizes=[1, 1],
        num_decoder_layers=1, max_position_embeddings=96, pad_token_id=0,
    )  # fmt: skip
    return getattr(tf, kind)(config).eval()


@pytest.mark.parametrize("kind", ["FunnelBaseModel", "FunnelForSequenceClassification"])
@pytest.mark.parametrize("placement", ["front", "after_first", "end"])
def test_a_funnel_that_pools_virtual_tokens_with_the_text_is_refused_at_attach(kind: str, placement: Any) -> None:
    with pytest.raises(
        AttachError, match="no module that looks up token ids in an embedding and returns for each token a state"
    ):
        softhooks.attach(_funnel(kind), PromptTuning(LENGTH, placement=placement))
