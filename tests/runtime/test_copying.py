"""Copies and pickles of a model with a prompt are independent models with prompts of their own."""

from __future__ import annotations

import ast
import copy
import gc
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from table import BY_NAME, TABLE, TRAINERS, Entry, fitting
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainingArguments
from untouched import differences, remove_all, same_bits, snapshot

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, SoftPrompt, SoftPromptCallback, constraint
from softhooks.backbone import attention_interface
from softhooks.compat.offload import device_of
from softhooks.inject.prefix.key_values import KeyValues
from softhooks.trainer import trainer_patches

SUPPORT = Path(zoo.__file__).parent
CASES = [
    zoo.Case("llama", "causal"),
    zoo.Case("gptj", "causal"),
    zoo.Case("bert", "sequence"),
    zoo.Case("deberta-v2", "masked"),
    zoo.Case("t5", "seq2seq"),
]
RARER = [zoo.Case("gemma3", "sequence"), zoo.Case("albert", "tokens"), zoo.Case("bart", "sequence")]
PAIRS = fitting((*TABLE, *TRAINERS), CASES) + fitting([BY_NAME["prompt"], BY_NAME["prefix"]], RARER)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def stored(value: Any) -> Any:
    """A round trip through `torch.save` and `torch.load`."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": stored}
each_way = pytest.mark.parametrize("duplicate", WAYS.values(), ids=WAYS)


def call_of(entry: Entry, case: zoo.Case) -> dict[str, torch.Tensor]:
    return zoo.inputs(case, zoo.text(2, 6, end=True)) | entry.extra(range(2))


def answer(model: Any, call: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return zoo.main_output(model(**call))


def step(model: Any, prompt: SoftPrompt, call: dict[str, torch.Tensor]) -> None:
    """Train a prompt for one step."""
    model.train()
    optimizer = torch.optim.SGD(list(prompt.parameters()), lr=0.1)
    torch.manual_seed(3)
    labels = call["decoder_input_ids"] if "decoder_input_ids" in call else call["input_ids"]
    if hasattr(model, "can_generate") and model.can_generate():
        loss = model(**call, labels=labels).loss
    else:
        loss = zoo.main_output(model(**call)).square().mean()
    loss.backward()
    optimizer.step()
    model.eval()


def state_of(prompt: SoftPrompt) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in prompt.encoder.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def twin_of(model: Any, name: str = "default") -> SoftPrompt:
    return softhooks.activate(model, name)


@pytest.mark.parametrize(("entry", "case"), PAIRS, ids=str)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_is_a_model_of_its_own(duplicate: Callable[[Any], Any], entry: Entry, case: zoo.Case) -> None:
    """Its forward, training, frozen check and removal do not depend on the first one."""
    model = zoo.build(case.arch, case.head)
    bare, call = copy.deepcopy(model), call_of(entry, case)
    without = answer(bare, zoo.inputs(case, call["input_ids"]))
    prompt = entry.attach(model, 4)
    expected, before = answer(model, call), state_of(prompt)
    twin = duplicate(model)
    assert torch.equal(answer(model, call), expected)
    step(twin, twin_of(twin), call)
    assert equal(state_of(prompt), before)
    assert torch.equal(answer(model, call), expected)
    step(model, prompt, call)
    assert not equal(state_of(prompt), before)
    assert equal(state_of(prompt), state_of(twin_of(twin)))
    expected = answer(model, call)
    prompt.remove()
    del model, prompt
    gc.collect()
    assert torch.equal(answer(twin, call), expected)
    own = twin_of(twin)
    assert own.model is twin
    assert own.is_attached
    own.verify_frozen()
    own.remove()
    assert torch.equal(answer(twin, zoo.inputs(case, call["input_ids"])), without)
    assert not differences(_by_value(bare), _by_value(twin))
    remove_all()
    assert not attention_interface.users


def _by_value(model: torch.nn.Module) -> dict[str, Any]:
    """A snapshot without what differs between two models that are alike: the identities of their parts."""
    found = {key: value for key, value in snapshot(model).items() if not key.endswith("]")}
    names = {f"attributes of {name}": sorted(vars(module)) for name, module in model.named_modules()}
    hooks = {f"hooks of {name}": _hooks(module) for name, module in model.named_modules()}
    return found | names | hooks


def _hooks(module: torch.nn.Module) -> dict[str, int]:
    return {key: len(value) for key, value in vars(module).items() if "hooks" in key and value is not None}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gptj", "t5"])
@pytest.mark.parametrize("name", ["prompt", "prefix", "prompt-after-first"])
@each_way
def test_a_copy_generates(duplicate: Callable[[Any], Any], name: str, arch: str) -> None:
    model = zoo.build(arch, "seq2seq" if arch == "t5" else "causal")
    prompt = BY_NAME[name].attach(model, 3)
    ids = zoo.text(2, 5)
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 6}
    expected = model.generate(ids, num_beams=2, **asked)
    twin = duplicate(model)
    prompt.remove()
    del model, prompt
    gc.collect()
    assert torch.equal(twin.generate(ids, num_beams=2, **asked), expected)


@pytest.mark.parametrize("method", [PromptTuning(3), PrefixTuning(3), LlamaAdapter(3)], ids=lambda method: method.kind)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_is_replaced_by_its_copy(method: Any, attention: str) -> None:
    """`model = copy.deepcopy(model)`: the first one is collected."""
    model, ids = zoo.build("llama", attention=attention), zoo.text(2, 6)
    softhooks.attach(model, method)
    expected = answer(model, {"input_ids": ids})
    model = copy.deepcopy(model)
    gc.collect()
    answers = list(map(lambda row: model(row).logits, [ids] * 3))  # noqa: C417 - a StopIteration would end it silently
    assert len(answers) == 3
    assert all(torch.equal(found, expected) for found in answers)


def test_a_copy_of_a_copy() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    softhooks.attach(model, PrefixTuning(3))
    expected = answer(model, {"input_ids": ids})
    for duplicate in (*WAYS.values(), *WAYS.values()):
        model = duplicate(model)
        gc.collect()
        assert torch.equal(answer(model, {"input_ids": ids}), expected)


def test_a_second_prompt_copies_the_head_and_not_the_model_with_it() -> None:
    """The first prompt's hook on the head holds the model."""
    gc.collect()
    before = set(map(id, attention_interface.users))
    model = zoo.build("bert", "sequence")
    with softhooks.attach(model, PromptTuning(3)) as first, softhooks.attach(model, PromptTuning(3), "other") as second:
        assert not second.heads["classifier"]._forward_hooks
        assert set(map(id, attention_interface.users)) - before == {id(first.prompted_model)}


