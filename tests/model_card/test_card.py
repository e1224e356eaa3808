"""The model card: what it says about a prompt, its base and its training, and how it gets to the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
import zoo
from hub_api import TOKEN
from hub_stand_in import HubStandIn

import softhooks
from softhooks import FrozenModifiedError, LlamaAdapter, NotAttachedError, PrefixTuning, PromptTuning
from softhooks.formats.softhooks_files import DESCRIPTION, TENSORS
from softhooks.model_card import curves
from softhooks.model_card.card import BEGIN, END, FILE, CardFacts, FrozenProof, metadata, text
from softhooks.model_card.markdown import code, table
from softhooks.model_card.training_run import TrainingRun

REPO, BASE = "me/prompt", "org/base"
LOGS = [
    {"step": 1, "loss": 3.0, "epoch": 0.5, "learning_rate": 0.1},
    {"step": 2, "loss": 2.0},
    {"step": 2, "eval_loss": 2.5, "eval_accuracy": 0.5, "eval_runtime": 9.0, "eval_samples_per_second": 1.0},
    {"step": 3, "loss": float("nan")},
    {"step": 4, "loss": 1.0, "soft_prompt/norm": 7.0},
    {"step": 4, "eval_loss": 1.5, "eval_accuracy": 0.75},
    {"step": 4, "train_runtime": 5.0, "train_loss": 2.0},
]


def run_of(logs: Any = LOGS, dataset: Any = None, **settings: Any) -> TrainingRun:
    args = tf.TrainingArguments("unused", report_to=[], use_cpu=True, **settings)
    return TrainingRun.of(args, logs, dataset)


def facts_of(arch: str = "llama", head: str = "causal", method: Any = None, **more: Any) -> CardFacts:
    with softhooks.attach(zoo.build(arch, head), method or PromptTuning(4)) as prompt:
        stored = prompt.to_stored()
        return CardFacts(
            stored,
            REPO,
            type(prompt.method).__name__,
            more.pop("proof", proof_of(prompt)),
            **more,
        )


def proof_of(prompt: softhooks.SoftPrompt) -> FrozenProof | None:
    return FrozenProof.of(prompt.prompted_model.record, prompt.model)


def row(card: str, name: str) -> str:
    """The cell next to a name in one of the card's tables."""
    [found] = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", card, re.MULTILINE)
    return found


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_card_describes_the_prompt_and_its_base() -> None:
    facts = facts_of("bert", "sequence", PrefixTuning(3))
    facts.stored.base = replaced(facts, name_or_path=BASE, revision="a" * 40)
    card = text(facts)
    assert row(card, "method") == "`PrefixTuning`"
    assert "`num_virtual_tokens=3`" in row(card, "options")
    assert row(card, "numbers in the prompt") == f"{facts.stored.tables['text'].numel():,}, and 99 in its heads"
    assert row(card, "labels") == "`LABEL_0`, `LABEL_1`, `LABEL_2`"
    assert row(card, "name") == f"`{BASE}`"
    assert row(card, "revision") == f"`{'a' * 40}`"
    assert facts.stored.base.fingerprint is not None
    assert row(card, "digest, which `load` compares") == f"`{facts.stored.base.fingerprint.digest}`"
    assert f'AutoModelForSequenceClassification.from_pretrained("{BASE}", revision="{"a" * 40}")' in card
    assert 'pipeline("text-classification"' in card
    assert metadata(facts) == {
        "library_name": "softhooks",
        "tags": ["soft-prompt", "prefix-tuning"],
        "base_model": BASE,
        "base_model_relation": "adapter",
        "pipeline_tag": "text-classification",
    }


