"""Read prompts that PEFT wrote: `adapter_config.json` and `adapter_model.safetensors`.

Source: the format of PEFT 0.21. Its prefix is stored as we store ours, `(P, layers, key and value, heads, head size)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from softhooks.errors import CheckpointError, OptionError, explain
from softhooks.files import read_json, read_tensors
from softhooks.method import EMBEDDINGS
from softhooks.methods import PrefixTuning, PromptTuning
from softhooks.stored import Stored

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_TABLE = "prompt_embeddings"
_BASE = "base_model."
_READ = ("PROMPT_TUNING", "PREFIX_TUNING")


def read(folder: Path) -> Stored:
    """Read a prompt-tuning or prefix-tuning checkpoint of PEFT.

    Raises:
        CheckpointError: another kind of adapter, a pickle, or tensors that do not fit their config.
    """
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    if kind not in _READ:
        raise CheckpointError(
            explain(
                "of PEFT's adapters, those of prompt tuning and prefix tuning can be loaded.",
                "Load other adapters with PEFT; a prompt of softhooks can stand on top of them.",
                file=folder / CONFIG,
                expected=f"peft_type {' or '.join(_READ)}",
                found=f"peft_type {kind!r}",
            )
        )
    path = folder / TENSORS
    if not path.is_file() and (folder / _PICKLE).is_file():
        raise CheckpointError(
            f"{folder / _PICKLE} is a pickle, and those are never read. Save it with safetensors in PEFT."
        )
    tensors, _ = read_tensors(path)
    table = tensors.pop(_TABLE, None)
    count = config.get("num_virtual_tokens")
    is_count = isinstance(count, int) and not isinstance(count, bool) and count > 0
    stacks = 2 if config.get("task_type") == "SEQ_2_SEQ_LM" and kind == "PROMPT_TUNING" else 1
    if table is None or not is_count or table.dim() != 2 or table.shape[0] != count * stacks:  # type: ignore[operator]
        raise CheckpointError(
            explain(
                "a prompt of PEFT must hold one row a virtual token, in an encoder-decoder two.",
                "Save the adapter again with PEFT.",
                file=path,
                prompt_embeddings="absent" if table is None else list(table.shape),
                num_virtual_tokens=repr(count),
                task_type=config.get("task_type"),
            )
        )
    return (_prompt if kind == "PROMPT_TUNING" else _prefix)(table, config, _heads(tensors, path), str(path))


def _prompt(table: Tensor, config: dict[str, Any], heads: dict[str, dict[str, Tensor]], source: str) -> Stored:
    """Take a prompt; in an encoder-decoder PEFT stores two, and its forward uses the encoder's alone."""
    task, count = config.get("task_type"), config["num_virtual_tokens"]
    stacks: dict[str, dict[str, Any]] = {"encoder": {}, "decoder": {}} if task == "SEQ_2_SEQ_LM" else {"text": {}}
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
    return Stored(
        _checked(PromptTuning, count, source), {EMBEDDINGS: table[:count]}, heads, conventions, source, stacks, remedy
    )


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
            explain(
                "a prefix of PEFT must hold a key and a value for each layer.",
                "Save the adapter again with PEFT.",
                file=source,
                prompt_embeddings=list(table.shape),
                num_layers=repr(layers),
                token_dim=repr(numbers),
                num_attention_heads=repr(count),
            )
        )
    size = sizes[1] // sizes[2]
    stacks: dict[str, dict[str, Any]] = {"text": {"self": [[sizes[0], sizes[2], size, size]]}}
    if config.get("task_type") == "CAUSAL_LM":
        stacks["text"]["causal"] = True
    conventions = {"shift_positions": True, "windowed": True}
    method = _checked(PrefixTuning, config["num_virtual_tokens"], source)
    return Stored(method, {"text": table}, heads, conventions, source, stacks)


def _checked(cls: type[PromptTuning] | type[PrefixTuning], count: int, source: str) -> PromptTuning | PrefixTuning:
    try:
        return cls(count)
    except OptionError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _heads(tensors: dict[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors beside the prompt into heads: `base_model.score.weight` is `weight` of `score`."""
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(_BASE).split(".")
        if not name.startswith(_BASE) or len(parts) < 2:
            raise CheckpointError(f"{path} must hold a prompt and heads only; it holds {name!r}.")
        heads.setdefault(parts[0], {})[".".join(parts[1:])] = tensor
    return heads
