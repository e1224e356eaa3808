"""Errors name what a reader can change, not internals of a probe or of another call."""

from __future__ import annotations

import re

import pytest
import tokens
import zoo

import softhooks
from softhooks import Layout, OptionError, PrefixTuning, PromptTooLongError, PromptTuning, PTuning


@pytest.mark.parametrize("method", [PromptTuning, PrefixTuning])
@pytest.mark.parametrize(
    ("arch", "head"),
    [("gpt2", "causal"), ("opt", "causal"), ("bert", "sequence"), ("roberta", "masked"), ("bart", "seq2seq")],
)
def test_a_prompt_that_is_too_long_is_told_how_long_it_may_be(method: type, arch: str, head: str) -> None:
    """A prompt of the length that the error names can be attached."""
    model = zoo.build(arch, head)
    with pytest.raises(
        PromptTooLongError, match=r"leave too few of the model's 9[46] positions for text(.|\n)*virtual tokens: *96\n"
    ) as told:
        softhooks.attach(model, method(96))
    text = str(told.value)
    assert "text:  " not in text
    room = int(re.search(r"Use at most (\d+) virtual tokens", text)[1])
    softhooks.attach(model, method(room)).remove()
    if method is PromptTuning:
        with pytest.raises(PromptTooLongError, match=rf"room for: *{room} virtual tokens and a text of 5") as told:
            softhooks.attach(model, method(room + 1))
        assert "Truncate" not in str(told.value)
        assert not hasattr(model, "soft_prompt")


def test_a_text_that_is_too_long_is_still_told_of_the_text() -> None:
    model = zoo.build("gpt2")
    with (
        softhooks.attach(model, PromptTuning(80)),
        pytest.raises(PromptTooLongError, match=r"prompt: *80\ntext: *20\npositions: *96\nTruncate the text"),
    ):
        model(zoo.text(1, 20))


def test_words_near_to_a_prefix_are_told_apart_from_starts() -> None:
    model = zoo.build("llama")
    prompt = softhooks.attach(model, PrefixTuning(3))
    with pytest.raises(
        OptionError,
        match=r"^the prompt 'default' \(prefix_tuning\) has other tensors \(text\) .* it cannot be compared with words",
    ):
        softhooks.nearest_words(prompt, tokens.tokenizer())
    with pytest.raises(OptionError, match=r"^the prompt .* cannot be compared with prompts"):
        softhooks.most_similar({"one": prompt}, prompt)
    with pytest.raises(OptionError, match=r"^the prompt .* cannot be used to initialize another prompt"):
        softhooks.attach(zoo.build("llama"), PromptTuning(3, init="prompt", init_from=prompt))


def test_p_tuning_without_arguments() -> None:
    for make in (PTuning, lambda: PTuning(0), lambda: PTuning(encoder="mlp")):
        with pytest.raises(
            OptionError, match=r"PTuning has no virtual tokens; pass their number, such as PTuning\(20\), or a `layout`"
        ):
            make()
    with pytest.raises(OptionError, match=r"num_virtual_tokens is -1; it must be an integer of at least 1"):
        PTuning(-1)
    with pytest.raises(OptionError, match=r"layout must be a Layout, such as Layout\('\{soft:3\} \{text\}'\)"):
        PTuning(layout="{soft:3} {a}")
    for method in (
        PromptTuning,
        PrefixTuning,
        softhooks.PTuningV2,
        softhooks.Cartridge,
        softhooks.MultitaskPromptTuning,
    ):
        with pytest.raises(TypeError, match="num_virtual_tokens"):
            method()
    with pytest.raises(TypeError, match="encodr"):
        PTuning(4, encodr="mlp")


@pytest.mark.parametrize(
    "slots",
    [
        "{soft}",
        "{soft:}",
        "{soft:x}",
        "{soft:0}",
        "{soft 3}",
        "{soft=3}",
        "{Soft:3}",
        "{sfot:3}",
        "{soft:3, nam=a}",
        "{soft:3 tokens}",
    ],
)
def test_slots_that_do_not_say_how_many(slots: str) -> None:
    with pytest.raises(OptionError, match=r"For slots, write their number, as in \{soft:3\}") as told:
        Layout("{a} " + slots + " b {soft:2}")
    assert f"the template contains {slots!r};" in str(told.value)
    assert "Double" not in str(told.value)


@pytest.mark.parametrize("field", ["{a b}", "{}", "{a.b}", "{a!r}", "{a-b}", "{mask?}"])
def test_fields_that_no_column_has(field: str) -> None:
    with pytest.raises(
        OptionError, match=r"For a field, write a column name of letters, digits and _, as in \{text\}"
    ) as told:
        Layout("{soft:2} " + field)
    assert f"the template contains {field!r};" in str(told.value)


@pytest.mark.parametrize("text", ["{soft:2} {", "{soft:2} a } b", "{soft:2} {a"])
def test_a_brace_of_the_text(text: str) -> None:
    with pytest.raises(OptionError, match=r"Double a brace that is part of the text: \{\{ or \}\}\.$"):
        Layout(text)
    assert Layout("{soft:2} {{a}} {b}").num_virtual_tokens == 2
