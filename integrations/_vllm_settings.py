"""What the KV connector requires of vLLM, of its configuration, and of the prompts; checked when vLLM starts."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from softhooks.errors import OptionError, UnsupportedModeError, UnsupportedModelError
from softhooks.integration_support.serving import MODEL_TYPES, VLLM_PROMPTS, PromptFolder, ServedModel

VERSIONS = ("0.32.0",)
"""The releases of vLLM that the connector was run with."""

_REMEDY = "Serve this model with `softhooks.integrations.transformers_serve`."
_CACHES = ("auto", "float16", "bfloat16", "float32")


def require_version(version: str) -> None:
    """Refuse releases of vLLM that the connector was not run with, because it relies on private attributes.

    Raises:
        UnsupportedModeError: the release is not in `VERSIONS`.
    """
    if version.split("+")[0] not in VERSIONS:
        raise UnsupportedModeError(
            f"softhooks' connector was not run with vLLM {version}, whose interface for connectors changes between releases.",
            f"Install vLLM {' or '.join(VERSIONS)}.",
        )


@lru_cache(maxsize=4)
def _folder(path: str) -> PromptFolder:
    return PromptFolder(path)


def folder_of(config: Any) -> PromptFolder:
    """Return the directory of prompts that vLLM's configuration names.

    Raises:
        OptionError: the setting is missing, or is not a directory.
    """
    extra = dict(config.kv_transfer_config.kv_connector_extra_config)
    if set(extra) != {VLLM_PROMPTS} or not isinstance(extra[VLLM_PROMPTS], str):
        raise OptionError(
            f"`kv_connector_extra_config` is {extra!r}; it must have the one field {VLLM_PROMPTS!r}, the directory of prompts.",
            "Write the directory with `softhooks export PROMPT... --to vllm --model MODEL --output DIR`.",
        )
    return _folder(extra[VLLM_PROMPTS])


def require_configuration(config: Any) -> None:
    """Refuse configurations of vLLM for which the connector was not run, or would be wrong.

    Raises:
        UnsupportedModelError: the model is of another type, or its layers do not all have keys and values.
        UnsupportedModeError: an option of vLLM is not supported.
    """
    model, parallel = config.model_config, config.parallel_config
    kind = str(model.hf_text_config.model_type)
    if kind not in MODEL_TYPES or model.use_mla or model.is_hybrid:
        raise UnsupportedModelError(
            f"vLLM was not compared with transformers on prompts for the model type {kind!r}.",
            _REMEDY,
            supported=", ".join(MODEL_TYPES),
        )
    found = {
        "decode_context_parallel_size": (parallel.decode_context_parallel_size, (1,)),
        "prefill_context_parallel_size": (parallel.prefill_context_parallel_size, (1,)),
        "pipeline_parallel_size": (parallel.pipeline_parallel_size, (1,)),
        "speculative_config": (config.speculative_config, (None,)),
        "kv_cache_dtype": (config.cache_config.cache_dtype, _CACHES),
        "kv_load_failure_policy": (config.kv_transfer_config.kv_load_failure_policy, ("fail",)),
        "runner_type": (model.runner_type, ("generate",)),
        "hf_overrides": (model.hf_overrides or None, (None,)),  # could change the rotary frequencies of the text's keys
    }
    wrong = {name: value for name, (value, allowed) in found.items() if value not in allowed}
    if wrong:
        raise UnsupportedModeError(
            "softhooks' connector was not run with these options of vLLM, or they would make its results wrong.",
            "Leave the options out, or start this server without prompts.",
            **wrong,
        )


def require_layers(config: Any, cache_config: Any) -> None:
    """Refuse models whose layers do not all keep keys and values of their own in a plain cache.

    Raises:
        UnsupportedModelError: a layer has another kind of cache, or none.
    """
    groups = cache_config.kv_cache_groups
    kinds = {type(group.kv_cache_spec).__name__ for group in groups}
    names = [name for group in groups for name in group.layer_names]
    layers = config.model_config.get_total_num_hidden_layers()
    if not kinds <= {"FullAttentionSpec", "SlidingWindowSpec", "UniformTypeKVCacheSpecs"} or len(names) != layers:
        raise UnsupportedModelError(
            f"{len(names)} of the model's {layers} layers have a cache of their own; a prefix needs plain keys and values in "
            "every layer.",
            _REMEDY,
            caches=", ".join(sorted(kinds)),
        )


def served_model(config: Any) -> ServedModel:
    """Return what vLLM's configuration says about the model."""
    model = config.model_config
    return ServedModel(
        server="vLLM",
        model_type=str(model.hf_text_config.model_type),
        layers=model.get_total_num_hidden_layers(),
        heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        vocabulary=model.hf_text_config.vocab_size,
        window=model.get_sliding_window(),
        max_length=model.max_model_len,
        length_option="--max-model-len",
    )
