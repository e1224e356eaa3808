"""Bad input: the error names the rule, both values and the remedy, and the model stays unchanged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokens
import torch
import transformers as tf
import zoo
from torch import Tensor, nn
from untouched import remove_all, untouched

import softhooks
from softhooks import (
    AttachError,
    Cartridge,
    LlamaAdapter,
    MultitaskPromptTuning,
    NotAttachedError,
    OptionError,
    PrefixTuning,
    PromptMismatchError,
    PromptNotReachedError,
    PromptTooLongError,
    PromptTuning,
    PTuning,
    PTuningV2,
    ResidualPromptTuning,
    SoftHooksError,
    UnsupportedMethodError,
    UnsupportedModeError,
    UnsupportedModelError,
)

IDS = zoo.text(2, 6)


@pytest.fixture(autouse=True)
def _nothing_left_attached() -> Iterator[None]:
    remove_all()
    yield
    remove_all()


def llama() -> Any:
    return zoo.build("llama")


def vit() -> Any:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return tf.ViTModel(tf.ViTConfig(**small, image_size=8, patch_size=4)).eval()


def fnet() -> Any:
    return tf.FNetForMaskedLM(tf.FNetConfig(**zoo.SMALL)).eval()


class Timeseries(nn.Module):
    """A model with embeddings that takes no token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.config = tf.BertConfig()
        self.table = nn.Embedding(8, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, values: Tensor) -> Tensor:
        return values


