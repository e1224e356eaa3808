"""The Axolotl plugin. Axolotl cannot be installed here: a stand-in calls the hooks in its order (recorded in
published.json) on a real model and Trainer. Where it is installed, its own plugin manager and schema take the plugin.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import examples
import pytest
import torch
import training
import zoo
from published import FACTS, arguments, hook, is_installed
from untouched import remove_all, untouched

import softhooks
from softhooks import AttachError, OptionError, PrefixTuning, PromptTuning, SoftHooksError, TrainerError
from softhooks.integrations import axolotl as integration

HOOKS: dict[str, list[str]] = FACTS["axolotl"]["BasePlugin"]
SECTION = {"method": "prefix_tuning", "options": {"num_virtual_tokens": 4}}
WITHOUT = pytest.mark.skipif(is_installed("axolotl"), reason="the real one is there")
WITH = pytest.mark.skipif(not is_installed("axolotl"), reason="Axolotl conflicts with these versions")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()
    for name in ("SoftPromptPlugin", "SoftPromptArgs"):
        vars(integration).pop(name, None)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin, as Axolotl would load it; its base class is a stand-in with the published hooks."""
    if not is_installed("axolotl"):
        base = type("BasePlugin", (), {name: hook(names) for name, names in HOOKS.items()})
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules["axolotl.integrations.base"], "BasePlugin", base, raising=False)
    return integration.SoftPromptPlugin()


def run(plugin: Any, cfg: dict[str, Any], model: Any, folder: Path, **options: Any) -> Any:
    """Call the hooks in Axolotl's order: register, load, build the Trainer, train, save, end."""
    plugin.register(cfg)
    plugin.pre_model_load(cfg)
    for name in ("post_model_build", "pre_lora_load", "post_lora_load", "post_model_load"):
        getattr(plugin, name)(cfg, model)
    callbacks = list(plugin.add_callbacks_pre_trainer(cfg=cfg, model=model) or ())
    trainer = training.make(folder, model, "causal", callbacks, save_strategy="steps", save_steps=2)
    plugin.post_trainer_create(cfg, trainer)
    for callback in plugin.add_callbacks_post_trainer(cfg, trainer) or ():
        trainer.add_callback(callback)
    trainer.train(**options)
    model.save_pretrained(folder)
    plugin.post_train(cfg, model)
    plugin.post_train_unload(cfg)
    return trainer


def test_the_hooks_take_what_axolotl_gives(plugin: Any) -> None:
    for name, names in HOOKS.items():
        assert arguments(getattr(type(plugin), name)) == names, name


def test_it_trains_the_prompt_only_and_what_is_saved_holds_it_only(plugin: Any, tmp_path: Path) -> None:
    model = zoo.build("llama")
    base = training.base_of(model)
    run(plugin, {"softhooks": SECTION}, model, tmp_path)
    prompt = plugin.callback.soft_prompt
    assert prompt.method == PrefixTuning(4)
    assert training.equal(training.base_of(model), base)
    assert plugin.callback.report.tensors == len(dict(model.named_parameters()) | dict(model.named_buffers())) - 1
    assert {file.name for file in tmp_path.glob("*.*")} == {"soft_prompt.json", "soft_prompt.safetensors"}
    fresh = zoo.build("llama")
    softhooks.load(fresh, tmp_path)
    ids = zoo.text(2)
    torch.testing.assert_close(fresh(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-6)


def test_its_checkpoint_resumes_bit_for_bit(plugin: Any, tmp_path: Path) -> None:
    cfg = {"softhooks": {"method": "prefix_tuning", "options": {"num_virtual_tokens": 4, "projection": True}}}
    run(plugin, cfg, zoo.build("llama"), tmp_path)
    whole = training.trained(plugin.callback)
    later = type(plugin)()
    run(later, cfg, zoo.build("llama"), tmp_path / "later", resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert training.equal(training.trained(later.callback), whole)


def test_options_of_method_and_callback_come_from_the_section() -> None:
    section = {"method": "PrefixTuning", "options": {"num-virtual-tokens": 3}, "callback": {"name": "mine"}}
    callback = integration.callback_for({"softhooks": section}, zoo.build("llama"))
    assert (callback.method, callback.name) == (PrefixTuning(3), "mine")
    both = {"softhooks": {**SECTION, "callback": {"trainable": "*lora_*"}}, "adapter": "lora"}
    assert integration.read(both)[1] == {"trainable": ("*lora_*",)}


@pytest.mark.parametrize(
    ("cfg", "error", "says"),
    [
        ({}, TrainerError, "Write a section `softhooks:`"),
        ({"softhooks": {"method": "prefixes"}}, OptionError, "prefix-tuning"),
        ({"softhooks": {"method": "prefix_tuning", "options": {"tokens": 3}}}, OptionError, "tokens"),
        ({"softhooks": {"options": {"num_virtual_tokens": "many"}}}, OptionError, "whole number"),
        ({"softhooks": {"optoins": {}}}, OptionError, "Did you mean options:"),
        ({"softhooks": {"callback": {"check_frozen": "never"}}}, OptionError, "check"),
        ({"softhooks": SECTION, "adapter": "lora"}, TrainerError, "`adapter: lora` would be frozen"),
        *(({"softhooks": SECTION, key: "yes"}, TrainerError, key) for key in integration._UNSUPPORTED),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_when_the_plugin_is_registered(
    plugin: Any, cfg: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        plugin.register(cfg)


def test_a_model_with_a_prompt_is_refused_and_stays_as_it_is(plugin: Any) -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(3), "early")
    with untouched(model), pytest.raises(AttachError, match="'early'"):
        plugin.post_model_load({"softhooks": SECTION}, model)


def test_a_trainer_that_did_not_get_the_callback_is_an_error(plugin: Any) -> None:
    model = zoo.build("llama")
    plugin.add_callbacks_pre_trainer({"softhooks": SECTION}, model)
    with pytest.raises(TrainerError, match="did not use the plugin"):
        plugin.post_train({}, model)


@WITHOUT
def test_without_axolotl_the_error_says_what_to_do() -> None:
    with pytest.raises(SoftHooksError, match="Axolotl is not installed"):
        _ = integration.SoftPromptPlugin
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = integration.Missing


@WITH
def test_the_record_is_what_axolotl_publishes_and_its_manager_takes_the_plugin() -> None:
    from axolotl.integrations.base import BasePlugin, PluginManager
    from axolotl.integrations.config import merge_input_args

    assert {name: arguments(getattr(BasePlugin, name)) for name in HOOKS} == HOOKS
    manager = PluginManager.get_instance()
    manager.register("softhooks.integrations.axolotl.SoftPromptPlugin")
    assert [type(plugin).__name__ for plugin in manager.plugins.values()] == ["SoftPromptPlugin"]
    assert all("softhooks" in schema.model_fields for schema in merge_input_args())


def test_the_example_runs() -> None:
    names = examples.run("axolotl")
    assert names["callback"].report.tensors > 0
