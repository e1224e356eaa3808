"""The KV connector for vLLM, run against stand-ins for vLLM; `make test-vllm` runs it in vLLM itself."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_stand_in as stand_in
import zoo
from vllm_stand_in import Layer, Request, blocks, configuration

import softhooks
from softhooks import PrefixTuning, PromptTuning
from softhooks.errors import (
    CheckpointError,
    OptionError,
    PromptMismatchError,
    PromptTooLongError,
    SoftHooksError,
    UnsupportedModeError,
    UnsupportedModelError,
)
from softhooks.integration_support.serving import Prefix, PromptFolder
from softhooks.integrations import vllm
from softhooks.integrations._vllm_plan import Step
from softhooks.integrations._vllm_requests import require_servable
from softhooks.integrations._vllm_scheduler import PrefixScheduler
from softhooks.integrations._vllm_settings import _folder, require_configuration, require_fit, require_layers
from softhooks.integrations._vllm_worker import PrefixWorker, heads_of_rank, layer_index

NAMES = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")
SIZE = 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("prompts")
    model = zoo.build("llama")
    for name, method in {"en": PrefixTuning(6), "de": PromptTuning(3)}.items():
        with softhooks.attach(model, method, name=name):
            vllm.export(model, folder, name)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Iterator[Path]:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _folder.cache_clear()
    yield tmp_path
    _folder.cache_clear()


@pytest.fixture
def scheduler(folder: Path) -> PrefixScheduler:
    return PrefixScheduler(PromptFolder(folder), [SIZE])


def prefix(folder: Path, name: str) -> Prefix:
    return PromptFolder(folder).find(name).prefix


# --- in the scheduler -----------------------------------------------------------------------------------------------------


def test_a_request_gets_placeholders_before_its_text(scheduler: PrefixScheduler) -> None:
    sent = [9, 8, 7]
    request = Request("a", sent, "en")
    scheduler.admit(request)
    assert request.prompt_token_ids == [9] * 6 + [9, 8, 7] == request._all_token_ids
    assert sent == [9, 8, 7]  # the server's own list
    assert request.num_prompt_tokens == 9
    assert scheduler.num_new_tokens(request, 0) == (6, False)
    assert scheduler.num_new_tokens(request, 4) == (2, False)
    assert scheduler.num_new_tokens(request, 8) == (0, False)


def test_a_bare_request_is_not_changed(scheduler: PrefixScheduler) -> None:
    request = Request("a", [9, 8, 7, 6, 5])
    before = pickle.dumps(vars(request))
    scheduler.admit(request)
    assert pickle.dumps(vars(request)) == before
    assert scheduler.num_new_tokens(request, 0) == (0, False)
    scheduler.plan(request, blocks([1, 2]), 0)
    scheduler.finish("a")
    assert not scheduler.take_step().writes


def test_only_requests_with_the_same_prompt_share_blocks(scheduler: PrefixScheduler) -> None:
    def hashes(name: str | None, salt: str | None = None) -> Any:
        request = Request(f"{name}{salt}", [5] * 20, name, salt)
        scheduler.admit(request)
        return request.block_hashes[0]

    same, salted, bare = hashes("en"), hashes("en", "tenant"), hashes(None)
    assert same == hashes("en")
    assert len({same, salted, bare, hashes("de")}) == 4


def test_prompts_are_sent_to_the_workers_once_and_dropped_when_nothing_needs_them(
    scheduler: PrefixScheduler, folder: Path
) -> None:
    digests = {name: PromptFolder(folder).find(name).digest for name in ("en", "de")}
    assert set(scheduler.take_step().added) == set(digests.values())  # before any request
    first, second = Request("a", [9, 8], "en"), Request("b", [9, 8], "en")
    for request in (first, second):
        scheduler.admit(request)
        scheduler.plan(request, blocks([3, 5]), 6)
    step = scheduler.take_step()
    assert not step.added
    assert [(write.digest, write.start) for write in step.writes] == [(digests["en"], 0)] * 2
    (folder / "en.safetensors").unlink()
    scheduler.finish("a")
    assert not scheduler.take_step().dropped  # the other request still needs it, for example after a preemption
    scheduler.finish("b")
    assert scheduler.take_step().dropped == [digests["en"]]


def test_a_new_file_is_sent_with_the_first_request_that_needs_it(scheduler: PrefixScheduler, folder: Path) -> None:
    scheduler.take_step()
    model = zoo.build("llama", seed=1)
    softhooks.attach(model, PrefixTuning(2))
    vllm.export(model, folder, "en")
    request = Request("a", [9, 8], "en")
    scheduler.admit(request)
    assert scheduler.num_new_tokens(request, 0) == (2, False)
    scheduler.plan(request, blocks([3]), 2)
    step = scheduler.take_step()
    assert list(step.added) == [step.writes[0].digest]


def test_slots_follow_the_blocks_and_skip_those_that_a_window_has_left(folder: Path) -> None:
    scheduler = PrefixScheduler(PromptFolder(folder), [4, 2])
    request = Request("a", [9, 8], "en")
    scheduler.admit(request)
    scheduler.plan(request, blocks([3, 9], [None, 5, 8]), 6)
    [write] = scheduler.take_step().writes
    assert write.slots == [[12, 13, 14, 15, 36, 37], [-1, -1, 10, 11, 16, 17]]
    scheduler.plan(request, blocks([3, 9], [None, 5, 8]), 2)  # the first four positions were found in the cache
    [write] = scheduler.take_step().writes
    assert (write.start, write.slots) == (4, [[36, 37], [16, 17]])


def test_a_prompt_that_disappears_after_the_request_was_accepted_fails_only_this_request(
    scheduler: PrefixScheduler, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler.take_step()
    (folder / "en.safetensors").unlink()
    request = Request("a", [9, 8], "en")
    scheduler.admit(request)
    assert "there is no prompt 'en'" in caplog.text
    assert scheduler.num_new_tokens(request, 0) == (1, True)
    scheduler.plan(request, blocks([3]), 1)
    step = scheduler.take_step()
    assert (step.failed, step.writes) == (["a"], [])
    worker = PrefixWorker([list(NAMES)])
    worker.run(step, {})
    assert worker.take_failed() == {"a"}
    assert worker.take_failed() == set()
    scheduler.finish("a")


# --- in a worker ----------------------------------------------------------------------------------------------------------


def written(scheduler: PrefixScheduler, name: str, *groups: list[int | None]) -> Step:
    request = Request("a", [9, 8], name)
    scheduler.admit(request)
    scheduler.plan(request, blocks(*groups), scheduler.num_new_tokens(request, 0)[0])
    step: Step = pickle.loads(pickle.dumps(scheduler.take_step()))  # as between processes
    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["en", "de"])
def test_the_cache_holds_the_prefix_in_the_requests_blocks(
    scheduler: PrefixScheduler, folder: Path, name: str, dtype: torch.dtype
) -> None:
    layers = {layer: Layer(2, 8, dtype=dtype) for layer in NAMES}
    PrefixWorker([list(NAMES)]).run(written(scheduler, name, [7, 2]), layers)
    own = prefix(folder, name)
    slots = [28, 29, 30, 31, 8, 9][: own.facts.num_virtual_tokens]
    for index, layer in enumerate(NAMES):
        key, value = layers[layer].read(slots)
        assert torch.equal(key, own.keys[index].to(dtype))
        assert torch.equal(value, own.values[index].to(dtype))
        assert int((layers[layer].kv_cache == 7).all(-1).all(1).sum()) == 20 * SIZE - len(slots)  # no other slot


@pytest.mark.parametrize(("size", "heads"), [(2, 1), (4, 1)])
def test_each_worker_of_several_has_its_own_heads(
    scheduler: PrefixScheduler, folder: Path, size: int, heads: int
) -> None:
    step = written(scheduler, "en", [7, 2])
    for rank in range(size):
        layers = {layer: Layer(heads, 8) for layer in NAMES}
        PrefixWorker([list(NAMES)], rank, size).run(step, layers)
        key, _ = layers[NAMES[1]].read([28, 29, 30, 31, 8, 9])
        head = rank * 2 // size
        assert torch.equal(key, prefix(folder, "en").keys[1][:, head : head + 1])
    assert [heads_of_rank(8, rank, 4) for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]


def test_a_layer_whose_window_has_left_the_prefix_is_not_written(folder: Path) -> None:
    scheduler = PrefixScheduler(PromptFolder(folder), [SIZE, SIZE])
    layers = {layer: Layer(2, 8) for layer in NAMES}
    PrefixWorker([[NAMES[0]], [NAMES[1]]]).run(written(scheduler, "en", [7, 2], [None, None]), layers)
    assert not bool((layers[NAMES[0]].read([28])[0] == 7).all())
    assert bool((layers[NAMES[1]].kv_cache == 7).all())


def test_a_dropped_prefix_leaves_the_workers_memory(scheduler: PrefixScheduler) -> None:
    worker, layers = PrefixWorker([list(NAMES)]), {layer: Layer(2, 8) for layer in NAMES}
    worker.run(scheduler.take_step(), layers)
    assert len(worker.prefixes) == 2
    worker.run(Step(dropped=list(worker.prefixes)), layers)
    assert not worker.prefixes


def test_the_index_of_a_layer() -> None:
    assert layer_index("language_model.model.layers.12.self_attn.attn") == 12
    with pytest.raises(ValueError, match="has 2 numbers"):
        layer_index("blocks.1.layers.2.attn")


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
def test_an_option_that_was_not_run_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    require_configuration(configuration(folder))
    with pytest.raises((UnsupportedModeError, UnsupportedModelError), match=message):
        require_configuration(configuration(folder, **change))


def test_layers_without_a_plain_cache_are_refused(folder: Path) -> None:
    require_layers(configuration(folder), stand_in.cache_configuration(NAMES))
    with pytest.raises(UnsupportedModelError, match="1 of the model's 2 layers"):
        require_layers(configuration(folder), stand_in.cache_configuration(NAMES[:1]))
    with pytest.raises(UnsupportedModelError, match="caches: MambaSpec"):
        require_layers(configuration(folder), stand_in.cache_configuration(NAMES, stand_in.MambaSpec))


@pytest.mark.parametrize(
    "change", [{"layers": 3}, {"heads": 4}, {"dim": 16}, {"vocabulary": 97}, {"model_type": "qwen3"}]
)
def test_a_prompt_for_another_model_is_refused(folder: Path, change: dict[str, Any]) -> None:
    found = PromptFolder(folder).find("en")
    require_fit(found, configuration(folder))
    with pytest.raises(PromptMismatchError, match=r"'en' was exported for another model.*\n.*\(prompt\), .*\(server\)"):
        require_fit(found, configuration(folder, **change))


def test_a_prefix_that_every_token_must_see_is_refused_under_a_window(folder: Path) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PrefixTuning(3, windowed=False))
    vllm.export(model, folder, "wide")
    found = PromptFolder(folder).find("wide")
    require_fit(found, configuration(folder, window=64))  # no text is longer than the window
    with pytest.raises(UnsupportedModeError, match=r"windowed=False(.|\n)*`--max-model-len` of at most 32"):
        require_fit(found, configuration(folder, window=32))


@pytest.mark.parametrize("extra", [{}, {"prompts": 3}, {"prompts": "x", "prompt": "y"}], ids=str)
def test_settings_without_a_directory_are_refused(folder: Path, extra: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="it must have the one field 'prompts'"):
        require_servable(configuration(folder, extra=extra), params("en"), 5)


# --- requests -------------------------------------------------------------------------------------------------------------


def params(name: object, **options: Any) -> Any:
    values = {"prompt_logprobs": None, "skip_reading_prefix_cache": None, "max_tokens": 90} | options
    return SimpleNamespace(extra_args={"kv_transfer_params": {"soft_prompt": name}}, **values)


def test_a_request_that_can_be_served(folder: Path) -> None:
    assert require_servable(configuration(folder), params("en"), 57) == 6
    assert require_servable(configuration(folder), SimpleNamespace(extra_args=None), 63) == 0


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
def test_a_request_that_cannot_be_served_is_refused(folder: Path, case: str) -> None:
    given, length, features, kind, message = REFUSED[case]
    (folder / "bad.safetensors").write_bytes(b"bad")
    with pytest.raises(kind, match=message):
        require_servable(configuration(folder), given, length, **features)


# --- the connector as vLLM loads it ---------------------------------------------------------------------------------------


def core_request(name: object, length: int, **options: Any) -> Any:
    fields = {"prompt_embeds": None, "lora_request": None, "mm_features": [], "resumable": False}
    return SimpleNamespace(prompt_token_ids=[5] * length, sampling_params=params(name), **fields | options)


def test_requests_are_checked_where_the_server_receives_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = stand_in.install(monkeypatch)
    assert vllm.SoftPromptConnector.__name__ == "SoftPromptConnector"
    processor, engine = classes.processor(), classes.engine()
    processor.vllm_config = engine.vllm_config = configuration(folder)
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
    beams.kv_transfer_params = {"soft_prompt": "en"}
    with pytest.raises(stand_in.ValidationError, match="`use_beam_search`"):
        beams.to_beam_search_params()


def test_a_server_with_another_connector_is_not_affected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = stand_in.install(monkeypatch)
    assert vllm.SoftPromptConnector
    processor = classes.processor()
    processor.vllm_config = configuration(folder, connector="NixlConnector")
    request = core_request("fr", 5)
    assert processor.process_inputs(request) is request


def test_from_a_request_to_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch)
    role = sys.modules["vllm.distributed.kv_transfer.kv_connector.v1.base"].KVConnectorRole
    cache = stand_in.cache_configuration(NAMES)
    config = configuration(folder)
    ahead, behind = (vllm.SoftPromptConnector(config, one, cache) for one in (role.SCHEDULER, role.WORKER))
    request = Request("a", [9, 8], "en")
    ahead.on_new_request(request)
    external, waits = ahead.get_num_new_matched_tokens(request, 0)
    assert (external, waits) == (6, False)
    ahead.update_state_after_alloc(request, blocks([7, 2]), external)
    layers = {layer: Layer(2, 8) for layer in NAMES}
    behind.bind_connector_metadata(ahead.build_connector_meta(None))
    behind.start_load_kv(SimpleNamespace(no_compile_layers=layers))
    assert torch.equal(layers[NAMES[0]].read([28, 29, 30, 31, 8, 9])[0], prefix(folder, "en").keys[0])
    assert not behind.get_transfer_results(set()).failed_recving
    assert ahead.request_finished_all_groups(request, ([7, 2],)) == (False, None)
    assert not ahead.scheduler.prompts


def test_prompts_that_cannot_be_served_stop_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch)
    role = sys.modules["vllm.distributed.kv_transfer.kv_connector.v1.base"].KVConnectorRole
    config = configuration(folder, vocabulary=97)
    with pytest.raises(PromptMismatchError, match="exported for another model"):
        vllm.SoftPromptConnector(config, role.SCHEDULER, stand_in.cache_configuration(NAMES))


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.33.0"])
def test_another_release_of_vllm_is_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch, version)
    with pytest.raises(UnsupportedModeError, match=rf"not run with vLLM {version}.*\nInstall vLLM 0\.32\.0"):
        _ = vllm.SoftPromptConnector


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SoftHooksError, match="vLLM is not installed"):
        _ = vllm.SoftPromptConnector
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = vllm.nothing
