"""What is examined, and what is found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["right", "refused", "wrong"]


@dataclass(frozen=True)
class Case:
    """One architecture with one head.

    Attributes:
        task: the name of a task, such as `causal`; see `modalities`.
        arch: the `model_type` of the config.
        changes: attributes of the config to set.
        brings: inputs of each forward besides those of the task: `token_type_ids`, `encoder_hidden_states`.
    """

    task: str
    arch: str
    changes: tuple[tuple[str, Any], ...] = ()
    brings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join([self.arch, self.task, *(name for name, _ in self.changes), *self.brings])


@dataclass
class Row:
    """The findings on one kind of prompt on one model.

    Attributes:
        refusal: the error of attach, if it refused.
        injection: how the prompt enters the model, if it was attached.
        wrong: the checks that do not hold, by name, with a sentence each.
        unsupported: the checks whose calls are refused by name (`UnsupportedModeError`), with the sentence.
        checked: the names of all checks that were made.
    """

    refusal: str = ""
    injection: str = ""
    wrong: dict[str, str] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """Right, refused at attach, or wrong."""
        if self.wrong:
            return "wrong"
        return "refused" if self.refusal else "right"

    def as_json(self) -> dict[str, Any]:
        """The row as plain data, without what is empty."""
        return {"verdict": self.verdict} | {name: value for name, value in vars(self).items() if value}

    def __str__(self) -> str:
        if self.wrong:
            return f"wrong ({self.injection or 'not attached'}): " + "; ".join(
                f"{check}: {sentence}" for check, sentence in self.wrong.items()
            )
        return f"refused: {self.refusal}" if self.refusal else f"right ({self.injection})"


class NotBuiltError(Exception):
    """There is no tiny model of an architecture, or it does not run on the example by itself."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())[:limit]
