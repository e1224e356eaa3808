"""Prompts in SGLang's prefix cache, run against stand-ins for SGLang; `make test-sglang` runs SGLang itself."""

from __future__ import annotations

import tomllib
from array import array
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_stand_in as stand_in
import torch
import zoo
from sglang_stand_in import MatchPrefixParams, RadixKey

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
from softhooks.integration_support.serving import PromptFolder
from softhooks.integrations import sglang
from softhooks.integrations._sglang_plugin import register
from softhooks.integrations._sglang_requests import _folder, make_request, salt_of, take_request
from softhooks.integrations._sglang_settings import served_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("prompts")
    model = zoo.build("llama")
    for name, method in {"en": PrefixTuning(6), "de": PromptTuning(3)}.items():
        with softhooks.attach(model, method, name=name):
            sglang.export(model, folder, name)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("SOFTHOOKS_PROMPTS", str(tmp_path))
    _folder.cache_clear()
    yield tmp_path
    _folder.cache_clear()


@pytest.fixture
def found(folder: Path) -> Any:
    return PromptFolder(folder).find("en")


@pytest.fixture
def registered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> stand_in.Registered:
    made = stand_in.install(monkeypatch)
    register()
    return made


def create(registered: stand_in.Registered, **changes: Any) -> Any:
    return registered.backends["softhooks"](stand_in.context(**changes))


def match(cache: Any, salt: str | None, ids: list[int]) -> int:
    return int(cache.match_prefix(MatchPrefixParams(RadixKey(array("q", ids), cache_salt=salt))).device_prefix_len)


# --- the plugin ---------------------------------------------------------------------------------------------------------


def test_the_entry_point_is_the_plugin() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert resolve_name(project["entry-points"]["sglang.srt.plugins"]["softhooks"]) is register


def test_another_release_of_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = stand_in.install(monkeypatch, version="0.6.0")
    with pytest.raises(UnsupportedModeError, match=r"SGLang 0\.6\.0.*\n.*Install SGLang 0\.5\.23"):
        register()
    assert not made.backends
    assert not made.hooks


def test_both_methods_that_requests_pass_are_wrapped(registered: stand_in.Registered) -> None:
    assert {target.rsplit(".", 1)[-1]: hook for target, hook in registered.hooks.items()} == {
        "_create_tokenized_object": (make_request, "around"),
        "handle_generate_request": (take_request, "around"),
    }


# --- the cache ----------------------------------------------------------------------------------------------------------


def test_the_cache_holds_all_prompts_from_the_start(registered: stand_in.Registered, folder: Path) -> None:
    pool = stand_in.MHATokenToKVPool()
    cache = create(registered, pool=pool)
    for name in ("de", "en"):
        found = PromptFolder(folder).find(name)
        count, salt = found.prefix.facts.num_virtual_tokens, salt_of(found)
        ids, slots = cache.entries[salt]
        assert len(ids) == len(set(slots.tolist())) == count
        assert torch.equal(pool.keys[:, slots], torch.stack(found.prefix.keys))
        assert torch.equal(pool.values[:, slots], torch.stack(found.prefix.values))
        assert (salt, count) in cache.locked  # so that SGLang does not evict it
        assert match(cache, salt, [*ids, 5, 6]) == count
    assert match(cache, None, [*ids, 5, 6]) == 0
    assert cache.token_to_kv_pool_allocator.available_size() == 40 - 9


def test_prompts_come_back_after_a_flush(registered: stand_in.Registered, found: Any) -> None:
    cache = create(registered)
    cache.reset()
    cache.token_to_kv_pool_allocator.clear()
    assert match(cache, salt_of(found), [0] * 6 + [5]) == 6
    cache.admit("en", salt_of(found))
    assert cache.token_to_kv_pool_allocator.available_size() == 40 - 6  # written once


def test_a_prompt_that_the_cache_lost_stops_the_server(registered: stand_in.Registered, found: Any) -> None:
    cache = create(registered)
    del cache.entries[salt_of(found)]
    with pytest.raises(RuntimeError, match="the answer would be wrong"):
        match(cache, salt_of(found), [0] * 6 + [5])


def test_no_room_for_a_prompt(registered: stand_in.Registered) -> None:
    with pytest.raises(PromptTooLongError, match="no room for the 6 virtual tokens"):
        create(registered, pool=stand_in.MHATokenToKVPool(size=8))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"disable_radix_cache": True}, "disable radix cache: True"),
        ({"page_size": 16}, "page size: 16"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "kv cache dtype"),
        ({"tp_size": 2}, "tp size: 2"),
        ({"speculative_algorithm": "EAGLE"}, "EAGLE"),
        ({"json_model_override_args": '{"rope_theta": 1}'}, "json model override args"),
        ({"hybrid": True}, "disable hybrid swa memory"),
    ],
)
def test_options_that_were_not_run_are_refused(registered: stand_in.Registered, changes: Any, named: str) -> None:
    with pytest.raises(UnsupportedModeError, match=named):
        create(registered, **changes)