# --- attach -----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any], type[SoftHooksError], str]] = {
    "a model of images": (
        vit, lambda: PromptTuning(3), {}, UnsupportedMethodError,
        r"^ViTModel takes `pixel_values` instead of token ids(.|\n)*such as PrefixTuning or LlamaAdapter",
    ),
    "no transformers model": (
        lambda: nn.Linear(3, 3), lambda: PromptTuning(3), {}, UnsupportedModelError,
        r"^Linear has no input embeddings(.|\n)*embeds tokens(.|\n)*Attach to the transformers model",
    ),
    "a model that takes no ids": (
        Timeseries, lambda: PromptTuning(3), {}, UnsupportedModelError,
        r"^Timeseries fails on token ids alone(.|\n)*\ncause: *TypeError(.|\n)*Attach to",
    ),
    "a prompt of another width": (
        llama, lambda: PromptTuning(3, init="tensor", init_tensor=torch.zeros(3, 16)), {},
        PromptMismatchError, r"model's embeddings\](.|\n)*init_?.?tensor: *\[3, 16\]\nexpected: *\[3, 32\]\n.*base model",
    ),
    "a prompt of another length": (
        llama, lambda: PromptTuning(3, init="tensor", init_tensor=torch.zeros(4, 32)), {},
        PromptMismatchError, r"\[num_virtual_tokens, size(.|\n)*\[4, 32\]\nexpected: *\[3, 32\]\nSet num_virtual_tokens",
    ),
    "a prefix where attention cannot be entered": (
        fnet, lambda: PrefixTuning(3), {}, UnsupportedMethodError,
        r"^FNet\w+ has no attention(.|\n)*attention interface nor a cache(.|\n)*PromptTuning",
    ),
    "a zero prefix where attention cannot be entered": (
        fnet, lambda: PrefixTuning(3, init="zero"), {}, UnsupportedMethodError, "has no attention that a key-value",
    ),
    "a prompt behind the text of a language model": (
        llama, lambda: PromptTuning(3, placement="end"), {}, UnsupportedMethodError,
        r"would move as the text grows(.|\n)*model: *LlamaForCausalLM\nplacement: *end\nUse placement='front'",
    ),
    "a prompt as long as the positions": (
        lambda: zoo.build("gpt2"), lambda: PromptTuning(96), {}, PromptTooLongError,
        r"leave too few of the model's 96 positions(.|\n)*virtual tokens: *96\npositions: *96\n(.|\n)*at most 91 virtual tokens",
    ),
    "a prompt longer than rotary positions": (
        llama, lambda: PrefixTuning(200, init="zero"), {}, PromptTooLongError,
        r"virtual tokens: *200\npositions: *96",
    ),
    "a prompt longer than RoBERTa's positions": (
        lambda: zoo.build("roberta", "masked"), lambda: PromptTuning(94), {}, PromptTooLongError,
        r"virtual tokens: *94\npositions: *94",
    ),
    "ids outside the vocabulary": (
        llama, lambda: PrefixTuning(3, init_ids=[5, 96]), {}, OptionError,
        r"in the model's vocabulary(.|\n)*ids: *5 to 96\nvocabulary: *0 to 95\nPass the tokenizer",
    ),
    "a tokenizer of another model": (
        llama,
        lambda: PromptTuning(3, init="text", init_text="word120 word5", tokenizer=tokens.tokenizer(200)), {}, OptionError,
        r"ids: *5 to 120\nvocabulary: *0 to 95",
    ),
    "a text of no tokens": (
        llama, lambda: PromptTuning(3, init="text", init_text=" ", tokenizer=tokens.tokenizer()), {},
        OptionError, r"init_text is ' ', which has no tokens; it must have at least one",
    ),
    "no labels": (
        llama, lambda: PromptTuning(3, init="class_labels", init_labels=[], tokenizer=tokens.tokenizer()),
        {}, OptionError, r"init_labels is (\[\]|\(\)); it must be a list of at least one label",
    ),
    "no method": (
        llama, lambda: "prompt", {}, UnsupportedMethodError, r"attach got str instead of a method such as PromptTuning\(20\)",
    ),
    "the class of a method": (
        llama, lambda: PromptTuning, {}, UnsupportedMethodError,
        r"attach got the class PromptTuning instead of a method with its options(.|\n)*Call the class: `PromptTuning\(\.\.\.\)`",
    ),
    "an injection that is not available": (
        lambda: zoo.build("bert", "masked"), lambda: PromptTuning(3), {"injection": "shared"}, UnsupportedMethodError,
        r"'shared' is not available for BertForMaskedLM(.|\n)*asked: *'shared'\npossible: *'slots'\nLeave `injection` out",
    ),
    "a prefix in slots": (
        llama, lambda: PrefixTuning(3), {"injection": "slots"}, UnsupportedMethodError,
        r"asked: *'slots'\npossible: *'attention'",
    ),
    "trainable parameters that are not there": (
        llama, lambda: PromptTuning(3), {"trainable": "*lora*"}, AttachError,
        r"trainable='\*lora\*' does not match any parameter of LlamaForCausalLM",
    ),
    "positions that cannot be shifted": (
        lambda: zoo.build("t5", "seq2seq"), lambda: PrefixTuning(3, shift_positions=True), {}, UnsupportedMethodError,
        r"the positions of T5Stack cannot be shifted(.|\n)*model: *T5Stack\nLeave shift_positions out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_attach_refuses_and_touches_nothing(case: str) -> None:
    build, method, options, error, message = REFUSED[case]
    model = build()
    with untouched(model):
        with pytest.raises(error, match=message):
            softhooks.attach(model, method(), **options)
        with pytest.raises(NotAttachedError):
            softhooks.activate(model, "default")


@pytest.mark.parametrize("case", [case for case in REFUSED if REFUSED[case][0] is llama])
def test_attach_refuses_beside_a_prompt_that_works(case: str) -> None:
    _, method, options, error, message = REFUSED[case]
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(3), "works")
    expected = model(IDS).logits
    with untouched(model), pytest.raises(error, match=message):
        softhooks.attach(model, method(), **options)
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("models/gpt2", r"but 'models/gpt2' was given(.|\n)*Load the model first(.|\n)*load_model"),
        (None, r"but an object of the class NoneType was given(.|\n)*Load the model first"),
        (SimpleNamespace(model=nn.Linear(3, 3)), r"of the class SimpleNamespace was given(.|\n)*its attribute `model`"),
    ],
)
def test_what_is_no_model_is_refused(given: Any, message: str, tmp_path: Path) -> None:
    """Names of models, Trainers and pipelines; `load` refuses them before it looks for the prompt."""
    with pytest.raises(AttachError, match=message):
        softhooks.attach(given, PromptTuning(3))
    with pytest.raises(AttachError, match=message):
        softhooks.load(given, tmp_path / "missing")


