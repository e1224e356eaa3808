"""SGLang with exported prompts: the tokens and log-probabilities of transformers, and status 400 for what cannot be served."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import prompted
import pytest
import tokens
from prompted import NEW, Prompted
from served import Server, serving

SETTINGS = ("--radix-cache-backend", "softhooks", "--disable-hybrid-swa-memory")
Served = tuple[Server, Prompted]


def saved(kind: str, folder: Path) -> Prompted:
    model = prompted.tiny(kind)
    made = prompted.prepare(model, folder)
    tokens.merged().save_pretrained(made.model)
    return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("llama")
    made = saved("llama", folder)
    with serving(made.model, folder, *SETTINGS, prompts=made.prompts) as server:
        yield server, made


def compare(server: Server, made: Prompted, near: float = 1e-4) -> None:
    """Ask for all answers at once, and compare them with those of transformers."""
    asked = list(made.answers)
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda pair: server.answer(*pair), asked))
    for pair, found in zip(asked, answers, strict=True):
        assert found.tokens == made.answers[pair].tokens, pair
        assert found.logprobs == pytest.approx(made.answers[pair].logprobs, abs=near), pair


def test_many_requests_at_once(llama: Served) -> None:
    compare(*llama)


def test_one_after_another(llama: Served) -> None:
    server, made = llama
    for pair in list(made.answers)[::5]:
        assert server.answer(*pair).tokens == made.answers[pair].tokens


def test_the_cache_can_be_flushed(llama: Served) -> None:
    server, made = llama
    assert server.post("/flush_cache").status_code == 200
    compare(server, made)


def test_input_logprobs_are_those_of_the_text(llama: Served) -> None:
    server, made = llama
    _, text = next(pair for pair in made.answers if pair[0] == "soft" and len(pair[1]) == 33)
    found = server.generate("soft", input_ids=list(text), logprob_start_len=0).json()
    assert [entry[1] for entry in found["meta_info"]["input_token_logprobs"]] == list(text)
    assert found["output_ids"] == made.answers["soft", text].tokens


def test_a_chat_and_a_completion(llama: Served) -> None:
    server, _ = llama
    body = {"model": "any", "temperature": 0, "max_tokens": NEW, "logprobs": True}
    chat = {**body, "messages": [{"role": "user", "content": "what is it?"}]}
    completion = {**body, "prompt": "what is it?", "logprobs": 1}
    for route, content in (("/v1/chat/completions", chat), ("/v1/completions", completion)):
        seen = set()
        for extra in ({}, {"custom_params": {"soft_prompt": "prefix"}}, {"custom_params": {"soft_prompt": "soft"}}):
            response = server.post(route, **content, **extra)
            assert response.status_code == 200, response.text
            seen.add(str(response.json()["choices"][0]["logprobs"]))
        assert len(seen) == 3
        assert server.post(route, **content, custom_params={"soft_prompt": "nope"}).status_code == 400


def test_a_file_that_is_added_replaced_and_deleted(llama: Served) -> None:
    server, made = llama
    _, text = next(pair for pair in made.answers if pair[0] == "soft" and len(pair[1]) == 7)
    assert server.generate("new", input_ids=list(text)).status_code == 400
    for source in ("prefix", "mlp"):
        shutil.copy(made.prompts / f"{source}.safetensors", made.prompts / "copy.part")
        (made.prompts / "copy.part").replace(made.prompts / "new.safetensors")
        assert server.answer("new", text).tokens == made.answers[source, text].tokens
    (made.prompts / "new.safetensors").unlink()
    refused = server.generate("new", input_ids=list(text))
    assert refused.status_code == 400
    assert "there is no prompt 'new'" in refused.text


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("nope", {}, "there is no prompt 'nope'"),
        (3, {}, "the name of a prompt is 3"),
        ("../x", {}, "the name of a prompt is"),
        ("soft", {"input_ids": [5] * 500}, "32 [+] 500 tokens"),
        ("soft", {"cache_salt": "mine"}, "`cache_salt`"),
        ("soft", {"lora_path": "adapter"}, "lora"),
    ],
)
def test_what_cannot_be_served_is_answered_with_400(
    llama: Served, name: object, body: dict[str, object], message: str
) -> None:
    response = llama[0].generate(name, **({"input_ids": [5, 6]} | body))
    assert response.status_code == 400
    assert re.search(message, response.text), response.text


def test_a_small_pool_of_keys_and_values(tmp_path: Path) -> None:
    """Requests wait and are retracted; the prompts stay."""
    made = saved("llama", tmp_path)
    with serving(made.model, tmp_path, *SETTINGS, "--max-total-tokens", "640", prompts=made.prompts) as server:
        compare(server, made)
        compare(server, made)


@pytest.mark.parametrize(("kind", "near"), [("qwen3", 1e-4), ("gemma3", 1e-3)])
def test_other_models(kind: str, near: float, tmp_path: Path) -> None:
    made = saved(kind, tmp_path)
    with serving(made.model, tmp_path, *SETTINGS, prompts=made.prompts) as server:
        compare(server, made, near)


def test_a_server_with_unsupported_options_does_not_start(tmp_path: Path) -> None:
    made = saved("llama", tmp_path)
    options = (*SETTINGS, "--disable-radix-cache")
    refused = pytest.raises(AssertionError, match="disable radix cache")
    with refused, serving(made.model, tmp_path, *options, prompts=made.prompts):
        pass
