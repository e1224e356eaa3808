"""Packed documents: each sees the prompt and no other document, or the forward is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import transformers as tf
import zoo
from table import BY_NAME, LEARNERS, TRAINED, Entry
from untouched import remove_all, untouched

import softhooks
from softhooks import PrefixTuning, PromptTuning, UnsupportedModeError
from softhooks.inject.prefix.packed_documents import document_numbers

DOCUMENTS = [zoo.text(1, length, seed=length)[0] for length in (5, 7, 3)]
IDS = torch.cat(DOCUMENTS)[None]
POSITIONS = torch.cat([torch.arange(len(document)) for document in DOCUMENTS])[None]
SEPARATING = ("llama", "gpt2", "qwen3", "gemma3", "mistral", "mixtral")
LEAKING = ("opt", "gptj", "bloom", "falcon")
LLAMA = [entry for entry in LEARNERS if entry.fits(zoo.Case("llama", "causal"))]
SLOTS = [BY_NAME[name] for name in ("prompt-after-first", "p-tuning-anchors", "p-tuning-template")]
"""Methods whose prompt stands in the row itself; a packed row has no place for one prompt per document."""
REFUSED = r"documents packed into one row could see each other(.|\n)*up to 3 in a row(.|\n)*its own row"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def apart(model: Any) -> torch.Tensor:
    """The logits of every document in a row of its own, one after the other."""
    return torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in DOCUMENTS])


def gradients(prompt: softhooks.SoftPrompt, logits: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    return list(torch.autograd.grad((logits * weights).sum(), list(prompt.encoder.parameters())))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("entry", TRAINED, ids=str)
@pytest.mark.parametrize("arch", SEPARATING)
def test_each_document_sees_the_prompt_and_itself(arch: str, entry: Entry, attention: str) -> None:
    model = zoo.build(arch, attention=attention)
    with softhooks.attach(model, entry.make(4)) as prompt:
        expected = apart(model)
        packed = model(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits[0]
        torch.testing.assert_close(packed, expected, rtol=1e-4, atol=2e-5)
        for one, other in zip(gradients(prompt, packed), gradients(prompt, expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)
        with softhooks.disabled(model):
            assert (model(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits[0] - packed).abs().max() > 0.1


@pytest.mark.parametrize("entry", LLAMA, ids=str)
def test_whatever_the_method_each_document_sees_its_own_prompt_or_is_refused(entry: Entry) -> None:
    model = zoo.build("llama")
    prompt, more = entry.attach(model, 4), entry.extra([2])
    call = {"input_ids": IDS, "position_ids": POSITIONS, "use_cache": False}
    with prompt:
        if entry in SLOTS:
            with untouched(model), pytest.raises(UnsupportedModeError, match="once per row, not once per document"):
                model(**call, **more)
            return
        expected = torch.cat([model(input_ids=row[None], use_cache=False, **more).logits[0] for row in DOCUMENTS])
        packed = model(**call, **more).logits[0]
        torch.testing.assert_close(packed, expected, rtol=1e-4, atol=2e-5)
        with softhooks.disabled(model):
            assert (model(**call).logits[0] - packed).abs().max() > 0.05
        for name, values in entry.extra([0, 1, 2]).items():
            with pytest.raises(UnsupportedModeError, match=r"row"):
                model(**call, **{name: values})


@pytest.mark.parametrize("method", [PromptTuning(4), PrefixTuning(4)], ids=["prompt", "prefix"])
@pytest.mark.parametrize("arch", LEAKING)
def test_models_that_do_not_separate_are_refused(arch: str, method: Any) -> None:
    model = zoo.build(arch)
    with softhooks.attach(model, method), untouched(model), pytest.raises(UnsupportedModeError, match=REFUSED):
        model(input_ids=IDS, position_ids=POSITIONS, use_cache=False)


@pytest.mark.parametrize(
    "more", [{"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones_like(IDS)}], ids=["cache", "mask"]
)
@pytest.mark.parametrize("method", [PromptTuning(4), PrefixTuning(4)], ids=["prompt", "prefix"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_or_a_mask_keeps_transformers_from_separating(
    attention: str, method: Any, more: dict[str, Any]
) -> None:
    model = zoo.build("llama", attention=attention)
    bare = model(input_ids=IDS, position_ids=POSITIONS, **more).logits[0]
    assert (bare - apart(model)).abs().max() > 0.1, "the bare model mixes the documents"
    with softhooks.attach(model, method), untouched(model), pytest.raises(UnsupportedModeError, match=REFUSED):
        model(input_ids=IDS, position_ids=POSITIONS, **more)


def test_a_mask_of_the_callers_own_is_taken_at_its_word() -> None:
    model = zoo.build("llama")
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 7, 3]))
    mask = (numbers[:, None] == numbers[None]).tril()[None, None]
    with softhooks.attach(model, PrefixTuning(4)):
        packed = model(input_ids=IDS, position_ids=POSITIONS, attention_mask=mask, use_cache=False).logits[0]
        torch.testing.assert_close(packed, apart(model), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_slots_are_refused(arch: str) -> None:
    model = zoo.build(arch)
    with softhooks.attach(model, PromptTuning(4), injection="slots"), pytest.raises(UnsupportedModeError):
        model(input_ids=IDS, position_ids=POSITIONS, use_cache=False)


def test_an_encoder_is_refused() -> None:
    model = zoo.build("bert", "tokens")
    with (
        softhooks.attach(model, PrefixTuning(4)),
        pytest.raises(UnsupportedModeError, match="none that keeps them apart"),
    ):
        model(input_ids=IDS, position_ids=POSITIONS)


def test_a_backbone_at_rest_wakes_up_after_a_leak() -> None:
    model = zoo.build("opt").train()
    with softhooks.attach(model, PrefixTuning(4), freeze_dropout=True):
        with untouched(model), pytest.raises(UnsupportedModeError, match=REFUSED):
            model(input_ids=IDS, position_ids=POSITIONS, use_cache=False)
        assert all(module.training for module in model.modules())


# --- what is packed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positions", "mask", "numbers"), [
    ([[0, 1, 2, 0, 1]], None, [[0, 0, 0, 1, 1]]),
    ([[0, 1, 2, 3, 4]], None, None),
    ([[7, 8, 9, 10, 11]], None, None),
    ([[0, 1, 2, 5, 6]], None, None),
    ([[0, 0, 1, 0, 0]], None, [[0, 1, 1, 2, 3]]),
    ([[1, 1, 0, 1, 2]], [[0, 0, 1, 1, 1]], None),
    ([[0, 1, 2, 1, 1]], [[1, 1, 1, 0, 0]], None),
    ([[0, 1, 9, 0, 1]], [[1, 1, 0, 1, 1]], [[0, 0, 0, 1, 1]]),
    ([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]], None, [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]),
    ([[0, 1, 2, 3, 4]], [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]], None),
    ([[0, 1, 0, 1, 2]], [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]),
])  # fmt: skip
def test_documents_are_counted_by_restarts(positions: Any, mask: Any, numbers: Any) -> None:
    given = None if mask is None else torch.tensor(mask)
    found = document_numbers(torch.tensor(positions), given, 5)
    assert (found if found is None else found.tolist()) == numbers
    assert document_numbers(torch.tensor(positions)[..., :1], given, 1) is None


def test_what_says_nothing_about_documents() -> None:
    restarting = torch.tensor([[0, 1, 0, 1]])
    assert document_numbers(None, None, 4) is None
    assert document_numbers(restarting, torch.ones(1, 1, 4, 4), 4) is None
    assert document_numbers(restarting, {"full_attention": None}, 4) is None
    assert document_numbers(restarting[None].expand(3, -1, -1), None, 4) is None
    text_first = torch.stack([restarting, *[torch.zeros_like(restarting)] * 3])
    assert document_numbers(text_first, None, 4).tolist() == [[0, 0, 1, 1]]  # type: ignore[union-attr]


# --- a padding-free collator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [entry for entry in LLAMA if entry not in SLOTS], ids=str)
def test_a_padding_free_collator_trains_as_padded_rows_do(
    tmp_path: Path, entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever loss the method has; without token dropout, which draws once per row."""
    monkeypatch.setattr("torch.rand", torch.ones)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in DOCUMENTS for _ in range(3)]
    columns = entry.extra([2])
    rows = [{**row, **{name: value[0] for name, value in columns.items()}} for row in rows]

    def padded(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
        mask = (torch.arange(longest) < torch.tensor([[len(row["input_ids"])] for row in batch])).long()
        more = {name: torch.stack([row[name] for row in batch]) for name in columns}
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), **more}

    def flat(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {**tf.DataCollatorWithFlattening()(batch), **columns}

    results = []
    for number, collator in enumerate((padded, flat)):
        trainer, callback = training.prompted(
            tmp_path / str(number), zoo.build("llama"), "causal", entry.make(4), per_device_train_batch_size=3, optim="sgd",
            given={"data_collator": collator}, logging_steps=1,
        )  # fmt: skip
        start = training.trained(callback)
        trainer.train_dataset = rows
        trainer.train()
        moved = [name for name, value in training.trained(callback).items() if not torch.equal(value, start[name])]
        results.append((training.losses(trainer), training.trained(callback), moved))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][2] == results[1][2] != []
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-4, atol=1e-5)


def test_a_padding_free_collator_that_drops_a_column_is_told(tmp_path: Path) -> None:
    trainer, _ = training.learning(
        tmp_path, BY_NAME["mpt-tasks"], given={"data_collator": tf.DataCollatorWithFlattening()}
    )
    for row in trainer.train_dataset:
        row |= {"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()}
    with pytest.raises(UnsupportedModeError, match="task_ids"):
        trainer.train()
