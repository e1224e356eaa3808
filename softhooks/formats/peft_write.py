"""Write prompts in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A prompt is written only if PEFT and softhooks compute the same logits with it for text without padding. Other prompts, such as
the prefix of an encoder-decoder, are refused.

Source: the PEFT 0.21 format.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softhooks.backbone.heads import can_generate
from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.backbone.stack import ModelStructure
from softhooks.base_model.info import class_of_transformers
from softhooks.compat.peft import unwrapped
from softhooks.errors import UnsupportedMethodError
from softhooks.formats import peft_llama_adapter
from softhooks.formats.files import write_json, write_tensors
from softhooks.formats.peft_read import CONFIG, TABLE, TENSORS
from softhooks.formats.stored import StoredPrompt
from softhooks.prompt_encoder import EMBEDDINGS

Adapter = tuple[dict[str, Any], dict[str, Tensor]]
"""The config and the tensors of a PEFT adapter."""

_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
_KNOWN_TASKS = (*_TASKS.values(), "CAUSAL_LM", "SEQ_2_SEQ_LM")
_UNBOUNDED = 1e9
"""The bound that is written if there is none; with infinity, PEFT computes NaN."""

_PREFIXED_ENCODERS = ("Bert", "Roberta", "XLMRoberta")
"""The encoders that support PEFT's prefixes. They accept a cache because they can also be decoders."""


def adapter_of(
    stored: StoredPrompt, model: nn.Module | None = None, structure: ModelStructure | None = None
) -> Adapter:
    """Convert a prompt to PEFT's config and tensors, or raise an `UnsupportedMethodError` if PEFT has no equivalent.

    Args:
        model, structure: the model with the prompt and its structure, or None if only the file of the prompt is known.
    """
    task = _task(stored, model)
    if stored.added_ids:
        raise _refusal(stored, f"embeddings of {len(stored.added_ids)} added tokens", "a prompt and heads")
    if stored.kind not in _WRITERS and stored.kind != "llama_adapter":
        raise _refusal(stored, f"method {stored.kind!r}", f"one of {', '.join(sorted([*_WRITERS, 'llama_adapter']))}")
    if BUFFER in stored.conventions:
        raise _refusal(stored, "token ids of virtual tokens", "a model that depends on embeddings alone")
    is_branch = stored.kind == "llama_adapter"
    obstacle = peft_llama_adapter.obstacle(stored, structure) if is_branch else None
    if obstacle is not None:
        raise _refusal(stored, *obstacle)
    config, tensors = peft_llama_adapter.parts(stored) if is_branch else _WRITERS[stored.kind](stored, task)
    heads = {f"base_model.{path}.{name}": value for path, head in stored.heads.items() for name, value in head.items()}
    common = {
        "auto_mapping": None,
        "base_model_name_or_path": stored.base.name_or_path or None,
        "inference_mode": True,
        "revision": stored.base.revision,
        "task_type": task,
        **({} if is_branch else {"modules_to_save": list(stored.heads) or None}),
    }
    return common | config, tensors | heads


def write(adapter: Adapter, folder: Path) -> None:
    """Write the config and the tensors of an adapter."""
    config, tensors = adapter
    write_tensors(folder / TENSORS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, config)


# --- the types of adapters --------------------------------------------------------------------------------------------


def _shape(stored: StoredPrompt, width: int) -> dict[str, Any]:
    """Return the sizes that every PEFT prompt has in its config; PEFT fills in those that are None."""
    runs = next(iter(stored.stacks.values()), {}).get("self") or []
    return {
        "num_virtual_tokens": stored.options["num_virtual_tokens"],
        "token_dim": width,
        "num_layers": sum(run[0] for run in runs) or None,
        "num_attention_heads": runs[0][1] if runs else None,
        "num_transformer_submodules": 1,
    }


def _front_rows(stored: StoredPrompt, task: str) -> Tensor:
    """Return the embeddings of a prompt, [P, H]; refuse a prompt that is not at the front."""
    placement = stored.conventions["placement"]
    if placement != "front":
        raise _refusal(stored, f"placement {placement!r}", "placement 'front'")
    _refuse_pooled(stored, task, "a prompt")
    return stored.tables[EMBEDDINGS]


def _refuse_pooled(stored: StoredPrompt, task: str, what: str) -> None:
    text = stored.stacks.get("text")
    if text is not None and not text.get("causal") and task != "TOKEN_CLS":
        raise _refusal(
            stored,
            f"{what} in an encoder that classifies the first token, which is a virtual token in PEFT",
            "a decoder, an encoder-decoder, or an encoder that classifies tokens",
        )


def _rows(stored: StoredPrompt, task: str) -> Adapter:
    """Write embeddings. P-tuning's network is folded into them, because PEFT would build a different network."""
    rows = _front_rows(stored, task)
    config = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", **_shape(stored, rows.shape[1])}
    return config, {TABLE: rows}


