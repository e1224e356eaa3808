"""PEFT's multitask prompts: loading gives PEFT's logits, writing gives softhooks', and the refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor
from untouched import remove_all, untouched

import softhooks
from softhooks import CheckpointError, MultitaskPromptTuning, PromptMismatchError, UnsupportedMethodError

peft = pytest.importorskip("peft")
P, K, H = 4, 3, 32
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
TASKS = torch.tensor([2, 0])


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def written(folder: Path, arch: str, head: str = "causal", rank: int = 1, tasks: int = K) -> Any:
    """Make and save an adapter with PEFT, with random values; return its model."""
    torch.manual_seed(2)
    task = {"causal": "CAUSAL_LM", "sequence": "SEQ_CLS", "tokens": "TOKEN_CLS", "seq2seq": "SEQ_2_SEQ_LM"}[head]
    config = peft.MultitaskPromptTuningConfig(
        task_type=task, num_virtual_tokens=P, num_tasks=tasks, num_ranks=rank, prompt_tuning_init="RANDOM"
    )
    with peers.quiet():
        model = peft.get_peft_model(zoo.build(arch, head), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def answer(model: Any, ids: Tensor, **extra: Any) -> Tensor:
    with peers.quiet():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits
    return logits if logits.dim() == 2 else logits[:, -ids.shape[1] :]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(
    ("arch", "head"),
    [
        *[(arch, "causal") for arch in ("llama", "gpt2", "qwen3", "gemma3", "gptj")],
        ("llama", "sequence"),
        ("bert", "tokens"),
    ],
)
def test_pefts_tasks_answer_as_in_peft(tmp_path: Path, arch: str, head: str, rank: int) -> None:
    ids = zoo.text(2, 7)
    theirs = written(tmp_path, arch, head, rank)
    expected = answer(theirs, ids, task_ids=TASKS)
    model = zoo.build(arch, head)
    prompt = softhooks.load(model, tmp_path)
    assert isinstance(prompt.method, MultitaskPromptTuning)
    assert (prompt.method.num_virtual_tokens, prompt.method.names, prompt.method.rank) == (P, ("0", "1", "2"), rank)
    torch.testing.assert_close(answer(model, ids, task_ids=TASKS), expected, **CLOSE)
    assert not torch.allclose(answer(model, ids, task_ids=1 - TASKS.clamp(max=1)), expected, atol=1e-2)
    prompt.remove()
    trainable = softhooks.load(model, tmp_path, trainable=True)
    torch.testing.assert_close(answer(model, ids, task_ids=TASKS), expected, **CLOSE)
    assert all(parameter.requires_grad for parameter in trainable.parameters())


def test_one_task_of_peft_needs_no_task_ids_here(tmp_path: Path) -> None:
    ids = zoo.text(2, 7)
    theirs = written(tmp_path, "llama", tasks=1)
    expected = answer(theirs, ids, task_ids=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        theirs(input_ids=ids)
    model = zoo.build("llama")
    softhooks.load(model, tmp_path)
    torch.testing.assert_close(answer(model, ids), expected, **CLOSE)


@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_case_9_a_prompt_of_an_encoder_decoder_answers_as_peft_generates(tmp_path: Path, arch: str) -> None:
    """In PEFT, the forward prompts the decoder too, but generation does not; here they agree."""
    ids, start = zoo.text(2, 7), zoo.build(arch, "seq2seq").config.decoder_start_token_id
    theirs = written(tmp_path, arch, "seq2seq")
    options: dict[str, Any] = {
        "max_new_tokens": 1,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    begun = torch.full((2, 1), start)
    with torch.no_grad(), peers.quiet():
        generated = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), task_ids=TASKS, **options
        ).logits[0]
        forward = theirs(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=zoo.text(2, 1), task_ids=TASKS
        ).logits[:, -1]
        assert float((forward - generated).abs().max()) > 0.1
        model = zoo.build(arch, "seq2seq")
        softhooks.load(model, tmp_path)
        ours = model(input_ids=ids, decoder_input_ids=begun, task_ids=TASKS).logits[:, -1]
    torch.testing.assert_close(ours, generated, **CLOSE)


def test_pefts_prompt_may_be_a_source(tmp_path: Path) -> None:
    written(tmp_path, "llama")
    held = load_file(tmp_path / TENSORS)
    mean = held["prefix_task_cols"].mean(0) @ held["prefix_task_rows"].mean(0)
    with softhooks.attach(zoo.build("llama"), MultitaskPromptTuning(P, tasks=1, source=tmp_path)) as prompt:
        torch.testing.assert_close(prompt.encoder("embeddings").detach(), held["prompt_embeddings"] * mean)


# --- written ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, K])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_what_is_written_for_peft_answers_in_peft_and_is_read_back(tmp_path: Path, arch: str, count: int) -> None:
    model, ids = zoo.build(arch), zoo.text(2, 7)
    extra = {"task_ids": TASKS} if count > 1 else {}
    with softhooks.attach(model, MultitaskPromptTuning(P, tasks=count, rank=2)) as prompt, torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        expected = answer(model, ids, **extra)
        prompt.save_pretrained(tmp_path, as_peft=True)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["prompt_tuning_init"] == "RANDOM", "otherwise PEFT reads its source again"
    with peers.quiet():
        theirs = peft.PeftModel.from_pretrained(zoo.build(arch), str(tmp_path)).eval()
    torch.testing.assert_close(answer(theirs, ids, **extra), expected, **CLOSE)
    softhooks.load(model, tmp_path)
    torch.testing.assert_close(answer(model, ids, **extra), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("arch", "head"), [("t5", "seq2seq"), ("bert", "sequence")])
def test_what_peft_would_compute_otherwise_is_refused(tmp_path: Path, arch: str, head: str) -> None:
    prompt = softhooks.attach(zoo.build(arch, head), MultitaskPromptTuning(P, tasks=K))
    with prompt, pytest.raises(UnsupportedMethodError, match="several tasks"):
        prompt.save_pretrained(tmp_path, as_peft=True)
    assert not list(tmp_path.iterdir())


# --- nothing is trusted -----------------------------------------------------------------------------------------------

FALSE: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "no columns": lambda config, held: held.pop("prefix_task_cols"),
    "no rows": lambda config, held: held.pop("prefix_task_rows"),
    "no prompt": lambda config, held: held.pop("prompt_embeddings"),
    "other tasks": lambda config, held: config.update(num_tasks=2),
    "no tasks": lambda config, held: config.update(num_tasks=0),
    "tasks that are a word": lambda config, held: config.update(num_tasks="3"),
    "tasks that are true": lambda config, held: config.update(num_tasks=True),
    "another rank": lambda config, held: config.update(num_ranks=2),
    "no rank": lambda config, held: config.pop("num_ranks"),
    "another length": lambda config, held: config.update(num_virtual_tokens=P - 1),
    "a row too few": lambda config, held: held.update(prefix_task_cols=held["prefix_task_cols"][:, 1:].clone()),
    "two dimensions": lambda config, held: held.update(prefix_task_rows=held["prefix_task_rows"][0].clone()),
    "whole numbers": lambda config, held: held.update(prefix_task_rows=held["prefix_task_rows"].long()),
    "a prompt of whole numbers": lambda config, held: held.update(prompt_embeddings=held["prompt_embeddings"].long()),
    "no number": lambda config, held: held["prefix_task_cols"].fill_(float("nan")),
    "a foreign tensor": lambda config, held: held.update({"lora_A": torch.zeros(2)}),
    "another kind": lambda config, held: config.update(peft_type="PROMPT_TUNING"),
}


@pytest.mark.parametrize("tasks", [1, K])
@pytest.mark.parametrize("name", FALSE)
def test_a_false_checkpoint_is_refused(tmp_path: Path, name: str, tasks: int) -> None:
    written(tmp_path, "llama", tasks=tasks)
    config, held = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / TENSORS)
    FALSE[name](config, held)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(held, tmp_path / TENSORS)
    model = zoo.build("llama")
    with untouched(model), pytest.raises((CheckpointError, PromptMismatchError)):
        softhooks.load(model, tmp_path)


def test_a_prompt_for_another_model_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "llama")
    for model in (zoo.build("opt"), zoo.build("t5", "seq2seq"), zoo.build("bert", "masked")):
        with untouched(model), pytest.raises(PromptMismatchError):
            softhooks.load(model, tmp_path)
