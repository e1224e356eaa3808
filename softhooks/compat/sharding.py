"""Models whose parameters are sharded across processes (FSDP2, DeepSpeed): gather parameters, and refuse unsupported uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, distributed, nn

from softhooks.errors import UnsupportedModeError, UnsupportedModelError
from softhooks.patching.patches import Patches


class _Prompt(Protocol):
    """The members of `SoftPrompt` that `gathered` uses."""

    @property
    def model(self) -> nn.Module: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of a tensor."""
    return hasattr(tensor, "full_tensor")  # importing `DTensor` for `isinstance` is slow


def is_sharded_model(model: nn.Module) -> bool:
    """Whether a model is sharded, even if its parameters are currently gathered."""
    is_managed = any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__)
    return is_managed or any(map(is_sharded, model.parameters()))


def gather_root(model: nn.Module) -> None:
    """Gather the weights of a sharded model's root module again, because a nested forward pass reshards them when it ends."""
    unshard = getattr(model, "unshard", None)
    if unshard is not None and is_sharded_model(model):
        unshard()


def full(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (every process must call this); return any other tensor unchanged."""
    sharded: Any = tensor
    return sharded.to(sharded.device_mesh.device_type).full_tensor() if is_sharded(tensor) else tensor


@contextmanager
def gathered(prompt: _Prompt, state: Mapping[str, Tensor] | None = None) -> Iterator[bool]:
    """Replace a prompt's sharded parameters with full ones while the `with` block saves them.

    Args:
        state: a full state dict of the model with the values to save (an average of weights, for example). Without it, every
            process must enter the block.

    Yields:
        whether this process writes the file.
    """
    writes = True
    with Patches() as patches:
        for name, parameter in list(prompt.named_parameters()):
            given = None if state is None else state.get(name)
            if not is_sharded(parameter) and (given is None or given.data_ptr() == parameter.data_ptr()):
                continue
            if given is None:
                given, writes = full(parameter.detach()), distributed.get_rank() == 0
            path, _, leaf = name.rpartition(".")
            parameters = prompt.model.get_submodule(path)._parameters
            patches.set(parameters, leaf, nn.Parameter(given.to(parameter.device)))
        yield writes


def refuse_sharded(base: Iterable[Tensor]) -> None:
    """Refuse to compute a prompt once for all rows in a sharded model, because the backward pass would lack the weights."""
    if distributed.is_available() and distributed.is_initialized() and any(map(is_sharded, base)):
        raise UnsupportedModeError(
            "injection='shared' computes the prompt once for all rows, which does not work in a sharded model (fully_shard).",
            "Attach the prompt with `injection='slots'`, before the model is sharded.",
        )


def refuse_partitioned(model: nn.Module) -> None:
    """Refuse a model whose weights are partitioned by DeepSpeed (ZeRO stage 3) and exist only during forward passes."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise UnsupportedModelError(
                f"the weights of {type(model).__name__} are partitioned by DeepSpeed (ZeRO stage 3).",
                "Load the model without DeepSpeed; if it does not fit on one device, shard it with FSDP2.",
                weight=name,
            )
