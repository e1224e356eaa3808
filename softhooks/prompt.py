"""The lifecycle of a prompt: attach, the handle, remove. Check everything, then change the model; undo all of it on any error."""

from __future__ import annotations

import fnmatch
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softhooks.anatomy import Anatomy, Role, Stack, at_rest, examine
from softhooks.errors import (
    AttachError,
    NameTakenError,
    NotAttachedError,
    PromptTooLongError,
    UnsupportedMethodError,
    explain,
)
from softhooks.fit import choose_injection
from softhooks.frozen import FrozenRecord, FrozenReport
from softhooks.heads import check_heads, copy_heads, find_heads
from softhooks.host import CONTAINER, Container, Host
from softhooks.inject.keyvalues import KeyValues, split
from softhooks.inject.shared import Memory, prefill
from softhooks.layout import Placement
from softhooks.method import EMBEDDINGS, Method, PromptEncoder, TableEncoder, check_tables, groups_of

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

    def __init__(self, host: Host, name: str, method: Method, module: nn.ModuleDict, conventions: dict[str, Any]) -> None:
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
            tensors = [*self.encoder.parameters(), *stack.module.parameters(), *stack.module.buffers()]
            return memory.recall(stack, tensors, lambda: {"self": self._prefill(stack)})
        return memory.recall(stack, list(self.encoder.parameters()), lambda: self._split(stack))

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
            _detach(self._host, self.name)

    def _require_attached(self) -> None:
        if not self.is_attached:
            raise NotAttachedError(f"the prompt {self.name!r} has been removed from its model; attach or load it again.")

    def __enter__(self) -> SoftPrompt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = self.injection if self.is_attached else "removed"
        return f"SoftPrompt({self.name!r}, {self.method!r}, {state} on {type(self.model).__name__})"


def attach(
    model: nn.Module,
    method: Method,
    name: str = "default",
    *,
    train_head: bool = True,
    trainable: str | Sequence[str] = (),
    freeze_dropout: bool = False,
    injection: Injection | None = None,
) -> SoftPrompt:
    """Attach a soft prompt to a model and freeze everything else.

    The new prompt is on; another one attached before is off until `activate`, `rows`, or until this one is removed.

    Args:
        model: any transformers model that embeds tokens, also one that carries LoRA from PEFT.
        method: what to attach.
        name: under which; several prompts may stand on one model.
        train_head: train a copy of a new task head (`score`, `classifier`, `qa_outputs`, ...) with the prompt.
        trainable: patterns (`*lora_*`) of the names of other parameters that stay trainable.
        freeze_dropout: keep the backbone's dropout off while it trains.
        injection: the way in; None lets a check at attach choose the fastest that is exact.

    Returns:
        the handle; also a context manager that removes the prompt.

    Raises:
        AttachError: the prompt cannot be attached. The model is as it was.
        OptionError, PromptMismatchError: the method's options do not fit the model.
    """
    return attach_encoder(
        model,
        method,
        name,
        encoder=None,
        conventions=None,
        head_states=None if train_head else {},
        source="given",
        trainable=(trainable,) if isinstance(trainable, str) else tuple(trainable),
        freeze_dropout=freeze_dropout,
        injection=injection,
        frozen_record=True,
    )