def _context(stored: StoredPrompt, task: str) -> Adapter:
    """Write the embeddings of a CPT context, and the options with which PEFT trains them."""
    rows, options = _front_rows(stored, task), stored.options
    bounds = [options[name] for name in ("epsilon_input", "epsilon_format")]
    bounds = [_UNBOUNDED if bound is None else bound for bound in bounds]
    config = {
        "cpt_token_ids": options["context_ids"],
        "cpt_mask": [1] * len(rows),
        "cpt_tokens_type_mask": options["token_types"],
        "opt_weighted_loss_type": "decay",
        "opt_loss_decay_factor": options["decay"],
        "opt_projection_epsilon": bounds[0],
        "opt_projection_format_epsilon": bounds[1],
    }
    return {"peft_type": "CPT", **_shape(stored, rows.shape[1]), **config}, {TABLE: rows}


def _prefix(stored: StoredPrompt, _task: str) -> Adapter:
    """Write a prefix, if the attention of every layer has the same shape."""
    if list(stored.stacks) != ["text"]:
        raise _refusal(stored, "prefixes in an encoder and its decoder", "a prefix in a decoder, or in BERT or RoBERTa")
    text, base_class = stored.stacks["text"], stored.base.class_name
    is_causal = bool(text.get("causal"))
    if not is_causal and not base_class.startswith(_PREFIXED_ENCODERS):
        raise _refusal(stored, f"a prefix in an encoder ({base_class or 'unknown class'})", "BERT, RoBERTa")
    runs = text.get("self") or []
    shapes = {tuple(run[1:]) for run in runs}
    if len(shapes) != 1 or any(key != value for _, key, value in shapes):
        raise _refusal(stored, f"layers with the shapes {sorted(shapes)}", "one shape for all keys and values")
    (heads, size, _), layers, table = shapes.pop(), sum(run[0] for run in runs), stored.tables["text"]
    if table.shape[1] != 2 * layers * heads * size:
        raise _refusal(stored, "a prefix in some of the layers", "a prefix in every layer")
    expected = {"shift_positions": True}
    if is_causal and stored.base.sliding_window is not False:  # `windowed` has no effect without sliding windows
        expected["windowed"] = True
    differing = {key: value for key, value in stored.conventions.items() if value != expected.get(key, value)}
    if differing:
        where = "in a decoder" if is_causal else "in an encoder"
        raise _refusal(stored, f"a prefix with {differing} {where}", {key: expected[key] for key in differing})
    config = {"peft_type": "PREFIX_TUNING", "prefix_projection": False, **_shape(stored, heads * size)}
    return config, {TABLE: table}


def _cartridge(stored: StoredPrompt, task: str) -> Adapter:
    config, tensors = _prefix(stored, task)
    del config["prefix_projection"]
    return config | {"peft_type": "CARTRIDGE", "num_frozen_tokens": stored.options["frozen_slots"]}, tensors


def _multitask(stored: StoredPrompt, task: str) -> Adapter:
    """Write the prompts of several tasks; the prompt of a single task is written like any other."""
    tables = stored.tables
    if EMBEDDINGS in tables:
        return _rows(stored, task)
    if "text" not in stored.stacks:
        raise _refusal(
            stored, "several tasks in an encoder-decoder, where PEFT also prompts the decoder", "a decoder, or one task"
        )
    _refuse_pooled(stored, task, "several tasks")
    length, width = tables["shared"].shape
    left, right = tables["left"].unflatten(0, (-1, length)), tables["right"].unflatten(0, (-1, width)).mT
    # With "RANDOM", PEFT does not look for the checkpoint of a source prompt.
    config = {"num_tasks": left.shape[0], "num_ranks": left.shape[2], "prompt_tuning_init": "RANDOM"}
    tensors = {TABLE: tables["shared"], "prefix_task_cols": left, "prefix_task_rows": right}
    return {"peft_type": "MULTITASK_PROMPT_TUNING", **config, **_shape(stored, width)}, tensors


_WRITERS: dict[str, Callable[[StoredPrompt, str], Adapter]] = {
    "prompt_tuning": _rows,
    "p_tuning": _rows,
    "context_aware_prompt_tuning": _context,
    "prefix_tuning": _prefix,
    "p_tuning_v2": _prefix,
    "residual_prompt_tuning": _rows,
    "context_tuning": _prefix,
    "cartridge": _cartridge,
    "multitask_prompt_tuning": _multitask,
}


# --- checks -----------------------------------------------------------------------------------------------------------


def _task(stored: StoredPrompt, model: nn.Module | None) -> str:
    """Return the `task_type`, which determines the class of PEFT's model."""
    name, is_encoder_decoder = stored.base.class_name, len(stored.stacks) == 2
    for ending, task in _TASKS.items():
        if name.endswith(ending) and not is_encoder_decoder:
            return task
    if _class_generates(name) if model is None else can_generate(unwrapped(model)):
        return "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM"
    if not name and stored.base.task in _KNOWN_TASKS:
        return stored.base.task
    raise _refusal(
        stored, f"a prompt for {name or 'an unknown model'}", "a language model, or a sequence or token classifier"
    )


def _class_generates(name: str) -> bool:
    from transformers import PreTrainedModel

    found = class_of_transformers(name)
    return found is not None and issubclass(found, PreTrainedModel) and found.can_generate()


def _refusal(stored: StoredPrompt, found: str, supported: object) -> UnsupportedMethodError:
    return UnsupportedMethodError(
        f"PEFT's format has no equivalent of {found}.",
        "Save the prompt with `save_pretrained(directory)`, and load it with softhooks.",
        supported=supported,
        prompt=stored.source,
    )
