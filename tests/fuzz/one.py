"""Fuzz one reader in this process: `python -m tests.fuzz.one READER [libFuzzer's arguments]`."""

from __future__ import annotations

import sys
from typing import Any

import atheris

with atheris.instrument_imports(include=["softhooks"]):
    from tests.fuzz import readers

from tests.fuzz.mutate import mutate_json


def main() -> None:
    """Hand the process to libFuzzer, which ends it."""
    name = sys.argv.pop(1)

    def one_input(data: bytes) -> None:
        readers.try_reader(name, data)

    def mutated(data: bytes, max_size: int, seed: int) -> bytes:
        changed = mutate_json(data, seed, max_size) if seed % 8 else None
        return bytes(atheris.Mutate(data, max_size)) if changed is None else changed

    options: dict[str, Any] = {} if name in readers.BYTES else {"custom_mutator": mutated}
    atheris.Setup(sys.argv, one_input, **options)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
