"""A server of transformers with prompts, and a client for it."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import tokens
import torch
import zoo
from transformers import AutoModelForCausalLM

import softhooks
from softhooks import PrefixTuning, PromptStore, PromptTuning, PTuningV2
from softhooks.integrations import transformers_serve as integration

NEW = 6
METHODS: dict[str, Any] = {"en": PromptTuning(5), "de": PrefixTuning(9), "fr": PTuningV2(3), "it": PromptTuning(2)}
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def write(folder: Path, methods: dict[str, Any] | None = None) -> PromptStore:
    """A tiny Llama with its tokenizer in `model`, and a store of prompts for it in `store`."""
    model, tokenizer = zoo.build("llama"), tokens.tokenizer()
    tokenizer.chat_template = CHAT
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    store = PromptStore(folder / "store")
    for seed, (name, method) in enumerate((METHODS if methods is None else methods).items()):
        add(store, folder, name, method, seed)
    return store


def add(store: PromptStore, folder: Path, name: str, method: Any, seed: int) -> None:
    """Add a prompt with random parameters to the store."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with softhooks.attach(model, method) as prompt, torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        store.add(prompt, name)


def answers(folder: Path, asked: list[tuple[str | None, str]]) -> list[str]:
    """What `generate` returns for each text alone, with the prompt of this name in the store."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model"), tokens.tokenizer()
    store = PromptStore(folder / "store")
    known: dict[tuple[str | None, str], str] = {}
    for name in dict.fromkeys(name for name, _ in asked):
        prompt = None if name is None else store.load(model, name)
        for text in dict.fromkeys(text for other, text in asked if other == name):
            row = tokenizer(text, return_tensors="pt")
            ids = model.generate(**row, max_new_tokens=NEW, do_sample=False, pad_token_id=zoo.PAD)
            known[name, text] = tokenizer.decode(ids[0, row["input_ids"].shape[1] :], skip_special_tokens=True)
        if prompt is not None:
            prompt.remove()
    return [known[one] for one in asked]


class Client:
    """A server on this machine, and its client."""

    def __init__(self, folder: Path, prompt: Any = None, **options: Any) -> None:
        self.base = str(folder / "model")
        self.server = integration.serve(
            prompt, self.base, host="127.0.0.1", port=0, device="cpu", non_blocking=True, **options
        )
        limits = httpx.Limits(max_connections=128)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{_port_of(self.server)}", timeout=300, limits=limits)

    def model(self, name: str | None) -> str:
        return self.base if name is None else f"{self.base}:{name}"

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, name: str | None, text: str, stream: bool = False) -> str:
        """The answer to a text with a prompt of the server."""
        body = {"model": self.model(name), "prompt": text, "max_tokens": NEW, "stream": stream}
        if not stream:
            told = self.post("/v1/completions", **body)
            assert told.status_code == 200, told.text
            assert told.json()["model"] == body["model"]
            return str(told.json()["choices"][0]["text"])
        with self.http.stream("POST", "/v1/completions", json=body) as lines:
            found = [line.removeprefix("data: ") for line in lines.iter_lines() if line.startswith("data: {")]
        return "".join(json.loads(one)["choices"][0]["text"] for one in found)

    def ask_all(self, asked: list[tuple[str | None, str]], clients: int, streamed: bool = True) -> list[str]:
        """The answers to many requests from clients at the same time; every second one is streamed."""
        with ThreadPoolExecutor(clients) as pool:
            found = pool.map(lambda one: self.complete(*one[1], stream=streamed and one[0] % 2 == 1), enumerate(asked))
            return list(found)

    def models(self) -> list[str]:
        return [model["id"] for model in self.http.get("/v1/models").json()["data"]]

    def stop(self) -> None:
        self.http.close()
        end(self.server)


def end(server: Any) -> None:
    """Stop a server, wait for its thread, and close its event loop, which transformers leaves open."""
    [listener] = server.server.servers
    loop = listener.get_loop()
    server.kill_server()  # waits two seconds at most
    server._thread.join()
    loop.close()


def _port_of(server: Any) -> int:
    while not server.server.started:
        assert server._thread.is_alive(), "the server has ended before it answered"
        time.sleep(0.01)
    [listener] = server.server.servers
    return int(listener.sockets[0].getsockname()[1])
