"""Prompts in servers and other programs that build batches themselves."""

from softhooks.runtime.request_prompts import is_waited_for
from softhooks.runtime.servable import remaining_tokens, require_servable_together, required_columns
from softhooks.serving.embeddings import sequence_embeddings
from softhooks.serving.prompt_store import PromptStore
from softhooks.serving.requests import sglang_request, vllm_encode, vllm_request
