"""The arguments of probe forwards for models that do not embed token ids: images, videos, or sound."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.backbone.example import LABELS, Example
from softhooks.compat.offload import device_of
from softhooks.errors import OptionError

_IMAGE_SIZE, _CHANNELS, _FRAMES, _BANDS, _SAMPLES = 32, 3, 4, 80, 4000
"""The sizes that are tried if the config has none."""


def feature_name(model: nn.Module, is_encoder_decoder: bool = False) -> str | None:
    """Return the name of the argument with the features of a model that takes them instead of token ids; None if it takes ids.

    Args:
        is_encoder_decoder: whether only the encoder takes features, and the decoder takes ids (Whisper).
    """
    name = getattr(model, "main_input_name", "input_ids")
    return None if name == "input_ids" or (embeds_tokens(model) and not is_encoder_decoder) else str(name)


def embeds_tokens(model: nn.Module) -> bool:
    """Whether a model has an embedding matrix, [V, H]; vision models return the layer that embeds patches."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        weight = embedding.weight
    except (AttributeError, NotImplementedError, TypeError):
        return False
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(embedding, nn.Linear)


def feature_examples(
    model: nn.Module, batch: Mapping[str, Any] | None, is_encoder_decoder: bool = False
) -> Iterator[Example]:
    """Yield examples that a model without token ids may accept: the first row of the user's batch, or else random features.

    The sizes of random features come from the config. They are drawn with a fixed seed.
    """
    name = feature_name(model, is_encoder_decoder)
    assert name is not None  # the caller has checked it
    device = device_of(model)
    if batch is not None:
        if not isinstance(batch.get(name), Tensor):
            given = ", ".join(batch) or "no arguments"
            raise OptionError(f"the example has {given}; {type(model).__name__} needs a tensor `{name}`.")
        rows = len(batch[name])
        others = {
            key: _first_row(value, rows, device)
            for key, value in batch.items()
            if key not in LABELS and not key.startswith("decoder_") and value is not None
        }
        yield Example(is_encoder_decoder, others=others, has_text=False)
        return
    generator = torch.Generator().manual_seed(0)
    for shape in _shapes(name, getattr(model, "config", None)):
        values = torch.randn(shape, generator=generator).to(device, _dtype(model))
        yield Example(is_encoder_decoder, others={name: values}, has_text=False)


def _first_row(value: Any, rows: int, device: torch.device) -> Any:
    return value[:1].to(device) if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _shapes(name: str, config: Any) -> Iterator[tuple[int, ...]]:
    """Yield shapes of one row of features: images, videos, raw sound, and spectrograms with time or bands first."""
    parts = [config, *(part for part in getattr(config, "__dict__", {}).values() if hasattr(part, "to_dict"))]

    def size(default: int, *names: str) -> int:
        values = (getattr(part, key, None) for part in parts for key in names)
        found = next((value for value in values if isinstance(value, (int, list, tuple)) and value), default)
        return int(found[0] if isinstance(found, (list, tuple)) else found)

    side = size(_IMAGE_SIZE, "image_size", "input_size")
    channels, frames = size(_CHANNELS, "num_channels", "in_channels"), size(_FRAMES, "num_frames", "tubelet_size")
    image, bands = (
        (channels, side, side),
        size(_BANDS, "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim"),
    )
    length = size(2 * _BANDS, "max_length", "max_source_positions")
    sound = max(_SAMPLES, 10 * size(1, "inputs_to_logits_ratio"))
    by_time = [(1, length, bands), (1, bands, length), (1, bands, 2 * length)]  # Whisper halves the length
    pixels = [(1, *image), (1, frames, *image), (1, channels, frames, side, side)]
    groups = [pixels, [*by_time, (1, sound)]]
    yield from itertools.chain(*(groups if "pixel" in name or "image" in name else reversed(groups)))
