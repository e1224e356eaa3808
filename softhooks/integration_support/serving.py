"""Prompts in servers and other programs that build batches themselves."""

from softhooks.runtime.request_prompts import is_waited_for
from softhooks.runtime.servable import remaining_tokens, require_servable_together, required_columns
from softhooks.serving.embeddings import sequence_embeddings
from softhooks.serving.llama_server import URL as LLAMA_SERVER_URL
from softhooks.serving.llama_server import LlamaServer
from softhooks.serving.prefix import MODEL_TYPES, Prefix, prefix_of
from softhooks.serving.prefix_files import write_prefix
from softhooks.serving.prompt_folder import FoundPrefix, PromptFolder
from softhooks.serving.prompt_store import PromptStore
from softhooks.serving.requests import (
    VLLM_CONNECTOR,
    VLLM_PROMPTS,
    sglang_command,
    sglang_request,
    vllm_encode,
    vllm_kv_transfer_config,
    vllm_request,
)
from softhooks.serving.server_checks import ServedModel
from softhooks.serving.slot_export import export_slot
from softhooks.serving.slot_requests import complete as slot_complete
from softhooks.serving.slot_requests import request as slot_request
