"""Read prompts in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Source: the PEFT 0.21 format. Its prefixes and cartridges have the same layout as those of softhooks: `(P, layers, key and value,
heads, head size)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from softhooks.base_model.info import BaseModelInfo
from softhooks.errors import CheckpointError
from softhooks.formats import peft_llama_adapter
from softhooks.formats.files import read_json, read_tensors
from softhooks.formats.stored import StoredPrompt
from softhooks.prompt_encoder import EMBEDDINGS

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
TABLE = "prompt_embeddings"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model."
_ROW_KINDS = {"PROMPT_TUNING": "prompt_tuning", "P_TUNING": "p_tuning", "CPT": "context_aware_prompt_tuning"}
_MULTITASK = "MULTITASK_PROMPT_TUNING"
KINDS = (*_ROW_KINDS, "PREFIX_TUNING", "CARTRIDGE", peft_llama_adapter.KIND, _MULTITASK)
_AGAIN = "Save the adapter again with PEFT."


def read(folder: Path) -> StoredPrompt:
    """Read a PEFT adapter; raise a `CheckpointError` if it is not a supported prompt or is inconsistent."""
    config = read_json(folder / CONFIG)
    require_kind(config, folder / CONFIG)
    path = folder / TENSORS
    if not path.is_file() and (folder / _PICKLE).is_file():
        raise CheckpointError(
            f"{folder / _PICKLE} is a pickle; pickles are not loaded, because they can run code.",
            "Save the adapter as safetensors with PEFT.",
        )
    return parse(config, read_tensors(path)[0], str(path))


def require_kind(config: dict[str, Any], source: object) -> None:
    """Raise a `CheckpointError` if an adapter is not a prompt that softhooks supports."""
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise CheckpointError(
            f"the PEFT adapter has peft_type {kind!r} and cannot be loaded as a prompt.",
            "Load the adapter with PEFT; softhooks can attach a prompt to the resulting model.",
            file=source,
            supported=", ".join(KINDS),
        )


def parse(config: dict[str, Any], tensors: dict[str, Tensor], source: str) -> StoredPrompt:
    """Read a prompt from the config and the tensors of an adapter, which come from files or from a live PEFT model.

    Args:
        config: the config of the adapter, as JSON values.
        tensors: the tensors that PEFT saves; tensors of the prompt are removed from the dictionary.
        source: the name of the adapter in errors.
    """
    require_kind(config, source)
    if config["peft_type"] == peft_llama_adapter.KIND:
        stored = peft_llama_adapter.read(tensors, source)
    else:
        stored = _read_table(config, tensors, source)
    names = {"name_or_path": "base_model_name_or_path", "task": "task_type", "revision": "revision"}
    known = {name: config[key] for name, key in names.items() if isinstance(config.get(key), str)}
    stored.base = BaseModelInfo.from_json({"task": "", **known}, source)
    stored.require_finite()
    return stored


def _read_table(config: dict[str, Any], tensors: dict[str, Tensor], source: str) -> StoredPrompt:
    kind, table, count = config["peft_type"], tensors.pop(TABLE, None), config.get("num_virtual_tokens")
    is_count = isinstance(count, int) and not isinstance(count, bool) and count > 0
    copies = _copies(config) if kind in (*_ROW_KINDS, _MULTITASK) else 1
    if table is None or not is_count or table.dim() != 2 or table.shape[0] != count * copies:  # type: ignore[operator]
        raise CheckpointError(
            f"`{TABLE}` of the adapter does not have {'two rows' if copies == 2 else 'one row'} for each virtual token.",
            _AGAIN,
            file=source,
            prompt_embeddings="absent" if table is None else list(table.shape),
            num_virtual_tokens=repr(count),
            task_type=config.get("task_type"),
        )
    if kind in _ROW_KINDS:
        options, tables = _options(config), {EMBEDDINGS: table[:count]}
    elif kind == _MULTITASK:
        options, tables = _multitask(table, tensors, config, source)
    else:
        return _prefix(table, config, tensors, source)
    task = config.get("task_type")
    stacks: dict[str, dict[str, Any]] = {"text": {"causal": True} if task in ("CAUSAL_LM", "SEQ_CLS") else {}}
    if task == "SEQ_2_SEQ_LM":
        stacks = {"encoder": {"causal": False}, "decoder": {"causal": True}}
    method = _ROW_KINDS.get(kind, "multitask_prompt_tuning")
    return StoredPrompt(method, options, tables, _heads(tensors, source), {"placement": "front"}, source, stacks)


def _copies(config: dict[str, Any]) -> int:
    """Return how many times the embeddings are stored: twice if the encoder and the decoder have a copy each (in this order)."""
    return 2 if config.get("task_type") == "SEQ_2_SEQ_LM" and config.get("num_transformer_submodules") != 1 else 1


def _multitask(
    table: Tensor, tensors: dict[str, Tensor], config: dict[str, Any], source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the options and tensors of a multitask prompt; those of a single task are combined into embeddings."""
    left, right = tensors.pop("prefix_task_cols", None), tensors.pop("prefix_task_rows", None)
    tasks, rank, count = config.get("num_tasks"), config.get("num_ranks"), config["num_virtual_tokens"]
    shapes = [None if part is None else list(part.shape) for part in (left, right)]
    expected = [[tasks, table.shape[0], rank], [tasks, rank, table.shape[1]]]
    are_floats = all(part is None or part.is_floating_point() for part in (table, left, right))
    if left is None or right is None or shapes != expected or not are_floats:
        raise CheckpointError(
            "the multitask prompt does not have the row and column vectors of each task.",
            _AGAIN,
            file=source,
            found={"prefix_task_cols": shapes[0], "prefix_task_rows": shapes[1]},
            expected=expected,
        )
    options = {"num_virtual_tokens": count, "tasks": tasks, "rank": rank}
    shared, left, right = table[:count].float(), left[:, :count].float(), right.mT.float()
    if tasks == 1:  # an explicit sum, as in training: a matrix product may use lower precision
        return options, {EMBEDDINGS: shared * (left[0][:, None, :] * right[0][None, :, :]).sum(-1)}
    return options, {"shared": shared, "left": left.flatten(0, 1), "right": right.flatten(0, 1)}


