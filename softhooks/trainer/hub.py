"""What a Trainer with a prompt pushes to the Hub: the files of the prompt, and its model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from softhooks.base_model.frozen_record import FrozenReport
from softhooks.formats.files import replacing
from softhooks.formats.find import format_of, read
from softhooks.formats.softhooks_files import DESCRIPTION, TENSORS
from softhooks.model_card.card import FILE, CardFacts, FrozenProof
from softhooks.model_card.write import write_card
from softhooks.prompt import SoftPrompt
from softhooks.trainer.checkpoint import saver_of

if TYPE_CHECKING:
    from transformers import Trainer


class PushedPrompt(TrainerCallback):
    """The part of `SoftPromptCallback` that takes part in pushing."""

    soft_prompt: SoftPrompt | None

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy the prompt of the checkpoint that the Trainer is about to push to the directory that it pushes."""
        saver = None if self.soft_prompt is None else saver_of(self.soft_prompt.model)
        if saver is not None and saver.owner is self:
            copy_to_output_dir(args, state)


def copy_to_output_dir(args: TrainingArguments, state: TrainerState) -> None:
    """Copy the prompt from the newest checkpoint to the directory that the Trainer pushes.

    The Trainer itself copies the files of a model or a PEFT adapter, but knows no other names.
    """
    folder = Path(str(args.output_dir))
    checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    if not args.should_save or not (checkpoint / TENSORS).is_file():
        return
    for name in (DESCRIPTION, TENSORS):
        with replacing(folder / name) as part:
            part.write_bytes((checkpoint / name).read_bytes())


def write_trainer_card(trainer: Trainer, prompt: SoftPrompt, report: FrozenReport | None) -> None:
    """Replace the text of the Trainer's model card, and keep its metadata.

    Args:
        report: the last check of the base model.
    """
    folder = Path(str(trainer.args.output_dir))
    if not trainer.is_world_process_zero() or format_of(folder) != "softhooks" or not (folder / FILE).is_file():
        return
    from huggingface_hub import ModelCard

    record = None if report is None else prompt.prompted_model.record
    proof = FrozenProof.of(record, prompt.model, report)
    repo_id = trainer.hub_model_id or trainer.args.hub_model_id or folder.absolute().name
    # Read the file, because the parameters may be sharded, and only one process writes the card.
    facts = CardFacts(read(folder), repo_id, type(prompt.method).__name__, proof, prompt.training_run)
    write_card(facts, folder, ModelCard.load(folder / FILE, ignore_metadata_errors=True))