def test_a_cache_without_hits_is_refused(registered: stand_in.Registered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_RADIX_FORCE_MISS", "1")
    with pytest.raises(UnsupportedModeError, match="FORCE MISS"):
        create(registered)


def test_another_kind_of_pool_is_refused(registered: stand_in.Registered) -> None:
    class Quantized(stand_in.MHATokenToKVPool):
        pass

    with pytest.raises(UnsupportedModeError, match="pool: Quantized"):
        create(registered, pool=Quantized())


def test_models_and_prompts_must_fit(registered: stand_in.Registered, found: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="'gpt2'"):
        create(registered, served=stand_in.model(model_type="gpt2"))
    with pytest.raises(PromptMismatchError, match=r"layers: 2 \(prompt\), 9 \(server\)"):
        create(registered, served=stand_in.model(num_hidden_layers=9))
    served_model(stand_in.model(sliding_window=64)).require_fit(found)
    facts = SimpleNamespace(**{**vars(found.prefix.facts), "layers": 2, "windowed": False})
    unwindowed = SimpleNamespace(name="en", prefix=SimpleNamespace(facts=facts))
    with pytest.raises(UnsupportedModeError, match="windowed=False"):
        served_model(stand_in.model(sliding_window=16)).require_fit(unwindowed)  # type: ignore[arg-type]


def test_the_directory_must_be_named(registered: stand_in.Registered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOFTHOOKS_PROMPTS")
    with pytest.raises(OptionError, match="SOFTHOOKS_PROMPTS is not set"):
        create(registered)


# --- requests -----------------------------------------------------------------------------------------------------------


def tokenized(name: object, ids: list[int] | None, start: int = -1, **fields: Any) -> Any:
    """Pass a request through the wrapper in the server's process."""
    sampling = {} if name is None else {"custom_params": {"soft_prompt": name}}
    manager = SimpleNamespace(model_config=stand_in.model())

    def original(_self: Any, obj: Any, text: Any, ids: Any) -> Any:
        params = SimpleNamespace(custom_params=obj.sampling_params.get("custom_params"))
        salt = fields.get("cache_salt")
        return SimpleNamespace(input_ids=ids, cache_salt=salt, logprob_start_len=start, sampling_params=params)

    return make_request(original, manager, SimpleNamespace(sampling_params=sampling, **fields), "text", ids)


def taken(cache: Any, request: Any) -> dict[str, Any]:
    """Pass a request through the wrapper in the scheduler, and return what the scheduler gets."""
    seen: dict[str, Any] = {}
    take_request(lambda _self, _request, **named: seen.update(named), SimpleNamespace(tree_cache=cache), request)
    return seen


def test_a_request_gets_the_virtual_tokens_that_the_cache_holds(registered: stand_in.Registered, found: Any) -> None:
    cache = create(registered)
    request = tokenized("en", [7, 8], start=1)
    assert request.input_ids[6:] == [7, 8]
    assert request.logprob_start_len == 7
    assert taken(cache, request) == {}
    assert match(cache, request.cache_salt, request.input_ids) == 6
    assert tokenized("en", [7, 8]).logprob_start_len == -1


def test_bare_requests_and_other_caches_are_left_alone(registered: stand_in.Registered) -> None:
    request = tokenized(None, [7, 8], cache_salt="mine")
    assert (request.input_ids, request.cache_salt) == ([7, 8], "mine")
    assert taken(create(registered), request) == {}
    registered.backend = None
    assert tokenized("en", [7, 8]).input_ids == [7, 8]
    assert taken(SimpleNamespace(), tokenized("en", [7, 8])) == {}


@pytest.mark.parametrize(
    ("name", "ids", "fields", "message"),
    [
        ("fr", [5], {}, "there is no prompt 'fr'; the server has 'de', 'en'"),
        (3, [5], {}, "the name of a prompt is 3"),
        ("en", None, {}, "no text"),
        ("en", [5] * 58, {}, r"6 \+ 58 tokens"),
        ("en", [5], {"cache_salt": "mine"}, "`cache_salt`"),
        ("en", [5], {"lora_path": "x", "session_params": {"id": 1}}, "`lora_path`, `session_params`"),
        ("en", [5], {"image_data": ["x"]}, "`image_data`"),
    ],
)
def test_what_cannot_be_served_is_a_value_error(
    registered: stand_in.Registered, name: object, ids: Any, fields: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenized(name, ids, **fields)


def test_files_that_change_take_effect_with_the_next_request(registered: stand_in.Registered, folder: Path) -> None:
    cache = create(registered)
    before = tokenized("en", [7])
    (folder / "part").write_bytes((folder / "de.safetensors").read_bytes())
    (folder / "part").replace(folder / "en.safetensors")
    after = tokenized("en", [7])
    assert len(before.input_ids) == 7
    assert len(after.input_ids) == 4
    for request, count in ((after, 3), (before, 6)):
        assert taken(cache, request) == {}
        assert match(cache, request.cache_salt, request.input_ids) == count
    (folder / "en.safetensors").unlink()
    with pytest.raises(ValueError, match="there is no prompt 'en'"):
        tokenized("en", [7])


def test_a_prompt_that_is_lost_between_server_and_scheduler(registered: stand_in.Registered, folder: Path) -> None:
    cache = create(registered)
    (folder / "new.safetensors").write_bytes((folder / "en.safetensors").read_bytes())
    deleted, replaced = tokenized("new", [7]), tokenized("new", [7])
    (folder / "new.safetensors").unlink()
    assert "there is no prompt 'new'" in taken(cache, deleted)["mm_input_error"]
    assert deleted.cache_salt is None
    (folder / "new.safetensors").write_bytes((folder / "de.safetensors").read_bytes())
    assert "was replaced" in taken(cache, replaced)["mm_input_error"]
    with pytest.raises(CheckpointError):
        cache.admit("new", replaced.cache_salt)


def test_a_request_that_did_not_pass_the_server_s_process_is_refused(registered: stand_in.Registered) -> None:
    request = tokenized("en", [7])
    request.cache_salt = None
    assert taken(create(registered), request).keys() == {"mm_input_error"}


def test_the_errors_are_softhooks_own(registered: stand_in.Registered) -> None:
    with pytest.raises(ValueError, match="no prompt") as raised:
        tokenized("fr", [7])
    assert isinstance(raised.value.__cause__, SoftHooksError)
