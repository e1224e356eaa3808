"""Find the text backbone of a model, with its attention and positions, by running the model on probe inputs.

Module names and configs are unreliable: `OPTForCausalLM` bypasses its `base_model`, and in one architecture out of eight,
the config implies the wrong head sizes.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from softhooks.backbone.dependence import change_before, is_rounding
from softhooks.backbone.find_attention import AttentionRecord, find_sites, recorded_attention
from softhooks.backbone.find_positions import find_positions
from softhooks.backbone.find_stack import ModuleCall, find_stack, record
from softhooks.backbone.max_positions import dynamic_rope_length, rotary_limit
from softhooks.backbone.own_state import changes_modules
from softhooks.backbone.probe_inputs import CHOICES, as_choices, decoder_ids, probe_ids, probe_length
from softhooks.backbone.probing import INSIDE, eval_mode, float_dtype, probing
from softhooks.backbone.stack import ModelStructure, Stack, StackName
from softhooks.compat.peft import unwrapped
from softhooks.errors import UnsupportedModelError


def examine(model: nn.Module) -> ModelStructure:
    """Find a model's stacks (text backbones) by running it on four tokens; raise an `UnsupportedModelError` if it has none."""
    vocabulary = _vocabulary(model)
    with eval_mode(model), probing(model):
        ids = probe_ids(model, vocabulary, columns=4)
        runs = _run(model, ids)
        stacks = [_stack(model, name, given, runs) for name, given in runs.ids.items()]
        is_run_once = len(stacks) == 1 and sum(call.module is stacks[0].module for call in runs.calls) == 1
        find_sites(stacks, ids, runs.attention if is_run_once else None)
        changes = changes_modules(model, runs.inputs, stacks)
    return ModelStructure(stacks=stacks, vocabulary=vocabulary, choices=runs.choices, changes_modules=changes)


def _vocabulary(model: nn.Module) -> int:
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        return int(embedding.weight.shape[0])
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no input embeddings; a soft prompt can only be attached to a model that embeds tokens.",
            f"{INSIDE} Attach to the transformers model itself if this is a wrapper around it; for a sentence-transformers "
            "model, use `softhooks.integrations.sentence_transformers`.",
        ) from error


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass
class _Runs:
    """The recorded probe forwards of a model.

    Attributes:
        ids: the ids that each stack receives.
        inputs, calls, attention: the arguments, module calls and attention function calls in the first forward.
        changed: for each stack, the module calls in another forward, in which only the stack's second id differs.
        choices: the number of choices per row, if the model is a multiple-choice model.
    """

    ids: dict[StackName, Tensor]
    inputs: dict[str, Tensor]
    calls: list[ModuleCall]
    attention: list[AttentionRecord]
    changed: dict[StackName, list[ModuleCall]] = field(default_factory=dict)
    choices: int | None = None


def _run(model: nn.Module, ids: Tensor) -> _Runs:
    """Run a model on ids, and then once for each stack with a different second id for that stack."""
    if _is_encoder_decoder(model):
        inputs = {"input_ids": ids, "decoder_input_ids": decoder_ids(ids)}
        stack_ids: dict[StackName, Tensor] = {"encoder": ids, "decoder": inputs["decoder_input_ids"]}
        runs = _recorded(model, stack_ids, inputs)
    else:
        runs = _run_on_ids_alone(model, ids)
    for name, argument in zip(runs.ids, runs.inputs, strict=True):
        changed = runs.inputs[argument].clone()
        own = runs.ids[name]
        changed[..., 1] = own[0, 0] if own[0, 1] != own[0, 0] else own[0, 2]
        runs.changed[name] = _recorded(model, {}, {**runs.inputs, argument: changed}).calls
    return runs


def _run_on_ids_alone(model: nn.Module, ids: Tensor) -> _Runs:
    """Run a model on one row of ids or, if that fails, on one row of two choices, [1, 2, T]."""
    try:
        return _recorded(model, {"text": ids}, {"input_ids": ids})
    except UnsupportedModelError as error:
        rows = as_choices(ids, CHOICES)
        try:
            runs = _recorded(model, {"text": rows.flatten(0, 1)}, {"input_ids": rows})
        except UnsupportedModelError:
            raise error from error.__cause__
        runs.choices = CHOICES
        return runs


