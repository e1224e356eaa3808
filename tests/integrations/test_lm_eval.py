"""lm-evaluation-harness on tiny models: scores with a prompt, without it, and by its own command line."""

from __future__ import annotations

import functools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import examples
import tokens
import torch
import untouched
import zoo

import softhooks
from softhooks import Layout, LlamaAdapter, MultitaskPromptTuning, PrefixTuning, PromptTuning, PTuning, PTuningV2
from softhooks.errors import OptionError, PromptTooLongError, SoftHooksError, UnsupportedMethodError
from softhooks.integrations import lm_eval as integration

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

GIVEN = runpy.run_path(str(examples.HERE / "given" / "lm_eval.py"))
SCORED = [
    ("word5 word6 word7", " word8"), ("word5", " word9 word10 word11"), ("word12 word13", " word8"), ("word5 word6", " word9"),
]  # fmt: skip
LONG = " ".join(f"word{4 + (7 * i) % 80}" for i in range(250))


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, i, ("tiny", i, 1)) for i, each in enumerate(arguments)]


def hflm(model: Any, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(model, tokenizer=tokens.tokenizer(), add_bos_token=False, **options)


def with_prompt(model: Any, **options: Any) -> Any:
    return integration.SoftPromptLM(model, tokenizer=tokens.tokenizer(), add_bos_token=False, **options)


def answers(lm: Any) -> tuple[Any, ...]:
    generation = {"until": ["word7"], "max_gen_toks": 6}
    return (
        lm.loglikelihood(requests("loglikelihood", *SCORED), disable_tqdm=True),
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", (LONG,), ("word5 word6",)), disable_tqdm=True),
        lm.generate_until(
            requests("generate_until", *[(question, generation) for question, _ in SCORED]), disable_tqdm=True
        ),
    )


@torch.no_grad()
def alone(model: Any, context: str, continuation: str) -> float:
    """A continuation's log-likelihood, computed in a single row without the harness."""
    ids, scored = (tokens.tokenizer().encode(text, add_special_tokens=False) for text in (context, continuation))
    row = torch.tensor([ids + scored])
    told = model(row[:, :-1]).logits.log_softmax(-1)[0, -len(scored) :]
    return float(told.gather(-1, torch.tensor(scored)[:, None]).sum())


METHODS = [PromptTuning(5), PrefixTuning(5), PTuningV2(5), LlamaAdapter(5), PTuning(layout=Layout.insert(start=5))]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_scores_are_those_of_each_row_alone_in_batches_of_any_size(arch: str, method: Any) -> None:
    model = zoo.build(arch)
    prompt = softhooks.attach(model, method)
    for name, parameter in prompt.encoder.named_parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2 if "prompts" not in name else 0.0)
    expected = [alone(model, *pair) for pair in SCORED]
    with softhooks.disabled(model):
        bare = [alone(model, *pair) for pair in SCORED]
    assert (torch.tensor(bare) - torch.tensor(expected)).abs().max() > 1e-3  # the prompt matters
    for size in (1, 3, "auto"):
        lm = with_prompt(model, batch_size=size, max_batch_size=4)
        scored = lm.loglikelihood(requests("loglikelihood", *SCORED), disable_tqdm=True)
        torch.testing.assert_close(torch.tensor([s for s, _ in scored]), torch.tensor(expected), atol=2e-4, rtol=1e-4)


def test_with_the_prompt_off_every_answer_is_the_harness_s_own_bit_for_bit() -> None:
    model = zoo.build("gpt2")
    expected = answers(hflm(model, batch_size=2))
    softhooks.attach(model, PromptTuning(5))
    lm = with_prompt(model, batch_size=2)
    with softhooks.disabled(model):
        assert lm.max_length == 96
        assert answers(lm) == expected
    prompted = answers(lm)
    assert all(now != then for now, then in zip(prompted, expected, strict=True))
    assert answers(lm) == prompted


