"""Find the text backbone of a model, with its attention and positions, by running the model on probe inputs.

Module names and configs are unreliable: `OPTForCausalLM` bypasses its `base_model`, and in one architecture out of eight,
the config implies the wrong head sizes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.dependence import change_before, is_rounding
from softhooks.backbone.examine_features import arguments_of, examine_features, feature_stack, run_on_features
from softhooks.backbone.example import Example, example_of
from softhooks.backbone.feature_inputs import feature_name
from softhooks.backbone.find_attention import AttentionRecord, find_sites, make_sites, recorded_attention
from softhooks.backbone.find_positions import find_positions
from softhooks.backbone.find_stack import ModuleCall, find_stack, record
from softhooks.backbone.max_positions import dynamic_rope_length, rotary_limit
from softhooks.backbone.own_state import changes_modules
from softhooks.backbone.probe_inputs import probe_ids, probe_length
from softhooks.backbone.probing import INSIDE, eval_mode, float_dtype, probing
from softhooks.backbone.replaced_in_forward import kept_modules
from softhooks.backbone.stack import ModelStructure, Stack, StackName
from softhooks.compat.peft import unwrapped
from softhooks.errors import UnsupportedModelError


def examine(model: nn.Module, batch: Mapping[str, Any] | None = None) -> ModelStructure:
    """Find a model's stacks by running it, usually on four tokens; raise an `UnsupportedModelError` if it has none.

    Args:
        batch: an example batch, for a model that does not run on token ids alone.
    """
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        is_pair = _is_encoder_decoder(model)
        if feature_name(model, is_pair) is not None:
            return _examine_pair(model, batch) if is_pair else examine_features(model, batch)
    vocabulary = _vocabulary(model)
    with eval_mode(model), probing(model):
        ids = probe_ids(model, vocabulary, columns=4)
        with kept_modules(model):
            runs = _run(model, ids, batch)
        stacks = [_stack(model, name, given, runs) for name, given in runs.ids.items()]
        is_run_once = len(stacks) == 1 and sum(call.module is stacks[0].module for call in runs.calls) == 1
        find_sites(stacks, ids, runs.attention if is_run_once else None)
        longer = runs.example.arguments(torch.cat([ids, ids[:, -1:]], -1))
        changes = changes_modules(model, longer, stacks)
    return ModelStructure(stacks=stacks, vocabulary=vocabulary, example=runs.example, changes_modules=changes)


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


def _examine_pair(model: nn.Module, batch: Mapping[str, Any] | None) -> ModelStructure:
    """Find the stacks of an encoder-decoder whose encoder takes features, and whose decoder takes token ids."""
    vocabulary = _vocabulary(model)
    with eval_mode(model), probing(model):
        encoder = model.get_encoder()  # type: ignore[operator]
        inside = set(encoder.modules())
        for columns in (5, 6):  # not the number of encoder states, so that cross-attention is recognized
            text = probe_ids(model, vocabulary, columns)
            example, attention = run_on_features(model, batch, text)
            own = [record for record in attention if record.module in inside]
            if not own or own[0].queries != columns:
                break
        arguments = example.arguments(text)
        first = feature_stack(model, "encoder", encoder, arguments, own)
        ids = arguments["decoder_input_ids"]
        runs = _Runs(example, text, {"decoder": ids}, record(model, arguments), attention)
        runs.changed["decoder"] = record(model, example.arguments(text, decoder=_with_another_id(ids)))
        second = _stack(model, "decoder", ids, runs)
        inside = set(second.module.modules())
        second.sites = make_sites(second, [one for one in attention if one.module in inside], encoded=own[0].queries)
        second.injection = "attention" if second.sites else None
        second.probe_call = arguments_of(model, second.module, arguments)
        changes = changes_modules(model, arguments, [first, second])
    return ModelStructure(stacks=[first, second], vocabulary=vocabulary, example=example, changes_modules=changes)


# --- running ----------------------------------------------------------------------------------------------------------


_CHOICES = 2


@dataclass
class _Runs:
    """The recorded probe forwards of a model.

    Attributes:
        example: made the arguments of the forwards.
        text: the ids that it made them from.
        ids: the ids that each stack receives.
        calls, attention: the module calls and attention function calls in the first forward.
        changed: for each stack, the module calls in another forward, in which only the stack's second id differs.
    """

    example: Example
    text: Tensor
    ids: dict[StackName, Tensor]
    calls: list[ModuleCall]
    attention: list[AttentionRecord]
    changed: dict[StackName, list[ModuleCall]] = field(default_factory=dict)

    def arguments(self, name: StackName, ids: Tensor) -> dict[str, Any]:
        """Return the arguments of a forward in which a stack gets other ids, and the other stack the same as before."""
        return _arguments(self.example, name, ids, self.text)


def _arguments(example: Example, name: str, ids: Tensor, text: Tensor) -> dict[str, Any]:
    """Return the arguments of a forward in which one stack gets some ids, [B, T], and the other stack those of `text`."""
    text = text.expand(len(ids), -1)
    if name == "decoder":
        return example.arguments(text, decoder=ids)
    return example.arguments(ids, decoder=text.roll(1, dims=-1))


def _run(model: nn.Module, ids: Tensor, batch: Mapping[str, Any] | None) -> _Runs:
    """Run a model on ids, and then once for each stack with a different second id for that stack."""
    runs = _first_run(model, ids, batch)
    for name, own in runs.ids.items():
        changed = runs.arguments(name, _with_another_id(own[:1]))
        runs.changed[name] = _recorded(model, runs.example, ids, changed).calls
    return runs


def _with_another_id(ids: Tensor) -> Tensor:
    """Replace the second id of a text, [1, T], by another one of its ids."""
    changed = ids.clone()
    changed[:, 1] = ids[0, 0] if ids[0, 1] != ids[0, 0] else ids[0, 2]
    return changed


def _first_run(model: nn.Module, ids: Tensor, batch: Mapping[str, Any] | None) -> _Runs:
    """Run a model on ids alone or, if that fails, on two choices per row, [1, 2, T], or with the arguments of an example."""
    errors: list[UnsupportedModelError] = []
    for example in _examples(model, ids.device, batch):
        try:
            return _recorded(model, example, ids, example.arguments(ids))
        except UnsupportedModelError as error:
            errors.append(error)
    # The example's own failure says more than that of ids alone.
    failed = errors[0] if batch is None else errors[-1]
    raise failed from failed.__cause__


def _examples(model: nn.Module, device: torch.device, batch: Mapping[str, Any] | None) -> Iterator[Example]:
    """Yield the ways to run a model: on ids alone, on several choices, on the user's batch, on transformers' dummy inputs."""
    pair = _is_encoder_decoder(model)
    yield Example(is_encoder_decoder=pair)
    if not pair:
        yield Example(choices=_CHOICES)
    for known in (batch, getattr(model, "dummy_inputs", None)):
        made = example_of(known, device) if isinstance(known, Mapping) else Example()
        if made.others:
            yield replace(made, is_encoder_decoder=pair)


def _recorded(model: nn.Module, example: Example, ids: Tensor, arguments: dict[str, Any]) -> _Runs:
    try:
        with recorded_attention(model) as attention:
            calls = record(model, arguments)
    except Exception as error:
        found = f"{type(model).__name__} fails on token ids alone"
        remedy = f"{INSIDE} If the model needs other inputs too, pass a batch of them: `attach(..., example=batch)`."
        if example.others:
            found = f"{type(model).__name__} fails on token ids with {', '.join(example.others)} of the example"
            remedy = INSIDE
        raise UnsupportedModelError(
            f"{found}; a soft prompt can only be attached to a model that runs on such inputs.",
            remedy,
            cause=f"{type(error).__name__}: {error}",
        ) from error
    rows = ids if example.choices is None else ids.repeat_interleave(example.choices, 0)
    stacks: dict[StackName, Tensor] = {"text": rows}
    if example.is_encoder_decoder:
        stacks = {"encoder": ids, "decoder": arguments["decoder_input_ids"]}
    return _Runs(example, ids, stacks, calls, attention)


def _is_encoder_decoder(model: nn.Module) -> bool:
    plain = unwrapped(model)
    takes = "decoder_input_ids" in inspect.signature(plain.forward).parameters
    return bool(getattr(plain.config, "is_encoder_decoder", False)) and takes


# --- describing a stack -----------------------------------------------------------------------------------------------


def _stack(model: nn.Module, name: StackName, ids: Tensor, runs: _Runs) -> Stack:
    inputs = runs.example.arguments(runs.text)
    call, lookup, is_causal = find_stack(model, name, ids, inputs, runs.calls, runs.changed[name])
    module = call.module
    parameters = inspect.signature(module.forward).parameters
    assert isinstance(lookup.output, Tensor)

    def run(rows: int) -> None:
        model(**runs.example.arguments(runs.text.expand(rows, -1)))

    positions = find_positions(run, runs.calls, module, lookup.module, "position_ids" in parameters)
    positions.dynamic_rope_length, positions.rotary_limit = dynamic_rope_length(module), rotary_limit(module)
    max_columns = positions.limit if positions.limit is not None else positions.trained
    return Stack(
        name=name,
        path=call.path,
        module=module,
        embedding=lookup.module,
        width=lookup.output.shape[-1],
        causal=is_causal and _is_causal(model, module, runs, name, max_columns),
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


def _is_causal(model: nn.Module, module: nn.Module, runs: _Runs, name: str, max_columns: int | None) -> bool:
    """Whether changing later tokens leaves earlier states unchanged, on a long input or, if the model fails on it, a short one.

    Args:
        runs: the runs on a short input.
        max_columns: the number of positions of the stack, or None if it is unknown.
    """
    columns, column = probe_length(module, max_columns)
    with suppress(Exception):
        return _is_unchanged_before(column, columns, model, module, name, runs.example)
    return _is_unchanged_before(1, runs.text.shape[1], model, module, name, runs.example)


def _is_unchanged_before(
    column: int, columns: int, model: nn.Module, module: nn.Module, name: str, example: Example
) -> bool:
    text, other = (probe_ids(model, _vocabulary(model), columns, seed) for seed in (0, 1))
    changed = torch.where(torch.arange(columns, device=text.device) >= column, other, text)

    def run(rows: Tensor) -> None:
        model(**_arguments(example, name, rows, text))

    def is_unchanged(*texts: Tensor) -> bool:
        forwards = [functools.partial(run, rows) for rows in texts]
        return is_rounding(change_before(module, column, forwards), float_dtype(module))

    # Try both texts as two rows of one forward first. Some models take only one row; in some, rows influence each other.
    with suppress(Exception):
        if is_unchanged(torch.cat([text, changed])):
            return True
    return is_unchanged(text, changed)
