"""What a saved prompt does on its base model: the words nearest to it, and how much attention it gets in each layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softhooks.analysis.load_base import load_base
from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.backbone.word_embeddings import embed_ids
from softhooks.errors import CheckpointError, SoftHooksError
from softhooks.formats.stored import StoredPrompt
from softhooks.load import attach_stored
from softhooks.prompt import SoftPrompt
from softhooks.prompt_encoder import EMBEDDINGS
from softhooks.similarity import nearest_words
from softhooks.switch import disabled

TEXT = "The committee met on Tuesday to discuss the report, which everyone had read with great interest."
"""The text on which attention is measured by default."""

_OUTPUTS = {
    "attentions": "self-attention",
    "encoder_attentions": "self-attention of the encoder",
    "decoder_attentions": "self-attention of the decoder",
    "cross_attentions": "cross-attention of the decoder",
}
_ZERO = 1e-5  # rounding of the sum of a row


class PromptOnBase:
    """A saved prompt that is loaded onto its base model.

    Args:
        stored: the prompt.
        base: the directory of the base model, or its name on the Hub.
        strict: as in `load`.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded.
        PromptMismatchError: the prompt does not fit the model.
    """

    def __init__(self, stored: StoredPrompt, base: str, *, strict: bool) -> None:
        from transformers import AutoTokenizer

        self.stored = stored
        model = load_base(stored, base, "--model", local=False, attn_implementation="eager")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{base}, given as `--model`, has no tokenizer that can be loaded.",
                "Save the tokenizer next to the model.",
                error=" ".join(str(error).split())[:300],
            ) from error
        self.prompt: SoftPrompt = attach_stored(model, stored, "default", strict=strict)

    def facts(self, words: int, text: str) -> dict[str, Any]:
        """Return the nearest words, the attention by layer, and how the prompt enters.

        Args:
            words: the number of words for each virtual token.
            text: the text on which attention is measured.
        """
        attention, reason = self.attention(text)
        return {
            "injection": self.prompt.injection,
            "model_parameters": self.prompt.summary().model_parameters,
            "nearest_words": self.words(words),
            "attention": attention,
            "attention_not_measured": reason,
            "text": text,
        }

    def words(self, count: int) -> list[list[dict[str, Any]]] | None:
        """Return the nearest words of each virtual token; None if the prompt does not consist of embeddings."""
        if set(self.stored.tables) != {EMBEDDINGS}:
            return None
        found = nearest_words(self.prompt, self.tokenizer, count)
        return [[{"token": word.token, "id": word.id, "cosine": word.cosine} for word in row] for row in found]

    def start_rows(self) -> Tensor | None:
        """Return the embeddings of the words that initialized the prompt, [P, H], if their ids are saved with it."""
        ids = self.stored.conventions.get(BUFFER)
        if not isinstance(ids, list) or set(self.stored.tables) != {EMBEDDINGS}:
            return None
        with disabled(self.prompt.model):
            return embed_ids(self.prompt.prompted_model.structure, torch.tensor(ids))

    @torch.no_grad()
    def attention(self, text: str) -> tuple[dict[str, list[float]] | None, str | None]:
        """Return the share of attention that goes to the prompt, by layer, and the reason if it cannot be measured.

        The share is the mean over heads and tokens of the text. The attentions that a model returns contain only the text, so the
        rest of each row of weights belongs to the prompt.
        """
        if self.prompt.injection == "branch":
            return None, "a gated branch has its own softmax; see the gates"
        encoded = self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        call = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        if self.prompt.structure.is_encoder_decoder:
            call["decoder_input_ids"] = encoded["input_ids"]
        try:
            output: Any = self.prompt.model(**call, output_attentions=True)
        except SoftHooksError as error:
            return None, str(error).splitlines()[0]
        shares = {}
        for name, title in _OUTPUTS.items():
            layers = [weights for weights in getattr(output, name, None) or () if weights is not None]
            if layers:
                shares[title] = [max(float((1 - weights.float().sum(-1)).mean()), 0.0) for weights in layers]
        entered = {title: found for title, found in shares.items() if max(found) > _ZERO}
        return (entered, None) if entered else (None, "the model does not return its attention weights")
