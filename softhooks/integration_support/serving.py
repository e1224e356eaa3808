"""Prompts in servers and other programs that build batches themselves."""

from softhooks.runtime.continuous_batching import require_servable, required_columns
from softhooks.serving.embeddings import sequence_embeddings
from softhooks.serving.sglang import request as sglang_request
from softhooks.serving.vllm import encode as vllm_encode
from softhooks.serving.vllm import request as vllm_request

__all__ = [
    "require_servable",
    "required_columns",
    "sequence_embeddings",
    "sglang_request",
    "vllm_encode",
    "vllm_request",
]
