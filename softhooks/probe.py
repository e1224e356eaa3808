"""Find out what a model is made of, by running it.

Nothing here trusts a name or a config where a probe forward can tell: `OPTForCausalLM` calls its decoder past `base_model`, and
head sizes derived from a config are wrong for one architecture in eight.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.anatomy import Anatomy, Positions, Stack, StackName, at_rest, decoder_ids, first_state, probe_ids
from softhooks.errors import UnsupportedModelError, explain
from softhooks.inject.survey import survey


def examine(model: nn.Module) -> Anatomy:
    """Find the stacks of a model with probe forwards of four tokens.

    Raises:
        UnsupportedModelError: the model has no token embeddings, or no stack was reached.
    """
    vocabulary = _vocabulary(model)
    with at_rest(model):
        ids = probe_ids(model, vocabulary, columns=4)
        inputs = {"input_ids": ids}
        if _is_encoder_decoder(model):
            inputs["decoder_input_ids"] = decoder_ids(ids)
        calls = _record_calls(model, inputs)
        names: list[StackName] = ["encoder", "decoder"] if len(inputs) == 2 else ["text"]
        stacks = [_stack(model, name, given, calls) for name, given in zip(names, inputs.values(), strict=True)]
        survey(stacks, ids)
    return Anatomy(stacks=stacks, vocabulary=vocabulary)


def _vocabulary(model: nn.Module) -> int:
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        return int(embedding.weight.shape[0])
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise UnsupportedModelError(
            explain(
                "a soft prompt needs a model that embeds tokens.",
                "Attach to the transformers model itself, or to the text model inside; to a sentence-transformers model with "
                "`softhooks.integrations.sentence_transformers`.",
                model=f"{type(model).__name__}, which has no input embeddings",
            )
        ) from error


def _is_encoder_decoder(model: nn.Module) -> bool:
    plain = unwrapped(model)
    takes = "decoder_input_ids" in inspect.signature(plain.forward).parameters
    return bool(getattr(plain.config, "is_encoder_decoder", False)) and takes


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model; any other model as it is."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


@dataclass(eq=False)
class _Call:
    """One module's call in a probe forward."""

    path: str
    module: nn.Module
    tensors: list[Tensor]
    output: Any = None


