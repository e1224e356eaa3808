"""Axolotl: a plugin that trains a prompt, with options from the `softhooks:` section of the YAML file.

    plugins: [softhooks.integrations.axolotl.SoftPromptPlugin]
    softhooks:
      method: prefix_tuning          # and `options:` of the method, `callback:` of SoftPromptCallback, as for `softhooks run`
      options: {num_virtual_tokens: 16}

The section is checked before anything is loaded. Checkpoints and the model saved at the end hold only the prompt.

These raise an error: `rl`, `reward_model` and `process_reward_model`, which have not been tested with prompts; DeepSpeed; an
`adapter`, which would be frozen (unless `callback: {trainable: "*lora_*"}` trains it too); `relora`, `merge_lora` and
`merge_method`; a model that already has a prompt.

softhooks is not tested with the versions of transformers and peft that Axolotl requires. This module is based on the source code
of axolotl 0.19.0. Axolotl's plugin manager was run by hand with this plugin, but Axolotl's training command was not. The tests
call the plugin's hooks in the order in which Axolotl calls them, with a real model and Trainer.

Example:
    from transformers import Trainer, TrainingArguments
    from softhooks.integrations.axolotl import callback_for

    # the plugin takes these steps with Axolotl's configuration
    cfg = {"softhooks": {"method": "prefix_tuning", "options": {"num_virtual_tokens": 16}}}
    callback = callback_for(cfg, model)
    trainer = Trainer(model, TrainingArguments("out", report_to=[]), train_dataset=dataset, callbacks=[callback])
    trainer.train()
    trainer.save_model("out/prompt")

Versions tested: the plugin manager of axolotl 0.19.0
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from softhooks.errors import AttachError, TrainerError
from softhooks.integration_support.models import prompted_model_of
from softhooks.integration_support.training import SoftPromptCallback, from_sections
from softhooks.method import Method

from ._imports import create_at_first_use, import_framework

__all__ = ["SoftPromptPlugin", "callback_for"]

SoftPromptPlugin: Any  # created at its first use, because it derives from a class of Axolotl

SECTION = "softhooks"
_UNSUPPORTED = {
    "rl": "its reference model may run with the prompt",
    "reward_model": "reward models have not been tested with a prompt",
    "process_reward_model": "reward models have not been tested with a prompt",
    "deepspeed": "DeepSpeed keeps parameters and optimizer states in its own partitions",
    "relora": "it merges adapters into the base",
    "merge_lora": "it merges adapters into the base",
    "merge_method": "it merges adapters into the base",
}


def read(cfg: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """Read the `softhooks:` section of a configuration, and refuse other options that do not work with a prompt."""
    section = cfg.get(SECTION)
    if not section:
        raise TrainerError(
            f"the configuration has no section `{SECTION}:`, which the plugin needs.",
            f"Write a section `{SECTION}:` with `method:` and `options:`, or remove the plugin from `plugins:`.",
            found=f"{SECTION}: {section!r}",
        )
    method, options = from_sections(section, f"the section `{SECTION}:`")
    for key, reason in _UNSUPPORTED.items():
        if cfg.get(key):
            raise TrainerError(
                f"`{key}: {cfg.get(key)!r}` cannot be used with a prompt in Axolotl: {reason}.",
                f"Remove `{key}`, or train with the Trainer or TRL.",
            )
    if cfg.get("adapter") and not options.get("trainable"):
        raise TrainerError(
            f"`adapter: {cfg.get('adapter')}` would be frozen, because only the prompt is trained.",
            'Write `callback: {trainable: "*lora_*"}` to train both, or remove `adapter`.',
        )
    return method, options


def callback_for(cfg: Mapping[str, Any], model: nn.Module) -> SoftPromptCallback:
    """Create the callback for a configuration.

    Raises:
        OptionError: an option in the section `softhooks:` is wrong.
        TrainerError: the section is missing, or another option cannot be used with a prompt.
        AttachError: the model already has a prompt.
    """
    method, options = check(cfg, model)
    return SoftPromptCallback(method, **options, model=model if getattr(model, "is_quantized", False) else None)


def check(cfg: Mapping[str, Any], model: nn.Module) -> tuple[Method, dict[str, Any]]:
    """Read a configuration, and refuse a model that already has a prompt."""
    prompted = prompted_model_of(model)
    if prompted is not None:
        raise AttachError(
            f"the model already has the prompt {', '.join(map(repr, prompted.prompts))}; the plugin would attach a second one.",
            "List the plugin only once, and attach no prompt in other plugins.",
        )
    return read(cfg)


class _Hooks:
    """A plugin that trains a prompt.

    Attributes:
        callback: the callback of the last Trainer; its `soft_prompt` is the prompt.
    """

    callback: SoftPromptCallback | None = None

    def register(self, cfg: Any) -> None:
        """Check the configuration before anything is loaded."""
        read(cfg)

    def get_input_args(self) -> str:
        """Return the name of the pydantic model for the section, without which Axolotl would drop the section."""
        return f"{__name__}.SoftPromptArgs"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Check the validated configuration and the model."""
        check(cfg, model)

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Return the callback that attaches the prompt when the Trainer is created."""
        self.callback = callback_for(cfg, model)
        return [self.callback]

    def post_train(self, cfg: Any, model: Any) -> None:
        """Check that the prompt was trained."""
        prompt = None if self.callback is None else self.callback.soft_prompt
        if prompt is None or not prompt.is_attached:
            raise TrainerError(
                "the prompt was not trained, because Axolotl's Trainer did not use the plugin's callback."
            )


def _plugin() -> type:
    base = import_framework("axolotl.integrations.base", "Axolotl").BasePlugin
    return type("SoftPromptPlugin", (_Hooks, base), {"__doc__": _Hooks.__doc__})


def _schema() -> type:
    from pydantic import BaseModel

    fields = {"__annotations__": {SECTION: dict[str, Any] | None}, SECTION: None, "__module__": __name__}
    return type("SoftPromptArgs", (BaseModel,), fields)


__getattr__ = create_at_first_use(__name__, SoftPromptPlugin=_plugin, SoftPromptArgs=_schema)