@each_way
def test_two_prompts_of_a_copy(duplicate: Callable[[Any], Any]) -> None:
    model, ids = zoo.build("bert", "sequence"), zoo.text(3, 6)
    softhooks.attach(model, PrefixTuning(3), "one")
    softhooks.attach(model, PrefixTuning(4), "two")
    with softhooks.rows(model, ["one", None, "two"]):
        expected = answer(model, {"input_ids": ids})
    twin = duplicate(model)
    for name in ("one", "two"):
        softhooks.activate(model, name).remove()
    with softhooks.rows(twin, ["one", None, "two"]):
        assert torch.equal(answer(twin, {"input_ids": ids}), expected)
    softhooks.attach(twin, PromptTuning(2), "three")
    for name in ("one", "two", "three"):
        softhooks.activate(twin, name).remove()
    assert torch.equal(answer(twin, {"input_ids": ids}), answer(model, {"input_ids": ids}))


@each_way
def test_lora_under_a_copied_prompt(duplicate: Callable[[Any], Any]) -> None:
    base = peft.get_peft_model(
        zoo.build("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    )
    prompt, ids = softhooks.attach(base, PrefixTuning(3)), zoo.text(2, 6)
    expected = answer(base, {"input_ids": ids})
    twin = duplicate(base)
    prompt.remove()
    without = answer(base, {"input_ids": ids})
    del base, prompt
    gc.collect()
    assert torch.equal(answer(twin, {"input_ids": ids}), expected)
    twin_of(twin).remove()
    assert torch.equal(answer(twin, {"input_ids": ids}), without)
    torch.testing.assert_close(answer(twin.merge_and_unload(), {"input_ids": ids}), without, rtol=1e-4, atol=1e-5)


@each_way
def test_a_copy_that_was_made_inside_a_block_is_outside_of_it(duplicate: Callable[[Any], Any]) -> None:
    """`disabled` ends for the model that it was entered with, so a copy must not inherit it."""
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    softhooks.attach(model, PrefixTuning(3))
    expected = answer(model, {"input_ids": ids})
    with softhooks.disabled(model):
        twin = duplicate(model)
    assert torch.equal(answer(twin, {"input_ids": ids}), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_that_was_made_inside_a_forward(
    duplicate: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = zoo.build("llama"), {"input_ids": zoo.text(2, 6)}
    softhooks.attach(model, PrefixTuning(3))
    expected, made, own = answer(model, ids), [], type(model.model.layers[1]).forward

    def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(duplicate(model))
        return own(layer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.layers[1]), "forward", forward)
        assert torch.equal(answer(model, ids), expected)
    assert torch.equal(answer(made[0], ids), expected)
    assert torch.equal(answer(model, ids), expected)


@each_way
def test_the_handle_of_a_copy(duplicate: Callable[[Any], Any]) -> None:
    """Copying a handle copies its model, and a copied pair of both stays a pair."""
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    prompt = softhooks.attach(model, PrefixTuning(3))
    expected = answer(model, {"input_ids": ids})
    alone = duplicate(prompt)
    pair = duplicate({"model": model, "prompt": prompt})
    reverse = duplicate((prompt, model))
    prompt.remove()
    for handle in (alone, pair["prompt"], reverse[0]):
        assert torch.equal(answer(handle.model, {"input_ids": ids}), expected)
        assert handle is twin_of(handle.model)
    assert pair["prompt"].model is pair["model"]
    assert reverse[0].model is reverse[1]
    alone.remove()
    assert torch.equal(answer(alone.model, {"input_ids": ids}), answer(model, {"input_ids": ids}))


def test_shallow_copies_are_the_same_model_and_the_same_handle() -> None:
    """`copy.copy` of a module shares its parts, and so its prompts."""
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    without = answer(model, {"input_ids": ids})
    prompt = softhooks.attach(model, PrefixTuning(3))
    other = copy.copy(model)
    assert torch.equal(answer(other, {"input_ids": ids}), answer(model, {"input_ids": ids}))
    assert copy.copy(prompt) is prompt
    assert softhooks.activate(other, "default") is prompt
    prompt.remove()
    for one in (model, other):
        assert torch.equal(answer(one, {"input_ids": ids}), without)
        assert torch.equal(one.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))


@pytest.mark.parametrize("name", ["prompt", "prefix", "adapter", "cpt", "prompt-end"])
def test_an_average_of_a_model_with_a_prompt(name: str) -> None:
    """`AveragedModel` copies its model; its mean is the prompt's mean, on a base that does not move."""
    case = zoo.Case("bert", "sequence") if name == "prompt-end" else zoo.Case("llama", "causal")
    entry, model = BY_NAME[name], zoo.build(case.arch, case.head)
    call = call_of(entry, case)
    prompt = entry.attach(model, 3)
    averaged = AveragedModel(model)
    states = []
    for _ in range(3):
        step(model, prompt, call)
        averaged.update_parameters(model)
        states.append(state_of(prompt))
    own = softhooks.activate(averaged, "default")
    for key, value in state_of(own).items():
        torch.testing.assert_close(value, sum(state[key] for state in states) / 3)
    own.verify_frozen()
    prompt.remove()
    del model, prompt
    gc.collect()
    averaged.eval()
    twin = copy.deepcopy(averaged.module)
    assert torch.equal(answer(averaged, call), answer(twin, call))
    with softhooks.disabled(averaged.module):
        assert not torch.equal(answer(averaged, zoo.inputs(case, call["input_ids"])), answer(twin, call))


def test_constraints_hold_on_a_copy() -> None:
    model = zoo.build("llama")
    prompt = BY_NAME["cpt"].attach(model, 4)
    twin = pickled(model)
    prompt.remove()
    own = twin_of(twin)
    assert any(encoder is own.encoder for encoder in constraint.watched)
    step(twin, own, {"input_ids": zoo.text(2, 6)})
    own.remove()
    assert not any(encoder is own.encoder for encoder in constraint.watched)


@pytest.mark.parametrize(
    "block", [lambda model: softhooks.rows(model, ["one", None]), softhooks.kept], ids=["rows", "kept"]
)
@each_way
def test_what_a_block_holds_for_its_model_no_copy_has(duplicate: Callable[[Any], Any], block: Any) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    for name in ("one", "two"):
        softhooks.attach(model, PrefixTuning(3), name)
    expected = answer(model, {"input_ids": ids})
    with block(model):
        twin = duplicate(model)
        assert torch.equal(answer(twin, {"input_ids": ids}), expected)
    assert torch.equal(answer(twin, {"input_ids": ids}), expected)
    assert torch.equal(twin.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))


# --- Trainers ---------------------------------------------------------------------------------------------------------


class _Copies(softhooks.SoftPromptCallback):
    """Copies the model in the middle of its training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.made = [copy.deepcopy(model), pickled(model)]
        self.expected = answer(model.eval(), {"input_ids": zoo.text(2, 6)})
        model.train()


def trainer_of(model: Any, folder: Path, *callbacks: SoftPromptCallback) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in zoo.text(4, 6)]
    args = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_steps=1,
    )  # fmt: skip
    return Trainer(model=model, args=args, train_dataset=rows, callbacks=list(callbacks))


def test_a_model_that_a_trainer_trains_is_copied(tmp_path: Path) -> None:
    callback = _Copies(PrefixTuning(3))
    trainer = trainer_of(zoo.build("llama"), tmp_path, callback)
    trainer.train()
    ids = {"input_ids": zoo.text(2, 6)}
    for twin in callback.made:
        assert torch.equal(answer(twin.eval(), ids), callback.expected)
        again = SoftPromptCallback(PrefixTuning(3))
        trainer_of(twin, tmp_path / "again", again).train()
        assert again.soft_prompt is twin_of(twin)
        assert not torch.equal(answer(twin.eval(), ids), callback.expected)
        again.soft_prompt.remove()
        assert "save_pretrained" not in vars(twin)
    assert torch.equal(answer(trainer.model.eval(), ids), callback.expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_callback_that_was_copied_meets_trainers(duplicate: Callable[[Any], Any], tmp_path: Path) -> None:
    """As a process launcher passes it on; also if it is added to an existing Trainer."""
    callback = duplicate(SoftPromptCallback(PrefixTuning(3)))
    assert any(one is callback for one in trainer_patches.callbacks)
    trainer = trainer_of(zoo.build("llama"), tmp_path)
    trainer.add_callback(callback)
    assert callback.soft_prompt is not None
    assert callback.soft_prompt.is_attached


# --- other processes --------------------------------------------------------------------------------------------------

CODE = """
import sys, torch
for model, call, expected, generated, without in torch.load(sys.argv[1], weights_only=False):
    assert "softhooks" in sys.modules
    import softhooks
    with torch.no_grad():
        found = model(**call)
    found = found.logits if hasattr(found, "logits") else torch.stack([found.start_logits, found.end_logits], -1)
    assert torch.equal(found, expected), type(model)
    if generated is not None:
        again = model.generate(call["input_ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(again, generated), type(model)
    prompt = softhooks.activate(model, "default")
    optimizer = torch.optim.SGD(list(prompt.parameters()), lr=0.1)
    model.train()
    model(**call).logits.square().mean().backward()
    optimizer.step()
    prompt.verify_frozen()
    prompt.remove()
    with torch.no_grad():
        call = {k: v for k, v in call.items() if k in ("input_ids", "attention_mask", "decoder_input_ids")}
        assert torch.equal(model.eval()(**call).logits, without), type(model)
    print("right")
"""

ELSEWHERE = [
    ("prompt", zoo.Case("llama", "causal"), "sdpa"),
    ("prefix", zoo.Case("llama", "causal"), "eager"),
    ("adapter", zoo.Case("gpt2", "causal"), "sdpa"),
    ("prefix", zoo.Case("gptj", "causal"), "eager"),
    ("p-tuning-v2", zoo.Case("deberta-v2", "sequence"), "eager"),
    ("prompt-end", zoo.Case("bert", "sequence"), "sdpa"),
    ("prefix-mlp", zoo.Case("t5", "seq2seq"), "sdpa"),
    ("mpt-tasks", zoo.Case("llama", "causal"), "eager"),
]


def test_a_model_that_was_saved_whole_works_in_another_process(tmp_path: Path) -> None:
    """In the new process, only unpickling imports softhooks."""
    saved = []
    for name, case, attention in ELSEWHERE:
        entry = BY_NAME[name]
        model = zoo.build(case.arch, case.head, attention=attention)
        call = call_of(entry, case)
        without = answer(model, zoo.inputs(case, call["input_ids"]))
        entry.attach(model, 4)
        generates = case.head == "causal" and not entry.extra(range(2))
        asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        generated = model.generate(call["input_ids"], **asked) if generates else None
        saved.append((model, call, answer(model, call), generated, without))
    torch.save(saved, tmp_path / "models.pt")
    told = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "models.pt")], capture_output=True, text=True, timeout=300, check=False,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    assert told.stdout.split() == ["right"] * len(ELSEWHERE)


def test_a_model_is_handed_to_a_spawned_process() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    softhooks.attach(model, PrefixTuning(3))
    expected = answer(model, {"input_ids": ids})
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        found = pool.apply(_logits, (model, ids))
    assert torch.equal(found, expected)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    torch.set_num_threads(1)
    return answer(model, {"input_ids": ids}).clone()


# --- StopIteration ----------------------------------------------------------------------------------------------------


def test_keys_and_values_that_nobody_has_seen_are_an_error_of_ours() -> None:
    """A StopIteration would end a user's `map` as if there were no more batches."""
    for ask in (lambda: KeyValues({}, {}).length, lambda: KeyValues({}, {}).variants):
        with pytest.raises(softhooks.errors.PromptNotReachedError, match="called no attention function"):
            ask()


NEVER_EMPTY = {
    "runtime/added_token_hooks.py": "the argument that a layer is called with, and the ids of a probe",
    "cli/options.py": "the class that declares a dataclass's field",
    "inject/prefix/key_values.py": "a site that some prompt has keys for",
    "methods/context_tuning.py": "the tables of a prompt",
    "methods/llama_adapter.py": "the stack that a group of its encoder is named after",
    "saving/outer_model.py": "the prompts of a model that has some",
    "methods/cartridge.py": "two cartridges or more, which have tables",
    "compat/peft.py": "the model inside a PEFT model, which was found there",
    "demo/language_model/run.py": "the two trained prompts",
    "demo/language_model/train.py": "the labels of a row, which has an answer",
    "demo/smollm2.py": "the directories of an installed package",
    "backbone/find_stack.py": "a count without end",
    "trainer/incomplete_checkpoints.py": "a path and numbers without end",
    "formats/hub_errors.py": "the base classes of an error of the Hub's client",
    "saving/save_pretrained.py": "the prompts of a model that has some",
    "inject/branch/request_branches.py": "the branches of requests, some of which have one",
    "inject/prefix/request_prefixes.py": "the prefixes of requests, some of which have one",
    "runtime/request_prompts.py": "numbers without end",
    "serving/prompt_store.py": "the prompts of a store that has some",
    "layout/few_shot.py": "the pieces of a template, which must have a label",
}
"""Calls of `next` without a default, and why their iterators cannot be exhausted."""


def test_next_has_a_default_wherever_something_may_be_exhausted() -> None:
    package = Path(softhooks.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next":
                found |= set() if len(node.args) == 2 else {file.relative_to(package).as_posix()}
    assert found == set(NEVER_EMPTY)


def test_a_module_without_weights_is_an_error_of_ours() -> None:
    with pytest.raises(softhooks.errors.UnsupportedModelError, match="no parameters and no buffers"):
        device_of(torch.nn.Identity())
