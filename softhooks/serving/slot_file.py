"""Slot files of llama.cpp's server, which hold the tokens of a sequence, and their keys and values in each layer.

The server writes such a file for `POST /slots/0?action=save`. Numbers are little-endian, u32 unless another type is given:

    magic "qsgg", version 4, n, n words: -1, 1, P, the P tokens, 0
    streams S; for each stream: cells, which is P for the sequence's stream, and 0 for the others
    after the P:  (position, 1, sequence) for each cell; transposed values (0 or 1), layers L, key rotation, value rotation
                  the keys of each layer: type, size of a row (u64), P rows
                  the values of each layer: the same; or transposed: type, size of a number, rows, rows of P numbers

Caches with sliding windows or recurrent states add further sections. Source: `llama-kv-cache.cpp` of llama.cpp, and files that
xllamacpp 2026.10.11549 wrote.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from softhooks.errors import CheckpointError
from softhooks.formats.limits import MAX_TENSOR_FILE_BYTES, require_size

SUFFIX = ".bin"
_MAGIC = b"qsgg"
_VERSION = 4
_MAX_STREAMS = 256  # the largest number of sequences in llama.cpp
_MAX_LAYERS = 10_000
_MAX_TOKENS = 2**20
_TYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""The types of ggml that are not quantized, as torch names them."""


@dataclass(frozen=True)
class Block:
    """Where a slot file holds the keys or the values of one layer.

    Attributes:
        offset: the first byte.
        width: the numbers per token, which are Hk * D.
        dtype: their type.
        by_token: whether the file holds [P, width] instead of [width, P].
    """

    offset: int
    width: int
    dtype: torch.dtype
    by_token: bool


@dataclass(frozen=True)
class SlotFile:
    """The contents of a slot file.

    Attributes:
        data: all bytes.
        tokens: the P tokens.
        keys, values: for each layer, where they are.
    """

    data: bytes
    tokens: tuple[int, ...]
    keys: tuple[Block, ...]
    values: tuple[Block, ...]

    def read(self, block: Block) -> Tensor:
        """Return keys or values. -> [P, width], float32."""
        end = block.offset + len(self.tokens) * block.width * block.dtype.itemsize
        found = torch.frombuffer(bytearray(self.data[block.offset : end]), dtype=block.dtype).float()
        return found.view(-1, block.width) if block.by_token else found.view(block.width, -1).T

    def replaced(self, keys: list[Tensor], values: list[Tensor]) -> bytes:
        """Return the file with other keys and values, rounded to the types in the file.

        Args:
            keys, values: for each layer, [P, width].

        Raises:
            CheckpointError: a number is too large for its type in the file.
        """
        data = bytearray(self.data)
        for block, tensor in zip((*self.keys, *self.values), (*keys, *values), strict=True):
            rounded = tensor.to(block.dtype)
            if not rounded.isfinite().all():
                raise CheckpointError(
                    f"the prompt has keys or values that are too large for the server's cache of {block.dtype}.",
                    "Start the server with `--cache-type-k f32 --cache-type-v f32`.",
                )
            content = (rounded if block.by_token else rounded.T).contiguous().view(torch.uint8).numpy().tobytes()
            data[block.offset : block.offset + len(content)] = content
        return bytes(data)


def read_slot_file(path: Path) -> SlotFile:
    """Read a slot file, and check that every byte of it is understood.

    Raises:
        CheckpointError: the file is damaged, has another version, or holds more than unquantized keys and values.
        OSError: there is no file, or it cannot be read.
    """
    require_size(path, MAX_TENSOR_FILE_BYTES)
    data = path.read_bytes()
    cursor = _Cursor(data, path)
    tokens = _read_tokens(cursor)
    streams = cursor.number("the number of streams", 1, _MAX_STREAMS)
    keys: tuple[Block, ...] = ()
    values: tuple[Block, ...] = ()
    for _ in range(streams):
        cells = cursor.number("the number of cells", 0, len(tokens))
        if cells and (keys or cells != len(tokens)):
            raise cursor.refused(f"it holds {cells} cells for {len(tokens)} tokens")
        if cells:
            keys, values = _read_stream(cursor, cells)
    if not keys:
        raise cursor.refused("it holds no keys and values")
    if cursor.offset != len(data):
        raise cursor.refused(
            f"{len(data) - cursor.offset} bytes follow the keys and values, as for models with sliding windows or "
            "recurrent layers"
        )
    return SlotFile(data, tokens, keys, values)


