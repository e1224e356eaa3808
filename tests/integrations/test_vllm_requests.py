"""What the KV connector for vLLM refuses: options of vLLM, models, prompts and requests; run against stand-ins for vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm_stand_in as stand_in
import zoo
from vllm_stand_in import configuration

import softhooks
from softhooks import PrefixTuning
from softhooks.errors import (
    CheckpointError,
    OptionError,
    PromptMismatchError,
    PromptTooLongError,
    SoftHooksError,
    UnsupportedModeError,
    UnsupportedModelError,
)
from softhooks.integration_support.serving import PromptFolder
from softhooks.integrations import vllm
from softhooks.integrations._vllm_requests import require_servable
from softhooks.integrations._vllm_settings import require_configuration, require_layers, served_model

NAMES = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")


# --- what is refused at the start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 2}, "decode context parallel size: +2"),
        ({"pipeline": 2}, "pipeline parallel size: +2"),
        ({"speculative": "ngram"}, "speculative config: +ngram"),
        ({"cache_dtype": "fp8"}, "kv cache dtype: +fp8"),
        ({"policy": "recompute"}, "kv load failure policy: +recompute"),
        ({"runner": "pooling"}, "runner type: +pooling"),
        ({"overrides": {"rope_parameters": {"rope_type": "yarn"}}}, "hf overrides: +.*yarn"),
        ({"model_type": "deepseek_v3"}, "prompts for the model type 'deepseek_v3'"),
        ({"mla": True}, "prompts for the model type 'llama'"),
    ],
    ids=str,
)
def test_an_option_that_was_not_run_is_refused(prompt_folder: Path, change: dict[str, Any], message: str) -> None:
    require_configuration(configuration(prompt_folder))
    with pytest.raises((UnsupportedModeError, UnsupportedModelError), match=message):
        require_configuration(configuration(prompt_folder, **change))


def test_layers_without_a_plain_cache_are_refused(prompt_folder: Path) -> None:
    require_layers(configuration(prompt_folder), stand_in.cache_configuration(NAMES))
    with pytest.raises(UnsupportedModelError, match="1 of the model's 2 layers"):
        require_layers(configuration(prompt_folder), stand_in.cache_configuration(NAMES[:1]))
    with pytest.raises(UnsupportedModelError, match="caches: MambaSpec"):
        require_layers(configuration(prompt_folder), stand_in.cache_configuration(NAMES, stand_in.MambaSpec))


@pytest.mark.parametrize(
    "change", [{"layers": 3}, {"heads": 4}, {"dim": 16}, {"vocabulary": 97}, {"model_type": "qwen3"}]
)
def test_a_prompt_for_another_model_is_refused(prompt_folder: Path, change: dict[str, Any]) -> None:
    found = PromptFolder(prompt_folder).find("en")
    served_model(configuration(prompt_folder)).require_fit(found)
    with pytest.raises(PromptMismatchError, match=r"'en' was exported for another model.*\n.*\(prompt\), .*\(server\)"):
        served_model(configuration(prompt_folder, **change)).require_fit(found)


def test_a_prefix_that_every_token_must_see_is_refused_under_a_window(prompt_folder: Path) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PrefixTuning(3, windowed=False))
    vllm.export(model, prompt_folder, "wide")
    found = PromptFolder(prompt_folder).find("wide")
    served_model(configuration(prompt_folder, window=64)).require_fit(found)  # no text is longer than the window
    with pytest.raises(UnsupportedModeError, match=r"windowed=False(.|\n)*`--max-model-len` of at most 32"):
        served_model(configuration(prompt_folder, window=32)).require_fit(found)


@pytest.mark.parametrize("extra", [{}, {"prompts": 3}, {"prompts": "x", "prompt": "y"}], ids=str)
def test_settings_without_a_directory_are_refused(prompt_folder: Path, extra: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="it must have the one field 'prompts'"):
        require_servable(configuration(prompt_folder, extra=extra), params("en"), 5)


# --- requests -------------------------------------------------------------------------------------------------------------


def params(name: object, **options: Any) -> Any:
    values = {"prompt_logprobs": None, "skip_reading_prefix_cache": None, "max_tokens": 90} | options
    return SimpleNamespace(extra_args={"kv_transfer_params": {"soft_prompt": name}}, **values)


def test_a_request_that_can_be_served(prompt_folder: Path) -> None:
    assert require_servable(configuration(prompt_folder), params("en"), 57) == 6
    assert require_servable(configuration(prompt_folder), SimpleNamespace(extra_args=None), 63) == 0


REFUSED: dict[str, tuple[Any, int, dict[str, Any], type[SoftHooksError], str]] = {
    "unknown": (params("fr"), 5, {}, OptionError, "no prompt 'fr'; the server has 'bad', 'de', 'en'"),
    "path": (params("../en"), 5, {}, OptionError, r"the name of a prompt is '\.\./en'"),
    "damaged": (params("bad"), 5, {}, CheckpointError, "bad.safetensors is missing, truncated"),
    "long": (params("en"), 58, {}, PromptTooLongError, r"6 \+ 58 tokens, but the server's limit is 64"),
    "scored": (params("en", prompt_logprobs=0), 5, {}, UnsupportedModeError, "`prompt_logprobs`"),
    "uncached": (params("en", skip_reading_prefix_cache=True), 5, {}, UnsupportedModeError, "`skip_reading_prefix"),
    "lora": (params("en"), 5, {"lora_request": "x"}, UnsupportedModeError, "`lora_request`, which cannot be combined"),
    "field": (SimpleNamespace(extra_args={"kv_transfer_params": {"name": "en"}}), 5, {}, OptionError, "'soft_prompt'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_cannot_be_served_is_refused(prompt_folder: Path, case: str) -> None:
    given, length, features, kind, message = REFUSED[case]
    (prompt_folder / "bad.safetensors").write_bytes(b"bad")
    with pytest.raises(kind, match=message):
        require_servable(configuration(prompt_folder), given, length, **features)


def core_request(name: object, length: int, **options: Any) -> Any:
    fields = {"prompt_embeds": None, "lora_request": None, "mm_features": [], "resumable": False}
    return SimpleNamespace(prompt_token_ids=[5] * length, sampling_params=params(name), **fields | options)


def test_requests_are_checked_where_the_server_receives_them(
    prompt_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = stand_in.install(monkeypatch)
    assert vllm.SoftPromptConnector.__name__ == "SoftPromptConnector"
    processor, engine = classes.processor(), classes.engine()
    processor.vllm_config = engine.vllm_config = configuration(prompt_folder)
    request = processor.process_inputs(core_request("en", 50))
    assert request.sampling_params.max_tokens == 8  # 6 + 50 + 8 is the limit
    with pytest.raises(stand_in.ValidationError, match="no prompt 'fr'") as caught:
        processor.process_inputs(core_request("fr", 5))
    assert caught.value.parameter == "kv_transfer_params.soft_prompt"
    with pytest.raises(stand_in.ValidationError, match="`images`"):
        processor.process_inputs(core_request("en", 5, mm_features=["image"]))
    typed = {"type": "token", "prompt_token_ids": [5] * 5}
    assert engine.generate(typed, params("en"), "id") == "stream"
    with pytest.raises(stand_in.ValidationError, match="no prompt 'fr'"):  # at the call, before anything is streamed
        engine.generate(typed, params("fr"), "id")
    beams = classes.CompletionRequest()
    beams.kv_transfer_params = None
    assert beams.to_beam_search_params() == "beams"


def test_whatever_cannot_be_combined_with_a_prompt_is_refused_where_it_arrives(
    prompt_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = stand_in.install(monkeypatch)
    assert vllm.SoftPromptConnector
    processor, engine = classes.processor(), classes.engine()
    processor.vllm_config = engine.vllm_config = configuration(prompt_folder)
    for option, name in (
        ({"lora_request": "x"}, "lora_request"),
        ({"prompt_embeds": "x"}, "prompt_embeds"),
        ({"resumable": True}, "streamed_input"),
    ):
        with pytest.raises(stand_in.ValidationError, match=f"`{name}`"):
            processor.process_inputs(core_request("en", 5, **option))
    with pytest.raises(stand_in.ValidationError, match="`prompt_embeds`"):
        engine.generate({"type": "embeds", "prompt_embeds": "x"}, params("en"), "id")
    with pytest.raises(stand_in.ValidationError, match="`lora_request`"):
        engine.generate({"type": "token", "prompt_token_ids": [5]}, params("en"), "id", lora_request="x")
    for kind in (classes.CompletionRequest, classes.ChatCompletionRequest):
        beams = kind()
        beams.kv_transfer_params = {"soft_prompt": "en"}
        with pytest.raises(stand_in.ValidationError, match="`use_beam_search`"):
            beams.to_beam_search_params()


def test_a_server_with_another_connector_is_not_affected(prompt_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = stand_in.install(monkeypatch)
    assert vllm.SoftPromptConnector
    processor = classes.processor()
    processor.vllm_config = configuration(prompt_folder, connector="NixlConnector")
    request = core_request("fr", 5)
    assert processor.process_inputs(request) is request
