"""Saving and resuming a prompt in a Trainer's checkpoints.

A checkpoint holds the prompt twice: folded, for `softhooks.load`, and live (`soft_prompt.live.safetensors`: the encoder's
parameters, heads, and trainable parameters of the base). Its `model.safetensors.index.json` names the live file, so that the
Trainer loads it when it resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from softhooks.backbone.container import CONTAINER, is_prompt_key
from softhooks.compat.sharding import gathered
from softhooks.errors import TrainerError
from softhooks.formats.files import parse_json
from softhooks.prompt import SoftPrompt
from softhooks.saving.live_state import DESCRIPTION, NotSaved, live_tensors, write_live
from softhooks.saving.save_pretrained import SavePrompts
from softhooks.trainer.incomplete_checkpoints import Lock
from softhooks.trainer.metrics import TrainingMetrics
from softhooks.trainer.run_description import describe, require_same_run


class CheckpointSaver:
    """Replaces a model's `save_pretrained` while one of its prompts trains, and checks the state dicts that are loaded.

    Args:
        prompt: the prompt.
        owner: the callback, or the object of another framework, that trains the prompt.
        control: the control of the owner's Trainer, which identifies the Trainer, or None if no Trainer is used.

    Attributes:
        loaded: whether a state dict with the prompt was loaded since `loaded` was last set to False.
        described: the description of the training run in that state dict.
        optimizer: the name of the optimizer whose state is in the checkpoint, or None if the state is not saved.
        verify: called before a checkpoint is written; raises if the base has changed.
        metrics: the metrics for training logs.
        writes_checkpoints: whether a directory named `checkpoint-...` is a Trainer's checkpoint.
        attached_by_owner: whether the owner attached the prompt; False if the model already had it.
        has_trained: whether the owner has started to train the prompt.
    """

    def __init__(self, prompt: SoftPrompt, owner: object, control: TrainerControl | None = None) -> None:
        self.prompt = prompt
        self.owner: object = owner
        self.control = control
        self.loaded = False
        self.described: dict[str, Any] | None = None
        self.optimizer: str | None = None
        self.verify: Callable[[], None] | None = None
        self.metrics: TrainingMetrics | None = None
        self.writes_checkpoints = True
        self.attached_by_owner = self.has_trained = False
        self._lock: Lock | None = None
        model, shared = prompt.model, prompt.prompted_model
        before = saver_of(model)
        own: Any = model.__dict__.get("save_pretrained")
        self._save_all: SavePrompts | None = (
            before._save_all if before else own if isinstance(own, SavePrompts) else None
        )
        self._set_adapter: Any = before._set_adapter if before else getattr(model, "set_adapter", None)
        if before:
            before.close()
        shared.patches.set(prompt.model, "save_pretrained", self)
        shared.patches.set(prompt.model, "_keys_to_ignore_on_save", NotSaved(prompt))
        if _is_peft(model):
            shared.patches.set(prompt.model, "set_adapter", self.set_adapter)
        self._handle = model.register_load_state_dict_pre_hook(self._check)
        shared.patches.keep(self._handle)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle, without the Trainer, its callback and its run."""
        of_run = {"owner": None, "control": None, "metrics": None, "attached_by_owner": False, "has_trained": False}
        return self.__dict__ | {"verify": None, "_lock": None} | ({} if self.control is None else of_run)

    def close(self) -> None:
        """Stop checking state dicts that are loaded."""
        self._handle.remove()

    # --- save ---------------------------------------------------------------------------------------------------------

    def __call__(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> Any:
        """Write the prompt, but not the model's weights or config; in a Trainer's checkpoint, also write the live parameters.

        Raises:
            TrainerError: `push_to_hub` is set.
        """
        if self._save_all is not None and (not self.prompt.is_attached or self.prompt.prompted_model.disabled):
            return self._save_all(save_directory, is_main_process=is_main_process, **kwargs)
        if kwargs.get("push_to_hub"):
            raise TrainerError(
                "`push_to_hub` is not available while a callback trains the prompt; `save_pretrained` writes only the prompt.",
                "Call `soft_prompt.push_to_hub(repo_id)`.",
            )
        if not is_main_process:
            return None
        folder = Path(save_directory)
        is_checkpoint = self.writes_checkpoints and folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        if is_checkpoint:
            if self.verify is not None:
                self.verify()
            self._lock = Lock(folder)
        with gathered(self.prompt, kwargs.get("state_dict")):
            self.prompt.save_pretrained(folder)
            if _is_peft(self.prompt.model) or getattr(self.prompt.model, "_hf_peft_config_loaded", False):
                self._save_adapters(folder)
            if is_checkpoint:
                write_live(folder, self.state())
        return None

    def _save_adapters(self, folder: Path) -> None:
        """Write the PEFT adapters without the base model."""
        if self._save_all is not None:
            self._save_all.save_base({"save_directory": str(folder)})

    def finish(self) -> None:
        """Release the lock of a checkpoint after the Trainer has written all of its files."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def state(self) -> dict[str, Tensor]:
        """Return the live parameters by their names in the model, and the description of the run as JSON bytes."""
        text = json.dumps(describe(self.prompt, self.optimizer)).encode()
        return live_tensors(self.prompt) | {self._description: torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    @property
    def _description(self) -> str:
        return f"{CONTAINER}.{self.prompt.name}.{DESCRIPTION}"

    # --- load ---------------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Switch the adapter of a PEFT model, as the Trainer does after loading, without changing any `requires_grad`."""
        with self._requires_grad_kept():
            return self._set_adapter(adapter_name, *args, **kwargs)

    @contextmanager
    def _requires_grad_kept(self) -> Iterator[None]:
        """Restore `requires_grad` of all parameters, because PEFT sets it model-wide when it loads or switches an adapter."""
        model = self.prompt.model
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        try:
            yield
        finally:
            if self.prompt.is_attached:
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(before.get(name, False))

    def check_loaded_before(self) -> None:
        """Check the state dict that was loaded into the prompt before this saver existed.

        Raises:
            TrainerError: the state dict belongs to another prompt or base.
        """
        shared = self.prompt.prompted_model
        noted, shared.loaded_state = shared.loaded_state, None
        if noted is not None:
            self._check(self.prompt.model, noted, "")

    def _check(self, _model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        if not prefix and self.prompt.is_attached:
            self.check(state)

    def check(self, state: dict[str, Any]) -> None:
        """Check a state dict before it is loaded, and remove the description of its run from it.

        A state dict without a prompt is not checked.

        Args:
            state: the state dict, with the parameter names of the prompt's model.

        Raises:
            TrainerError: the state dict belongs to another prompt or base.
        """
        found = {key: list(value.shape) for key, value in state.items() if is_prompt_key(key)}
        self.loaded = False
        if not found:
            return
        text = state.pop(self._description, None)
        found.pop(self._description, None)
        described = parse_json(bytes(text.tolist()), "the checkpoint") if isinstance(text, Tensor) else None
        self.require_same_run(described)
        live = {name: list(tensor.shape) for name, tensor in live_tensors(self.prompt).items()}
        own = {name: shape for name, shape in live.items() if is_prompt_key(name)}
        if any(found.get(name) != shape for name, shape in own.items()) or (described and set(state) != set(live)):
            raise TrainerError(
                "the checkpoint does not hold the tensors that this run trains; their names and shapes must match.",
                "Resume with the method, the name and the options that wrote the checkpoint.",
                checkpoint={key: list(value.shape) for key, value in state.items()} if described else found,
                trained=live if described else own,
            )
        self.loaded, self.described = True, described

    def require_same_run(self, described: dict[str, Any] | None) -> None:
        """Compare the description in a checkpoint with this run.

        Raises:
            TrainerError: an entry differs; the message names it.
        """
        require_same_run(described, describe(self.prompt, self.optimizer))


def saver_of(model: nn.Module) -> CheckpointSaver | None:
    """Return the saver of a model with a prompt in training, or None if no prompt is being trained."""
    saver = model.__dict__.get("save_pretrained")
    return saver if isinstance(saver, CheckpointSaver) else None


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")
