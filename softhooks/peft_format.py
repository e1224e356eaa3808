"""Read prompts that PEFT wrote: `adapter_config.json` and `adapter_model.safetensors`.

Source: the format of PEFT 0.21. Its prefix is stored as we store ours, `(P, layers, key and value, heads, head size)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from softhooks.checkpoint import Stored
from softhooks.errors import CheckpointError, OptionError, explain
from softhooks.files import read_json, read_tensors
from softhooks.method import EMBEDDINGS
from softhooks.methods import PrefixTuning, PromptTuning

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_EMBEDDINGS = "prompt_embeddings"
_BASE = "base_model."


def read(folder: Path) -> Stored:
    """Read a prompt-tuning or prefix-tuning checkpoint of PEFT.

    Raises:
        CheckpointError: another kind of adapter, a pickle, or tensors that do not fit their config.
    """
    config = read_json(folder / CONFIG)
    path = folder / TENSORS
    if not path.is_file() and (folder / _PICKLE).is_file():
        raise CheckpointError(
            f"{folder / _PICKLE} is a pickle, and those are never read. Save it with safetensors in PEFT."
        )
    tensors, _ = read_tensors(path)
    table = tensors.pop(_EMBEDDINGS, None)
    count = config.get("num_virtual_tokens")
    if table is None or table.dim() != 2 or not isinstance(count, int) or count < 1 or table.shape[0] % count:
        raise CheckpointError(
            explain(
                "a prompt of PEFT must hold one row a virtual token.",
                "Check that the adapter is one of prompt tuning or prefix tuning.",
                file=path,
                prompt_embeddings="absent" if table is None else list(table.shape),
                num_virtual_tokens=repr(count),
            )
        )
    heads = _heads(tensors, path)
    kind = config.get("peft_type")
    if kind == "PROMPT_TUNING":
        # In an encoder-decoder PEFT stores two prompts, and its forward uses the encoder's alone.
        return _stored(PromptTuning, count, {EMBEDDINGS: table[:count]}, heads, {"placement": "front"}, path, config)
    if kind == "PREFIX_TUNING":
        if config.get("task_type") == "SEQ_2_SEQ_LM" or table.shape[0] != count:
            raise CheckpointError(
                f"{path}: a prefix of PEFT for an encoder-decoder shares one table between layers and leaves the encoder out; "
                "it has no equal here. Train a prefix with softhooks."
            )
        conventions = {"shift_positions": True, "windowed": True}
        return _stored(PrefixTuning, count, {"text": table}, heads, conventions, path, config)
    raise CheckpointError(
        f"{folder / CONFIG} must be of peft_type PROMPT_TUNING or PREFIX_TUNING to be loaded here; it is {kind!r}."
    )


def _stored(
    cls: type[PromptTuning] | type[PrefixTuning],
    count: int,
    tables: dict[str, Tensor],
    heads: dict[str, dict[str, Tensor]],
    conventions: dict[str, Any],
    path: Path,
    config: dict[str, Any],
) -> Stored:
    try:
        method = cls(count)
    except OptionError as error:
        raise CheckpointError(f"{path}: {error}") from error
    base = {"name_or_path": str(config.get("base_model_name_or_path") or "")}
    return Stored(method, tables, heads, conventions, str(path), base)


def _heads(tensors: dict[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors beside the prompt into heads: `base_model.score.weight` is `weight` of `score`."""
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(_BASE).split(".")
        if not name.startswith(_BASE) or len(parts) < 2:
            raise CheckpointError(f"{path} must hold a prompt and heads only; it holds {name!r}.")
        heads.setdefault(parts[0], {})[".".join(parts[1:])] = tensor
    return heads
