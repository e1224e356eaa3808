"""What the prompt cache requires of SGLang, of its options, and of the prompts; checked when SGLang starts."""

from __future__ import annotations

import os
from typing import Any

from softhooks.errors import OptionError, UnsupportedModeError, UnsupportedModelError
from softhooks.integration_support.serving import PromptFolder, ServedModel

VERSIONS = ("0.5.23",)
"""The releases of SGLang that the prompt cache was run with."""

BACKEND = "softhooks"
"""The value of `--radix-cache-backend` that selects the prompt cache."""

PROMPTS = "SOFTHOOKS_PROMPTS"
"""The environment variable that holds the directory of the prompts."""

SERVED_TYPES = ("gemma3_text", "llama", "qwen3")
"""The model types on which SGLang was compared with transformers."""

_REMEDY = "Serve this model with `softhooks.integrations.transformers_serve`."
_OPTIONS: dict[str, tuple[object, ...]] = {
    "disable_radix_cache": (False,),
    "page_size": (1,),
    "kv_cache_dtype": ("auto", "bfloat16", "bf16"),
    "tp_size": (1,),
    "pp_size": (1,),
    "dp_size": (1,),
    "attn_cp_size": (1,),
    "dcp_size": (1,),
    "tokenizer_worker_num": (1,),
    "speculative_algorithm": (None,),
    "dllm_algorithm": (None,),
    "disaggregation_mode": ("null",),
    "enable_hierarchical_cache": (False,),
    "enable_lmcache": (False,),
    "enable_unified_cache_external_linker": (False,),
    "enable_session_radix_cache": (False,),
    "enable_streaming_session": (False,),
    "json_model_override_args": ("{}",),  # could change the rotary frequencies of the text's keys
}


def require_version(version: str) -> None:
    """Refuse releases of SGLang that the prompt cache was not run with, because it relies on private methods.

    Raises:
        UnsupportedModeError: the release is not in `VERSIONS`.
    """
    if version.split("+")[0] not in VERSIONS:
        raise UnsupportedModeError(
            f"softhooks' prompt cache was not run with SGLang {version}, whose classes change between releases.",
            f"Install SGLang {' or '.join(VERSIONS)}.",
        )


def prompt_folder() -> PromptFolder:
    """Return the directory of prompts that the environment names.

    Raises:
        OptionError: the variable is missing, or names no directory.
    """
    path = os.environ.get(PROMPTS)
    if not path:
        raise OptionError(
            f"the environment variable {PROMPTS} is not set; it must name the directory of prompts.",
            "Write the directory with `softhooks export PROMPT... --to sglang --model MODEL --output DIR`.",
        )
    return PromptFolder(path)


def require_options(options: Any, pool: Any, hybrid: bool) -> None:
    """Refuse options of SGLang with which the prompt cache was not run, or would be wrong.

    Args:
        options: SGLang's resolved server arguments.
        pool: the pool of keys and values.
        hybrid: whether layers with a sliding window have a pool of their own.

    Raises:
        UnsupportedModeError: an option is not supported.
    """
    wrong = {
        name: getattr(options, name) for name, allowed in _OPTIONS.items() if getattr(options, name) not in allowed
    }
    if hybrid:
        wrong["disable_hybrid_swa_memory"] = False
    if os.environ.get("SGLANG_RADIX_FORCE_MISS", "0").lower() in ("1", "true", "yes", "y"):
        wrong["SGLANG_RADIX_FORCE_MISS"] = True
    if not wrong and type(pool).__name__ != "MHATokenToKVPool":
        wrong["pool"] = type(pool).__name__
    if wrong:
        raise UnsupportedModeError(
            "softhooks' prompt cache was not run with these options of SGLang, or they would make its results wrong.",
            "Leave the options out, or start this server without prompts; models with sliding windows need "
            "`--disable-hybrid-swa-memory`.",
            **wrong,
        )


def require_model(model: Any) -> None:
    """Refuse models on which SGLang was not compared with transformers.

    Raises:
        UnsupportedModelError: the model is of another type.
    """
    kind = str(model.hf_text_config.model_type)
    if kind not in SERVED_TYPES:
        raise UnsupportedModelError(
            f"SGLang was not compared with transformers on prompts for the model type {kind!r}.",
            _REMEDY,
            supported=", ".join(SERVED_TYPES),
        )


def served_model(model: Any) -> ServedModel:
    """Return what SGLang's configuration says about the model."""
    config = model.hf_text_config
    return ServedModel(
        server="SGLang",
        model_type=str(config.model_type),
        layers=model.num_hidden_layers,
        heads=model.get_total_num_kv_heads(),
        head_size=model.head_dim,
        vocabulary=config.vocab_size,
        window=getattr(config, "sliding_window", None),
        max_length=model.context_len,
        length_option="--context-length",
    )
