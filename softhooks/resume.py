"""What a Trainer's checkpoint holds, and how the Trainer reads it back.

A checkpoint holds the prompt twice: folded, as `softhooks.load` reads it, and live (`soft_prompt.live.safetensors`: MLP, heads,
what else is trained). A `model.safetensors.index.json` names the live file, for it is one of the files that the Trainer resumes
from, and `from_pretrained` stops at it, for the `metadata` of a model is not there. A `model.safetensors` would not stop it: a
model with every weight at random would be built.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from softhooks.errors import TrainerError, explain
from softhooks.files import parse_json, read_tensors, write_json, write_tensors
from softhooks.host import CONTAINER
from softhooks.prompt import SoftPrompt

LIVE = "soft_prompt.live.safetensors"
_NOTE = "A soft prompt, not a model. Load the base model, then this directory with softhooks.load(model, directory)."
_DESCRIPTION = "description"


class Saver:
    """What stands in for a model's `save_pretrained` while a callback trains its prompt.

    Args:
        prompt: the prompt.
        owner: the callback, and the Trainer's control, by which a second callback on the same Trainer is known.

    Attributes:
        loaded: whether a checkpoint of the prompt was loaded since `loaded` was last set to False.
    """

    def __init__(self, prompt: SoftPrompt, owner: tuple[object, object]) -> None:
        self.prompt = prompt
        self.owner = owner
        self.loaded = False
        model = prompt.model
        before = saver_of(model)
        self._save: Any = before._save if before else getattr(model, "save_pretrained", None)
        self._load_adapter: Any = before._load_adapter if before else getattr(model, "load_adapter", None)
        if before:
            before.close()
        prompt.host.override("save_pretrained", self.save)
        prompt.host.override("_keys_to_ignore_on_save", _NotSaved(prompt))
        if _is_peft(model):
            prompt.host.override("load_adapter", self.load_adapter)
        self._handle = model.register_load_state_dict_pre_hook(self._check)
        prompt.host.keep(self._handle)

    def close(self) -> None:
        """Check no more what is loaded."""
        self._handle.remove()

    # --- save ---------------------------------------------------------------------------------------------------------

    def save(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> Any:
        """Write the prompt; into a Trainer's checkpoint also its live parameters, and no config.

        Raises:
            TrainerError: asked to push the model to the hub.
        """
        if not self.prompt.is_attached:
            return self._save(save_directory, is_main_process=is_main_process, **kwargs)
        if kwargs.get("push_to_hub"):
            raise TrainerError(
                "a model that a SoftPromptCallback trains saves its prompt only, and pushes nothing; call "
                "`soft_prompt.push_to_hub(repo_id)` for that."
            )
        if not is_main_process:
            return None
        folder = Path(save_directory)
        if _is_peft(self.prompt.model):
            self._save(str(folder))
        self.prompt.save_pretrained(folder)
        if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            self._write_live(folder)
        return None

    def _write_live(self, folder: Path) -> None:
        tensors = live_tensors(self.prompt)
        text = json.dumps(_describe(self.prompt)).encode()
        described = {self._description: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        write_tensors(folder / LIVE, tensors | described, {"format": "pt"})
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"about": _NOTE, "weight_map": dict.fromkeys(tensors, LIVE)})

    @property
    def _description(self) -> str:
        return f"{CONTAINER}.{self.prompt.name}.{_DESCRIPTION}"

    # --- load ---------------------------------------------------------------------------------------------------------

    def load_adapter(self, model_id: str, *args: Any, **kwargs: Any) -> Any:
        """Load a PEFT model's adapter, and from the same checkpoint what else was trained."""
        trained = {id(parameter) for parameter in self.prompt.parameters()}
        result = self._load_adapter(model_id, *args, **kwargs)
        path = Path(model_id) / LIVE
        if self.prompt.is_attached and path.is_file():
            for parameter in self.prompt.model.parameters():
                parameter.requires_grad_(id(parameter) in trained)  # PEFT sets it anew for the whole model
            self.prompt.model.load_state_dict(read_tensors(path)[0], strict=False)
        return result

    def _check(self, _model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        """Refuse a state dict whose prompt is not this one; a state dict without any prompt is none of our concern.

        Raises:
            TrainerError: the checkpoint is of another prompt, or of another base.
        """
        found = {key: list(value.shape) for key, value in state.items() if key.startswith(f"{prefix}{CONTAINER}.")}
        if prefix or not self.prompt.is_attached or not found:
            return
        text = state.pop(self._description, None)
        found.pop(self._description, None)
        described = parse_json(bytes(text.tolist()), "the checkpoint") if isinstance(text, Tensor) else None
        self._compare(described)
        live = {name: list(tensor.shape) for name, tensor in live_tensors(self.prompt).items()}
        own = {name: shape for name, shape in live.items() if name.startswith(f"{CONTAINER}.")}
        if any(found.get(name) != shape for name, shape in own.items()) or (described and set(state) != set(live)):
            raise TrainerError(
                explain(
                    "a checkpoint must hold what is trained, name by name and shape by shape.",
                    "Resume with the method, the name and the options that wrote the checkpoint.",
                    checkpoint={key: list(value.shape) for key, value in state.items()} if described else found,
                    trained=live if described else own,
                )
            )
        self.loaded = True

    def _compare(self, described: dict[str, Any] | None) -> None:
        mine = _describe(self.prompt)
        for key, value in (described or {}).items():
            if key in mine and mine[key] and value and mine[key] != value:
                raise TrainerError(
                    explain(
                        f"a run goes on only with the {key} that it began with.",
                        "Resume with what wrote the checkpoint, or begin anew in another `output_dir`.",
                        checkpoint=value,
                        now=mine[key],
                    )
                )


def saver_of(model: nn.Module) -> Saver | None:
    """What stands in for a model's `save_pretrained`, if a callback trains it."""
    saver = getattr(model.__dict__.get("save_pretrained"), "__self__", None)
    return saver if isinstance(saver, Saver) else None


def live_tensors(prompt: SoftPrompt) -> dict[str, Tensor]:
    """Everything that training has changed, by its name in the model."""
    return {name: parameter.detach() for name, parameter in prompt.named_parameters()}


def _describe(prompt: SoftPrompt) -> dict[str, Any]:
    """What must be the same when a run goes on."""
    options = {k: v for k, v in prompt.method.options().items() if k not in prompt.method.start_options}
    record = prompt.host.record
    return {
        "method": {"kind": prompt.method.kind, **options, **prompt.conventions},
        "base model": None if record is None else record.fingerprint(dict(prompt.model.named_parameters())),
    }


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


class _NotSaved(Sequence[str]):
    """The keys that a checkpoint lacks; the Trainer compares them with what it misses, and then keeps quiet.

    Made anew at each look: a prompt may come or go, and a model whose prompt is gone must be saved whole.
    """

    def __init__(self, prompt: SoftPrompt) -> None:
        self._prompt = prompt

    def _keys(self) -> list[str]:
        if not self._prompt.is_attached:
            return []
        live = live_tensors(self._prompt)
        return [key for key in self._prompt.model.state_dict() if key not in live]

    def __len__(self) -> int:
        return len(self._keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._keys()[index]
