"""Prompt ensembles: several prompts on one frozen model answer one batch in one forward, and are combined.

Source: Lester et al. 2021, arXiv:2104.08691: prompts trained on one task, a majority vote. An ensemble costs one model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softhooks.errors import OptionError, UnsupportedModeError, check_choice
from softhooks.runtime.prompted_model import require_prompted_model
from softhooks.switch import rows

Combine = Literal["vote", "logits", "probabilities"]


@dataclass(frozen=True)
class EnsembleOutput:
    """What an ensemble answers.

    Attributes:
        predictions: the class (or the next token) chosen, [B] or [B, T].
        scores: the share of votes, or the mean of the logits or of the probabilities, [B, C] or [B, T, C].
        members: each prompt's own logits, [E, B, C] or [E, B, T, C].
    """

    predictions: Tensor
    scores: Tensor
    members: Tensor


@dataclass(frozen=True)
class EnsembleTexts:
    """What an ensemble writes.

    Attributes:
        texts: the text that most prompts write, for each row.
        members: each prompt's own texts.
    """

    texts: list[str]
    members: list[list[str]]


class PromptEnsemble:
    """Several prompts of one model that answer together.

    Each row of a batch is run once for each prompt, all in one forward, and the answers are combined: by majority vote, as in the
    paper, or by the mean of the logits or of the probabilities. Where a vote is even, the mean probability decides among those
    that lead. The prompts may be of any methods that can stand in one batch (`rows`), each with a head of its own.

    Args:
        model: carries the prompts.
        names: of the prompts; None among them is the bare model.
        combine: `vote`, `logits` or `probabilities`.

    Raises:
        NotAttachedError: the model carries no prompt of one of the names.
        OptionError: no prompt is named, or `combine` is none of the three.
    """

    def __init__(self, model: nn.Module, names: Sequence[str | None], combine: Combine = "vote") -> None:
        is_list = isinstance(names, Sequence) and not isinstance(names, str) and len(names)
        if not is_list or not all(name is None or isinstance(name, str) for name in names):
            raise OptionError(f"an ensemble must name its prompts in a list, one or more; it is {names!r}.")
        check_choice("combine", combine, ("vote", "logits", "probabilities"))
        for name in names:
            require_prompted_model(model, name)
        self.model = model
        self.names = list(names)
        self.combine = combine

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> EnsembleOutput:
        """Answer a batch.

        Args:
            inputs: of the model's forward, by name, without labels.

        Raises:
            OptionError: labels are among them, or one-number outputs are to be voted on.
            UnsupportedModeError: the model's output has no `logits`.
        """
        if inputs.get("labels") is not None:
            raise OptionError("an ensemble answers and has no loss; pass the inputs without labels.")
        batch, repeated = self._repeat(inputs)
        with rows(self.model, self._each(batch)):
            output = self.model(**{**repeated, "return_dict": True})
        logits = output.get("logits")
        if not isinstance(logits, Tensor):
            raise UnsupportedModeError(
                "an ensemble combines the `logits` of a model.",
                "Run the prompts with `softhooks.rows` and combine what the model returns.",
                model=type(self.model).__name__,
                output=", ".join(output),
            )
        return self._combined(logits.unflatten(0, (len(self.names), batch)))

    @torch.no_grad()
    def generate(self, tokenizer: Any, **inputs: Any) -> EnsembleTexts:
        """Let every prompt continue the texts, and keep for each row the text that most of them write.

        Texts are compared without special tokens and the blanks around them; where as many prompts write one as another, the
        prompt that is named first decides.

        Args:
            tokenizer: decodes what is generated.
            inputs: of the model's `generate`, by name, with its options.

        Raises:
            OptionError: several sequences a row, or a dictionary, are asked for.
        """
        if inputs.get("num_return_sequences", 1) != 1 or inputs.get("return_dict_in_generate"):
            raise OptionError(
                "each prompt of an ensemble writes one text a row; ask for no more and for no dictionary."
            )
        batch, repeated = self._repeat(inputs)
        with rows(self.model, self._each(batch)):
            found: Tensor = self.model.generate(**repeated)  # type: ignore[operator]
        if not require_prompted_model(self.model).structure.is_encoder_decoder and inputs.get("input_ids") is not None:
            found = found[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]
        members = [texts[start : start + batch] for start in range(0, len(texts), batch)]
        return EnsembleTexts([Counter(written).most_common(1)[0][0] for written in zip(*members, strict=True)], members)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _each(self, batch: int) -> list[str | None]:
        return [name for name in self.names for _ in range(batch)]

    def _repeat(self, inputs: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Repeat every row once for each prompt: all rows of the first, then all of the second. -> batch and inputs."""
        first = next((inputs[key] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None), None)
        if not isinstance(first, Tensor):
            raise OptionError(f"an ensemble needs `input_ids` or `inputs_embeds`; it is given {sorted(inputs)}.")
        batch = first.shape[0]

        def repeat(value: Any) -> Any:
            per_row = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
            return value.repeat(len(self.names), *[1] * (value.dim() - 1)) if per_row else value

        return batch, {key: repeat(value) for key, value in inputs.items()}

    # --- answers ------------------------------------------------------------------------------------------------------

    def _combined(self, members: Tensor) -> EnsembleOutput:
        """Combine the prompts' logits, [E, B, ..., C]."""
        if self.combine == "logits":
            scores = members.float().mean(0)
            return EnsembleOutput(scores.argmax(-1), scores, members)
        if members.shape[-1] == 1:
            raise OptionError(f"combine={self.combine!r} needs classes; the model gives one number, so use 'logits'.")
        likely = members.float().softmax(-1).mean(0)
        if self.combine == "probabilities":
            return EnsembleOutput(likely.argmax(-1), likely, members)
        cast = members.argmax(-1).movedim(0, -1)
        ones = torch.ones_like(cast, dtype=likely.dtype)
        shares = torch.zeros_like(likely).scatter_add(-1, cast, ones) / len(self.names)
        leading = shares == shares.amax(-1, keepdim=True)
        return EnsembleOutput(likely.masked_fill(~leading, -1).argmax(-1), shares, members)