def replaced(facts: CardFacts, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(facts.stored.base, **changes)


def test_the_proof_that_the_base_stayed_frozen() -> None:
    facts = facts_of()
    assert facts.proof is not None
    card = text(facts)
    assert f"{facts.proof.report.tensors} parameters and buffers of the base model" in card
    assert f"({facts.proof.report.bytes:,} bytes) had the same bits" in card
    assert facts.proof.digest in card
    assert facts.proof.digest == facts_of().proof.digest  # type: ignore[union-attr]
    assert "stayed frozen" not in text(facts_of(proof=None))


def test_parameters_of_the_base_that_were_trained_are_named() -> None:
    with softhooks.attach(zoo.build("llama"), PromptTuning(4), trainable="model.norm.weight") as prompt:
        card = text(CardFacts(prompt.to_stored(), REPO, "PromptTuning", proof_of(prompt)))
    assert "Trained with the prompt, on request, 1 parameter of the base model: `model.norm.weight`" in card


@pytest.mark.parametrize(
    ("method", "exports"), [(PromptTuning(4), True), (PrefixTuning(4), False), (LlamaAdapter(4), False)]
)
def test_only_prompts_that_servers_accept_are_exported(method: Any, exports: bool) -> None:
    card = text(facts_of(method=method))
    assert ("softhooks export" in card) is exports
    assert "transformers_serve BASE_MODEL --prompt me/prompt" in card


def test_a_local_base_is_not_named(tmp_path: Path) -> None:
    zoo.build("llama").save_pretrained(tmp_path / "secret")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "secret")
    with softhooks.attach(model, PromptTuning(4)) as prompt:
        facts = CardFacts(prompt.to_stored(), REPO, "PromptTuning")
    assert "secret" not in text(facts)
    assert "base_model" not in metadata(facts)
    assert 'softhooks.load_model("me/prompt", base="BASE_MODEL")' in text(facts)


def test_the_training_run() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"input_ids": [[1]] * 7, "labels": [0] * 7})
    run = run_of(LOGS, data, learning_rate=0.25, max_steps=4, weight_decay=0.0)
    assert run.curves() == {
        "loss": [(1, 3.0), (2, 2.0), (4, 1.0)],
        "eval_loss": [(2, 2.5), (4, 1.5)],
        "eval_accuracy": [(2, 0.5), (4, 0.75)],
    }
    card = text(facts_of(run=run, picture=True))
    assert "Data: 7 rows, with `input_ids`, `labels`." in card
    assert row(card, "`learning_rate`") == "`0.25`"
    assert row(card, "`max_steps`") == "`4`"
    assert "weight_decay" not in card
    assert "num_train_epochs" not in card
    assert "| `eval_accuracy` | 0.75 | 4 |" in card
    assert "| step | training loss | `eval_accuracy` | `eval_loss` |" in card
    assert "| 4 | 1 | 0.75 | 1.5 |" in card
    assert f"]({curves.PICTURE})" in card
    assert "## Training" not in text(facts_of())


def test_long_curves_are_shortened_and_keep_both_ends() -> None:
    table = curves.rows(run_of([{"step": step, "loss": float(step)} for step in range(1, 1001)]))
    steps = [int(line.split("|")[1]) for line in table.splitlines()[2:]]
    assert len(steps) == 12
    assert (steps[0], steps[-1]) == (1, 1000)
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    ("dataset", "rows", "columns"),
    [
        ([{"input_ids": 1, "labels": 2}] * 3, 3, ("input_ids", "labels")),
        ([], 0, ()),
        (torch.utils.data.TensorDataset(torch.zeros(5, 2)), 5, ()),
        (iter([{"a": 1}]), None, ()),
        (None, None, ()),
    ],
    ids=["list", "empty", "tensors", "iterator", "none"],
)
def test_the_columns_of_a_dataset(dataset: Any, rows: int | None, columns: tuple[str, ...]) -> None:
    run = run_of((), dataset)
    assert (run.rows, run.columns) == (rows, columns)
    assert "Data: " in text(facts_of(run=run))


def test_a_picture_needs_matplotlib_and_a_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert curves.draw(run_of(LOGS[:1]), tmp_path) is None
    path = curves.draw(run_of(), tmp_path)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(curves, "find_spec", lambda _name: None)
    assert curves.draw(run_of(), tmp_path) is None


