"""Find the answer that a text states, and compare answers. The rules are those of PEFT's comparison."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

_INTRODUCTIONS = (
    "The answer is: ",
    "The answer is ",
    "The final answer is: ",
    "The final answer is ",
    "#### ",
)
"""What introduces an answer: the first four in MetaMathQA, the last one in GSM8K. Earlier ones have priority."""


def parse_answer(text: str) -> str | None:
    """Return the answer that a text states last, without signs around the number, or None if it states none."""
    text = text.strip().rstrip(".!?")
    for introduction in _INTRODUCTIONS:
        if introduction in text:
            line, *_ = text.rpartition(introduction)[2].strip().split("\n", 1)
            return line.strip(" .!?$%")
    return None


def number(answer: str) -> float | None:
    """Return the value of a decimal number or a fraction, or None if the answer is neither; `1,000` is not a number."""
    try:
        parts = [Decimal(part.strip()) for part in answer.split("/")]
        if len(parts) > 2:
            return None
        return float(parts[0] if len(parts) == 1 else parts[0] / parts[1])
    except (ArithmeticError, ValueError):
        return None


def is_right(prediction: str, solution: str) -> bool:
    """Return whether a generated text states the answer of a solution: the same number, or else the same text.

    Raises:
        ValueError: the solution states no answer.
    """
    expected = parse_answer(solution)
    if expected is None:
        raise ValueError(f"the solution states no answer: {solution!r}. It must end like '#### 42'.")
    given = parse_answer(prediction)
    return given is not None and _value(given) == _value(expected)


def accuracy(predictions: Sequence[str], solutions: Sequence[str]) -> float:
    """Return the share of right predictions."""
    right = [is_right(prediction, solution) for prediction, solution in zip(predictions, solutions, strict=True)]
    return sum(right) / len(right)


def _value(answer: str) -> float | str:
    found = number(answer)
    return answer if found is None else found
