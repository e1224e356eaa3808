"""`SoftPrompt`, the object that `attach` and `load` return."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from softhooks.backbone.added_vocabulary import log_unsaved_rows
from softhooks.backbone.container import is_prompt_key
from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.base_model.fingerprint import Fingerprint
from softhooks.base_model.frozen_record import FrozenReport
from softhooks.base_model.info import BaseModelInfo
from softhooks.base_model.take_fingerprint import take_fingerprint, without_rows
from softhooks.compat.peft import path_in_wrapper
from softhooks.compat.sharding import gathered, is_sharded_model
from softhooks.constraint import unwatch
from softhooks.errors import NotAttachedError, UnsupportedMethodError
from softhooks.formats import peft_write, softhooks_files
from softhooks.formats.hub_commit import HubCommit
from softhooks.formats.stored import StoredPrompt, outline
from softhooks.method import Method
from softhooks.model_card.card import CardFacts, FrozenProof
from softhooks.model_card.training_run import TrainingRun
from softhooks.runtime.attached_prompt import AttachedPrompt
from softhooks.runtime.install import detach
from softhooks.runtime.plot import plot_tables
from softhooks.runtime.prompted_model import PromptedModel
from softhooks.runtime.slot_statistics import slot_tables
from softhooks.runtime.summary import PromptSummary, summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class SoftPrompt(AttachedPrompt):
    """A prompt on a model, as returned by `attach` and `load`.

    Attributes:
        name: the name of the prompt on the model.
        method: the method with its options.
        model: the model that the user passed.
        encoder: the module that computes the prompt; a submodule of the model while the prompt is attached.
        heads: the prompt's own copies of the model's heads.
        injection: how the prompt enters the model: as slots in the sequence (`slots`), as keys and values (`attention`,
            `written_out`, `cache`, `shared`) or as a gated branch (`branch`).
        conventions: the assumptions about the forward pass that are saved with the prompt.
        is_attached: whether the prompt is still attached.
        loaded_from: the commit on the Hub that the prompt, or the prompt that it was trained from, was loaded from; None if it
            was never on the Hub.
        training_run: the facts about its training, for the model card; set by `SoftPromptCallback`.
    """

    def __init__(
        self, prompted: PromptedModel, name: str, method: Method, module: nn.ModuleDict, conventions: dict[str, Any]
    ) -> None:
        super().__init__(
            name,
            method,
            module,
            conventions,
            model=prompted.model,
            structure=prompted.structure,
            running=prompted.running,
            placeholder_id=prompted.placeholder_id,
        )
        self.prompted_model = prompted
        self.is_attached = False
        self.loaded_from: HubCommit | None = None
        self.training_run: TrainingRun | None = None

    @property
    def stored_conventions(self) -> dict[str, Any]:
        """The conventions to save, including the token ids of the virtual tokens if the model needs ids."""
        own = self.module._buffers.get(BUFFER)
        return dict(self.conventions) if own is None else {**self.conventions, BUFFER: own.tolist()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each trainable parameter of the prompt, its heads and the base model, with the parameter's name in the model."""
        for name, parameter in self.model.named_parameters():
            mine = is_prompt_key(name, self.name)
            if parameter.requires_grad and (mine or not is_prompt_key(name)):
                yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every trainable parameter, for an optimizer."""
        for _, parameter in self.named_parameters():
            yield parameter

    @property
    def num_parameters(self) -> int:
        """The number of trainable parameters of the prompt, its heads and the base model.

        A prompt that was loaded without `trainable=True` is folded, so an MLP or LSTM of its encoder is not counted.
        """
        own = sum(p.numel() for p in self.encoder.parameters()) or sum(
            t.numel() for t in self.encoder.folded().values()
        )
        others = [p for n, p in self.model.named_parameters() if p.requires_grad and not is_prompt_key(n)]
        others += [*self.heads.parameters(), *(self.added.parameters() if self.added else ())]
        return own + sum(parameter.numel() for parameter in others)

    def summary(self) -> PromptSummary:
        """Return the prompt's size, how it enters the model, and what is refused with it; `print` shows a table.

        Raises:
            NotAttachedError: the prompt was removed.
        """
        refusal = None
        try:
            peft_write.adapter_of(self.to_stored(), self.model, self.prompted_model.structure)
        except UnsupportedMethodError as error:
            refusal = error
        return summarize(self, self.num_parameters, refusal)

    def plot(self) -> Figure:
        """Plot the norm of each virtual token, and the cosine similarities between virtual tokens.

        Returns:
            a figure of matplotlib, which a notebook shows; save it with `figure.savefig(path)`.

        Raises:
            SoftHooksError: matplotlib is not installed.
        """
        tables = slot_tables(self.encoder.folded(), self.method.num_virtual_tokens)
        return plot_tables(tables or self.encoder.folded(), f"{self.name}: {self.method}")

    def fold(self) -> SoftPrompt:
        """Replace the prompt's reparameterization, such as an MLP, with its output. This cannot be undone.

        Waits until no other thread is running the model.
        """
        with self.running.exclusive("`fold`"):
            device = self.encoder.device
            trainable = any(parameter.requires_grad for parameter in self.encoder.parameters())
            folded = self.method.folded_encoder(self.encoder.folded()).to(device).requires_grad_(trainable)
            unwatch(self.encoder)
            self.module["encoder"] = folded.train(self.encoder.training)
            self._memory.clear()
            self._branches.clear()
        return self

    def verify_frozen(self) -> FrozenReport:
        """Check that every frozen parameter and buffer is bit-identical to its state when the prompt was attached.

        Raises:
            FrozenModifiedError: a tensor has changed; the error names it.
            NotAttachedError: the prompt was removed, or was loaded without `trainable=True`.
        """
        self._require_attached()
        if self.prompted_model.record is None:
            raise NotAttachedError(
                "the prompt was loaded without a record of the frozen tensors; load it with `trainable=True` to record them."
            )
        return self.prompted_model.record.verify(self.model)

    def save_pretrained(self, save_directory: str | Path, *, as_peft: bool = False) -> None:
        """Write the folded prompt and its heads to `soft_prompt.json` and `soft_prompt.safetensors`.

        If the model is sharded, every rank must call this method; only the first rank writes.

        Args:
            save_directory: the directory; created if it does not exist.
            as_peft: write an adapter for PEFT instead.

        Raises:
            NotAttachedError: the prompt was removed.
            UnsupportedMethodError: PEFT has no method with the same outputs.
        """
        folder = Path(save_directory)
        with gathered(self) as writes:
            if not writes:
                return
            stored = self.to_stored()
            if as_peft:
                peft_write.write(peft_write.adapter_of(stored, self.model, self.prompted_model.structure), folder)
            else:
                softhooks_files.write(stored, folder)
                log_unsaved_rows(self, self.name, self.model, self.prompted_model.structure, stored.added_ids)

    def to_stored(self) -> StoredPrompt:
        """Return the folded prompt as plain data; its heads are named by their paths in the transformers model.

        Raises:
            NotAttachedError: the prompt was removed.
        """
        self._require_attached()
        inner, added = path_in_wrapper(self.model), self.added
        return StoredPrompt(
            self.method.kind,
            self.method.options(),
            self.encoder.folded(),
            {key.replace("/", ".").removeprefix(inner): head.state_dict() for key, head in self.heads.items()},
            self.stored_conventions,
            self.name,
            outline(self.prompted_model.structure),
            BaseModelInfo.of(self.model, self.prompted_model.structure, self._fingerprint()),
            also_trained=[name for name, _ in self.named_parameters() if not is_prompt_key(name)],
            labels=self.prompted_model.labels.of(self),
            added={} if added is None else added.tables(),
            added_ids=() if added is None else tuple(added.ids.tolist()),
            loaded_from=self.loaded_from,
        )

    def _fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the base model, excluding the embeddings of the added tokens that the prompt trains."""
        prompted, added = self.prompted_model, self.added
        # No rank of a sharded model has whole weights, so its fingerprint was taken in `attach`.
        kept = prompted.fingerprint if is_sharded_model(prompted.model) else None
        own = frozenset() if added is None else frozenset(added.ids.tolist())
        return without_rows(kept or take_fingerprint(prompted.model, prompted.structure, frozen=True), own)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """Upload the prompt and its model card to the Hub, but not the base model.

        In a card that the repository already has, only the part that softhooks wrote is replaced. If the model is sharded,
        every rank must call this method; only the first rank uploads.

        Args:
            repo_id: the repository; created if it does not exist.
            private: whether a new repository is private.
            token: as in `huggingface_hub`.
            revision: the branch to commit to; created if it does not exist. By default, `main`.
            commit_message: the first line of the commit.
            kwargs: other arguments of `HfApi.upload_folder`, such as `create_pr`.

        Returns:
            the commit; None on ranks that do not upload.

        Raises:
            FrozenModifiedError: the base model has changed since the prompt was attached; nothing is uploaded.
            NotAttachedError: the prompt was removed.
            HfHubHTTPError: the Hub refused a request.
        """
        from softhooks.model_card.upload import upload

        self._require_attached()
        proof = FrozenProof.of(self.prompted_model.record, self.model)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.save_pretrained(folder)
            if not any(folder.iterdir()):
                return None
            message = commit_message or f"Upload soft prompt ({self.method.kind})"
            facts = CardFacts(self.to_stored(), repo_id, type(self.method).__name__, proof, self.training_run)
            return upload(folder, facts, private, token, revision, commit_message=message, **kwargs)

    def remove(self) -> None:
        """Remove the prompt and restore the model, once no other thread is running it. Calling this again has no effect."""
        with self.running.exclusive("`remove`"):
            if self.is_attached:
                self.is_attached = False
                detach(self.prompted_model, self.name)

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
        size = f"{self.num_parameters:,} parameters, " if self.is_attached else ""
        return f"SoftPrompt({self.name!r}, {self.method}, {size}{state} on {type(self.model).__name__})"


def soft_prompts_of(prompted: PromptedModel) -> dict[str, SoftPrompt]:
    """Return a model's prompts by name."""
    return {name: prompt for name, prompt in prompted.prompts.items() if isinstance(prompt, SoftPrompt)}
