"""Checkpoints of modules that contain a prompted model, such as a LightningModule with its own head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from softhooks.errors import TrainerError
from softhooks.integration_support.checkpoints import CONTAINER, CheckpointSaver, is_prompt_key, live_tensors, saver_of
from softhooks.prompt import SoftPrompt


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of DDP and `torch.compile`."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, nn.parallel.DistributedDataParallel):
            inner = module.module
        if inner is None:
            return module
        module = inner


def find_model(module: nn.Module, attribute: str | None) -> str:
    """Return `attribute`, or the path of the only transformers model in the module if `attribute` is None.

    Raises:
        TrainerError: there is no such submodule, or the module does not have exactly one transformers model.
    """
    if attribute is not None:
        try:
            module.get_submodule(attribute)
        except AttributeError as error:
            raise TrainerError(
                f"{type(module).__name__} has no submodule {attribute!r}, which was given as `attribute=`: {error}",
                "Create the model in `__init__`; `configure_model` and the module's own `setup` run too late.",
            ) from error
        return attribute
    found: list[str] = []
    for path, part in module.named_modules():
        is_model = isinstance(part, PreTrainedModel) or hasattr(part, "get_base_model")
        if path and is_model and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    if len(found) == 1:
        return found[0]
    raise TrainerError(
        f"{type(module).__name__} has {len(found)} transformers models; without `attribute=`, exactly one is needed.",
        "Create the model in `__init__`; if there are several models, choose one with `attribute=`.",
        models=", ".join(found) or "none",
    )


def holds(module: nn.Module, prompted: nn.Module) -> bool:
    """Return whether a module is the prompted model or contains it."""
    return any(part is prompted for part in module.modules())


def outer_tensors(module: nn.Module, prompted: nn.Module) -> dict[str, Tensor]:
    """Return the entries of a module's state dict that do not belong to the prompted model.

    Raises:
        TrainerError: an entry is not a tensor (`get_extra_state`), or the module does not contain the model.
    """
    path = next((path for path, part in module.named_modules() if part is prompted), None)
    if path is None:
        raise TrainerError(
            f"{type(module).__name__} no longer contains the {type(prompted).__name__} with the prompt.",
            "Attach the prompt to the model that the module contains now.",
        )
    state: dict[str, Any] = module.state_dict() if path else {}
    found = {name: value for name, value in state.items() if not name.startswith(f"{path}.")}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise TrainerError(
                f"{name} in the state dict of {type(module).__name__} is of type {type(value).__name__}; only tensors can be "
                "saved."
            )
    return found


def require_same(stored: dict[str, Tensor], present: dict[str, Tensor]) -> None:
    """Check that a checkpoint and a module have the same tensors, by name and shape, outside the prompted model."""
    shapes = [{name: list(tensor.shape) for name, tensor in tensors.items()} for tensors in (stored, present)]
    if shapes[0] != shapes[1]:
        raise TrainerError(
            "the checkpoint and the module hold different tensors outside the prompted model; names and shapes must match.",
            "Load the checkpoint into the module that it was saved from.",
            checkpoint=shapes[0] or "nothing",
            module=shapes[1] or "nothing",
        )


class OuterModule:
    """A module with a prompted model inside it; its checkpoints do not contain the frozen base of that model."""

    def __init__(self, prompt: SoftPrompt, module: nn.Module, path: str) -> None:
        self.prompt = prompt
        self.module = module
        self._prefix = f"{path}."
        self.saver = CheckpointSaver(prompt, self)
        self.saver.writes_checkpoints = False
        self._handles = [
            module.register_load_state_dict_pre_hook(self._check),
            module.register_load_state_dict_post_hook(self._allow_missing_base),
        ]
        prompt.prompted_model.patches.keep(self)

    @classmethod
    def of(cls, prompt: SoftPrompt, module: nn.Module, path: str) -> OuterModule:
        """Return the OuterModule of a prompt and a module; the first call creates it."""
        saver = saver_of(prompt.model)
        known = None if saver is None or saver.prompt is not prompt else saver.owner
        if isinstance(known, OuterModule):
            if known.module is module:
                return known
            known.remove()
        return cls(prompt, module, path)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _base_names(self) -> set[str]:
        """Return the names of the frozen base's tensors in the module; a tensor that is used twice has two names."""
        model, live = self.prompt.model, live_tensors(self.prompt)
        named = (*model.named_parameters(), *model.named_buffers())
        base = {id(t) for name, t in named if name not in live and not is_prompt_key(name)}
        return {name for name, value in self.module.state_dict(keep_vars=True).items() if id(value) in base}

    def prune(self, state: dict[str, Any]) -> dict[str, Any]:
        """Remove the base from a state dict of the module, and add a description that identifies the run."""
        base_names = self._base_names()
        kept = {name: value for name, value in state.items() if name not in base_names}
        return kept | {f"{self._prefix}{name}": value for name, value in self.saver.state().items()}

    def _check(self, _module: nn.Module, state: dict[str, Any], prefix: str, _meta: Any, strict: bool, *_: Any) -> None:
        """Check before loading that a state dict belongs to this prompt and base."""
        if prefix or not self.prompt.is_attached:
            return
        own = f"{self._prefix}{CONTAINER}."
        others = {f"{own}{name}." for name in self.prompt.prompted_model.prompts if name != self.prompt.name}
        # other prompts are checked by their own OuterModule
        mine = [key for key in state if key.startswith(self._prefix) and not any(map(key.startswith, others))]
        if any(key.startswith(own) for key in mine):
            inner = {key.removeprefix(self._prefix): state[key] for key in mine}
            self.saver.check(inner)
            for key in mine:
                if key.removeprefix(self._prefix) not in inner:
                    del state[key]  # removes the description
        elif strict or self._base_names() & set(state):
            raise TrainerError(
                f"the checkpoint lacks the prompt {self.prompt.name!r} of {type(self.module).__name__}.{self._prefix[:-1]}.",
                "If the checkpoint was saved without a prompt, load it before you attach the prompt.",
                checkpoint=f"{len(state)} tensors, none of which belong to a prompt",
            )

    def _allow_missing_base(self, _module: nn.Module, incompatible: Any) -> None:
        """Allow only the base to be missing from a checkpoint."""
        if self.prompt.is_attached:
            base_names = self._base_names()
            incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in base_names]
