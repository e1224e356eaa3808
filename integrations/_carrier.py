"""A module that holds the prompted model among other things: a head of one's own, a second network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from softhooks.errors import TrainerError
from softhooks.integration_support.checkpoints import CONTAINER, CheckpointSaver, is_prompt_key, live_tensors, saver_of
from softhooks.prompt import SoftPrompt


def bare(module: nn.Module) -> nn.Module:
    """A module without the wrappers of DDP and `torch.compile`."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, nn.parallel.DistributedDataParallel):
            inner = module.module
        if inner is None:
            return module
        module = inner


def find_model(module: nn.Module, attribute: str | None) -> str:
    """The path of the model that a prompt goes to: what `attribute` names, or the only transformers model there is.

    Raises:
        TrainerError: there is none, or there are several.
    """
    if attribute is not None:
        try:
            module.get_submodule(attribute)
        except AttributeError as error:
            made = "a model that `configure_model` or the module's own `setup` makes comes too late"
            raise TrainerError(
                f"attribute={attribute!r} must name a submodule made in `__init__` ({made}): {error}"
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
        "a module's prompt goes to its only transformers model, made in `__init__`.",
        "Say which with `attribute=`.",
        module=type(module).__name__,
        models=", ".join(found) or "none",
    )


def holds(module: nn.Module, prompted: nn.Module) -> bool:
    """Whether a module is the prompted model, or has it among its own."""
    return any(part is prompted for part in module.modules())


def around(module: nn.Module, prompted: nn.Module) -> dict[str, Tensor]:
    """What a module holds beside the prompted model, by name.

    Raises:
        TrainerError: some of it is no tensor (`get_extra_state`).
    """
    path = next((path for path, part in module.named_modules() if part is prompted), None)
    if path is None:
        raise TrainerError(
            "a module must hold the model whose prompt it saves.",
            "Attach the prompt to the model that the module has now.",
            module=type(module).__name__,
            prompted=f"another {type(prompted).__name__}",
        )
    state: dict[str, Any] = module.state_dict() if path else {}
    found = {name: value for name, value in state.items() if not name.startswith(f"{path}.")}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise TrainerError(
                f"what stands around a prompted model must be tensors, to be saved; {name} is {type(value).__name__}."
            )
    return found


def require_same(stored: dict[str, Tensor], present: dict[str, Tensor]) -> None:
    """Compare what a checkpoint holds beside the prompt with what is there.

    Raises:
        TrainerError: names or shapes differ.
    """
    shapes = [{name: list(tensor.shape) for name, tensor in tensors.items()} for tensors in (stored, present)]
    if shapes[0] != shapes[1]:
        raise TrainerError(
            "a checkpoint must hold what stands around the prompted model, name by name and shape by shape.",
            "Load it into the module that it was saved from.",
            checkpoint=shapes[0] or "nothing",
            module=shapes[1] or "nothing",
        )


class Carrier:
    """What a module's checkpoints hold of the prompted model among its own: the prompt, and not the base.

    Attributes:
        prompt: the prompt.
        saver: what its model saves and accepts.
    """

    def __init__(self, prompt: SoftPrompt, module: nn.Module, path: str) -> None:
        self.prompt = prompt
        self.module = module
        self._prefix = f"{path}."
        self.saver = CheckpointSaver(prompt, self)
        self.saver.writes_checkpoints = False
        self._handles = [
            module.register_load_state_dict_pre_hook(self._check),
            module.register_load_state_dict_post_hook(self._excuse),
        ]
        prompt.prompted_model.patches.keep(self)

    @classmethod
    def of(cls, prompt: SoftPrompt, module: nn.Module, path: str) -> Carrier:
        """The carrier of a prompt in a module; made if it is not there."""
        saver = saver_of(prompt.model)
        known = None if saver is None or saver.prompt is not prompt else saver.owner
        if isinstance(known, Carrier):
            if known.module is module:
                return known
            known.remove()
        return cls(prompt, module, path)

    def remove(self) -> None:
        """Let the module load as it did."""
        for handle in self._handles:
            handle.remove()

    def _left_out(self) -> set[str]:
        """The names of all that is the frozen base's, wherever the module has it."""
        model, live = self.prompt.model, live_tensors(self.prompt)
        named = (*model.named_parameters(), *model.named_buffers())
        base = {id(t) for name, t in named if name not in live and not is_prompt_key(name)}
        return {name for name, value in self.module.state_dict(keep_vars=True).items() if id(value) in base}

    def prune(self, state: dict[str, Any]) -> dict[str, Any]:
        """A module's state dict without the base, and with a description."""
        left_out = self._left_out()
        kept = {name: value for name, value in state.items() if name not in left_out}
        return kept | {f"{self._prefix}{name}": value for name, value in self.saver.state().items()}

    def _check(self, _module: nn.Module, state: dict[str, Any], prefix: str, _meta: Any, strict: bool, *_: Any) -> None:
        """Refuse a state dict of another prompt or base before any of it is loaded."""
        if prefix or not self.prompt.is_attached:
            return
        own = f"{self._prefix}{CONTAINER}."
        others = {f"{own}{name}." for name in self.prompt.prompted_model.prompts if name != self.prompt.name}
        mine = [key for key in state if key.startswith(self._prefix) and not any(map(key.startswith, others))]
        if any(key.startswith(own) for key in mine):
            inner = {key.removeprefix(self._prefix): state[key] for key in mine}
            self.saver.check(inner)
            for key in mine:
                if key.removeprefix(self._prefix) not in inner:
                    del state[key]  # the description
        elif strict or self._left_out() & set(state):
            raise TrainerError(
                "a module that carries a prompt loads checkpoints that hold it.",
                "Load a model's own weights before the prompt is attached.",
                module=f"{type(self.module).__name__}, {self.prompt.name!r} on {self._prefix[:-1]!r}",
                checkpoint=f"{len(state)} tensors, none of them the prompt's",
            )

    def _excuse(self, _module: nn.Module, incompatible: Any) -> None:
        """Let the base be missing, and nothing else."""
        if self.prompt.is_attached:
            left_out = self._left_out()
            incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in left_out]
