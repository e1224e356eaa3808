"""Models whose parameters are sharded over processes (FSDP2, DeepSpeed): gather shards, and refuse unsupported uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, distributed, nn

from softhooks.errors import UnsupportedModeError, UnsupportedModelError
from softhooks.patching.patches import Patches


class Prompt(Protocol):
    """A prompt and the model that it is attached to."""

    @property
    def model(self) -> nn.Module:
        """The model, which contains the prompt's parameters."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the trainable parameters, by their names in the model."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of a tensor. `DTensor` itself is not imported, because that is slow."""
    return hasattr(tensor, "full_tensor")


def is_sharded_model(model: nn.Module) -> bool:
    """Whether a model is sharded, even if its parameters are currently gathered (after an evaluation)."""
    is_managed = any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__)
    return is_managed or any(map(is_sharded, model.parameters()))


def gather_root(model: nn.Module) -> None:
    """Gather the root weights of a sharded model again, after a nested forward has resharded them at its end."""
    unshard = getattr(model, "unshard", None)
    if unshard is not None and is_sharded_model(model):
        unshard()


def full(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, for which every process must make this call; return any other tensor unchanged."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    whole: Tensor = sharded.to(sharded.device_mesh.device_type).full_tensor()
    return whole


@contextmanager
def gathered(prompt: Prompt, state: Mapping[str, Tensor] | None = None) -> Iterator[bool]:
    """Replace a prompt's sharded parameters by full ones while the `with` block saves them.

    Args:
        state: a full state dict of the model with the values to save, such as averages. Without it, every process must enter
            the block.

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
                values, writes = full(parameter.detach()), distributed.get_rank() == 0
            else:
                values = given
            path, _, leaf = name.rpartition(".")
            parameters = prompt.model.get_submodule(path)._parameters
            patches.set(parameters, leaf, nn.Parameter(values.to(parameter.device)))
        yield writes


def refuse_sharded(base: Iterable[Tensor]) -> None:
    """Refuse to compute a prompt once for all rows with a model that gathers its weights layer by layer.

    Raises:
        UnsupportedModeError: the model is sharded, so the weights for the backward of the keys and values would be gone.
    """
    if distributed.is_available() and distributed.is_initialized() and any(map(is_sharded, base)):
        raise UnsupportedModeError(
            "injection='shared' computes the prompt once for all rows, which does not work in a sharded model (fully_shard).",
            "Attach the prompt with `injection='slots'`, before the model is sharded.",
        )


def refuse_partitioned(model: nn.Module) -> None:
    """Refuse a model whose weights DeepSpeed (ZeRO stage 3) has partitioned, so that they only exist during its forwards.

    Raises:
        UnsupportedModelError: the weights are partitioned; the error names one.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise UnsupportedModelError(
                f"the weights of {type(model).__name__} are partitioned by DeepSpeed (ZeRO stage 3).",
                "Load the model without DeepSpeed; if it does not fit on one device, shard it with FSDP2.",
                weight=name,
            )
