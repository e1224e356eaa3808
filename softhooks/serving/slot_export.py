"""Export a prompt as a slot file of llama.cpp's server.

The server fills a slot with placeholder tokens and saves it. In a copy of this file, the keys and values of the prompt replace
those of the placeholders. So everything else in the file is what this server wrote for this model.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.probe_inputs import text_config
from softhooks.backbone.probing import eval_mode
from softhooks.errors import CheckpointError, OptionError, PromptMismatchError, UnsupportedModelError
from softhooks.formats.files import replacing
from softhooks.serving.llama_server import LlamaServer
from softhooks.serving.prefix import Prefix, PrefixFacts, prefix_of
from softhooks.serving.prefix_files import check_name, digest
from softhooks.serving.slot_file import SUFFIX, SlotFile, read_slot_file
from softhooks.switch import disabled

PAIRED = ("granite", "llama", "mistral")
"""The model types whose keys llama.cpp keeps as pairs of numbers that are rotated together; transformers keeps two halves."""
HALVES = ("phi3", "qwen2", "qwen3")
"""The model types whose keys llama.cpp keeps in the same order as transformers."""
MAX_DIFFERENCE = 0.5
"""The largest relative difference between the first layer's keys of the same tokens. For SmolLM2, it is 0.08 if the server's
weights are quantized to 4 bits, 0.3 for 2 bits, and 1.4 if the keys are in another order or belong to another model."""


@dataclass(frozen=True)
class ExportedSlot:
    """A prompt that was written to a slot file.

    Attributes:
        path: the slot file.
        tokens: the placeholder tokens, which must precede the text in requests.
        facts: what is known about the prompt.
        difference: the relative difference between the first layer's keys of the placeholders that the server computed and
            those that the model computes.
    """

    path: Path
    tokens: tuple[int, ...]
    facts: PrefixFacts
    difference: float


def export_slot(model: nn.Module, folder: Path, name: str, server: LlamaServer, slot: int = 0) -> ExportedSlot:
    """Write the active prompt as a slot file, and restore it into the slot.

    Args:
        model: the transformers model with the prompt, and with the weights that the server runs.
        folder: the directory that the server saves slots to.
        name: the file's name, without the suffix.
        server: the running server.
        slot: the slot that is used, and overwritten.

    Raises:
        SoftHooksError: the prompt or the model cannot be exported, the server cannot be reached or refuses a request, its file
            is not understood, or its model differs from `model`.
    """
    path = folder / f"{check_name(name)}{SUFFIX}"
    prefix = prefix_of(model)
    _require_order(prefix.facts, text_config(getattr(model, "config", None)))
    tokens = placeholders(prefix)
    template = _template(server, slot, folder, tokens)
    _require_shapes(template, prefix.facts, tokens)
    difference = _difference(template, model, tokens, prefix.facts.model_type)
    if not difference <= MAX_DIFFERENCE:
        raise PromptMismatchError(
            "the server computes other keys than the model for the same tokens, so the prompt would have another effect: the "
            "server must run the weights that the prompt was trained on, which may be quantized.",
            "Convert the base model with llama.cpp's `convert_hf_to_gguf.py`.",
            relative_difference=f"{difference:.2f}",
            allowed=MAX_DIFFERENCE,
        )
    kind = prefix.facts.model_type
    keys = [_rows(_ordered(key, kind)) for key in prefix.keys]
    content = template.replaced(keys, [_rows(value) for value in prefix.values])
    with replacing(path) as part:
        part.write_bytes(content)
    server.restore(slot, path.name, len(tokens))
    return ExportedSlot(path, tokens, prefix.facts, difference)


def placeholders(prefix: Prefix) -> tuple[int, ...]:
    """Return the tokens that stand for a prompt in requests.

    They are drawn from the prompt's digest: the server reuses keys and values for a request that begins with the same tokens, so
    two prompts must not have the same placeholders.
    """
    seed = digest(prefix)
    found = (hashlib.sha256(f"{seed}/{index}".encode()).digest() for index in range(prefix.facts.num_virtual_tokens))
    return tuple(int.from_bytes(number[:8], "big") % prefix.facts.vocabulary for number in found)


def _require_order(facts: PrefixFacts, config: Any) -> None:
    """Refuse a model whose keys may be in another order, or whose cache is in several parts."""
    if facts.model_type not in (*PAIRED, *HALVES):
        raise UnsupportedModelError(
            f"prompts for the model type {facts.model_type!r} cannot be exported for llama.cpp: its server was not compared with "
            "transformers on this type.",
            supported=", ".join(sorted((*PAIRED, *HALVES))),
        )
    if (window := getattr(config, "sliding_window", None)) is not None:
        raise UnsupportedModelError(
            f"prompts for a model with a sliding window ({window} tokens) cannot be exported for llama.cpp.",
            model=facts.model_type,
        )


def _template(server: LlamaServer, slot: int, folder: Path, tokens: tuple[int, ...]) -> SlotFile:
    """Let the server save a slot with placeholder tokens."""
    path = folder / f"softhooks-{secrets.token_hex(8)}{SUFFIX}"
    server.fill(slot, list(tokens))
    server.save(slot, path.name)
    try:
        return read_slot_file(path)
    except FileNotFoundError as error:
        raise OptionError(
            f"the server saved a slot, but not in {folder}.",
            "Pass the directory that the server was started with (`--slot-save-path`), on the same machine or shared with it.",
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _require_shapes(template: SlotFile, facts: PrefixFacts, tokens: tuple[int, ...]) -> None:
    expected = {
        "tokens": tokens,
        "keys": [heads * size for heads, size in zip(facts.heads, facts.key_dims, strict=True)],
        "values": [heads * size for heads, size in zip(facts.heads, facts.value_dims, strict=True)],
    }
    found = {
        "tokens": template.tokens,
        "keys": [block.width for block in template.keys],
        "values": [block.width for block in template.values],
    }
    for name, wanted in expected.items():
        if found[name] != wanted:
            raise PromptMismatchError(
                f"the server runs another model than the prompt belongs to: the {name} differ "
                f"({'in the slot' if name == 'tokens' else 'in number or width'}).",
                expected=wanted,
                found=found[name],
            )


def _difference(template: SlotFile, model: nn.Module, tokens: tuple[int, ...], model_type: str) -> float:
    """Compare the first layer's keys of the placeholders with those of the bare model; return the relative difference.

    In later layers, the effect of quantized weights accumulates, so that it is as large as that of other weights.
    """
    expected = _rows(_ordered(_first_keys(model, tokens), model_type))
    return float((template.read(template.keys[0]) - expected).norm() / expected.norm())


def _first_keys(model: Any, tokens: tuple[int, ...]) -> Tensor:
    """Run tokens through the bare model, and return the keys of the first layer. -> [P, Hk, D]."""
    with eval_mode(model), disabled(model):
        ids = torch.tensor([tokens], device=model.get_input_embeddings().weight.device)
        cache = model(ids, use_cache=True).past_key_values
    found: Tensor = cache.layers[0].keys
    return found[0].transpose(0, 1).cpu()


def _ordered(key: Tensor, model_type: str) -> Tensor:
    """Reorder keys as llama.cpp keeps them. [P, Hk, D] -> [P, Hk, D]."""
    if model_type in HALVES:
        return key
    halves: Tensor = key.unflatten(-1, (2, -1))
    return halves.transpose(-1, -2).flatten(-2)


def _rows(tensor: Tensor) -> Tensor:
    """Put the heads of a token in one row. [P, Hk, D] -> [P, Hk * D], float32."""
    return tensor.float().flatten(1)
