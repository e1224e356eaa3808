"""Images: image classification. Prompts of embeddings have no text to stand in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import softhooks
from benchmarks.survey.case import Case
from benchmarks.survey.modality import Modality, Task
from benchmarks.survey.tiny import tiny_model
from softhooks.method import Method

ROWS = 2

TASKS = (
    Task(
        "image",
        "image classification",
        "AutoModelForImageClassification",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "pooled",
    ),
)


@dataclass(frozen=True)
class Images:
    """A batch of images, [B, C, H, W]."""

    pixels: Tensor

    def call(self) -> dict[str, Any]:
        """The arguments of a forward."""
        return {"pixel_values": self.pixels}


@dataclass(frozen=True)
class ImageModality(Modality):
    """Models that take images."""

    def build(self, case: Case) -> nn.Module:
        """Make the model."""
        return tiny_model(case, next(task for task in self.tasks if task.name == case.task))

    def example(self, model: Any, case: Case) -> Images:
        """Noise, in the size that the config names."""
        config = getattr(model.config, "vision_config", model.config)
        size = getattr(config, "image_size", None) or 32
        height, width = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(0)
        channels = getattr(config, "num_channels", 3)
        return Images(torch.randn(ROWS, channels, height, width, generator=generator))

    def attach(self, model: nn.Module, method: Method, example: Images) -> softhooks.SoftPrompt:
        """Attach with the batch as the example, which models without token ids need."""
        return softhooks.attach(model, method, example=example.call())


IMAGES = ImageModality(
    TASKS,
    checks=("closed gates", "effect", "shapes", "gradients", "row order", "checkpointing", "removal"),
    kinds=("prompt", "prefix", "adapter"),
)
