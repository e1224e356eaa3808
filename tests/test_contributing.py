"""The example method of CONTRIBUTING.md, built from its text, trains, saves, loads and has every property."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import markdown
import pytest
import test_properties
import torch
import training
import zoo
from markdown import ROOT
from table import Entry
from typer.testing import CliRunner

import softhooks
from softhooks import methods
from softhooks.cli import app, definitions, options
from softhooks.method import Method
from softhooks.prompt_encoder import PromptEncoder

PAGE = "CONTRIBUTING.md"
CASES = [zoo.Case("llama", "causal"), zoo.Case("bert", "sequence"), zoo.Case("t5", "seq2seq")]


def _code(number: int) -> str:
    """The page's Python blocks: the file of the method, its line in the list of methods, its line in the tests' table."""
    file, listed, in_table = (block.code for block in markdown.blocks(PAGE, "python"))
    return (file, listed, in_table)[number]


def _listing() -> str:
    """The module that lists the methods, with the example's line."""
    listing = (ROOT / "softhooks/methods/__init__.py").read_text(encoding="utf-8")
    assert listing.count("# isort: on") == 1
    return listing.replace("# isort: on", _code(1))


@pytest.fixture
def decomposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example method: its file is in the package's folder of methods, and its line in the list of methods."""
    (name,) = re.findall(r"`(\w+)\.py` in `softhooks/methods/`:", markdown.text_of(PAGE))
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / f"{name}.py").write_text(_code(0), encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
    before = set(methods.METHODS)
    exec(_listing(), {"__name__": methods.__name__})
    (added,) = methods.METHODS.keys() - before
    yield methods.METHODS[added]
    del methods.METHODS[added]
    sys.modules.pop(f"softhooks.methods.{name}")


@pytest.fixture
def entry(decomposed: Any) -> Entry:
    """Its line in the table of methods."""
    made: Entry = eval(_code(2), {"Entry": Entry, decomposed.__name__: decomposed})
    return made


def naive(model: Any, ids: torch.Tensor, prompt: Any) -> torch.Tensor:
    """The logits of the text behind the product of the two matrices, on the bare model."""
    rows = (prompt.encoder.a @ prompt.encoder.b).expand(len(ids), -1, -1)
    return model(inputs_embeds=torch.cat([rows, model.get_input_embeddings()(ids)], 1)).logits[:, rows.shape[1] :]


def test_it_equals_a_naive_computation_before_and_after_a_step(decomposed: Any) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, decomposed(5, rank=2)) as prompt:
        optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.1)
        for _ in range(2):
            with torch.no_grad(), softhooks.disabled(model):
                expected = naive(model, ids, prompt)
            torch.testing.assert_close(model(ids).logits, expected, rtol=2e-4, atol=5e-5)
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert prompt.num_parameters == 5 * 2 + 2 * model.config.hidden_size
        prompt.verify_frozen()


def test_it_is_saved_and_loaded_and_goes_on_training(decomposed: Any, tmp_path: Path) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, decomposed(5, rank=2)) as prompt, torch.no_grad():
        logits = model(ids).logits
        prompt.save_pretrained(tmp_path)
    with softhooks.load(model, tmp_path) as loaded, torch.no_grad():
        assert loaded.method == decomposed(5, rank=2)
        assert torch.equal(model(ids).logits, logits)
    with softhooks.load(model, tmp_path, trainable=True) as loaded:
        assert {name: list(p.shape) for name, p in loaded.encoder.named_parameters()} == {"a": [5, 2], "b": [2, 32]}
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-3, atol=1e-4)


def test_it_trains_in_a_trainer_and_resumes(decomposed: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer, _ = training.prompted(tmp_path, zoo.build("llama"), "causal", decomposed(5), **options)
    trainer.train()
    again, _ = training.prompted(tmp_path, zoo.build("llama"), "causal", decomposed(5), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert training.losses(again)[-2:] == training.losses(trainer)[-2:]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_property_runs_over_it(entry: Entry, case: zoo.Case) -> None:
    assert entry.name not in {other.name for other in test_properties.TABLE}
    test_properties.test_shapes_are_the_bare_models_and_detached_is_never_attached(entry, case)
    test_properties.test_gradients_reach_the_prompt_and_nothing_else(entry, case)
    test_properties.test_row_order_padding_side_and_amount_change_nothing(entry=entry, case=case)


def test_it_folds_and_decodes(entry: Entry) -> None:
    test_properties.test_folded_equals_live_bit_for_bit(entry=entry)
    test_properties.test_cached_decoding_equals_uncached(entry=entry)


def test_the_command_line_shows_its_options(decomposed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line reads the sources in the package; here it is given those with the method."""
    read, added = definitions._text, {methods.__name__: _listing(), decomposed.__module__: _code(0)}
    monkeypatch.setattr(
        definitions, "_text", lambda module: added[module].encode() if module in added else read(module)
    )
    caches = (definitions._names, options.methods, options.method_options)
    for cache in caches:
        cache.cache_clear()
    try:
        shown = CliRunner().invoke(app.app, ["run", "--method", decomposed.kind.replace("_", "-"), "--help"])
    finally:
        for cache in caches:
            cache.cache_clear()
    assert shown.exit_code == 0
    assert "--rank" in shown.output


def test_its_imports_exist_those_for_types_too() -> None:
    imports = [node for node in ast.walk(ast.parse(_code(0))) if isinstance(node, ast.ImportFrom)]
    assert all(hasattr(importlib.import_module(str(node.module)), name.name) for node in imports for name in node.names)


def test_what_a_method_can_override_exists() -> None:
    classes = {"Method": Method, "PromptEncoder": PromptEncoder}
    named = re.findall(r"`(Method|PromptEncoder)\.(\w+)`", markdown.text_of(PAGE))
    assert len(named) >= 10
    assert all(hasattr(classes[owner], name) for owner, name in named)


def test_the_table_of_layers_is_the_contract_that_the_linter_checks() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    depth = {name: number for number, layer in enumerate(layers) for name in layer.split(" | ")}
    rows = re.findall(r"^\| (`.+?) \| ", markdown.text_of(PAGE), re.MULTILINE)
    named = [name.removeprefix("softhooks/").strip("/") for row in rows for name in re.findall(r"`([\w/]+)`", row)]
    named = [name for name in named if name in depth]
    assert set(named) == set(depth) - {"__main__", "_version"}
    assert [depth[name] for name in named] == sorted(depth[name] for name in named)
