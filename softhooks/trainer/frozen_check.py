"""Check during training that the weights of the base model do not change."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from softhooks.base_model.frozen_record import FrozenReport
from softhooks.errors import FrozenModifiedError, OptionError, TrainerError
from softhooks.prompt import SoftPrompt

CheckFrozen = Literal["end", "save", "log"] | bool
Moment = Literal["end", "save", "log"]

_MOMENTS: dict[str, tuple[Moment, ...]] = {"end": ("end",), "save": ("end", "save"), "log": ("end", "save", "log")}
_LOAD_IN_PRECISION = (
    "If `bf16_full_eval` or `fp16_full_eval` is set, evaluating before `train()` converts the model: load it in that precision, "
    "or evaluate after training."
)


class FrozenCheck:
    """Checks that the base has not changed.

    Args:
        asked: when to check, as in `check_frozen` of `SoftPromptCallback`.

    Attributes:
        report: the result of the last check.
    """

    def __init__(self, asked: CheckFrozen) -> None:
        if asked not in (True, False, *_MOMENTS):
            raise OptionError(f"check_frozen is {asked!r}; it must be 'end', 'save', 'log', True or False.")
        self.asked = "save" if asked is True else asked
        self.report: FrozenReport | None = None
        self._last_step = 0

    def begin(self, prompt: SoftPrompt, step: int, remedy: str = _LOAD_IN_PRECISION) -> None:
        """Check before training that no dtype or shape in the base has changed since the prompt was attached."""
        self._last_step = step
        record = prompt.prompted_model.record
        converted = record.converted(prompt.model) if record is not None and self.asked else []
        if converted:
            raise TrainerError(
                f"the dtype or shape of {len(converted)} tensors of the base has changed since the prompt was attached.",
                remedy,
                first=converted[0],
            )

    def check(self, prompt: SoftPrompt, moment: Moment, step: int, rescue: Path | None = None) -> None:
        """Check that the base has not changed, if `check_frozen` asks for a check at this moment.

        Args:
            rescue: the directory to save the prompt to if the base has changed.

        Raises:
            FrozenModifiedError: tensors have changed; the message names them and the steps between which they changed.
        """
        if not isinstance(self.asked, str) or moment not in _MOMENTS[self.asked]:
            return
        record = prompt.prompted_model.record
        assert record is not None, "a prompt that is being trained has a record"
        self.report = None
        where: dict[str, object] = {"when": f"between step {self._last_step} and step {step}"}
        if rescue is not None:
            where["trained_prompt"] = f"saved in {rescue}"
        try:
            self.report = record.verify(prompt.model, **where)
        except FrozenModifiedError:
            if rescue is not None:
                prompt.save_pretrained(rescue)
            raise
        self._last_step = step

    def __str__(self) -> str:
        return f"nothing else changed ({self.report})" if self.asked else "other tensors were not checked"
