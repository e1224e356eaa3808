"""A Sphinx extension: the navigation of the site, as hidden tables of contents at the end of pages."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

NAVIGATION = {
    "docs/README": {
        "Start": "quick-start trainer training-loop frameworks examples coming-from-peft",
        "Methods": "methods",
        "Use": "layouts batch-columns several-prompts saving serving command-line",
        "Reliability": "how-it-works models limits errors guarantees performance security",
        "API": "reference/attaching reference/methods reference/trainer reference/layouts reference/prompts reference/errors "
        "reference/integrations",
        "Project": "/CONTRIBUTING /CHANGELOG /SECURITY /benchmarks/README",
    },
    "docs/methods": {
        "": "methods/prompt-tuning methods/prefix-tuning methods/p-tuning methods/p-tuning-v2 methods/multitask-prompt-tuning "
        "methods/context-aware-prompt-tuning methods/llama-adapter methods/residual-prompt-tuning methods/context-tuning "
        "methods/cartridges methods/spot methods/prompt-ensembles",
    },
    "benchmarks/README": {"": "/benchmarks/results/README /benchmarks/metamath/README"},
}
"""For each of these pages, the pages below it by caption."""


def _add(app: Sphinx, name: str, source: list[str]) -> None:
    for caption, pages in NAVIGATION.get(name, {}).items():
        listed = "\n".join(pages.split())
        title = f":caption: {caption}\n" if caption else ""
        source[0] += f"\n```{{toctree}}\n:hidden:\n{title}\n{listed}\n```\n"


def setup(app: Sphinx) -> dict[str, Any]:
    """Change the source of these pages when they are read."""
    app.connect("source-read", _add)
    return {"parallel_read_safe": True}
