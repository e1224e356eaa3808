"""vLLM's OpenAI server with exported prompts: answers over HTTP, and status 400 for what cannot be served."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ports
import pytest
import tokens
import torch
import transformers as tf
from prompted import SIZES, methods

import softhooks

NEW = 10
TEXTS = ["Question: what is it?", "the cat was great, the dog", "Answer"]
NAMES = [None, "prefix", "soft", "p-tuning-v2"]


@dataclass
class Server:
    model: Path
    prompts: Path
    saved: Path
    url: str
    answers: dict[tuple[str | None, str], list[int]]

    def post(self, route: str, name: object = None, **body: Any) -> httpx.Response:
        extra = {} if name is None else {"kv_transfer_params": {"soft_prompt": name}}
        settings = {"model": str(self.model), "temperature": 0, "max_tokens": NEW, "ignore_eos": True}
        return httpx.post(f"{self.url}{route}", json={**settings, **extra, **body}, timeout=300)

    def complete(self, text: str, name: str | None = None, **body: Any) -> list[int]:
        response = self.post("/v1/completions", name, prompt=text, return_token_ids=True, **body)
        assert response.status_code == 200, response.text
        return list(response.json()["choices"][0]["token_ids"])


def softhooks_export(names: list[str], saved: Path, model: Path, output: Path) -> str:
    folders = [str(saved / name) for name in names]
    command = [sys.executable, "-m", "softhooks", "export", *folders, "--to", "vllm"]
    command += ["--model", str(model), "--output", str(output)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def generated(model: Any, ids: list[int]) -> list[int]:
    row = torch.tensor([ids])
    mask = torch.ones_like(row)
    out = model.generate(
        row, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return list(out[0, len(ids) :].tolist())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    tokenizer = tokens.merged()
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer)})).eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    chat = [{"role": "user", "content": TEXTS[0]}]
    rows = {text: tokenizer(text)["input_ids"] for text in TEXTS}
    rows["chat"] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answers = {(None, text): generated(model, ids) for text, ids in rows.items()}
    for name, method in methods(windowed=False).items():
        with softhooks.attach(model, method, name=name) as prompt:
            with torch.no_grad():
                for parameter in prompt.encoder.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            prompt.save_pretrained(folder / "saved" / name)
            answers |= {(name, text): generated(model, ids) for text, ids in rows.items()}
    output = softhooks_export([name for name in NAMES if name], folder / "saved", folder / "model", folder / "prompts")
    [config] = [line for line in output.splitlines() if line.startswith("--kv-transfer-config")]
    held, port = ports.reserve()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    command += ["--block-size", "32", *shlex.split(config)]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    log = folder / "log"
    with log.open("w") as out, held:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    made = Server(folder / "model", folder / "prompts", folder / "saved", f"http://127.0.0.1:{port}", answers)
    try:
        _wait(made, process, log)
        yield made
    finally:
        process.terminate()
        process.wait(60)


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)


def test_many_requests_at_once(server: Server) -> None:
    asked = [(name, text) for text in TEXTS for name in NAMES] * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda pair: server.complete(pair[1], pair[0]), asked))
    assert answers == [server.answers[pair] for pair in asked]


@pytest.mark.parametrize("name", NAMES)
def test_a_chat(server: Server, name: str | None) -> None:
    messages = [{"role": "user", "content": TEXTS[0]}]
    response = server.post("/v1/chat/completions", name, messages=messages, return_token_ids=True)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["token_ids"] == server.answers[name, "chat"]


def test_several_texts_in_one_request(server: Server) -> None:
    response = server.post("/v1/completions", "soft", prompt=TEXTS, return_token_ids=True)
    assert response.status_code == 200, response.text
    assert [choice["token_ids"] for choice in response.json()["choices"]] == [
        server.answers["soft", text] for text in TEXTS
    ]
    assert response.json()["usage"]["completion_tokens"] == NEW * len(TEXTS)


REFUSED: dict[str, tuple[object, dict[str, Any], str]] = {
    "unknown": ("nope", {}, "there is no prompt 'nope'; the server has 'p-tuning-v2', 'prefix', 'soft'."),
    "path": ("../model/model", {}, "the name of a prompt is '../model/model'"),
    "number": (7, {}, "the name of a prompt is 7"),
    "echo": ("soft", {"echo": True, "logprobs": 1}, "`prompt_logprobs`, which cannot be combined with a prompt"),
    "long": ("p-tuning-v2", {"prompt": [5] * 186}, "70 + 186 tokens, but the server's limit is 256 tokens"),
    "beam": ("soft", {"use_beam_search": True}, "`use_beam_search`, which cannot be combined with a prompt"),
    "field": (None, {"kv_transfer_params": {"softprompt": "soft"}}, "it must have the one field 'soft_prompt'"),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_has_status_400(server: Server, case: str, streamed: bool) -> None:
    name, body, message = REFUSED[case]
    response = server.post("/v1/completions", name, **{"prompt": TEXTS[0], "stream": streamed, **body})
    if case == "beam" and streamed:
        assert response.status_code == 400  # by vLLM itself
        return
    assert (response.status_code, message in response.text.replace('\\"', '"')) == (400, True), response.text
    assert server.complete(TEXTS[0]) == server.answers[None, TEXTS[0]]


def test_a_stream(server: Server) -> None:
    body = {"prompt": TEXTS[1], "stream": True, "return_token_ids": True}
    lines = server.post("/v1/completions", "prefix", **body).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    found = [token for event in events for token in event["choices"][0]["token_ids"] or ()]
    assert found == server.answers["prefix", TEXTS[1]]


def test_a_prompt_is_added_and_removed_while_the_server_runs(server: Server) -> None:
    assert server.post("/v1/completions", "mlp", prompt=TEXTS[0]).status_code == 400
    softhooks_export(["mlp"], server.saved, server.model, server.prompts)
    assert server.complete(TEXTS[0], "mlp") == server.answers["mlp", TEXTS[0]]
    (server.prompts / "mlp.safetensors").unlink()
    refused = server.post("/v1/completions", "mlp", prompt=TEXTS[0])
    assert (refused.status_code, "there is no prompt 'mlp'" in refused.text) == (400, True)
    assert server.complete(TEXTS[0], "soft") == server.answers["soft", TEXTS[0]]
