"""Slot files of llama.cpp's server: files that the server wrote, and damaged ones.

`tests/serving_llama_cpp/test_slot_files.py` makes the files in `slots/` again and compares them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slot_files import slot_file
from tiny_llama import tiny_llama

from softhooks.errors import CheckpointError
from softhooks.serving.slot_file import read_slot_file, read_slot_tokens

SLOTS = Path(__file__).parent / "slots"
TOKENS = [5, 70, 33]
LAYOUTS = {
    "f32-transposed": {"dtype": torch.float32},
    "f16-flash-3-slots": {"dtype": torch.float16, "transposed": False, "streams": 3, "stream": 1, "sequence": 1},
    "bf16-flash-unified": {"dtype": torch.bfloat16, "transposed": False, "sequence": 1},
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def keys_and_values() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What transformers computes for the tokens, with the keys in llama.cpp's order. -> for each layer, [P, width]."""
    with torch.no_grad():
        layers = tiny_llama()(torch.tensor([TOKENS]), use_cache=True).past_key_values.layers
    order = [place for pair in range(32) for place in (pair, pair + 32)]
    return [layer.keys[0, 0][:, order] for layer in layers], [layer.values[0, 0] for layer in layers]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_of_the_server_holds_what_transformers_computes(name: str) -> None:
    found = read_slot_file(SLOTS / f"{name}.bin")
    assert found.tokens == tuple(TOKENS) == read_slot_tokens(SLOTS / f"{name}.bin")
    keys, values = keys_and_values()
    tolerance = TOLERANCE[LAYOUTS[name]["dtype"]]
    for block, expected in zip((*found.keys, *found.values), (*keys, *values), strict=True):
        torch.testing.assert_close(found.read(block), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_writer_of_the_tests_writes_the_same_bytes(name: str) -> None:
    path = SLOTS / f"{name}.bin"
    found = read_slot_file(path)
    keys, values = ([found.read(block) for block in blocks] for blocks in (found.keys, found.values))
    assert slot_file(TOKENS, keys, values, **LAYOUTS[name]) == path.read_bytes()


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_the_keys_and_values_are_replaced(name: str, tmp_path: Path) -> None:
    found = read_slot_file(SLOTS / f"{name}.bin")
    keys, values = ([torch.randn(3, 64) for _ in range(2)] for _ in range(2))
    content = found.replaced(keys, values)
    assert content == slot_file(TOKENS, keys, values, **LAYOUTS[name])
    (tmp_path / "a.bin").write_bytes(content)
    again = read_slot_file(tmp_path / "a.bin")
    for block, expected in zip((*again.keys, *again.values), (*keys, *values), strict=True):
        assert torch.equal(again.read(block), expected.to(block.dtype).float())


def test_a_number_that_the_cache_cannot_hold_is_refused() -> None:
    found = read_slot_file(SLOTS / "f16-flash-3-slots.bin")
    zeros = [torch.zeros(3, 64)] * 2
    with pytest.raises(CheckpointError, match=r"too large for the server's cache of torch\.float16"):
        found.replaced(zeros, [torch.zeros(3, 64), torch.full((3, 64), 1e5)])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("q8_0-flash", "the keys are rotated in groups of 64"), ("f32-sliding-window", "the number of layers is 0")],
)
def test_a_file_with_another_cache_is_refused(name: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_slot_file(SLOTS / f"{name}.bin")


def change(offset: int, value: int, form: str = "<I") -> Callable[[bytes], bytes]:
    """Replace a number."""
    size = struct.calcsize(form)
    return lambda data: data[:offset] + struct.pack(form, value) + data[offset + size :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "truncated"),
    "magic": (lambda data: b"nsgg" + data[4:], "does not begin"),
    "version": (change(4, 3), "the version is 3, not 4"),
    "words": (change(8, 0), "the number of words"),
    "many words": (change(8, 2**31), "the number of words"),
    "first word": (change(12, 0), "the first word is 0"),
    "version of tokens": (change(16, 2), "the version of the tokens"),
    "number of tokens": (change(20, 2), "the number of tokens"),
    "token": (change(24, -7, "<i"), "a token is negative"),
    "images": (change(36, 1), "the number of images"),
    "no streams": (change(40, 0), "the number of streams"),
    "two streams": (change(40, 2), "truncated"),
    "no cells": (change(44, 0), "it holds no keys and values"),
    "fewer cells": (change(44, 2), "it holds 2 cells for 3 tokens"),
    "more cells": (change(44, 4), "the number of cells"),
    "position": (change(60, 2), "the position of token 1"),
    "sequences": (change(52, 2), "the number of sequences of token 0"),
    "sequence": (change(56, 9999), "the sequence of token 0"),
    "transposed": (change(84, 2), "the order of the values"),
    "layers": (change(88, 0), "the number of layers"),
    "more layers": (change(88, 3), "it is truncated|ggml's type|row"),
    "rotated values": (change(96, 64), "the values are rotated"),
    "type": (change(100, 8), "ggml's type 8"),
    "row": (change(104, 2**60, "<Q"), "the size of a row"),
    "odd row": (change(104, 255, "<Q"), "not a multiple of 4"),
    "wider row": (change(104, 260, "<Q"), "ggml's type|truncated|row"),
    "more": (lambda data: data + b"\0", "1 bytes follow"),
    "two sequences": (lambda data: change(40, 2)(data) + data[44:], "it holds 3 cells"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    harm, reason = DAMAGES[damage]
    path = tmp_path / "a.bin"
    path.write_bytes(harm((SLOTS / "f32-transposed.bin").read_bytes()))
    with pytest.raises(CheckpointError, match=reason):
        read_slot_file(path)


@pytest.mark.hypothesis
@given(name=st.sampled_from(sorted(LAYOUTS)), cut=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_refused(tmp_path_factory: pytest.TempPathFactory, name: str, cut: float) -> None:
    data = (SLOTS / f"{name}.bin").read_bytes()
    path = tmp_path_factory.mktemp("slots") / "a.bin"
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(CheckpointError):
        read_slot_file(path)


@pytest.mark.hypothesis
@given(name=st.sampled_from(sorted(LAYOUTS)), word=st.integers(0, 29), value=st.integers(0, 2**32 - 1))
def test_a_changed_header_is_refused_or_keeps_its_meaning(
    tmp_path_factory: pytest.TempPathFactory, name: str, word: int, value: int
) -> None:
    """Only the tokens and the number of the sequence may have any value."""
    data = (SLOTS / f"{name}.bin").read_bytes()
    path = tmp_path_factory.mktemp("slots") / "a.bin"
    path.write_bytes(change(4 * word, value)(data))
    before = read_slot_file(SLOTS / f"{name}.bin")
    try:
        found = read_slot_file(path)
    except CheckpointError:
        return
    assert (found.keys, found.values, len(found.tokens)) == (before.keys, before.values, 3)


@pytest.mark.hypothesis
@given(data=st.binary(max_size=200))
def test_other_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("slots") / "a.bin"
    path.write_bytes(b"qsgg\x04\0\0\0" + data)
    with pytest.raises(CheckpointError):
        read_slot_file(path)


def test_a_pipe_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_slot_file(tmp_path)
