"""What a tracker of experiments is told of a prompt beside its curves: what it is, its files, the words that it lies near."""

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
"""Under which name trackers keep it."""

WORDS = ("virtual token", "rank", "word", "cosine")
"""The columns of a table of nearest words."""


class PromptReport(TrainerCallback):
    """Tell a tracker of the prompt that a `SoftPromptCallback` trains. Its curves need no more than that: see `reporting`.

    A subclass says how: `begin` before the first step, `end` after the last one.

    Args:
        tokenizer: the model's tokenizer, for a table of the words nearest to each virtual token; None: no table.
        words: how many words for each.
    """

    def __init__(self, tokenizer: Any = None, *, words: int = 5) -> None:
        self._tokenizer = tokenizer
        self._words = words

    def begin(self, args: TrainingArguments, state: TrainerState, about: dict[str, Any]) -> None:
        """Keep what the prompt is: its method, options and length, as flat names and plain values."""
        raise NotImplementedError

    def end(self, state: TrainerState, prompt: SoftPrompt, folder: Path, words: list[list[Word]]) -> None:
        """Keep the prompt.

        Args:
            prompt: the prompt, still on its model.
            folder: the prompt's files, as `save_pretrained` writes them; gone when this returns.
            words: for each virtual token the words nearest to it; empty without a tokenizer.
        """
        raise NotImplementedError

    # --- events -------------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what could not be told at the end, and say what is trained."""
        prompt = _prompt_of(kwargs["model"], type(self).__name__)
        if self._tokenizer is not None:
            nearest_words(prompt, self._tokenizer, self._words)
        if state.is_world_process_zero:
            about = {"method": prompt.method.kind, "parameters": prompt.num_parameters, "injection": prompt.injection}
            self.begin(args, state, about | prompt.method.options())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand the prompt over; in a sharded model all processes take part in writing it."""
        prompt = _prompt_of(kwargs["model"], type(self).__name__)
        with tempfile.TemporaryDirectory() as folder:
            prompt.save_pretrained(folder)
            if state.is_world_process_zero:
                words = [] if self._tokenizer is None else nearest_words(prompt, self._tokenizer, self._words)
                self.end(state, prompt, Path(folder), words)


def table_of(words: list[list[Word]]) -> list[tuple[int, int, str, float]]:
    """The lines of a table with the columns `WORDS`; virtual tokens and ranks are counted from 0."""
    return [
        (number, rank, word.token, round(word.cosine, 4))
        for number, row in enumerate(words)
        for rank, word in enumerate(row)
    ]


def _prompt_of(model: Any, asking: str) -> SoftPrompt:
    """The prompt that trains.

    Raises:
        TrainerError: there is none.
    """
    prompted = prompted_model_of(model)
    if prompted is None or prompted.active is None:
        raise TrainerError(
            f"{asking} tells a tracker of the prompt that a Trainer trains.",
            "Pass `SoftPromptCallback(method)` to the Trainer too.",
            model=f"{type(model).__name__}, without a prompt",
        )
    return soft_prompts_of(prompted)[prompted.active]
