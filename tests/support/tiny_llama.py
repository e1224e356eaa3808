"""A Llama whose weights are the same on every machine, because they are not random."""

from __future__ import annotations

import torch
import transformers as tf

VOCABULARY = 98


def tiny_llama() -> tf.LlamaForCausalLM:
    """Two layers, 2 attention heads and 1 key-value head of size 64, in float32."""
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        bos_token_id=VOCABULARY - 3,
        eos_token_id=VOCABULARY - 2,
        pad_token_id=VOCABULARY - 1,
    )
    model = tf.LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 2:
                angles = torch.arange(parameter.numel(), dtype=torch.float64) * (1.3 + number) ** 2
                parameter.copy_((angles.sin() / 3).view_as(parameter))
    return model
