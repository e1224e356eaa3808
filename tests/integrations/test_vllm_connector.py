"""The KV connector for vLLM, run against stand-ins for vLLM; `make test-vllm` runs it in vLLM itself."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_stand_in as stand_in
import zoo
from vllm_stand_in import Layer, Request, blocks, configuration

import softhooks
from softhooks import PrefixTuning
from softhooks.errors import PromptMismatchError, SoftHooksError, UnsupportedModeError
from softhooks.integration_support.serving import Prefix, PromptFolder
from softhooks.integrations import vllm
from softhooks.integrations._vllm_plan import Step
from softhooks.integrations._vllm_scheduler import PrefixScheduler
from softhooks.integrations._vllm_worker import PrefixWorker, heads_of_rank, layer_index

NAMES = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")
SIZE = 4


@pytest.fixture
def scheduler(prompt_folder: Path) -> PrefixScheduler:
    return PrefixScheduler(PromptFolder(prompt_folder), [SIZE])


def prefix(prompt_folder: Path, name: str) -> Prefix:
    return PromptFolder(prompt_folder).find(name).prefix


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
    scheduler: PrefixScheduler, prompt_folder: Path
) -> None:
    digests = {name: PromptFolder(prompt_folder).find(name).digest for name in ("en", "de")}
    assert set(scheduler.take_step().added) == set(digests.values())  # before any request
    first, second = Request("a", [9, 8], "en"), Request("b", [9, 8], "en")
    for request in (first, second):
        scheduler.admit(request)
        scheduler.plan(request, blocks([3, 5]), 6)
    step = scheduler.take_step()
    assert not step.added
    assert [(write.digest, write.start) for write in step.writes] == [(digests["en"], 0)] * 2
    (prompt_folder / "en.safetensors").unlink()
    scheduler.finish("a")
    assert not scheduler.take_step().dropped  # the other request still needs it, for example after a preemption
    scheduler.finish("b")
    assert scheduler.take_step().dropped == [digests["en"]]


def test_a_new_file_is_sent_with_the_first_request_that_needs_it(
    scheduler: PrefixScheduler, prompt_folder: Path
) -> None:
    scheduler.take_step()
    model = zoo.build("llama", seed=1)
    softhooks.attach(model, PrefixTuning(2))
    vllm.export(model, prompt_folder, "en")
    request = Request("a", [9, 8], "en")
    scheduler.admit(request)
    assert scheduler.num_new_tokens(request, 0) == (2, False)
    scheduler.plan(request, blocks([3]), 2)
    step = scheduler.take_step()
    assert list(step.added) == [step.writes[0].digest]


def test_slots_follow_the_blocks_and_skip_those_that_a_window_has_left(prompt_folder: Path) -> None:
    scheduler = PrefixScheduler(PromptFolder(prompt_folder), [4, 2])
    request = Request("a", [9, 8], "en")
    scheduler.admit(request)
    scheduler.plan(request, blocks([3, 9], [None, 5, 8]), 6)
    [write] = scheduler.take_step().writes
    assert write.slots == [[12, 13, 14, 15, 36, 37], [-1, -1, 10, 11, 16, 17]]
    scheduler.plan(request, blocks([3, 9], [None, 5, 8]), 2)  # the first four positions were found in the cache
    [write] = scheduler.take_step().writes
    assert (write.start, write.slots) == (4, [[36, 37], [16, 17]])


def test_a_prompt_that_disappears_after_the_request_was_accepted_fails_only_this_request(
    scheduler: PrefixScheduler, prompt_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler.take_step()
    (prompt_folder / "en.safetensors").unlink()
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
    scheduler: PrefixScheduler, prompt_folder: Path, name: str, dtype: torch.dtype
) -> None:
    layers = {layer: Layer(2, 8, dtype=dtype) for layer in NAMES}
    PrefixWorker([list(NAMES)]).run(written(scheduler, name, [7, 2]), layers)
    own = prefix(prompt_folder, name)
    slots = [28, 29, 30, 31, 8, 9][: own.facts.num_virtual_tokens]
    for index, layer in enumerate(NAMES):
        key, value = layers[layer].read(slots)
        assert torch.equal(key, own.keys[index].to(dtype))
        assert torch.equal(value, own.values[index].to(dtype))
        assert int((layers[layer].kv_cache == 7).all(-1).all(1).sum()) == 20 * SIZE - len(slots)  # no other slot


@pytest.mark.parametrize(("size", "heads"), [(2, 1), (4, 1)])
def test_each_worker_of_several_has_its_own_heads(
    scheduler: PrefixScheduler, prompt_folder: Path, size: int, heads: int
) -> None:
    step = written(scheduler, "en", [7, 2])
    for rank in range(size):
        layers = {layer: Layer(heads, 8) for layer in NAMES}
        PrefixWorker([list(NAMES)], rank, size).run(step, layers)
        key, _ = layers[NAMES[1]].read([28, 29, 30, 31, 8, 9])
        head = rank * 2 // size
        assert torch.equal(key, prefix(prompt_folder, "en").keys[1][:, head : head + 1])
    assert [heads_of_rank(8, rank, 4) for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]


def test_a_layer_whose_window_has_left_the_prefix_is_not_written(prompt_folder: Path) -> None:
    scheduler = PrefixScheduler(PromptFolder(prompt_folder), [SIZE, SIZE])
    layers = {layer: Layer(2, 8) for layer in NAMES}
    PrefixWorker([[NAMES[0]], [NAMES[1]]]).run(written(scheduler, "en", [7, 2], [None, None]), layers)
    assert not bool((layers[NAMES[0]].read([28])[0] == 7).all())
    assert bool((layers[NAMES[1]].kv_cache == 7).all())


def test_a_layer_whose_window_has_left_a_part_of_the_prefix_gets_the_rest(prompt_folder: Path) -> None:
    scheduler = PrefixScheduler(PromptFolder(prompt_folder), [SIZE, SIZE])
    layers = {layer: Layer(2, 8) for layer in NAMES}
    PrefixWorker([[NAMES[0]], [NAMES[1]]]).run(written(scheduler, "en", [7, 2], [None, 5]), layers)
    key, value = layers[NAMES[1]].read([20, 21])
    own = prefix(prompt_folder, "en")
    assert torch.equal(key, own.keys[1][4:])
    assert torch.equal(value, own.values[1][4:])
    assert int((layers[NAMES[1]].kv_cache == 7).all(-1).all(1).sum()) == 20 * SIZE - 2  # no other slot


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


# --- the connector as vLLM loads it ---------------------------------------------------------------------------------------


def test_from_a_request_to_the_cache(prompt_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch)
    role = sys.modules["vllm.distributed.kv_transfer.kv_connector.v1.base"].KVConnectorRole
    cache = stand_in.cache_configuration(NAMES)
    config = configuration(prompt_folder)
    ahead, behind = (vllm.SoftPromptConnector(config, one, cache) for one in (role.SCHEDULER, role.WORKER))
    request = Request("a", [9, 8], "en")
    ahead.on_new_request(request)
    external, waits = ahead.get_num_new_matched_tokens(request, 0)
    assert (external, waits) == (6, False)
    ahead.update_state_after_alloc(request, blocks([7, 2]), external)
    layers = {layer: Layer(2, 8) for layer in NAMES}
    behind.bind_connector_metadata(ahead.build_connector_meta(None))
    behind.start_load_kv(SimpleNamespace(no_compile_layers=layers))
    assert torch.equal(layers[NAMES[0]].read([28, 29, 30, 31, 8, 9])[0], prefix(prompt_folder, "en").keys[0])
    assert not behind.get_transfer_results(set()).failed_recving
    assert ahead.request_finished_all_groups(request, ([7, 2],)) == (False, None)
    assert not ahead.scheduler.prompts


def test_a_request_whose_prompt_was_deleted_is_reported_to_vllm(
    prompt_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.install(monkeypatch)
    role = sys.modules["vllm.distributed.kv_transfer.kv_connector.v1.base"].KVConnectorRole
    cache, config = stand_in.cache_configuration(NAMES), configuration(prompt_folder)
    ahead, behind = (vllm.SoftPromptConnector(config, one, cache) for one in (role.SCHEDULER, role.WORKER))
    (prompt_folder / "en.safetensors").unlink()
    request = Request("a", [9, 8], "en")
    ahead.on_new_request(request)
    ahead.update_state_after_alloc(request, blocks([3]), 1)
    behind.bind_connector_metadata(ahead.build_connector_meta(None))
    behind.start_load_kv(SimpleNamespace(no_compile_layers={name: Layer(2, 8) for name in NAMES}))
    results = behind.get_transfer_results(set())
    assert results.failed_recving == results.finished_recving == {"a"}
    assert not behind.get_transfer_results(set()).failed_recving


def test_prompts_that_cannot_be_served_stop_the_start(prompt_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch)
    role = sys.modules["vllm.distributed.kv_transfer.kv_connector.v1.base"].KVConnectorRole
    config = configuration(prompt_folder, vocabulary=97)
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
