"""Few-shot contexts: rendering of examples and templates, valid token types, and rows that read the same."""

from __future__ import annotations

from typing import Any

import pytest
import tokens
import torch
import zoo

import softhooks
from softhooks import ContextAwarePromptTuning, OptionError
from softhooks.layout.few_shot import Context, ExampleTemplate

TEMPLATE = "word20 {input} word21 {sep} word22 {label} word23"
EXAMPLES = [("word5 word6", "word7"), ("word8", "word9 word10")]
MADE: dict[str, Any] = {"separator": "word30", "inner_separator": "word31"}


def made(**changes: Any) -> ContextAwarePromptTuning:
    options = {"examples": EXAMPLES, "template": TEMPLATE, "tokenizer": tokens.tokenizer(), **MADE, **changes}
    return ContextAwarePromptTuning(**options)


# --- what is made -----------------------------------------------------------------------------------------------------


def test_every_token_has_a_type() -> None:
    """BOS once; format, input, format | separator | format, label, format | separator, in types 4i + 1 to 4i + 4 and 0."""
    method = made()
    assert method.context_ids == (
        *(zoo.BOS, 20, 5, 6, 21, 31, 22, 7, 23, 30),
        *(20, 8, 21, 31, 22, 9, 10, 23, 30),
    )
    assert method.token_types == (
        *(0, 1, 2, 2, 1, 0, 3, 4, 3, 0),
        *(5, 6, 5, 0, 7, 8, 8, 7, 0),
    )
    assert method.num_virtual_tokens == 19


def test_without_a_separator_the_labels_format_begins_behind_the_input() -> None:
    method = made(template="word20 {input} word22 {label}")
    assert method.token_types == (0, 1, 2, 2, 3, 4, 0, 5, 6, 7, 8, 8, 0)


def test_a_tokenizer_without_bos_begins_with_the_first_example() -> None:
    tokenizer = tokens.merged()
    assert tokenizer.bos_token_id is None
    method = ContextAwarePromptTuning(
        examples=[("the cat", "yes")], template="Question: {input} Answer: {label}", tokenizer=tokenizer
    )
    assert method.token_types is not None
    assert method.token_types[0] == 1


def test_parts_are_tokenized_separately() -> None:
    """No token spans two parts, although the tokenizer merges across them; a space before a field belongs to the field."""
    tokenizer = tokens.merged()
    method = ContextAwarePromptTuning(
        examples=[("eat", "yes")], template="it was gr{input}, Answer: {label}", tokenizer=tokenizer, separator=""
    )
    parts = ["it was gr", "eat", ", Answer:", " yes"]
    pieces = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    assert method.context_ids == tuple(token for piece in pieces for token in piece)
    assert method.token_types == tuple(kind for piece, kind in zip(pieces, (1, 2, 3, 4), strict=True) for _ in piece)
    joined = tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(joined) == tokenizer.decode(method.context_ids)
    assert list(method.context_ids) != joined


def test_several_inputs() -> None:
    rows = [{"premise": "word5", "hypothesis": "word6", "label": "word7"}]
    template = "word20 {premise} word21 {hypothesis} word22 {label}"
    method = made(examples=rows, template=template)
    assert method.context_ids == (zoo.BOS, 20, 5, 21, 6, 22, 7, 30)
    assert method.token_types == (0, 1, 2, 1, 2, 3, 4, 0)
    assert method.render({"premise": "word8", "hypothesis": "word9"})["input_ids"] == [20, 8, 21, 9, 22]
    with pytest.raises(OptionError, match="premise, hypothesis, label"):
        made(examples=EXAMPLES, template=template)
    with pytest.raises(OptionError, match="hypothesis"):
        method.render({"premise": "word8"})


def test_pairs_and_mappings_are_the_same() -> None:
    mappings = [{"input": text, "label": label, "number": i} for i, (text, label) in enumerate(EXAMPLES)]
    assert made(examples=mappings) == made(examples=[list(pair) for pair in EXAMPLES]) == made()


def test_what_the_caller_gave_is_not_modified() -> None:
    examples, ids, types = [{"input": "word5", "label": "word6"}], [1, 5, 6], [1, 2, 4]
    made(examples=examples)
    tensors = torch.tensor(ids), torch.tensor(types)
    one = ContextAwarePromptTuning(context_ids=ids, token_types=types)
    other = ContextAwarePromptTuning(context_ids=tensors[0], token_types=tensors[1])
    assert one == other
    with softhooks.attach(zoo.build("llama"), one) as prompt:
        prompt.model.train()(zoo.text(2, 5), labels=zoo.text(2, 5)).loss.backward()
    assert (examples, ids, types) == ([{"input": "word5", "label": "word6"}], [1, 5, 6], [1, 2, 4])
    assert (tensors[0].tolist(), tensors[1].tolist()) == (ids, types)


