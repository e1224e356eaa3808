"""Find out what a model is made of, by running it.

Nothing here trusts a name or a config where a probe forward can tell: `OPTForCausalLM` calls its decoder past `base_model`, and
head sizes derived from a config are wrong for one architecture in eight.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from softhooks.backbone.find_sites import survey
from softhooks.backbone.find_stack import Call, find_stack, record
from softhooks.backbone.max_positions import rotary_limit
from softhooks.backbone.position_numbering import numbering
from softhooks.backbone.probe_inputs import CHOICES, as_choices, decoder_ids, probe_ids, probe_length
from softhooks.backbone.probing import INSIDE, eval_mode, probing
from softhooks.backbone.stack import ModelStructure, Stack, StackName
from softhooks.backbone.visibility import is_rounding, sees_later
from softhooks.compat.peft import unwrapped
from softhooks.errors import UnsupportedModelError


def examine(model: nn.Module) -> ModelStructure:
    """Find the stacks of a model with probe forwards of four tokens.

    Raises:
        UnsupportedModelError: the model has no token embeddings, or no stack was reached.
    """
    vocabulary = _vocabulary(model)
    with eval_mode(model), probing(model):
        ids = probe_ids(model, vocabulary, columns=4)
        runs = _run(model, ids)
        stacks = [_stack(model, name, given, runs) for name, given in runs.ids.items()]
        survey(stacks, ids)
    return ModelStructure(stacks=stacks, vocabulary=vocabulary, choices=runs.choices)


def _vocabulary(model: nn.Module) -> int:
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        return int(embedding.weight.shape[0])
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise UnsupportedModelError(
            "a soft prompt needs a model that embeds tokens.",
            f"{INSIDE} Attach to the transformers model itself, if this is a wrapper around one; to a sentence-transformers "
            "model with `softhooks.integrations.sentence_transformers`.",
            model=f"{type(model).__name__}, which has no input embeddings",
        ) from error


@dataclass
class _Runs:
    """The probe forwards of a model.

    Attributes:
        ids: what each stack is given, by its name.
        inputs, calls: the arguments of the first forward, and what was called in it.
        changed: what was called in a forward in which the second column of one stack's ids was another, by its name.
        choices: how many choices each row has, where the model takes rows of choices.
    """

    ids: dict[StackName, Tensor]
    inputs: dict[str, Tensor]
    calls: list[Call]
    changed: dict[StackName, list[Call]] = field(default_factory=dict)
    choices: int | None = None


def _run(model: nn.Module, ids: Tensor) -> _Runs:
    """Run a model on ids, and again for each of its stacks with another second id."""
    if _is_encoder_decoder(model):
        inputs = {"input_ids": ids, "decoder_input_ids": decoder_ids(ids)}
        runs = _Runs({"encoder": ids, "decoder": inputs["decoder_input_ids"]}, inputs, _recorded(model, inputs))
    else:
        runs = _run_on_ids_alone(model, ids)
    for name, argument in zip(runs.ids, runs.inputs, strict=True):
        given = runs.inputs[argument].clone()
        own = runs.ids[name]
        given[..., 1] = own[0, 0] if own[0, 1] != own[0, 0] else own[0, 2]
        runs.changed[name] = _recorded(model, {**runs.inputs, argument: given})
    return runs


def _run_on_ids_alone(model: nn.Module, ids: Tensor) -> _Runs:
    """Run a model on one row; on one row of two choices, [1, 2, T], where it fails on less."""
    try:
        inputs = {"input_ids": ids}
        return _Runs({"text": ids}, inputs, _recorded(model, inputs))
    except UnsupportedModelError as error:
        inputs = {"input_ids": as_choices(ids, CHOICES)}
        try:
            return _Runs({"text": inputs["input_ids"].flatten(0, 1)}, inputs, _recorded(model, inputs), choices=CHOICES)
        except UnsupportedModelError:
            raise error from error.__cause__


def _recorded(model: nn.Module, inputs: dict[str, Tensor]) -> list[Call]:
    try:
        return record(model, inputs)
    except Exception as error:
        raise UnsupportedModelError(
            "a soft prompt needs a model that runs on token ids alone.",
            INSIDE,
            model=type(model).__name__,
            cause=f"{type(error).__name__}: {error}",
        ) from error


def _is_encoder_decoder(model: nn.Module) -> bool:
    plain = unwrapped(model)
    takes = "decoder_input_ids" in inspect.signature(plain.forward).parameters
    return bool(getattr(plain.config, "is_encoder_decoder", False)) and takes


def _stack(model: nn.Module, name: StackName, ids: Tensor, runs: _Runs) -> Stack:
    """Describe the stack that some ids run through."""
    found = find_stack(model, name, ids, runs.inputs, runs.calls, runs.changed[name])
    module = found.stack.module
    parameters = inspect.signature(module.forward).parameters
    assert isinstance(found.lookup.output, Tensor)

    def run(rows: int) -> None:
        model(**{key: value.repeat(rows, *[1] * (value.dim() - 1)) for key, value in runs.inputs.items()})

    positions = numbering(run, module, found.lookup.module, "position_ids" in parameters)
    positions.changes, positions.rotary = _changes(module), rotary_limit(module)
    room = positions.limit if positions.limit is not None else positions.trained
    return Stack(
        name=name,
        path=found.stack.path,
        module=module,
        embedding=found.lookup.module,
        width=found.lookup.output.shape[-1],
        causal=found.causal and _is_causal(model, module, ids, name, room),
        positions=positions,
        parameters=[key for key, value in parameters.items() if value.kind is not value.VAR_KEYWORD],
        pooled=_pooled(module, runs.calls),
    )


def _pooled(module: nn.Module, calls: list[Call]) -> nn.Module | None:
    """Find the part of a stack whose first column goes to its pooler, as in ALBERT; None where the pooler takes all columns."""
    pooler = next((n for n, call in enumerate(calls) if call.module is getattr(module, "pooler", None)), None)
    if pooler is None or not calls[pooler].tensors or calls[pooler].tensors[0].dim() != 2:
        return None
    parts = set(map(id, module.children()))
    return [call.module for call in calls[:pooler] if id(call.module) in parts][-1]


def _is_causal(model: nn.Module, module: nn.Module, ids: Tensor, name: str, room: int | None) -> bool:
    """Change the later tokens of a text, and see whether the earlier ones' states follow.

    Args:
        ids: four of them, for a model that takes no more.
        room: how many positions the stack has.
    """
    columns, cut = probe_length(module, room)
    for length, place in ((columns, cut), (ids.shape[1], 1)):
        same, other = (probe_ids(model, _vocabulary(model), length, seed) for seed in (0, 1))
        mixed = torch.where(torch.arange(length, device=ids.device) >= place, other, same)

        def run(changed: bool, same: Tensor = same, mixed: Tensor = mixed) -> None:
            row = mixed if changed else same
            if name == "text":
                model(input_ids=row)
            elif name == "encoder":
                model(input_ids=row, decoder_input_ids=decoder_ids(same))
            else:
                model(input_ids=same, decoder_input_ids=row)

        try:
            return is_rounding(sees_later(module, place, run, lambda: True), _dtype(module))
        except Exception:
            if length == ids.shape[1]:
                raise
    raise AssertionError("one of the two lengths answers or raises")


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _changes(module: nn.Module) -> int | None:
    """Find from how many positions on rotary embeddings take other frequencies for all positions."""
    found = []
    for part in module.modules():
        kinds, config = getattr(part, "rope_type", None), getattr(part, "config", None)
        parameters = getattr(config, "rope_parameters", None)
        if kinds is None or not isinstance(parameters, dict):
            continue
        for kind, own in (
            [(kinds[k], parameters[k]) for k in kinds] if isinstance(kinds, dict) else [(kinds, parameters)]
        ):
            if kind == "longrope":
                found.append(own["original_max_position_embeddings"])
            elif "dynamic" in kind:
                found.append(part.original_max_seq_len)
    return min(found, default=None)