def _prefix(table: Tensor, config: dict[str, Any], others: dict[str, Tensor], source: str) -> StoredPrompt:
    """Read a prefix, which PEFT saves without its MLP, or a cartridge, which PEFT saves without the document that it replaces."""
    task = config.get("task_type")
    if task == "SEQ_2_SEQ_LM":
        raise CheckpointError(
            f"{source} is a prefix that PEFT adds only to the decoder of an encoder-decoder; softhooks cannot load it.",
            "Train a prefix with softhooks.",
        )
    layers, width, heads = (config.get(key) for key in ("num_layers", "token_dim", "num_attention_heads"))
    sizes = [value for value in (layers, width, heads) if isinstance(value, int) and value > 0]
    if len(sizes) < 3 or sizes[1] % sizes[2] or table.shape[1] != 2 * sizes[0] * sizes[1]:
        raise CheckpointError(
            "the prefix does not contain a key and a value for each layer.",
            _AGAIN,
            file=source,
            prompt_embeddings=list(table.shape),
            num_layers=repr(layers),
            token_dim=repr(width),
            num_attention_heads=repr(heads),
        )
    size = sizes[1] // sizes[2]
    stacks: dict[str, dict[str, Any]] = {"text": {"self": [[sizes[0], sizes[2], size, size]]}}
    if task == "CAUSAL_LM":
        stacks["text"]["causal"] = True
    kind, options = "prefix_tuning", {"num_virtual_tokens": config["num_virtual_tokens"]}
    if config["peft_type"] == "CARTRIDGE":
        kind, options = "cartridge", options | {"frozen_slots": config.get("num_frozen_tokens"), "distill": False}
    conventions = {"shift_positions": True, "windowed": True}
    return StoredPrompt(kind, options, {"text": table}, _heads(others, source), conventions, source, stacks)


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the method."""
    options = {"num_virtual_tokens": config["num_virtual_tokens"]}
    if config["peft_type"] != "CPT":
        return options
    types = config.get("cpt_tokens_type_mask")
    has_decay = config.get("opt_weighted_loss_type") == "decay"
    return options | {
        "context_ids": config.get("cpt_token_ids"),
        "token_types": types,
        "epsilon_input": config.get("opt_projection_epsilon"),
        "epsilon_format": config.get("opt_projection_format_epsilon"),
        "decay": config.get("opt_loss_decay_factor") if has_decay else 1.0,
        # PEFT always computes a loss on the context if its token types mark labels (4, 8, ...).
        "context_loss": isinstance(types, list)
        and any(type(kind) is int and kind > 0 and kind % 4 == 0 for kind in types),
    }


def _heads(tensors: dict[str, Tensor], source: str) -> dict[str, dict[str, Tensor]]:
    """Group the remaining tensors by head: `base_model.score.weight` is the `weight` of the head `score`."""
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(_PREFIX).split(".")
        if not name.startswith(_PREFIX) or len(parts) < 2:
            raise CheckpointError(f"{source} contains {name!r}, which is neither a prompt nor a parameter of a head.")
        heads.setdefault(parts[0], {})[".".join(parts[1:])] = tensor
    return heads
