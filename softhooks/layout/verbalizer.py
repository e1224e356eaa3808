"""`Verbalizer`, which represents each class by a word and computes a loss over the logits of these words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softhooks.errors import OptionError
from softhooks.layout.rendering import encode
from softhooks.layout.tokenizing import IGNORE_INDEX, tokenizer_of


class Verbalizer:
    """Represents each class by a word. The loss is the cross-entropy over the logits of these words.

    Pass a verbalizer to a Trainer as `compute_loss_func`, or call it in your own loop with the model's output and the labels. In
    each row, the label at the mask (with `causal`, at the word itself) is the id of the word of the row's class, and all other
    labels are -100. `Layout.mapper(..., verbalizer=)` makes such labels and, for masks, so does `Verbalizer.labels`.

    Source: Liu et al. 2021, arXiv:2103.10385, few-shot setting.

    Args:
        words: for each class, a token id, or a word that is a single token when a space precedes it.
        tokenizer: the model's tokenizer or its name.
        causal: True for a causal language model, which predicts the word at the preceding token; False for a masked language
            model, which predicts it at the mask token.

    Raises:
        OptionError: a word is not a single token, or two classes have the same word.
    """

    def __init__(self, words: Sequence[str | int], tokenizer: Any = None, *, causal: bool = False) -> None:
        if isinstance(words, str) or len(words) < 2:
            raise OptionError(f"words is {words!r}; it must be a list of two or more words, one for each class.")
        tokenizer = tokenizer_of(tokenizer)
        self.words = list(words)
        self.causal = causal
        self.ids = [_token_of(word, tokenizer) for word in words]
        self._mask_id: int | None = getattr(tokenizer, "mask_token_id", None)
        if len(set(self.ids)) < len(self.ids):
            raise OptionError(f"the words {self.words} have the ids {self.ids}; each class must have its own word.")

    def token(self, label: Any) -> int:
        """Return the id of a class's word.

        Raises:
            OptionError: the class does not exist.
        """
        if not isinstance(label, int) or not 0 <= label < len(self.ids):
            raise OptionError(
                f"the label is {label!r}; it must be a class from 0 to {len(self.ids) - 1}.",
                "Replace each label by the index of its word in the verbalizer's list.",
                words=dict(enumerate(self.words)),
            )
        return self.ids[label]

    def labels(self, input_ids: Tensor, classes: Tensor) -> Tensor:
        """Return labels with the id of the class's word at each row's mask, and -100 elsewhere. [B, T], [B] -> [B, T]."""
        at = self._masks(input_ids)
        words = torch.tensor([self.token(int(label)) for label in classes], device=input_ids.device)
        return torch.full_like(input_ids, IGNORE_INDEX).masked_scatter(at, words.to(input_ids.dtype))

    def scores(self, logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits of the classes' words for rows without a class.

        Args:
            logits: the model's logits, [B, T, V].
            input_ids: the ids of the rows, [B, T]. With `causal`, each row ends before the word.
            attention_mask: 0 at padding, [B, T]; required with `causal`, which predicts the word at each row's last token.

        Returns:
            the scores, [B, C].

        Raises:
            OptionError: a row does not have exactly one mask, or `attention_mask` is missing.
        """
        scores: Tensor = logits[self._last(attention_mask) if self.causal else self._masks(input_ids)][:, self.ids]
        return scores

    def scores_at_labels(self, logits: Any, labels: Any) -> Tensor:
        """Return the logits of the classes' words at each row's label, for a Trainer's `preprocess_logits_for_metrics`.

        The Trainer then gathers only the C scores of each row instead of the logits of the whole vocabulary, and
        `trainer.predict(rows).predictions` are these scores.

        Args:
            logits: the model's logits, [B, T, V], or a tuple that starts with them.
            labels: the labels, [B, T]; exactly one label in each row is not -100.

        Returns:
            the scores, [B, C].

        Raises:
            OptionError: a row has no label, or several.
        """
        logits = torch.as_tensor(logits[0] if isinstance(logits, (tuple, list)) else logits)
        labels = torch.as_tensor(labels)
        if self.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        scores: Tensor = logits[_labels_at(labels)][:, self.ids]
        return scores

    def classes(self, labels: Any) -> Tensor:
        """Return the class of each row's label, for `compute_metrics`. [B, T] -> [B].

        Raises:
            OptionError: a row has no label, several labels, or a label that is not the id of a class's word.
        """
        labels = torch.as_tensor(labels)
        return self._class_of(labels[_labels_at(labels)])

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Compute the loss: the mean over the labels, or the sum divided by `num_items_in_batch` if a Trainer passes it.

        Raises:
            OptionError: there are no labels, or a label is not the id of a class's word.
        """
        if labels is None:
            raise OptionError(
                "the batch has no `labels`, so the verbalizer cannot compute a loss.",
                "Make labels with `Layout.mapper(..., verbalizer=)`, from a column with the class of each row.",
            )
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
        """Return the class of each word id. [N] -> [N]."""
        matches = labels[:, None] == torch.tensor(self.ids, device=labels.device)
        if not bool(matches.any(-1).all()):
            unknown = sorted(set(labels[~matches.any(-1)].tolist()))
            raise OptionError(
                f"the labels contain {unknown}; each label must be the id of a class's word, or -100.",
                "Make labels with `Layout.mapper(..., verbalizer=)`, or with `Verbalizer.labels`.",
                words=dict(zip(self.words, self.ids, strict=True)),
            )
        return matches.long().argmax(-1)

    def _masks(self, input_ids: Tensor) -> Tensor:
        if self._mask_id is None:
            raise OptionError(
                "the verbalizer has no tokenizer with a mask token, so it cannot find the mask of a row.",
                "Pass `tokenizer=`; or, for a causal language model, make the verbalizer with `causal=True`.",
            )
        remedy = "Write one {mask} in the template, and no mask tokens in the text."
        return _one_per_row(input_ids == self._mask_id, "mask", remedy)

    @staticmethod
    def _last(attention_mask: Tensor | None) -> Tensor:
        """Return a mask that is True at each row's last token. [B, T] -> [B, T] bool."""
        if attention_mask is None:
            raise OptionError(
                "`attention_mask` is missing; a verbalizer with `causal=True` needs it to find the last token of each row.",
                "Call `verbalizer.scores(logits, batch['input_ids'], batch['attention_mask'])`.",
            )
        attended = attention_mask.bool()
        return attended & (attended.flip(-1).cumsum(-1).flip(-1) == 1)