def attach_encoder(
    model: nn.Module,
    method: Method,
    name: str,
    *,
    encoder: PromptEncoder | None,
    conventions: dict[str, Any] | None,
    head_states: dict[str, dict[str, Tensor]] | None,
    source: str,
    freeze_dropout: bool,
    injection: Injection | None,
    frozen_record: bool,
    trainable: tuple[str, ...] = (),
) -> SoftPrompt:
    """Attach an encoder that exists already, or the one that the method builds. See `attach`.

    Args:
        head_states: the heads that come with the encoder; None: copies of every new head of the model.
        source: what to call the encoder in errors.
        frozen_record: take the digests that `verify_frozen` compares with.
    """
    present = host_of(model)
    _check_request(model, method, name, present, trainable)
    anatomy = present.anatomy if present else examine(model)
    _check_length(anatomy, method)
    if isinstance(encoder, TableEncoder):
        check_tables(anatomy, {group: encoder(group) for group in encoder.groups}, source)
    if encoder is None:
        with _all_off(present):
            encoder = method.build(anatomy)
    conventions = method.conventions(anatomy) if conventions is None else conventions
    module = nn.ModuleDict({"encoder": encoder, "heads": nn.ModuleDict()})
    heads = find_heads(model, anatomy)
    if head_states is not None:
        heads = {path: head for path, head in heads.items() if path in head_states}
    module["heads"] = own = copy_heads(heads)
    check_heads(own, head_states or {}, source)
    module.to(next(anatomy.entry.embedding.parameters()).device).train(model.training)

    host = present or Host(model, anatomy)
    prompt = SoftPrompt(host, name, method, module, conventions)
    before = host.active
    try:
        if present is None:
            _open(host, trainable, frozen_record)
        elif frozen_record and host.record is None:
            host.record = FrozenRecord(model, _frozen_names(model))
        _add(host, prompt, heads, freeze_dropout)
        prompt.injection = choose_injection(prompt, injection)
        _prove_reached(prompt)
    except BaseException:
        _detach(host, name)
        host.active = before
        raise
    prompt.is_attached = True
    return prompt


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_request(
    model: nn.Module, method: Method, name: str, present: Host | None, trainable: tuple[str, ...]
) -> None:
    if not isinstance(method, Method):
        raise UnsupportedMethodError(f"attach takes a method such as PromptTuning(20); it was given {type(method).__name__}.")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name) or name in ("training", "host"):
        raise AttachError(f"a prompt's name must be letters, digits, - and _, and no module attribute; it is {name!r}.")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise AttachError("attach a prompt before `torch.compile`: compiled code does not see hooks that come later.")
    if present and name in present.prompts:
        raise NameTakenError(
            explain(
                "a name belongs to one prompt.",
                "Remove the other prompt first, or attach this one under another `name=`.",
                attached=f"{name!r}: {present.prompts[name].method!r}",
                asked=f"{name!r}: {method!r}",
            )
        )
    if present is None and hasattr(model, CONTAINER):
        raise AttachError(f"the model has an attribute {CONTAINER!r} of its own; softhooks needs that name.")
    names = [parameter for parameter, _ in model.named_parameters()]
    for pattern in trainable:
        if not fnmatch.filter(names, pattern):
            raise AttachError(f"trainable={pattern!r} names no parameter of {type(model).__name__}.")


def _check_length(anatomy: Anatomy, method: Method) -> None:
    positions = anatomy.entry.positions
    limit = positions.limit if positions.limit is not None else positions.trained
    if limit is not None and method.num_virtual_tokens >= limit:
        raise PromptTooLongError(
            explain(
                "a prompt must leave room for text among the model's positions.",
                "Use a shorter prompt.",
                prompt=method.num_virtual_tokens,
                positions=limit,
            )
        )


def _prove_reached(prompt: SoftPrompt) -> None:
    """Run a probe; the hooks raise if it goes by without the prompt."""
    from softhooks.fit import probe_inputs

    with at_rest(prompt.model):
        prompt.model(**probe_inputs(prompt.model, prompt.host.anatomy))


# --- changes ----------------------------------------------------------------------------------------------------------


class _all_off:
    """Turn a model's prompts off while its own keys and values are read."""

    def __init__(self, host: Host | None) -> None:
        self.host = host

    def __enter__(self) -> None:
        if self.host:
            self.host.disabled += 1

    def __exit__(self, *_error: object) -> None:
        if self.host:
            self.host.disabled -= 1


def _frozen_names(model: nn.Module) -> Any:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return lambda name: name not in trained and not name.startswith(f"{CONTAINER}.")


def _open(host: Host, trainable: tuple[str, ...], frozen_record: bool) -> None:
    """Freeze the model, put the container in, register the hooks."""
    model = host.model
    for name, parameter in model.named_parameters():
        host.was_trainable[name] = parameter.requires_grad
    container = Container()
    container.host = host
    container.training = model.training
    model.add_module(CONTAINER, container)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatch(name, pattern) for pattern in trainable))
    if frozen_record:
        host.record = FrozenRecord(model, _frozen_names(model))
    host.install()


def _add(host: Host, prompt: SoftPrompt, heads: dict[str, nn.Module], freeze_dropout: bool) -> None:
    container: Container = getattr(host.model, CONTAINER)
    container[prompt.name] = prompt._module
    host.prompts[prompt.name] = prompt
    host.active = prompt.name
    host.freeze_dropout = host.freeze_dropout or freeze_dropout
    for path in heads:
        host.add_head(path)


def _detach(host: Host, name: str) -> None:
    """Take one prompt away; with the last one, everything. The prompt attached before it is on again."""
    model = host.model
    container = model._modules.get(CONTAINER)
    host.prompts.pop(name, None)
    if isinstance(container, Container) and name in container:
        del container[name]
    if host.active == name:
        host.active = next(reversed(host.prompts), None)
    if host.prompts:
        return
    host.uninstall()
    model._modules.pop(CONTAINER, None)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in host.was_trainable:
            parameter.requires_grad_(host.was_trainable[parameter_name])


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

