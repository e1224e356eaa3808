"""The readers of files, each as a function of bytes. A reader may raise a `SoftHooksError`; anything else is a bug."""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save

from softhooks.base_model.info import BaseModelInfo
from softhooks.cli.convert import convert
from softhooks.cli.prompt_facts import facts_of
from softhooks.cli.prompt_table import show
from softhooks.cli.run_parser import read_config
from softhooks.errors import SoftHooksError
from softhooks.formats import softhooks_files
from softhooks.formats.files import parse_json_tensor
from softhooks.formats.find import read
from softhooks.layout.layout import Layout
from softhooks.load import attach_stored
from softhooks.methods.stored_method import method_of
from softhooks.serving import prefix_files
from softhooks.serving.prompt_folder import PromptFolder
from softhooks.serving.slot_file import read_slot_file, read_slot_tokens
from softhooks.serving.tags import read_tags, write_tags
from softhooks.trainer.incomplete_checkpoints import find_damage

_MAX_NUMBERS = 2**16  # in the tensors that a harness makes
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}

Reader = Callable[[bytes], object]


# --- files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _folder(**files: bytes) -> Iterator[Path]:
    """A folder with these files; a name's `__` stands for a dot."""
    with TemporaryDirectory(prefix="softhooks-fuzz-") as name:
        for file, content in files.items():
            (Path(name) / file.replace("__", ".")).write_bytes(content)
        yield Path(name)


def _tensors(shapes: Any) -> dict[str, torch.Tensor]:
    """Tensors of the shapes that a JSON value describes, `[2, 3]` or `["F16", 2, 3]`, as far as these are small."""
    made: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items() if isinstance(shapes, dict) else ():
        dtype, sizes = torch.float32, shape
        if isinstance(shape, list) and shape and isinstance(shape[0], str):
            dtype, sizes = _DTYPES.get(shape[0], torch.float32), shape[1:]
        if not isinstance(sizes, list) or len(sizes) > 8 or not all(type(n) is int and 0 <= n < 2**40 for n in sizes):
            continue
        if math.prod(sizes) <= _MAX_NUMBERS and sum(map(torch.Tensor.numel, made.values())) <= 4 * _MAX_NUMBERS:
            made[name] = torch.full(sizes, 1, dtype=dtype)
    return made


def _json(data: bytes) -> Any:
    """The JSON value of a text, or None."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _softhooks_file(description: Any) -> bytes:
    """A consistent file for a description."""
    tensors = _tensors(description.get("tensors") if isinstance(description, dict) else None)
    # U+D800 and the like cannot be encoded; JSON escapes them
    names = {name: tensor for name, tensor in tensors.items() if name.isprintable() and name != "__metadata__"}
    return bytes(save(names, metadata={"format": "pt", softhooks_files.FORMAT: json.dumps(description)}))


# --- readers ----------------------------------------------------------------------------------------------------------


def raw_file(data: bytes) -> None:
    """Any bytes as `soft_prompt.safetensors`, and as the live state next to it."""
    with _folder(soft_prompt__safetensors=data, soft_prompt__live__safetensors=data) as folder:
        find_damage(folder)
        _examine(folder)


def description(data: bytes) -> None:
    """A description in a consistent file: `load` without a model, `softhooks inspect` and `softhooks convert`."""
    with _folder(soft_prompt__safetensors=_softhooks_file(_json(data))) as folder:
        stored = _examine(folder)
        with contextlib.suppress(SoftHooksError):
            convert(folder, folder / "converted")
        assert stored is None or isinstance(stored.base, BaseModelInfo)


def loaded(data: bytes) -> None:
    """A description in a consistent file, loaded onto a model, to be used and to be trained."""
    with _folder(soft_prompt__safetensors=_softhooks_file(_json(data))) as folder:
        _load(folder)


def peft(data: bytes) -> None:
    """The config and the shapes of a PEFT adapter: read, inspected, converted, and loaded onto a model."""
    value = _json(data)
    parts = value if isinstance(value, dict) else {}
    config = json.dumps(parts.get("config")).encode()
    tensors = {name: t for name, t in _tensors(parts.get("tensors")).items() if name.isprintable()}
    with _folder(adapter_config__json=config, adapter_model__safetensors=bytes(save(tensors))) as folder:
        if _examine(folder) is not None:
            with contextlib.suppress(SoftHooksError):
                convert(folder, folder / "converted")
            _load(folder)


def config_file(data: bytes) -> None:
    """Any bytes as `adapter_config.json`."""
    with _folder(adapter_config__json=data, adapter_model__safetensors=bytes(save({}))) as folder:
        _examine(folder)


def layout(data: bytes) -> None:
    """A layout as a saved prompt describes it, and a template as a user writes it."""
    found = Layout.from_json(value) if isinstance(value := _json(data), dict) else Layout(data.decode(errors="ignore"))
    if found.form.is_bound:
        assert found.num_virtual_tokens <= found.num_slots
        assert Layout.from_json(found.to_json()) == found


def trainer_state(data: bytes) -> None:
    """Any bytes as a Trainer's state and as an index of weights, in a folder without a prompt."""
    prompt = _softhooks_file({})
    with _folder(trainer_state__json=data, model__safetensors__index__json=data) as folder:
        find_damage(folder)
        inside = folder / "checkpoint-7"
        inside.mkdir()
        (inside / "trainer_state.json").write_bytes(data)
        with contextlib.suppress(SoftHooksError):
            read(folder)
        (inside / softhooks_files.TENSORS).write_bytes(prompt)
        read(folder)


