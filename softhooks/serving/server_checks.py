"""Checks that servers with a cache of prefixes have in common: whether a prompt fits the model and the text that a server has."""

from __future__ import annotations

from dataclasses import dataclass

from softhooks.errors import PromptMismatchError, PromptTooLongError, UnsupportedModeError
from softhooks.serving.prompt_folder import FoundPrefix


@dataclass(frozen=True)
class ServedModel:
    """What a server says about the model that it has loaded.

    Attributes:
        server: the server's name.
        model_type: of the text model.
        layers, heads, head_size, vocabulary: the number of layers, of key-value heads, of dimensions of a head, and of tokens.
        window: the sliding window of some layers, or None.
        max_length: the largest number of tokens of a sequence.
        length_option: the server's option that sets it.
    """

    server: str
    model_type: str
    layers: int
    heads: int
    head_size: int
    vocabulary: int
    window: int | None
    max_length: int
    length_option: str

    def require_fit(self, found: FoundPrefix) -> None:
        """Refuse a prompt that was exported for another model, or that sliding windows would hide.

        Raises:
            PromptMismatchError: the base model differs.
            UnsupportedModeError: every token must see the prefix, but a sliding window hides it.
        """
        facts = found.prefix.facts
        compared = {
            "model type": (facts.model_type, self.model_type),
            "layers": (facts.layers, self.layers),
            "key-value heads": (sorted(set(facts.heads)), [self.heads]),
            "size of a head": (sorted({*facts.key_dims, *facts.value_dims}), [self.head_size]),
            "vocabulary": (facts.vocabulary, self.vocabulary),
        }
        differing = {
            name: f"{own} (prompt), {other} (server)" for name, (own, other) in compared.items() if own != other
        }
        if differing:
            raise PromptMismatchError(
                f"the prompt {found.name!r} was exported for another model than the one that the server has loaded.",
                "Export the prompt again: `softhooks export ... --model` must name the model of the server.",
                **differing,
            )
        if not facts.windowed and self.window is not None and self.max_length > self.window:
            raise UnsupportedModeError(
                f"the prompt {found.name!r} ({facts.method}) was trained with windowed=False, but {self.server} applies sliding "
                "windows to prefixes.",
                f"Train it with `windowed=True`, or start {self.server} with `{self.length_option}` of at most {self.window}.",
            )

    def require_room(self, found: FoundPrefix, length: int) -> None:
        """Refuse a text that is too long together with a prompt.

        Args:
            length: the number of tokens of the text.

        Raises:
            PromptTooLongError: no token is left for the answer.
        """
        virtual = found.prefix.facts.num_virtual_tokens
        if virtual + length >= self.max_length:
            raise PromptTooLongError(
                f"the prompt {found.name!r} and the text have {virtual} + {length} tokens, but the server's limit is "
                f"{self.max_length} tokens, of which one must be left for the answer.",
                f"Shorten the text, or start the server with a larger `{self.length_option}`.",
            )
