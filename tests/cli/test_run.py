"""`softhooks run`: an unmodified Trainer script trains a prompt; every option is parsed, checked and explained."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args

import pytest
import torch
import transformers as tf
from launch import SCRIPTS, launch
from transformers.trainer import DEFAULT_CALLBACKS
from typer.testing import CliRunner
from untouched import remove_all

import softhooks
from softhooks import OptionError, PrefixTuning, PromptTuning, SoftPromptCallback, TrainerError
from softhooks.cli import app, option_types, run_parser
from softhooks.cli.option_types import OnlyInPython, alternatives
from softhooks.cli.options import Option, callback_options, method_options, methods
from softhooks.cli.run import run as run_line
from softhooks.cli.run_arguments import resolve_line
from softhooks.cli.run_help import help_text
from softhooks.method import Method
from softhooks.methods import METHODS

sys.path.insert(0, str(SCRIPTS))
import plain

SCRIPT = SCRIPTS / "plain.py"
QUIET = ["--report_to", "none", "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", "--max_steps", "3"]
QUIET += ["--learning_rate", "0.02", "--per_device_train_batch_size", "4"]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def run(arguments: list[str]) -> None:
    line = run_parser.read(arguments)
    run_line(line, *resolve_line(line))


def _asked(*arguments: str) -> tuple[Method, dict[str, Any]]:
    return resolve_line(run_parser.read([*arguments, str(SCRIPT)]))


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "soft_prompt.safetensors")


# --- the script -------------------------------------------------------------------------------------------------------


def test_an_unmodified_script_trains_what_the_callback_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sys.argv, list(sys.path), list(DEFAULT_CALLBACKS), tf.Trainer.__init__, sys.modules["__main__"]
    run(["--num-virtual-tokens", "5", "--init", "random", str(SCRIPT), "--output_dir", str(tmp_path), *QUIET])
    assert (sys.argv, sys.path, DEFAULT_CALLBACKS, tf.Trainer.__init__, sys.modules["__main__"]) == before
    written = {file.name for file in (tmp_path / "saved").iterdir()}
    assert written == {"soft_prompt.json", "soft_prompt.safetensors", "training_args.bin"}
    said = "".join(capsys.readouterr())
    assert "trains PromptTuning(num_virtual_tokens=5, init='random'" in said
    assert "160 parameters trained; nothing else changed (frozen: 23 tensors" in said

    args = tf.HfArgumentParser(tf.TrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path / "by hand"), *QUIET]
    )[0]
    callback = SoftPromptCallback(PromptTuning(5, init="random"))
    trainer = tf.Trainer(model=plain.build(), args=args, train_dataset=plain.rows(8), callbacks=[callback])
    trainer.train()
    trainer.save_model(str(tmp_path / "by hand"))
    one, other = _saved(tmp_path / "saved"), _saved(tmp_path / "by hand")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_each_of_several_trainers_gets_a_prompt(tmp_path: Path) -> None:
    run(["--method", "prefix-tuning", str(SCRIPT), "--trainers", "2", "--output_dir", str(tmp_path), *QUIET])
    first, second = _saved(tmp_path / "saved"), _saved(tmp_path / "saved1")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert next(iter(first.values())).shape[0] == 20


def test_everything_is_put_back_after_a_script_that_fails(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys\nassert sys.argv[1:] == ['--x']\nassert __name__ == '__main__'\nraise KeyError('x')\n"
    )
    before = sys.argv, list(sys.path), list(DEFAULT_CALLBACKS), tf.Trainer.__init__
    with pytest.raises(KeyError):
        run([str(script), "--x"])
    assert (sys.argv, sys.path, DEFAULT_CALLBACKS, tf.Trainer.__init__) == before


@pytest.mark.parametrize("ending", ["", "import sys; sys.exit(0)", "raise SystemExit"])
def test_a_script_without_a_trainer_is_told_so(tmp_path: Path, ending: str) -> None:
    script = tmp_path / "loop.py"
    script.write_text(f"print('done')\n{ending}\n")
    with pytest.raises(TrainerError, match="ended without creating a transformers Trainer") as told:
        run([str(script)])
    assert "softhooks.attach" in str(told.value)


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["--rows", "many"], 2)])
def test_a_scripts_own_help_and_failures_stay_its_own(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run([str(SCRIPT), *arguments])
    assert left.value.code == code
    assert "--rows" in "".join(capsys.readouterr())


def test_a_script_with_a_callback_of_its_own_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    text = SCRIPT.read_text().replace(
        "train_dataset=rows(own.rows)",
        "train_dataset=rows(own.rows), callbacks=[softhooks.SoftPromptCallback(softhooks.PromptTuning(3))]",
    )
    script.write_text(text.replace("import torch\n", "import softhooks\nimport torch\n"))
    with pytest.raises(TrainerError, match="one prompt") as refused:
        run(["--method", "prefix_tuning", str(script), "--output_dir", str(tmp_path), *QUIET])
    assert "PrefixTuning(num_virtual_tokens=20" in str(refused.value)
    assert "PromptTuning(num_virtual_tokens=3" in str(refused.value)
    assert "adds its own SoftPromptCallback: run it with `python`" in str(refused.value)


def test_a_script_imports_from_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "softhooks_beside.py").write_text("VALUE = 3\n")
    script = tmp_path / "imports.py"
    script.write_text("from softhooks_beside import VALUE\nraise KeyError(VALUE)\n")
    with pytest.raises(KeyError, match="3"):
        run([str(script)])


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_run_it_in_two_processes(tmp_path: Path, launcher: str) -> None:
    config = tmp_path / "prompt.yaml"
    config.write_text("method: prompt-tuning\noptions:\n  num_virtual_tokens: 5\n  init: random\n")
    rest = ["run", "--config", str(config), str(SCRIPT), "--output_dir", str(tmp_path), *QUIET]
    module = "softhooks" if launcher == "torchrun" else "softhooks.cli.app"
    rest[rest.index("--per_device_train_batch_size") + 1] = "2"
    status, output = launch("-m", module, *rest, accelerate=launcher == "accelerate")
    assert status == 0, output[-4000:]
    assert output.count("160 parameters trained") == 1

    run(["--config", str(config), str(SCRIPT), "--output_dir", str(tmp_path / "one"), *QUIET])
    together, alone = _saved(tmp_path / "saved"), _saved(tmp_path / "one" / "saved")
    assert all(torch.allclose(together[name], alone[name], atol=2e-5) for name in alone)


# --- options ----------------------------------------------------------------------------------------------------------

ALL = [(kind, name) for kind in METHODS for name in method_options(kind)]


def _sample(option: Option) -> tuple[str, Any]:
    """A text for an option, and the value that it parses to."""
    kinds = alternatives(option.hint)
    for kind, pair in ((int, ("3", 3)), (float, ("0.25", 0.25)), (str, ("a text", "a text")), (Any, ("gpt2", "gpt2"))):
        if kind in kinds:
            return pair
    if hasattr(kinds[0], "__args__") and getattr(kinds[0], "__origin__", None) is Literal:
        return get_args(kinds[0])[-1], get_args(kinds[0])[-1]
    if option.takes.startswith("a list (a whole number each)"):
        return "[4, 5]", (4, 5)
    if option.takes.startswith("a list"):
        return '["x", "y"]', ("x", "y")
    return "", None


@pytest.mark.parametrize(("kind", "name"), ALL, ids=[f"{kind}-{name}" for kind, name in ALL])
def test_every_option_of_every_method_is_reached_or_refused_by_name(kind: str, name: str) -> None:
    option = method_options(kind)[name]
    assert option.about, "an option needs a line in the docstring's Args"
    assert option.flag in help_text(kind)
    if not option.takes:
        with pytest.raises(OptionError, match=f"{option.flag} needs an object that only Python code can create"):
            option.read("x")
        return
    if option.is_switch:
        assert option.read("yes") is True
        assert option.read(False) is False
        return
    text, value = _sample(option)
    if value is not None:
        assert option.read(text) == value


@pytest.mark.parametrize("hint", [Union[str, Path, None], Union[Path, str, None]])  # noqa: UP007
def test_text_is_read_as_text_whatever_the_order_of_a_union_with_a_path(hint: Any) -> None:
    """`typing` gives equal unions one order in a process: that of the first one."""
    assert option_types.convert("a text", hint) == "a text"
    assert option_types.describe(hint) == "text or a path"


def test_no_option_stands_for_two_things() -> None:
    own = {*callback_options(), "method", "config", "help"}
    assert {"name", "train_head", "trainable", "freeze_dropout", "injection", "check_frozen"} <= own
    for kind in METHODS:
        assert not own & set(method_options(kind))


def test_a_command_line_is_read() -> None:
    arguments = [
        "--method=PrefixTuning", "--num-virtual-tokens", "7", "--projection", "--no-windowed", "--dropout=0.5",
        "--init-ids", "4", "--init-ids", "5", "--name", "mine", "--no-train-head", "--trainable", "*norm*",
    ]  # fmt: skip
    method, callback = _asked(*arguments)
    assert method == PrefixTuning(7, projection=True, windowed=False, dropout=0.5, init_ids=(4, 5))
    assert callback == {"name": "mine", "train_head": False, "trainable": ("*norm*",)}
    assert run_parser.read([*arguments, str(SCRIPT)]).program == [str(SCRIPT)]


def test_everything_behind_the_script_is_the_scripts() -> None:
    line = run_parser.read(["--num-virtual-tokens", "3", str(SCRIPT), "--method", "x", "--num-virtual-tokens=4", "--"])
    assert line.program == [str(SCRIPT), "--method", "x", "--num-virtual-tokens=4", "--"]
    assert resolve_line(line) == (PromptTuning(3), {})


def test_a_tokenizer_is_a_name_and_a_text_may_look_like_a_number() -> None:
    method, _ = _asked("--init", "text", "--init-text", "12", "--tokenizer", "gpt2")
    assert isinstance(method, PromptTuning)
    assert (method.init_text, method.tokenizer, method.num_virtual_tokens) == ("12", "gpt2", 20)


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_file_is_read_and_the_command_line_wins(tmp_path: Path, form: str) -> None:
    held = {
        "method": "prompt-tuning",
        "options": {"num-virtual-tokens": 9, "init": "class_labels", "init_labels": ["good"], "tokenizer": "gpt2"},
        "callback": {"trainable": ["*norm*"], "name": "file"},
    }
    file = tmp_path / f"prompt.{form}"
    file.write_text(json.dumps(held, indent=1))
    method, callback = _asked("--config", str(file), "--name", "line", "--num-virtual-tokens=4")
    assert method == PromptTuning(4, init="class_labels", init_labels=("good",), tokenizer="gpt2")
    assert callback == {"trainable": ("*norm*",), "name": "line"}


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["--num-virtual-token", "3"], ["--num-virtual-token", "Did you mean --num-virtual-tokens"]),
        (["--wholly-unknown", "3"], ["--wholly-unknown", "after the script"]),
        (["-x"], ["-x is not an option"]),
        (["--method", "promt-tuning"], ["'promt-tuning'", "Did you mean prompt-tuning", "prefix-tuning"]),
        (["--method", "quantum"], ["'quantum'", "prompt-tuning"]),
        (["--projection"], ["projection", "is not an option of prompt_tuning", "belongs to: prefix_tuning"]),
        (["--num-virtual-tokens", "many"], ["--num-virtual-tokens", "a whole number", "'many'"]),
        (["--num-virtual-tokens", "2.5"], ["a whole number", "'2.5'"]),
        (["--method", "prefix-tuning", "--dropout", "lots"], ["--dropout", "a number", "'lots'"]),
        (["--method", "prefix-tuning", "--init-ids", "4", "--init-ids", "x"], ["a list (a whole number each)"]),
        (["--method", "prefix-tuning", "--projection=perhaps"], ["takes no value", "--no-projection", "'perhaps'"]),
        (["--placement", "middle"], ["'front', 'after_first', 'end'", "'middle'"]),
        (["--init-tensor", "x.pt"], ["only Python", "Tensor", "softhooks.attach"]),
        (["--injection", "magic"], ["--injection", "'slots'", "'magic'"]),
        (["--init", "text"], ["init_text"]),
    ],
)
def test_a_wrong_command_line_says_the_rule_both_values_and_the_remedy(
    arguments: list[str], phrases: list[str]
) -> None:
    with pytest.raises(OptionError) as refused:
        _asked(*arguments)
    for phrase in phrases:
        assert phrase in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ([], r"called without a script or `-m MODULE`"),
        (["no-such.py"], "not a script: there is no such file"),
        (["--init"], "--init is given without a value"),
    ],
)
def test_a_command_line_without_a_script_is_refused(arguments: list[str], phrase: str) -> None:
    with pytest.raises(OptionError, match=phrase):
        resolve_line(run_parser.read(arguments))


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("methods: x", ["methods: 'x'", "Did you mean method:"]),
        ("options: 3", ["options: 3", "by name"]),
        ("- a\n- b", ["['a', 'b']", "method: prompt_tuning"]),
        ("method: [a", ["YAML or JSON", "cause"]),
        ("method: 3", ["method: 3"]),
        ("options: {num_virtual_tokens: '3 of them'}", ["a whole number", "'3 of them'"]),
        ("options: {num_virtual_tokens: true}", ["a whole number", "True"]),
        ("options: {init: [a, b]}", ["must be one of 'vocab'", "['a', 'b']"]),
        ("options: {initt: zero}", ["initt", "Did you mean --init"]),
        ("options: {name: x}", ["name is not an option of the method"]),
        (
            "callback: {num_virtual_tokens: 3}",
            ["is not an option of the callback", "belongs to: prompt_tuning"],
        ),
        ("", ["None"]),
    ],
)
def test_a_wrong_file_says_the_rule_both_values_and_the_remedy(tmp_path: Path, text: str, phrases: list[str]) -> None:
    file = tmp_path / "prompt.yaml"
    file.write_text(text)
    with pytest.raises(OptionError) as refused:
        _asked("--config", str(file))
    for phrase in phrases:
        assert phrase in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no-such\.yaml"):
        _asked("--config", str(tmp_path / "no-such.yaml"))


# --- modules ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a module and a `__main__` that train as the script does, and one without a `__main__`."""
    for name in ("trained", "mute", "broken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("import nowhere_at_all\n" if name == "broken" else "")
    text = SCRIPT.read_text()
    said = "\nimport sys; print('ran', sys.argv[0], sys.path[0], __name__, __package__)\n"
    for name in ("__main__", "train"):
        (tmp_path / "trained" / f"{name}.py").write_text(text + said)
    (tmp_path / "trained" / "five.py").write_text("import sys; print(sys.argv[1:]); sys.exit(5)\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("trained", "mute", "broken")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("given", "file"),
    [(["-m", "trained"], "__main__.py"), (["-m", "trained.train"], "train.py"), (["-mtrained.train"], "train.py")],
)
def test_a_module_trains_as_a_script_does(
    given: list[str], file: str, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the `sys.argv`, `sys.path` and names that `python -m` gives it."""
    before = sys.argv, list(sys.path), list(DEFAULT_CALLBACKS), tf.Trainer.__init__, sys.modules["__main__"]
    run(["--num-virtual-tokens", "5", *given, "--output_dir", str(packages / "out"), *QUIET])
    assert (sys.argv, sys.path, DEFAULT_CALLBACKS, tf.Trainer.__init__, sys.modules["__main__"]) == before
    assert next(iter(_saved(packages / "out" / "saved").values())).shape[0] == 5
    assert f"ran {packages / 'trained' / file} {packages} __main__ trained" in capsys.readouterr().out


def test_what_stands_behind_a_module_or_a_script_is_its_own(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Script options that softhooks has too, and `--`, are passed on as by Python."""
    own = ["--num-virtual-tokens", "x", "--", "-m", "y"]
    for given in (["-m", "trained.five"], [str(packages / "trained" / "five.py")], ["--", "trained/five.py"]):
        with pytest.raises(SystemExit) as left:
            run([*given, *own])
        assert left.value.code == 5
        assert capsys.readouterr().out == f"{own}\n"


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("nowhere_at_all", "no such module"),
        ("nowhere_at_all.train", "no such module"),
        ("trained.nothing", "no such module"),
        ("trained/train.py", "no such module"),
        ("..", "no such module"),
        ("mute", "it is a package without `__main__`"),
    ],
)
def test_a_module_that_cannot_be_run_is_named(module: str, found: str, packages: Path) -> None:
    with pytest.raises(OptionError, match=rf"cannot run '{re.escape(module)}': {found}\."):
        run(["-m", module])


