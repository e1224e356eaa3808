"""The Auto class of transformers that loads a base model, found in a fixed list.

The class name in the file of a prompt is only compared with the names in transformers' own tables; it is never imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from softhooks.errors import CheckpointError


@dataclass(frozen=True)
class AutoClass:
    """An Auto class.

    Attributes:
        name: the name of the class in transformers.
        mapping: the name of its table in transformers, which maps model types to class names.
        task: PEFT's name of the task, if it has one.
        pipeline: the Hub's name of the task, if it has one.
    """

    name: str
    mapping: str
    task: str = ""
    pipeline: str = ""

    def classes(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the model classes by model type."""
        from transformers.models.auto import modeling_auto

        table: dict[str, Any] = getattr(modeling_auto, f"{self.mapping}_MAPPING_NAMES")
        return {kind: (names,) if isinstance(names, str) else tuple(names) for kind, names in table.items()}


AUTO_CLASSES = (
    AutoClass("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM", "CAUSAL_LM", "text-generation"),
    AutoClass("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "SEQ_2_SEQ_LM", "text2text-generation"),
    AutoClass("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "", "image-text-to-text"),
    AutoClass(
        "AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION", "SEQ_CLS", "text-classification"
    ),
    AutoClass("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION", "TOKEN_CLS", "token-classification"),
    AutoClass("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING", "QUESTION_ANS", "question-answering"),
    AutoClass("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM", "", "fill-mask"),
    AutoClass("AutoModelForMultipleChoice", "MODEL_FOR_MULTIPLE_CHOICE"),
    AutoClass("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ", "", "automatic-speech-recognition"),
    AutoClass("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION", "", "image-classification"),
    AutoClass("AutoModelForVideoClassification", "MODEL_FOR_VIDEO_CLASSIFICATION", "", "video-classification"),
    AutoClass("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION", "", "audio-classification"),
    AutoClass("AutoModelForCTC", "MODEL_FOR_CTC", "", "automatic-speech-recognition"),
    AutoClass("AutoModelForObjectDetection", "MODEL_FOR_OBJECT_DETECTION", "", "object-detection"),
    AutoClass("AutoModelForSemanticSegmentation", "MODEL_FOR_SEMANTIC_SEGMENTATION", "", "image-segmentation"),
    AutoClass("AutoModelForDepthEstimation", "MODEL_FOR_DEPTH_ESTIMATION", "", "depth-estimation"),
    AutoClass("AutoModelForMaskedImageModeling", "MODEL_FOR_MASKED_IMAGE_MODELING"),
    AutoClass("AutoModel", "MODEL", "FEATURE_EXTRACTION", "feature-extraction"),
    AutoClass("AutoModelForTextEncoding", "MODEL_FOR_TEXT_ENCODING", "", "feature-extraction"),
)
"""The Auto classes, in the order in which a class name is looked up."""


def auto_class_of(class_name: str, task: str | None = None) -> AutoClass | None:
    """Return the Auto class that loads models of a class or, if no class is known, of PEFT's task; None if there is none."""
    if not class_name:
        return next((auto for auto in AUTO_CLASSES if task and auto.task == task), None)
    return next((auto for auto in AUTO_CLASSES if any(class_name in names for names in auto.classes().values())), None)


def require_class(auto: AutoClass, class_name: str, config: Any, source: str) -> None:
    """Check that an Auto class would load a model of this class for a config; raise a `CheckpointError` otherwise."""
    kind = str(getattr(config, "model_type", ""))
    found = auto.classes().get(kind, ())
    if not found or (class_name and class_name not in found):
        raise CheckpointError(
            "the base model that the prompt names has a config of another model class.",
            "Load the base model yourself, and then the prompt with `softhooks.load`.",
            prompt=source,
            trained_with=class_name or f"a model for {auto.name}",
            config=f"model_type {kind!r}, " + (" or ".join(found) if found else f"which {auto.name} does not load"),
        )
