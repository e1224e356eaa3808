"""The progress bar of `softhooks train`: one line with the last losses instead of a line for each log."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

_SHOWN = {"loss": "loss", "eval_loss": "validation loss"}


class Progress(ProgressCallback):
    """Shows the steps of the training and the last losses."""

    training_bar: Any

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar at the step from which training resumes."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the losses next to the bar."""
        self._last |= {
            shown: f"{float(logs[name]):.3g}" for name, shown in _SHOWN.items() if name in (logs or {}) and logs
        }
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in self._last.items()))
