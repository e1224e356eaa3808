"""Change the options stored in a saved prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file


def change(folder: Path, key: str, value: Any) -> None:
    """Change one option in a file's description."""
    path = folder / "soft_prompt.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    told = json.loads(metadata["softhooks"])
    target = told["conventions"] if key == "placement" else told["options"]
    target[key] = value
    save_file(tensors, path, {**metadata, "softhooks": json.dumps(told)})
