"""The handle of a prompt: the only owner of its state."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softhooks.backbone.container import is_prompt_key
from softhooks.backbone.entry_points import groups_of
from softhooks.backbone.module_walk import every_tensor
from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.backbone.stack import ModelStructure, Role, Stack
from softhooks.base_model.digest import FrozenReport
from softhooks.compat.sharding import gathered, refuse_sharded
from softhooks.constraint import unwatch
from softhooks.encoder import EMBEDDINGS, PromptEncoder
from softhooks.errors import NotAttachedError
from softhooks.inject.branch.branch import Branch, branch_of
from softhooks.inject.prefill import prefill
from softhooks.inject.prefix.key_values import KeyValues, split
from softhooks.inject.provenance import Snapshot, snapshot
from softhooks.inject.reuse import Memory
from softhooks.method import Method
from softhooks.runtime.added_tokens import ADDED, AddedTokens
from softhooks.runtime.label_names import Labels
from softhooks.runtime.prompted_model import PromptedModel
from softhooks.runtime.running import Held

Injection = Literal["attention", "written_out", "cache", "shared", "slots", "branch"]


class SoftPrompt:
    """A prompt on a model: the only owner of its state. Made by `attach` and `load`.

    Attributes:
        name: under which it is attached.
        method: the method's options.
        model: the model, as it was given.
        encoder: the module that is trained; part of the model while attached.
        heads: the prompt's own copies of the model's heads.
        layout: where its virtual tokens stand, if they stand among the text.
        labels: the names of its heads' labels, while the model's config does not show them.
        objective: what it trains on beside the model's own loss, if the method has one.
        injection: the way in: `attention`, `written_out`, `cache`, `shared`, `slots` or `branch`. A shared prompt stands in the
            sequence, as slots, for a call that brings more than a text (encoder states, token types, ...).
        shares_always: whether the prompt was attached with `injection='shared'`, and such calls are refused.
        takes_left_padding: whether rows may begin with padding; a model that counts padding would give them another answer.
        conventions: what the prompt takes for granted about the pass; stored with it.
    """

    def __init__(
        self, prompted: PromptedModel, name: str, method: Method, module: nn.ModuleDict, conventions: dict[str, Any]
    ) -> None:
        self.name = name
        self.method = method
        self.model = prompted.model
        self.conventions = conventions
        self.layout = method.where
        self.objective = method.objective()
        self.injection: Injection = "slots"
        self.shares_always = False
        self.takes_left_padding = True
        self.is_attached = False
        self.labels: Labels | None = None
        self._prompted = prompted
        self._module = module
        self._memory: dict[str, Memory[dict[Role, KeyValues]]] = {}
        self._branches: dict[str, Memory[Branch]] = {}
        self._snapshot: Snapshot | None = None
        self._stand_in: Callable[[Stack], dict[Role, KeyValues]] | None = None

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
    def added(self) -> AddedTokens | None:
        """The prompt's own rows of the vocabulary, if it trains some."""
        added = self._module._modules.get(ADDED)
        return added if isinstance(added, AddedTokens) else None

    def head(self, key: str) -> nn.Module | None:
        """The prompt's own head in the place of one of the model's, if it has one."""
        return self.heads[key] if key in self.heads else None  # noqa: SIM401 - a ModuleDict has no get

    @property
    def prompted_model(self) -> PromptedModel:
        """The state that all prompts of the model share."""
        return self._prompted

    @property
    def structure(self) -> ModelStructure:
        """The model's stacks, embeddings and attention layers."""
        return self._prompted.structure

    @property
    def placeholder_id(self) -> int:
        """An ordinary id of the vocabulary, for calls in which only the number of ids matters."""
        return self._prompted.placeholder

    def without_objective(self) -> Held:
        """Run the model inside the context without this prompt's objective."""
        return self._prompted.running.held("a run without objective", aside=True)

    @property
    def computed(self) -> int:
        """How often keys and values were computed: once a forward; once in all of a `generate` call, or inside `kept`."""
        return sum(memory.computed for kept in (self._memory, self._branches) for memory in kept.values())

    @property
    def placeholder(self) -> Tensor:
        """The ids behind its virtual tokens, [P]; which ones is of no matter where the model looks at embeddings alone."""
        own = self._module._buffers.get(BUFFER)
        if own is not None:
            return own
        count = self.method.num_virtual_tokens
        return torch.full((count,), self._prompted.placeholder, device=self.encoder.device)

    @property
    def stored_conventions(self) -> dict[str, Any]:
        """The conventions as a file holds them, with the ids behind virtual tokens where the model looks at them."""
        own = self._module._buffers.get(BUFFER)
        return dict(self.conventions) if own is None else {**self.conventions, BUFFER: own.tolist()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trainable parameter, by its name in the model: the prompt's, its heads', and those kept trainable."""
        for name, parameter in self.model.named_parameters():
            mine = is_prompt_key(name, self.name)
            if parameter.requires_grad and (mine or not is_prompt_key(name)):
                yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trainable parameter, for an optimizer."""
        for _, parameter in self.named_parameters():
            yield parameter

    @property
    def num_parameters(self) -> int:
        """How many parameters the prompt has, trainable or not: its own, its heads', and those of the base that train.

        A prompt that was loaded to be used has those of the folded prompt: the MLP or LSTM that made it is gone.
        """
        own = sum(p.numel() for p in self.encoder.parameters()) or sum(
            t.numel() for t in self.encoder.folded().values()
        )
        beside = [p for n, p in self.model.named_parameters() if p.requires_grad and not is_prompt_key(n)]
        beside += [*self.heads.parameters(), *(self.added.parameters() if self.added else ())]
        return own + sum(parameter.numel() for parameter in beside)

    # --- what a forward asks ------------------------------------------------------------------------------------------

    def embeddings(self, variant: int = 0) -> Tensor:
        """The prompt as embedding rows, [P, H]."""
        return self._encode(EMBEDDINGS, variant)

    def key_values(self, stack: Stack, variants: tuple[int, ...] = (0,)) -> dict[Role, KeyValues]:
        """The prompt, in some of its variants, as keys and values for one stack, by role.

        Raises:
            UnsupportedModeError: another thread runs the model.
        """
        with self._prompted.running.held("a prompt's own rows"):
            found = self._key_values(stack, variants)
        forward = self._prompted.running.forward
        if forward is not None:
            forward.prefilled[id(self)] = found
        return found

    def _key_values(self, stack: Stack, variants: tuple[int, ...]) -> dict[Role, KeyValues]:
        if self._stand_in is not None:
            return self._stand_in(stack)
        memory = self._memory.setdefault(stack.name, Memory())
        base = every_tensor(stack.module) if self.method.enters == "embeddings" else ()
        refuse_sharded(base)
        ids = self._module._buffers.get(BUFFER)
        own = [*every_tensor(self.encoder), *(() if ids is None else (ids,))]
        return memory.recall(stack, own, base, lambda: self._compute(stack, variants), variants)

    @contextmanager
    def standing_in(self, key_values: Callable[[Stack], dict[Role, KeyValues]]) -> Iterator[None]:
        """Let other keys and values, of any length, stand in the prompt's place: a teacher's, for an objective."""
        outer, self._stand_in = self._stand_in, key_values
        try:
            yield
        finally:
            self._stand_in = outer

    def branch(self, stack: Stack, context: Tensor | None, rows: tuple[int, ...] | None = None) -> Branch:
        """The prompt as a gated branch for one stack.

        Args:
            context: each row's own, for the whole batch.
            rows: the rows of the batch that the prompt serves; None: all.

        Raises:
            UnsupportedModeError: another thread runs the model.
        """
        memory = self._branches.setdefault(stack.name, Memory())
        own = [*every_tensor(self.encoder), *(() if context is None else (context,))]
        base = [tensor for site in self.method.sites(stack, "self") for tensor in every_tensor(site.module)]
        with self._prompted.running.held("a prompt's own rows"):
            return memory.recall(stack, own, base, lambda: self._branch(stack, context, rows), (context is None, rows))

    def _branch(self, stack: Stack, context: Tensor | None, rows: tuple[int, ...] | None) -> Branch:
        if context is not None and rows is not None:
            context = context[list(rows)]
        return branch_of(self.method.branch_given(self._encode, stack, context))

    @property
    def states(self) -> Tensor | None:
        """The virtual tokens' own last states in the forward that is under way, [R, P, H], where they were run alone."""
        forward = self._prompted.running.forward
        kept = None if forward is None else forward.prefilled.get(id(self), {}).get("self")
        return None if kept is None else kept.states

    def snapshot(self) -> Snapshot:
        """The prompt's state now; the same object while nothing changes."""
        self._snapshot = snapshot(self, self._snapshot)
        return self._snapshot

    def _compute(self, stack: Stack, variants: tuple[int, ...]) -> dict[Role, KeyValues]:
        if self.method.enters == "embeddings":
            rows = torch.stack([self.embeddings(variant) for variant in variants])
            return {"self": prefill(stack, rows, self.placeholder)}
        result: dict[Role, KeyValues] = {}
        for group, (owner, role) in groups_of(self._prompted.structure).items():
            if owner is stack:
                result[role] = split(self._encode(group), self.method.sites(stack, role))
                result[role].windowed = bool(self.conventions.get("windowed", True))
                result[role].shifted = bool(self.conventions.get("shift_positions", True))
        return result

    def _encode(self, group: str, variant: int = 0) -> Tensor:
        device = self.encoder.device
        with torch.autocast(device.type, enabled=False):
            result: Tensor = self.encoder(group, variant)
        return result

    # --- what a user asks ---------------------------------------------------------------------------------------------

    def fold(self) -> SoftPrompt:
        """Run the reparameterization once and keep only its result; exact, and final.

        Raises:
            UnsupportedModeError: another thread runs the model.
        """
        with self._prompted.running.held("`fold`"):
            self._fold()
        return self

    def _fold(self) -> None:
        device = self.encoder.device
        trainable = any(parameter.requires_grad for parameter in self.encoder.parameters())
        folded = self.method.folded_encoder(self.encoder.folded()).to(device).requires_grad_(trainable)
        unwatch(self.encoder)
        self._module["encoder"] = folded.train(self.encoder.training)
        self._memory.clear()
        self._branches.clear()

    def verify_frozen(self) -> FrozenReport:
        """Prove that every frozen parameter and buffer has the bits that it had at attach.

        Raises:
            FrozenModifiedError: naming what moved.
            NotAttachedError: the prompt was removed, or loaded without a record.
        """
        self._require_attached()
        if self._prompted.record is None:
            raise NotAttachedError(
                "no record of the frozen tensors was taken; load the prompt with `trainable=True` to take one."
            )
        return self._prompted.record.verify(self.model)

    def save_pretrained(self, save_directory: str | Path, *, as_peft: bool = False) -> None:
        """Write the prompt, folded, and its trained heads: `soft_prompt.json` and `soft_prompt.safetensors`.

        In a sharded model every rank must call this; the first one writes.

        Args:
            save_directory: where to; made if it is not there.
            as_peft: write an adapter that PEFT loads instead, where PEFT computes the same.

        Raises:
            UnsupportedMethodError: PEFT has nothing that computes the same.
        """
        from softhooks.formats import peft_write
        from softhooks.load import save

        write = peft_write.write if as_peft else save
        with gathered(self) as writes:
            if writes:
                write(self, Path(save_directory))

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Upload what `save_pretrained` writes.

        Args:
            repo_id: the repository; made if it is not there.
            private: make it a private one.
            token: as in `huggingface_hub`.
            kwargs: for `huggingface_hub.HfApi.upload_folder`: `commit_message`, `revision`, `create_pr`, ...
        """
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi() if token is None else HfApi(token=token)
            about: dict[str, Any] = {} if private is None else {"private": private}
            api.create_repo(repo_id, exist_ok=True, **about)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)

    def remove(self) -> None:
        """Give the model back as it was before this prompt. Calling it again does nothing.

        Raises:
            UnsupportedModeError: another thread runs the model.
        """
        with self._prompted.running.held("`remove`"):
            if self.is_attached:
                self.is_attached = False
                from softhooks.attach import detach

                detach(self._prompted, self.name)

    def __copy__(self) -> SoftPrompt:
        """Return the same: a second handle of the same state would not know what the first has done."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has, its model among it; what forwards have computed stays behind."""
        return self.__dict__ | {"_memory": {}, "_branches": {}, "_stand_in": None}

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
