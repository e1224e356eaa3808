"""Tiny decoders that attend to an encoder's states, and the expected output of a prompt, written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor

VOCABULARY, WIDTH, IMAGE = 120, 32, 7
_SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT: dict[str, Any] = {
    **_SMALL, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "is_decoder": True, "add_cross_attention": True,
}  # fmt: skip
_ROBERTA = {**_BERT, "pad_token_id": 1, "bos_token_id": 0}
_BART: dict[str, Any] = {
    **_SMALL, "d_model": WIDTH, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "max_position_embeddings": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    **_SMALL, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "add_cross_attention": True,
}  # fmt: skip


def _mllama() -> Any:
    config = tf.models.mllama.MllamaTextConfig(
        **_SMALL, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, cross_attention_layers=[1],
    )  # fmt: skip
    return tf.MllamaForCausalLM(config)


DECODERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)),
    "bert": lambda: tf.BertLMHeadModel(tf.BertConfig(**_BERT)),
    "roberta": lambda: tf.RobertaForCausalLM(tf.RobertaConfig(**_ROBERTA)),
    "roberta-prelayernorm": lambda: tf.RobertaPreLayerNormForCausalLM(tf.RobertaPreLayerNormConfig(**_ROBERTA)),
    "electra": lambda: tf.ElectraForCausalLM(tf.ElectraConfig(**_BERT, embedding_size=16)),
    "ernie": lambda: tf.ErnieForCausalLM(tf.ErnieConfig(**_BERT)),
    "bert-generation": lambda: tf.BertGenerationDecoder(tf.BertGenerationConfig(**_BERT)),
    "rembert": lambda: tf.RemBertForCausalLM(tf.RemBertConfig(**_BERT, input_embedding_size=16, output_embedding_size=24)),
    "xmod": lambda: tf.XmodForCausalLM(
        tf.XmodConfig(**_ROBERTA, languages=["en_XX", "de_DE"], default_language="en_XX")
    ),
    "trocr": lambda: tf.TrOCRForCausalLM(tf.TrOCRConfig(**_BART)),
    "bart": lambda: tf.BartForCausalLM(tf.BartConfig(**_BART, is_decoder=True)),
    "mbart": lambda: tf.MBartForCausalLM(tf.MBartConfig(**_BART, is_decoder=True)),
    "pegasus": lambda: tf.PegasusForCausalLM(tf.PegasusConfig(**_BART, is_decoder=True)),
    "blenderbot": lambda: tf.BlenderbotForCausalLM(tf.BlenderbotConfig(**_BART, is_decoder=True)),
    "whisper": lambda: tf.WhisperForCausalLM(tf.WhisperConfig(**_BART, max_target_positions=64)),
    "xglm": lambda: tf.XGLMForCausalLM(
        tf.XGLMConfig(**_SMALL, d_model=WIDTH, num_layers=2, attention_heads=4, ffn_dim=48, add_cross_attention=True)
    ),
    "mllama": _mllama,
}  # fmt: skip


def make(name: str, **changes: Any) -> Any:
    """Make a decoder with weights large enough that every part of it matters."""
    torch.manual_seed(0)
    model = DECODERS[name]()
    for key, value in changes.items():
        setattr(model.config, key, value)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4 if "embed" in path or "wte" in path or "wpe" in path else 0.15)
            elif "gate" in path:
                parameter.fill_(0.7)  # Mllama's cross-attention starts closed
    return model.eval()


def states_of(name: str, encoded: Tensor) -> dict[str, Any]:
    """An encoder's states under the name of the decoder's argument."""
    if name == "whisper":
        return {"encoder_outputs": (encoded,)}
    return {"cross_attention_states" if name == "mllama" else "encoder_hidden_states": encoded}


def by_hand(model: Any, ids: Tensor, rows: Tensor, **call: Any) -> Tensor:
    """Logits of one unpadded row after the prompt's rows, all in one sequence. [1, T], [P, H] -> [1, T, V]."""
    table = model.get_input_embeddings()  # Whisper's decoder answers with itself
    embedded = getattr(table, "embed_tokens", table)(ids)
    wide = torch.cat([rows[None].to(embedded), embedded], dim=1)
    return model(inputs_embeds=wide, use_cache=False, **call).logits[:, rows.shape[0] :]


def without_dropout(model: Any) -> None:
    """Set every dropout rate of a model to 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key in ("dropout", "activation_dropout", "attention_dropout", "activation_fn_dropout", "layerdrop"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
