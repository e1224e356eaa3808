"""Names that integrations import in addition to the public names, by topic. This module does not import torch."""

from softhooks.patching.patches import Patches
from softhooks.patching.shared_patches import SharedPatches
from softhooks.trainer.derived_trainers import register
