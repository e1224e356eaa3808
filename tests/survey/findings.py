"""Findings on one model: for each kind of prompt whether it is right, refused, or wrong and in what."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import real_words
import torch

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, SoftHooksError, UnsupportedModeError
from softhooks.runtime.prompted_model import prompted_model_of
from tests.survey import checks, models
from tests.survey.checks import ROUNDING, VIRTUAL, Text

KINDS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: PromptTuning(VIRTUAL, init="random"),
    "prefix": lambda: PrefixTuning(VIRTUAL, init="random"),
    "adapter": lambda: LlamaAdapter(VIRTUAL),
}
"""Embedding rows, keys and values, a gated branch: the kinds of prompt."""

PER_TOKEN = ("causal", "masked", "tokens", "qa", "image_text")


@dataclass(frozen=True)
class Case:
    """One architecture with one head.

    Attributes:
        changes: attributes of its config to set.
        brings: what each forward brings besides ids and mask.
    """

    task: str
    arch: str
    changes: tuple[tuple[str, Any], ...] = ()
    brings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join([self.arch, self.task, *(name for name, _ in self.changes), *self.brings])

    def build(self) -> Any:
        """Make the model."""
        return models.build(self.arch, self.task, **dict(self.changes))


@dataclass
class Finding:
    """The finding on one kind of prompt.

    Attributes:
        refusal: the error of attach, if it refused.
        injection: the injection of the prompt, if it was attached.
        wrong: the checks that do not hold, in words.
    """

    refusal: str = ""
    injection: str = ""
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.refusal:
            return f"refused: {self.refusal}"
        return f"{self.injection}: {'; '.join(self.wrong) or 'right'}"


def examine(case: Case) -> dict[str, Finding]:
    """Try every kind of prompt on a model."""
    model = case.build()
    text = checks.text_for(model, case.task, case.brings)
    bare = checks.answer(model, text.call())
    findings = {}
    for kind, make in KINDS.items():
        finding = findings[kind] = Finding()
        try:
            prompt = softhooks.attach(model, make())
        except SoftHooksError as error:
            finding.refusal = " ".join(str(error).split())
            continue
        with prompt:
            finding.injection = prompt.injection
            checks.loud(prompt)
            finding.wrong += _while_attached(case, model, prompt, text)
        if not torch.equal(checks.answer(model, text.call()), bare):
            finding.wrong.append("the model is another after the prompt was removed")
        finding.wrong += _real_words(case, model, kind, text)
    return findings


def _while_attached(case: Case, model: Any, prompt: Any, text: Text) -> Iterator[str]:
    """Run the checks that need the attached prompt; return those that fail."""
    if checks.effect(model, text) < 1e-4:
        yield "the prompt does not move the output"
    yield from checks.dead(model, prompt, text, unread=_unread(model, prompt))
    yield from _padding(case, model, prompt, text)
    if case.task in PER_TOKEN:
        yield from _reach(model, text)
    if prompt.method.kind == "prompt_tuning" and case.task in PER_TOKEN and _takes_embeddings(model, text):
        gap = checks.by_hand(model, prompt, text)
        if gap > ROUNDING:
            yield f"differs by {gap:.1g} from its rows written before the text"
    if case.task == "causal" and hasattr(model, "generate") and not case.brings and not _selects_keys(model):
        with softhooks.disabled(model):
            bare = max(_cached(model, text), _cached(model, _longer(text)))
        if bare <= ROUNDING and (gap := checks.cached(model, text)) > ROUNDING:
            yield f"decoding with a cache differs by {gap:.1g}"


def _unread(model: Any, prompt: Any) -> int:
    """The number of a prefix's columns that reach no output: LiLT's last layer computes layout states that nothing reads."""
    ratio = getattr(model.config, "channel_shrink_ratio", None)
    return 0 if ratio is None or prompt.injection != "written_out" else int(model.config.hidden_size // ratio)


def _padding(case: Case, model: Any, prompt: Any, text: Text) -> Iterator[str]:
    """Check padding that only the mask describes.

    Not where the bare model reads padding whatever the mask says (FNet, convolutions), and on the left not where it pools the
    first column, which padding then is, makes its decoder's ids of the text's (BART with a classifier), or looks for the question
    among the first columns (BigBird).
    """
    if not _heeds_masks(model, text):
        return
    structure = prompt.prompted_model.structure
    pools_first = case.task == "sequence" and not structure.entry.causal
    copies_text = structure.is_encoder_decoder and case.task != "seq2seq"
    reads_question = case.task == "qa" and hasattr(model, "prepare_question_mask")
    for side in ("right",) if pools_first or copies_text or reads_question else ("left", "right"):
        try:
            moved = checks.padding(model, text, side, _pad(model))
        except UnsupportedModeError:
            continue  # refused by name
        if moved > ROUNDING:
            yield f"padding on the {side} moves the output by {moved:.1g}"


def _heeds_masks(model: Any, text: Text) -> bool:
    """Whether masked padding changes nothing in the bare model, at the lengths with and without a prompt.

    On the right at least. Attention that keeps the best few keys (`index_topk`) may keep padding among them.
    """
    if _selects_keys(model):
        return False
    with softhooks.disabled(model) if prompted_model_of(model) else contextlib.nullcontext():
        return all(checks.padding(model, one, "right", _pad(model)) <= ROUNDING for one in (text, _longer(text)))


def _selects_keys(model: Any) -> bool:
    return getattr(model.config.get_text_config(), "index_topk", None) is not None


def _longer(text: Text) -> Text:
    """The text with at least as many more columns as a prompt would add."""
    extra = dict(text.extra)
    if "token_type_ids" in extra:
        extra["token_type_ids"] = torch.nn.functional.pad(extra["token_type_ids"], (0, 2 * VIRTUAL))
    return Text(torch.cat([text.ids, text.ids[:, : 2 * VIRTUAL]], dim=1), extra)


def _pad(model: Any) -> int:
    return getattr(model.config.get_text_config(), "pad_token_id", 0) or 0


def _cached(model: Any, text: Text) -> float:
    """The bare model's own gap between decoding and one forward; infinite where it has no cache of this kind."""
    with contextlib.suppress(Exception):  # whatever a bare model says, it has nothing to compare with
        return checks.cached(model, text)
    return float("inf")


