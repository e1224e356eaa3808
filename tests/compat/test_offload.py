"""Models with a `device_map`, whose layers on CPU or disk accelerate loads in each forward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import zoo
from accelerate import cpu_offload, disk_offload, dispatch_model

import softhooks
from softhooks import FrozenModifiedError, PrefixTuning, PromptTuning, UnsupportedModelError

METHODS = {"prompt": PromptTuning(4), "prefix": PrefixTuning(4)}
PARTS = {
    "llama": ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"),
    "bert": ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler", "classifier"),
}


def _spread(model: Any, arch: str, folder: Path, disk: Sequence[str]) -> Any:
    """Put parts of a model on disk, with hooks on every part, as a `device_map` of several devices does."""
    places = {part: "disk" if part in disk else "cpu" for part in PARTS[arch]}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


SPREADS = {
    "hooks only": lambda model, folder: _spread(model, "llama", folder, []),
    "a layer on disk": lambda model, folder: _spread(model, "llama", folder, ["model.layers.1"]),
    "embedding on disk": lambda model, folder: _spread(model, "llama", folder, ["model.embed_tokens"]),
    "all on disk": lambda model, folder: _spread(model, "llama", folder, PARTS["llama"]),
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk_offload": lambda model, folder: disk_offload(model, str(folder), execution_device=torch.device("cpu")),
}


@pytest.mark.filterwarnings(
    "ignore:You are calling .generate:UserWarning"
)  # said of ids on the CPU by older transformers
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spread", SPREADS)
def test_a_prompt_on_an_offloaded_model_computes_what_it_computes_elsewhere(
    tmp_path: Path, spread: str, method: str
) -> None:
    ids = zoo.text()
    losses, gradients, texts, reports = [], [], [], []
    for model in (zoo.build("llama"), SPREADS[spread](zoo.build("llama"), tmp_path)):
        torch.manual_seed(3)
        with softhooks.attach(model, METHODS[method]) as prompt:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.detach())
            gradients.append([parameter.grad for parameter in prompt.parameters()])
            texts.append(model.generate(ids, max_new_tokens=4, do_sample=False))
            reports.append(prompt.verify_frozen())
    assert torch.equal(losses[0], losses[1])
    assert all(map(torch.equal, *gradients))
    assert torch.equal(texts[0], texts[1])
    assert (reports[0].tensors, reports[0].bytes) == (reports[1].tensors, reports[1].bytes)
    assert not reports[1].unread


@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_trains_on_a_spread_model_as_on_any(tmp_path: Path, method: str) -> None:
    trained = []
    for name, disk in (("whole", ()), ("spread", PARTS["bert"])):
        model = zoo.build("bert", "sequence")
        if disk:
            model = _spread(model, "bert", tmp_path / "weights", disk)
        torch.manual_seed(5)
        trainer, callback = training.prompted(tmp_path / name, model, "sequence", METHODS[method])
        trainer.train()
        trained.append((training.losses(trainer), training.trained(callback)))
        assert callback.report is not None
        assert not callback.report.unread
    assert any(".heads." in name for name in trained[0][1])
    assert training.equal(trained[0], trained[1])


def test_a_weight_that_changes_on_disk_is_noticed(tmp_path: Path) -> None:
    model = _spread(zoo.build("llama"), "llama", tmp_path, ["model.layers.1"])
    with softhooks.attach(model, METHODS["prefix"]) as prompt:
        file = tmp_path / "model.layers.1.mlp.up_proj.weight.dat"
        data = bytearray(file.read_bytes())
        data[0] ^= 1
        file.write_bytes(data)
        with pytest.raises(FrozenModifiedError, match=r"layers\.1\.mlp\.up_proj\.weight: values changed"):
            prompt.verify_frozen()


def test_a_report_names_what_it_could_not_read() -> None:
    model = zoo.build("llama")
    model.register_buffer("elsewhere", torch.ones(3, device="meta"))
    with softhooks.attach(model, METHODS["prompt"]) as prompt:
        report = prompt.verify_frozen()
    assert report.unread == ("elsewhere",)
    assert "could not be read: elsewhere" in str(report)
    assert report.tensors == 23


def test_a_model_without_weights_is_refused_by_name() -> None:
    model = zoo.build("llama").to("meta")
    with pytest.raises(UnsupportedModelError, match=r"^the weights of .* are on the meta device"):
        softhooks.attach(model, METHODS["prompt"])


def test_a_head_on_disk_is_copied_and_its_original_stays_offloaded(tmp_path: Path) -> None:
    whole = zoo.build("bert", "sequence")
    model = _spread(zoo.build("bert", "sequence"), "bert", tmp_path, ["classifier"])
    hook, forward = model.classifier._hf_hook, model.classifier.forward
    with softhooks.attach(model, METHODS["prompt"]) as prompt:
        own = prompt.heads["classifier"]
        assert torch.equal(own.weight, whole.classifier.weight)
        assert "_hf_hook" not in own.__dict__
        assert "forward" not in own.__dict__
        assert own.weight.requires_grad
        assert model.classifier._hf_hook is hook
        assert model.classifier.forward is forward
        assert model.classifier.weight.is_meta
