"""Names that the example of `softhooks.integrations.lm_eval` expects."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import tokens
import zoo

import softhooks

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_task(folder: Path) -> Path:
    """A task of eight questions with two answers each, in files of its own."""
    rows = [
        {"question": f"word{i} word{i + 1}", "right": f"word{2 * i}", "wrong": f"word{3 * i} word9", "gold": 0}
        for i in range(5, 13)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = TASK.format(rows=folder / "rows.jsonl", cache=folder / "cache")
    (folder / "tiny_choice.yaml").write_text(text, encoding="utf-8")
    return folder


def names() -> dict[str, Any]:
    """A tiny Llama, its tokenizer, a saved prompt, and a task manager that knows one task."""
    from lm_eval.tasks import TaskManager

    model, folder = zoo.build("llama"), Path(tempfile.mkdtemp())
    with softhooks.attach(model, softhooks.PromptTuning(5)) as prompt:
        prompt.save_pretrained(folder / "prompt")
    manager = TaskManager(include_path=str(write_task(folder)), include_defaults=False)
    return {"model": model, "tokenizer": tokens.tokenizer(), "manager": manager, "prompt_folder": folder / "prompt"}