def _reach(model: Any, text: Text) -> Iterator[str]:
    """Compare the influence of the last word with its influence in the bare model."""
    with softhooks.disabled(model):
        bare, _ = checks.reach(model, text)
    earlier, own = checks.reach(model, text)
    if bare == 0 and earlier > 1e-6:
        yield f"an earlier token moves by {earlier:.1g} with a later one"
    if bare > 1e-3 and earlier < 1e-6:
        yield "an earlier token no longer sees a later one"
    if own < 1e-6:
        yield "the last token's output does not depend on it"


def _takes_embeddings(model: Any, text: Text) -> bool:
    """Whether the bare model computes the same from a text's embeddings as from its ids, and accepts other embeddings."""
    with softhooks.disabled(model), torch.no_grad():
        own = model.get_input_embeddings()(text.ids)
        call = {"attention_mask": torch.ones_like(text.ids), **text.extra}
        try:
            checks.answer(model, call | {"inputs_embeds": own + 0.1})
            return (
                checks.gap(checks.answer(model, call | {"inputs_embeds": own}), checks.answer(model, text.call()))
                < ROUNDING
            )
        except Exception:  # noqa: BLE001 - it does not, whatever it says
            return False


def _real_words(case: Case, model: Any, kind: str, text: Text) -> Iterator[str]:
    """Compare a prompt of real words with these words in the text, also after padding."""
    compare = {"prompt": real_words.front_gap, "prefix": real_words.prefix_gap}.get(kind)
    if compare is None or case.brings or case.task not in PER_TOKEN or (kind == "prefix" and _is_apart(case, model)):
        return
    if case.task == "qa" and hasattr(model, "prepare_question_mask"):  # its first words are the question
        return
    for left in (0, 3) if _heeds_masks(model, text) else (0,):
        try:
            gap = compare(model, text.ids[:1], VIRTUAL, left=left)
        except UnsupportedModeError:
            continue  # refused by name
        if gap > ROUNDING:
            yield f"real words as a {kind} differ by {gap:.1g} from themselves ({left} columns of padding)"


def _is_apart(case: Case, model: Any) -> bool:
    """Whether a prefix differs from words by definition, or cannot be compared with them.

    Recurrent and convolutional layers read the text alone, a prefix has no relative bias, words that are joined with their
    neighbors at the embedding have none, and in an encoder every token sees the whole prefix, whatever its window. Heads for
    questions let no cache through, by which some models' keys are read.
    """
    config = model.config.get_text_config()
    if (
        hasattr(config, "relative_attention_num_buckets")
        or getattr(config, "has_relative_attention_bias", False)
        or hasattr(config, "conv_kernel_size")
        or getattr(config, "trigram_input", False)
        or case.task == "qa"
    ):
        return True
    kinds = set(getattr(config, "layer_types", None) or ()) | set(getattr(config, "layers_block_type", None) or ())
    is_hybrid = bool(kinds - {"full_attention", "sliding_attention", "chunked_attention", "attention"})
    has_window = any(getattr(config, name, None) for name in ("local_attention", "sliding_window"))
    return is_hybrid or (has_window and case.task != "causal" and case.task != "image_text")
