"""Inputs that models with inline attention take besides ids: Luke's entities, TAPAS's table cells, positions of each row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inline_families import CLOSE, P, T, build, loud, text
from torch import Tensor
from untouched import remove_all

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, PTuningV2, UnsupportedModeError


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


# --- entities and cells -----------------------------------------------------------------------------------------------

ENTITIES = {
    "entity_ids": torch.tensor([[2, 3], [4, 5]]),
    "entity_position_ids": torch.tensor([[[1, 2, -1], [4, -1, -1]], [[3, -1, -1], [5, 6, -1]]]),
}


@torch.no_grad()
def test_lukes_words_and_entities_attend_to_a_prefix_as_to_words() -> None:
    """The last words of a text whose first are padding, with these words' keys and values as a prefix."""
    model, call = build("luke"), text("luke")
    with softhooks.attach(model, PTuningV2(P)) as prompt:
        loud(prompt)
        alone = model(**call).logits
        ours = model(**call, **ENTITIES).logits
        parts = prompt.encoder("text").reshape(P, 2, 2, model.config.num_attention_heads, -1).permute(1, 2, 3, 0, 4)
        with softhooks.disabled(model):
            handles = []
            for layer, (key, value) in zip(model.luke.encoder.layer, parts, strict=True):
                own = layer.attention.self
                handles.append(_as_words(own, key, value))
            expected = model(**call, **ENTITIES).logits
            for handle in handles:
                handle()
    assert not torch.allclose(ours, alone, atol=1e-3)
    torch.testing.assert_close(ours, expected, **CLOSE)


def _as_words(module: Any, key: Tensor, value: Tensor) -> Any:
    """Replace Luke's attention with one written per query, whose keys are the prefix's, the words' and the entities'."""

    def forward(words: Tensor, entities: Tensor, attention_mask: Any = None, output_attentions: bool = False) -> Any:
        split = module.transpose_for_scores
        both, rows = torch.cat([words, entities], 1), len(words)
        keys, values = split(module.key(both)), split(module.value(both))
        outputs = []
        for states, to_words, to_entities in (
            (words, module.query, module.w2e_query),
            (entities, module.e2w_query, module.e2e_query),
        ):
            near = torch.cat([key.expand(rows, -1, -1, -1), keys[:, :, : words.shape[1]]], 2)
            scores = [split(to_words(states)) @ near.mT, split(to_entities(states)) @ keys[:, :, words.shape[1] :].mT]
            weights = (torch.cat(scores, -1) / key.shape[-1] ** 0.5).softmax(-1)
            whole = torch.cat([value.expand(rows, -1, -1, -1), values], 2)
            outputs.append((weights @ whole).transpose(1, 2).flatten(2))
        return tuple(outputs)

    module.forward = forward
    return lambda: delattr(module, "forward")


def test_a_prefix_that_shifts_lukes_words_refuses_positions_of_entities() -> None:
    model, call = build("luke"), text("luke")
    with softhooks.attach(model, PrefixTuning(P, shift_positions=True)):
        with pytest.raises(UnsupportedModeError, match="`entity_position_ids`, which refers to words by their indices"):
            model(**call, **ENTITIES)
        model(**call)


def test_tapas_numbers_the_tokens_of_cells_as_it_does_without_a_prefix() -> None:
    model, call = build("tapas"), text("tapas")
    types = torch.zeros(2, T, 7, dtype=torch.long)
    types[:, 5:, 0] = 1
    types[:, 5:8, 1], types[:, 8:, 1], types[:, 5:, 2] = 1, 2, 1
    call["token_type_ids"] = types
    asked: list[Tensor] = []
    handle = model.tapas.embeddings.position_embeddings.register_forward_hook(lambda _, args, __: asked.append(args[0]))
    call["attention_mask"] = torch.ones(2, T, dtype=torch.long)
    with torch.no_grad():
        model(**call)
        own = asked[0]
        for method in (PTuningV2(P), PrefixTuning(P), LlamaAdapter(P)):
            with softhooks.attach(model, method):
                asked.clear()
                model(**call)
            assert torch.equal(asked[-1], own)
        handle.remove()
        computes = pytest.raises(UnsupportedModeError, match="from which the model computes positions")
        with softhooks.attach(model, PrefixTuning(P, shift_positions=True)), computes:
            model(**call)
        call["attention_mask"][0, :2] = 0
        with (
            softhooks.attach(model, PTuningV2(P)),
            pytest.raises(UnsupportedModeError, match="rows begin with padding"),
        ):
            model(**call)


@pytest.mark.parametrize("arch", ["flaubert", "xlm"])
def test_rows_without_a_mask_get_a_row_of_positions_each(arch: str) -> None:
    model, call = build(arch), text(arch)
    for method in (PTuningV2(P), PrefixTuning(P, shift_positions=True), PromptTuning(P)):
        with torch.no_grad(), softhooks.attach(model, method) as prompt:
            loud(prompt)
            together = model(**call).logits
            masked = model(**call, attention_mask=torch.ones(2, T, dtype=torch.long)).logits
            alone = torch.cat([model(input_ids=row[None]).logits for row in call["input_ids"]])
        torch.testing.assert_close(together, masked, **CLOSE)
        torch.testing.assert_close(together, alone, **CLOSE)


@torch.no_grad()
def test_prompts_in_the_sequence_run_the_models_own_attention() -> None:
    model, call = build("big_bird"), text("big_bird")
    with softhooks.attach(model, PromptTuning(P)) as prompt:
        assert prompt.injection == "slots"
        assert model(**call).logits.shape[1] == T
