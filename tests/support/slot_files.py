"""Write slot files as llama.cpp's server does; `tests/serving/test_slot_file.py` compares them with files of the server."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}


def slot_file(
    tokens: Sequence[int],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    transposed: bool = True,
    streams: int = 1,
    stream: int = 0,
    sequence: int = 0,
) -> bytes:
    """Return the bytes of a file.

    Args:
        tokens: P tokens.
        keys, values: for each layer, [P, width].
        dtype: the type of the cache.
        transposed: whether the values are stored as [width, P].
        streams: the number of streams.
        stream: the stream of the sequence.
        sequence: the number of the sequence.
    """
    count = len(tokens)
    data = b"qsgg" + struct.pack(f"<2Ii2I{count}iI", 4, count + 4, -1, 1, count, *tokens, 0)
    data += struct.pack("<I", streams) + bytes(4 * stream)
    data += struct.pack("<I", count)
    for position in range(count):
        data += struct.pack("<3I", position, 1, sequence)
    data += struct.pack("<4I", transposed, len(keys), 0, 0)
    for key in keys:
        data += struct.pack("<IQ", TYPES[dtype], key.shape[1] * dtype.itemsize) + raw(key, dtype)
    for value in values:
        if transposed:
            data += struct.pack("<3I", TYPES[dtype], dtype.itemsize, value.shape[1]) + raw(value.T, dtype)
        else:
            data += struct.pack("<IQ", TYPES[dtype], value.shape[1] * dtype.itemsize) + raw(value, dtype)
    return data + bytes(4 * (streams - stream - 1))


def raw(tensor: Tensor, dtype: torch.dtype) -> bytes:
    """The bytes of the numbers."""
    return tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
