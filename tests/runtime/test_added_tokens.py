"""Rows of added tokens: trained alone, saved with the prompt, and used wherever the model reads or writes these tokens."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import tokens
import torch
import training
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from untouched import same_bits, untouched

import softhooks
from softhooks import (
    CheckpointError,
    OptionError,
    PrefixTuning,
    PromptMismatchError,
    PromptTuning,
    PTuning,
    SoftPromptCallback,
    UnsupportedModelError,
)
from softhooks.serving.embeddings import sequence_embeddings

pytestmark = pytest.mark.filterwarnings("ignore:.*embedding rows")

V = zoo.VOCABULARY
NEW = (V, V + 1, V + 2)
CASES = [
    zoo.Case("llama", "causal"), zoo.Case("gpt2", "causal"), zoo.Case("gemma3", "causal"), zoo.Case("opt", "causal"),
    zoo.Case("bloom", "causal"), zoo.Case("bert", "masked"), zoo.Case("bert", "sequence"), zoo.Case("t5", "seq2seq"),
    zoo.Case("bart", "seq2seq"), zoo.Case("rembert", "masked"),
]  # fmt: skip
METHODS = {"prompt": PromptTuning(4), "prefix": PrefixTuning(4), "p_tuning": PTuning(4)}


def resized(case: zoo.Case, seed: int = 1, more: int = 3, **changes: Any) -> Any:
    model = zoo.build(case.arch, case.head, **changes)
    torch.manual_seed(seed)
    model.resize_token_embeddings(V + more, mean_resizing=False)
    return model


def ids(case: zoo.Case) -> torch.Tensor:
    text = zoo.text(3, 7, end=case.arch == "bart")
    text[0, 1], text[1, 3], text[2, 4], text[0, 5] = V, V + 2, V + 1, V
    return text


def answer(model: Any, case: zoo.Case) -> torch.Tensor:
    call = zoo.inputs(case, ids(case))
    if "decoder_input_ids" in call:
        call["decoder_input_ids"][:, 2] = V + 1
    with torch.no_grad():
        return zoo.main_output(model(**call))


def written(model: Any, prompt: Any) -> Any:
    """The model with the prompt's rows written into its own tables: what the hooks must compute."""
    with torch.no_grad():
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        table[list(NEW)] = prompt.added.rows.to(table.dtype)
        if prompt.added.output_rows is not None:
            head.weight[list(NEW)] = prompt.added.output_rows.to(head.weight.dtype)
        if prompt.added.output_bias is not None:
            head.bias[list(NEW)] = prompt.added.output_bias.to(head.bias.dtype)
    return model


def stir(prompt: Any) -> None:
    with torch.no_grad():
        for parameter in prompt.added.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_they_equal_rows_written_into_the_tables(tied: bool, method: Any, case: zoo.Case, tmp_path: Path) -> None:
    model = resized(case, tie_word_embeddings=tied)
    with untouched(model), softhooks.attach(model, method, train_added_tokens=NEW) as prompt:
        before = answer(model, case)
        stir(prompt)
        found = answer(model, case)
        assert float((found - before).abs().max()) > 1e-3
        prompt.save_pretrained(tmp_path)
        rows = copy.deepcopy(prompt.added)
        with softhooks.disabled(model):
            bare = answer(model, case)
        with_rows = prompt
        twin = resized(case, tie_word_embeddings=tied)
    assert same_bits(answer(twin, case), bare)
    written(twin, type("Holder", (), {"added": rows})())
    with torch.no_grad(), softhooks.attach(twin, method) as plain:
        plain.encoder.load_state_dict(with_rows.encoder.state_dict())
        plain.heads.load_state_dict(with_rows.heads.state_dict())
        torch.testing.assert_close(answer(twin, case), found, rtol=1e-4, atol=1e-5)
    for seed in (2, 3):  # rows that another process has drawn
        fresh = resized(case, seed, tie_word_embeddings=tied)
        loaded = softhooks.load(fresh, tmp_path)
        torch.testing.assert_close(answer(fresh, case), found, rtol=1e-4, atol=1e-5)
        assert not list(loaded.parameters())


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_they_generate_as_written_rows_do(case: zoo.Case) -> None:
    model = resized(case)
    prompt = softhooks.attach(model, PromptTuning(4), train_added_tokens=NEW)
    stir(prompt)
    text = ids(case)
    mask = torch.ones_like(text)
    mask[1, :2] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    found = {beams: model.generate(text, num_beams=beams, **options) for beams in (1, 2)}
    twin = written(resized(case), prompt)
    plain = softhooks.attach(twin, PromptTuning(4))
    plain.encoder.load_state_dict(prompt.encoder.state_dict())
    for beams, generated in found.items():
        assert torch.equal(twin.generate(text, num_beams=beams, **options), generated)


