"""Recording of a prompt's options, files and nearest words in experiment trackers, in addition to its metrics."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from softhooks.errors import TrainerError
from softhooks.integration_support.models import prompted_model_of, soft_prompts_of
from softhooks.prompt import SoftPrompt
from softhooks.similarity import Word, nearest_words

ABOUT = "soft_prompt"
"""The name under which trackers record the prompt."""

WORDS = ("virtual token", "rank", "word", "cosine")
"""The columns of the table of nearest words."""


class PromptTracker(TrainerCallback):
    """Records the prompt that a `SoftPromptCallback` trains; the prompt's metrics are already in the Trainer's logs.

    Subclasses implement `begin`, called before the first step, and `end`, called after the last one.

    Args:
        tokenizer: the model's tokenizer, for a table of the words nearest to each virtual token; if None, there is no table.
        words: the number of nearest words for each virtual token.
    """

    def __init__(self, tokenizer: Any = None, *, words: int = 5) -> None:
        self._tokenizer = tokenizer
        self._words = words

    def begin(self, args: TrainingArguments, state: TrainerState, about: dict[str, Any]) -> None:
        """Record the method, its options and the number of parameters, given as a flat dictionary of plain values."""
        raise NotImplementedError

    def end(self, state: TrainerState, prompt: SoftPrompt, folder: Path, words: list[list[Word]]) -> None:
        """Record the trained prompt.

        Args:
            prompt: the prompt, attached to its model.
            folder: a temporary directory with the prompt's files, as `save_pretrained` writes them.
            words: the words nearest to each virtual token; empty if there is no tokenizer.
        """
        raise NotImplementedError

    # --- events -------------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the words can be computed at the end, and record the options."""
        prompt = _prompt_of(kwargs["model"], type(self).__name__)
        if self._tokenizer is not None:
            nearest_words(prompt, self._tokenizer, self._words)
        if state.is_world_process_zero:
            about = {"method": prompt.method.kind, "parameters": prompt.num_parameters, "injection": prompt.injection}
            self.begin(args, state, about | prompt.method.options())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the trained prompt; all processes take part if the prompt is sharded."""
        prompt = _prompt_of(kwargs["model"], type(self).__name__)
        with tempfile.TemporaryDirectory() as folder:
            prompt.save_pretrained(folder)
            if state.is_world_process_zero:
                words = [] if self._tokenizer is None else nearest_words(prompt, self._tokenizer, self._words)
                self.end(state, prompt, Path(folder), words)


def table_of(words: list[list[Word]]) -> list[tuple[int, int, str, float]]:
    """Return the rows of a table with the columns `WORDS`; virtual tokens and ranks start at 0."""
    return [
        (number, rank, word.token, round(word.cosine, 4))
        for number, row in enumerate(words)
        for rank, word in enumerate(row)
    ]


def _prompt_of(model: Any, asking: str) -> SoftPrompt:
    """Return the prompt that is being trained.

    Raises:
        TrainerError: the model has no prompt.
    """
    prompted = prompted_model_of(model)
    if prompted is None or prompted.active is None:
        raise TrainerError(
            f"{asking} found no prompt on {type(model).__name__}.",
            "Pass `SoftPromptCallback(method)` to the Trainer too.",
        )
    return soft_prompts_of(prompted)[prompted.active]
