"""Save a prompt in a Trainer's checkpoints, and resume from them.

A checkpoint holds the prompt twice: in the format that `softhooks.load` reads, and as live parameters, from which training
resumes. The live parameters are those of the prompt's encoder and heads, and the trainable parameters of the base. They are
stored in `soft_prompt.live.safetensors`; the checkpoint's `model.safetensors.index.json` names this file, so that the Trainer
loads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from softhooks.backbone.container import CONTAINER, is_prompt_key
from softhooks.compat.sharding import gathered
from softhooks.errors import TrainerError
from softhooks.formats.files import parse_json_tensor
from softhooks.prompt import SoftPrompt
from softhooks.saving.live_state import DESCRIPTION, NotSaved, live_tensors, write_live
from softhooks.saving.save_pretrained import SavePrompts, file_times, push_saved
from softhooks.trainer.incomplete_checkpoints import Lock
from softhooks.trainer.metrics import TrainingMetrics


class CheckpointSaver:
    """Replaces a model's `save_pretrained` while one of its prompts trains, and checks each state dict before it is loaded.

    Args:
        prompt: the prompt.
        owner: the callback, or the object of another framework, that trains the prompt.
        control: the owner's `TrainerControl`, which identifies the Trainer, or None if there is no Trainer.

    Attributes:
        loaded: whether a state dict with the prompt was loaded; reset it to False before another load.
        described: the description of the training run in the loaded state dict.
        optimizer: the name of the optimizer whose state is in the checkpoint, or None if the state is not saved.
        verify: called before a checkpoint is written; raises an error if the base has changed.
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
            before._handle.remove()
        shared.patches.set(prompt.model, "save_pretrained", self)
        shared.patches.set(prompt.model, "_keys_to_ignore_on_save", NotSaved(prompt))
        if _is_peft(model):
            shared.patches.set(prompt.model, "set_adapter", self.set_adapter)
        self._handle: Any = model.register_load_state_dict_pre_hook(self._check)
        shared.patches.keep(self._handle)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle, without the Trainer and its callback."""
        of_run = {"owner": None, "control": None, "metrics": None, "attached_by_owner": False, "has_trained": False}
        return self.__dict__ | {"verify": None, "_lock": None} | ({} if self.control is None else of_run)

    # --- save ---------------------------------------------------------------------------------------------------------

    def __call__(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> Any:
        """Write the prompt, but not the model's weights or config; in a Trainer's checkpoint, also write the live parameters."""
        if self._save_all is not None and (not self.prompt.is_attached or self.prompt.prompted_model.disabled):
            return self._save_all(save_directory, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return None
        folder = Path(save_directory)
        before = file_times(folder) if kwargs.get("push_to_hub") else {}
        is_checkpoint = self.writes_checkpoints and folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        if is_checkpoint:
            if self.verify is not None:
                self.verify()
            self._lock = Lock(folder)
        with gathered(self.prompt, kwargs.get("state_dict")):
            self.prompt.save_pretrained(folder)
            has_adapters = _is_peft(self.prompt.model) or getattr(self.prompt.model, "_hf_peft_config_loaded", False)
            if has_adapters and self._save_all is not None:  # write the PEFT adapters without the base model
                self._save_all.save_base({"save_directory": str(folder)})
            if is_checkpoint:
                write_live(folder, self.state())
        if kwargs.get("push_to_hub"):
            push_saved(folder, before, kwargs, self.prompt, folder)
        return None

    def finish(self) -> None:
        """Release the lock of a checkpoint after the Trainer has written all of its files."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def state(self) -> dict[str, Tensor]:
        """Return the live parameters by their names in the model, and the description of the run as JSON bytes."""
        text = json.dumps(self._describe()).encode()
        return live_tensors(self.prompt) | {self._description: torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    @property
    def _description(self) -> str:
        return f"{CONTAINER}.{self.prompt.name}.{DESCRIPTION}"

    def _describe(self) -> dict[str, Any]:
        """Describe the prompt, its base and its optimizer. Unknown values are None or empty."""
        prompt, method, shared = self.prompt, self.prompt.method, self.prompt.prompted_model
        options = {k: v for k, v in method.options().items() if k not in method.init_options}
        names = [name for name, _ in prompt.named_parameters() if not is_prompt_key(name)]
        parameters = dict(prompt.model.named_parameters())
        return {
            "method": {"kind": method.kind, **options, **prompt.conventions},
            "share of the base that trains": ", ".join(names) or "none",
            "base model": None if shared.record is None else shared.record.fingerprint(parameters),
            "dropout of the base": "off (freeze_dropout)" if shared.freeze_dropout else "as the model has it",
            "tokens whose rows train": "none" if prompt.added is None else str(prompt.added.ids.tolist()),
            "optimizer": self.optimizer,
        }

    # --- load ---------------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Set a PEFT model's adapter, as the Trainer does after loading, but keep every `requires_grad`."""
        model = self.prompt.model
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        try:
            return self._set_adapter(adapter_name, *args, **kwargs)
        finally:
            if self.prompt.is_attached:
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(before.get(name, False))

    def check_loaded_before(self) -> None:
        """Check a state dict that was loaded into the prompt before this saver existed."""
        shared = self.prompt.prompted_model
        noted, shared.loaded_state = shared.loaded_state, None
        if noted is not None:
            self._check(self.prompt.model, noted, "")

    def _check(self, _model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        if not prefix and self.prompt.is_attached:
            self.check(state)

    def check(self, state: dict[str, Any]) -> None:
        """Check a state dict before it is loaded, and remove the description of the run from it.

        Args:
            state: the state dict, with the parameter names of the prompt's model; it may lack the prompt.

        Raises:
            TrainerError: the state dict contains another prompt, or one that was trained on another base.
        """
        found = {key: list(value.shape) for key, value in state.items() if is_prompt_key(key)}
        self.loaded = False
        if not found:
            return
        text = state.pop(self._description, None)
        found.pop(self._description, None)
        described = parse_json_tensor(text, "the checkpoint") if isinstance(text, Tensor) else None
        self.require_same_run(described)
        live = {name: list(tensor.shape) for name, tensor in live_tensors(self.prompt).items()}
        own = {name: shape for name, shape in live.items() if is_prompt_key(name)}
        if any(found.get(name) != shape for name, shape in own.items()) or (described and set(state) != set(live)):
            raise TrainerError(
                "the checkpoint does not contain the tensors that this run trains; names and shapes must match.",
                "Resume with the method, name and options that the checkpoint was written with.",
                checkpoint={key: list(value.shape) for key, value in state.items()} if described else found,
                trained=live if described else own,
            )
        self.loaded, self.described = True, described

    def require_same_run(self, described: dict[str, Any] | None) -> None:
        """Check that this run has the settings described in a checkpoint. Unknown settings are not compared.

        Raises:
            TrainerError: a setting differs; the message names the first one.
        """
        present = self._describe()
        for key, value in (described or {}).items():
            if value and present.get(key) and present[key] != value:
                raise TrainerError(
                    f"this run and the checkpoint differ in the {key}.",
                    "Resume with the settings that wrote the checkpoint, or start a new run in another `output_dir`.",
                    checkpoint=value,
                    now=present[key],
                )


def saver_of(model: nn.Module) -> CheckpointSaver | None:
    """Return the `CheckpointSaver` of a model, or None if no prompt of the model is being trained."""
    saver = model.__dict__.get("save_pretrained")
    return saver if isinstance(saver, CheckpointSaver) else None


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")
