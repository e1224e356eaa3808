"""What the experiments on findings have in common: the task, the seeds, the steps and the learning rates."""

from __future__ import annotations

from benchmarks.quality.models import MINILM, SMOLLM2
from benchmarks.quality.setup import VIRTUAL_TOKENS

TASK = "glosses"
SOURCE_TASKS = ("sections", "docstrings")
"""The tasks from which prompts are transferred to `TASK`."""

SEEDS = (0, 1, 2)
SHOTS = 32
FEW_SHOTS = 8
STEPS = 100
LENGTH = VIRTUAL_TOKENS
"""The virtual tokens of prompts whose length is not the subject."""

RATES: dict[tuple[str, str], float] = {
    (SMOLLM2, "prompt_tuning"): 3e-2,
    (SMOLLM2, "prefix_tuning"): 3e-2,
    (SMOLLM2, "prefix_tuning with MLP"): 3e-4,
    (SMOLLM2, "p_tuning"): 1e-2,
    (SMOLLM2, "multitask_prompt_tuning"): 3e-2,
    (SMOLLM2, "cpt"): 3e-4,
    (SMOLLM2, "peft_cpt"): 3e-4,
    (SMOLLM2, "llama_adapter"): 1e-2,
    (SMOLLM2, "cartridge"): 2e-2,
    (MINILM, "prompt_tuning"): 3e-2,
    (MINILM, "p_tuning_v2"): 1e-1,
}
"""The learning rates, by model and contestant; `rates.py` says how they were chosen.

All settings of a finding that share an entry are trained with the same rate.
"""