def test_each_row_has_its_prompts_rows() -> None:
    case = CASES[0]
    model = resized(case)
    prompts = {name: softhooks.attach(model, PromptTuning(4), name, train_added_tokens=NEW) for name in ("a", "b")}
    with pytest.warns(UserWarning, match="embedding rows .* were added"):
        softhooks.attach(model, PromptTuning(4), "plain")
    for prompt in prompts.values():
        stir(prompt)
    alone = {}
    for name in ("a", "b", "plain"):
        softhooks.activate(model, name)
        alone[name] = answer(model, case)
    with softhooks.disabled(model):
        alone[None] = answer(model, case)
    for names in (["a", "b", "plain"], ["b", None, "a"], [None, "a", "a"]):
        with softhooks.rows(model, names):
            together = answer(model, case)
        for row, name in enumerate(names):
            torch.testing.assert_close(together[row], alone[name][row], rtol=1e-4, atol=1e-5)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[7]], ids=str)
def test_they_learn_and_the_base_keeps_every_bit(case: zoo.Case) -> None:
    model = resized(case).train()
    prompt = softhooks.attach(model, PromptTuning(4), train_added_tokens=NEW)
    start = [parameter.detach().clone() for parameter in prompt.added.parameters()]
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.05, weight_decay=0.1)
    call = zoo.inputs(case, ids(case))
    call["labels"] = call.get("decoder_input_ids", call["input_ids"]).clone()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**call).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not [one for one, now in zip(start, prompt.added.parameters(), strict=True) if torch.equal(one, now)]
    prompt.verify_frozen()


