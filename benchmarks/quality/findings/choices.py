"""The choices behind defaults and advice: schedule, precision, start from a chat, dropout of the frozen model.

`init="chat"` starts from the instruction in the model's chat template; `schedule`, `bfloat16` and `freeze_dropout` are options of
the runner: the Trainer's schedule, trained parameters in bfloat16, and no dropout in the frozen model during training. The main
comparison has a linear schedule and parameters in float32.
"""

from __future__ import annotations

from benchmarks.quality.findings.framework import Arm, Expect, Finding, all_hold, arm, bars
from benchmarks.quality.findings.settings import LENGTH
from benchmarks.quality.models import MINILM, SMOLLM2

SCHEDULES = {"cosine": "a cosine", "constant_with_warmup": "a constant"}
CHAT_LENGTH = 48

_LINEAR = arm("a linear schedule", "prompt_tuning", SMOLLM2)
_OTHER_SCHEDULES = [
    arm(f"{words} schedule", "prompt_tuning", SMOLLM2, num_virtual_tokens=LENGTH, schedule=name)
    for name, words in SCHEDULES.items()
]
_FLOAT32 = arm("parameters in float32", "prompt_tuning", SMOLLM2)
_BFLOAT16 = arm("parameters in bfloat16", "prompt_tuning", SMOLLM2, num_virtual_tokens=LENGTH, bfloat16=True)
_STARTS = {
    init: arm(label, "prompt_tuning", SMOLLM2, num_virtual_tokens=CHAT_LENGTH, init=init)
    for init, label in {"text": "the instruction, and words", "chat": "the instruction in the chat template"}.items()
}


def _dropout(contestant: str, label: str, freeze: bool) -> Arm:
    words = "without" if freeze else "with"
    return arm(f"{label}, {words} dropout", contestant, MINILM, num_virtual_tokens=LENGTH, freeze_dropout=freeze)


_DROPOUT = {
    (name, freeze): _dropout(name, label, freeze)
    for name, label in {"prompt_tuning": "prompt tuning", "p_tuning_v2": "P-tuning v2"}.items()
    for freeze in (True, False)
}

FINDINGS = (
    Finding(
        "schedule",
        "Our advice",
        "A linear schedule is not worse than a cosine or a constant one.",
        (_LINEAR, *_OTHER_SCHEDULES),
        all_hold(*(Expect(_LINEAR, other, "not worse") for other in _OTHER_SCHEDULES)),
        bars((_LINEAR, *_OTHER_SCHEDULES), "Prompt tuning: schedule"),
    ),
    Finding(
        "precision",
        "Our default",
        "In a model in bfloat16, parameters in float32 are better than parameters in bfloat16.",
        (_FLOAT32, _BFLOAT16),
        all_hold(Expect(_FLOAT32, _BFLOAT16)),
        bars((_FLOAT32, _BFLOAT16), "Prompt tuning: precision of the trained parameters"),
    ),
    Finding(
        "chat_start",
        "A start that instruct models suggest",
        "A prompt that starts as the instruction in the chat template is better than one that starts as the instruction alone.",
        tuple(_STARTS.values()),
        all_hold(Expect(_STARTS["chat"], _STARTS["text"])),
        bars(tuple(_STARTS.values()), "Prompt tuning: start from the chat template"),
    ),
    Finding(
        "dropout",
        "Published comparisons that train without dropout",
        "Without dropout in the frozen model, prompts are better.",
        tuple(_DROPOUT.values()),
        all_hold(*(Expect(_DROPOUT[name, True], _DROPOUT[name, False]) for name in ("prompt_tuning", "p_tuning_v2"))),
        bars(tuple(_DROPOUT.values()), "Dropout in the frozen model"),
    ),
)
