"""The names that integrations use in addition to the public ones, by topic.

Integrations import only these, public names and each other. `training` has the checks of a training loop, `checkpoints` the
tensors and files of a prompt in training, `saved_prompts` the formats of saved prompts, `models` the parts of a model with
prompts, `serving` and `command_line` what servers and commands need. This module itself does not load torch.
"""

from softhooks.patching.patches import Patches
from softhooks.patching.shared_patches import SharedPatches
from softhooks.trainer.derived_trainers import register

__all__ = ["Patches", "SharedPatches", "register"]