# --- options ----------------------------------------------------------------------------------------------------------

NUMBERED: dict[str, Callable[[Any], Any]] = {
    "prompt": PromptTuning,
    "prefix": PrefixTuning,
    "p-tuning": PTuning,
    "p-tuning-v2": PTuningV2,
    "mpt": lambda count: MultitaskPromptTuning(count, tasks=2),
    "adapter": LlamaAdapter,
    "residual": ResidualPromptTuning,
    "cartridge": lambda count: Cartridge(count, document=[5, 6, 7]),
}
"""Every method with `num_virtual_tokens`; contexts and demonstrations determine their own length."""

WRONG_OPTIONS: list[tuple[Callable[[], Any], str]] = [
    (lambda: PromptTuning(3, init="warm"), "init is 'warm'; it must be one of 'vocab', .*'prompt'"),
    (
        lambda: PromptTuning(3, placement="middle"),
        "placement is 'middle'; it must be one of 'front', 'after_first', 'end'",
    ),
    (lambda: PromptTuning(3, init="text"), "init_text is missing; init='text' requires it"),
    (
        lambda: PromptTuning(3, init_text="x"),
        "init_text is given, but init is 'vocab'; only init='text' accepts it",
    ),
    (
        lambda: PromptTuning(3, init="text", init_text="x"),
        "needs a tokenizer, but none is given. Pass `tokenizer=`",
    ),
    (lambda: PromptTuning(3, init="class_labels", init_labels=["x"]), "needs a tokenizer, but none is given"),
    (lambda: PromptTuning(3, init="class_labels", tokenizer=1), "init_labels is missing"),
    (
        lambda: PromptTuning(3, init="tensor"),
        "init_tensor is missing; init='tensor' requires it",
    ),
    (lambda: PromptTuning(3, init_tensor=torch.zeros(3, 32)), "init_tensor is given, but init is 'vocab'"),
    (lambda: PrefixTuning(3, init="vocab"), "init is 'vocab'; it must be one of 'text', 'zero', 'random'"),
    (lambda: PrefixTuning(3, dropout=1.0), "dropout is 1.0; it must be at least 0 and below 1"),
    (lambda: PrefixTuning(3, dropout=-0.1), "dropout is -0.1"),
    (lambda: PrefixTuning(3, hidden_size=0), "hidden_size is 0; it must be an integer of at least 1"),
    (
        lambda: PrefixTuning(3, init="zero", init_ids=[5]),
        "init_text or init_ids is given with init='zero'",
    ),
    (lambda: PrefixTuning(3, init_text="x"), "init_text needs a tokenizer, but none is given"),
    (lambda: PrefixTuning(3, init_text="x", init_ids=[5], tokenizer=1), "are both given; pass one of them"),
]


@pytest.mark.parametrize("number", range(len(WRONG_OPTIONS)))
def test_wrong_options(number: int) -> None:
    make, message = WRONG_OPTIONS[number]
    with pytest.raises(OptionError, match=message) as caught:
        make()
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "3"])
@pytest.mark.parametrize("way", NUMBERED)
def test_a_prompt_without_virtual_tokens_is_refused(way: str, count: Any) -> None:
    """P = 0 would be the base model and train nothing; use `disabled` for the base."""
    said = re.escape(f"num_virtual_tokens is {count!r}; it must be an integer of at least 1.")
    if way == "p-tuning" and type(count) is int and count == 0:  # stands for none given, for a layout may say it
        said = "PTuning has no virtual tokens; pass their number"
    with pytest.raises(OptionError, match=said):
        NUMBERED[way](count)


def test_empty_ids() -> None:
    model = zoo.build("llama")
    with untouched(model), pytest.raises(OptionError, match="init_ids is empty; it must contain at least one id"):
        softhooks.attach(model, PrefixTuning(3, init_ids=[]))


def test_every_error_is_a_softhooks_error() -> None:
    for _, _, _, error, _ in REFUSED.values():
        assert issubclass(error, SoftHooksError)
    assert issubclass(OptionError, ValueError)
    assert issubclass(UnsupportedModeError, SoftHooksError)
    assert issubclass(PromptNotReachedError, SoftHooksError)
