"""Words entered as a prompt act as these words in the text, wherever the text's padding stands."""

from __future__ import annotations

import pytest
import real_words
import zoo

PADDINGS = [{}, {"left": 3}, {"right": 2}, {"left": 2, "right": 2}]


def _gaps(measure, model, **more):
    ids = zoo.text(1, 9)
    return [measure(model, ids, 3, **padding, **more) for padding in PADDINGS]


@pytest.mark.parametrize("arch", [*zoo.CAUSAL, "gptj", "bloom", "falcon"])
def test_a_causal_models_words_are_the_same_with_every_injection(arch):
    model = zoo.build(arch)
    for measure in (real_words.prefix_gap, real_words.shared_gap, real_words.slots_gap):
        assert max(_gaps(measure, model)) < 1e-5, measure.__name__
        if arch != "bloom":  # takes no positions
            assert max(_gaps(measure, model, positions=True)) < 1e-5, measure.__name__


@pytest.mark.parametrize("arch", ["bert", "albert", "electra", "distilbert", "megatron-bert", "rembert", "esm"])
def test_an_encoders_words_are_the_same_as_a_prefix_and_as_slots(arch):
    model = zoo.build(arch, "masked")
    for measure in (real_words.prefix_gap, real_words.slots_gap):
        assert max(_gaps(measure, model)) < 1e-5, measure.__name__


def test_the_oracle_sees_a_prefix_at_wrong_positions(monkeypatch):
    monkeypatch.setattr(real_words, "movable", lambda prompt: False)
    assert real_words.prefix_gap(zoo.build("gpt2"), zoo.text(1, 9), 3) > 1e-2
