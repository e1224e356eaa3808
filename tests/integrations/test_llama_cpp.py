"""llama.cpp: prompts are exported with the help of a server, which then continues texts after them; what cannot be is refused.

The server here is a stand-in; `make test-llama-cpp` runs llama.cpp's own.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import examples
import pytest
import tokens
import torch
import transformers as tf
import zoo
from llama_stand_in import LlamaStandIn, Slot
from typer.testing import CliRunner

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning
from softhooks.cli import app
from softhooks.errors import (
    CheckpointError,
    OptionError,
    PromptMismatchError,
    SoftHooksError,
    UnsupportedMethodError,
    UnsupportedModelError,
)
from softhooks.integrations import llama_cpp
from softhooks.serving.slot_file import read_slot_file

IDS = [5, 6, 7, 8]
METHODS = {"prefix": PrefixTuning(6), "soft": PromptTuning(5)}


def strong(prompt: softhooks.SoftPrompt) -> None:
    """Change a prompt so much that the model generates other tokens."""
    with torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)


def generated(model: Any, ids: list[int], count: int = 8) -> list[int]:
    row = torch.tensor([ids])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return list(model.generate(row, attention_mask=torch.ones_like(row), **options)[0, len(ids) :].tolist())


@pytest.fixture
def model() -> Any:
    return zoo.build("llama").eval()


@pytest.fixture
def server(model: Any, tmp_path: Path) -> Iterator[LlamaStandIn]:
    with LlamaStandIn(copy.deepcopy(model), tmp_path, tokens.tokenizer()).running() as server:
        yield server


@pytest.mark.parametrize("method", METHODS)
def test_the_server_continues_as_the_model_with_the_prompt(
    method: str, model: Any, server: LlamaStandIn, tmp_path: Path
) -> None:
    bare = generated(model, IDS)
    with softhooks.attach(model, METHODS[method]) as prompt:
        strong(prompt)
        path = llama_cpp.export(model, tmp_path, "en", url=server.url)
        expected = generated(model, IDS)
    assert expected != bare
    assert sorted(tmp_path.iterdir()) == [path] == [tmp_path / "en.bin"]
    for slot in (0, 1):
        found = llama_cpp.complete(path, IDS, url=server.url, slot=slot, n_predict=8, temperature=0)
        assert (found["tokens"], found["id_slot"]) == (expected, slot)
    body = llama_cpp.request(path, IDS, slot=1, n_predict=8)
    assert server.complete(**body)["tokens"] == expected  # the slot still holds the prompt
    assert server.complete(IDS, 1, cache_prompt=True, n_predict=8)["tokens"] == bare


def test_a_string_is_tokenized_by_the_server(model: Any, server: LlamaStandIn, tmp_path: Path) -> None:
    text = "word5 word6 word7"
    with softhooks.attach(model, PrefixTuning(6)) as prompt:
        strong(prompt)
        path = llama_cpp.export(model, tmp_path, "en", url=server.url)
        expected = generated(model, tokens.tokenizer()(text)["input_ids"])
    assert llama_cpp.complete(path, text, url=server.url + "/", n_predict=8)["tokens"] == expected
    assert ("/tokenize", {"content": text, "add_special": True, "parse_special": True}) in server.seen


def test_every_module_keeps_its_mode(model: Any, server: LlamaStandIn, tmp_path: Path) -> None:
    with softhooks.attach(model, PrefixTuning(6)):
        model.train()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        llama_cpp.export(model, tmp_path, "en", url=server.url)
        assert [module.training for module in model.modules()] == modes


def test_each_prompt_has_its_own_placeholders(model: Any, server: LlamaStandIn, tmp_path: Path) -> None:
    found = []
    for name in ("en", "de"):
        with softhooks.attach(model, PrefixTuning(6)) as prompt:
            strong(prompt)
            paths = [llama_cpp.export(model, tmp_path, other, url=server.url) for other in (name, f"{name}-again")]
        one, again = (read_slot_file(path).tokens for path in paths)
        assert one == again
        found.append(one)
    assert found[0][:3] != found[1][:3]


def test_a_server_that_needs_a_key(model: Any, server: LlamaStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_API_KEY", "abc")
    with softhooks.attach(model, PrefixTuning(6)):
        llama_cpp.export(model, server.folder, "en", url=server.url)
    assert set(server.keys_of_requests) == {"Bearer abc"}


def test_the_prompt_is_restored_before_each_request(model: Any, server: LlamaStandIn, tmp_path: Path) -> None:
    """A request with placeholders that found no prompt leaves the keys and values of words in the slot."""
    with softhooks.attach(model, PrefixTuning(6)) as prompt:
        strong(prompt)
        path = llama_cpp.export(model, tmp_path, "en", url=server.url)
        expected = generated(model, IDS)
    server.slots[0] = Slot()
    assert server.complete(**llama_cpp.request(path, IDS, n_predict=8))["tokens"] != expected
    assert llama_cpp.complete(path, IDS, url=server.url, n_predict=8)["tokens"] == expected


def test_a_request_that_took_the_slot_is_noticed(
    model: Any, server: LlamaStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with softhooks.attach(model, PrefixTuning(6)):
        path = llama_cpp.export(model, tmp_path, "en", url=server.url)
    restore = server.restore

    def taken(slot: int, filename: str) -> dict[str, Any]:
        answer = restore(slot, filename)
        server.complete(IDS, slot, cache_prompt=True, n_predict=1)
        return answer

    monkeypatch.setattr(server, "restore", taken)
    with pytest.raises(SoftHooksError, match="another request took slot 1"):
        llama_cpp.complete(path, IDS, url=server.url, slot=1, n_predict=1)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_server_with_other_weights_is_refused(model: Any, server: LlamaStandIn, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    with (
        softhooks.attach(model, PrefixTuning(6)),
        pytest.raises(PromptMismatchError, match="other keys than the model"),
    ):
        llama_cpp.export(model, tmp_path, "en", url=server.url)
    assert list(tmp_path.iterdir()) == []


def test_keys_in_another_order_are_refused(
    model: Any, server: LlamaStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_stand_in._pairs", lambda rows, size: rows)
    with (
        softhooks.attach(model, PrefixTuning(6)),
        pytest.raises(PromptMismatchError, match="other keys than the model"),
    ):
        llama_cpp.export(model, tmp_path, "en", url=server.url)


@pytest.mark.parametrize("option", [{"num_hidden_layers": 3}, {"num_key_value_heads": 1}], ids=str)
def test_a_server_with_another_shape_is_refused(option: dict[str, int], server: LlamaStandIn, tmp_path: Path) -> None:
    model = zoo.build("llama", **option)
    with softhooks.attach(model, PrefixTuning(6)), pytest.raises(PromptMismatchError, match="the keys differ"):
        llama_cpp.export(model, tmp_path, "en", url=server.url)


def test_a_model_that_was_not_compared_is_refused(tmp_path: Path) -> None:
    model = zoo.build("gemma3")
    with (
        softhooks.attach(model, PrefixTuning(6)),
        pytest.raises(UnsupportedModelError, match="'gemma3_text' cannot be"),
    ):
        llama_cpp.export(model, tmp_path, "en")


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    model = tf.MistralForCausalLM(tf.MistralConfig(**zoo.build("llama").config.to_diff_dict() | {"sliding_window": 8}))
    with softhooks.attach(model, PrefixTuning(6)), pytest.raises(UnsupportedModelError, match=r"window \(8 tokens\)"):
        llama_cpp.export(model, tmp_path, "en")


def test_an_adapter_is_refused(model: Any, tmp_path: Path) -> None:
    with softhooks.attach(model, LlamaAdapter(6)), pytest.raises(UnsupportedMethodError, match="llama_adapter"):
        llama_cpp.export(model, tmp_path, "en")


def test_another_directory_is_refused(model: Any, server: LlamaStandIn, tmp_path: Path) -> None:
    with softhooks.attach(model, PrefixTuning(6)):
        with pytest.raises(OptionError, match="saved a slot, but not in"):
            llama_cpp.export(model, tmp_path / "other", "en", url=server.url)
        path = llama_cpp.export(model, tmp_path, "en", url=server.url)
        longer = llama_cpp.export(model, tmp_path, "longer", url=server.url)
    other = tmp_path / "other"
    other.mkdir()
    with softhooks.attach(model, PrefixTuning(7)):
        longer = llama_cpp.export(model, tmp_path, "longer", url=server.url)
    longer.rename(other / "en.bin")
    with pytest.raises(SoftHooksError, match=r"read another en\.bin"):
        llama_cpp.complete(other / "en.bin", IDS, url=server.url)
    (other / "fr.bin").write_bytes(path.read_bytes())
    with pytest.raises(SoftHooksError, match="Unable to restore slot"):
        llama_cpp.complete(other / "fr.bin", IDS, url=server.url)


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("localhost:8080", OptionError, "it must be like http://"),
        ("file:///etc/hostname", OptionError, "it must be like http://"),
        ("http://127.0.0.1:9", SoftHooksError, "cannot be reached at http://127.0.0.1:9"),
        ("http:///path", OptionError, "it must be like http://"),
        ("http://[", OptionError, "it must be like http://"),
    ],
)
def test_no_server(url: str, error: type[Exception], message: str, model: Any, tmp_path: Path) -> None:
    with softhooks.attach(model, PrefixTuning(6)), pytest.raises(error, match=message):
        llama_cpp.export(model, tmp_path, "en", url=url)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "JSON list"),
        (b"{}", "did not say how many tokens it reused"),
        (b'{"timings": 3}', "did not say how many tokens it reused"),
        (b'{"timings": {"cache_n": 4}}', "reused keys and values although"),
    ],
    ids=repr,
)
def test_other_answers(
    answer: bytes, message: str, model: Any, server: LlamaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "answer", lambda route, body: answer if route == "/completion" else {})
    with softhooks.attach(model, PrefixTuning(6)), pytest.raises(SoftHooksError, match=message):
        llama_cpp.export(model, server.folder, "en", url=server.url)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ([], {}, "at least one token id"),
        ("word5", {}, "at least one token id"),
        ([5, -1], {}, "at least one token id"),
        (IDS, {"prompt": "word5"}, "`prompt` cannot be passed"),
        (IDS, {"id_slot": 1}, "`id_slot` cannot be passed"),
        (IDS, {"cache_prompt": False}, "`cache_prompt` cannot be passed"),
    ],
    ids=str,
)
def test_a_request_that_would_not_use_the_prompt(text: Any, options: dict[str, Any], message: str) -> None:
    path = Path(__file__).parents[1] / "serving" / "slots" / "f32-transposed.bin"
    with pytest.raises(OptionError, match=message):
        llama_cpp.request(path, text, **options)


def test_a_stream_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="`stream` cannot be passed"):
        llama_cpp.complete(tmp_path / "en.bin", IDS, stream=True)
    with pytest.raises(CheckpointError, match=r"en\.bin cannot be read"):
        llama_cpp.complete(tmp_path / "en.bin", IDS)


# --- the command line and the example ---------------------------------------------------------------------------------


def command(saved: Path, *options: str) -> Any:
    arguments = ["export", str(saved / "en"), str(saved / "de"), "--to", "llama.cpp", "--model", str(saved / "base")]
    return CliRunner().invoke(app.app, [*arguments, "--output", str(saved / "slots"), *options])


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    """A base model, two prompts, and an empty directory of slots."""
    model.save_pretrained(tmp_path / "base")
    for name, method in (("en", METHODS["prefix"]), ("de", METHODS["soft"])):
        with softhooks.attach(model, method) as prompt:
            strong(prompt)
            prompt.save_pretrained(tmp_path / name)
    (tmp_path / "slots").mkdir()
    return tmp_path


def test_export_from_a_shell(model: Any, saved: Path) -> None:
    with LlamaStandIn(copy.deepcopy(model), saved / "slots", tokens.tokenizer()).running() as server:
        done = command(saved, "--url", server.url)
        assert done.exit_code == 0, done.output
        with softhooks.load(model, str(saved / "de")):
            expected = generated(model, IDS)
        body = json.loads((saved / "slots" / "de.json").read_text())
        body["prompt"] += IDS
        assert server.complete(**body, n_predict=8)["tokens"] == expected  # the slot holds the last prompt
    assert sorted(path.name for path in (saved / "slots").iterdir()) == ["de.bin", "de.json", "en.bin", "en.json"]
    assert "en.bin: prefix_tuning, 6 virtual tokens, 2 layers; the server's keys differ by 0.0%" in done.output
    assert f"curl '{server.url}/slots/0?action=restore' --json '{{\"filename\": \"de.bin\"}}'" in done.output


def test_export_without_a_server_loads_no_model(saved: Path) -> None:
    (saved / "base" / "config.json").unlink()
    done = command(saved, "--url", "http://127.0.0.1:9")
    assert "cannot be reached" in str(done.exception)


def test_export_with_a_text_is_refused(saved: Path) -> None:
    done = command(saved, "--text", "word5")
    assert isinstance(done.exception, OptionError)
    assert "--text cannot be combined with --to llama.cpp" in str(done.exception)


def test_an_address_for_another_server_is_refused(saved: Path) -> None:
    arguments = [
        "export",
        str(saved / "en"),
        "--to",
        "vllm",
        "--model",
        str(saved / "base"),
        "--output",
        str(saved / "out"),
    ]
    done = CliRunner().invoke(app.app, [*arguments, "--url", "http://127.0.0.1:9"])
    assert "--url is the address of llama.cpp's server" in str(done.exception)


def test_the_example_of_the_docstring() -> None:
    names = examples.run("llama_cpp")
    with names["running"]:
        body, server = names["body"], names["server"]
        again = server.complete(**body)
    assert body["prompt"][5:] == [5, 6, 7]
    assert names["answer"]["timings"]["cache_n"] == 5
    assert len(again["tokens"]) == 16
