"""Tiny models that take images, videos or sound instead of token ids, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8}
CLASSES: dict[str, Any] = {**SIZE, **IMAGE, "num_labels": 3}
VIDEO: dict[str, Any] = {**CLASSES, "num_frames": 4}
SOUND: dict[str, Any] = {
    **SIZE, "vocab_size": 20, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16, "apply_spec_augment": False,
    "feat_extract_norm": "layer", "num_labels": 3, "layerdrop": 0.0,
}  # fmt: skip
SPECTROGRAM: dict[str, Any] = {**SIZE, "max_length": 64, "num_mel_bins": 32, "patch_size": 16, "num_labels": 3}
WHISPER: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 40, "num_labels": 3, "use_weighted_layer_sum": False,
}  # fmt: skip

MODELS: dict[str, Callable[[], Any]] = {
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**CLASSES)),
    "deit": lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**CLASSES)),
    "beit": lambda: tf.BeitForImageClassification(tf.BeitConfig(use_relative_position_bias=True, **CLASSES)),
    "dinov2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**CLASSES)),
    "siglip": lambda: tf.SiglipForImageClassification(
        tf.SiglipConfig(vision_config={**SIZE, **IMAGE}, text_config={**SIZE, "vocab_size": 64}, num_labels=3)
    ),
    "videomae": lambda: tf.VideoMAEForVideoClassification(tf.VideoMAEConfig(**VIDEO)),
    "vivit": lambda: tf.VivitForVideoClassification(tf.VivitConfig(**{**VIDEO, "tubelet_size": [2, 8, 8]})),
    "ast": lambda: tf.ASTForAudioClassification(tf.ASTConfig(**SPECTROGRAM)),
    "wav2vec2": lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**SOUND)),
    "hubert": lambda: tf.HubertForSequenceClassification(tf.HubertConfig(**SOUND)),
    "whisper": lambda: tf.WhisperForAudioClassification(tf.WhisperConfig(**WHISPER)),
    "yolos": lambda: tf.YolosForObjectDetection(
        tf.YolosConfig(**SIZE, image_size=[32, 32], patch_size=8, num_detection_tokens=5)
    ),
}
SHAPES = {
    "videomae": (4, 3, 32, 32), "vivit": (4, 3, 32, 32), "ast": (64, 32), "wav2vec2": (400,), "hubert": (400,),
    "whisper": (80, 80),
}  # fmt: skip
"""The shape of one row; that of the others is an image's."""


def batch(name: str, rows: int = 2) -> dict[str, Tensor]:
    """Make the features of some rows."""
    shape = SHAPES.get(name, (3, 32, 32))
    argument = {
        "ast": "input_values",
        "wav2vec2": "input_values",
        "hubert": "input_values",
        "whisper": "input_features",
    }
    values = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))
    return {argument.get(name, "pixel_values"): values}


def build(name: str) -> Any:
    """Build a model whose matrices are large enough for every layer to matter."""
    return _with_large_matrices(MODELS[name])


def _with_large_matrices(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


# --- encoder-decoders -------------------------------------------------------------------------------------------------

VOCABULARY = 96
SPEECH: dict[str, Any] = {
    **{name: value for name, value in WHISPER.items() if name not in ("num_labels", "use_weighted_layer_sum")},
    "vocab_size": VOCABULARY, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip


def _caption() -> Any:
    decoder = tf.BertConfig(**SIZE, vocab_size=VOCABULARY, is_decoder=True, add_cross_attention=True)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**SIZE, **IMAGE), decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    return tf.VisionEncoderDecoderModel(config=config)


MODELS_OF_PAIRS: dict[str, Callable[[], Any]] = {
    "whisper": lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**SPEECH)),
    "caption": _caption,
    "speech2text": lambda: tf.Speech2TextForConditionalGeneration(
        tf.Speech2TextConfig(
            **{**SPEECH, "max_source_positions": 100}, input_feat_per_channel=8, conv_channels=16, input_channels=1
        )
    ),
}
SHAPES_OF_PAIRS = {"whisper": (8, 40), "caption": (3, 32, 32), "speech2text": (48, 8)}


def build_pair(name: str) -> Any:
    """Build an encoder-decoder with large matrices."""
    model = _with_large_matrices(MODELS_OF_PAIRS[name])
    model.generation_config.eos_token_id = None
    return model


def pair_batch(name: str, rows: int = 2) -> dict[str, Tensor]:
    """Make the features of some rows, and the decoder's ids."""
    generator = torch.Generator().manual_seed(1)
    argument = "pixel_values" if name == "caption" else "input_features"
    ids = torch.randint(3, VOCABULARY, (rows, 5), generator=generator)
    return {argument: torch.randn(rows, *SHAPES_OF_PAIRS[name], generator=generator), "decoder_input_ids": ids}