def test_a_trainer_trains_saves_and_resumes_them(tmp_path: Path) -> None:
    def run(resume: bool) -> tuple[Any, torch.Tensor]:
        model = resized(CASES[0])
        callback = SoftPromptCallback(PromptTuning(4), train_added_tokens=True)
        trainer = training.make(
            tmp_path, model, "causal", [callback], max_steps=6, save_strategy="steps", save_steps=3,
            given={"train_dataset": [{**row, "input_ids": ids(CASES[0])[0], "labels": ids(CASES[0])[0],
                                      "attention_mask": torch.ones(7)} for row in training.rows("causal")]},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        trainer.save_model(str(tmp_path / "saved"))
        return model, answer(model.eval(), CASES[0])

    _, expected = run(resume=False)
    _, resumed = run(resume=True)
    assert same_bits(resumed, expected)
    for folder in ("saved", "checkpoint-6"):
        fresh = resized(CASES[0], seed=5)
        softhooks.load(fresh, tmp_path / folder)
        torch.testing.assert_close(answer(fresh, CASES[0]), expected)


def test_a_decorated_function_trains_them(tmp_path: Path) -> None:
    @softhooks.tune(PromptTuning(4), save_to=tmp_path, train_added_tokens=True)
    def train(_model: Any, soft_prompt: Any = None) -> int:
        return int(soft_prompt.added.ids.numel())

    assert train(resized(CASES[0])) == 3


# --- which ------------------------------------------------------------------------------------------------------------


def test_true_means_the_rows_that_were_added() -> None:
    model = resized(CASES[0])
    prompt = softhooks.attach(model, PromptTuning(4), train_added_tokens=True)
    assert prompt.added.ids.tolist() == list(NEW)
    assert prompt.num_parameters == 4 * 32 + 3 * 32 * (1 if model.config.tie_word_embeddings else 2)


@pytest.mark.parametrize(
    "build", [lambda: zoo.build("llama"), lambda: resized(CASES[1])], ids=["not resized", "untold"]
)
def test_true_is_refused_where_nothing_tells_which(build: Any) -> None:
    with pytest.raises(OptionError, match="Pass the ids"):
        softhooks.attach(model := build(), PromptTuning(4), train_added_tokens=True)
    assert not hasattr(model, "soft_prompt")


@pytest.mark.parametrize("asked", [[V + 3], [-1], [], ["<new>"], [1.5], "new"])
def test_ids_that_are_none_are_refused(asked: Any) -> None:
    with pytest.raises(OptionError, match="train_added_tokens"):
        softhooks.attach(resized(CASES[0]), PromptTuning(4), train_added_tokens=asked)


def test_named_rows_need_not_be_the_last() -> None:
    model = zoo.build("llama")
    with untouched(model), softhooks.attach(model, PromptTuning(4), train_added_tokens=[50, 7, 7]) as prompt:
        assert prompt.added.ids.tolist() == [7, 50]
        model(torch.tensor([[7, 50, 9]]), labels=torch.tensor([[7, 50, 9]])).loss.backward()
        assert prompt.added.rows.grad.abs().sum(1).min() > 0


# --- refused ----------------------------------------------------------------------------------------------------------


def test_tables_that_cannot_be_replaced_row_by_row_are_refused() -> None:
    for targets, saved in ((["q_proj"], ["embed_tokens", "lm_head"]), (["lm_head"], None), (["embed_tokens"], None)):
        over = peft.get_peft_model(
            resized(CASES[0]), peft.LoraConfig(r=2, target_modules=targets, modules_to_save=saved)
        )
        with pytest.raises(UnsupportedModelError, match="PEFT adapter"):
            softhooks.attach(over, PromptTuning(4), train_added_tokens=NEW)
    second = resized(CASES[0])
    second.other = torch.nn.Embedding(V + 3, 32)
    second.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: second.other(kwargs["input_ids"]) is None or None, with_kwargs=True
    )
    with pytest.raises(UnsupportedModelError, match="a second embedding"):
        softhooks.attach(second, PromptTuning(4), train_added_tokens=NEW)
    assert not hasattr(second, "soft_prompt")


def test_a_model_whose_vocabulary_has_fewer_rows_is_refused(tmp_path: Path) -> None:
    softhooks.attach(resized(CASES[0]), PromptTuning(4), train_added_tokens=NEW).save_pretrained(tmp_path)
    with pytest.raises(PromptMismatchError, match="vocabulary"):
        softhooks.load(zoo.build("llama"), tmp_path)
    other = resized(CASES[0], tie_word_embeddings=True)
    with pytest.raises(PromptMismatchError, match="added tokens"):
        softhooks.load(other, tmp_path)
    assert not hasattr(other, "soft_prompt")


@pytest.mark.parametrize("told", [[V, V + 1], [V, V, V + 1], [V, V + 1, "x"], None, [True, 2, 3], [-1, 2, 3], {}])
def test_ids_in_a_file_are_not_trusted(told: Any, tmp_path: Path) -> None:
    softhooks.attach(resized(CASES[0]), PromptTuning(4), train_added_tokens=NEW).save_pretrained(tmp_path)
    path = tmp_path / "soft_prompt.safetensors"
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    described = json.loads(metadata["softhooks"])
    described["added_tokens"] = told
    save_file(load_file(path), path, {**metadata, "softhooks": json.dumps(described)})
    with pytest.raises(CheckpointError, match="added token"):
        softhooks.load(resized(CASES[0]), tmp_path)


