"""PEFT: convert prompts from a `PeftModel` in memory to softhooks and back.

`from_peft` converts the adapters of a `PeftModel` to prompts and attaches them to a model without PEFT: prompt tuning, P-tuning,
prefix tuning, multitask prompt tuning, CPT, LLaMA-Adapter and cartridges, with their trained heads. `to_peft` creates a
`PeftModel` from prompts. In both directions, the logits of text without padding are the same. With padding, packed rows, caches
and classification on decoders they differ, because PEFT computes them wrongly. You do not need this integration to read or write
saved adapters (`softhooks.load`, `save_pretrained(..., as_peft=True)`, `softhooks convert`), or to train a prompt together with
LoRA (attach the prompt to the `PeftModel`).

These raise an error, and neither model is changed. From PEFT: other kinds of adapters, such as LoRA; prefixes of
encoder-decoders, because PEFT adds them only to the decoder; prompts in encoders that classify the first position, which is a
virtual token in PEFT; LLaMA-Adapter on GPT-2 or with projections that have a bias. To PEFT: a layout, a prefix in only some of
the layers, and prefixes in both the encoder and the decoder of a model.

Versions tested: peft 0.21.2, transformers 5.23.0

Example:
    from softhooks.integrations.peft import from_peft, to_peft

    prompts = from_peft(peft_model, model)  # all adapters, by name; the active adapter's prompt is active
    with softhooks.rows(model, ["en", "de"]):
        model.generate(**batch, max_new_tokens=8)  # one prompt per row, with any padding
    prompts["en"].save_pretrained("en-prompt")

    back = to_peft(prompts.values(), model)  # a PeftModel on the same model, from which the prompts are removed
    back.save_pretrained("adapters")
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from softhooks.errors import NameTakenError, OptionError, PromptMismatchError
from softhooks.integration_support.models import examine, prompted_model_of, unwrapped
from softhooks.integration_support.saved_prompts import StoredPrompt, attach_stored, outline, peft_read, peft_write
from softhooks.prompt import SoftPrompt
from softhooks.switch import activate

from ._imports import import_framework

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["from_peft", "to_peft"]

_ADAPTED = ("AdaptedAttention", "AdaptedAttentionGPT")  # PEFT's LLaMA-Adapter replaces attention with these


def _peft() -> Any:
    return import_framework("peft", "PEFT", "peft")


# --- from PEFT --------------------------------------------------------------------------------------------------------


def from_peft(
    peft_model: PeftModel,
    model: nn.Module,
    names: Mapping[str, str] | Iterable[str] | None = None,
    *,
    trainable: bool = False,
) -> dict[str, SoftPrompt]:
    """Attach the prompts of a PEFT model to its base model.

    Args:
        peft_model: the model with the adapters; it is not changed.
        model: a separate copy of the base model, or `peft_model.get_base_model()`.
        names: the adapters to convert, or a mapping from adapters to the names of their prompts; None converts all adapters.
        trainable: whether to make the prompts trainable. An LSTM or MLP in an adapter is not trained further, because only the
            embeddings or the keys and values that it computes are converted.

    Returns:
        the prompts, by name. The active adapter's prompt is active, or the last prompt if that adapter was not converted.

    Raises:
        OptionError: there is no such adapter.
        CheckpointError: an adapter is of a kind that softhooks does not support.
        PromptMismatchError, AttachError: a prompt does not fit the model. Nothing is attached.
    """
    _peft()
    chosen = _chosen(peft_model, names)
    found = {name: read(peft_model, adapter) for adapter, name in chosen.items()}
    adapted = [name for name, module in model.named_modules() if type(module).__name__ in _ADAPTED]
    if adapted:
        raise OptionError(
            f"the model still contains PEFT's LLaMA-Adapter, in {adapted[0]}; prompts need a model without it.",
            "Load the base model again, and pass the new model.",
        )
    before = prompted_model_of(model)
    was_active = before.active if before else None
    taken = [name for name in found if before is not None and name in before.prompts]
    if taken:
        raise NameTakenError(
            f"the model already has prompts named {taken}; give the adapters other names with `names=`."
        )
    attached: dict[str, SoftPrompt] = {}
    try:
        for name, stored in found.items():
            attached[name] = attach_stored(model, stored, name, trainable=trainable)
    except BaseException:
        for prompt in reversed(attached.values()):
            prompt.remove()
        if before is not None and before.prompts:
            before.active = was_active
        raise
    active = chosen.get(str(peft_model.active_adapter))
    if active is not None:
        activate(model, active)
    return attached


def read(peft_model: PeftModel, adapter: str) -> StoredPrompt:
    config = peft_model.peft_config[adapter]
    described = json.loads(json.dumps(config.to_dict(), default=_jsonable))
    source = f"the adapter {adapter!r} of {type(peft_model).__name__}"
    peft_read.require_kind(described, source)
    with torch.no_grad(), _restored(peft_model):
        tensors = _peft().get_peft_model_state_dict(peft_model, adapter_name=adapter, save_embedding_layers=False)
        copied = {name: tensor.detach().clone().cpu() for name, tensor in tensors.items()}
    return peft_read.parse(described, copied, source)


@contextmanager
def _restored(peft_model: nn.Module) -> Iterator[None]:
    """On exit, restore the parameters that PEFT changes when it reads them, such as the deltas of a CPT adapter."""
    before = [(parameter, parameter.data) for parameter in peft_model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _chosen(peft_model: Any, names: Mapping[str, str] | Iterable[str] | None) -> dict[str, str]:
    """Map the name of each chosen adapter to the name of its prompt."""
    configs = getattr(peft_model, "peft_config", None)
    if not isinstance(configs, dict) or not hasattr(peft_model, "get_base_model"):
        raise OptionError(f"`from_peft` was given {type(peft_model).__name__} instead of a PeftModel.")
    if isinstance(names, str):
        names = [names]
    names = list(configs) if names is None else names
    chosen = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    unknown = [name for name in chosen if name not in configs]
    if unknown or not chosen or len(set(chosen.values())) < len(chosen):
        raise OptionError(
            f"names={names!r} is invalid; it must name adapters of the PEFT model, and give each prompt a different name.",
            "Leave `names` out to convert all adapters.",
            asked=chosen,
            adapters=list(configs),
        )
    return chosen


# --- to PEFT ----------------------------------------------------------------------------------------------------------


def to_peft(prompts: Iterable[SoftPrompt] | SoftPrompt, model: nn.Module, *, trainable: bool = False) -> PeftModel:
    """Create a PEFT model with one adapter for each prompt, named after the prompt.

    Args:
        prompts: prompts that are attached to one model.
        model: a separate copy of the base model, without prompts; or the model of the prompts, which are then removed from it.
        trainable: whether the adapters are trainable.

    Returns:
        the PEFT model; the active prompt's adapter is active.

    Raises:
        UnsupportedMethodError: a prompt has no equivalent in PEFT. The model is unchanged.
        PromptMismatchError: the model differs in class or shape from the model of the prompts. The model is unchanged.
        OptionError: there are no prompts, or the model has other prompts.
    """
    peft = _peft()
    given = [prompts] if isinstance(prompts, SoftPrompt) else list(prompts)
    _require_one_model(given)
    parts = {
        prompt.name: peft_write.adapter_of(prompt.to_stored(), prompt.model, prompt.prompted_model.structure)
        for prompt in given
    }
    kinds = {config["peft_type"] for config, _ in parts.values()}
    if len(kinds) > 1:
        raise OptionError(
            f"the prompts would become adapters of the types {sorted(kinds)}; a PEFT model can hold only one type.",
            "Create one PEFT model for each type.",
        )
    active = given[0].prompted_model.active
    _require_base(given, model)
    settings = {name: _settings(peft, config, trainable) for name, (config, _) in parts.items()}
    if model is given[0].model:
        for prompt in given:
            prompt.remove()
    first, *others = settings
    made = peft.get_peft_model(model, settings[first], adapter_name=first)
    for name in others:
        made.add_adapter(name, settings[name])
    for name, (_, tensors) in parts.items():
        made.set_adapter(name)
        peft.set_peft_model_state_dict(made, tensors, adapter_name=name)
    made.set_adapter(active if active in parts else first)
    if not trainable:
        made.requires_grad_(False)
    prompted: PeftModel = made.train(model.training)
    return prompted


def _settings(peft: Any, config: dict[str, Any], trainable: bool) -> Any:
    kind = peft.PeftType(config["peft_type"])
    options = {name: value for name, value in config.items() if name != "peft_type"}
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**(options | {"inference_mode": not trainable}))


def _require_one_model(prompts: list[SoftPrompt]) -> None:
    models = {id(prompt.model) for prompt in prompts if prompt.is_attached}
    detached = [prompt.name for prompt in prompts if not prompt.is_attached]
    if len(models) != 1 or detached:
        raise OptionError(
            f"the prompts are attached to {len(models)} models; `to_peft` needs prompts that are attached to one model.",
            "Attach or load the prompts first, and call `to_peft` once for each model.",
            removed=detached or "none",
        )


def _require_base(prompts: list[SoftPrompt], model: nn.Module) -> None:
    """Check that a model has no other prompts or adapters, and has the class and shape of the prompts' model."""
    own = prompts[0].model
    prompted = prompted_model_of(model)
    others = sorted(set(prompted.prompts) - {prompt.name for prompt in prompts}) if prompted and model is own else []
    if hasattr(model, "peft_config") or (prompted is not None and model is not own) or others:
        raise OptionError(
            f"the {type(model).__name__} already has "
            + (f"the prompts {others or sorted(prompted.prompts)}" if prompted is not None else "PEFT adapters")
            + "; PEFT can only wrap a model without them.",
            "Load the base model again, or remove its other prompts and merge its adapters.",
        )
    if model is own:
        return
    mine, theirs = _description(unwrapped(own)), _description(model)
    heads = [prompt.name for prompt in prompts if not _has_heads(prompt.to_stored(), model)]
    if mine != theirs or heads:
        raise PromptMismatchError(
            "the model differs in class or shape from the model that the prompts were trained with.",
            "Pass the base model that the prompts were trained with.",
            prompt=mine,
            model=theirs,
            heads_that_do_not_fit=heads or "none",
        )


def _description(model: nn.Module) -> str:
    prompted = prompted_model_of(model)
    structure = examine(model) if prompted is None else prompted.structure
    return f"{type(model).__name__}, width {structure.entry.width}, {outline(structure)}"


def _has_heads(stored: StoredPrompt, model: nn.Module) -> bool:
    """Return whether a model has modules with the names and shapes of a prompt's trained heads."""
    modules = dict(model.named_modules())
    for path, state in stored.heads.items():
        known = modules[path].state_dict() if path in modules else {}
        if {k: v.shape for k, v in known.items()} != {k: v.shape for k, v in state.items()}:
            return False
    return True
