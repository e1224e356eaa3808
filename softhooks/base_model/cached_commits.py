"""Find the commits on the Hub that a model may have been loaded from.

transformers resolves a revision to a commit, but newer versions do not record the commit in the model. This module looks for the
model's weights in the cache of huggingface_hub.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from softhooks.compat.sharding import is_sharded

REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))(?:\w[\w.-]{0,95}/)?\w[\w.-]{0,95}(?<=\w)", re.ASCII)
"""A name of a repository on the Hub."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_COMPARED = 16


def cached_commits(model: nn.Module, name: str) -> list[str]:
    """Return the cached commits of a repository whose weights are the model's; the commit of `main` comes first, then the newest.

    A commit is left out if no weight can be compared.

    Args:
        model: the model; only a few values of a few matrices are compared.
        name: the name of the repository.
    """
    from huggingface_hub import constants

    if not REPOSITORY.fullmatch(name):
        return []
    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    try:
        snapshots = [path for path in (repository / "snapshots").iterdir() if _COMMIT.fullmatch(path.name)]
        snapshots.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        main = repository / "refs" / "main"
        first = main.read_text().strip() if main.is_file() else ""
    except OSError:
        return []
    weights = _weights_of(model)
    known: dict[tuple[Path, ...], bool] = {}  # commits often have the same weights, which are compared only once
    found = []
    for snapshot in sorted(snapshots, key=lambda path: path.name != first):
        files = tuple(sorted(file.resolve() for file in snapshot.glob("*.safetensors")))
        if files not in known:
            known[files] = _holds(files, weights)
        if known[files]:
            found.append(snapshot.name)
    return found


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the matrices of a model that can be compared, by each name that they may have in a file."""
    matrices = {
        name: tensor
        for name, tensor in model.named_parameters()
        if tensor.dim() == 2 and tensor.is_floating_point() and not tensor.is_meta and not is_sharded(tensor)
    }
    frozen = {name: tensor for name, tensor in matrices.items() if not tensor.requires_grad}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."  # a file may hold the model with or without a head
    named: dict[str, Tensor] = {}
    for name, tensor in (frozen or matrices).items():
        named |= {prefix + name: tensor, name.removeprefix(prefix): tensor, name: tensor}
    return named


def _holds(files: tuple[Path, ...], weights: dict[str, Tensor]) -> bool:
    """Return whether files contain the weights of a model, judged by one row of a few matrices from all layers."""
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(str(file), framework="pt")) for file in files]
            common = [(file, name) for file in opened for name in file.keys() if name in weights]  # noqa: SIM118
            step = max(1, len(common) // _MAX_COMPARED)
            results = [_is_equal(file.get_slice(name), weights[name]) for file, name in common[::-step]]
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return False
    return True in results and False not in results


def _is_equal(stored: Any, own: Tensor) -> bool | None:
    """Return whether one row of a stored matrix is equal to the model's; None if the shapes differ."""
    if list(stored.get_shape()) != list(own.shape):
        return None
    row = own.shape[0] // 2
    values = own[row].detach().cpu()
    return torch.equal(stored[row : row + 1][0].to(values.dtype), values)
