"""Context tuning: it starts as in-context learning, leave-one-out, token dropout, and learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive
import pytest
import tokens
import torch
import toy
import training
import zoo
from torch import Tensor
from transformers import DynamicCache

import softhooks
from softhooks import ContextTuning, OptionError, PromptTuning, UnsupportedModeError

CLOSE = {"rtol": 1e-4, "atol": 5e-5}
SHOTS = [[11, 12, 13, 14], [21, 22, 23], [31, 32, 33, 34, 35]]
LEAD = [zoo.BOS, 9]
CONTEXT = [*LEAD, *(i for shot in SHOTS for i in shot)]
P = len(CONTEXT)
DECODERS = (*zoo.CAUSAL, *zoo.CACHED)


def method(**options: Any) -> ContextTuning:
    return ContextTuning(demonstrations=SHOTS, instruction=LEAD, **{"token_dropout": 0.0, **options})


def in_context(model: Any, ids: Tensor) -> Tensor:
    """The bare model with the context in front of every row."""
    context = torch.tensor(CONTEXT).expand(len(ids), -1)
    return model(torch.cat([context, ids], 1)).logits[:, P:]


def columns_of(number: int) -> list[int]:
    """The place of a demonstration in the context, counted by hand."""
    return {0: [2, 3, 4, 5], 1: [6, 7, 8], 2: [9, 10, 11, 12, 13]}[number]


def without(model: Any, row: Tensor, hidden: list[int]) -> Tensor:
    """The bare model with a cache of the context, some columns of which the row must not attend to. [T] -> [1, T, V]."""
    cache = DynamicCache(config=model.config)
    model(torch.tensor([CONTEXT]), past_key_values=cache, use_cache=True)
    mask = torch.ones(1, P + len(row), dtype=torch.long)
    mask[0, hidden] = 0
    positions = torch.arange(P, P + len(row))[None]
    return model(row[None], attention_mask=mask, past_key_values=cache, position_ids=positions).logits


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", DECODERS)
def test_before_the_first_step_it_is_in_context_learning(arch: str) -> None:
    model, ids = zoo.build(arch), zoo.text(2, 6)
    with torch.no_grad():
        expected = in_context(model, ids)
        with softhooks.attach(model, method()) as prompt:
            assert prompt.method.num_virtual_tokens == P
            torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
            torch.testing.assert_close(model(ids, example_ids=torch.tensor([-1, -1])).logits, expected, **CLOSE)


def test_generation_goes_on_from_the_demonstrations() -> None:
    model, bare = naive.endless(zoo.build("llama")), zoo.build("llama")
    texts = [zoo.text(1, n, seed=n)[0] for n in (5, 3)]
    with softhooks.attach(model, method()):
        found = model.generate(**naive.left_padded(texts), max_new_tokens=5, do_sample=False)
    for row, text in zip(found, texts, strict=True):
        right = naive.greedy(naive.bare_step(bare), torch.cat([torch.tensor(CONTEXT), text]), 5)
        assert torch.equal(row[-5:], right[-5:])


def test_texts_are_their_ids_behind_bos() -> None:
    words = [tokens.words(shot) for shot in SHOTS]
    spoken = ContextTuning(demonstrations=words, instruction="word9", tokenizer=tokens.tokenizer())
    assert spoken == ContextTuning(demonstrations=SHOTS, instruction=LEAD)
    assert ContextTuning(demonstrations=words, tokenizer=tokens.tokenizer()).instruction == (zoo.BOS,)
    assert ContextTuning(demonstrations=SHOTS).num_virtual_tokens == P - len(LEAD)
    assert ContextTuning(demonstrations=[torch.tensor(shot) for shot in SHOTS]).lengths == (4, 3, 5)


def test_every_key_and_value_is_trained() -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, method()) as prompt:
        assert prompt.num_parameters == P * 2 * 2 * (8 + 8)
        assert [name for name, _ in prompt.encoder.named_parameters()] == ["text"]


# --- leave one out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [a for a in DECODERS if a not in ("bloom", "falcon", "gptj")])
def test_a_row_does_not_see_its_own_demonstration(arch: str) -> None:
    model, ids = zoo.build(arch), zoo.text(4, 6)
    with torch.no_grad():
        expected = torch.cat(
            [
                without(model, row, [] if number < 0 else columns_of(number))
                for row, number in zip(ids, (2, -1, 0, 1), strict=True)
            ]
        )
        with softhooks.attach(model, method()):
            found = model(ids, example_ids=torch.tensor([2, -1, 0, 1])).logits
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("arch", DECODERS)
def test_its_own_demonstration_has_no_gradient(arch: str) -> None:
    model, ids = naive.without_dropout(zoo.build(arch)), zoo.text(2, 6)
    with softhooks.attach(model, method()) as prompt:
        model.train()
        model(ids, labels=ids, example_ids=torch.tensor([1, 1])).loss.backward()
        moved = (prompt.encoder.text.grad != 0).any(-1).nonzero().flatten().tolist()
    windowed = arch in ("mistral",)  # the first tokens are beyond every window
    assert set(moved) <= set(range(P)) - set(columns_of(1))
    assert windowed or set(moved) == set(range(P)) - set(columns_of(1))


def test_training_without_the_column_is_refused_and_evaluation_is_not() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, method()):
        model.train()
        with pytest.raises(UnsupportedModeError, match=r"(?s)`example_ids`.*leave_one_out=False"):
            model(ids, labels=ids)
        model.eval()
        model(ids, labels=ids)
    with softhooks.attach(model, method(leave_one_out=False)):
        model.train()
        assert bool(model(ids, labels=ids).loss.isfinite())


@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([0]),
        torch.tensor([0, 3]),
        torch.tensor([-2, 0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
    ],
)
def test_ids_of_no_demonstration_are_refused(wrong: Tensor) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, method()):
        with pytest.raises(UnsupportedModeError, match=r"(?s)counted from 0.*examples: +3"):
            model(ids, example_ids=wrong)
        model(ids, example_ids=torch.tensor([[0], [2]]))


def test_beams_and_other_prompts_keep_their_rows_demonstration() -> None:
    model, ids = naive.endless(zoo.build("llama")), zoo.text(2, 5)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    softhooks.attach(model, PromptTuning(3), "other")
    with softhooks.attach(model, method()):
        mixed = model.generate(ids, example_ids=torch.tensor([0, 2]), num_beams=2, **options)
        for number, row in zip((0, 2), range(2), strict=True):
            alone = model.generate(ids[row : row + 1], example_ids=torch.tensor([number]), num_beams=2, **options)
            assert torch.equal(mixed[row], alone[0])
        with torch.no_grad():
            expected = model(ids[1:], example_ids=torch.tensor([2])).logits
            with softhooks.rows(model, ["other", "default"]):
                together = model(ids, example_ids=torch.tensor([0, 2])).logits
            softhooks.activate(model, "other")
            other = model(ids[:1]).logits
    torch.testing.assert_close(together, torch.cat([other, expected]), **CLOSE)


# --- token dropout ----------------------------------------------------------------------------------------------------


def test_tokens_drop_in_training_by_torchs_random_numbers() -> None:
    model, ids = naive.without_dropout(zoo.build("llama")), zoo.text(2, 6)
    with softhooks.attach(model, method(leave_one_out=False, token_dropout=0.4)), torch.no_grad():
        resting = model(ids).logits
        assert torch.equal(model(ids).logits, resting)
        model.train()
        torch.manual_seed(3)
        found = model(ids).logits
        torch.manual_seed(3)
        again = model(ids).logits
        torch.manual_seed(3)
        dropped = torch.rand(2, P) < 0.4
        assert not torch.equal(dropped[0], dropped[1])
        model.eval()
        with softhooks.disabled(model):
            expected = [
                without(model, row, hidden.nonzero().flatten().tolist())
                for row, hidden in zip(ids, dropped, strict=True)
            ]
    assert torch.equal(found, again)
    torch.testing.assert_close(found, torch.cat(expected), **CLOSE)


def test_as_many_tokens_drop_as_asked_for_and_one_draw_serves_a_row() -> None:
    with softhooks.attach(zoo.build("llama"), method(leave_one_out=False, token_dropout=0.1)) as prompt:
        prompt.encoder.train()
        hidden = prompt.encoder.hidden_tokens({}, 4000)
        assert hidden.shape == (4000, P)
        torch.testing.assert_close(hidden.float().mean(0), torch.full((P,), 0.1), rtol=0, atol=0.025)
        shared = prompt.encoder.hidden_tokens({"example_ids": torch.ones(4000, dtype=torch.long)}, 4000)
        assert bool(shared[:, columns_of(1)].all())
        assert 0.05 < float(shared[:, columns_of(2)].float().mean()) < 0.15


# --- saved ------------------------------------------------------------------------------------------------------------


def test_a_loaded_prompt_goes_on_under_the_same_masks(tmp_path: Path) -> None:
    """A saved prompt keeps the spans, not the demonstrations; loading for inference needs neither."""
    model, ids = naive.without_dropout(zoo.build("llama")), zoo.text(2, 6)
    call = {"input_ids": ids, "labels": ids, "example_ids": torch.tensor([2, 0])}

    def step() -> tuple[Tensor, Tensor]:
        model.train()
        torch.manual_seed(5)
        loss = model(**call).loss
        (gradient,) = torch.autograd.grad(loss, model.soft_prompt["default"]["encoder"].text)
        model.eval()
        return loss, gradient

    with softhooks.attach(model, method(token_dropout=0.2)) as prompt:
        with torch.no_grad():
            prompt.encoder.text.add_(torch.randn_like(prompt.encoder.text), alpha=0.1)
        expected = step()
        resting = model(ids).logits
        prompt.save_pretrained(tmp_path)
    held = (tmp_path / "soft_prompt.json").read_text()
    assert "demonstrations" not in held
    with softhooks.load(model, tmp_path, trainable=True) as again:
        assert again.method.lengths == (4, 3, 5)
        found = step()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        again.fold()
        assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
    with softhooks.load(model, tmp_path):
        assert torch.equal(model(ids).logits, resting)


def test_a_trainer_trains_resumes_and_keeps_the_column(tmp_path: Path) -> None:
    def run() -> tuple[Any, Any]:
        model = zoo.build("llama")
        options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}
        trainer, callback = training.prompted(tmp_path, model, "causal", method(token_dropout=0.1), **options)
        for number, row in enumerate(trainer.train_dataset):
            row["example_ids"] = torch.tensor(number % 3)
        return trainer, callback

    whole, callback = run()
    whole.train()
    resumed, other = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert training.losses(resumed) == training.losses(whole)
    assert training.equal(training.trained(other), training.trained(callback))
    callback.soft_prompt.remove()
    other.soft_prompt.remove()


def test_it_is_a_prefix_to_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, method()) as prompt, torch.no_grad():
        prompt.encoder.text.add_(torch.randn_like(prompt.encoder.text), alpha=0.1)
        expected = model(ids).logits
        prompt.save_pretrained(tmp_path, as_peft=True)
    theirs = peft.PeftModel.from_pretrained(zoo.build("llama"), str(tmp_path)).eval()
    with torch.no_grad():
        found = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, expected, **CLOSE)


# --- wrong options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there are no demonstrations"),
        ({"demonstrations": "one text"}, "must be a list"),
        ({"demonstrations": ["word5"]}, "tokenizer"),
        ({"demonstrations": [[]]}, "a string or a list of at least one token id"),
        ({"demonstrations": [[5, 6.0]]}, "a string or a list of at least one token id"),
        ({"demonstrations": [5, 6]}, "a string or a list of at least one token id"),
        ({"demonstrations": SHOTS, "num_virtual_tokens": 7}, r"num_virtual_tokens is 7, but its computed value is 12"),
        ({"demonstrations": SHOTS, "lengths": (1, 2, 3)}, r"lengths is \(1, 2, 3\), .* value is \(4, 3, 5\)"),
        ({"lengths": (4, 3), "num_virtual_tokens": 5}, "add up"),
        ({"lengths": (4, -3), "num_virtual_tokens": 5}, "there are no demonstrations"),
        ({"demonstrations": SHOTS, "token_dropout": 1.0}, "token_dropout"),
    ],
    ids=lambda item: str(item),
)  # fmt: skip
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ContextTuning(**options)


def test_demonstrations_are_needed_to_begin_and_must_be_the_models() -> None:
    model = zoo.build("llama")
    with pytest.raises(OptionError, match="is initialized from demonstrations, but none"):
        softhooks.attach(model, ContextTuning(5, lengths=(2, 3)))
    with pytest.raises(OptionError, match="vocabulary"):
        softhooks.attach(model, ContextTuning(demonstrations=[[5, 6, 700]]))
    assert not hasattr(model, "soft_prompt")


# --- it learns --------------------------------------------------------------------------------------------------------


def test_it_learns_what_the_context_alone_cannot_tell() -> None:
    """With an instruction that names another function, four demonstrations do not help; tuned on the same four, they do."""
    function, shown, model = 1, list(range(0, 16, 4)), toy.model()
    shots, lead = toy.pairs(function, shown), [toy.FIRST_NAME + 2]
    unseen = [word for word in range(toy.WORDS) if word not in shown]
    context = torch.cat([torch.tensor(lead), shots.flatten()])
    alone = toy.share_right(model, function, unseen)
    told = toy.share_right(model, function, unseen, before=context)
    tuned = ContextTuning(demonstrations=shots.tolist(), instruction=lead, token_dropout=0.1)
    with softhooks.attach(model, tuned) as prompt:
        assert toy.share_right(model, function, unseen) == told
        toy.tune(model, prompt, function, shown, lr=2e-2, steps=60, example_ids=torch.arange(4))
        learned = toy.share_right(model, function, unseen)
        prompt.verify_frozen()
    assert max(alone, told) <= 0.5
    assert learned >= 0.9