@pytest.mark.parametrize("evil", ["a|b", "`x`", "a\nb", "<script>", "x" * 1000, "", "](http://x)"])
def test_names_cannot_change_the_card(evil: str) -> None:
    line = table(["a", "b"], [[code(evil), "end"]]).splitlines()[2]
    cell, end = re.fullmatch(r"\| `([^`]*)` \| (.*) \|", line).groups()  # type: ignore[union-attr]
    assert end == "end"
    assert not re.search(r"(?<!\\)\|", cell)
    assert len(cell) <= 330


# --- on the Hub -------------------------------------------------------------------------------------------------------


def pushed(hub: HubStandIn, revision: str = "main") -> str:
    return hub.repositories[REPO].files(revision)[FILE].decode()


def test_the_prompt_and_its_card_are_pushed(hub: HubStandIn) -> None:
    with softhooks.attach(zoo.build("llama"), PromptTuning(4)) as prompt:
        commit = prompt.push_to_hub(REPO, token=TOKEN, private=True, commit_message="hello")
    repository = hub.repositories[REPO]
    assert repository.private
    assert commit is not None
    assert repository.refs["main"] == commit.oid
    assert repository.messages[commit.oid] == "hello"
    assert set(repository.files()) == {".gitattributes", DESCRIPTION, TENSORS, FILE}
    header = yaml.safe_load(pushed(hub).split("---\n")[1])
    assert header["library_name"] == "softhooks"


def test_a_name_without_a_user_and_a_new_branch(hub: HubStandIn) -> None:
    with softhooks.attach(zoo.build("llama"), PromptTuning(4)) as prompt:
        prompt.push_to_hub("prompt", token=TOKEN, revision="v1")
        prompt.push_to_hub("prompt", token=TOKEN, revision="v1")
    assert FILE not in hub.repositories[REPO].files("main")
    assert 'softhooks.load_model("me/prompt"' in pushed(hub, "v1")


def test_a_push_without_a_token_is_refused(hub: HubStandIn) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    with softhooks.attach(zoo.build("llama"), PromptTuning(4)) as prompt, pytest.raises(HfHubHTTPError, match="401"):
        prompt.push_to_hub(REPO)
    assert not hub.repositories


def test_nothing_is_pushed_if_the_base_has_changed_or_the_prompt_is_removed(hub: HubStandIn) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, PromptTuning(4)) as prompt:
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        with pytest.raises(FrozenModifiedError, match="lm_head"):
            prompt.push_to_hub(REPO, token=TOKEN)
    with pytest.raises(NotAttachedError):
        prompt.push_to_hub(REPO, token=TOKEN)
    assert not hub.repositories


def test_what_a_user_wrote_into_the_card_is_kept(hub: HubStandIn) -> None:
    with softhooks.attach(zoo.build("llama"), PromptTuning(4)) as prompt:
        prompt.push_to_hub(REPO, token=TOKEN)
        own = pushed(hub).replace("library_name: softhooks\n", "library_name: softhooks\nlicense: mit\nlanguage: en\n")
        own = own.replace(BEGIN, f"My notes\n\n{BEGIN}").replace("# prompt", "# an old text") + "\nMore notes\n"
        hub.repositories[REPO].commit({FILE: own.encode()})
        prompt.push_to_hub(REPO, token=TOKEN)
    card = pushed(hub)
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["license"], header["language"]) == ("mit", "en")
    assert header["tags"] == ["soft-prompt", "prompt-tuning"]
    assert "My notes" in card.split(BEGIN)[0]
    assert "More notes" in card.split(END)[1]
    assert "an old text" not in card
    assert card.count("# prompt") == 1


def test_a_card_that_softhooks_did_not_write_is_kept(hub: HubStandIn, caplog: pytest.LogCaptureFixture) -> None:
    with softhooks.attach(zoo.build("llama"), PromptTuning(4)) as prompt:
        prompt.push_to_hub(REPO, token=TOKEN)
        hub.repositories[REPO].commit({FILE: b"# mine"})
        prompt.push_to_hub(REPO, token=TOKEN)
    assert pushed(hub) == "# mine"
    assert "was not written by softhooks" in caplog.text
