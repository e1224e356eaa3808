"""SGLang's server on a CPU, and requests to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ports
from prompted import NEW, Answer

GREEDY = {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True}


@dataclass
class Server:
    url: str

    def post(self, route: str = "/generate", **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{route}", json=body, timeout=300)

    def generate(self, name: object = None, sampling: dict[str, Any] | None = None, **body: Any) -> httpx.Response:
        params = GREEDY | (sampling or {}) | ({} if name is None else {"custom_params": {"soft_prompt": name}})
        return self.post(sampling_params=params, return_logprob=True, **body)

    def answer(self, name: str | None, text: tuple[int, ...]) -> Answer:
        return answer_in(self.generate(name, input_ids=list(text)))


def answer_in(response: httpx.Response) -> Answer:
    assert response.status_code == 200, response.text
    found = response.json()
    return Answer(found["output_ids"], [entry[0] for entry in found["meta_info"]["output_token_logprobs"]])


@contextmanager
def serving(model: str, folder: Path, *options: str, prompts: Path | None = None) -> Iterator[Server]:
    """Start a server; options of SGLang override those here."""
    held, port = ports.reserve()
    command = [sys.executable, str(Path(__file__).with_name("on_cpu.py")), "--model-path", model, "--port", str(port)]
    command += ["--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32", "--sleep-on-idle"]
    command += ["--max-total-tokens", "4096", "--max-running-requests", "16", "--context-length", "512"]
    command += ["--chunked-prefill-size", "64", "--skip-server-warmup", "--disable-overlap-schedule", *options]
    environment = os.environ | ({} if prompts is None else {"SOFTHOOKS_PROMPTS": str(prompts)})
    log = folder / "log"
    with log.open("w") as out, held:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}")
    try:
        _wait(server, process, log)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        assert process.poll() is None, log.read_text(errors="replace")[-5000:]
        try:
            if httpx.get(f"{server.url}/health", timeout=60).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