def _recorded(model: nn.Module, ids: dict[StackName, Tensor], inputs: dict[str, Tensor]) -> _Runs:
    try:
        with recorded_attention(model) as attention:
            return _Runs(ids, inputs, record(model, inputs), attention)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} fails on token ids alone; a soft prompt can only be attached to a model that runs on them.",
            INSIDE,
            cause=f"{type(error).__name__}: {error}",
        ) from error


def _is_encoder_decoder(model: nn.Module) -> bool:
    plain = unwrapped(model)
    takes = "decoder_input_ids" in inspect.signature(plain.forward).parameters
    return bool(getattr(plain.config, "is_encoder_decoder", False)) and takes


# --- describing a stack -----------------------------------------------------------------------------------------------


def _stack(model: nn.Module, name: StackName, ids: Tensor, runs: _Runs) -> Stack:
    call, lookup, is_causal = find_stack(model, name, ids, runs.inputs, runs.calls, runs.changed[name])
    module = call.module
    parameters = inspect.signature(module.forward).parameters
    assert isinstance(lookup.output, Tensor)

    def run(rows: int) -> None:
        model(**{key: value.repeat(rows, *[1] * (value.dim() - 1)) for key, value in runs.inputs.items()})

    positions = find_positions(run, runs.calls, module, lookup.module, "position_ids" in parameters)
    positions.dynamic_rope_length, positions.rotary_limit = dynamic_rope_length(module), rotary_limit(module)
    max_columns = positions.limit if positions.limit is not None else positions.trained
    return Stack(
        name=name,
        path=call.path,
        module=module,
        embedding=lookup.module,
        width=lookup.output.shape[-1],
        causal=is_causal and _is_causal(model, module, ids, name, max_columns),
        positions=positions,
        parameters=[key for key, value in parameters.items() if value.kind is not value.VAR_KEYWORD],
        pooled_module=_pooled(module, runs.calls),
    )


def _pooled(module: nn.Module, calls: list[ModuleCall]) -> nn.Module | None:
    """Return the child whose state for the first token is the pooler's only input (ALBERT); None if there is no such pooler."""
    pooler = next((n for n, call in enumerate(calls) if call.module is getattr(module, "pooler", None)), None)
    if pooler is None or not calls[pooler].inputs or calls[pooler].inputs[0].dim() != 2:
        return None
    children = set(map(id, module.children()))
    return [call.module for call in calls[:pooler] if id(call.module) in children][-1]


def _is_causal(model: nn.Module, module: nn.Module, ids: Tensor, name: str, max_columns: int | None) -> bool:
    """Whether changing later tokens leaves earlier states unchanged, on a long input or, if the model fails on it, a short one.

    Args:
        ids: the short input, on which the model is known to run.
        max_columns: the number of positions of the stack, or None if it is unknown.
    """
    columns, column = probe_length(module, max_columns)
    with suppress(Exception):
        return _is_unchanged_before(column, columns, model, module, name, ids.device)
    return _is_unchanged_before(1, ids.shape[1], model, module, name, ids.device)


def _is_unchanged_before(
    column: int, columns: int, model: nn.Module, module: nn.Module, name: str, device: torch.device
) -> bool:
    text, other = (probe_ids(model, _vocabulary(model), columns, seed) for seed in (0, 1))
    changed = torch.where(torch.arange(columns, device=device) >= column, other, text)

    def run(rows: Tensor) -> None:
        constant = text.expand(len(rows), -1)
        if name == "text":
            model(input_ids=rows)
        elif name == "encoder":
            model(input_ids=rows, decoder_input_ids=decoder_ids(constant))
        else:
            model(input_ids=constant, decoder_input_ids=rows)

    def is_unchanged(*texts: Tensor) -> bool:
        forwards = [functools.partial(run, rows) for rows in texts]
        return is_rounding(change_before(module, column, forwards), float_dtype(module))

    # Try both texts as two rows of one forward first. Some models take only one row; in some, rows influence each other.
    with suppress(Exception):
        if is_unchanged(torch.cat([text, changed])):
            return True
    return is_unchanged(text, changed)
