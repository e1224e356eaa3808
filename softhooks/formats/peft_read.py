"""Read prompts that PEFT wrote: `adapter_config.json` and `adapter_model.safetensors`.

Source: the format of PEFT 0.21. Its prefixes and cartridges are stored as ours, `(P, layers, key and value, heads, head size)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from softhooks.base_model.info import BaseModelInfo
from softhooks.encoder import EMBEDDINGS
from softhooks.errors import CheckpointError
from softhooks.formats import peft_llama_adapter
from softhooks.formats.files import read_json, read_tensors
from softhooks.formats.stored import StoredPrompt

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_TABLE = "prompt_embeddings"
_BASE = "base_model."
_ROWS = {"PROMPT_TUNING": "prompt_tuning", "P_TUNING": "p_tuning", "CPT": "context_aware_prompt_tuning"}
_TASKS = "MULTITASK_PROMPT_TUNING"
_READ = (*_ROWS, "PREFIX_TUNING", "CARTRIDGE", peft_llama_adapter.KIND, _TASKS)


def read(folder: Path) -> StoredPrompt:
    """Read a checkpoint of PEFT: a prompt of one of its methods, a prefix, a LLaMA-Adapter, or a cartridge.

    Raises:
        CheckpointError: another kind of adapter, a pickle, or tensors that do not fit their config.
    """
    config = read_json(folder / CONFIG)
    require_kind(config, folder / CONFIG)
    path = folder / TENSORS
    if not path.is_file() and (folder / _PICKLE).is_file():
        raise CheckpointError(
            f"{folder / _PICKLE} is a pickle, and those are never read. Save it with safetensors in PEFT."
        )
    return parse(config, read_tensors(path)[0], str(path))


def require_kind(config: dict[str, Any], source: object) -> None:
    """Check that an adapter is of a kind that has an equal here.

    Raises:
        CheckpointError: naming the kind.
    """
    kind = config.get("peft_type")
    if kind not in _READ:
        raise CheckpointError(
            "of PEFT's adapters, those of prompts, prefixes, LLaMA-Adapter and cartridges can be loaded.",
            "Load other adapters with PEFT; a prompt of softhooks can stand on top of them.",
            file=source,
            expected=f"peft_type {', '.join(_READ)}",
            found=f"peft_type {kind!r}",
        )


def parse(config: dict[str, Any], tensors: dict[str, Tensor], path: str) -> StoredPrompt:
    """Make a prompt of the config and the tensors of an adapter, wherever they come from.

    Args:
        config: as JSON holds it.
        tensors: as PEFT saves them; those that are taken are removed.
        path: what to call them in errors.

    Raises:
        CheckpointError: tensors that do not fit their config, or another kind of adapter.
    """
    require_kind(config, path)
    stored = _parse(config, tensors, path)
    stored.base = BaseModelInfo.from_json({"task": "", **_base_facts(config)}, path)
    stored.require_finite()
    return stored


def _base_facts(config: dict[str, Any]) -> dict[str, Any]:
    """What the config says of the base model, without what it leaves open."""
    names = {"name_or_path": "base_model_name_or_path", "task": "task_type", "revision": "revision"}
    return {name: config[key] for name, key in names.items() if isinstance(config.get(key), str)}


def _parse(config: dict[str, Any], tensors: dict[str, Tensor], path: str) -> StoredPrompt:
    kind = config["peft_type"]
    if kind == peft_llama_adapter.KIND:
        return peft_llama_adapter.read(tensors, path)
    table = tensors.pop(_TABLE, None)
    count = config.get("num_virtual_tokens")
    is_count = isinstance(count, int) and not isinstance(count, bool) and count > 0
    stacks = _tables_of_rows(config) if kind in (*_ROWS, _TASKS) else 1
    if table is None or not is_count or table.dim() != 2 or table.shape[0] != count * stacks:  # type: ignore[operator]
        raise CheckpointError(
            "a prompt of PEFT must hold one row a virtual token, in an encoder-decoder two.",
            "Save the adapter again with PEFT.",
            file=path,
            prompt_embeddings="absent" if table is None else list(table.shape),
            num_virtual_tokens=repr(count),
            task_type=config.get("task_type"),
        )
    if kind in _ROWS:
        return _prompt(_ROWS[kind], _options(config), {EMBEDDINGS: table[:count]}, config, _heads(tensors, path), path)
    if kind == _TASKS:
        options, tables = _multitask(table, tensors, config, path)
        return _prompt("multitask_prompt_tuning", options, tables, config, _heads(tensors, path), path)
    return _prefix(table, config, _heads(tensors, path), path)


def _tables_of_rows(config: dict[str, Any]) -> int:
    """How often P rows are there: in an encoder-decoder twice, unless it says once; the encoder's come first."""
    if config.get("task_type") != "SEQ_2_SEQ_LM":
        return 1
    return 1 if config.get("num_transformer_submodules") == 1 else 2