def _record_calls(model: nn.Module, inputs: dict[str, Tensor]) -> list[_Call]:
    """Run the model once and note which modules were called with which tensors."""
    calls: list[_Call] = []
    running: dict[int, _Call] = {}
    handles = []
    for path, module in model.named_modules():

        def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            call = _Call(path, module, tensors)
            calls.append(call)
            running[id(module)] = call

        def after(module: nn.Module, args: Any, output: Any) -> None:
            running[id(module)].output = output

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        model(**inputs)
    except Exception as error:
        raise UnsupportedModelError(
            explain(
                "a soft prompt needs a model that runs on token ids alone.",
                "Attach to the text model inside, or see the cause above.",
                model=type(model).__name__,
                cause=f"{type(error).__name__}: {error}",
            )
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _given(call: _Call, ids: Tensor) -> bool:
    return any(t.dtype == ids.dtype and t.shape == ids.shape and torch.equal(t, ids) for t in call.tensors)


def _stack(model: nn.Module, name: StackName, ids: Tensor, calls: list[_Call]) -> Stack:
    """Find the innermost module that takes the ids and holds layers, and the embedding that it looks them up in."""
    reached = [call for call in calls if _given(call, ids)]
    holders = [call for call in reached if any(isinstance(part, nn.ModuleList) for part in call.module.modules())]
    lookups = [call for call in reached if isinstance(call.module, nn.Embedding) and isinstance(call.output, Tensor)]
    if not holders or not lookups:
        raise UnsupportedModelError(
            explain(
                "a soft prompt needs a model in which token ids reach an embedding and a stack of layers.",
                "Attach to the text model inside.",
                model=type(model).__name__,
                found=f"{len(lookups)} embeddings and {len(holders)} stacks for the {name}'s ids",
            )
        )
    lookup = lookups[0]
    holder = _fed(holders[-1], lookup, calls)
    module = holder.module
    parameters = inspect.signature(module.forward).parameters
    return Stack(
        name=name,
        path=holder.path,
        module=module,
        embedding=lookup.module,
        width=lookup.output.shape[-1],
        causal=_is_causal(model, module, ids, name),
        positions=_positions(module, parameters, calls),
        parameters=[key for key, value in parameters.items() if value.kind is not value.VAR_KEYWORD],
        pooled=_pooled(module, calls),
    )


def _fed(holder: _Call, lookup: _Call, calls: list[_Call]) -> _Call:
    """Find the stack inside that is given the embeddings, as a text model by the vision-language model around it.

    The model around it makes positions and masks of the ids, which must be made without the prompt and moved after.
    """
    for call in reversed(calls[calls.index(holder) + 1 :]):
        inside = call.module is not holder.module and any(part is call.module for part in holder.module.modules())
        takes = "inputs_embeds" in inspect.signature(call.module.forward).parameters
        if not (inside and takes and any(isinstance(part, nn.ModuleList) for part in call.module.modules())):
            continue
        if any(t.shape == lookup.output.shape and torch.equal(t, lookup.output) for t in call.tensors):
            return call
    return holder


def _pooled(module: nn.Module, calls: list[_Call]) -> nn.Module | None:
    """Find the part of a stack whose first column goes to its pooler, as in ALBERT; None where the pooler takes all columns."""
    pooler = next((n for n, call in enumerate(calls) if call.module is getattr(module, "pooler", None)), None)
    if pooler is None or not calls[pooler].tensors or calls[pooler].tensors[0].dim() != 2:
        return None
    parts = set(map(id, module.children()))
    return [call.module for call in calls[:pooler] if id(call.module) in parts][-1]


def _is_causal(model: nn.Module, module: nn.Module, ids: Tensor, name: str) -> bool:
    """Change the second token and see whether the first one's state follows."""
    states = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append(first_state(output)[:, 0].float())

    other = ids.clone()
    other[:, 1] = ids[:, 0] if ids[0, 1] != ids[0, 0] else ids[:, 2]
    handle = module.register_forward_hook(keep)
    try:
        for row in (ids, other):
            if name == "text":
                model(input_ids=row)
            elif name == "encoder":
                model(input_ids=row, decoder_input_ids=decoder_ids(ids))
            else:
                model(input_ids=probe_ids(model, _vocabulary(model), columns=4), decoder_input_ids=row)
    finally:
        handle.remove()
    change = (states[0] - states[1]).abs().max()
    return bool(change <= 1e-6 * states[0].abs().max().clamp(min=1e-6))


def _positions(module: nn.Module, parameters: Any, calls: list[_Call]) -> Positions:
    table = None
    for path, part in module.named_modules():
        name = path.rsplit(".", 1)[-1]
        if isinstance(part, nn.Embedding) and ("position" in name or name == "wpe") and "relative" not in name:
            table = part
    config = getattr(module, "config", None)
    trained = getattr(config, "max_position_embeddings", None)
    start, padding, by_column = 0, 0, False
    limit: int | None = None
    if table is not None:
        if table.padding_idx is not None and getattr(table, "offset", None) is None:
            start, padding = table.padding_idx + 1, table.padding_idx
        limit = table.num_embeddings - start - int(getattr(table, "offset", 0))
        answers = [call.output for call in calls if call.module is table]
        if answers and isinstance(answers[-1], Tensor) and answers[-1].dim() == 2:
            table, by_column = None, "position_ids" not in parameters  # RoFormer: one answer for all rows
    elif any("embed_positions" in name for name, _ in module.named_buffers()):
        limit = trained
    return Positions(
        argument="position_ids" in parameters,
        table=table,
        start=start,
        padding=padding,
        limit=limit,
        trained=trained if isinstance(trained, int) else None,
        by_column=by_column,
    )
