"""Tensors and files of a prompt in training."""

from softhooks.backbone.container import CONTAINER, is_prompt_key
from softhooks.formats.files import read_tensors, write_tensors
from softhooks.formats.softhooks_files import LIVE, TENSORS
from softhooks.saving.live_state import live_tensors, write_live
from softhooks.trainer.checkpoint import CheckpointSaver, saver_of

__all__ = [
    "CONTAINER",
    "LIVE",
    "TENSORS",
    "CheckpointSaver",
    "is_prompt_key",
    "live_tensors",
    "read_tensors",
    "saver_of",
    "write_live",
    "write_tensors",
]
