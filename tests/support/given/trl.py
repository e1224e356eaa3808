"""Names that the example of softhooks.integrations.trl expects: a tiny Llama, its tokenizer, and preferences."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tokens
import zoo


def names() -> dict[str, Any]:
    """The names of the example."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig

    disable_progress_bars()
    rows = {
        "prompt": [f"{tokens.words(zoo.text(1, 3 + row % 3, seed=row)[0])} " for row in range(8)],
        "chosen": [tokens.words(zoo.text(1, 3, seed=20 + row)[0]) for row in range(8)],
        "rejected": [tokens.words(zoo.text(1, 5, seed=40 + row)[0]) for row in range(8)],
    }
    bare = not torch.cuda.is_available()
    options = {"learning_rate": 5e-3, "max_steps": 4, "logging_steps": 1, "report_to": [], "use_cpu": bare}
    return {
        "model": zoo.build("llama"),
        "tokenizer": plain_tokenizer(),
        "dataset": Dataset.from_dict(rows),
        "args": DPOConfig("preferences", save_strategy="no", disable_tqdm=True, **options),
    }


def plain_tokenizer() -> Any:
    """A tokenizer that adds no special tokens: TRL adds the end of the text itself."""
    from tokenizers.processors import TemplateProcessing

    made = tokens.tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    return made
