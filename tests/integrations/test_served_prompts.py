"""`transformers serve` with several prompts: each request gets the prompt that it names, and prompts come and go."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")
pytest.importorskip("httpx")

import served
from transformers import AutoModelForCausalLM

from softhooks import LlamaAdapter, PrefixTuning, PromptStore, PromptTuning
from softhooks.errors import CheckpointError, OptionError, PromptMismatchError, UnsupportedModeError
from softhooks.integrations import transformers_serve as integration
from softhooks.integrations._served_prompts import ServedPrompts

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

CLIENTS = 64
ROUNDS = int(os.environ.get("SOFTHOOKS_LOAD_ROUNDS", "1"))
BATCHES: dict[str, Any] = {"continuous_batching": True, "cb_num_blocks": 256, "cb_max_batch_tokens": 64}
TEXTS = ["word5 word6 word7", "word9", "word20 word21 word22 word23 word24", "word5 word6 word8"]
LOAD, UNLOAD = "/v1/load_soft_prompt", "/v1/unload_soft_prompt"


@pytest.fixture(params=[{}, BATCHES], ids=["generate", "continuous"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[served.Client]:
    """A server with the prompts `en`, `de` and `fr` of a store, and the bare model; `it` is added to the store later."""
    store = served.write(tmp_path, {name: served.METHODS[name] for name in ("en", "de", "fr")})
    made = served.Client(tmp_path, store=store.folder, **request.param)
    served.add(store, tmp_path, "it", served.METHODS["it"], 3)
    made.folder, made.store = tmp_path, store  # type: ignore[attr-defined]
    yield made
    made.stop()


def test_requests_name_their_prompt_and_prompts_come_and_go(client: Any) -> None:
    assert client.models() == [client.base, *(client.model(name) for name in ("de", "en", "fr"))]
    asked = [(name, text) for name in ("en", "de", None, "fr") for text in TEXTS]
    expected = served.answers(client.folder, [*asked, ("it", TEXTS[0])])
    assert len(set(expected)) > 12  # most answers show which prompt they have
    assert client.ask_all(asked, clients=4) == expected[:-1]

    # loaded from the store and unloaded, while requests run
    stopped, wrong = threading.Event(), []

    def keep_asking() -> None:
        while not stopped.is_set():
            for one, answer in zip(asked[:8], expected[:8], strict=True):
                wrong.extend([] if client.complete(*one) == answer else [one])

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(keep_asking) for _ in range(2)]
        try:
            assert client.post("/v1/completions", model=client.model("it"), prompt="word5").status_code == 404
            assert client.post(LOAD, prompt_name="it").status_code == 200
            assert client.complete("it", TEXTS[0]) == expected[-1]
            assert client.post(UNLOAD, prompt_name="fr").status_code == 200
            assert client.models() == [client.base, *(client.model(name) for name in ("de", "en", "it"))]
            assert client.post("/v1/completions", model=client.model("fr"), prompt="word5").status_code == 404
            assert client.post(LOAD, prompt_name="fr").status_code == 200
            assert client.complete("fr", TEXTS[3]) == expected[-2]
        finally:
            stopped.set()
        for one in running:
            one.result()
    assert not wrong


def test_two_requests_cannot_load_the_same_prompt(client: Any) -> None:
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda _: client.post(LOAD, prompt_name="it"), range(4)))
    assert sorted(one.status_code for one in told) == [200, 400, 400, 400]
    assert client.complete("it", TEXTS[0]) == served.answers(client.folder, [("it", TEXTS[0])])[0]


def test_requests_share_one_thread(client: Any) -> None:
    state = client.server._generation_state
    manager, threads = state.get_manager(client.base), set(threading.enumerate())
    assert all(state.get_manager(client.base) is manager for _ in range(3))
    assert not set(threading.enumerate()) - threads


def test_wrong_requests_are_answered_with_a_message(client: Any) -> None:
    def told(path: str, **body: Any) -> tuple[int, str]:
        answer = client.post(path, **body)
        return answer.status_code, answer.text

    status, words = told("/v1/chat/completions", model=client.model("xx"), messages=[])
    assert (status, "the server has no prompt named 'xx'" in words, client.model("de") in words) == (404, True, True)
    assert told("/v1/completions", model="other", prompt="word5")[0] == 400
    assert told("/v1/completions", model="other:en", prompt="word5")[0] == 400
    assert told("/v1/completions", model=3, prompt="word5")[0] == 400
    assert "already serves a prompt named 'en'" in told(LOAD, prompt_name="en")[1]
    assert told(LOAD, prompt_name="missing")[0] == 404
    assert told(LOAD, prompt_name="../model")[0] == 404
    assert told(LOAD, prompt_name="it", prompt_path="/tmp")[0] == 400
    assert told(LOAD)[0] == told(LOAD, prompt_name=3)[0] == 400
    assert told(UNLOAD, prompt_name="xx")[0] == 404
    damaged = client.store.folder / "damaged"
    damaged.mkdir()
    (damaged / "soft_prompt.safetensors").write_bytes(b"x")
    assert told(LOAD, prompt_name="damaged")[0] == 400
    served.add(client.store, client.folder, "slots", PromptTuning(2, placement="after_first"), 5)
    status, words = told(LOAD, prompt_name="slots")
    if client.server._generation_state._continuous_batching:
        assert (status, "cannot be used in continuous batching" in words) == (400, True)
    else:
        assert status == 200
        assert client.complete("slots", TEXTS[0]) == served.answers(client.folder, [("slots", TEXTS[0])])[0]
    assert client.complete("en", TEXTS[0]) == served.answers(client.folder, [("en", TEXTS[0])])[0]


def test_the_model_is_loaded_again_with_its_prompts(client: Any) -> None:
    asked = [("de", TEXTS[0]), (None, TEXTS[0]), ("en", TEXTS[2])]
    expected = served.answers(client.folder, asked)
    for _ in range(2):
        assert client.ask_all(asked, clients=1) == expected
        assert client.post("/reset").status_code == 200


def test_all_prompts_can_be_unloaded_and_loaded_again(client: Any) -> None:
    asked = [(None, TEXTS[0]), ("en", TEXTS[0])]
    expected = served.answers(client.folder, asked)
    assert client.ask_all(asked, clients=2) == expected
    for _ in range(2):
        for name in client.models()[1:]:
            assert client.post(UNLOAD, prompt_name=name.rpartition(":")[2]).status_code == 200
        assert client.models() == [client.base]
        assert client.complete(*asked[0]) == expected[0]
        assert client.post(LOAD, prompt_name="en").status_code == 200
        assert client.ask_all(asked, clients=2) == expected


def test_many_clients_get_right_answers(tmp_path: Path) -> None:
    """`make test-serving` runs many rounds."""
    store = served.write(tmp_path)
    texts = [" ".join(f"word{5 + (first + step) % 80}" for step in range(1 + first % 9)) for first in range(20)]
    asked = [(name, text) for text in texts for name in (*served.METHODS, None)][:CLIENTS]
    expected = served.answers(tmp_path, asked)
    client = served.Client(tmp_path, store=store.folder, **BATCHES)
    try:
        for _ in range(ROUNDS):
            assert client.ask_all(asked, clients=CLIENTS) == expected
    finally:
        client.stop()


def test_a_prompt_is_loaded_while_a_batch_uses_paged_attention(tmp_path: Path) -> None:
    store = served.write(tmp_path, {"en": served.METHODS["en"]})
    client = served.Client(tmp_path, store=store.folder, attn_implementation="eager", **BATCHES)
    try:
        served.add(store, tmp_path, "it", served.METHODS["it"], 3)
        asked = [("en", TEXTS[0]), ("it", TEXTS[0]), (None, TEXTS[0])]
        expected = served.answers(tmp_path, asked)
        assert client.complete(*asked[0]) == expected[0]
        assert client.post(LOAD, prompt_name="it").status_code == 200
        assert client.ask_all(asked, clients=3) == expected
    finally:
        client.stop()


def test_a_prompt_without_a_name_answers_for_the_model_itself(tmp_path: Path) -> None:
    store = served.write(tmp_path)
    expected = served.answers(tmp_path, [("en", TEXTS[0]), ("de", TEXTS[0])])
    prompts = {"default": store.path("en"), "two": store.path("de")}
    client = served.Client(tmp_path, prompts, **BATCHES)
    try:
        assert client.models() == [client.base, client.model("default"), client.model("two")]
        parents = [model["parent"] for model in client.http.get("/v1/models").json()["data"]]
        assert parents == [None, client.base, client.base]
        asked = [(None, TEXTS[0]), ("two", TEXTS[0]), ("default", TEXTS[0])]
        assert client.ask_all(asked, clients=3) == [*expected, expected[0]]
        assert client.post(LOAD, prompt_name="it").status_code == 400  # no store
        assert client.post(UNLOAD, prompt_name="default").status_code == 400
    finally:
        client.stop()


# --- the start ----------------------------------------------------------------------------------------------------------


def test_prompts_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a=b").mkdir()
    assert integration._by_name(["x/y", "en=x/z", "de=hub/name"]) == {"default": "x/y", "en": "x/z", "de": "hub/name"}
    assert integration._by_name([str(tmp_path / "a=b")]) == {"default": str(tmp_path / "a=b")}
    for given in (["a", "b"], ["en=a", "en=b"]):
        with pytest.raises(OptionError, match="--prompt NAME=DIR"):
            integration._by_name(given)
    with pytest.raises(SystemExit):
        integration.main(["some/model"])
    assert "`--prompt DIR` or `--store FOLDER` is missing" in capsys.readouterr().err


def test_a_store_that_cannot_be_served_stops_the_start(tmp_path: Path) -> None:
    store = served.write(tmp_path, {"a": PrefixTuning(3), "b": LlamaAdapter(3)})
    with pytest.raises(UnsupportedModeError, match="cannot mix gated branches"):
        integration.serve(None, str(tmp_path / "model"), store=store.folder, device="cpu", continuous_batching=True)
    with pytest.raises(OptionError, match="'a' is both given and in the store"):
        integration.serve({"a": store.path("a")}, str(tmp_path / "model"), store=store.folder, device="cpu")
    (store.folder / "b" / "soft_prompt.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError):
        integration.serve(None, str(tmp_path / "model"), store=store.folder, device="cpu")
    assert PromptStore(store.folder).names() == ["a", "b"]


def test_only_the_prompts_with_the_tag_are_served_from_the_start(tmp_path: Path) -> None:
    store = served.write(tmp_path, {name: served.METHODS[name] for name in ("en", "de")})
    store.tag("de", "production")
    prompts = ServedPrompts({}, store, "production", strict=True)
    prompts.base = "m"
    prompts.attach_all(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert prompts.ids() == ["m", "m:de"]
    prompts.load("en")
    assert prompts.ids() == ["m", "m:de", "m:en"]


@pytest.mark.parametrize("given", ["path", "store"])
def test_prompts_of_another_base_are_served_only_without_strict(given: str, tmp_path: Path) -> None:
    store = served.write(tmp_path, {"en": served.METHODS["en"]})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for parameter in model.parameters():
        parameter.data.normal_()
    prompts, own = ({"en": store.path("en")}, None) if given == "path" else ({}, store)
    with pytest.raises(PromptMismatchError):
        ServedPrompts(prompts, own, None, strict=True).attach_all(model)
    lax = ServedPrompts(prompts, own, None, strict=False)
    lax.attach_all(model)
    assert lax.ids() == ["", ":en"]
