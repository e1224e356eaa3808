"""Tiny models of every supported architecture, made from configs, with random but sizeable weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

VOCABULARY = 96
PAD, BOS, EOS = 0, 1, 2
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def _llama() -> Any:
    return tf.LlamaConfig(**SMALL, num_key_value_heads=2)


def _gpt2() -> Any:
    return tf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=96, pad_token_id=PAD,
        bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip


def _qwen3() -> Any:
    return tf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)


def _gemma3() -> Any:
    return tf.Gemma3TextConfig(
        **{**SMALL, "num_hidden_layers": 3},
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


def _mistral() -> Any:
    return tf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=6)


def _mixtral() -> Any:
    return tf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)


def _opt() -> Any:
    return tf.OPTConfig(
        **{k: v for k, v in SMALL.items() if k != "intermediate_size"}, ffn_dim=48, word_embed_proj_dim=16,
        do_layer_norm_before=True,
    )  # fmt: skip


def _bert() -> Any:
    return tf.BertConfig(**SMALL)


def _roberta() -> Any:
    return tf.RobertaConfig(**{**SMALL, "pad_token_id": 1, "bos_token_id": 0})


def _albert() -> Any:
    return tf.AlbertConfig(**{**SMALL, "num_hidden_layers": 3}, embedding_size=16)  # one layer, run three times


def _electra() -> Any:
    return tf.ElectraConfig(**SMALL, embedding_size=16)


def _distilbert() -> Any:
    return tf.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=96,
        pad_token_id=PAD,
    )


def _modernbert() -> Any:
    return tf.ModernBertConfig(  # three tokens to each side in the sliding layer
        **{**SMALL, "num_hidden_layers": 3}, cls_token_id=BOS, sep_token_id=EOS, local_attention=6,
        global_attn_every_n_layers=2,
    )  # fmt: skip


def _megatron_bert() -> Any:
    return tf.MegatronBertConfig(**SMALL)


def _deberta_v2() -> Any:
    return tf.DebertaV2Config(
        **SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, norm_rel_ebd="layer_norm",
        share_att_key=True, position_biased_input=False, conv_kernel_size=3, conv_act="gelu",
    )  # fmt: skip


def _deberta() -> Any:
    return tf.DebertaConfig(
        **SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16, talking_head=True
    )


def _roformer() -> Any:
    return tf.RoFormerConfig(**SMALL, embedding_size=16)


def _rembert() -> Any:
    return tf.RemBertConfig(**SMALL, input_embedding_size=16, output_embedding_size=24)


def _mpnet() -> Any:
    return tf.MPNetConfig(**{**SMALL, "pad_token_id": 1, "bos_token_id": 0})


def _esm() -> Any:
    return tf.EsmConfig(
        **{**SMALL, "pad_token_id": 1, "bos_token_id": 0}, mask_token_id=3, position_embedding_type="rotary"
    )


def _t5() -> Any:
    return tf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=PAD, eos_token_id=EOS,
        decoder_start_token_id=PAD, relative_attention_num_buckets=8, relative_attention_max_distance=16,
    )  # fmt: skip


def _bart() -> Any:
    return tf.BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=96, pad_token_id=PAD,
        bos_token_id=BOS, eos_token_id=EOS, decoder_start_token_id=EOS, forced_eos_token_id=None,
    )  # fmt: skip


def _gptj() -> Any:
    return tf.GPTJConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=96, rotary_dim=4, pad_token_id=PAD, bos_token_id=BOS,
        eos_token_id=EOS,
    )  # fmt: skip


def _bloom() -> Any:
    return tf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS
    )


def _falcon() -> Any:
    return tf.FalconConfig(
        **{k: v for k, v in SMALL.items() if k != "intermediate_size"}, new_decoder_architecture=True, num_kv_heads=2,
        ffn_hidden_size=48,
    )  # fmt: skip


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _llama, "gpt2": _gpt2, "qwen3": _qwen3, "gemma3": _gemma3, "mistral": _mistral, "mixtral": _mixtral, "opt": _opt,
    "bert": _bert, "roberta": _roberta, "t5": _t5, "bart": _bart, "gptj": _gptj, "bloom": _bloom, "falcon": _falcon,
    "albert": _albert, "electra": _electra, "distilbert": _distilbert, "modernbert": _modernbert,
    "megatron-bert": _megatron_bert, "deberta-v2": _deberta_v2, "deberta": _deberta, "roformer": _roformer,
    "rembert": _rembert, "mpnet": _mpnet, "esm": _esm,
}  # fmt: skip

CAUSAL = ("llama", "gpt2", "qwen3", "gemma3", "mistral", "mixtral", "opt")
CACHED = ("gptj", "bloom", "falcon")
ENCODERS = ("bert", "roberta")
MORE_ENCODERS = {
    "albert": ("sequence", "tokens"), "electra": ("sequence", "qa"), "distilbert": ("sequence", "masked"),
    "modernbert": ("sequence", "tokens"), "megatron-bert": ("tokens", "qa"), "deberta-v2": ("sequence", "masked"),
}  # fmt: skip
"""Encoders that run every property with these heads; `tests/backbone/test_inline_attention.py` and others run more."""
RARE_ENCODERS = ("deberta", "roformer", "rembert", "mpnet", "esm")
WRITTEN_OUT = ("megatron-bert", "deberta-v2", "deberta", "roformer", "rembert", "mpnet")
"""Encoders that compute attention inline."""
SEQ2SEQ = ("t5", "bart")
COMMON = (*CAUSAL, *CACHED, *ENCODERS, *SEQ2SEQ)

HEADS: dict[str, tuple[str, tuple[str, ...]]] = {
    "causal": ("AutoModelForCausalLM", (*CAUSAL, *CACHED)),
    "seq2seq": ("AutoModelForSeq2SeqLM", SEQ2SEQ),
    "sequence": ("AutoModelForSequenceClassification", COMMON),
    "tokens": (
        "AutoModelForTokenClassification",
        tuple(n for n in COMMON if n not in ("gemma3", "opt", "bart", "gptj")),
    ),
    "qa": ("AutoModelForQuestionAnswering", tuple(n for n in COMMON if n not in ("gemma3",))),
    "masked": ("AutoModelForMaskedLM", (*ENCODERS, "bart")),
}


@dataclass(frozen=True)
class Case:
    """One architecture with one head."""

    arch: str
    head: str

    def __str__(self) -> str:
        return f"{self.arch}-{self.head}"

    @property
    def is_seq2seq(self) -> bool:
        """Whether the forward takes decoder ids."""
        return self.arch == "bart" or (self.arch == "t5" and self.head not in ("tokens",))


CASES = [Case(arch, head) for head, (_, archs) in HEADS.items() for arch in archs]
CASES += [Case(arch, head) for arch, heads in MORE_ENCODERS.items() for head in heads]


def build(arch: str, head: str = "causal", seed: int = 0, attention: str = "sdpa", **changes: Any) -> Any:
    """Make a model with random weights large enough that every part of it matters to its output."""
    config = CONFIGS[arch]()
    for key, value in {"num_labels": 3, **changes}.items():
        if key == "num_labels" and head == "qa":
            value = 2
        setattr(config, key, value)
    torch.manual_seed(seed)
    auto = getattr(tf, HEADS[head][0])
    plain = arch in ("gptj", "bloom", *WRITTEN_OUT)
    model = auto.from_config(config, attn_implementation="eager" if plain else attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # RoFormer's angles are what they are
                continue
            if parameter.dim() > 1:
                parameter.normal_(std=0.4 if "embed" in name or "wte" in name or "wpe" in name else 0.15)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def pad_id(model: Any) -> int:
    """The padding id of a model."""
    return int(model.config.pad_token_id)


def text(rows: int = 2, columns: int = 7, seed: int = 0, end: bool = False) -> torch.Tensor:
    """Random ordinary ids; with `end`, each row ends with the end-of-text id (BART's classification needs it)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (rows, columns), generator=generator)
    if end:
        ids[:, -1] = EOS
    return ids


def inputs(case: Case, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The call of a model for some text."""
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    if case.is_seq2seq and case.head in ("seq2seq",):
        call["decoder_input_ids"] = text(ids.shape[0], 4, seed=99)
    return call


def main_output(output: Any) -> torch.Tensor:
    """The tensor that a task model is used for."""
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def with_large_weights(build: Callable[[], Any]) -> Any:
    """Build a model whose matrices are large enough for every token to matter, and whose generation does not end early."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
