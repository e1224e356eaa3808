"""Names that the example of `softhooks.integrations.transformers_serve` expects."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ports
import tokens
import torch
import zoo
from transformers import AutoModelForCausalLM

import softhooks

CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def write_model(folder: Path, method: Any) -> None:
    """A tiny Llama with its tokenizer in `model`, and a prompt for it in `prompt`."""
    model, tokenizer = zoo.build("llama"), tokens.tokenizer()
    tokenizer.chat_template = CHAT
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with softhooks.attach(model, method) as prompt, torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        prompt.save_pretrained(folder / "prompt")


def names() -> dict[str, Any]:
    """Folders with a model and a prompt, and a port with the socket that reserves it."""
    folder = Path(tempfile.mkdtemp())
    write_model(folder, softhooks.PromptTuning(5))
    reservation, port = ports.reserve()
    return {
        "model_folder": str(folder / "model"),
        "prompt_folder": str(folder / "prompt"),
        "port": port,
        "reservation": reservation,
    }