def live_description(data: bytes) -> None:
    """Any bytes as the description of a training run in a checkpoint."""
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0)
    parse_json_tensor(text, "the checkpoint")


def run_config(data: bytes) -> None:
    """Any bytes as the YAML file of `softhooks run --config`."""
    with _folder(prompt__yaml=data) as folder:
        read_config(str(folder / "prompt.yaml"))


def tags(data: bytes) -> None:
    """Any bytes as the tags of a prompt in a store."""
    with _folder(tags__json=data) as folder:
        found = read_tags(folder)
        write_tags(folder, found)
        assert read_tags(folder) == found


def served_prefix(data: bytes) -> None:
    """The facts and the shapes of a prompt that was exported for a server."""
    value = _json(data)
    parts = value if isinstance(value, dict) else {}
    tensors = {name: t for name, t in _tensors(parts.get("tensors")).items() if name.isprintable()}
    about = {"format": prefix_files.FORMAT, "facts": json.dumps(parts.get("facts")), "digest": ""}
    with _folder(en__safetensors=bytes(save(tensors, metadata=about))) as folder:
        PromptFolder(folder).find("en")


def slot_file(data: bytes) -> None:
    """Any bytes as a slot file of llama.cpp's server."""
    with _folder(en__bin=data) as folder:
        found = read_slot_file(folder / "en.bin")
        assert read_slot_tokens(folder / "en.bin") == found.tokens
        keys, values = ([found.read(block) for block in blocks] for blocks in (found.keys, found.values))
        found.replaced(keys, values)


READERS: dict[str, Reader] = {
    "raw_file": raw_file,
    "description": description,
    "loaded": loaded,
    "peft": peft,
    "config_file": config_file,
    "layout": layout,
    "trainer_state": trainer_state,
    "live_description": live_description,
    "run_config": run_config,
    "served_prefix": served_prefix,
    "slot_file": slot_file,
    "tags": tags,
}
BYTES = ("raw_file", "slot_file")
"""The readers whose input is not text."""


def try_reader(name: str, data: bytes) -> None:
    """Run a reader; a `SoftHooksError` is an answer, and so is a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(SoftHooksError):
            READERS[name](data)


def _examine(folder: Path) -> Any:
    """Read a prompt as `load` and `softhooks inspect` do; return it, or None if it is refused."""
    from rich.console import Console

    try:
        stored = read(folder)
        method_of(stored)
        facts = facts_of(folder)
    except SoftHooksError:
        return None
    json.dumps(facts, allow_nan=False)
    show([facts], Console(file=io.StringIO(), width=80))
    return stored


_models: list[Any] = []


def _load(folder: Path) -> None:
    """Load a prompt onto a small Llama, which must be unchanged afterwards."""
    if not _models:
        import zoo

        _models.append(zoo.build("llama"))
    [model] = _models
    try:
        stored = read(folder)
    except SoftHooksError:
        return
    for trainable in (False, True):
        with contextlib.suppress(SoftHooksError):
            attach_stored(model, stored, "default", trainable=trainable, strict=trainable).remove()
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
