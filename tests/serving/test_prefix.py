"""The keys and values of a prompt, exported for a server: what the bare model computes after them, and their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DynamicCache

import softhooks
from softhooks import (
    Cartridge,
    ContextTuning,
    LlamaAdapter,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
)
from softhooks.errors import CheckpointError, OptionError, UnsupportedMethodError, UnsupportedModelError
from softhooks.serving.prefix import Prefix, prefix_of
from softhooks.serving.prefix_files import digest, read_prefix, write_prefix
from softhooks.serving.prompt_folder import PromptFolder

METHODS: dict[str, softhooks.Method] = {
    "prefix": PrefixTuning(5),
    "mlp": PrefixTuning(4, projection=True, hidden_size=8, dropout=0.5),
    "p-tuning-v2": PTuningV2(6, windowed=True),
    "cartridge": Cartridge(5, document=list(range(10, 20))),
    "context": ContextTuning(demonstrations=[[10, 11, 12], [13, 14]]),
    "soft": PromptTuning(5),
    "p-tuning": PTuning(3),
}


def attached(arch: str, method: softhooks.Method, **options: Any) -> tuple[Any, Any]:
    model = zoo.build(arch).eval()
    prompt = softhooks.attach(model, method, **options)
    with torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model, prompt


def after(model: Any, prefix: Prefix, ids: torch.Tensor) -> torch.Tensor:
    """The bare model's logits for a text after keys and values in its own cache."""
    cache = DynamicCache()  # without the config, so that no layer discards the start
    for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)
    count = prefix.facts.num_virtual_tokens
    positions = torch.arange(count, count + ids.shape[1])[None]
    logits: torch.Tensor = model(ids, past_key_values=cache, position_ids=positions).logits
    return logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_the_bare_model_after_the_prefix_is_the_model_with_the_prompt(arch: str, method: str) -> None:
    model, prompt = attached(arch, METHODS[method])
    ids = zoo.text(1, 7)
    with torch.no_grad():
        expected = model(ids).logits
        prefix = prefix_of(model.train())
        assert model.training
        prompt.remove()
        torch.testing.assert_close(after(model.eval(), prefix, ids), expected, atol=2e-5, rtol=2e-5)
        assert not torch.allclose(model(ids).logits, expected, atol=1e-2)
    assert prefix.facts.num_virtual_tokens == prompt.method.num_virtual_tokens


def test_every_module_keeps_its_mode() -> None:
    model, _ = attached("llama", METHODS["mlp"])
    model.train().model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    prefix_of(model)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_the_dtype_is_that_of_the_model() -> None:
    model = zoo.build("llama").to(torch.bfloat16)
    softhooks.attach(model, PrefixTuning(3))
    assert {tensor.dtype for tensor in prefix_of(model).keys} == {torch.bfloat16}


def test_what_sliding_windows_do_is_recorded() -> None:
    for windowed in (True, False):
        model, _ = attached("gemma3", PrefixTuning(3, windowed=windowed))
        assert prefix_of(model).facts.windowed is windowed


