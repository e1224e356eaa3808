"""Write the model card of a prompt from its stored form and its training run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from softhooks._version import __version__
from softhooks.base_model.auto_classes import AutoClass, auto_class_of
from softhooks.base_model.cached_commits import REPOSITORY
from softhooks.base_model.frozen_record import FrozenRecord, FrozenReport
from softhooks.formats.stored import StoredPrompt
from softhooks.model_card import curves
from softhooks.model_card.markdown import code, table
from softhooks.model_card.training_run import TrainingRun

FILE = "README.md"
LIBRARY = "softhooks"
BEGIN, END = "<!-- softhooks: begin -->", "<!-- softhooks: end -->"
"""The comments around the part of a card that softhooks writes."""

_GENERATES = ("AutoModelForCausalLM",)


@dataclass(frozen=True)
class FrozenProof:
    """The result of a check that the base model has not changed.

    Attributes:
        report: the number and the size of the tensors that were compared.
        digest: the hash of the hashes of all these tensors.
    """

    report: FrozenReport
    digest: str

    @classmethod
    def of(
        cls, record: FrozenRecord | None, model: nn.Module, report: FrozenReport | None = None
    ) -> FrozenProof | None:
        """Check a model, unless the `report` of a check is given; return None if there is no record of the model."""
        if record is None:
            return None
        return cls(report or record.verify(model), record.fingerprint(record.digests))


@dataclass(frozen=True)
class CardFacts:
    """What a model card describes.

    Attributes:
        repo_id: the name of the prompt's repository, or of its directory.
        method: the name of the method's class.
        proof: the check of the base model, or None if there was none.
        run: the training run, or None if it is unknown.
        picture: whether the repository contains a picture of the training curves.
    """

    stored: StoredPrompt
    repo_id: str
    method: str
    proof: FrozenProof | None = None
    run: TrainingRun | None = None
    picture: bool = False

    @property
    def auto_class(self) -> AutoClass | None:
        """The Auto class that loads the base model."""
        return auto_class_of(self.stored.base.class_name, self.stored.base.task)

    @property
    def base_on_hub(self) -> str | None:
        """The name of the base model on the Hub; None for a local directory."""
        name = self.stored.base.name_or_path
        return name if REPOSITORY.fullmatch(name) and not Path(name).exists() else None


def metadata(facts: CardFacts) -> dict[str, Any]:
    """Return the metadata at the top of the card, from which the Hub fills its filters."""
    auto = facts.auto_class
    values: dict[str, Any] = {"library_name": LIBRARY, "tags": ["soft-prompt", facts.stored.kind.replace("_", "-")]}
    if facts.base_on_hub:
        values |= {"base_model": facts.base_on_hub, "base_model_relation": "adapter"}
    if auto is not None and auto.pipeline:
        values["pipeline_tag"] = auto.pipeline
    return values


def text(facts: CardFacts) -> str:
    """Return the text of the card, in Markdown."""
    return "\n".join(
        [BEGIN, *_introduction(facts), *_use(facts), *_prompt(facts), *_training(facts), *_frozen(facts), END]
    )


def _introduction(facts: CardFacts) -> Iterator[str]:
    base, tokens = facts.stored.base, facts.stored.options.get("num_virtual_tokens")
    name = (
        f"[{facts.base_on_hub}](https://huggingface.co/{facts.base_on_hub})" if facts.base_on_hub else "a local model"
    )
    size = f" of {tokens} virtual tokens" if isinstance(tokens, int) and tokens else ""
    yield f"# {facts.repo_id.split('/')[-1]}\n"
    yield (
        f"A soft prompt{size} for {name} ({code(base.class_name or 'unknown class')}), trained with softhooks {__version__}. "
        "This repository contains the prompt, not the weights of the base model.\n"
    )


# --- how to use it ----------------------------------------------------------------------------------------------------


def _use(facts: CardFacts) -> Iterator[str]:
    auto, base = facts.auto_class, facts.stored.base
    named, pinned = facts.base_on_hub or "BASE_MODEL", ""
    if facts.base_on_hub and base.revision:
        pinned = f', revision="{base.revision}"' if re.fullmatch(r"[\w./-]+", base.revision) else ""
    override = "" if facts.base_on_hub else f', base="{named}"'
    yield "## Load it\n"
    if auto is not None:
        yield f'The base model and the prompt in one line: `model = softhooks.load_model("{facts.repo_id}"{override})`. Or:\n'
    loader = "AutoModel" if auto is None else auto.name
    yield "```python"
    yield f"import softhooks\nfrom transformers import {loader}, AutoTokenizer\n"
    yield f'model = {loader}.from_pretrained("{named}"{pinned})'
    yield f'tokenizer = AutoTokenizer.from_pretrained("{named}"{pinned})'
    yield f'softhooks.load(model, "{facts.repo_id}")'
    yield "```\n"
    yield (
        "`load` checks that the model is the one that the prompt was trained with, and activates the prompt. "
        "`with softhooks.disabled(model):` runs the bare model.\n"
    )
    yield "## Serve it\n"
    if auto is None or auto.name not in _GENERATES:
        task = f'"{auto.pipeline}", ' if auto is not None and auto.pipeline else ""
        yield "Pipelines of transformers use the prompt of the model that they are given:\n"
        yield f"```python\nfrom transformers import pipeline\n\npipe = pipeline({task}model=model, tokenizer=tokenizer)\n```\n"
        return
    yield "With the server of transformers, which has an API like OpenAI's:\n"
    yield "```sh"
    yield f"python -m softhooks.integrations.transformers_serve {named} --prompt {facts.repo_id} --port 8000"
    yield "```\n"
    if set(facts.stored.tables) == {"embeddings"} and not facts.stored.heads:
        yield "For vLLM (or SGLang: `--to sglang`), this command writes a request that contains the embeddings:\n"
        yield "```sh"
        yield f'softhooks export {facts.repo_id} --to vllm --model {named} --text "..." --output request'
        yield "```\n"


# --- what it is -------------------------------------------------------------------------------------------------------


def _prompt(facts: CardFacts) -> Iterator[str]:
    stored, base = facts.stored, facts.stored.base
    heads = sum(tensor.numel() for head in stored.heads.values() for tensor in head.values())
    own = sum(tensor.numel() for tensor in (*stored.tables.values(), *stored.added.values()))
    options = {name: value for name, value in stored.options.items() if value not in (None, [], False)}
    facts_of = {
        "method": code(facts.method),
        "options": ", ".join(code(f"{name}={_short(value)}") for name, value in options.items()),
        "numbers in the prompt": f"{own:,}" + (f", and {heads:,} in its heads" if heads else ""),
        "heads": ", ".join(map(code, stored.heads)),
        "labels": ", ".join(code(name) for name in (stored.labels.id2label or {}).values()) if stored.labels else "",
        "tokens added to the vocabulary": f"{len(stored.added_ids)}" if stored.added_ids else "",
        "trained from": code(stored.loaded_from) if stored.loaded_from else "",
    }
    of_base = {
        "name": code(facts.base_on_hub) if facts.base_on_hub else "a local directory",
        "revision": code(base.revision) if base.revision else "",
        "class": code(base.class_name) if base.class_name else "",
        "quantization": code(base.quantization) if base.quantization else "",
        "hidden size": str(base.width or ""),
        "rows of the embedding matrix": f"{base.vocabulary:,}" if base.vocabulary else "",
        "digest, which `load` compares": code(base.fingerprint.digest) if base.fingerprint else "",
    }
    yield f"## The prompt\n\n{_pairs(facts_of)}"
    yield f"## The base model\n\n{_pairs(of_base)}"


def _pairs(values: dict[str, str]) -> str:
    return table(["", ""], [[name, value] for name, value in values.items() if value])


def _short(value: object) -> str:
    """Return the value of an option; of a long list, only the length."""
    if isinstance(value, (list, tuple, dict)) and len(value) > 8:
        return f"<{len(value)} values>"
    return repr(value)


# --- how it was trained -----------------------------------------------------------------------------------------------


def _training(facts: CardFacts) -> Iterator[str]:
    run = facts.run
    if run is None:
        return
    yield "## Training\n"
    columns = ", ".join(map(code, run.columns)) or "unknown columns"
    rows = f"{run.rows:,} rows" if run.rows is not None else "rows"
    source = f" of {code(run.dataset)}" if run.dataset else ""
    yield f"Data: {rows}{source}, with {columns}.\n"
    yield _pairs({code(name): code(value) for name, value in run.settings.items()})
    metrics = run.metrics()
    if metrics:
        yield "Last evaluation:\n"
        yield table(
            ["metric", "value", "step"],
            [[code(name), f"{value:.4g}", str(step)] for name, (value, step) in metrics.items()],
        )
    if run.curves():
        yield "### Training curves\n"
        if facts.picture:
            yield f"![Training curves]({curves.PICTURE})\n"
        yield curves.rows(run)


def _frozen(facts: CardFacts) -> Iterator[str]:
    proof, trained = facts.proof, facts.stored.also_trained
    if proof is not None or trained:
        yield "## The base model stayed frozen\n"
    if proof is not None:
        yield (
            f"At the last check before this card was written, {proof.report.tensors:,} parameters and buffers of the base model "
            f"({proof.report.bytes:,} bytes) had the same bits as when the prompt was attached. Their XXH3 hashes "
            f"(128 bits) were compared one by one; the hash of all hashes is {code(proof.digest)}.\n"
        )
        if proof.report.unread:
            yield f"{len(proof.report.unread)} tensors could not be read and were not compared.\n"
    if trained:
        names = ", ".join(map(code, trained[:8])) + (", ..." if len(trained) > 8 else "")
        count = f"{len(trained)} parameter{'s' if len(trained) > 1 else ''}"
        yield f"Trained with the prompt, on request, {count} of the base model: {names}.\n"
