"""The command line: help, and expected errors without a traceback."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from softhooks.cli import app
from softhooks.demo.options import EncoderOptions, LanguageModelOptions
from softhooks.errors import SoftHooksError

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_without_a_command_it_lists_the_commands() -> None:
    result = runner.invoke(app.app, [])
    assert "demo" in result.output


def test_version() -> None:
    result = runner.invoke(app.app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"softhooks {importlib.metadata.version('softhooks')}"


def test_demo_help_teaches_the_tasks_the_options_and_where_the_scripts_are() -> None:
    result = runner.invoke(app.app, ["demo", "--help"])
    assert result.exit_code == 0
    scripts = ("softhooks/demo/language_model/train.py", "softhooks/demo/encoder/train.py")
    for phrase in ("docstring", *scripts, "frozen", "MiniLM", "SmolLM2-135M-Instruct", "Examples", "minutes"):
        assert phrase in result.output
    for option in EncoderOptions.__dataclass_fields__ | LanguageModelOptions.__dataclass_fields__:
        if option != "test_fraction":
            assert f"--{option.replace('_', '-')}" in result.output


def test_demo_help_gives_the_default_of_each_task() -> None:
    output = " ".join(runner.invoke(app.app, ["demo", "--help"]).output.split())
    assert "[default: 20, or 16 for --task encoder]" in output
    assert "[default: 6; only for --task encoder]" in output
    assert "[default: 32]" in output


SHARED = ("--model", "some/model", "--seed", "7", "--num-virtual-tokens", "3", "--prompt-learning-rate", "0.2")
SHARED += ("--prefix-learning-rate", "0.3", "--batch-size", "5", "--max-length", "6", "--quick")


def test_demo_passes_every_option_of_an_encoder_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[EncoderOptions] = []
    monkeypatch.setattr("softhooks.demo.encoder.run.run_demo", seen.append)
    given = ["--head-epochs", "1", "--prompt-epochs", "2", "--prefix-epochs", "3", "--head-learning-rate", "0.1"]
    line = ["demo", "--task", "encoder", *SHARED, *given, "--output", str(tmp_path)]
    result = runner.invoke(app.app, line)
    assert result.exit_code == 0, result.output
    assert seen == [EncoderOptions(tmp_path, "some/model", 7, 3, 1, 2, 3, 0.1, 0.2, 0.3, 5, 6, quick=True)]


def test_demo_passes_every_option_of_a_language_model_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[LanguageModelOptions] = []
    monkeypatch.setattr("softhooks.demo.language_model.run.run_demo", seen.append)
    result = runner.invoke(app.app, ["demo", *SHARED, "--steps", "9", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert seen == [LanguageModelOptions(tmp_path, "some/model", 7, 3, 9, 0.2, 0.3, 5, 6, quick=True)]


def test_demo_defaults_are_the_options_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr("softhooks.demo.encoder.run.run_demo", seen.append)
    monkeypatch.setattr("softhooks.demo.language_model.run.run_demo", seen.append)
    assert runner.invoke(app.app, ["demo"]).exit_code == 0
    assert runner.invoke(app.app, ["demo", "--task", "encoder"]).exit_code == 0
    assert seen == [LanguageModelOptions(), EncoderOptions()]


@pytest.mark.parametrize(
    ("task", "missing"), [("language-model", "datasets, evaluate, matplotlib"), ("encoder", "sklearn")]
)
def test_demo_without_its_packages_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, task: str, missing: str
) -> None:
    monkeypatch.setattr("softhooks.cli.demo.importlib.util.find_spec", lambda name: None)
    result = runner.invoke(app.app, ["demo", "--task", task])
    assert isinstance(result.exception, SoftHooksError)
    assert f"missing: {missing}" in str(result.exception)
    assert 'pip install "softhooks[demo]"' in str(result.exception)


@pytest.mark.parametrize(
    ("task", "option"),
    [("language-model", "--head-epochs"), ("language-model", "--prefix-epochs"), ("encoder", "--steps")],
)
def test_demo_refuses_an_option_of_the_other_task(task: str, option: str) -> None:
    result = runner.invoke(app.app, ["demo", "--task", task, option, "3"])
    assert result.exit_code == 2
    assert f"{option} is not an option of --task {task}" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("arguments", [["--num-virtual-tokens", "0"], ["--batch-size", "-1"], ["--seed", "x"]])
def test_demo_refuses_an_option_that_makes_no_sense(arguments: Sequence[str]) -> None:
    result = runner.invoke(app.app, ["demo", *arguments])
    assert result.exit_code == 2
    assert arguments[0] in result.output


def test_an_expected_error_is_one_message_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: LanguageModelOptions) -> None:
        raise SoftHooksError("a rule was broken [here].\nRemedy: do this.")

    monkeypatch.setattr("softhooks.demo.language_model.run.run_demo", fail)
    monkeypatch.setattr(sys, "argv", ["softhooks", "demo"])
    with pytest.raises(SystemExit) as leaving:
        app.main()
    assert leaving.value.code == 1
    assert capsys.readouterr().err == "SoftHooksError: a rule was broken [here].\nRemedy: do this.\n"


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "softhooks.cli.app", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("softhooks ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("softhooks comp", ["compare"]),
        ("softhooks train --method pre", ["prefix-tuning"]),
        ("softhooks train --task cl", ["classification"]),
        ("softhooks inspect --ht", ["--html"]),
    ],
)
def test_the_shell_completes_commands_options_and_methods(words: str, expected: list[str]) -> None:
    place = len(words.split()) - 1
    variables = {"_SOFTHOOKS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
    result = runner.invoke(app.app, prog_name="softhooks", env=variables)
    assert result.output.split() == expected