REFUSED: dict[str, tuple[softhooks.Method, dict[str, Any], str]] = {
    "branch": (LlamaAdapter(3), {}, "llama_adapter.* must be a prefix, or embeddings before the text"),
    "slots": (PromptTuning(3, placement="after_first"), {}, "prompt_tuning.* must be a prefix"),
    "tasks": (MultitaskPromptTuning(3, tasks=2), {}, "multitask_prompt_tuning.* must be a prefix"),
    "positions": (PrefixTuning(3, shift_positions=False), {}, "does not shift the text's positions"),
    "layers": (PTuningV2(3, layers=[1]), {}, "keys and values in 1 of 2 attention layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_prompt_that_is_more_or_less_than_a_prefix_is_refused(case: str) -> None:
    method, options, message = REFUSED[case]
    model, _ = attached("llama", method, **options)
    with pytest.raises(UnsupportedMethodError, match=message):
        prefix_of(model)


def test_a_trained_head_is_refused() -> None:
    model = zoo.build("llama", "sequence")
    softhooks.attach(model, PrefixTuning(3))
    with pytest.raises(UnsupportedMethodError, match=r"must need nothing else\.\n(.*\n)*heads: +score"):
        prefix_of(model)


def test_a_model_that_was_not_compared_is_refused() -> None:
    model, _ = attached("gpt2", PrefixTuning(3))
    with pytest.raises(UnsupportedModelError, match="'gpt2' cannot be exported: no server was compared on it"):
        prefix_of(model)


def test_only_one_active_prompt_is_exported() -> None:
    model, _ = attached("llama", PrefixTuning(3))
    with softhooks.disabled(model), pytest.raises(OptionError, match=r"\(disabled\); exactly one prompt"):
        prefix_of(model)


def test_prompts_by_row_are_not_exported() -> None:
    model, _ = attached("llama", PrefixTuning(3))
    with (
        softhooks.rows(model, ["default", None]),
        pytest.raises(OptionError, match=r"\['default', None\]; exactly one prompt"),
    ):
        prefix_of(model)


def test_trained_added_tokens_are_refused() -> None:
    model, _ = attached("llama", PromptTuning(3), train_added_tokens=[90, 91])
    with pytest.raises(UnsupportedMethodError, match=r"needs: +embeddings of added tokens"):
        prefix_of(model)


def test_rotary_frequencies_that_depend_on_the_text_are_refused() -> None:
    model = zoo.build("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    softhooks.attach(model, PrefixTuning(3))
    with pytest.raises(UnsupportedModelError, match="depend on the length of the text"):
        prefix_of(model)


# --- files --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefix() -> Prefix:
    return prefix_of(attached("llama", PrefixTuning(4))[0])


def test_a_file_holds_the_prefix(prefix: Prefix, tmp_path: Path) -> None:
    read, digest = read_prefix(write_prefix(tmp_path, "en", prefix))
    assert read.facts == prefix.facts
    assert all(map(torch.equal, (*read.keys, *read.values), (*prefix.keys, *prefix.values)))
    other = replace(prefix, keys=(prefix.keys[0] + 1, *prefix.keys[1:]))
    assert read_prefix(write_prefix(tmp_path, "de", other))[1] != digest


def test_a_digest_tells_the_facts_and_the_dtype_apart(prefix: Prefix) -> None:
    other = replace(prefix, facts=replace(prefix.facts, windowed=not prefix.facts.windowed))
    same_bytes = replace(
        prefix,
        keys=tuple(key.view(torch.bfloat16) for key in prefix.keys),
        values=tuple(value.view(torch.bfloat16) for value in prefix.values),
    )
    assert len({digest(one) for one in (prefix, other, same_bytes)}) == 3


@pytest.mark.parametrize("name", ["", ".en", "a/b", "../x", "a b", "x" * 129, 7, None], ids=repr)
def test_a_name_that_is_no_file_name_is_refused(name: Any, prefix: Prefix, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the name of a prompt is"):
        write_prefix(tmp_path, name, prefix)
    with pytest.raises(OptionError, match="the name of a prompt is"):
        PromptFolder(tmp_path).find(name)


def _changed(part: str) -> Any:
    def change(tensors: dict[str, torch.Tensor], about: dict[str, str]) -> None:
        facts = json.loads(about["facts"])
        if part == "format":
            about["format"] = "pt"
        elif part == "digest":
            tensors["layers.0.key"] += 1
        elif part == "shape":
            tensors["layers.0.key"] = tensors["layers.0.key"][:2].contiguous()
        elif part == "dtype":
            tensors["layers.0.key"] = tensors["layers.0.key"].double()
        elif part == "missing":
            del facts["windowed"]
        elif part == "type":
            facts["heads"] = [2, "2"]
        elif part == "negative":
            facts["num_virtual_tokens"] = -1
        about["facts"] = json.dumps(facts) if part != "json" else "{"

    return change


@pytest.mark.parametrize("part", ["format", "digest", "shape", "dtype", "missing", "type", "negative", "json"])
def test_a_damaged_file_is_refused(part: str, prefix: Prefix, tmp_path: Path) -> None:
    path = write_prefix(tmp_path, "en", prefix)
    tensors = load_file(path)
    facts = {name: getattr(prefix.facts, name) for name in prefix.facts.__dataclass_fields__}
    about = {"format": "softhooks-prefix-1", "facts": json.dumps(facts), "digest": read_prefix(path)[1]}
    _changed(part)(tensors, about)
    save_file(tensors, path, about)
    with pytest.raises(CheckpointError, match=r"not a prompt that was exported|not valid JSON"):
        read_prefix(path)


# --- a directory that a server watches ------------------------------------------------------------------------------------


def test_files_that_come_change_and_go(prefix: Prefix, tmp_path: Path) -> None:
    folder = PromptFolder(tmp_path)
    with pytest.raises(OptionError, match="there is no prompt 'en'; the server has none"):
        folder.find("en")
    write_prefix(tmp_path, "en", prefix)
    first = folder.find("en")
    assert folder.find("en") is first
    write_prefix(tmp_path, "en", replace(prefix, keys=prefix.values, values=prefix.keys))
    second = folder.find("en")
    assert first.digest != second.digest
    write_prefix(tmp_path, "de", prefix)
    assert [found.name for found in folder.read_all()] == ["de", "en"]
    assert folder.digests() == {first.digest, second.digest}
    (tmp_path / "en.safetensors").unlink()
    assert folder.digests() == {first.digest}
    with pytest.raises(OptionError, match="the server has 'de'"):
        folder.find("en")


def test_a_directory_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not a directory"):
        PromptFolder(tmp_path / "none")
