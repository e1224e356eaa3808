"""Damaged and malicious saved prompts, which every reader must refuse."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from softhooks import (
    SoftPrompt,
)
from softhooks.formats.softhooks_files import FORMAT, TENSORS


@torch.no_grad()
def stir(prompt: SoftPrompt) -> None:
    """Change every trained parameter."""
    for parameter in prompt.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)


def told(folder: Path) -> dict[str, Any]:
    with safe_open(folder / TENSORS, framework="pt") as file:
        return dict(json.loads(file.metadata()[FORMAT]))


def rewrite(
    folder: Path,
    change: Callable[[dict[str, Any]], None] = lambda _: None,
    tensors: Callable[[dict[str, torch.Tensor]], None] = lambda _: None,
) -> Path:
    """Rewrite a prompt's file with another description and other tensors, consistent in itself."""
    held = load_file(folder / TENSORS)
    tensors(held)
    description = told(folder)
    description["tensors"] = {name: list(tensor.shape) for name, tensor in held.items()}
    change(description)
    save_file(held, folder / TENSORS, metadata={"format": "pt", FORMAT: json.dumps(description)})
    return folder


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one entry of a description; the value `...` removes it."""

    def change(description: dict[str, Any]) -> None:
        place = description
        for key in path[:-1]:
            place = place[key]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value

    return change


DESCRIPTIONS = {
    "version": put("format_version", value=2),
    "no version": put("format_version", value=...),
    "version of another type": put("format_version", value={"1": 1}),
    "method unknown": put("method", value="lora"),
    "method a list": put("method", value=["prefix_tuning"]),
    "method nothing": put("method", value=None),
    "no method": put("method", value=...),
    "another method": put("method", value="prompt_tuning"),
    "options a list": put("options", value=[1, 2]),
    "no options": put("options", value=...),
    "option unknown": put("options", "sparsity", value=0.5),
    "length a word": put("options", "num_virtual_tokens", value="3"),
    "length a fraction": put("options", "num_virtual_tokens", value=3.0),
    "length true": put("options", "num_virtual_tokens", value=True),
    "length negative": put("options", "num_virtual_tokens", value=-3),
    "length zero": put("options", "num_virtual_tokens", value=0),
    "length huge": put("options", "num_virtual_tokens", value=10**30),
    "length another": put("options", "num_virtual_tokens", value=4),
    "no length": put("options", "num_virtual_tokens", value=...),
    "dropout a word": put("options", "dropout", value="0.1"),
    "dropout negative": put("options", "dropout", value=-1.0),
    "dropout not a number": put("options", "dropout", value=float("nan")),
    "dropout infinite": put("options", "dropout", value=float("inf")),
    "projection a number": put("options", "projection", value=1),
    "hidden size negative": put("options", "hidden_size", value=-5),
    "hidden size nested": put("options", "hidden_size", value=[[5]]),
    "no conventions": put("conventions", value=...),
    "conventions a list": put("conventions", value=["windowed"]),
    "a convention lacks": put("conventions", "windowed", value=...),
    "a convention unknown": put("conventions", "rotated", value=True),
    "a convention of another method": put("conventions", "placement", value="front"),
    "a convention of another type": put("conventions", "shift_positions", value="no"),
    "a convention nested": put("conventions", "shift_positions", value=[True]),
    "tensors of another shape": put("tensors", "prompt.text", value=[3, 7]),
    "tensors unnamed": put("tensors", value=...),
    "tensors a number": put("tensors", value=3),
    "also trained a word": put("also_trained", value="everything"),
    "also trained a number": put("also_trained", value=7),
    "no base": put("base", value=...),
    "base a word": put("base", value="bert"),
    "base without stacks": put("base", "stacks", value=...),
    "stacks a list": put("base", "stacks", value=["text"]),
    "stacks empty": put("base", "stacks", value={}),
    "stacks nested wrongly": put("base", "stacks", "text", value=[1]),
    "a stack without direction": put("base", "stacks", "text", "causal", value=...),
    "a stack of another role": put("base", "stacks", "text", "crossed", value=[]),
    "another number of layers": put("base", "stacks", "text", "self", value=[[3, 4, 8, 8]]),
    "other heads": put("base", "stacks", "text", "self", value=[[2, 2, 16, 16]]),
    "another direction": put("base", "stacks", "text", "causal", value=True),
}


def _rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def _shape(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(*shape, dtype=dtype)})


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _value(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors[name].view(-1).__setitem__(0, value)


TENSOR_CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "none at all": lambda tensors: tensors.clear(),
    "no prompt": _without("prompt.text"),
    "a path out": _rename("head.classifier:weight", "head.../../etc/passwd:weight"),
    "an absolute path": _rename("head.classifier:weight", "head./etc/passwd:weight"),
    "a parameter's path out": _rename("head.classifier:weight", "head.classifier:../../weight"),
    "a foreign tensor": _shape("model.embed_tokens.weight", 3, 3),
    "no name": _rename("prompt.text", ""),
    "no group": _rename("prompt.text", "prompt."),
    "a dotted group": _rename("prompt.text", "prompt.text.more"),
    "a group that is an attribute": _rename("prompt.text", "prompt.forward"),
    "a group that is a list": _rename("prompt.text", "prompt.groups"),
    "a dunder group": _rename("prompt.text", "prompt.__class__"),
    "a group that the model lacks": _rename("prompt.text", "prompt.encoder"),
    "a group too many": _shape("prompt.decoder", 3, 128),
    "the other method's group": _rename("prompt.text", "prompt.embeddings"),
    "another width": _shape("prompt.text", 3, 127),
    "no width": _shape("prompt.text", 3, 0),
    "another length": _shape("prompt.text", 4, 128),
    "no length": _shape("prompt.text", 0, 128),
    "one dimension": _shape("prompt.text", 128),
    "three dimensions": _shape("prompt.text", 3, 2, 64),
    "integers": _shape("prompt.text", 3, 128, dtype=torch.int64),
    "truth values": _shape("prompt.text", 3, 128, dtype=torch.bool),
    "complex": _shape("prompt.text", 3, 128, dtype=torch.complex64),
    "eight bits": _shape("prompt.text", 3, 128, dtype=torch.float8_e4m3fn),
    "not a number": _value("prompt.text", float("nan")),
    "infinite": _value("prompt.text", float("inf")),
    "head not a number": _value("head.classifier:bias", float("nan")),
    "head of another shape": _shape("head.classifier:weight", 4, 32),
    "head of integers": _shape("head.classifier:bias", 3, dtype=torch.int64),
    "head lacks a part": _without("head.classifier:bias"),
    "head has a part more": _shape("head.classifier:scale", 3),
    "head that the model lacks": _rename("head.classifier:weight", "head.score:weight"),
    "head without a part": _rename("head.classifier:weight", "head.classifier"),
    "head without a name": _rename("head.classifier:weight", "head.:weight"),
    "the model's own weights as a head": _rename(
        "head.classifier:weight", "head.bert:embeddings.word_embeddings.weight"
    ),
}


class Bomb:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was read",))


CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "one byte": lambda whole: whole[:1],
    "the length alone": lambda whole: whole[:8],
    "half a header": lambda whole: whole[:100],
    "half": lambda whole: whole[: len(whole) // 2],
    "the last byte lacks": lambda whole: whole[:-1],
    "a byte too many": lambda whole: whole + b"\0",
    "zeros": lambda whole: bytes(len(whole)),
    "noise": lambda whole: bytes((i * 7919 + 13) % 251 for i in range(4096)),
    "a header of 2**63 bytes": lambda whole: (2**63).to_bytes(8, "little") + whole[8:],
    "a header of its own size": lambda whole: len(whole).to_bytes(8, "little") + whole[8:],
    "a pickle": lambda whole: pickle.dumps(Bomb()),
    "a torch file": lambda whole: _torch_file(),
    "text": lambda whole: b"soft prompt",
    "json": lambda whole: b'{"format": "softhooks"}',
    "no metadata": lambda whole: _with_metadata(None),
    "foreign metadata": lambda whole: _with_metadata({"format": "pt"}),
    "metadata no json": lambda whole: _with_metadata({FORMAT: "{"}),
    "metadata a list": lambda whole: _with_metadata({FORMAT: "[1]"}),
    "metadata a deep list": lambda whole: _with_metadata({FORMAT: "[" * 100_000}),
    "metadata a huge number": lambda whole: _with_metadata({FORMAT: "9" * 10_000}),
    "metadata empty": lambda whole: _with_metadata({FORMAT: "{}"}),
}


def _torch_file() -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save({"prompt.text": Bomb()}, buffer)
    return buffer.getvalue()


def _with_metadata(metadata: dict[str, str] | None) -> bytes:
    from safetensors.torch import save

    return bytes(save({"prompt.text": torch.zeros(3, 128)}, metadata=metadata))