def test_generation_is_that_of_generate() -> None:
    model, tokenizer = zoo.build("llama"), tokens.tokenizer()
    softhooks.attach(model, PromptTuning(5))
    lm = with_prompt(model, batch_size=2)
    asked = [
        ("word5 word6", {"until": ["word95"], "max_gen_toks": 8}),
        ("word9", {"until": ["word95"], "max_gen_toks": 8}),
    ]
    told = lm.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    for (question, _), answer in zip(asked, told, strict=True):
        row = tokenizer(question, return_tensors="pt", add_special_tokens=False)
        ids = model.generate(
            row["input_ids"],
            attention_mask=row["attention_mask"],
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=zoo.PAD,
        )
        expected = tokenizer.decode(ids[0, row["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.split() == expected.split("word95")[0].split()


# --- the context --------------------------------------------------------------------------------------------------------

ROOM = [
    (PromptTuning(5), 5), (PrefixTuning(6), 6), (PrefixTuning(6, shift_positions=False), 0), (LlamaAdapter(6), 0),
    (PTuning(layout=Layout.insert(start=4)), 4),
]  # fmt: skip


@pytest.mark.parametrize(("method", "room"), ROOM, ids=lambda value: getattr(value, "kind", value))
def test_the_context_is_less_by_what_the_prompt_takes(method: Any, room: int) -> None:
    model = zoo.build("gpt2")
    prompt = softhooks.attach(model, method)
    lm = with_prompt(model)
    assert lm.max_length == 96 - room
    assert with_prompt(model, max_length=50).max_length == 50 - room
    with softhooks.disabled(model):
        assert lm.max_length == 96
    prompt.remove()
    assert lm.max_length == 96


def test_long_texts_fit_because_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("gpt2")  # has a table of 96 positions
    softhooks.attach(model, PromptTuning(5))
    lm = with_prompt(model, batch_size=2)
    asked = requests("loglikelihood_rolling", (LONG,))
    [whole] = lm.loglikelihood_rolling(asked, disable_tqdm=True)
    assert -2000 < whole < -250
    lm.loglikelihood(requests("loglikelihood", (LONG, "word5 word6")), disable_tqdm=True)
    lm.generate_until(requests("generate_until", (LONG, {"until": [], "max_gen_toks": 4})), disable_tqdm=True)
    monkeypatch.setattr(integration, "positions_taken", lambda model: 0)
    with pytest.raises(PromptTooLongError):
        lm.loglikelihood_rolling(asked, disable_tqdm=True)


def test_an_encoder_decoder_is_scored_with_its_prompt() -> None:
    model = zoo.build("t5", "seq2seq")
    softhooks.attach(model, PromptTuning(4))
    lm = with_prompt(model, batch_size=3)
    several = lm.loglikelihood(requests("loglikelihood", *SCORED), disable_tqdm=True)
    each = [lm.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)[0] for pair in SCORED]
    with softhooks.disabled(model):
        bare = lm.loglikelihood(requests("loglikelihood", *SCORED), disable_tqdm=True)
    torch.testing.assert_close(
        torch.tensor([s for s, _ in several]), torch.tensor([s for s, _ in each]), atol=1e-4, rtol=1e-4
    )
    assert (torch.tensor([s for s, _ in several]) - torch.tensor([s for s, _ in bare])).abs().max() > 1e-3


# --- how the harness finds it -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, a prompt, and a task, in folders."""
    folder = tmp_path_factory.mktemp("saved")
    model = zoo.build("llama")
    model.save_pretrained(folder / "model")
    tokens.tokenizer().save_pretrained(folder / "model")
    with softhooks.attach(model, PromptTuning(5)) as prompt:
        prompt.save_pretrained(folder / "prompt")
    GIVEN["write_task"](folder)
    return folder


def test_the_registered_model_type_and_the_object_score_the_same(saved: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM

    integration.register()
    integration.register()
    manager = TaskManager(include_path=str(saved), include_defaults=False)
    options: dict[str, Any] = {"tasks": ["tiny_choice"], "task_manager": manager, "bootstrap_iters": 0, "batch_size": 4}

    def scores(model: Any, arguments: str | None = None) -> torch.Tensor:
        more = {} if arguments is None else {"model_args": arguments, "device": "cpu"}
        samples = lm_eval.simple_evaluate(model, **options, **more)["samples"]["tiny_choice"]
        return torch.tensor([[score for score, _ in sample["filtered_resps"]] for sample in samples])

    found = scores("softhooks", f"pretrained={saved}/model,prompt={saved}/prompt,add_bos_token=False")
    model = AutoModelForCausalLM.from_pretrained(saved / "model")
    torch.testing.assert_close(scores(with_prompt(model, prompt=str(saved / "prompt"))), found, atol=1e-5, rtol=1e-5)
    assert scores("hf", f"pretrained={saved}/model,add_bos_token=False").sub(found).abs().max() > 0.1


def test_the_command_line_of_the_harness_knows_the_model_type(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    arguments = ["--model", "softhooks", "--model_args", f"pretrained={saved}/model,prompt={saved}/prompt"]
    arguments += ["--tasks", "tiny_choice", "--include_path", str(saved), "--device", "cpu", "--limit", "3"]
    monkeypatch.setattr(sys, "argv", ["softhooks.integrations.lm_eval", *arguments, "--output_path", str(tmp_path)])
    own = functools.partial(TaskManager, include_defaults=False)  # spares the test thousands of files of other tasks
    monkeypatch.setattr("lm_eval.tasks.TaskManager", own)
    integration.main()
    [written] = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text(encoding="utf-8"))
    assert set(results["results"]) == {"tiny_choice"}
    assert results["config"]["model"] == "softhooks"
    assert f"{saved}/prompt" in str(results["config"]["model_args"])


def test_the_example_of_the_docstring() -> None:
    names = examples.run("lm_eval")
    with_, without = (names[key]["samples"]["tiny_choice"] for key in ("with_prompt", "without"))
    assert [s["filtered_resps"] for s in with_] != [s["filtered_resps"] for s in without]


# --- refusals -----------------------------------------------------------------------------------------------------------

REFUSED = [
    (MultitaskPromptTuning(4, tasks=["a", "b"]), "task_ids"),
    (
        PTuning(layout=Layout.insert(start=2, after={(5,): 1}, missing="skip")),
        "positions of the virtual tokens depend on the text",
    ),
]


@pytest.mark.parametrize(("method", "named"), REFUSED, ids=lambda value: getattr(value, "kind", value))
def test_prompts_that_need_more_than_rows_of_ids_are_refused(method: Any, named: str, tmp_path: Path) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, method) as prompt:
        prompt.save_pretrained(tmp_path)
        with pytest.raises(UnsupportedMethodError, match=named):
            with_prompt(model)
    with untouched.untouched(model), pytest.raises(UnsupportedMethodError, match=named):
        with_prompt(model, prompt=str(tmp_path))


def test_one_prompt_no_more_no_less(saved: Path) -> None:
    model = zoo.build("llama")
    with untouched.untouched(model), pytest.raises(OptionError, match="the model has no prompt"):
        with_prompt(model)
    with softhooks.attach(model, PromptTuning(2)), pytest.raises(OptionError, match="the model already has a prompt"):
        with_prompt(model, prompt=str(saved / "prompt"))


def test_without_the_harness_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SoftHooksError, match=r'pip install "softhooks\[lm-eval\]"'):
        integration.register()
