"""The summary of an attached prompt: its size, how it enters the model, and which calls are refused with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from softhooks.backbone.container import is_prompt_key
from softhooks.backbone.heads import can_generate
from softhooks.errors import SoftHooksError
from softhooks.runtime.attached_prompt import AttachedPrompt, Injection
from softhooks.runtime.servable import required_columns

WAYS_IN: dict[Injection, str] = {
    "attention": "keys and values in each attention layer, added in the attention function",
    "written_out": "keys and values in each attention layer, whose attention softhooks computes",
    "cache": "keys and values in each attention layer, added with a read-only cache",
    "shared": "embeddings before the text, run once for all rows and added as keys and values",
    "slots": "embeddings in the sequence (slots), whose states are removed from the outputs",
    "branch": "vectors in each attention layer, added in a gated branch",
}
"""How a prompt enters the model, by `SoftPrompt.injection`."""

_PREFIX_REFUSALS = (
    "flex attention, and packed or paged flash attention",
    "`position_ids` that do not start at the model's own first position",
)
_SLOT_REFUSALS = (
    "packed rows",
    "inputs that refer to positions of the text, and per-token inputs without a known value for a virtual token",
    "images whose tokens attend to each other, if the mask is made outside the text model",
)


@dataclass(frozen=True)
class PromptSummary:
    """A prompt in numbers and words; `print` shows it as a table.

    Attributes:
        name: the name of the prompt on the model.
        method: the method and the options that differ from their defaults.
        model: the class of the model.
        num_virtual_tokens: the number of virtual tokens.
        num_parameters: the number of trained parameters: the prompt, its heads, and trainable parameters of the model.
        model_parameters: the number of parameters of the model without its prompts.
        saved_bytes: the size of the tensors that `save_pretrained` writes.
        injection: how the prompt enters the model; see `SoftPrompt.injection`.
        way_in: the injection in words.
        needs: the batch columns that every call needs.
        refused: what is refused with this prompt on this model.
    """

    name: str
    method: str
    model: str
    num_virtual_tokens: int
    num_parameters: int
    model_parameters: int
    saved_bytes: int
    injection: Injection
    way_in: str
    needs: str
    refused: tuple[str, ...]

    @property
    def share(self) -> float:
        """The number of trained parameters, divided by the number of the model's parameters."""
        return self.num_parameters / max(self.model_parameters, 1)

    def __str__(self) -> str:
        rows = [
            ("prompt", f"{self.name!r}, {self.method}"),
            ("model", f"{self.model}, {self.model_parameters:,} parameters"),
            ("trained", f"{self.num_parameters:,} parameters, {self.share:.4%} of the model's"),
            ("saved", f"{self.saved_bytes:,} bytes"),
            ("enters as", f"{self.way_in} ({self.injection!r})"),
            *([("needs", f"in each call: {self.needs}")] if self.needs else []),
            ("refused", self.refused[0] if self.refused else "nothing in particular"),
            *[("", line) for line in self.refused[1:]],
        ]
        return "\n".join(f"{name:<10} {text}" for name, text in rows)


def summarize(prompt: AttachedPrompt, num_parameters: int, peft_refusal: SoftHooksError | None) -> PromptSummary:
    """Make the summary of an attached prompt.

    Args:
        num_parameters: the number of trained parameters.
        peft_refusal: the error with which the conversion to PEFT is refused, if it is.
    """
    tensors = [*prompt.encoder.folded().values(), *prompt.heads.state_dict().values()]
    if prompt.added is not None:
        tensors += prompt.added.tables().values()
    return PromptSummary(
        name=prompt.name,
        method=str(prompt.method),
        model=type(prompt.model).__name__,
        num_virtual_tokens=prompt.method.num_virtual_tokens,
        num_parameters=num_parameters,
        model_parameters=sum(p.numel() for name, p in prompt.model.named_parameters() if not is_prompt_key(name)),
        saved_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        injection=prompt.injection,
        way_in=WAYS_IN[prompt.injection],
        needs=required_columns(prompt),
        refused=(*_refusals(prompt), *_refusals_elsewhere(prompt, peft_refusal)),
    )


def _refusals(prompt: AttachedPrompt) -> Iterator[str]:
    """Yield the calls of the model that are refused."""
    entry = prompt.structure.entry
    if not prompt.takes_gradients:
        yield "training, because the prompt was loaded without `trainable=True`"
    if prompt.requires_sharing:
        yield "calls with inputs other than text, because the prompt was attached with `injection='shared'`"
    if not prompt.takes_left_padding:
        yield "rows that begin with padding"
    if prompt.injection in ("attention", "written_out", "cache", "shared"):
        yield from _PREFIX_REFUSALS
    if prompt.injection == "slots":
        yield from _SLOT_REFUSALS
        if entry.causal:
            yield "static caches, and caches that are returned to the caller"


def _refusals_elsewhere(prompt: AttachedPrompt, peft_refusal: SoftHooksError | None) -> Iterator[str]:
    """Yield the other libraries and servers in which the prompt cannot be used."""
    if peft_refusal is not None:
        yield f"conversion to PEFT: {str(peft_refusal).splitlines()[0]}"
    if not (prompt.structure.entry.causal and can_generate(prompt.model)):
        return
    if prompt.injection not in ("attention", "shared", "branch") or required_columns(prompt):
        yield "continuous batching (`generate_batch`)"
    if prompt.method.enters != "embeddings" and prompt.injection != "attention":
        yield "vLLM and SGLang"