def read_slot_tokens(path: Path) -> tuple[int, ...]:
    """Read only the tokens of a slot file.

    Raises:
        CheckpointError: the file is not a slot file, or has another version.
        OSError: there is no file, or it cannot be read.
    """
    require_size(path, MAX_TENSOR_FILE_BYTES)
    with path.open("rb") as file:
        return _read_tokens(_Cursor(file.read(4 * (_MAX_TOKENS + 7)), path))


class _Cursor:
    """Reads numbers from bytes, one after another."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.offset = data, path, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.offset:
            raise self.refused("it is truncated")
        self.offset += count
        return self.data[self.offset - count : self.offset]

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.offset:
            raise self.refused("it is truncated")
        self.offset += count

    def number(self, name: str, smallest: int, largest: int, form: str = "<I") -> int:
        """Read a number that must lie within limits."""
        [found] = struct.unpack(form, self.take(struct.calcsize(form)))
        if not smallest <= found <= largest:
            expected = str(smallest) if smallest == largest else f"between {smallest} and {largest}"
            raise self.refused(f"{name} is {found}, not {expected}")
        return int(found)

    def exactly(self, name: str, expected: int, form: str = "<I") -> None:
        self.number(name, expected, expected, form)

    def refused(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a slot file that softhooks can read: {reason}.",
            "docs/serving.md lists the versions and options of llama.cpp's server that are supported.",
        )


def _read_tokens(cursor: _Cursor) -> tuple[int, ...]:
    if cursor.take(len(_MAGIC)) != _MAGIC:
        raise cursor.refused("it does not begin with the bytes of a slot file")
    cursor.exactly("the version", _VERSION)
    words = cursor.number("the number of words before the cells", 5, _MAX_TOKENS + 4)
    cursor.exactly("the first word", -1, "<i")
    cursor.exactly("the version of the tokens", 1)
    cursor.exactly("the number of tokens", words - 4)
    tokens = struct.unpack(f"<{words - 4}i", cursor.take(4 * (words - 4)))
    cursor.exactly("the number of images", 0)
    if min(tokens) < 0:
        raise cursor.refused("a token is negative")
    return tokens


def _read_stream(cursor: _Cursor, cells: int) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    for position in range(cells):
        cursor.exactly(f"the position of token {position}", position)
        cursor.exactly(f"the number of sequences of token {position}", 1)
        cursor.number(f"the sequence of token {position}", 0, _MAX_STREAMS - 1)
    transposed = cursor.number("the order of the values", 0, 1)
    layers = cursor.number("the number of layers", 1, _MAX_LAYERS)
    for name in ("keys", "values"):
        if rotation := cursor.number(f"the rotation of the {name}", 0, 2**32 - 1):
            raise cursor.refused(f"the {name} are rotated in groups of {rotation}, as in a quantized cache")
    keys = tuple(_read_rows(cursor, cells) for _ in range(layers))
    values = tuple(_read_columns(cursor, cells) if transposed else _read_rows(cursor, cells) for _ in range(layers))
    return keys, values


def _read_rows(cursor: _Cursor, cells: int) -> Block:
    """Read where one row for each token is."""
    dtype = _read_dtype(cursor)
    size = cursor.number("the size of a row", dtype.itemsize, len(cursor.data), "<Q")
    if size % dtype.itemsize:
        raise cursor.refused(f"the size of a row is {size}, which is not a multiple of {dtype.itemsize}")
    block = Block(cursor.offset, size // dtype.itemsize, dtype, by_token=True)
    cursor.skip(cells * size)
    return block


def _read_columns(cursor: _Cursor, cells: int) -> Block:
    """Read where transposed values are."""
    dtype = _read_dtype(cursor)
    cursor.exactly("the size of a number", dtype.itemsize)
    width = cursor.number("the number of rows", 1, len(cursor.data))
    block = Block(cursor.offset, width, dtype, by_token=False)
    cursor.skip(cells * width * dtype.itemsize)
    return block


def _read_dtype(cursor: _Cursor) -> torch.dtype:
    kind = cursor.number("the type of the numbers", 0, 2**32 - 1)
    if kind not in _TYPES:
        raise cursor.refused(f"the cache has numbers of ggml's type {kind}; it must be float32, float16 or bfloat16")
    return _TYPES[kind]
