"""Classes as words: the loss of few-shot tuning, over the words' logits at the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.errors import OptionError
from softhooks.layout.tokenizing import IGNORE_INDEX


class Verbalizer:
    """Classes as words of the vocabulary: cross-entropy over their logits where the word belongs.

    Pass it to a Trainer as `compute_loss_func`, or call it in a loop with the model's output and the labels. Labels have one
    entry a token: the word's id where it belongs, -100 elsewhere, as `Layout.mapper(..., verbalizer=)` or `labels` makes them.

    Source: Liu et al. 2021, arXiv:2103.10385, few-shot setting. Differs: nothing.

    Args:
        words: the word of each class, in order; one token each, as it stands behind a blank, or its id.
        tokenizer: the model's, or its name.
        causal: the word is predicted by the token before it, in a language model, and not at a mask.

    Raises:
        OptionError: a word is not one token, or two classes have the same.
    """

    def __init__(self, words: Sequence[str | int], tokenizer: Any = None, *, causal: bool = False) -> None:
        if isinstance(words, str) or len(words) < 2:
            raise OptionError(f"a verbalizer needs a list of one word a class, two or more; it is given {words!r}.")
        if isinstance(tokenizer, str):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.words = list(words)
        self.causal = causal
        self.ids = [_token_of(word, tokenizer) for word in words]
        self._mask_id: int | None = getattr(tokenizer, "mask_token_id", None)
        if len(set(self.ids)) < len(self.ids):
            raise OptionError(f"classes must have different words; {self.words} are the tokens {self.ids}.")

    def token(self, label: Any) -> int:
        """The id of a class's word.

        Raises:
            OptionError: there is no such class.
        """
        if not isinstance(label, int) or not 0 <= label < len(self.ids):
            raise OptionError(f"a label must be a class from 0 to {len(self.ids) - 1}; it is {label!r}.")
        return self.ids[label]

    def labels(self, input_ids: Tensor, classes: Tensor) -> Tensor:
        """Put each row's word where its mask stands, and -100 elsewhere. [B, T], [B] -> [B, T]."""
        at = self._masks(input_ids)
        words = torch.tensor([self.token(int(label)) for label in classes], device=input_ids.device)
        return torch.full_like(input_ids, IGNORE_INDEX).masked_scatter(at, words.to(input_ids.dtype))

    def scores(self, logits: Tensor, input_ids: Tensor) -> Tensor:
        """The logits of each class at the mask. [B, T, V], [B, T] -> [B, C]."""
        return logits[self._masks(input_ids)][:, self.ids]

    def scores_at_labels(self, logits: Any, labels: Any) -> Tensor:
        """The logits of each class where a row's label stands; a Trainer's `preprocess_logits_for_metrics`.

        A Trainer then gathers C numbers a row and not those of the whole vocabulary, and `trainer.predict(rows).predictions` are
        the classes' scores.

        Args:
            logits: the model's; of several outputs, the first.
            labels: one label a row that is not -100.

        Raises:
            OptionError: a row has no label, or several.

        Shape:
            [B, T, V], [B, T] -> [B, C]
        """
        logits = torch.as_tensor(logits[0] if isinstance(logits, (tuple, list)) else logits)
        labels = torch.as_tensor(labels)
        if self.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        scores: Tensor = logits[_places(labels)][:, self.ids]
        return scores

    def classes(self, labels: Any) -> Tensor:
        """The class of each row's label, for `compute_metrics`. [B, T] -> [B].

        Raises:
            OptionError: a row has no label, or several, or one that is the word of no class.
        """
        labels = torch.as_tensor(labels)
        return self._class_of(labels[_places(labels)])

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The mean loss over the places that labels name; the sum by `num_items_in_batch`, where the Trainer counts them.

        Raises:
            OptionError: a label is the word of no class.
        """
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if self.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        at = labels != IGNORE_INDEX
        words = torch.tensor(self.ids, device=labels.device)
        wanted = self._class_of(labels[at])
        total = functional.cross_entropy(logits[at][:, words].float(), wanted, reduction="sum")
        count = at.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=total.device)
        return total / count

    def _class_of(self, labels: Tensor) -> Tensor:
        """The classes whose words these ids are. [N] -> [N]."""
        matches = labels[:, None] == torch.tensor(self.ids, device=labels.device)
        if not bool(matches.any(-1).all()):
            unknown = sorted(set(labels[~matches.any(-1)].tolist()))
            raise OptionError(
                "every label must be the word of a class, or -100.",
                "Make labels with `Layout.mapper(..., verbalizer=)`, or with `Verbalizer.labels`.",
                labels=unknown,
                words=dict(zip(self.words, self.ids, strict=True)),
            )
        return matches.long().argmax(-1)

    def _masks(self, input_ids: Tensor) -> Tensor:
        if self._mask_id is None:
            raise OptionError("the mask is found by the tokenizer's mask token; it has none.")
        at = input_ids == self._mask_id
        wrong = (at.sum(-1) != 1).nonzero()[:, 0].tolist()
        if wrong:
            raise OptionError(
                "every row must hold the mask once.",
                "Put one {mask} into the template, and none into the text.",
                rows=", ".join(map(str, wrong)),
                masks=at.sum(-1)[wrong].tolist(),
            )
        return at


def _places(labels: Tensor) -> Tensor:
    """Where labels stand, once in every row. [B, T] -> [B, T] bool."""
    at = labels != IGNORE_INDEX
    wrong = (at.sum(-1) != 1).nonzero()[:, 0].tolist()
    if wrong:
        raise OptionError(
            "every row must have one label that is not -100: the word of its class.",
            "Make labels with `Layout.mapper(..., verbalizer=)`; for rows without a class, ask "
            "`verbalizer.scores(logits, input_ids)`.",
            rows=", ".join(map(str, wrong)),
            labels=at.sum(-1)[wrong].tolist(),
        )
    return at


def _token_of(word: str | int, tokenizer: Any) -> int:
    if isinstance(word, int) and not isinstance(word, bool):
        return word
    if tokenizer is None or not isinstance(word, str):
        raise OptionError(f"a verbalizer's word must be text, with a tokenizer, or an id; it is {word!r}.")
    from softhooks.layout.rendering import encode

    ids = encode(f" {word}", tokenizer)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise OptionError(
            "a verbalizer's word must be one token.",
            "Choose another word, or give the id of a token.",
            word=repr(word),
            tokens=tokenizer.convert_ids_to_tokens(ids),
        )
    return ids[0]