# --- what makes no sense ----------------------------------------------------------------------------------------------

IDS = [5, 6, 7, 8]
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("nothing", {}, "context ids: +missing"),
    ("no types", {"context_ids": IDS}, "token types: +missing"),
    ("other lengths", {"context_ids": IDS, "token_types": [1, 2, 4]}, "4 entries and token_types has 3"),
    ("no tokens", {"context_ids": [], "token_types": []}, "0 entries and token_types has 0"),
    ("a negative type", {"context_ids": IDS, "token_types": [1, 2, 3, -4]}, "negative"),
    ("a negative id", {"context_ids": [5, -6, 7, 8], "token_types": [1, 2, 3, 4]}, "negative"),
    ("all separators", {"context_ids": IDS, "token_types": [0] * 4}, "it must contain a type of trained tokens"),
    ("labels only", {"context_ids": IDS, "token_types": [0, 4, 4, 8]}, "it must contain a type of trained tokens"),
    ("no label", {"context_ids": IDS, "token_types": [1, 2, 3, 0]}, "has no label"),
    ("a maximum that is no multiple of 4", {"context_ids": IDS, "token_types": [2, 4, 6, 7]}, "example 1 has no label"),
    ("a first example without a label", {"context_ids": IDS, "token_types": [2, 3, 6, 8]}, "example 0 has no label"),
    ("PEFT's default", {"context_ids": IDS, "token_types": [1] * 4}, "has no label"),
    ("a label that nothing predicts", {"context_ids": IDS, "token_types": [4, 1, 2, 4]}, "a token before each label"),
    (
        "a gap",
        {"context_ids": IDS, "token_types": [2, 4, 10, 12]},
        r"type 10 \(example 2\), .* the next example is 1",
    ),
    (
        "no first example",
        {"context_ids": IDS, "token_types": [6, 8, 10, 12]},
        r"type 6 \(example 1\), .* the next example is 0",
    ),
    ("examples out of order", {"context_ids": IDS, "token_types": [6, 8, 2, 4]}, "in order"),
    ("an example in two pieces", {"context_ids": [*IDS, 9], "token_types": [2, 4, 6, 8, 2]}, "in order"),
    ("fractions", {"context_ids": IDS, "token_types": [1.0, 2.0, 3.0, 4.0]}, "integers"),
    ("a tensor of fractions", {"context_ids": IDS, "token_types": torch.ones(4)}, "integers"),
    ("booleans", {"context_ids": IDS, "token_types": [True, 2, 3, 4]}, "integers"),
    ("a text", {"context_ids": "word5", "token_types": [1, 2, 3, 4]}, "integers"),
    ("a number", {"context_ids": 5, "token_types": [1, 2, 3, 4]}, "integers"),
    ("another length", {"context_ids": IDS, "token_types": [1, 2, 3, 4], "num_virtual_tokens": 5}, "is 5"),
]
GIVEN: dict[str, Any] = {"context_ids": IDS, "token_types": [1, 2, 3, 4]}
WRONG += [
    (f"{name} {value}", {**GIVEN, name: value}, name)
    for name, values in {
        "epsilon_input": (-0.1, "wide", True, float("nan")),
        "epsilon_format": (-1, [0.1]),
        "decay": (0, -0.5, 1.1, None, "slow", float("nan")),
        "template": ("word20", "{input}", "{label}", "{label} {input}", "{input} {label} {label}", "{input} {mask} {label}",
                     "{soft:2} {input} {label}", "{input} {label", 3),
    }.items()
    for value in values
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_options_that_cannot_be(options: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words if words != "template" else r"(?i)template|brace"):
        ContextAwarePromptTuning(**options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": None}, "template= is missing"),
        ({"tokenizer": None}, "tokenizer= is missing"),
        ({"examples": []}, "at least one example"),
        ({"examples": "word5"}, "at least one example"),
        ({"examples": {"input": "word5", "label": "word6"}}, "at least one example"),
        ({"examples": ["word5 word6"]}, "an example is .*; it must be a mapping"),
        ({"examples": [("word5", "word6", "word7")]}, "an example is .*; it must be a mapping"),
        ({"examples": [("word5", "")]}, "example 0"),
        ({"examples": [EXAMPLES[0], {"input": "word5"}]}, "example 1"),
        ({"examples": [("word5", 1)]}, "it must be a string"),
        ({"examples": [(None, "word5")]}, "it must be a string"),
        ({"context_ids": IDS}, r"\(context_ids, token_types\) are both given; pass only one"),
        ({"token_types": IDS}, r"\(context_ids, token_types\) are both given; pass only one"),
    ],
    ids=str,
)  # fmt: skip
def test_examples_that_cannot_be(changes: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        made(**changes)


def test_labels_are_not_needed_without_a_loss_over_them() -> None:
    method = ContextAwarePromptTuning(context_ids=IDS, token_types=[1, 2, 3, 0], context_loss=False)
    assert method.objective() is None
    assert Context(tuple(IDS), (1, 1, 2, 6)).examples == (0, 0, 0, 1)


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    method = ContextAwarePromptTuning(context_ids=[5, zoo.VOCABULARY], token_types=[1, 4])
    model = zoo.build("llama")
    with pytest.raises(OptionError, match="vocabulary"):
        softhooks.attach(model, method)
    assert not hasattr(model, "soft_prompt")


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_reads_as_an_example_does() -> None:
    method = made()
    row = method.render("word5 word6", "word7")
    assert row == {
        "input_ids": [20, 5, 6, 21, 31, 22, 7],
        "attention_mask": [1] * 7,
        "labels": [*[-100] * 6, 7],
    }
    assert method.context_ids is not None
    assert tuple(row["input_ids"]) == method.context_ids[1:8]
    assert method.render("word5 word6") == {"input_ids": row["input_ids"][:-1], "attention_mask": [1] * 6}
    for same in (("word5 word6", "word7"), {"input": "word5 word6", "label": "word7"}):
        assert method.render(same) == row
    assert method.render({"input": "word5 word6", "label": "word8"}, "word7") == row
    with pytest.raises(OptionError, match="label"):
        method.render("word5", "")


def test_a_row_of_a_merging_tokenizer_reads_as_an_example_does() -> None:
    tokenizer = tokens.merged()
    method = ContextAwarePromptTuning(
        examples=[("the cat", "great"), ("the dog", "bad")], template="it is {input}{sep}answer: {label}!",
        tokenizer=tokenizer,
    )  # fmt: skip
    for number, (text, label) in enumerate([("the cat", "great"), ("the dog", "bad")]):
        row = method.render(text, label)
        assert method.context.example_of(row["input_ids"]) == number
        assert tokenizer.decode([i for i in row["labels"] if i != -100]) == f" {label}"
    assert tokenizer.decode(method.render("the cat")["input_ids"]) == "it is the cat\nanswer:"


def test_rows_say_which_example_they_are_where_they_must_not_see_it() -> None:
    method = made(leave_one_out=True)
    assert [method.render(*pair)["example_ids"] for pair in EXAMPLES] == [0, 1]
    assert method.render("word5 word6", "word8")["example_ids"] == -1
    assert "example_ids" not in method.render("word5 word6")
    assert "example_ids" not in made().render(*EXAMPLES[0])


def test_a_row_needs_the_template_and_a_tokenizer() -> None:
    method = ContextAwarePromptTuning(**GIVEN)
    with pytest.raises(OptionError, match="without `template=`"):
        method.render("word5")
    method = ContextAwarePromptTuning(**GIVEN, template=TEMPLATE, **MADE)
    with pytest.raises(OptionError, match="tokenizer"):
        method.render("word5")
    assert method.render("word5", tokenizer=tokens.tokenizer())["input_ids"] == [20, 5, 21, 31, 22]


def test_a_saved_prompt_renders_as_before(tmp_path: Any) -> None:
    method = made()
    with softhooks.attach(zoo.build("llama"), method) as prompt:
        prompt.save_pretrained(tmp_path)
    loaded = softhooks.load(zoo.build("llama"), tmp_path)
    assert loaded.method == method
    assert loaded.method.tokenizer is None  # type: ignore[attr-defined]
    row = loaded.method.render("word5", "word6", tokenizer=tokens.tokenizer())  # type: ignore[attr-defined]
    assert row == method.render("word5", "word6")
    loaded.remove()


def test_blanks_of_a_template_belong_to_its_fields() -> None:
    template = ExampleTemplate("q: {input} a: {label}", "", "")
    ids, label = template.row({"input": "the cat", "label": "yes"}, tokenizer := tokens.merged())
    assert tokenizer.decode(ids) == "q: the cat a:"
    assert tokenizer.decode(label) == " yes"
