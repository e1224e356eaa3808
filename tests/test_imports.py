"""What each import loads: the package and its help load little, and a prompt needs no Trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.trainer import TRAINER_STATE_NAME

import softhooks
from softhooks.trainer import incomplete_checkpoints

NOBODY = (
    "transformers.trainer",
    "datasets",
    "matplotlib",
    "sklearn",
    "pandas",
    "pyarrow",
    "trl",
    "lightning",
    "tensorflow",
)
"""Modules that no import of softhooks may load."""

OF_THE_TRAINER = (*NOBODY, "transformers.training_args", "transformers.trainer_utils", "peft", "bitsandbytes")
"""Modules that a prompt in a plain training loop may not load either."""

ATTACHED = """
from transformers import LlamaConfig, LlamaForCausalLM
sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes))
with softhooks.attach(model, softhooks.PrefixTuning(2)) as prompt:
    prompt.save_pretrained("prompt")
softhooks.load(model, "prompt")
softhooks.Layout, softhooks.Verbalizer, softhooks.tune, softhooks.most_similar
"""

CALLBACK = """
import transformers
assert issubclass(softhooks.SoftPromptCallback, transformers.TrainerCallback)
softhooks.SoftPromptCallback(softhooks.PromptTuning(2))
from softhooks import *
"""


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("", ("torch", "transformers", "numpy", "safetensors", *OF_THE_TRAINER)),
        (ATTACHED, OF_THE_TRAINER),
        (CALLBACK, NOBODY),
        ("softhooks.PromptTuning(2)", ("transformers", "torch._dynamo", *OF_THE_TRAINER)),
        ("import softhooks.cli.app", ("torch", "transformers", "numpy", *OF_THE_TRAINER)),
    ],
    ids=["import", "attach", "callback", "method", "command line"],
)
def test_what_is_not_imported(code: str, absent: tuple[str, ...], tmp_path: object) -> None:
    told = python(
        f"import sys, softhooks\n{code}\nprint([name for name in {absent!r} if name in sys.modules])", tmp_path
    )
    assert told.splitlines()[-1] == "[]"


def test_help_does_without_torch(tmp_path: object) -> None:
    code = (
        "import sys\nfrom softhooks.cli.app import main\n"
        "others = [[name] for name in ('demo', 'train', 'convert', 'export', 'inspect', 'compare', 'doctor', 'store', 'run')]\n"
        "for command in ([], *others, ['run', '--method', 'p-tuning']):\n"
        "    sys.argv = ['softhooks', *command, '--help']\n"
        "    try: main()\n    except SystemExit as left: assert not left.code\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    assert python(code, tmp_path).splitlines()[-1] == "[]"


@pytest.mark.parametrize("as_peft", [False, True], ids=["softhooks", "peft"])
def test_inspect_does_without_transformers(as_peft: bool, tmp_path: Path) -> None:
    import zoo

    with softhooks.attach(zoo.build("llama"), softhooks.PrefixTuning(2)) as prompt:
        prompt.save_pretrained(tmp_path / "prompt", as_peft=as_peft)
    code = (
        "import sys\nfrom softhooks.cli.app import main\nsys.argv = ['softhooks', 'inspect', 'prompt']\n"
        "try: main()\nexcept SystemExit as left: assert not left.code\n"
        "print([name for name in ('transformers', 'torch._dynamo', 'accelerate') if name in sys.modules])"
    )
    assert python(code, tmp_path).splitlines()[-1] == "[]"


def python(code: str, folder: object) -> str:
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, cwd=str(folder),
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    return told.stdout


def test_every_name_is_there_and_a_module_never_hides_a_function(tmp_path: object) -> None:
    """`softhooks.attach` and `softhooks.load` are functions, also after the modules of these names are imported."""
    assert sorted(softhooks.__all__) == sorted(softhooks._MODULE_OF)
    assert set(softhooks.__all__) <= set(dir(softhooks))
    for name in softhooks.__all__:
        assert callable(getattr(softhooks, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'attatch'"):
        softhooks.attatch  # noqa: B018
    order = "import softhooks.attach, softhooks.load\nfrom softhooks.attach import attach_prompt\nimport softhooks"
    told = python(f"{order}\nprint(callable(softhooks.attach), callable(softhooks.load))", tmp_path)
    assert told.split() == ["True", "True"]
    assert python("import softhooks; print(softhooks.errors.OptionError.__name__)", tmp_path).split() == ["OptionError"]


def test_the_trainers_constant_is_what_it_was() -> None:
    assert incomplete_checkpoints._STATE == TRAINER_STATE_NAME
