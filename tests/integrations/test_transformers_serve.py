"""`transformers serve` over HTTP with a prompt answers as `generate` does."""

from __future__ import annotations

import json
import runpy
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
pytest.importorskip("httpx")

import examples
import httpx
import tokens
import zoo
from transformers import AutoModelForCausalLM

import softhooks
from softhooks import PromptTuning
from softhooks.errors import OptionError, PromptMismatchError, SoftHooksError, UnsupportedModeError
from softhooks.integrations import transformers_serve as integration

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

GIVEN = runpy.run_path(str(examples.HERE / "given" / "transformers_serve.py"))
TEXTS = ["word5 word6 word7", "word9", "word20 word21 word22 word23 word24", "word5 word6 word8"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("served")
    GIVEN["write_model"](folder, PromptTuning(5))
    return folder


def answers(folder: Path, texts: list[str], with_prompt: bool = True, special: bool = True) -> list[str]:
    """The texts that `generate` returns."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model"), tokens.tokenizer()
    if with_prompt:
        softhooks.load(model, folder / "prompt")
    told = []
    for text in texts:
        row = tokenizer(text, return_tensors="pt", add_special_tokens=special)
        ids = model.generate(
            row["input_ids"],
            attention_mask=row["attention_mask"],
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=zoo.PAD,
        )
        told.append(tokenizer.decode(ids[0, row["input_ids"].shape[1] :], skip_special_tokens=True))
    return told


class Client:
    """A server on this machine, and its client."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.model = str(folder / "model")
        self.server = integration.serve(
            folder / "prompt", self.model, host="127.0.0.1", port=0, device="cpu", non_blocking=True, **options
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port_of(self.server)}", timeout=300)

    def complete(self, text: str, **more: Any) -> str:
        told = self.http.post("/v1/completions", json={"model": self.model, "prompt": text, "max_tokens": 6, **more})
        assert told.status_code == 200, told.text
        return str(told.json()["choices"][0]["text"])

    def stop(self) -> None:
        self.http.close()
        end(self.server)


def end(server: Any) -> None:
    """Stop a server that has answered, wait for its thread, and close its event loop, which transformers leaves open.

    A loop that is left to the garbage collector warns in whichever test runs then: the server's thread for `generate` never
    ends, and refers to the loop of the last request.
    """
    [listener] = server.server.servers
    loop = listener.get_loop()
    server.kill_server()  # waits two seconds at most
    server._thread.join()
    loop.close()


def port_of(server: Any) -> int:
    """Wait until a server listens; return the port that it was given."""
    while not server.server.started:
        assert server._thread.is_alive(), "the server has ended before it answered"
        time.sleep(0.01)
    [listener] = server.server.servers
    return int(listener.sockets[0].getsockname()[1])


@pytest.fixture(scope="module", params=[False, True], ids=["generate", "continuous"])
def client(request: pytest.FixtureRequest, saved: Path) -> Iterator[Client]:
    batches = {"continuous_batching": True, "cb_num_blocks": 32, "cb_max_batch_tokens": 16} if request.param else {}
    made = Client(saved, **batches)
    yield made
    made.stop()


def test_completions_are_those_of_generate(client: Client, saved: Path) -> None:
    expected = answers(saved, TEXTS)
    assert expected != answers(saved, TEXTS, with_prompt=False)
    assert [client.complete(text) for text in TEXTS] == expected
    with ThreadPoolExecutor(len(TEXTS)) as pool:  # at the same time
        assert list(pool.map(client.complete, TEXTS)) == expected


def test_a_streamed_completion_is_the_same(client: Client, saved: Path) -> None:
    body = {"model": client.model, "prompt": TEXTS[0], "max_tokens": 6, "stream": True}
    with client.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: {")]
    text = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
    assert text.split() == answers(saved, TEXTS[:1])[0].split()


def test_chats_are_those_of_generate(client: Client, saved: Path) -> None:
    body = {"model": client.model, "messages": [{"role": "user", "content": TEXTS[2]}], "max_tokens": 6}
    told = client.http.post("/v1/chat/completions", json=body)
    assert told.status_code == 200, told.text
    assert (
        told.json()["choices"][0]["message"]["content"].split() == answers(saved, [TEXTS[2]], special=False)[0].split()
    )


def test_the_command_line_and_a_model_that_is_loaded_anew(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The app that the command would serve, without a port; `/reset` drops its model, and the next request loads it."""
    from fastapi.testclient import TestClient

    made: list[Any] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server: made.append(server))
    with pytest.raises(SystemExit) as left:
        integration.main([str(saved / "model"), "--prompt", str(saved / "prompt"), "--device", "cpu"])
    assert left.value.code == 0
    body = {"model": str(saved / "model"), "prompt": TEXTS[0], "max_tokens": 6}
    expected = answers(saved, TEXTS[:1])[0]
    with TestClient(made[0].config.app) as http:
        for _ in range(2):
            assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected
            assert http.post("/reset").status_code == 200


def test_the_example_of_the_docstring() -> None:
    names = examples.run("transformers_serve")
    folder = Path(names["model_folder"]).parent
    names["client"].close()
    names["reservation"].close()
    end(names["server"])
    assert names["answer"].split() == answers(folder, ["word5 word6"])[0].split()[:4]


# --- refusals -----------------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_pinned_is_refused(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        integration.main(["--prompt", str(saved / "prompt"), "--device", "cpu"])
    assert "not pinned to one model" in capsys.readouterr().err
    from transformers.cli.serving import model_manager

    with integration.prompted(saved / "prompt"), pytest.raises(OptionError, match="not pinned to one model"):
        model_manager.ModelManager(device="cpu")


def test_the_command_line_without_a_prompt_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        integration.main(["some/model"])
    assert "--prompt DIR" in capsys.readouterr().err


def test_a_prompt_that_cannot_be_served_stops_the_start(tmp_path: Path) -> None:
    from transformers.cli.serving import model_manager, utils

    before = model_manager.ModelManager, utils.GenerationState
    GIVEN["write_model"](tmp_path, PromptTuning(3, placement="after_first"))
    with pytest.raises(UnsupportedModeError, match=r"injection='slots'\) cannot be used in continuous batching"):
        integration.serve(tmp_path / "prompt", str(tmp_path / "model"), device="cpu", continuous_batching=True)
    other = zoo.build("llama", hidden_size=64)
    softhooks.attach(other, PromptTuning(3)).save_pretrained(tmp_path / "other")
    with pytest.raises(PromptMismatchError):
        integration.serve(tmp_path / "other", str(tmp_path / "model"), device="cpu")
    assert (model_manager.ModelManager, utils.GenerationState) == before


def test_without_what_serving_needs_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(SoftHooksError, match=r'pip install "softhooks\[transformers-serve\]"'):
        integration.serve("prompt", "model")


def test_continuous_batches_keep_off_what_a_prompt_cannot_meet() -> None:
    from transformers import ContinuousBatchingConfig
    from transformers.cli.serving import utils

    state = integration.prompted_state(utils, integration.ServedPrompts({}, None, None, strict=True))
    chosen = state(continuous_batching=True)._cb_config
    assert (chosen.auto_switch_to_flash, chosen.use_cuda_graph) == (False, False)
    asked = state(continuous_batching=True, cb_config=ContinuousBatchingConfig(use_cuda_graph=True))._cb_config
    assert asked.use_cuda_graph is True  # and is refused when the batch starts
    assert state()._cb_config is None
