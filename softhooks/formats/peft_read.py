"""Read prompts that PEFT wrote: `adapter_config.json` and `adapter_model.safetensors`.

Source: the format of PEFT 0.21. Its prefixes and cartridges are stored as ours, `(P, layers, key and value, heads, head size)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from softhooks.encoder import EMBEDDINGS
from softhooks.errors import CheckpointError, OptionError
from softhooks.formats import peft_llama_adapter
from softhooks.formats.files import read_json, read_tensors
from softhooks.formats.stored import Stored
from softhooks.method import Method
from softhooks.methods import (
    Cartridge,
    ContextAwarePromptTuning,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
)
from softhooks.methods.mpt_encoder import product

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_TABLE = "prompt_embeddings"
_BASE = "base_model."
_ROWS: dict[str, type[Method]] = {"PROMPT_TUNING": PromptTuning, "P_TUNING": PTuning, "CPT": ContextAwarePromptTuning}
_TASKS = "MULTITASK_PROMPT_TUNING"
_READ = (*_ROWS, "PREFIX_TUNING", "CARTRIDGE", peft_llama_adapter.KIND, _TASKS)


def read(folder: Path) -> Stored:
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


def parse(config: dict[str, Any], tensors: dict[str, Tensor], path: str) -> Stored:
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
    name, task = config.get("base_model_name_or_path"), config.get("task_type")
    stored.base = {"name_or_path": name if isinstance(name, str) else "", "task": task if isinstance(task, str) else ""}
    stored.base["revision"] = config.get("revision")
    return stored


def _parse(config: dict[str, Any], tensors: dict[str, Tensor], path: str) -> Stored:
    kind = config["peft_type"]
    if kind == peft_llama_adapter.KIND:
        return peft_llama_adapter.read(config, tensors, path)
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
        method, tables = _checked(_ROWS[kind], path, **_options(config)), {EMBEDDINGS: table[:count]}
    elif kind == _TASKS:
        method, tables = _multitask(table, tensors, config, path)
    else:
        return _prefix(table, config, _heads(tensors, path), path)
    return _prompt(method, tables, config, _heads(tensors, path), path)


def _tables_of_rows(config: dict[str, Any]) -> int:
    """How often P rows are there: in an encoder-decoder twice, unless it says once; the encoder's come first."""
    if config.get("task_type") != "SEQ_2_SEQ_LM":
        return 1
    return 1 if config.get("num_transformer_submodules") == 1 else 2


def _prompt(
    method: Method, tables: dict[str, Tensor], config: dict[str, Any], heads: dict[str, dict[str, Tensor]], source: str
) -> Stored:
    """Take a prompt of the encoder; PEFT's decoder has one too, which generation never uses. P-tuning's is folded."""
    task = config.get("task_type")
    stacks: dict[str, dict[str, Any]] = {"text": {}}
    if task == "SEQ_2_SEQ_LM":
        stacks = {"encoder": {"causal": False}, "decoder": {"causal": True}}
    remedy = "Load it onto the base model that it was trained with."
    if task == "CAUSAL_LM":
        stacks["text"]["causal"] = True
    if task == "SEQ_CLS":
        stacks["text"]["causal"] = True
        remedy = (
            "In an encoder PEFT classifies the prompt's first virtual token, softhooks the text's own. Train the prompt with "
            "softhooks."
        )
    conventions = {"placement": "front"}
    return Stored(method, tables, heads, conventions, source, stacks, remedy)


def _multitask(
    table: Tensor, tensors: dict[str, Tensor], config: dict[str, Any], source: str
) -> tuple[Method, dict[str, Tensor]]:
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
    shared, left, right = table[:count].float(), left[:, :count].float(), right.mT.float()
    try:
        method = MultitaskPromptTuning(count, tasks=tasks, rank=rank)  # type: ignore[arg-type]
    except OptionError as error:
        raise CheckpointError(f"{source}: {error}") from error
    if tasks == 1:
        return method, {EMBEDDINGS: product(shared, left[0], right[0])}
    return method, {"shared": shared, "left": left.flatten(0, 1), "right": right.flatten(0, 1)}


def _prefix(table: Tensor, config: dict[str, Any], heads: dict[str, dict[str, Tensor]], source: str) -> Stored:
    """Take a prefix, whose MLP PEFT has folded already."""
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
    conventions = {"shift_positions": True, "windowed": True}
    method = _prefix_method(config, source)
    return Stored(method, {"text": table}, heads, conventions, source, stacks)


def _prefix_method(config: dict[str, Any], source: str) -> Method:
    """A prefix, or a cartridge; the document that it was made from is not in PEFT's files."""
    count = config["num_virtual_tokens"]
    if config["peft_type"] == "PREFIX_TUNING":
        return _checked(PrefixTuning, source, num_virtual_tokens=count)
    frozen = config.get("num_frozen_tokens")
    return _checked(Cartridge, source, num_virtual_tokens=count, frozen_slots=frozen, distill=False)


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


def _checked(cls: type[Method], source: str, **options: Any) -> Method:
    try:
        return cls(**options)
    except OptionError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _heads(tensors: dict[str, Tensor], path: str) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors beside the prompt into heads: `base_model.score.weight` is `weight` of `score`."""
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(_BASE).split(".")
        if not name.startswith(_BASE) or len(parts) < 2:
            raise CheckpointError(f"{path} must hold a prompt and heads only; it holds {name!r}.")
        heads.setdefault(parts[0], {})[".".join(parts[1:])] = tensor
    return heads
