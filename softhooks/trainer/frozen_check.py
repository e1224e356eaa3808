"""When a Trainer's run proves that nothing but the prompt has moved, and what it says if something has."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from softhooks.base_model.digest import FrozenReport
from softhooks.errors import FrozenModifiedError, OptionError, TrainerError
from softhooks.prompt import SoftPrompt

CheckFrozen = Literal["end", "save", "log"] | bool
Moment = Literal["end", "save", "log"]

_MOMENTS: dict[str, tuple[Moment, ...]] = {"end": ("end",), "save": ("end", "save"), "log": ("end", "save", "log")}


class Proof:
    """The checks of one callback.

    Args:
        asked: the rarest moment to check at: the "end", each "save", each "log"; True means "save", False never.

    Attributes:
        report: what the last check has read.

    Raises:
        OptionError: `asked` is none of these.
    """

    def __init__(self, asked: CheckFrozen) -> None:
        if asked not in (True, False, *_MOMENTS):
            raise OptionError(f"check_frozen must be 'end', 'save', 'log', True or False; it is {asked!r}.")
        self.asked = "save" if asked is True else asked
        self.report: FrozenReport | None = None
        self._proven = 0

    def begin(self, prompt: SoftPrompt, step: int) -> None:
        """Refuse to train on a base that was converted after its record was taken; no bits are read yet.

        Raises:
            TrainerError: naming a tensor.
        """
        self._proven = step
        record = prompt.prompted_model.record
        converted = record.converted(prompt.model) if record is not None and self.asked else []
        if converted:
            raise TrainerError(
                "the base must keep its precision and its shapes from the moment that the prompt is attached.",
                "`bf16_full_eval` and `fp16_full_eval` convert a model that is evaluated outside of a training: load it in "
                "that precision, or evaluate after the training. Lightning's `bf16-true` converts, `bf16-mixed` does not.",
                converted=f"{len(converted)} tensors",
                first=converted[0],
            )

    def check(self, prompt: SoftPrompt, moment: Moment, step: int, rescue: Path | None = None) -> None:
        """Compare the base with its record, if it is asked for at such a moment.

        Args:
            rescue: where to put the prompt before the error ends the run.

        Raises:
            FrozenModifiedError: naming what moved, and between which steps.
        """
        if not isinstance(self.asked, str) or moment not in _MOMENTS[self.asked]:
            return
        record = prompt.prompted_model.record
        assert record is not None, "a prompt that trains has a record"
        self.report = None
        where: dict[str, object] = {"when": f"after step {self._proven}, and found at step {step}"}
        if rescue is not None:
            where["trained_prompt"] = f"saved in {rescue}"
        try:
            self.report = record.verify(prompt.model, **where)
        except FrozenModifiedError:
            if rescue is not None:
                prompt.save_pretrained(rescue)
            raise
        self._proven = step

    def __str__(self) -> str:
        return f"nothing else moved ({self.report})" if self.asked else "whether anything else moved was not checked"
