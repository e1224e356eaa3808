"""Files that announce or contain huge things are refused before memory is allocated for them."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from damaged_files import put, rewrite
from safetensors.torch import save_file

import softhooks
from softhooks import CheckpointError, Layout, MultitaskPromptTuning, OptionError, PrefixTuning, PromptTuning, PTuning
from softhooks.cli.prompt_facts import facts_of
from softhooks.errors import MAX_VIRTUAL_TOKENS, SoftHooksError
from softhooks.formats import limits
from softhooks.formats.files import parse_json, parse_json_tensor, read_json, read_tensors
from softhooks.formats.find import read
from softhooks.formats.softhooks_files import LIVE, TENSORS
from softhooks.methods.stored_method import method_of
from softhooks.trainer.incomplete_checkpoints import find_damage

HUGE = 10**12


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """Let a test allocate 2 GiB more than the process has; a test that needs more ends with an error."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _announce(path: Path, header: dict[str, Any] | bytes, size: int = 0, length: int | None = None) -> Path:
    """Write the header of a safetensors file, and make the file `size` bytes long without filling it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)
    if size:
        os.truncate(path, size)
    return path


def _entry(*shape: int, start: int = 0, end: int = 0) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


# --- tensor files -----------------------------------------------------------------------------------------------------


def test_terabytes_that_are_only_announced_are_refused(tmp_path: Path) -> None:
    path = _announce(tmp_path / TENSORS, {"prompt.embeddings": _entry(2**28, 2**10, end=2**40)})
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_tensors(path)


def test_a_file_of_terabytes_is_refused(tmp_path: Path) -> None:
    size = limits.MAX_TENSOR_FILE_BYTES + 2**20  # a sparse file, which takes no room on the disk
    path = _announce(tmp_path / TENSORS, {"prompt.embeddings": _entry(2**24, 2**10, end=2**36)}, size)
    with pytest.raises(CheckpointError, match="too large") as error:
        softhooks.load(zoo.build("llama"), tmp_path)
    assert f"limit: {limits.MAX_TENSOR_FILE_BYTES:,} bytes" in str(error.value)
    assert path.stat().st_blocks < 1000


def test_a_long_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = _announce(tmp_path / TENSORS, b"{}", 2**30, length=limits.MAX_HEADER_BYTES + 1)
    with pytest.raises(CheckpointError, match="too large"):
        read_tensors(path)


def test_many_tensors_are_refused(tmp_path: Path) -> None:
    path = _announce(tmp_path / TENSORS, {f"t{i}": _entry(0) for i in range(limits.MAX_TENSORS + 1)})
    with pytest.raises(CheckpointError, match="too large"):
        read_tensors(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for reader in (read_tensors, read_json):
        with pytest.raises(CheckpointError, match="not a regular file"):
            reader(tmp_path / "pipe")


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_long_and_deep_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(b"{}" + b" " * limits.MAX_JSON_BYTES)
    with pytest.raises(CheckpointError, match="too large"):
        read(tmp_path)
    for depth, said in ((limits.MAX_JSON_DEPTH, "nested more than"), (100_000, "not valid JSON")):
        with pytest.raises(CheckpointError, match=said):
            parse_json('{"a": ' + "[" * depth + "]" * depth + "}", "a file")
    depth = limits.MAX_JSON_DEPTH - 1
    assert parse_json('{"a": ' + "[" * depth + "]" * depth + "}", "a file")


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(limits.MAX_JSON_BYTES + 1, dtype=torch.uint8)],
    ids=["floats", "matrix", "long"],
)
def test_a_description_in_a_checkpoint_must_be_a_short_text(tensor: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        parse_json_tensor(tensor, "the checkpoint")
    if tensor.dtype is torch.uint8:
        softhooks.attach(zoo.build("llama"), PromptTuning(4)).save_pretrained(tmp_path)
        save_file(
            {"soft_prompts.default.description": tensor, "soft_prompts.default.x": torch.zeros(1)}, tmp_path / LIVE
        )
        facts = facts_of(tmp_path) if tensor.dim() == 2 else None  # a matrix is a tensor like any other
        assert facts is None or "soft_prompts.default.description" in facts["live"]["tensors"]


def test_a_deeply_nested_state_of_a_trainer_is_damage(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("[" * 100_000)
    assert find_damage(tmp_path) == "trainer_state.json is truncated"


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    softhooks.attach(zoo.build("llama"), PTuning(layout=Layout("{soft:4} {text}"))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"num_virtual_tokens": HUGE},
        {"num_virtual_tokens": HUGE, "layout": None},
        {"num_virtual_tokens": 10**400},
        {"hidden_size": HUGE},
        {"layout": {"template": f"{{soft:{HUGE}}}", "words": []}},
        {"layout": {"template": f"{{soft:{'9' * 5000}}}", "words": []}},
        {"layout": {"template": "{soft:1000000, name=a}" * 40_000, "words": []}},
        {"layout": {"template": "{soft:1}" + "{a}" * 2**20, "words": []}},
        {"layout": {"insert": [{"at": "start", "count": HUGE}], "which": "first", "missing": "error"}},
    ],
)
def test_huge_counts_in_a_saved_prompt_are_refused(options: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    (tmp_path / TENSORS).write_bytes((saved / TENSORS).read_bytes())
    rewrite(tmp_path, lambda description: description["options"].update(options))
    with pytest.raises(CheckpointError) as error:
        softhooks.load(zoo.build("llama"), tmp_path)
    assert len(str(error.value)) < 25_000


@pytest.mark.parametrize("vocabulary", [10**400, 2**31, -1])
def test_an_impossible_vocabulary_of_the_base_is_refused(vocabulary: int, saved: Path, tmp_path: Path) -> None:
    (tmp_path / TENSORS).write_bytes((saved / TENSORS).read_bytes())
    rewrite(tmp_path, put("base", "fingerprint", "vocabulary", value=vocabulary))
    with pytest.raises(CheckpointError, match="fingerprint"):
        softhooks.load(zoo.build("llama"), tmp_path)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE"])
@pytest.mark.parametrize("shape", [(4, 64), (HUGE, 0)], ids=["too few rows", "empty rows"])
def test_huge_counts_in_an_adapter_are_refused(kind: str, shape: tuple[int, int], tmp_path: Path) -> None:
    sizes = {"num_virtual_tokens": HUGE, "num_layers": HUGE, "token_dim": HUGE, "num_attention_heads": 1}
    config = {"peft_type": kind, "task_type": "CAUSAL_LM", "num_tasks": HUGE, "num_ranks": 0, **sizes}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    table = torch.zeros(shape)
    tasks = {"prefix_task_cols": torch.zeros(HUGE, 4, 0), "prefix_task_rows": torch.zeros(HUGE, 0, 64)}
    save_file({"prompt_embeddings": table, **(tasks if "TASK" in kind else {})}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError):
        softhooks.load(zoo.build("llama"), tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PromptTuning(HUGE),
        lambda: PrefixTuning(4, projection=True, hidden_size=HUGE),
        lambda: softhooks.ResidualPromptTuning(4, hidden_size=HUGE),
        lambda: MultitaskPromptTuning(4, tasks=HUGE),
        lambda: MultitaskPromptTuning(4, tasks=2, rank=HUGE),
        lambda: Layout(f"{{soft:{HUGE}}} {{text}}"),
        lambda: Layout.insert(start=HUGE),
    ],
)
def test_huge_options_are_refused(make: Any) -> None:
    with pytest.raises(OptionError):
        make()


def test_the_largest_counts_are_accepted() -> None:
    assert Layout(f"{{soft:{MAX_VIRTUAL_TOKENS}}}").num_slots == PromptTuning(MAX_VIRTUAL_TOKENS).num_virtual_tokens


def test_ordinary_prompts_stay_far_below_the_limits(saved: Path) -> None:
    size = (saved / TENSORS).stat().st_size
    header = struct.unpack("<Q", (saved / TENSORS).read_bytes()[:8])[0]
    assert size * 1000 < limits.MAX_TENSOR_FILE_BYTES
    assert header * 100 < limits.MAX_HEADER_BYTES
    assert method_of(read(saved)).num_virtual_tokens == 4


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_message_quotes_a_file_without_its_control_characters_and_not_at_length() -> None:
    said = str(SoftHooksError("found \x1b[31m\u202e red\nnext", "Do this.", value="x" * 10**6))
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "found \\x1b[31m\\u202e red\nnext" in said
    assert len(said) < 12_000
    assert "characters left out" in said
