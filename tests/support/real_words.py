"""Real words as a prompt: a prompt made of the words before a text must act as these words do on the bare model.

`prefix_gap` takes the keys and values of the first words of a text where attention sees them in a bare forward, enters them as a
prefix before the rest, and compares the rest's states. `shared_gap` and `slots_gap` do the same with the words' embeddings. Each
returns the largest difference, relative to the largest state: about 1e-6 in fp32 where the prompt is right. What goes wrong in a
model's numbering of positions, its masks or its windows shows here. Not for models with relative biases (T5), whose prefixes
have no bias by definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import softhooks
from softhooks.backbone.attention_groups import groups_of
from softhooks.backbone.examine import examine
from softhooks.backbone.probing import last_hidden_state
from softhooks.backbone.recording_cache import RecordingCache
from softhooks.inject.capture import CapturePass
from softhooks.inject.prefix.key_values import flatten


@torch.no_grad()
def prefix_gap(
    model: Any, ids: Tensor, length: int, *, left: int = 0, right: int = 0, positions: bool = False
) -> float:
    """Compare a prefix of the first `length` words' own keys and values with these words in the text.

    In a decoder words see no text; in an encoder their keys and values come from the forward in which they do, and the text's
    positions are shifted as in a decoder. In an encoder-decoder all three kinds of keys and values are entered.

    Args:
        model: a bare model in eval mode.
        ids: words and text, [1, N].
        length: P, how many of them are the prompt.
        left, right: how much padding stands around the text.
        positions: whether the text's call brings `position_ids`, counted by the mask, from where the bare model starts.

    Raises:
        softhooks.errors.SoftHooksError: the model takes no prefix that stands for words.
    """
    method = softhooks.PrefixTuning(length, init="zero")
    with softhooks.attach(model, method, train_head=False) as prompt:
        prompt.conventions["shift_positions"] = movable(prompt)
        with softhooks.disabled(model):
            tables, expected = _captured(model, prompt, ids, length)
        for group, table in prompt.encoder.named_parameters():
            table.copy_(tables[group])
        return _gap(expected, _text(model, prompt, ids, length, left, right, positions), length)


def movable(prompt: Any) -> bool:
    """Whether a prefix can move the positions of a model's text, which it does by default in decoders alone."""
    return prompt.prompted_model.structure.entry.positions.can_shift


@torch.no_grad()
def shared_gap(model: Any, ids: Tensor, length: int, **padding: Any) -> float:
    """Compare a prompt of the first words' embeddings, run once, with these words in the text. See `prefix_gap`."""
    return _embedded_gap(model, ids, length, "shared", **padding)


@torch.no_grad()
def slots_gap(model: Any, ids: Tensor, length: int, **padding: Any) -> float:
    """Compare a prompt of the first words' embeddings, in the sequence, with these words in the text. See `prefix_gap`."""
    return _embedded_gap(model, ids, length, "slots", **padding)


@torch.no_grad()
def front_gap(model: Any, ids: Tensor, length: int, **padding: Any) -> float:
    """Compare a prompt of the first words' embeddings, in the way that attach chooses, with these words in the text."""
    return _embedded_gap(model, ids, length, None, **padding)


def _embedded_gap(
    model: Any, ids: Tensor, length: int, injection: Any, left: int = 0, right: int = 0, positions: bool = False
) -> float:
    words = examine(model).entry.embedding(ids[:, :length])[0]
    method = softhooks.PromptTuning(length, init="tensor", init_tensor=words)
    with softhooks.attach(model, method, train_head=False, injection=injection) as prompt:
        with softhooks.disabled(model):
            expected = _run(model, prompt, _call(prompt, ids, ids.roll(1, -1)))
        return _gap(expected, _text(model, prompt, ids, length, left, right, positions), length)


# --- running ------------------------------------------------------------------------------------------------------------


def _call(prompt: Any, ids: Tensor, decoder_ids: Tensor) -> dict[str, Tensor]:
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return call | ({"decoder_input_ids": decoder_ids} if prompt.prompted_model.structure.is_encoder_decoder else {})


def _text(
    model: Any, prompt: Any, ids: Tensor, length: int, left: int, right: int, positions: bool
) -> tuple[Tensor, Tensor | None]:
    """Run the text after the prompt, with padding around it, and remove the padding."""
    encoder_decoder = prompt.prompted_model.structure.is_encoder_decoder
    shortened = length if prompt.method.enters == "attention" else 0  # a slot stands in the encoder alone
    call = _call(prompt, ids[:, length:], ids.roll(1, -1)[:, shortened:])
    pad = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    fill = {"input_ids": pad, "attention_mask": 0}
    for key, value in fill.items():
        call[key] = torch.nn.functional.pad(call[key], (left, right), value=value)
    if positions:
        call["position_ids"] = (call["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        call["position_ids"] += prompt.prompted_model.structure.entry.positions.start
    states, logits = _run(model, prompt, call)
    if encoder_decoder:
        return states, logits
    cut = slice(left, states.shape[1] - right)
    return states[:, cut], logits if logits is None else logits[:, cut]


def _run(model: Any, prompt: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Run the model and take the last stack's states, and the logits where each column has its own."""
    kept: list[Tensor] = []
    stacks = prompt.prompted_model.structure.stacks
    inside = [stack.state.current for stack in stacks]

    def keep(_module: Any, _args: Any, output: Any) -> None:
        if [stack.state.current for stack in stacks] == inside:  # not the prompt's own rows
            kept.append(last_hidden_state(output).float())

    handle = stacks[-1].module.register_forward_hook(keep)
    try:
        logits = getattr(model(**call), "logits", None)
    finally:
        handle.remove()
    columns = kept[-1].shape[1]
    return kept[-1], logits.float() if isinstance(logits, Tensor) and logits.shape[1:2] == (columns,) else None


def _captured(
    model: Any, prompt: Any, ids: Tensor, length: int
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor | None]]:
    """Run words and text through the bare model; take the words' keys and values by group, and the states."""
    structure = prompt.prompted_model.structure
    cache = RecordingCache() if structure.entry.injection == "cache" else None
    call: dict[str, Any] = _call(prompt, ids, ids.roll(1, -1)) | ({} if cache is None else {"past_key_values": cache})
    if structure.is_encoder_decoder:
        call["use_cache"] = False
    passes = {stack.name: CapturePass(stack) for stack in structure.stacks}
    for stack in structure.stacks:
        stack.state.current = passes[stack.name]
    try:
        expected = _run(model, prompt, call)
    finally:
        for stack in structure.stacks:
            stack.state.current = None
    if cache is not None:
        keys, values = passes["text"].keys["self"], passes["text"].values["self"]
        keys |= {index: key for index, (key, _) in cache.recorded.items()}
        values |= {index: value for index, (_, value) in cache.recorded.items()}
    tables = {}
    for group, (stack, role) in groups_of(structure).items():
        live = passes[stack.name]
        first = [{i: part[:, :, :length] for i, part in parts[role].items()} for parts in (live.keys, live.values)]
        tables[group] = flatten(first[0], first[1], stack.sites_of(role)).float()
    return tables, expected


def _gap(expected: tuple[Tensor, Tensor | None], found: tuple[Tensor, Tensor | None], length: int) -> float:
    gaps = []
    for whole, text in zip(expected, found, strict=True):
        if whole is None or text is None:
            continue
        own = whole[:, whole.shape[1] - text.shape[1] :]
        gaps.append(float((own - text).abs().max() / own.abs().max().clamp(min=1e-6)))
    return max(gaps)
