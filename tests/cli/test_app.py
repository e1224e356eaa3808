"""The command line: help, and expected errors without a traceback."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence

import pytest
from typer.testing import CliRunner

from softhooks.cli import app
from softhooks.demo.options import DemoOptions
from softhooks.errors import SoftHooksError

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_without_a_command_it_lists_the_commands() -> None:
    result = runner.invoke(app.app, [])
    assert "demo" in result.output


def test_version() -> None:
    result = runner.invoke(app.app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"softhooks {importlib.metadata.version('softhooks')}"


def test_demo_help_teaches_the_task_the_options_and_where_the_script_is() -> None:
    result = runner.invoke(app.app, ["demo", "--help"])
    assert result.exit_code == 0
    for phrase in ("docstring", "softhooks/demo/train.py", "frozen", "MiniLM", "Examples", "minutes"):
        assert phrase in result.output
    for option in DemoOptions.__dataclass_fields__:
        if option != "test_fraction":
            assert f"--{option.replace('_', '-')}" in result.output


def test_demo_passes_every_option_on(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    seen: list[DemoOptions] = []
    monkeypatch.setattr("softhooks.demo.run.run_demo", seen.append)
    given = ["--model", "some/model", "--output", str(tmp_path), "--seed", "7", "--num-virtual-tokens", "3"]
    given += ["--head-epochs", "1", "--prompt-epochs", "2", "--prefix-epochs", "3", "--head-learning-rate", "0.1"]
    given += ["--prompt-learning-rate", "0.2", "--prefix-learning-rate", "0.3", "--batch-size", "5"]
    result = runner.invoke(app.app, ["demo", *given, "--max-length", "6", "--quick"])
    assert result.exit_code == 0, result.output
    [options] = seen
    assert (options.model, str(options.output), options.seed) == ("some/model", str(tmp_path), 7)
    assert (options.head_epochs, options.prompt_epochs, options.prefix_epochs) == (1, 2, 3)
    assert (options.head_learning_rate, options.prompt_learning_rate, options.prefix_learning_rate) == (0.1, 0.2, 0.3)
    assert (options.num_virtual_tokens, options.batch_size, options.max_length, options.quick) == (3, 5, 6, True)


def test_demo_defaults_are_the_options_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DemoOptions] = []
    monkeypatch.setattr("softhooks.demo.run.run_demo", seen.append)
    assert runner.invoke(app.app, ["demo"]).exit_code == 0
    assert seen == [DemoOptions()]


@pytest.mark.parametrize("arguments", [["--num-virtual-tokens", "0"], ["--batch-size", "-1"], ["--seed", "x"]])
def test_demo_refuses_an_option_that_makes_no_sense(arguments: Sequence[str]) -> None:
    result = runner.invoke(app.app, ["demo", *arguments])
    assert result.exit_code == 2
    assert arguments[0] in result.output


def test_an_expected_error_is_one_message_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: DemoOptions) -> None:
        raise SoftHooksError("a rule was broken [here].\nRemedy: do this.")

    monkeypatch.setattr("softhooks.demo.run.run_demo", fail)
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
