"""`save_pretrained` of a model with prompts, which writes the prompts and not the base model, as PEFT writes adapters.

If the base model were written with a prompt among its weights, `from_pretrained` would drop the prompt without an error.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softhooks.backbone.container import CONTAINER, is_prompt_key
from softhooks.compat.sharding import gathered, is_sharded_model
from softhooks.errors import PromptMismatchError
from softhooks.formats.files import read_tensors
from softhooks.formats.find import is_checkpoint, read
from softhooks.formats.softhooks_files import LIVE
from softhooks.model_card.card import CardFacts, FrozenProof
from softhooks.patching.patches import MethodWrapper
from softhooks.prompt import SoftPrompt, soft_prompts_of
from softhooks.runtime.prompted_model import PromptedModel
from softhooks.saving.live_state import NotSaved, live_tensors, write_live
from softhooks.saving.outer_model import SaveFromOutside, prompt_folders

logger = logging.getLogger(__name__)

_IGNORED = "_keys_to_ignore_on_save"
_ADAPTER = "adapter_config.json"


class SavePrompts(MethodWrapper):
    """The replacement for `save_pretrained` of a model with prompts."""

    def __init__(self, prompted: PromptedModel) -> None:
        super().__init__(prompted.model, "save_pretrained")
        self.prompted = prompted
        self._has_logged = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Write the prompts, or the model without them if they are disabled."""
        # Pass arguments by name, because the second positional argument differs between PEFT and transformers.
        call = dict(zip(inspect.signature(self.original()).parameters, args, strict=False)) | kwargs
        state = call.get("state_dict")
        if not self.prompted.prompts:
            return self.original()(**call)
        if self.prompted.disabled or (state is not None and not any(map(is_prompt_key, state))):
            return self.save_base(call)
        return self._save_prompts(Path(call["save_directory"]), call)

    def _save_prompts(self, folder: Path, call: dict[str, Any]) -> None:
        state, writes = call.get("state_dict"), call.get("is_main_process", True)
        folders, before = prompt_folders(self.prompted, folder), file_times(folder) if call.get("push_to_hub") else {}
        with ExitStack() as whole:
            for prompt in folders:
                writes = whole.enter_context(gathered(prompt, state)) and writes
            if writes:
                for prompt, own in folders.items():
                    prompt.save_pretrained(own)
                self._save_other_trained(folder, call)
        if writes and not self._has_logged:
            self._has_logged = True
            logger.warning(
                "save_pretrained wrote only the model's prompts (%s), for `softhooks.load`; to write the "
                "base model: `with softhooks.disabled(model): model.save_pretrained(directory)`",
                ", ".join(f"{prompt.name!r} to {own}" for prompt, own in folders.items()),
            )
        if writes and call.get("push_to_hub"):
            push_saved(folder, before, call, *next(iter(folders.items())))

    def _save_other_trained(self, folder: Path, call: dict[str, Any]) -> None:
        """Write the other trained parameters (PEFT's adapters, parameters of the base) and, in a checkpoint, the live state."""
        model: Any = self.prompted.model
        has_adapters = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
        in_checkpoint = is_checkpoint(folder)
        trained = self._trained_base()
        if has_adapters or (trained and not in_checkpoint):
            self.save_base({**call, "push_to_hub": False})
        if in_checkpoint or (trained and has_adapters):
            live: dict[str, Tensor] = {}
            for prompt in soft_prompts_of(self.prompted).values():
                live |= live_tensors(prompt)
            write_live(folder, live)
        if trained and not in_checkpoint:
            written = "these parameters were" if has_adapters else "the base model was"
            logger.warning(
                "%d parameters of the base are trained with the prompt; %s also written to %s.",
                len(trained),
                written,
                folder,
            )

    def _trained_base(self) -> list[str]:
        """Return the names of the trainable parameters of the base, except those of adapters."""
        model = self.prompted.model
        adapters = tuple(
            f"{path}.{name}." if path else f"{name}."
            for path, module in model.named_modules()
            for name in (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ()))
        )
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
            and not (is_prompt_key(name) or name.startswith(adapters) or ".modules_to_save." in name)
        ]

    def save_base(self, call: dict[str, Any]) -> Any:
        """Write the model without its prompts."""
        state = call.get("state_dict")
        if state is not None:
            call = {**call, "state_dict": {name: value for name, value in state.items() if not is_prompt_key(name)}}
        with _without_prompts(self.prompted.model), self.prompted.labels.model_shown():
            return self.original()(**call)

    def check(self, _model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        """Refuse a state dict with prompts that the model does not have; `strict=False` would ignore them silently."""
        found = {name: list(value.shape) for name, value in state.items() if is_prompt_key(name)}
        if prefix or not found or self.prompted.model.__dict__.get("save_pretrained") is not self:
            return  # the callback's own check is stricter
        expected: dict[str, list[int]] = {}
        for name, prompt in self.prompted.prompts.items():
            if any(is_prompt_key(key, name) for key in found):
                own = {key: list(value.shape) for key, value in live_tensors(prompt).items() if is_prompt_key(key)}
                frozen = prompt.module.state_dict(prefix=f"{CONTAINER}.{name}.")
                expected |= own
                expected |= {key: list(value.shape) for key, value in frozen.items() if key in found}
        known = {key: shape for key, shape in found.items() if not key.endswith(".description")}
        if known != expected:
            raise PromptMismatchError(
                "the prompts in the state dict do not match the model's prompts; names and shapes must match.",
                "Attach the prompt with the checkpoint's method, name and options.",
                checkpoint=known,
                model=expected or ", ".join(map(repr, self.prompted.prompts)),
            )


class LoadAdapter(MethodWrapper):
    """The replacement for `load_adapter` of a PEFT model, which also loads the prompts when a Trainer resumes.

    PEFT's method freezes all parameters except the adapter's. This one leaves the prompts trainable and, if it loads a
    checkpoint, other trained parameters too.
    """

    def __call__(self, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the adapter and, from a checkpoint, the prompts."""
        model = self.model
        given, name = Path(str(model_id)), args[0] if args else kwargs.get("adapter_name")
        # PEFT saves adapters other than `default` in subfolders, which a Trainer passes when it resumes. To load the best model,
        # the Trainer passes the checkpoint's root, which may contain a different adapter.
        root = next((folder for folder in (given, given.parent) if (folder / LIVE).is_file()), None)
        if root is not None:
            own = root / str(name)
            model_id = str(own if (own / _ADAPTER).is_file() else root)
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        result = self.original()(model_id, *args, **kwargs)
        for name, parameter in model.named_parameters():
            if is_prompt_key(name) or (root is not None and name in before):
                parameter.requires_grad_(before[name])
        if root is not None:
            model.load_state_dict(read_tensors(root / LIVE)[0], strict=False)
        return result


def replace_saving(prompted: PromptedModel) -> None:
    """Replace the model's `save_pretrained` and PEFT's `load_adapter` until the last prompt is removed."""
    if hasattr(prompted.model, "peft_config") and hasattr(prompted.model, "load_adapter"):
        prompted.patches.set(prompted.model, "load_adapter", LoadAdapter(prompted.model, "load_adapter"))
    if hasattr(prompted.model, "save_pretrained"):
        saving = SavePrompts(prompted)
        prompted.patches.set(prompted.model, "save_pretrained", saving)
        prompted.patches.keep(prompted.model.register_load_state_dict_pre_hook(saving.check))
    container: Any = prompted.model._modules[CONTAINER]
    container.register_state_dict_post_hook(SaveFromOutside(prompted))


@contextmanager
def _without_prompts(model: nn.Module) -> Iterator[None]:
    """Inside a `with` block, remove the submodule with the prompts and a callback's list of unsaved keys from a model."""
    modules = dict(model._modules)
    ignored = model.__dict__.get(_IGNORED)
    model._modules.pop(CONTAINER, None)
    if isinstance(ignored, NotSaved):
        del model.__dict__[_IGNORED]
    try:
        yield
    finally:
        model._modules.clear()
        model._modules.update(modules)  # in their original order
        if isinstance(ignored, NotSaved):
            model.__dict__[_IGNORED] = ignored


# --- the hub ----------------------------------------------------------------------------------------------------------


def file_times(folder: Path) -> dict[str, int]:
    """Return the modification times of all files in a directory, by relative path."""
    files = (file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else ()
    return {file.relative_to(folder).as_posix(): file.stat().st_mtime_ns for file in files}


def push_saved(folder: Path, before: dict[str, int], call: dict[str, Any], prompt: SoftPrompt, own: Path) -> None:
    """Upload the files that a save wrote, and a model card, as `save_pretrained(push_to_hub=True)` does.

    Args:
        before: the `file_times` before the save.
        call: the arguments of `save_pretrained`.
        prompt, own: the prompt that the card describes, and the directory that it was written to.
    """
    from softhooks.model_card.upload import CARD_FILES, upload

    written = [file for file, time in file_times(folder).items() if before.get(file) != time]
    about = {name: call[name] for name in ("commit_message", "create_pr") if name in call}
    record = None if is_sharded_model(prompt.model) else prompt.prompted_model.record  # not every rank is here
    proof = FrozenProof.of(record, prompt.model)
    name, method = call.get("repo_id", folder.name), type(prompt.method).__name__
    facts = CardFacts(read(own), name, method, proof, prompt.training_run)
    where = (call.get("private"), call.get("token"), call.get("revision"))
    upload(folder, facts, *where, allow_patterns=[*written, *CARD_FILES], **about)
