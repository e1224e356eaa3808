"""The handle of a prompt: the only owner of its state."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softhooks.anatomy import Role, Stack
from softhooks.errors import NotAttachedError, explain
from softhooks.frozen import FrozenReport
from softhooks.host import CONTAINER, Container, Host
from softhooks.inject.keyvalues import KeyValues, split
from softhooks.inject.shared import Memory, every_tensor, prefill
from softhooks.layout import Placement
from softhooks.method import EMBEDDINGS, Method, PromptEncoder, TableEncoder, groups_of

Injection = Literal["attention", "cache", "shared", "slots"]


class SoftPrompt:
    """A prompt on a model: the only owner of its state. Made by `attach` and `load`.

    Attributes:
        name: under which it is attached.
        method: the method's options.
        model: the model, as it was given.
        encoder: the module that is trained; part of the model while attached.
        heads: the prompt's own copies of the model's heads.
        injection: the way in: `attention`, `cache`, `shared` or `slots`.
        conventions: what the prompt takes for granted about the pass; stored with it.
    """

    def __init__(
        self, host: Host, name: str, method: Method, module: nn.ModuleDict, conventions: dict[str, Any]
    ) -> None:
        self.name = name
        self.method = method
        self.model = host.model
        self.conventions = conventions
        self.injection: Injection = "slots"
        self.is_attached = False
        self._host = host
        self._module = module
        self._memory: dict[str, Memory[dict[Role, KeyValues]]] = {}

    # --- what it holds ------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> PromptEncoder:
        """The module that makes the prompt."""
        encoder = self._module["encoder"]
        assert isinstance(encoder, PromptEncoder)
        return encoder

    @property
    def heads(self) -> nn.ModuleDict:
        """The prompt's own heads; a path's dots are slashes."""
        heads = self._module["heads"]
        assert isinstance(heads, nn.ModuleDict)
        return heads

    def head(self, key: str) -> nn.Module | None:
        """The prompt's own head in the place of one of the model's, if it has one."""
        return self.heads[key] if key in self.heads else None  # noqa: SIM401 - a ModuleDict has no get

    @property
    def placement(self) -> Placement:
        """Where virtual slots stand."""
        placement: Placement = self.conventions.get("placement", "front")
        return placement

    @property
    def host(self) -> Host:
        """What the model's prompts share."""
        return self._host

    @property
    def computed(self) -> int:
        """How often keys and values were computed; without gradients once, until something changes."""
        return sum(memory.computed for memory in self._memory.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trainable parameter, by its name in the model: the prompt's, its heads', and those kept trainable."""
        for name, parameter in self.model.named_parameters():
            mine = name.startswith(f"{CONTAINER}.{self.name}.")
            if parameter.requires_grad and (mine or not name.startswith(f"{CONTAINER}.")):
                yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trainable parameter, for an optimizer."""
        for _, parameter in self.named_parameters():
            yield parameter

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    # --- what a forward asks ------------------------------------------------------------------------------------------

    def embeddings(self) -> Tensor:
        """The prompt as embedding rows, [P, H]."""
        return self._encode(EMBEDDINGS)

    def key_values(self, stack: Stack) -> dict[Role, KeyValues]:
        """The prompt as keys and values for one stack, by role."""
        memory = self._memory.setdefault(stack.name, Memory())
        if self.method.enters == "embeddings":
            base = every_tensor(stack.module)
            return memory.recall(stack, self.encoder.parameters(), base, lambda: {"self": self._prefill(stack)})
        return memory.recall(stack, self.encoder.parameters(), (), lambda: self._split(stack))

    def _prefill(self, stack: Stack) -> KeyValues:
        return prefill(stack, self.embeddings(), self._host.placeholder)

    def _split(self, stack: Stack) -> dict[Role, KeyValues]:
        result: dict[Role, KeyValues] = {}
        for group, (owner, role) in groups_of(self._host.anatomy).items():
            if owner is stack:
                result[role] = split(self._encode(group), stack.sites_of(role))
                result[role].windowed = bool(self.conventions.get("windowed", True))
                result[role].shifted = bool(self.conventions.get("shift_positions", True))
        return result

    def _encode(self, group: str) -> Tensor:
        device = next(self.encoder.parameters()).device
        with torch.autocast(device.type, enabled=False):
            result: Tensor = self.encoder(group)
        return result

    # --- what a user asks ---------------------------------------------------------------------------------------------

    def fold(self) -> SoftPrompt:
        """Run the reparametrisation once and keep only its result; exact, and final."""
        device = next(self.encoder.parameters()).device
        trainable = any(parameter.requires_grad for parameter in self.encoder.parameters())
        folded = TableEncoder(self.encoder.folded()).to(device).requires_grad_(trainable)
        self._module["encoder"] = folded.train(self.encoder.training)
        self._memory.clear()
        return self

    def verify_frozen(self) -> FrozenReport:
        """Prove that every frozen parameter and buffer has the bits that it had at attach.

        Raises:
            FrozenModifiedError: naming what moved.
            NotAttachedError: the prompt was removed, or loaded without a record.
        """
        self._require_attached()
        if self._host.record is None:
            raise NotAttachedError(
                "no record of the frozen tensors was taken; load the prompt with `trainable=True` to take one."
            )
        return self._host.record.verify(self.model)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the prompt, folded, and its trained heads: `soft_prompt.json` and `soft_prompt.safetensors`."""
        from softhooks.checkpoint import save

        save(self, Path(save_directory))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload what `save_pretrained` writes; further arguments go to `huggingface_hub.HfApi.upload_folder`."""
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi()
            api.create_repo(repo_id, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)

    def remove(self) -> None:
        """Give the model back as it was before this prompt. Calling it again does nothing."""
        if self.is_attached:
            self.is_attached = False
            from softhooks.attach import detach

            detach(self._host, self.name)

    def _require_attached(self) -> None:
        if not self.is_attached:
            raise NotAttachedError(
                f"the prompt {self.name!r} has been removed from its model; attach or load it again."
            )

    def __enter__(self) -> SoftPrompt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = self.injection if self.is_attached else "removed"
        return f"SoftPrompt({self.name!r}, {self.method!r}, {state} on {type(self.model).__name__})"


# --- finding ----------------------------------------------------------------------------------------------------------


def host_of(model: nn.Module) -> Host | None:
    """The host of a model, if it carries a prompt; also through `torch.compile` and a wrapper's `module`."""
    for holder in (model, getattr(model, "_orig_mod", None), getattr(model, "module", None)):
        container = holder._modules.get(CONTAINER) if isinstance(holder, nn.Module) else None
        if isinstance(container, Container):
            return container.host
    return None


def require_host(model: nn.Module, name: str | None = None) -> Host:
    """The host of a model that must carry a prompt.

    Raises:
        NotAttachedError: it carries none, or none of that name.
    """
    host = host_of(model)
    if host is None:
        raise NotAttachedError(f"{type(model).__name__} carries no prompt; attach or load one first.")
    if name is not None and name not in host.prompts:
        raise NotAttachedError(
            explain(
                "a prompt must be attached before it is used.",
                "Load it under this name first.",
                asked=repr(name),
                attached=", ".join(map(repr, host.prompts)),
            )
        )
    return host
