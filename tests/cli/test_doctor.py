"""`softhooks doctor`: versions and devices, and what a model allows, found with a tiny copy made from its config."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
import transformers as tf
import zoo
from rich.console import Console
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner
from untouched import remove_all

import softhooks
from softhooks import CheckpointError
from softhooks.analysis import machine
from softhooks.analysis.doctor import TRIALS, Candidate, try_methods
from softhooks.analysis.tiny_config import VOCABULARY, tiny_like
from softhooks.cli import app
from softhooks.cli.doctor import show
from softhooks.method import METHODS

runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def run(*arguments: object, status: int = 0) -> str:
    result = runner.invoke(app.app, ["doctor", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout


def shown(found: dict[str, Any]) -> str:
    """What is printed in a terminal, on one line."""
    screen = io.StringIO()
    show(found, Console(file=screen, width=80))
    assert max(map(len, screen.getvalue().splitlines())) <= 80
    return " ".join(screen.getvalue().split())


def config_only(folder: Path, arch: str, **changes: Any) -> Path:
    """Save the config of a model of full size, without weights."""
    config = CONFIG_MAPPING[arch](**changes)
    config.save_pretrained(folder)
    return folder


def test_without_a_model_it_shows_the_machine() -> None:
    text = run()
    for phrase in (f"torch {torch.__version__}", f"transformers {tf.__version__}", "cpu:", "eager", "sdpa"):
        assert phrase in text
    found = json.loads(run("--json"))
    assert found["model"] is found["methods"] is None
    assert all(one["supported"] for one in found["versions"])


def test_a_version_that_is_too_old_is_told_and_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(machine, "version", lambda name: "1.0" if name == "transformers" else real(name))
    text = run(status=1)
    assert "transformers 1.0: softhooks needs" in text


def test_it_examines_a_model_of_full_size_without_its_weights(tmp_path: Path) -> None:
    """The directory has no weights, and the tiny copy has the class and the kinds of layers of the model."""
    folder = config_only(tmp_path, "llama", num_key_value_heads=8)
    found = json.loads(run(folder, "--json"))
    assert found["model"]["class"] == "LlamaForCausalLM"
    assert found["model"]["layers"] == 32
    assert found["model"]["parameters"] > 5e9
    assert found["model"]["examined"] == "a tiny copy"
    by_method = {one["method"]: one for one in found["methods"]}
    assert set(by_method) == set(METHODS)
    assert by_method["prompt_tuning"]["injection"] == "shared"
    assert by_method["prefix_tuning"]["injection"] == "attention"
    assert by_method["llama_adapter"]["injection"] == "branch"
    assert by_method["multitask_prompt_tuning"]["needs"] == "task_ids"
    text = shown(found)
    for phrase in ("prompt-tuning shared", "each call needs task_ids", "all but llama-adapter", "a tiny copy"):
        assert phrase in text


def test_refusals_are_those_of_attach(tmp_path: Path) -> None:
    folder = config_only(tmp_path, "mamba2")
    found = json.loads(run(folder, "--json"))
    by_method = {one["method"]: one for one in found["methods"]}
    with pytest.raises(softhooks.AttachError) as refused:
        softhooks.attach(models.build("mamba2", "causal"), softhooks.LlamaAdapter(4))
    first = str(refused.value).splitlines()[0]
    assert by_method["llama_adapter"]["error"].splitlines()[0] == first
    assert "llama-adapter refused: " in shown(found)


def test_every_method_is_tried() -> None:
    assert set(TRIALS) == set(METHODS)
    assert {kind: make().kind for kind, make in TRIALS.items()} == {kind: kind for kind in METHODS}


@pytest.mark.parametrize(
    "arch", ["gpt2", "roberta", "t5", "gemma3_text", "bamba", "qwen2_5_vl", "modernbert", "deberta-v2"]
)
def test_a_tiny_copy_has_the_class_and_runs(tmp_path: Path, arch: str) -> None:
    candidate = Candidate(str(config_only(tmp_path, arch)))
    model = candidate.tiny()
    assert type(model) is candidate.cls
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
    with softhooks.attach(model, softhooks.PromptTuning(4)) as prompt:
        assert prompt.summary().num_parameters > 0


def test_a_tiny_config_keeps_what_decides_how_prompts_enter() -> None:
    real = tf.Gemma3TextConfig(num_hidden_layers=26, tie_word_embeddings=False)
    small = tiny_like(real)
    assert set(small.layer_types) == set(real.layer_types)
    assert small.num_hidden_layers == len(small.layer_types) == 2
    assert (small.vocab_size, small.tie_word_embeddings) == (VOCABULARY, False)
    assert tiny_like(tf.MistralConfig(sliding_window=None)).sliding_window is None
    assert tiny_like(tf.LlamaConfig(hidden_act="gelu")).hidden_act == "gelu"
    grouped = tiny_like(tf.LlamaConfig(num_attention_heads=32, num_key_value_heads=8))
    alike = tiny_like(tf.LlamaConfig(num_attention_heads=32, num_key_value_heads=32))
    assert grouped.num_key_value_heads < grouped.num_attention_heads == alike.num_key_value_heads


def test_the_model_itself_is_examined_if_asked(tmp_path: Path) -> None:
    model = zoo.build("llama")
    model.save_pretrained(tmp_path)
    found = json.loads(run(tmp_path, "--weights", "--json"))
    assert found["model"]["examined"] == "the model itself"
    assert found["methods"] == json.loads(json.dumps(try_methods(model)))


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(tmp_path)
    vision = tmp_path / "vision"
    tf.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4).save_pretrained(vision)
    text = run(vision, status=1)  # no prompt can be attached to it
    assert "refused: " in text


def test_a_model_of_images(tmp_path: Path) -> None:
    tf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8).save_pretrained(
        tmp_path
    )
    text = run(tmp_path)
    assert re.search(r"prefix-tuning +attention", text)
    assert re.search(r"llama-adapter +branch", text)
    assert re.search(r"\bprompt-tuning +refused: ViTModel takes `pixel_values` instead of token ids", text)
