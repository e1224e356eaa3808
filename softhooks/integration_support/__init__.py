"""Names that integrations use in addition to the public names, by topic.

Integrations import only these names, public names and other integrations. `training` has the checks of a training loop,
`checkpoints` the tensors and files of a prompt in training, `saved_prompts` the formats of saved prompts, `models` the parts of a
model with prompts, and `serving` and `command_line` the helpers of servers and commands. This module does not import torch.
"""

from softhooks.patching.patches import Patches
from softhooks.patching.shared_patches import SharedPatches
from softhooks.trainer.derived_trainers import register

__all__ = ["Patches", "SharedPatches", "register"]
