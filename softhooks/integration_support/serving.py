"""Prompts in servers and other programs that build batches themselves."""

from softhooks.runtime.continuous_batching import require_servable, required_columns
from softhooks.serving.embeddings import sequence_embeddings
from softhooks.serving.requests import sglang_request, vllm_encode, vllm_request
