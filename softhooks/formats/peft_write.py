"""Write prompts as PEFT reads them: `adapter_config.json` and `adapter_model.safetensors`.

Only what means the same there is written: of an encoder-decoder's prefix, for one, PEFT knows no equal. For text without padding
PEFT then gives the logits that softhooks gives.

Source: the format of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.backbone.stack import ModelStructure
from softhooks.compat.peft import unwrapped
from softhooks.encoder import EMBEDDINGS
from softhooks.errors import UnsupportedMethodError
from softhooks.formats import peft_llama_adapter
from softhooks.formats.files import write_json, write_tensors
from softhooks.formats.peft_read import CONFIG, TENSORS
from softhooks.formats.stored import StoredPrompt

Parts = tuple[dict[str, Any], dict[str, Tensor]]
"""What a kind of adapter adds to the config, and its tensors."""

_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
_WITHOUT_CLASS = (*_TASKS.values(), "CAUSAL_LM", "SEQ_2_SEQ_LM")
_TABLE = "prompt_embeddings"
_UNBOUNDED = 1e9
"""How far PEFT is told that a token may move where softhooks has no bound; infinity would make it compute no number."""

_PREFIXED_ENCODERS = ("Bert", "Roberta", "XLMRoberta")
"""Encoders that take PEFT's prefix, through the cache that they have as decoders."""


@dataclass(frozen=True)
class Export:
    """A prompt, and what is known of the model that it is on or was on.

    Attributes:
        stored: the prompt, folded.
        structure: of its model, where there is one; a file knows less.
        generates: whether its model is a language model that generates; None: its class says.
    """

    stored: StoredPrompt
    structure: ModelStructure | None = None
    generates: bool | None = None

    @classmethod
    def of(cls, stored: StoredPrompt, model: nn.Module, structure: ModelStructure) -> Export:
        """Describe a prompt and the model that it is on."""
        can_generate = getattr(unwrapped(model), "can_generate", None)
        return cls(stored, structure, can_generate is not None and bool(can_generate()))

    @property
    def stacks(self) -> dict[str, dict[str, Any]]:
        """What is known of the model's stacks."""
        return self.stored.stacks


def write(export: Export, folder: Path) -> None:
    """Write a prompt, folded, with its heads, as an adapter of PEFT.

    Raises:
        UnsupportedMethodError: PEFT has nothing that computes the same.
    """
    write_parts(adapter(export), folder)


def adapter(export: Export) -> Parts:
    """Make PEFT's config and tensors of a prompt.

    Raises:
        UnsupportedMethodError: PEFT has nothing that computes the same.
    """
    stored = export.stored
    task = _task(export)
    if stored.added_ids:
        raise _refusal(export, f"rows of {len(stored.added_ids)} added tokens", "a prompt and heads")
    how = _WRITERS.get(stored.kind)
    if how is None:
        raise _refusal(export, f"method {stored.kind!r}", f"one of {', '.join(sorted(_WRITERS))}")
    if BUFFER in stored.conventions:
        raise _refusal(export, "an id behind each virtual token", "a model that looks at embeddings alone")
    config, tensors = how(export)
    heads = {f"base_model.{path}.{name}": value for path, head in stored.heads.items() for name, value in head.items()}
    described = {
        "auto_mapping": None,
        "base_model_name_or_path": stored.base.name_or_path or None,
        "inference_mode": True,
        "revision": stored.base.revision,
        "task_type": task,
        **({} if config["peft_type"] == peft_llama_adapter.KIND else {"modules_to_save": list(stored.heads) or None}),
        **config,
    }
    return described, tensors | heads


def write_parts(parts: Parts, folder: Path) -> None:
    """Write an adapter's config and tensors."""
    config, tensors = parts
    write_tensors(folder / TENSORS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, config)


# --- the kinds of adapters --------------------------------------------------------------------------------------------


def _shape(export: Export, width: int) -> dict[str, Any]:
    """What every prompt of PEFT says of itself and of its base; PEFT fills in what is None."""
    runs = next(iter(export.stacks.values()), {}).get("self") or []
    return {
        "num_virtual_tokens": export.stored.options["num_virtual_tokens"],
        "token_dim": width,
        "num_layers": sum(run[0] for run in runs) or None,
        "num_attention_heads": runs[0][1] if runs else None,
        "num_transformer_submodules": 1,
    }


def _front_rows(export: Export) -> Tensor:
    """The rows of a prompt that stands at the front, [P, H].

    Raises:
        UnsupportedMethodError: it stands elsewhere, or in an encoder of which PEFT would pool a virtual token.
    """
    place = export.stored.conventions["placement"]
    if place != "front":
        raise _refusal(export, f"placement {place!r}", "placement 'front'")
    _require_unpooled(export, "a prompt")
    return export.stored.tables[EMBEDDINGS]


def _require_unpooled(export: Export, what: str) -> None:
    text = export.stacks.get("text")
    if text is not None and not text.get("causal") and _task(export) != "TOKEN_CLS":
        raise _refusal(
            export,
            f"{what} in an encoder that classifies its first position, in PEFT a virtual token's",
            "a decoder, an encoder-decoder, or an encoder that classifies tokens",
        )


