"""What a Trainer's checkpoint holds, and how the Trainer reads it back.

A checkpoint holds the prompt twice: folded, as `softhooks.load` reads it, and live (`soft_prompt.live.safetensors`: MLP, heads,
what else is trained). A `model.safetensors.index.json` names the live file, for it is one of the files that the Trainer resumes
from, and `from_pretrained` stops at it, for the `metadata` of a model is not there. A `model.safetensors` would not stop it: a
model with every weight at random would be built.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from softhooks.backbone.container import CONTAINER, is_prompt_key
from softhooks.compat.sharding import gathered
from softhooks.errors import TrainerError
from softhooks.formats.files import parse_json, read_tensors
from softhooks.prompt import SoftPrompt
from softhooks.saving.model import SavePrompts
from softhooks.saving.state_dict import DESCRIPTION, LIVE, NotSaved, live_tensors, write_live
from softhooks.trainer.recovery import Lock

if TYPE_CHECKING:
    from softhooks.trainer.log import Watch

_ADAPTER = "adapter_config.json"


class Saver:
    """What stands in for a model's `save_pretrained` while a callback trains its prompt.

    Args:
        prompt: the prompt.
        owner: the callback, and the Trainer's control, by which a second callback on the same Trainer is known.

    Attributes:
        loaded: whether the last state dict that was loaded held the prompt, since `loaded` was last set to False.
        described: what that state dict said of everything but its numbers.
        optimizer: the optimizer's name, which a checkpoint keeps with its state; None: no state is saved.
        prove: raises if the base has moved; called before a checkpoint is written.
        watch: what the prompt shows in logs.
        of_trainer: whether a directory that is named like a checkpoint of a Trainer is one.
        made: whether the callback has attached the prompt, and not found it there.
        begun: whether the callback has begun to train it.
    """

    def __init__(self, prompt: SoftPrompt, owner: tuple[object, object]) -> None:
        self.prompt = prompt
        self.owner = owner
        self.loaded = False
        self.described: dict[str, Any] | None = None
        self.optimizer: str | None = None
        self.prove: Callable[[], None] | None = None
        self.watch: Watch | None = None
        self.of_trainer = True
        self.made = self.begun = False
        self._lock: Lock | None = None
        model = prompt.model
        before = saver_of(model)
        own: Any = model.__dict__.get("save_pretrained")
        self._plain: SavePrompts | None = before._plain if before else own if isinstance(own, SavePrompts) else None
        self._load_adapter: Any = before._load_adapter if before else getattr(model, "load_adapter", None)
        self._set_adapter: Any = before._set_adapter if before else getattr(model, "set_adapter", None)
        if before:
            before.close()
        prompt.prompted_model.override("save_pretrained", self.save)
        prompt.prompted_model.override("_keys_to_ignore_on_save", NotSaved(prompt))
        if _is_peft(model):
            prompt.prompted_model.override("load_adapter", self.load_adapter)
            prompt.prompted_model.override("set_adapter", self.set_adapter)
        self._handle = model.register_load_state_dict_pre_hook(self._check)
        prompt.prompted_model.keep(self._handle)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle of the model has: a Trainer, its callback and its run stay with the first model."""
        is_trained = isinstance(self.owner[1], TrainerControl)
        of_run = {"owner": (None, None), "watch": None, "made": False, "begun": False} if is_trained else {}
        return self.__dict__ | {"prove": None, "_lock": None} | of_run

    def close(self) -> None:
        """Check no more what is loaded."""
        self._handle.remove()

    # --- save ---------------------------------------------------------------------------------------------------------

    def save(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> Any:
        """Write the prompt; into a Trainer's checkpoint also its live parameters, and no config.

        Raises:
            TrainerError: asked to push the model to the hub.
        """
        if self._plain is not None and (not self.prompt.is_attached or self.prompt.prompted_model.disabled):
            return self._plain(save_directory, is_main_process=is_main_process, **kwargs)
        if kwargs.get("push_to_hub"):
            raise TrainerError(
                "a model that a SoftPromptCallback trains saves its prompt only, and pushes nothing; call "
                "`soft_prompt.push_to_hub(repo_id)` for that."
            )
        if not is_main_process:
            return None
        folder = Path(save_directory)
        is_checkpoint = self.of_trainer and folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        if is_checkpoint:
            if self.prove is not None:
                self.prove()
            self._lock = Lock(folder)
        with gathered(self.prompt, kwargs.get("state_dict")):
            self.prompt.save_pretrained(folder)
            if _is_peft(self.prompt.model) or getattr(self.prompt.model, "_hf_peft_config_loaded", False):
                self._save_adapters(folder)
            if is_checkpoint:
                self.write_live(folder)
        return None

    def _save_adapters(self, folder: Path) -> None:
        """Write PEFT's adapters alone."""
        if self._plain is not None:
            self._plain.save_base({"save_directory": str(folder)})

    def finish(self) -> None:
        """Let go of the checkpoint that was being written: the Trainer has put its own files beside the prompt."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def write_live(self, folder: Path) -> None:
        """Write what training goes on from, and an index by which nobody takes it for a model."""
        write_live(folder, self.state())

    def state(self) -> dict[str, Tensor]:
        """What training goes on from: what is trained, by its name in the model, and a description of all else."""
        text = json.dumps(self._describe()).encode()
        return live_tensors(self.prompt) | {self._description: torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    @property
    def _description(self) -> str:
        return f"{CONTAINER}.{self.prompt.name}.{DESCRIPTION}"

    # --- load ---------------------------------------------------------------------------------------------------------

    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load a PEFT model's adapter, and from the same checkpoint what else was trained.

        PEFT keeps adapters of other names than `default` in folders of their own. The Trainer looks there when it resumes, and
        into the root, whose adapter is another, when it loads the best model.
        """
        given = Path(model_id)
        root = next((folder for folder in (given, given.parent) if (folder / LIVE).is_file()), None)
        if root is None or not self.prompt.is_attached:
            return self._load_adapter(model_id, adapter_name, *args, **kwargs)
        own = root / adapter_name
        folder = own if (own / _ADAPTER).is_file() else root
        with self._sharing_kept():
            result = self._load_adapter(str(folder), adapter_name, *args, **kwargs)
        self.prompt.model.load_state_dict(read_tensors(root / LIVE)[0], strict=False)
        return result

    def set_adapter(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Switch a PEFT model's adapter, as the Trainer does once it has loaded all of them, and train no more than before."""
        with self._sharing_kept():
            return self._set_adapter(adapter_name, *args, **kwargs)

    @contextmanager
    def _sharing_kept(self) -> Iterator[None]:
        """Keep what trains and what does not: PEFT sets it anew for the whole model whenever it loads or switches."""
        model = self.prompt.model
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        try:
            yield
        finally:
            if self.prompt.is_attached:
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(before.get(name, False))

    def recall(self) -> None:
        """Check what was loaded into the prompt before there was anybody to check it.

        Raises:
            TrainerError: the checkpoint is of another prompt, or of another base.
        """
        noted, self.prompt.prompted_model.noted = self.prompt.prompted_model.noted, None
        if noted is not None:
            self._check(self.prompt.model, noted, "")

    def check(self, state: dict[str, Any]) -> None:
        """Check what is about to be loaded into the model, and take the checkpoint's description out of it.

        Raises:
            TrainerError: the checkpoint is of another prompt, or of another base.
        """
        self._check(self.prompt.model, state, "")

    def _check(self, _model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        if not prefix and self.prompt.is_attached:
            self.require_own(state)

    def require_own(self, state: dict[str, Any]) -> None:
        """Refuse a state dict whose prompt is not this one; a state dict without any prompt is none of our concern.

        Args:
            state: by the names of the prompt's model; its description, if it has one, is taken out.

        Raises:
            TrainerError: the checkpoint is of another prompt, or of another base.
        """
        found = {key: list(value.shape) for key, value in state.items() if is_prompt_key(key)}
        self.loaded = False
        if not found:
            return
        text = state.pop(self._description, None)
        found.pop(self._description, None)
        described = parse_json(bytes(text.tolist()), "the checkpoint") if isinstance(text, Tensor) else None
        self.require_same(described)
        live = {name: list(tensor.shape) for name, tensor in live_tensors(self.prompt).items()}
        own = {name: shape for name, shape in live.items() if is_prompt_key(name)}
        if any(found.get(name) != shape for name, shape in own.items()) or (described and set(state) != set(live)):
            raise TrainerError(
                "a checkpoint must hold what is trained, name by name and shape by shape.",
                "Resume with the method, the name and the options that wrote the checkpoint.",
                checkpoint={key: list(value.shape) for key, value in state.items()} if described else found,
                trained=live if described else own,
            )
        self.loaded, self.described = True, described

    def require_same(self, described: dict[str, Any] | None) -> None:
        """Refuse to go on from something else; what one side does not know is not compared.

        Raises:
            TrainerError: naming what differs.
        """
        mine = self._describe()
        for key, value in (described or {}).items():
            if key in mine and mine[key] and value and mine[key] != value:
                raise TrainerError(
                    f"a run goes on only with the {key} that it began with.",
                    "Resume with what wrote the checkpoint, or begin anew in another `output_dir`.",
                    checkpoint=value,
                    now=mine[key],
                )

    def _describe(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        method, record = self.prompt.method, self.prompt.prompted_model.record
        options = {k: v for k, v in method.options().items() if k not in method.start_options}
        names = [name for name, _ in self.prompt.named_parameters() if not is_prompt_key(name)]
        return {
            "method": {"kind": method.kind, **options, **self.prompt.conventions},
            "share of the base that trains": ", ".join(names) or "none",
            "base model": None if record is None else record.fingerprint(dict(self.prompt.model.named_parameters())),
            "dropout of the base": "off (freeze_dropout)"
            if self.prompt.prompted_model.freeze_dropout
            else "as the model has it",
            "tokens whose rows train": "none" if self.prompt.added is None else str(self.prompt.added.ids.tolist()),
            "optimizer": self.optimizer,
        }


def saver_of(model: nn.Module) -> Saver | None:
    """What stands in for a model's `save_pretrained`, if a callback trains it."""
    saver = getattr(model.__dict__.get("save_pretrained"), "__self__", None)
    return saver if isinstance(saver, Saver) else None


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")
