"""Requests for SGLang have its published fields (published.json); `make test-sglang` runs SGLang itself."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import examples
import pytest
import tokens
import torch
import zoo
from published import FACTS, is_installed, read

import softhooks
from softhooks import LlamaAdapter, PromptTuning
from softhooks.errors import OptionError, UnsupportedMethodError
from softhooks.integrations import sglang

FIELDS, SAMPLING = FACTS["sglang"]["GenerateReqInput"], FACTS["sglang"]["SamplingParams"]


def is_list_of_lists_of_numbers(value: Any, width: int) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) == width and all(isinstance(number, float) for number in row)
        for row in value
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_request_holds_the_rows(precision: torch.dtype) -> None:
    model = zoo.build("llama").to(precision)
    softhooks.attach(model, PromptTuning(5))
    rows = sglang.embeddings(model, "word5 word6 word7", tokens.tokenizer())
    body = json.loads(json.dumps(sglang.request(rows, sampling_params={"max_new_tokens": 4}, stream=True)))
    assert set(body) == {"input_embeds", "sampling_params", "stream"}
    assert is_list_of_lists_of_numbers(body["input_embeds"], 32)
    assert torch.equal(torch.tensor(body["input_embeds"]).to(precision), rows)


@pytest.mark.parametrize(
    "options", [{}, {"sampling_params": {"max_new_tokens": 4, "temperature": 0}, "stream": True}], ids=str
)
def test_the_request_has_published_fields_of_the_published_types(options: dict[str, Any]) -> None:
    rows = torch.randn(3, 32)
    seen = read(json.dumps(sglang.request(rows, **options)), FIELDS)
    assert torch.equal(torch.tensor(seen.pop("input_embeds")), rows)
    assert seen == {"sampling_params": {}, **options}
    assert read(json.dumps(seen["sampling_params"]), SAMPLING) == seen["sampling_params"]


def test_a_field_that_is_not_published_is_noticed() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        read(json.dumps(sglang.request(torch.randn(3, 32), max_tokens=4)), FIELDS)


@pytest.mark.skipif(not is_installed("sglang"), reason="SGLang has an environment of its own")
def test_the_record_is_what_sglang_publishes() -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    assert set(FIELDS) <= {item.name for item in dataclasses.fields(GenerateReqInput)}


@pytest.mark.parametrize("other", [{"text": "word5"}, {"input_ids": [5]}], ids=str)
def test_a_second_prompt_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(other))):
        sglang.request(torch.randn(3, 32), **other)


def test_an_adapter_is_refused_by_name() -> None:
    model = zoo.build("llama")
    softhooks.attach(model, LlamaAdapter(5))
    with pytest.raises(UnsupportedMethodError, match="llama_adapter"):
        sglang.embeddings(model, [5, 6])


def test_the_example_of_the_docstring() -> None:
    names = examples.run("sglang")
    sent = read(names["posted"], FIELDS)
    assert read(json.dumps(sent["sampling_params"]), SAMPLING) == sent["sampling_params"]
    assert is_list_of_lists_of_numbers(sent["input_embeds"], 32)
    assert torch.equal(torch.tensor(sent["input_embeds"]), names["rows"])
    assert names["rows"].shape[0] == 5 + len(names["tokenizer"]("word5 word6 word7")["input_ids"])
