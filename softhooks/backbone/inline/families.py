"""The rewritten forward of each class of attention module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from softhooks.backbone.inline.attention_function import FamilyForward
from softhooks.backbone.inline.bert import bert, layoutlmv3, tapas
from softhooks.backbone.inline.convbert import convbert
from softhooks.backbone.inline.deberta import deberta, deberta_v2
from softhooks.backbone.inline.gpt import gpt
from softhooks.backbone.inline.lilt import lilt
from softhooks.backbone.inline.luke import luke, with_entities
from softhooks.backbone.inline.mpnet import mpnet
from softhooks.backbone.inline.mvp import mvp
from softhooks.backbone.inline.squeezebert import squeezebert
from softhooks.backbone.inline.xlm import xlm

FAMILIES: dict[tuple[str, str], FamilyForward] = {
    ("modeling_megatron_bert", "MegatronBertSelfAttention"): bert,
    ("modeling_rembert", "RemBertSelfAttention"): bert,
    ("modeling_roformer", "RoFormerSelfAttention"): bert,
    ("modeling_big_bird", "BigBirdSelfAttention"): bert,
    ("modeling_bigbird_pegasus", "BigBirdPegasusSelfAttention"): bert,
    ("modeling_tapas", "TapasSelfAttention"): tapas,
    ("modeling_layoutlmv3", "LayoutLMv3SelfAttention"): layoutlmv3,
    ("modeling_mpnet", "MPNetSelfAttention"): mpnet,
    ("modeling_deberta", "DisentangledSelfAttention"): deberta,
    ("modeling_deberta_v2", "DisentangledSelfAttention"): deberta_v2,
    ("modeling_luke", "LukeSelfAttention"): luke,
    ("modeling_openai", "Attention"): gpt,
    ("modeling_xlm", "MultiHeadAttention"): xlm,
    ("modeling_flaubert", "MultiHeadAttention"): xlm,
    ("modeling_squeezebert", "SqueezeBertSelfAttention"): squeezebert,
    ("modeling_convbert", "ConvBertSelfAttention"): convbert,
    ("modeling_lilt", "LiltSelfAttention"): lilt,
    ("modeling_mvp", "MvpAttention"): mvp,
}
"""The forward of each family, by the modeling file and the class of the attention module."""

MORE_CALLS: dict[FamilyForward, Callable[[dict[str, Any]], dict[str, Any]]] = {luke: with_entities}
"""Changes to the arguments of a module, for calls that do not occur in a forward on token ids alone but must be compared too."""