def test_a_copy_has_rows_of_its_own() -> None:
    model = resized(CASES[0])
    prompt = softhooks.attach(model, PromptTuning(4), train_added_tokens=NEW)
    expected = answer(model, CASES[0])
    twin = copy.deepcopy(model)
    stir(prompt)
    assert same_bits(answer(twin, CASES[0]), expected)
    assert not same_bits(answer(model, CASES[0]), expected)


def test_formats_that_hold_no_rows_are_refused(tmp_path: Path) -> None:
    model = resized(CASES[0])
    prompt = softhooks.attach(model, PromptTuning(4), train_added_tokens=NEW)
    with pytest.raises(softhooks.UnsupportedMethodError, match="embeddings of 3 added tokens"):
        prompt.save_pretrained(tmp_path, as_peft=True)
    with pytest.raises(softhooks.UnsupportedMethodError, match="embeddings of added tokens"):
        sequence_embeddings(model, [1, V, 5])
    assert not list(tmp_path.iterdir())


def test_a_trainer_goes_on_only_with_the_same_rows(tmp_path: Path) -> None:
    model = resized(CASES[0])
    prompt = softhooks.attach(model, PromptTuning(4), train_added_tokens=NEW)
    with pytest.raises(softhooks.NameTakenError, match="rows of 3 added tokens"):
        training.make(tmp_path, model, "causal", [SoftPromptCallback(PromptTuning(4))])
    callback = SoftPromptCallback(PromptTuning(4), train_added_tokens=True)
    training.make(tmp_path, model, "causal", [callback])
    assert callback.soft_prompt is prompt


@pytest.mark.parametrize("way", ["attach", "method", "callback"])
def test_a_tokenizer_tells_which_tokens_were_added(way: str, tmp_path: Path) -> None:
    tokenizer = tokens.tokenizer()
    tokenizer.add_tokens(["<new-a>", "<new-b>"])
    added = tokenizer.convert_tokens_to_ids(["<new-a>", "<new-b>"])
    model = zoo.build("gpt2", vocab_size=len(tokenizer) - 2)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=16, mean_resizing=False)
    if way == "callback":
        callback = SoftPromptCallback(PromptTuning(4), train_added_tokens=True)
        training.make(tmp_path, model, "causal", [callback], given={"processing_class": tokenizer})
        prompt = callback.soft_prompt
    elif way == "method":
        method = PromptTuning(4, init="text", init_text="a b c d", tokenizer=tokenizer)
        prompt = softhooks.attach(model, method, train_added_tokens=True)
    else:
        prompt = softhooks.attach(model, PromptTuning(4), train_added_tokens=tokenizer)
    assert prompt.added.ids.tolist() == added


@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=str)
@pytest.mark.parametrize("method", [PromptTuning(4), PTuning(4)], ids=lambda m: m.kind)
def test_virtual_tokens_stand_on_no_added_token(method: Any, case: zoo.Case) -> None:
    model, text = zoo.build(case.arch, case.head), zoo.text(2, 6)
    others = sorted(set(range(V)) - set(text.flatten().tolist()))
    prompt = softhooks.attach(model, method, train_added_tokens=others)
    call = zoo.inputs(case, text)
    kept = [number for number in range(V) if number not in others] if case.head == "causal" else [0, 1, 2]
    with torch.no_grad():
        before = zoo.main_output(model(**call))[..., kept]
        stir(prompt)
        assert torch.equal(zoo.main_output(model(**call))[..., kept], before)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_cache_is_not_taken_up_when_the_rows_have_changed(method: Any) -> None:
    model = resized(CASES[0])
    prompt = softhooks.attach(model, method, train_added_tokens=NEW)
    with torch.no_grad():
        cache = model(ids(CASES[0]), use_cache=True).past_key_values
        model(ids(CASES[0])[:, :1], past_key_values=copy.deepcopy(cache))
        stir(prompt)
        with pytest.raises(softhooks.UnsupportedModeError):
            model(ids(CASES[0])[:, :1], past_key_values=cache)
