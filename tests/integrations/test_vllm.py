"""Requests for vLLM have its published fields (published.json); `make test-vllm` runs vLLM itself."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import examples
import pytest
import tokens
import torch
import zoo
from published import FACTS, is_installed, read

import softhooks
from softhooks import PrefixTuning, PromptTuning
from softhooks.errors import OptionError, UnsupportedMethodError
from softhooks.integrations import vllm

FIELDS = FACTS["vllm"]["CompletionRequest"]


def read_as_the_server_does(encoded: str | bytes, width: int) -> torch.Tensor:
    """Decode as vLLM does: strict base64, weights only, one of three precisions, two dimensions, the model's width."""
    loaded = torch.load(io.BytesIO(base64.b64decode(encoded, validate=True)), weights_only=True, map_location="cpu")
    assert isinstance(loaded, torch.Tensor)
    assert loaded.dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert loaded.dim() == 2
    assert loaded.shape[1] == width
    return loaded


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_the_request_holds_the_rows(precision: torch.dtype) -> None:
    model = zoo.build("llama").to(precision)
    softhooks.attach(model, PromptTuning(5))
    rows = vllm.embeddings(model, "word5 word6 word7", tokens.tokenizer())
    body = json.loads(json.dumps(vllm.request("the/model", rows, max_tokens=4, temperature=0)))
    assert set(body) == {"model", "prompt_embeds", "max_tokens", "temperature"}
    assert torch.equal(read_as_the_server_does(body["prompt_embeds"], 32), rows)


@pytest.mark.parametrize("options", [{}, {"prompt": ""}, {"max_tokens": 16, "temperature": 0, "stream": True}], ids=str)
def test_the_request_has_published_fields_of_the_published_types(options: dict[str, Any]) -> None:
    rows = torch.randn(3, 32)
    seen = read(json.dumps(vllm.request("the/model", rows, **options)), FIELDS)
    assert torch.equal(read_as_the_server_does(seen.pop("prompt_embeds"), 32), rows)
    assert seen == {"model": "the/model", **options}


def test_a_field_that_is_not_published_is_noticed() -> None:
    with pytest.raises(ValueError, match="max_new_tokens"):
        read(json.dumps(vllm.request("the/model", torch.randn(3, 32), max_new_tokens=4)), FIELDS)


@pytest.mark.skipif(not is_installed("vllm"), reason="vLLM has an environment of its own")
def test_the_record_is_what_vllm_publishes() -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    assert set(FIELDS) <= set(CompletionRequest.model_fields)


def test_a_row_of_a_large_tensor_does_not_bring_it_along() -> None:
    large = torch.randn(4096, 32)
    assert len(vllm.encode(large[:2])) < 10_000


def test_a_second_prompt_is_refused() -> None:
    rows = torch.randn(3, 32)
    with pytest.raises(OptionError, match=r"`prompt` is .word5., but the embeddings already contain the text"):
        vllm.request("the/model", rows, prompt="word5")
    assert vllm.request("the/model", rows, prompt="")["prompt"] == ""  # as OpenAI's client needs it


def test_a_prefix_is_refused_by_name() -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PrefixTuning(5))
    with pytest.raises(UnsupportedMethodError, match="prefix_tuning"):
        vllm.embeddings(model, [5, 6])


def test_the_example_of_the_docstring() -> None:
    names = examples.run("vllm")
    sent = read(names["posted"], FIELDS)
    assert torch.equal(read_as_the_server_does(sent["prompt_embeds"], 32), names["rows"])
    assert names["rows"].shape[0] == 5 + len(names["tokenizer"]("word5 word6 word7")["input_ids"])