def test_a_package_that_misses_something_itself_says_what(packages: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        run(["-m", "broken.train"])


# --- exit status ------------------------------------------------------------------------------------------------------


def _status(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["softhooks", *arguments])
    with pytest.raises(SystemExit) as left:
        app.main()
    return int(left.value.code or 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--num-virtual-token", "3", "x.py"],
        ["--num-virtual-tokens", "0", str(SCRIPT)],
        ["--method", "nope", str(SCRIPT)],
        ["--config", "nope.yaml", str(SCRIPT)],
        ["--init", "nope", str(SCRIPT)],
        [],
        ["--", "nope.py"],
        ["nope.py"],
        ["."],
        ["-m"],
        ["-m", "nowhere_at_all"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_one_message_and_exit_status_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _status(monkeypatch, "run", *arguments) == 2
    assert capsys.readouterr().err.startswith("OptionError: ")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("print('no Trainer')", 1),
        ("import softhooks; softhooks.PromptTuning(0)", 1),
        ("import sys; sys.exit(7)", 7),
        ("import sys; sys.exit(2)", 2),
    ],
)
def test_a_failure_and_a_scripts_own_status_pass_through(
    text: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text(text)
    assert _status(monkeypatch, "run", str(tmp_path / "script.py")) == status


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["nonsense"], 2),
        (["convert"], 2),
        (["convert", "nope", "out"], 2),
        (["convert", ".", "out"], 2),
        (["inspect"], 2),
        (["inspect", "nope"], 2),
        (["export", "nope", "--to", "sglang", "--model", "nope", "--output", "out"], 1),
        (["export", "nope", "more/nope", "--to", "vllm", "--model", "nope", "--output", "out"], 2),
        (["export", "nope", "--to", "vllm", "--model", "nope", "--output", "out"], 1),
        (["export", "nope", "--to", "nope", "--model", "nope", "--output", "out", "--text", "x"], 2),
        (["export", "nope", "--to", "vllm", "--model", "nope", "--output", "out", "--text", "x"], 1),
        (["demo", "--seed", "x"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_every_command_has_the_same_exit_statuses(
    arguments: list[str],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _status(monkeypatch, *arguments) == status
    assert "Traceback" not in capsys.readouterr().err


def test_a_conversion_that_overwrites_is_a_wrong_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zoo

    softhooks.attach(zoo.build("llama"), PromptTuning(2)).save_pretrained(tmp_path / "prompt")
    assert _status(monkeypatch, "convert", str(tmp_path / "prompt"), str(tmp_path)) == 2
    assert _status(monkeypatch, "convert", str(tmp_path / "prompt"), str(tmp_path / "out"), "--to", "softhooks") == 2
    assert _status(monkeypatch, "convert", str(tmp_path / "prompt"), str(tmp_path / "out")) == 0
    (tmp_path / "prompt" / "soft_prompt.safetensors").write_bytes(b"cut off")
    assert _status(monkeypatch, "convert", str(tmp_path / "prompt"), str(tmp_path / "again")) == 1
    assert _status(monkeypatch, "inspect", str(tmp_path / "prompt")) == 1


def test_the_server_without_a_prompt_is_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from softhooks.integrations import transformers_serve

    with pytest.raises(SystemExit) as left:
        transformers_serve.main(["model"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("OptionError: `--prompt DIR` or `--store FOLDER` is missing")


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_teaches_what_it_does_with_examples_and_every_method_and_option() -> None:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app.app, ["run", "--help"])
    assert result.exit_code == 0
    for phrase in (
        "unmodified Trainer script",
        "learning rate",
        "torchrun",
        "accelerate launch",
        "softhooks.load",
        "yaml",
    ):
        assert phrase in result.output
    assert result.output.count("softhooks run --") + result.output.count("softhooks run train") >= 3
    for kind in METHODS:
        assert f"{kind.replace('_', '-')}: " in result.output
        for option in method_options(kind).values():
            assert not option.takes or option.flag in result.output
    for option in callback_options().values():
        assert option.flag in result.output


def test_the_options_that_the_source_names_are_those_of_the_classes() -> None:
    """In order, with types and defaults, including inherited ones."""
    assert list(methods()) == list(METHODS)
    for kind, method in METHODS.items():
        fields = {field.name: field for field in dataclasses.fields(method)}
        assert list(method_options(kind)) == list(fields)
        for name, option in method_options(kind).items():
            has_default = fields[name].default is not dataclasses.MISSING
            assert (option.default is not None) == has_default
            if has_default:
                value = fields[name].default
                assert option.default == value or eval(str(option.default)) == value
    arguments = inspect.signature(SoftPromptCallback.__init__).parameters
    given = [name for name, item in arguments.items() if item.kind is item.KEYWORD_ONLY]
    assert list(callback_options()) == [name for name in given if name != "model"]


@pytest.mark.parametrize(
    ("annotation", "hint"),
    [
        ("int | None", int | None),
        ("Sequence[str] | None", Sequence[str] | None),
        ("Placement", Literal["front", "after_first", "end"]),
        ("str | Path | SoftPrompt", str | Path | OnlyInPython),
        ("list[nn.Module]", list[OnlyInPython]),
        ("dict[str, int]", Mapping),
    ],
)
def test_annotations_are_read_through_aliases_and_imports(annotation: str, hint: Any) -> None:
    [statement] = ast.parse(f"x: {annotation}").body
    assert isinstance(statement, ast.AnnAssign)
    assert option_types.read_annotation(statement.annotation, "softhooks.methods.prompt_tuning") == hint


def test_help_on_a_method_that_a_file_names(tmp_path: Path) -> None:
    (tmp_path / "prompt.yaml").write_text("method: PrefixTuning\n")
    result = CliRunner().invoke(app.app, ["run", "--config", str(tmp_path / "prompt.yaml"), "--help"])
    assert "--windowed, --no-windowed" in result.output


@pytest.mark.parametrize("value", ["yes", "true", "True", "1"])
def test_a_switch_takes_a_value_that_is_glued_to_it(value: str) -> None:
    assert run_parser.read([f"--projection={value}", "x.py"]).options == {"projection": True}
    assert run_parser.read(["--shift_positions=no", "--no_windowed", "--no-distill", "x.py"]).options == {
        "shift_positions": False,
        "windowed": False,
        "distill": False,
    }


def test_words_after_the_script_are_never_ours() -> None:
    line = run_parser.read(["--init", "text", "x.py", "--", "-m", "--init", "--projection=perhaps", "-h"])
    assert line.program == ["x.py", "--", "-m", "--init", "--projection=perhaps", "-h"]
    assert (line.is_module, line.help, line.options) == (False, False, {"init": ["text"]})


def test_help_on_a_method_says_what_its_options_mean() -> None:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app.app, ["run", "--method", "prefix-tuning", "--help"])
    assert result.exit_code == 0
    assert result.output.split() == help_text("prefix_tuning").split()
    text = " ".join(help_text("prefix_tuning").split())
    for phrase in ("--projection, --no-projection", "only the prefix is saved", "[512]", "[20]"):
        assert phrase in text
    assert "--placement" not in text


def test_the_root_lists_run() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app.app, [])
    assert "softhooks run script.py ARGS" in result.output


def test_the_package_runs_as_the_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", ["softhooks", "--version"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("softhooks", run_name="__main__")
    assert left.value.code == 0
    assert softhooks.__version__
