"""The methods: softhooks' prompts on the unmodified model, and PEFT's LoRA to check the benchmark itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import softhooks
from benchmarks.metamath.experiment import LORA, Experiment
from benchmarks.metamath.settings import ExperimentError, Settings

TYPES = {
    "PromptTuning": "PROMPT_TUNING",
    "PrefixTuning": "PREFIX_TUNING",
    "PTuning": "P_TUNING",
    "PTuningV2": "P_TUNING_V2",
    "LlamaAdapter": "ADAPTION_PROMPT",
    "ContextAwarePromptTuning": "CPT",
    LORA: "LORA",
}
"""The methods by their classes, with PEFT's names of their types. PEFT has no P-tuning v2."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A model with something to train.

    Attributes:
        model: the model to call.
        config: the method and its options, for the result.
        bare: a context in which the model is the base model.
        save: writes what was trained to a directory.
        check: raises an error if a frozen weight has changed.
    """

    model: Any
    config: dict[str, Any]
    bare: Callable[[], AbstractContextManager[Any]]
    save: Callable[[Path], None]
    check: Callable[[], Any]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def counts(self) -> tuple[int, int]:
        """The number of trained parameters, and of all."""
        return sum(p.numel() for p in self.parameters), sum(p.numel() for p in self.model.parameters())

    def saved_bytes(self, directory: Path) -> int:
        """Save what was trained, and return the size of its weights."""
        self.save(directory)
        return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def option_names(method: str) -> set[str]:
    """Return the names of a method's options.

    Raises:
        ExperimentError: the method is unknown, or its package is not installed.
    """
    if method not in TYPES:
        raise ExperimentError(f"method is {method!r}; it must be one of {', '.join(TYPES)}.")
    if method == LORA and find_spec("peft") is None:
        raise ExperimentError("LoRA needs PEFT, which is not installed; run `pip install peft`.")
    cls = _lora_config() if method == LORA else getattr(softhooks, method)
    return {field.name for field in dataclasses.fields(cls) if field.init} - {"tokenizer", "template"}


def build(
    experiment: Experiment,
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: datasets.Dataset,
) -> Contestant:
    """Attach the prompt of an experiment to a model, or wrap the model with LoRA."""
    if experiment.method == LORA:
        return _with_lora(experiment, model)
    options = dict(experiment.options)
    if settings.init_kv_cache_prefix is not None:
        options["init_ids"] = _ids_of_system_prompt(settings.init_kv_cache_prefix, tokenizer)
    if experiment.method == "ContextAwarePromptTuning":
        options |= _context(options, settings, train)
    cls = getattr(softhooks, experiment.method)
    if any(field.name == "tokenizer" for field in dataclasses.fields(cls)):
        options["tokenizer"] = tokenizer
    prompt = softhooks.attach(model, cls(**options))
    return Contestant(
        model=model,
        config=_config(experiment, prompt.method.options(), "softhooks"),
        bare=lambda: softhooks.disabled(model),
        save=prompt.save_pretrained,
        check=prompt.verify_frozen,
    )


def _ids_of_system_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a text as PEFT does to initialize a prefix: as a system message if there is a chat template, and with BOS."""
    if tokenizer.chat_template is None:
        encoded: Any = tokenizer(text)
    else:
        encoded = tokenizer.apply_chat_template([{"role": "system", "content": text}], return_dict=True)
    return list(encoded["input_ids"])


def _context(options: dict[str, Any], settings: Settings, train: datasets.Dataset) -> dict[str, Any]:
    """Return the examples of a context: the last training rows, which 5,000 steps do not reach."""
    count = options.get("examples")
    if type(count) is not int or not 1 <= count <= len(train):
        raise ExperimentError(f"examples is {count!r}; it must be a number of training rows, from 1 to {len(train)}.")
    rows = train[len(train) - count : len(train)]
    return {
        "template": settings.query_template + "{label}",
        "examples": [
            {"query": query, "label": response} for query, response in zip(rows["query"], rows["response"], strict=True)
        ],
    }


def _lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig


def _with_lora(experiment: Experiment, model: PreTrainedModel) -> Contestant:
    from peft import get_peft_model

    wrapped = get_peft_model(model, _lora_config()(task_type="CAUSAL_LM", **experiment.options))
    options = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in wrapped.peft_config["default"].to_dict().items()
    }
    return Contestant(
        model=wrapped,
        config=_config(experiment, options, "peft"),
        bare=wrapped.disable_adapter,
        save=wrapped.save_pretrained,
        check=lambda: None,
    )


def _config(experiment: Experiment, options: dict[str, Any], library: str) -> dict[str, Any]:
    own = {"peft_type": TYPES[experiment.method], "task_type": "CAUSAL_LM", "library": library}
    return {**options, **own, "library_version": version(library)}


def optimizer_of(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Make the optimizer."""
    cls = getattr(torch.optim, settings.optimizer_type, None)
    if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer):
        raise ExperimentError(f"optimizer_type is {settings.optimizer_type!r}; it must be a class in torch.optim.")
    return cls(parameters, **settings.optimizer_kwargs)
