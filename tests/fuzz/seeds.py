"""Write the seeds of the corpus, from real prompts of every method: `PYTHONPATH=tests/support python -m tests.fuzz.seeds`."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import zoo
from safetensors import safe_open
from table import BY_NAME

from softhooks import Layout, PromptTuning, SoftHooksError, attach
from softhooks.formats import peft_read, softhooks_files
from tests.fuzz.corpus_files import CORPUS

TEMPLATES = [
    "{premise} Question: {hypothesis}? {soft:3} Answer: {mask}",
    "{{a}} {soft:2, name=a} {b} {soft:2, name=a}",
    '{soft:"some words"} {text}',
]
CONFIGS = [
    "method: prefix-tuning\noptions: {num-virtual-tokens: 4}\ncallback: {check-frozen: end}\n",
    "[1, {a: &x [b], c: *x}]",
]
PREFIXES = [
    json.dumps(
        {
            "facts": {
                "method": "prefix_tuning",
                "num_virtual_tokens": 3,
                "model_type": "llama",
                "vocabulary": 96,
                "heads": [2],
                "key_dims": [8],
                "value_dims": [8],
                "windowed": True,
            },
            "tensors": {"layers.0.key": [3, 2, 8], "layers.0.value": [3, 2, 8]},
        }
    )
]
STATES = [
    '{"best_model_checkpoint": "out/checkpoint-7", "log_history": [{"loss": 1.5}]}',
    '{"weight_map": {"a.soft_prompts.b": "f"}}',
]


def main() -> None:
    """Write one seed for each method and format."""
    case = zoo.Case("llama", "causal")
    for name, entry in [(name, entry) for name, entry in BY_NAME.items() if entry.fits(case)]:
        model = zoo.build("llama")
        with TemporaryDirectory() as folder:
            with attach(model, entry.make(4)) as prompt:
                entry.wake(prompt)
                prompt.save_pretrained(folder)
                with safe_open(Path(folder) / softhooks_files.TENSORS, framework="pt") as file:
                    text = file.metadata()[softhooks_files.FORMAT]
                for reader in ("description", "loaded"):
                    _write(reader, name, text)
                try:
                    prompt.save_pretrained(folder, as_peft=True)
                except SoftHooksError:
                    continue
            _write("peft", name, _adapter(Path(folder)))
            _write("config_file", name, (Path(folder) / peft_read.CONFIG).read_text())
    with TemporaryDirectory() as folder, attach(zoo.build("llama"), PromptTuning(1)) as prompt:
        prompt.save_pretrained(folder)
        (CORPUS / "raw_file").mkdir(parents=True, exist_ok=True)
        (CORPUS / "raw_file" / "seed-prompt").write_bytes((Path(folder) / softhooks_files.TENSORS).read_bytes())
    layouts = [Layout.insert(start=2, after={5: 1, (6, 7): 1}, end=1), Layout(TEMPLATES[0]), Layout(TEMPLATES[1])]
    for number, text in enumerate([*TEMPLATES, *(json.dumps(layout.to_json()) for layout in layouts)]):
        _write("layout", str(number), text)
    for reader, texts in (
        ("run_config", CONFIGS),
        ("trainer_state", STATES),
        ("served_prefix", PREFIXES),
        ("live_description", ['{"method": {"kind": "a"}}']),
    ):
        for number, text in enumerate(texts):
            _write(reader, str(number), text)


def _adapter(folder: Path) -> str:
    """The config of a PEFT adapter and the shapes of its tensors."""
    with safe_open(folder / peft_read.TENSORS, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return json.dumps({"config": json.loads((folder / peft_read.CONFIG).read_bytes()), "tensors": shapes})


def _write(reader: str, name: str, text: str) -> None:
    (CORPUS / reader).mkdir(parents=True, exist_ok=True)
    (CORPUS / reader / f"seed-{name}").write_text(text)


if __name__ == "__main__":
    main()