def _prompt(export: Export) -> Parts:
    """Write rows; those of P-tuning too, for its network is folded and PEFT would make another."""
    rows = _front_rows(export)
    return {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", **_shape(export, rows.shape[1])}, {
        _TABLE: rows
    }


def _context(export: Export) -> Parts:
    """Write a context: its rows, and what PEFT would train them by."""
    rows, options = _front_rows(export), export.stored.options
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
    return {"peft_type": "CPT", **_shape(export, rows.shape[1]), **config}, {_TABLE: rows}


def _prefix(export: Export) -> Parts:
    stored = export.stored
    if list(export.stacks) != ["text"]:
        raise _refusal(export, "prefixes in an encoder and its decoder", "a prefix in a decoder, or in BERT or RoBERTa")
    text = export.stacks["text"]
    if not text.get("causal") and not stored.base.class_name.startswith(_PREFIXED_ENCODERS):
        raise _refusal(
            export, f"a prefix in an encoder, {stored.base.class_name or 'of an unknown kind'}", "BERT, RoBERTa"
        )
    runs = text.get("self") or []
    shapes = {tuple(run[1:]) for run in runs}
    if len(shapes) != 1 or any(key != value for _, key, value in shapes):
        raise _refusal(export, f"layers of shapes {sorted(shapes)}", "one shape for all keys and values")
    (heads, size, _), layers, table = shapes.pop(), sum(run[0] for run in runs), stored.tables["text"]
    if table.shape[1] != 2 * layers * heads * size:
        raise _refusal(export, "a prefix in some of the layers", "a prefix in every layer")
    windows_matter = bool(text.get("causal")) and stored.base.sliding_window is not False
    kept = {"shift_positions": True} | ({"windowed": True} if windows_matter else {})
    differing = {key: value for key, value in stored.conventions.items() if key in kept and value != kept[key]}
    if differing:
        where = "in a decoder" if text.get("causal") else "in an encoder"
        raise _refusal(export, f"{differing} {where}", {key: kept[key] for key in differing})
    shape = _shape(export, heads * size)
    return {"peft_type": "PREFIX_TUNING", "prefix_projection": False, **shape}, {_TABLE: table}


def _cartridge(export: Export) -> Parts:
    config, tensors = _prefix(export)
    del config["prefix_projection"]
    return config | {"peft_type": "CARTRIDGE", "num_frozen_tokens": export.stored.options["frozen_slots"]}, tensors


def _multitask(export: Export) -> Parts:
    """Several tasks. PEFT's initialization must read nothing; one task is a plain prompt, which needs no task ids."""
    tables = export.stored.tables
    if EMBEDDINGS in tables:
        return _prompt(export)
    if "text" not in export.stacks:
        raise _refusal(export, "several tasks in an encoder whose decoder PEFT prompts too", "a decoder, or one task")
    _require_unpooled(export, "several tasks")
    length, width = tables["shared"].shape
    left, right = tables["left"].unflatten(0, (-1, length)), tables["right"].unflatten(0, (-1, width)).mT
    config = {"num_tasks": left.shape[0], "num_ranks": left.shape[2], "prompt_tuning_init": "RANDOM"}
    tensors = {_TABLE: tables["shared"], "prefix_task_cols": left, "prefix_task_rows": right}
    return {"peft_type": "MULTITASK_PROMPT_TUNING", **config, **_shape(export, width)}, tensors


def _llama_adapter(export: Export) -> Parts:
    found = peft_llama_adapter.obstacle(export.stored, export.structure)
    if found is not None:
        raise _refusal(export, *found)
    return peft_llama_adapter.parts(export.stored)


_WRITERS: dict[str, Callable[[Export], Parts]] = {
    "prompt_tuning": _prompt,
    "p_tuning": _prompt,
    "context_aware_prompt_tuning": _context,
    "prefix_tuning": _prefix,
    "p_tuning_v2": _prefix,
    "residual_prompt_tuning": _prompt,
    "context_tuning": _prefix,
    "cartridge": _cartridge,
    "multitask_prompt_tuning": _multitask,
    "llama_adapter": _llama_adapter,
}


# --- checks -----------------------------------------------------------------------------------------------------------


def _task(export: Export) -> str:
    """The task type by which PEFT chooses its wrapper."""
    name, is_encoder_decoder = export.stored.base.class_name, len(export.stacks) == 2
    for ending, task in _TASKS.items():
        if name.endswith(ending) and not is_encoder_decoder:
            return task
    if _generates(name) if export.generates is None else export.generates:
        return "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM"
    if not name and export.stored.base.task in _WITHOUT_CLASS:
        return export.stored.base.task
    raise _refusal(export, name or "an unknown model", "a language model, or a sequence or token classifier")


def _generates(name: str) -> bool:
    """Whether a class of transformers is a language model that generates."""
    import transformers

    found = getattr(transformers, name, None) if name.isidentifier() and not name.startswith("_") else None
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.can_generate()


def _refusal(export: Export, found: object, possible: object) -> UnsupportedMethodError:
    return UnsupportedMethodError(
        "a prompt can be written for PEFT only where PEFT computes the same.",
        "Save it with `save_pretrained(directory)`, and load it with softhooks.",
        prompt=export.stored.source,
        found=found,
        possible=possible,
    )
