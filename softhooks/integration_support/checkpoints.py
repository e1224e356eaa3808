"""Checkpoints of a prompt that is being trained: its tensors and their files."""

from softhooks.backbone.container import CONTAINER, is_prompt_key
from softhooks.formats.files import read_tensors, write_tensors
from softhooks.formats.softhooks_files import LIVE, TENSORS
from softhooks.saving.live_state import live_tensors, write_live
from softhooks.trainer.checkpoint import CheckpointSaver, saver_of
