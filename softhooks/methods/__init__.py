"""The methods, one file a paper. A new one is listed here."""

from __future__ import annotations

from softhooks.method import Method
from softhooks.methods.prefix_tuning import PrefixTuning
from softhooks.methods.prompt_tuning import PromptTuning

METHODS: dict[str, type[Method]] = {method.kind: method for method in (PromptTuning, PrefixTuning)}

__all__ = ["METHODS", "PrefixTuning", "PromptTuning"]