def _labels_at(labels: Tensor) -> Tensor:
    """Return a mask that is True at each row's only label. [B, T] -> [B, T] bool."""
    remedy = (
        "Make labels with `Layout.mapper(..., verbalizer=)`; for rows without a class, use "
        "`verbalizer.scores(logits, input_ids, attention_mask)`."
    )
    return _one_per_row(labels != IGNORE_INDEX, "label that is not -100", remedy)


def _one_per_row(found: Tensor, name: str, remedy: str) -> Tensor:
    counts = found.sum(-1)
    wrong = (counts != 1).nonzero()[:, 0].tolist()
    if wrong:
        raise OptionError(
            f"some rows of the batch do not have exactly one {name}.",
            remedy,
            rows=", ".join(map(str, wrong)),
            found=counts[wrong].tolist(),
        )
    return found


def _token_of(word: str | int, tokenizer: Any) -> int:
    if isinstance(word, int) and not isinstance(word, bool):
        return word
    if tokenizer is None or not isinstance(word, str):
        raise OptionError(
            f"the word of a class is {word!r}; it must be a token id, or a string if a tokenizer is given."
        )
    ids = encode(f" {word}", tokenizer)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise OptionError(
            f"the tokenizer encodes {word!r} as {tokenizer.convert_ids_to_tokens(ids)}; the word of a class must be a single "
            "known token.",
            "Choose another word, or pass a token id.",
        )
    return ids[0]
