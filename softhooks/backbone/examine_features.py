"""Describe a model that computes hidden states from images or sound instead of token ids.

Its stack is the innermost module, outside lists of layers, that contains all calls to attention functions. It has no token ids,
so only keys and values and gated branches can enter it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from softhooks.backbone.example import Example
from softhooks.backbone.feature_inputs import feature_examples
from softhooks.backbone.find_attention import AttentionRecord, make_sites, recorded_attention
from softhooks.backbone.own_state import changes_modules
from softhooks.backbone.probing import eval_mode, probing, seeded
from softhooks.backbone.stack import ModelStructure, Positions, Stack, StackName
from softhooks.compat.offload import device_of
from softhooks.errors import UnsupportedModelError
from softhooks.patching.patches import Patches

_ADAPTERS = "No prompt can enter this model; tune its weights with adapters such as LoRA."


def examine_features(model: nn.Module, batch: Mapping[str, Any] | None) -> ModelStructure:
    """Find a model's stack by running it on an image or a sound; raise an `UnsupportedModelError` if it has none.

    Args:
        batch: an example batch; without one, random features are tried whose sizes come from the model's config.
    """
    with eval_mode(model), probing(model):
        example, records = run_on_features(model, batch)
        stack = feature_stack(model, "text", model, example.others, records)
        changes = changes_modules(model, example.others, [stack])
    return ModelStructure(stacks=[stack], vocabulary=0, example=example, changes_modules=changes)


def run_on_features(
    model: nn.Module, batch: Mapping[str, Any] | None, ids: Tensor | None = None
) -> tuple[Example, list[AttentionRecord]]:
    """Try examples until the model runs on one, and record the calls to attention functions in that forward.

    Args:
        batch: the user's example batch, which is then the only one to try.
        ids: ids from which an encoder-decoder's `decoder_input_ids` are made, [1, T].
    """
    failed: Exception | None = None
    for example in feature_examples(model, batch, is_encoder_decoder=ids is not None):
        try:
            with recorded_attention(model) as records, seeded(model):
                model(**(example.others if ids is None else example.arguments(ids)))
            return example, records
        except Exception as error:  # noqa: BLE001 - whatever a model raises for a shape that it does not accept
            failed = failed or error
    name = getattr(model, "main_input_name", "input_ids")
    given = "the example batch" if batch is not None else f"random `{name}` of the sizes in its config"
    raise UnsupportedModelError(
        f"{type(model).__name__} fails on {given}; a soft prompt can only be attached to a model that runs.",
        "Pass a batch with all inputs that the model needs: `attach(..., example=batch)`.",
        cause=f"{type(failed).__name__}: {failed}",
    ) from failed


def feature_stack(
    model: nn.Module, name: StackName, part: nn.Module, arguments: dict[str, Any], records: list[AttentionRecord]
) -> Stack:
    """Describe the stack of a model, or of its encoder, that processes features.

    Args:
        part: the model, or its encoder.
        arguments: of a forward of the model.
        records: the calls to attention functions in `part` in that forward.
    """
    _refuse_parts(part, records)
    module, path = _stack_module(model, records)
    return _stack(name, module, path, arguments_of(model, module, arguments), records)


def _stack_module(model: nn.Module, records: list[AttentionRecord]) -> tuple[nn.Module, str]:
    """Return the module that contains every call to an attention function, outside lists of layers; and its path."""
    paths = {module: path.split(".") for path, module in model.named_modules()}
    parts = [paths[record.module] for record in records]
    module, path = model, ""
    for names in zip(*(part[:-1] for part in parts), strict=False):
        child = module.get_submodule(names[0])
        if len(set(names)) > 1 or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            break  # a list of layers has no forward, and a single layer of a list is not the stack
        module, path = child, f"{path}.{names[0]}".lstrip(".")
    return module, path


def _refuse_parts(model: nn.Module, records: list[AttentionRecord]) -> None:
    """Refuse models without attention functions, and those whose layers attend to parts of an image or to another sequence."""
    if not records:
        raise UnsupportedModelError(
            f"{type(model).__name__} calls no attention function of transformers' attention interface, so keys and values cannot "
            "enter it.",
            _ADAPTERS,
        )
    parts = next((r for r in records if r.key[0] != 1), None)
    if parts is not None:
        raise UnsupportedModelError(
            f"{type(parts.module).__name__} attends to {parts.key[0]} parts of a row separately, such as windows of an image; a "
            "prompt would be added to each part.",
            _ADAPTERS,
        )
    crossed = next((r for r in records if r.queries != r.key[2]), None)
    if crossed is not None:
        raise UnsupportedModelError(
            f"{type(crossed.module).__name__} attends with {crossed.queries} tokens to {crossed.key[2]} others; in models "
            "without token ids, softhooks only supports self-attention over the whole sequence.",
            _ADAPTERS,
        )


def arguments_of(model: nn.Module, module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments, by name, with which a forward of the model calls a module."""
    calls: list[dict[str, Any]] = []
    names = list(inspect.signature(module.forward).parameters)

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(dict(zip(names, args, strict=False)) | kwargs)

    with Patches() as patches, seeded(model):
        patches.keep(module.register_forward_pre_hook(note, with_kwargs=True))
        model(**arguments)
    if len(calls) != 1:
        raise UnsupportedModelError(
            f"{type(module).__name__} runs {len(calls)} times in one forward of {type(model).__name__}; a prompt can only enter "
            "a module that runs once.",
            _ADAPTERS,
        )
    return calls[0]


def _stack(
    name: StackName, module: nn.Module, path: str, call: dict[str, Any], records: list[AttentionRecord]
) -> Stack:
    features = next(
        (n for n, v in call.items() if isinstance(v, Tensor) and v.dim() > 1 and v.is_floating_point()), None
    )
    if features is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} is called without images, sound or hidden states: no argument is a floating-point tensor.",
            _ADAPTERS,
        )
    parameters = inspect.signature(module.forward).parameters
    width = records[0].width
    stack = Stack(
        name=name,
        path=path,
        module=module,
        embedding=nn.Embedding(0, width, device=device_of(module)),
        width=width,
        causal=False,
        positions=Positions(takes_position_ids=False, table=None, start=0, padding=None, limit=None, trained=None),
        parameters=[key for key, value in parameters.items() if value.kind is not value.VAR_KEYWORD],
        features=features,
        reads_ids=False,
        probe_call=call,
    )
    stack.sites = make_sites(stack, records, encoded=-1)
    stack.injection = "attention"
    return stack
