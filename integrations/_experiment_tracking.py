"""A Trainer callback that records a prompt's options, files and nearest words in an experiment tracker."""

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
"""The columns of a table of nearest words."""


class PromptTracker(TrainerCallback):
    """Records the prompt that a `SoftPromptCallback` trains; the Trainer already logs the prompt's metrics.

    Args:
        tokenizer: the model's tokenizer, to find the words nearest to each virtual token; None to record no words.
        words: the number of nearest words for each virtual token.
    """

    def __init__(self, tokenizer: Any = None, *, words: int = 5) -> None:
        self._tokenizer = tokenizer
        self._words = words

    def begin(self, args: TrainingArguments, state: TrainerState, about: dict[str, Any]) -> None:
        """Record the method and its options before the first step.

        Args:
            about: a dict with the method, its options, the number of parameters and the injection.
        """
        raise NotImplementedError

    def end(self, state: TrainerState, prompt: SoftPrompt, folder: Path, words: list[list[Word]]) -> None:
        """Record the trained prompt after the last step.

        Args:
            folder: a temporary directory with the saved prompt.
            words: the words nearest to each virtual token; empty if there is no tokenizer.
        """
        raise NotImplementedError

    # --- events -------------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the options."""
        prompt = _prompt_of(kwargs["model"], type(self).__name__)
        if self._tokenizer is not None:  # fail before the training rather than after it
            nearest_words(prompt, self._tokenizer, self._words)
        if state.is_world_process_zero:
            about = {"method": prompt.method.kind, "parameters": prompt.num_parameters, "injection": prompt.injection}
            self.begin(args, state, about | prompt.method.options())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the trained prompt."""
        prompt = _prompt_of(kwargs["model"], type(self).__name__)
        with tempfile.TemporaryDirectory() as folder:
            prompt.save_pretrained(folder)  # in every process, because they gather a sharded prompt together
            if state.is_world_process_zero:
                words = [] if self._tokenizer is None else nearest_words(prompt, self._tokenizer, self._words)
                self.end(state, prompt, Path(folder), words)


def table_of(words: list[list[Word]]) -> list[tuple[int, int, str, float]]:
    """Return table rows with the columns `WORDS`; virtual tokens are numbered from 0, and the nearest word has rank 0."""
    return [
        (number, rank, word.token, round(word.cosine, 4))
        for number, row in enumerate(words)
        for rank, word in enumerate(row)
    ]


def _prompt_of(model: Any, asking: str) -> SoftPrompt:
    prompted = prompted_model_of(model)
    if prompted is None or prompted.active is None:
        raise TrainerError(
            f"{asking} found no prompt on {type(model).__name__}.",
            "Pass `SoftPromptCallback(method)` to the Trainer too.",
        )
    return soft_prompts_of(prompted)[prompted.active]
