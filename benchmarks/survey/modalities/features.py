"""Images, videos and sound. Prompts of embeddings have no text that they could join, so `attach` refuses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import softhooks
from benchmarks.survey.case import Case
from benchmarks.survey.modality import Modality, Task
from benchmarks.survey.tiny import tiny_model
from softhooks.backbone.feature_inputs import feature_examples
from softhooks.errors import UnsupportedModelError
from softhooks.method import Method

ROWS = 2
IDS = (5, 6, 7, 8)
"""The ids that a decoder gets."""

TASKS = (
    Task(
        "image",
        "image classification",
        "AutoModelForImageClassification",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "pooled",
    ),
    Task(
        "video",
        "video classification",
        "AutoModelForVideoClassification",
        "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
        "pooled",
    ),
    Task(
        "audio",
        "audio classification",
        "AutoModelForAudioClassification",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
        "pooled",
    ),
    Task("ctc", "speech to text by CTC", "AutoModelForCTC", "MODEL_FOR_CTC_MAPPING_NAMES", "tokens"),
    Task(
        "speech",
        "speech to text by a decoder",
        "AutoModelForSpeechSeq2Seq",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        "decoder",
    ),
)


@dataclass(frozen=True)
class Features:
    """A batch of images, videos or sounds, and a decoder's ids if there is a decoder."""

    arguments: dict[str, Tensor]

    def call(self) -> dict[str, Any]:
        """The arguments of a forward."""
        return self.arguments


@dataclass(frozen=True)
class FeatureModality(Modality):
    """Models that take features instead of token ids."""

    def build(self, case: Case) -> nn.Module:
        """Make the model."""
        return tiny_model(case, next(task for task in self.tasks if task.name == case.task))

    def example(self, model: Any, case: Case) -> Features:
        """Noise, in the first of the sizes in the config that the model accepts."""
        pair = bool(getattr(model.config, "is_encoder_decoder", False))
        failed: Exception | None = None
        for example in feature_examples(model, None, pair):
            arguments = {name: self._rows(value) for name, value in example.others.items()}
            if pair:
                arguments["decoder_input_ids"] = torch.tensor([IDS]).expand(ROWS, -1)
            try:
                model(**arguments)
                return Features(arguments)
            except Exception as error:  # noqa: BLE001 - whatever a model raises for a shape that it does not accept
                failed = failed or error
        raise UnsupportedModelError(f"no random features fit this model: {failed}")

    def _rows(self, value: Tensor) -> Tensor:
        return torch.randn(ROWS, *value.shape[1:], generator=torch.Generator().manual_seed(1)).to(value)

    def attach(self, model: nn.Module, method: Method, example: Features) -> softhooks.SoftPrompt:
        """Attach with the batch as the example."""
        return softhooks.attach(model, method, example=example.call())


FEATURES = FeatureModality(
    TASKS,
    checks=("closed gates", "effect", "shapes", "gradients", "row order", "checkpointing", "removal"),
    kinds=("prompt", "prefix", "adapter"),
)