def _prompt(
    kind: str,
    options: dict[str, Any],
    tables: dict[str, Tensor],
    config: dict[str, Any],
    heads: dict[str, dict[str, Tensor]],
    source: str,
) -> StoredPrompt:
    """Take a prompt of the encoder; PEFT's decoder has one too, which generation never uses. P-tuning's is folded."""
    task = config.get("task_type")
    stacks: dict[str, dict[str, Any]] = {"text": {}}
    if task == "SEQ_2_SEQ_LM":
        stacks = {"encoder": {"causal": False}, "decoder": {"causal": True}}
    elif task in ("CAUSAL_LM", "SEQ_CLS"):
        stacks["text"]["causal"] = True
    return StoredPrompt(kind, options, tables, heads, {"placement": "front"}, source, stacks)


def _multitask(
    table: Tensor, tensors: dict[str, Tensor], config: dict[str, Any], source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take P*, and each task's u and v, of the encoder; one task is folded."""
    left, right = tensors.pop("prefix_task_cols", None), tensors.pop("prefix_task_rows", None)
    tasks, rank, count = (config.get(key) for key in ("num_tasks", "num_ranks", "num_virtual_tokens"))
    shapes = [None if part is None else list(part.shape) for part in (left, right)]
    expected = [[tasks, table.shape[0], rank], [tasks, rank, table.shape[1]]]
    if (
        left is None
        or right is None
        or shapes != expected
        or not all(part.is_floating_point() for part in (table, left, right))
    ):
        raise CheckpointError(
            "a multitask prompt of PEFT must hold a row's and a column's vector for each task.",
            "Save the adapter again with PEFT.",
            file=source,
            found=dict(zip(("prefix_task_cols", "prefix_task_rows"), shapes, strict=True)),
            expected=expected,
        )
    options = {"num_virtual_tokens": count, "tasks": tasks, "rank": rank}
    shared, left, right = table[:count].float(), left[:, :count].float(), right.mT.float()
    if tasks == 1:  # summed by hand, as in training: a matrix product may be computed in fewer bits
        return options, {EMBEDDINGS: shared * (left[0][:, None, :] * right[0][None, :, :]).sum(-1)}
    return options, {"shared": shared, "left": left.flatten(0, 1), "right": right.flatten(0, 1)}


def _prefix(table: Tensor, config: dict[str, Any], heads: dict[str, dict[str, Tensor]], source: str) -> StoredPrompt:
    """Take a prefix, whose MLP PEFT has folded already, or a cartridge, whose document is not in PEFT's files."""
    if config.get("task_type") == "SEQ_2_SEQ_LM":
        raise CheckpointError(
            f"{source}: a prefix of PEFT for an encoder-decoder shares one table between layers and leaves the encoder out; it "
            "has no equal here. Train a prefix with softhooks."
        )
    layers, numbers, count = (config.get(key) for key in ("num_layers", "token_dim", "num_attention_heads"))
    sizes = [value for value in (layers, numbers, count) if isinstance(value, int) and value > 0]
    if len(sizes) < 3 or sizes[1] % sizes[2] or table.shape[1] != 2 * sizes[0] * sizes[1]:
        raise CheckpointError(
            "a prefix of PEFT must hold a key and a value for each layer.",
            "Save the adapter again with PEFT.",
            file=source,
            prompt_embeddings=list(table.shape),
            num_layers=repr(layers),
            token_dim=repr(numbers),
            num_attention_heads=repr(count),
        )
    size = sizes[1] // sizes[2]
    stacks: dict[str, dict[str, Any]] = {"text": {"self": [[sizes[0], sizes[2], size, size]]}}
    if config.get("task_type") == "CAUSAL_LM":
        stacks["text"]["causal"] = True
    kind, options = "prefix_tuning", {"num_virtual_tokens": config["num_virtual_tokens"]}
    if config["peft_type"] == "CARTRIDGE":
        kind, options = "cartridge", options | {"frozen_slots": config.get("num_frozen_tokens"), "distill": False}
    conventions = {"shift_positions": True, "windowed": True}
    return StoredPrompt(kind, options, {"text": table}, heads, conventions, source, stacks)


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """The options of a method. PEFT has a context's loss whatever its types say; where they name no label, there is none."""
    count = {"num_virtual_tokens": config["num_virtual_tokens"]}
    if config["peft_type"] != "CPT":
        return count
    types = config.get("cpt_tokens_type_mask")
    decays = config.get("opt_weighted_loss_type") == "decay"
    return count | {
        "context_ids": config.get("cpt_token_ids"),
        "token_types": types,
        "epsilon_input": config.get("opt_projection_epsilon"),
        "epsilon_format": config.get("opt_projection_format_epsilon"),
        "decay": config.get("opt_loss_decay_factor") if decays else 1.0,
        "context_loss": isinstance(types, list) and any(kind and kind % 4 == 0 for kind in types),
    }


def _heads(tensors: dict[str, Tensor], path: str) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors beside the prompt into heads: `base_model.score.weight` is `weight` of `score`."""
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(_BASE).split(".")
        if not name.startswith(_BASE) or len(parts) < 2:
            raise CheckpointError(f"{path} must hold a prompt and heads only; it holds {name!r}.")
        heads.setdefault(parts[0], {})[".".join(parts[1:])] = tensor
    return heads
