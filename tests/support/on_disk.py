"""Models and prompts in directories, for commands that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokens
import torch
import zoo

import softhooks
from softhooks.method import Method


def saved(folder: Path, model: Any, method: Method, scale: float = 1.0) -> Path:
    """Save a prompt whose values are not the initial ones."""
    with softhooks.attach(model, method) as prompt, torch.no_grad():
        torch.manual_seed(1)
        for parameter in prompt.encoder.parameters():
            parameter.normal_(std=scale)
        prompt.save_pretrained(folder)
    return folder


def base(folder: Path, arch: str, head: str = "causal") -> tuple[Path, Any]:
    """Save a model and its tokenizer."""
    model = zoo.build(arch, head)
    model.save_pretrained(folder)
    tokens.tokenizer().save_pretrained(folder)
    return folder, model
