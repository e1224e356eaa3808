"""LLaMA-Adapter: gates that start at zero, against gates that start open.

The option `gates` is not an option of `LlamaAdapter`. After `attach`, the runner sets the parameter `text_gates` of the prompt's
encoder to ones with `one`, and samples it from N(0, 1) with `random`. Without the option, gates start at zero.
"""

from __future__ import annotations

from benchmarks.quality.findings.framework import Expect, Finding, all_hold, arm, bars
from benchmarks.quality.findings.settings import LENGTH
from benchmarks.quality.models import SMOLLM2

_ARMS = {"zero": arm("gates from 0", "llama_adapter", SMOLLM2)} | {
    start: arm(f"gates from {words}", "llama_adapter", SMOLLM2, num_virtual_tokens=LENGTH, gates=start)
    for start, words in {"one": "1", "random": "N(0, 1)"}.items()
}

FINDINGS = (
    Finding(
        "zero_gate",
        "Zhang et al. 2023 (LLaMA-Adapter), arXiv:2303.16199",
        "Gates that start at zero are better than gates that start at one or at random.",
        tuple(_ARMS.values()),
        all_hold(Expect(_ARMS["zero"], _ARMS["one"]), Expect(_ARMS["zero"], _ARMS["random"])),
        bars(tuple(_ARMS.values()), "LLaMA-Adapter: initial gates"),
    ),
)
