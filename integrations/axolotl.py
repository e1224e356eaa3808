"""Axolotl: a plugin that trains a prompt, with its options in the YAML's `softhooks:` section.

    plugins: [softhooks.integrations.axolotl.SoftPromptPlugin]
    softhooks:
      method: prefix_tuning          # and `options:` of the method, `callback:` of SoftPromptCallback, as for `softhooks run`
      options: {num_virtual_tokens: 16}

The section is checked when the plugin is registered, before anything is loaded. The plugin hands Axolotl's Trainer a
`SoftPromptCallback`: its checkpoints hold the prompt only, and so does what Axolotl saves at the end.

Refused by name: no `softhooks:` section, or one that does not fit; `rl`, `reward_model` and `process_reward_model`, whose
references and heads nobody has tried; DeepSpeed; an `adapter` that would be frozen (`callback: {trainable: "*lora_*"}` trains it
too); `relora`, `merge_lora` and `merge_method`; a model that carries a prompt already.

Axolotl pins another transformers and peft than softhooks is tested with. This was read from the source of axolotl 0.19.0. Its
plugin manager was run with this plugin; its training command was not: the tests call the hooks in its order, with a real model
and a real Trainer.

Example:
    from transformers import Trainer, TrainingArguments
    from softhooks.integrations.axolotl import callback_for

    # what the plugin does with Axolotl's configuration, by hand
    cfg = {"softhooks": {"method": "prefix_tuning", "options": {"num_virtual_tokens": 16}}}
    callback = callback_for(cfg, model)
    trainer = Trainer(model, TrainingArguments("out", report_to=[]), train_dataset=dataset, callbacks=[callback])
    trainer.train()
    trainer.save_model("out/prompt")

Versions tested: none run; axolotl 0.19.0 read, its plugin manager run
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from softhooks.errors import AttachError, SoftHooksError, TrainerError
from softhooks.integration_support.models import prompted_model_of
from softhooks.integration_support.training import SoftPromptCallback, from_sections
from softhooks.method import Method

__all__ = ["SoftPromptPlugin", "callback_for"]

SoftPromptPlugin: Any  # made by `__getattr__`

SECTION = "softhooks"
_UNTRIED = {
    "rl": "training with preferences or rewards, whose reference model may meet the prompt",
    "reward_model": "a reward model",
    "process_reward_model": "a process reward model",
    "deepspeed": "DeepSpeed, which keeps parameters and optimizer in partitions of its own",
    "relora": "merging of adapters into the base",
    "merge_lora": "merging of adapters into the base",
    "merge_method": "merging of adapters into the base",
}


def read(cfg: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """Read and check the section of a configuration, and what stands beside it.

    Raises:
        OptionError: the section does not fit.
        TrainerError: there is none, or the configuration asks for what a prompt cannot be trained with.
    """
    section = cfg.get(SECTION)
    if not section:
        raise TrainerError(
            "the plugin of softhooks takes its options from the configuration.",
            f"Write a section `{SECTION}:` with `method:` and `options:`, or take the plugin out of `plugins:`.",
            found=f"{SECTION}: {section!r}",
        )
    method, options = from_sections(section, f"the section `{SECTION}:`")
    for key, what in _UNTRIED.items():
        if cfg.get(key):
            raise TrainerError(
                "a prompt trains in Axolotl's supervised fine-tuning and pre-training.",
                f"Take `{key}` out, or train with softhooks' other integrations (TRL, Trainer).",
                asked=f"{key}: {cfg.get(key)!r}",
                that_is=what,
            )
    if cfg.get("adapter") and not options.get("trainable"):
        raise TrainerError(
            "with a prompt attached, an adapter is frozen unless it is named.",
            'Write `callback: {trainable: "*lora_*"}` to train both, or take `adapter` out.',
            adapter=repr(cfg.get("adapter")),
        )
    return method, options


def callback_for(cfg: Mapping[str, Any], model: nn.Module) -> SoftPromptCallback:
    """Make the callback that trains what a configuration asks for.

    Raises:
        OptionError, TrainerError, AttachError: as `check`.
    """
    method, options = check(cfg, model)
    return SoftPromptCallback(method, **options, model=model if getattr(model, "is_quantized", False) else None)


def check(cfg: Mapping[str, Any], model: nn.Module) -> tuple[Method, dict[str, Any]]:
    """Read a configuration as `read` does, with the model at hand.

    Raises:
        OptionError, TrainerError: as `read`.
        AttachError: the model carries a prompt already.
    """
    prompted = prompted_model_of(model)
    if prompted is not None:
        raise AttachError(
            "Axolotl's model must come without a prompt; the plugin brings it.",
            "Name the plugin once, and attach nothing in other plugins.",
            attached=", ".join(map(repr, prompted.prompts)),
        )
    return read(cfg)


class _Hooks:
    """What the plugin does at Axolotl's hooks; apart from Axolotl's class, which is there only when Axolotl is.

    Attributes:
        callback: the last that was made.
    """

    callback: SoftPromptCallback | None = None

    def register(self, cfg: Any) -> None:
        """Check the options before anything is loaded."""
        read(cfg)

    def get_input_args(self) -> str:
        """Name the schema by which Axolotl keeps the section."""
        return f"{__name__}.SoftPromptArgs"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Check again: the configuration is validated by now, and the model is at hand."""
        check(cfg, model)

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Give the Trainer the callback that attaches the prompt when the Trainer is made."""
        self.callback = callback_for(cfg, model)
        return [self.callback]

    def post_train(self, cfg: Any, model: Any) -> None:
        """Say so if the prompt was not trained by the Trainer that got the callback.

        Raises:
            TrainerError: the callback has not met a training, or its prompt is gone.
        """
        prompt = None if self.callback is None else self.callback.soft_prompt
        if prompt is None or not prompt.is_attached:
            raise TrainerError("Axolotl's Trainer must train the prompt; the plugin's callback has not met a training.")


def _plugin() -> type:
    try:
        from axolotl.integrations.base import BasePlugin
    except ImportError as error:
        raise SoftHooksError(
            "this needs Axolotl; install it in an environment of its own, as Axolotl documents it, and softhooks beside it."
        ) from error
    return type("SoftPromptPlugin", (_Hooks, BasePlugin), {"__module__": __name__, "__doc__": _Hooks.__doc__})


def _schema() -> type:
    from pydantic import BaseModel

    annotations = {"__annotations__": {SECTION: dict[str, Any] | None}, SECTION: None, "__module__": __name__}
    return type("SoftPromptArgs", (BaseModel,), annotations)


def __getattr__(name: str) -> Any:
    """Build what subclasses Axolotl's and pydantic's classes when it is asked for, once."""
    makers = {"SoftPromptPlugin": _plugin, "SoftPromptArgs": _schema}
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, makers[name]())
