"""TensorBoard: write a trained prompt to the embedding projector, with its nearest words and its options.

With `report_to="tensorboard"`, the Trainer writes the prompt's metrics even without this callback. The callback replaces the
Trainer's own TensorBoard reporter: it writes all metrics of the Trainer and the options of the method. With a tokenizer, it
also writes, at the end of training:

- the virtual tokens and the words nearest to them, with labels, in the embedding projector (`soft_prompt`);
- a table of these words with their cosines.

These raise an error: `report_to="tensorboard"` in addition to the callback, because every metric would be written twice; a
tokenizer, if the prompt consists of keys and values or the model is sharded.

Versions tested: tensorboard 2.21.0

Example:
    from transformers import Trainer

    from softhooks import PromptTuning, SoftPromptCallback
    from softhooks.integrations.tensorboard import PromptBoard

    callbacks = [SoftPromptCallback(PromptTuning(num_virtual_tokens=20)), PromptBoard(tokenizer, log_dir="runs/prompt")]
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=callbacks)  # args: report_to="none"
    trainer.train()
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from softhooks.errors import SoftHooksError, TrainerError
from softhooks.integration_support.models import embed_ids, rows_of
from softhooks.prompt import SoftPrompt
from softhooks.similarity import Word
from softhooks.switch import disabled

from ._experiment_tracking import ABOUT, WORDS, PromptTracker, table_of

__all__ = ["PromptBoard"]


class PromptBoard(PromptTracker):
    """Writes a prompt's metrics, embeddings and nearest words for TensorBoard.

    Args:
        tokenizer: the model's tokenizer; None to write only metrics and options.
        log_dir: the directory to write to, or None for the directory that the Trainer's own reporter would use.
        words: the number of nearest words for each virtual token.

    Raises:
        SoftHooksError: TensorBoard is not installed.
    """

    def __init__(self, tokenizer: Any = None, *, log_dir: str | Path | None = None, words: int = 5) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise SoftHooksError("TensorBoard is not installed.", 'Install it: pip install "softhooks[tensorboard]".')
        from transformers.integrations.integration_utils import TensorBoardCallback

        super().__init__(tokenizer, words=words)
        self._reporter = TensorBoardCallback()
        if log_dir is not None:
            self._reporter.logging_dir = str(log_dir)
        self._about: dict[str, Any] = {}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse a second reporter for TensorBoard."""
        if "tensorboard" in (args.report_to or []):
            raise TrainerError(
                f"report_to={args.report_to} and PromptBoard would both write the metrics for TensorBoard.",
                "Set report_to='none', remove 'tensorboard' from the list, or remove PromptBoard.",
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the file and write the options."""
        super().on_train_begin(args, state, control, **kwargs)
        self._reporter.on_train_begin(args, state, control, **kwargs)
        if self._reporter.tb_writer is not None:
            text = json.dumps(self._about, indent=2, default=str)
            self._reporter.tb_writer.add_text(ABOUT, f"```json\n{text}\n```", state.global_step)

    def begin(self, args: TrainingArguments, state: TrainerState, about: dict[str, Any]) -> None:
        """Store the options until the file is open."""
        self._about = about

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the metrics."""
        self._reporter.on_log(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write embeddings and words, and close the file."""
        try:
            super().on_train_end(args, state, control, **kwargs)
        finally:
            self._reporter.on_train_end(args, state, control)

    def end(self, state: TrainerState, prompt: SoftPrompt, folder: Path, words: list[list[Word]]) -> None:
        """Write the prompt's embeddings and nearest words, if there is a tokenizer."""
        if not words:
            return
        lines = [WORDS, *table_of(words)]
        cells = ["| " + " | ".join(_plain(cell, "|") for cell in line) + " |" for line in lines]
        cells.insert(1, "|---" * len(WORDS) + "|")
        self._reporter.tb_writer.add_text(f"{ABOUT}/words", "\n".join(cells), state.global_step)

        near = {word.id: word.token for row in words for word in row}
        with disabled(prompt.model):
            known = embed_ids(prompt.prompted_model.structure, list(near)).cpu()
        labels = [(_plain(f"{number}: {row[0].token}"), "virtual token") for number, row in enumerate(words)]
        labels += [(_plain(token), "word") for token in near.values()]
        rows = torch.cat([rows_of(prompt).cpu(), known])
        header = ["token", "kind"]
        self._reporter.tb_writer.add_embedding(rows, labels, None, state.global_step, ABOUT, metadata_header=header)


def _plain(value: Any, *but: str) -> str:
    """Return a label as a non-empty string, with tabs, line breaks and the characters in `but` escaped."""
    text = str(value).encode("unicode_escape").decode() if not str(value).isprintable() else str(value)
    for mark in but:
        text = text.replace(mark, f"\\{mark}")
    return text.strip() or repr(str(value))
