"""Checks and helpers for training loops."""

from softhooks.backbone.probing import eval_mode
from softhooks.base_model.frozen_record import FrozenRecord, FrozenReport
from softhooks.cli.run_arguments import from_sections
from softhooks.compat.sharding import is_sharded_model
from softhooks.runtime.untrained_loss import refuse_evaluation
from softhooks.trainer.callback import SoftPromptCallback
from softhooks.trainer.frozen_check import CheckFrozen, FrozenCheck
from softhooks.trainer.launch import fsdp_plugin
from softhooks.trainer.optimizer import drop_frozen, held_by, is_mended, mend_optimizer, require_gradient, require_held
from softhooks.trainer.prompt_checks import check_equal, require_trainable_prompt
from softhooks.trainer.ranks import broadcast_from_rank_0, is_single_process, require_same_on_all_ranks
from softhooks.trainer.reference_policy import Reference, require_fixed
