"""Prompt ensembles: several prompts of one frozen model run in one forward pass, and their outputs are combined."""

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
    """The output of an ensemble of E prompts.

    Attributes:
        predictions: the predicted class of each row, [B], or the predicted next token at each position, [B, T].
        scores: the share of votes, mean logit or mean probability of each class, [B, C] or [B, T, C].
        members: the logits of each prompt, [E, B, C] or [E, B, T, C].
    """

    predictions: Tensor
    scores: Tensor
    members: Tensor


@dataclass(frozen=True)
class EnsembleTexts:
    """The texts that an ensemble generates.

    Attributes:
        texts: for each row, the text that most prompts generate.
        members: for each prompt, the texts of all rows.
    """

    texts: list[str]
    members: list[list[str]]


class PromptEnsemble:
    """Combines the outputs of several prompts of one model.

    One forward pass runs each row of a batch with each prompt. All prompts that `softhooks.rows` can use in one batch can be
    combined; each prompt uses its own head.

    Source: Lester et al. 2021, arXiv:2104.08691, who combine prompts of one task by majority vote.

    Args:
        model: the model with the prompts.
        names: the names of the prompts; None stands for the model without a prompt.
        combine: `vote` chooses the class that most prompts predict; a tie goes to the class with the highest mean
            probability. `logits` and `probabilities` choose the class with the highest mean logit or probability.

    Raises:
        NotAttachedError: one of the names belongs to no attached prompt.
        OptionError: `names` is empty or not a list, or `combine` is invalid.
    """

    def __init__(self, model: nn.Module, names: Sequence[str | None], combine: Combine = "vote") -> None:
        is_list = isinstance(names, Sequence) and not isinstance(names, str) and len(names)
        if not is_list or not all(name is None or isinstance(name, str) for name in names):
            raise OptionError(f"names is {names!r}; it must be a list of one or more prompt names.")
        check_choice("combine", combine, ("vote", "logits", "probabilities"))
        for name in names:
            require_prompted_model(model, name)
        self.model = model
        self.names = list(names)
        self.combine = combine

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> EnsembleOutput:
        """Run a batch and combine the outputs.

        Args:
            inputs: the keyword arguments of the model's forward, without labels.

        Raises:
            OptionError: labels are passed, or the model is a regression model and `combine` is not `logits`.
            UnsupportedModeError: the model's output has no `logits`.
        """
        if inputs.get("labels") is not None:
            raise OptionError("the inputs have labels, but an ensemble computes no loss; leave the labels out.")
        batch, repeated = self._repeat(inputs)
        with rows(self.model, self._each(batch)):
            output = self.model(**{**repeated, "return_dict": True})
        logits = output.get("logits")
        if not isinstance(logits, Tensor):
            raise UnsupportedModeError(
                f"the output of {type(self.model).__name__} has no `logits`, which an ensemble combines.",
                "Run the prompts with `softhooks.rows`, and combine the outputs yourself.",
                model=type(self.model).__name__,
                output=", ".join(output),
            )
        return self._combined(logits.unflatten(0, (len(self.names), batch)))

    @torch.no_grad()
    def generate(self, tokenizer: Any, **inputs: Any) -> EnsembleTexts:
        """Generate text for each row with every prompt, and choose the text that most prompts generate.

        The comparison ignores special tokens and surrounding whitespace. A tie goes to the text of the prompt that comes first
        in `names`.

        Args:
            tokenizer: decodes the texts.
            inputs: the keyword arguments of the model's `generate`.

        Raises:
            OptionError: `num_return_sequences` is not 1, or `return_dict_in_generate` is set.
        """
        if inputs.get("num_return_sequences", 1) != 1 or inputs.get("return_dict_in_generate"):
            raise OptionError(
                "num_return_sequences or return_dict_in_generate is set, but an ensemble returns only one text per row; leave "
                "these options out."
            )
        batch, repeated = self._repeat(inputs)
        with rows(self.model, self._each(batch)):
            found: Tensor = self.model.generate(**repeated)  # type: ignore[operator]
        if not require_prompted_model(self.model).structure.is_encoder_decoder and inputs.get("input_ids") is not None:
            found = found[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]
        members = [texts[start : start + batch] for start in range(0, len(texts), batch)]
        return EnsembleTexts([Counter(written).most_common(1)[0][0] for written in zip(*members, strict=True)], members)

    def _each(self, batch: int) -> list[str | None]:
        return [name for name in self.names for _ in range(batch)]

    def _repeat(self, inputs: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return the number of rows, and the inputs with the batch repeated once for each prompt."""
        first = next((inputs[key] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None), None)
        if not isinstance(first, Tensor):
            raise OptionError(f"the inputs are {sorted(inputs)}; they must include `input_ids` or `inputs_embeds`.")
        batch = first.shape[0]

        def repeat(value: Any) -> Any:
            per_row = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
            return value.repeat(len(self.names), *[1] * (value.dim() - 1)) if per_row else value

        return batch, {key: repeat(value) for key, value in inputs.items()}

    def _combined(self, members: Tensor) -> EnsembleOutput:
        """Combine the prompts' logits, [E, B, ..., C]."""
        if self.combine == "logits":
            scores = members.float().mean(0)
            return EnsembleOutput(scores.argmax(-1), scores, members)
        if members.shape[-1] == 1:
            raise OptionError(
                f"combine={self.combine!r} needs classes, but the model returns one number per row; use 'logits'."
            )
        likely = members.float().softmax(-1).mean(0)
        if self.combine == "probabilities":
            return EnsembleOutput(likely.argmax(-1), likely, members)
        votes = members.argmax(-1).movedim(0, -1)
        ones = torch.ones_like(votes, dtype=likely.dtype)
        shares = torch.zeros_like(likely).scatter_add(-1, votes, ones) / len(self.names)
        # In a tie, the mean probability decides among the classes with the most votes.
        leading = shares == shares.amax(-1, keepdim=True)
        return EnsembleOutput(likely.masked_fill(~leading, -1).argmax(-1), shares, members)
