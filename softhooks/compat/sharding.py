"""Parameters that several processes hold in parts (FSDP2): how to see them whole, and what cannot be done with parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, distributed, nn

from softhooks.errors import UnsupportedModeError, UnsupportedModelError


class Prompt(Protocol):
    """A prompt on a model, as far as its parameters go."""

    @property
    def model(self) -> nn.Module:
        """The model, which holds the prompt's parameters."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters, by their names in the model."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of a tensor (a DTensor, whose module takes long to import)."""
    return hasattr(tensor, "full_tensor")


def shards(model: nn.Module) -> bool:
    """Whether a model is sharded, also while its parameters happen to be whole (after an evaluation)."""
    managed = any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__)
    return managed or any(map(is_sharded, model.parameters()))


def gather_again(model: nn.Module) -> None:
    """Have the weights of a sharded model's root whole: a forward within its own has put them back in parts when it ended."""
    unshard = getattr(model, "unshard", None)
    if unshard is not None and shards(model):
        unshard()


def full(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; every process must ask for it. Any other tensor is returned as it is."""
    if not is_sharded(tensor):
        return tensor
    parts: Any = tensor
    whole: Tensor = parts.to(parts.device_mesh.device_type).full_tensor()
    return whole


@contextmanager
def gathered(prompt: Prompt, state: Mapping[str, Tensor] | None = None) -> Iterator[bool]:
    """Let a prompt's sharded parameters be whole for a while, so that they can be written.

    Args:
        state: a full state dict of the model, where there is one; without it every process must enter. What it says is what is
            written: it may hold averaged values, for instance.

    Yields:
        whether this process is the one to write.
    """
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    writes = True
    try:
        for name, parameter in list(prompt.named_parameters()):
            given = None if state is None else state.get(name)
            if not is_sharded(parameter) and (given is None or given.data_ptr() == parameter.data_ptr()):
                continue
            if given is None:
                values, writes = full(parameter.detach()), distributed.get_rank() == 0
            else:
                values = given
            path, _, leaf = name.rpartition(".")
            module = prompt.model.get_submodule(path)
            swapped.append((module, leaf, parameter))
            module._parameters[leaf] = nn.Parameter(values.to(parameter.device))
        yield writes
    finally:
        for module, leaf, parameter in swapped:
            module._parameters[leaf] = parameter


def refuse_sharded(base: Iterable[Tensor]) -> None:
    """Refuse to run a prompt alone through a model whose weights come and go with each layer's forward.

    Raises:
        UnsupportedModeError: its keys and values would outlive the weights that their backward needs.
    """
    if distributed.is_available() and distributed.is_initialized() and any(map(is_sharded, base)):
        raise UnsupportedModeError(
            "a prompt that is computed once for all rows needs a model that is not sharded.",
            "Attach it with `injection='slots'`, before the model is sharded.",
            injection="'shared'",
            model="sharded (fully_shard)",
        )


def refuse_partitioned(model: nn.Module) -> None:
    """Refuse a model whose weights DeepSpeed (ZeRO stage 3) has taken apart: they are there within its own forwards only.

    Raises:
        UnsupportedModelError: naming a weight.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise UnsupportedModelError(
                "a soft prompt needs a model whose weights are there.",
                "Load the model without DeepSpeed; where it does not fit on one device, shard it with FSDP2.",
                weight=name,
                weights="taken apart by DeepSpeed (ZeRO stage 3)",
            )
