"""The frozen check of the callback: changes of the base are found and named with their step, and nothing is lost."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import transformers as tf
import zoo
from untouched import remove_all

import softhooks
from softhooks import FrozenModifiedError, OptionError, PrefixTuning, PromptTuning, SoftPromptCallback, TrainerError
from softhooks.trainer.optimizer import refuse_fused

WEIGHT = "model.layers.1.mlp.up_proj.weight"
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


class Once(tf.TrainerCallback):
    """A foreign callback that does something at the end of one step."""

    def __init__(self, step: int, deed: Callable[[Any], None]) -> None:
        self.step = step
        self.deed = deed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.deed(kwargs["model"])


def move(model: Any) -> None:
    with torch.no_grad():
        model.get_parameter(WEIGHT).view(-1)[0] += 1e-6


def move_unseen(model: Any) -> None:
    """Write past autograd's count of versions."""
    model.get_parameter(WEIGHT).data.view(-1)[0] += 1e-6


def trained(
    folder: Path, step: int, deed: Callable[[Any], None], **options: Any
) -> tuple[tf.Trainer, SoftPromptCallback]:
    check = options.pop("check_frozen", "save")
    callback = SoftPromptCallback(PromptTuning(4), check_frozen=check)
    arguments = {**SAVING, **options}
    trainer = training.make(folder, zoo.build("llama"), "causal", [callback, Once(step, deed)], **arguments)
    return trainer, callback


# --- the base moves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deed", [move, move_unseen])
@pytest.mark.parametrize(
    ("check", "step", "words", "checkpoints"),
    [
        ("save", 1, "between step 0 and step 2", []),
        ("save", 3, "between step 2 and step 4", [2]),
        (True, 3, "between step 2 and step 4", [2]),
        ("log", 3, "between step 2 and step 3", [2]),
        ("end", 3, "between step 0 and step 6", [2, 4, 6]),
    ],
)
def test_a_weight_that_moves_is_named_with_its_steps(
    tmp_path: Path, check: Any, step: int, words: str, checkpoints: list[int], deed: Any
) -> None:
    trainer, callback = trained(tmp_path, step, deed, check_frozen=check)
    with pytest.raises(FrozenModifiedError, match=rf"{re.escape(WEIGHT)}: values changed\n(.|\n)*{words}"):
        trainer.train()
    assert callback.report is None
    assert (
        sorted(int(folder.name[11:]) for folder in tmp_path.glob("checkpoint-*") if any(folder.iterdir()))
        == checkpoints
    )


def test_the_prompt_is_rescued_when_the_proof_fails_at_the_end(tmp_path: Path) -> None:
    trainer, callback = trained(tmp_path, 3, move, save_strategy="no")
    with pytest.raises(FrozenModifiedError, match=r"saved in .*unproven-6"):
        trainer.train()
    assert callback.soft_prompt is not None
    rows = callback.soft_prompt.embeddings().detach()
    with softhooks.load(zoo.build("llama"), tmp_path / "unproven-6") as loaded:
        assert torch.equal(loaded.embeddings(), rows)


def test_a_run_goes_on_from_the_last_checkpoint_that_was_proven(tmp_path: Path) -> None:
    expected, callback = trained(tmp_path / "a", 9, move)
    expected.train()
    broken, _ = trained(tmp_path / "b", 3, move)
    with pytest.raises(FrozenModifiedError):
        broken.train()
    again, other = trained(tmp_path / "b", 9, move)
    standing = {folder.name: folder.resolve().name for folder in (tmp_path / "b").glob("checkpoint-*")}
    # The broken one's name leads back to the one before.
    assert standing == {"checkpoint-2": "checkpoint-2", "checkpoint-4": "checkpoint-2"}
    again.train(resume_from_checkpoint=True)
    assert training.equal(training.trained(other), training.trained(callback))


def test_never_means_never(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, callback = trained(tmp_path, 3, move, check_frozen=False)
    trainer.train()
    assert callback.report is None
    assert "other tensors were not checked" in capsys.readouterr().out


def test_other_words_are_refused() -> None:
    with pytest.raises(OptionError, match=r"check_frozen is 'sometimes'; it must be 'end', 'save', 'log'"):
        SoftPromptCallback(PromptTuning(4), check_frozen="sometimes")  # type: ignore[arg-type]


def test_a_checkpoint_is_read_once_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = softhooks.base_model.frozen_record.FrozenRecord.verify
    monkeypatch.setattr(
        softhooks.base_model.frozen_record.FrozenRecord,
        "verify",
        lambda *a, **k: read.append(k["when"]) or original(*a, **k),
    )
    trainer, _ = trained(tmp_path, 9, move)
    trainer.train()
    assert read == [
        "between step 0 and step 2", "between step 2 and step 4", "between step 4 and step 6",
        "between step 6 and step 6",
    ]  # fmt: skip


# --- the base is converted, the prompt removed ------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_a_base_that_an_evaluation_converts(tmp_path: Path, option: str) -> None:
    trainer, callback = trained(tmp_path, 9, move, **{option: True})
    before = training.trained(callback)
    trainer.evaluate()
    with pytest.raises(
        TrainerError, match=rf"the dtype or shape of .* has changed(.|\n)*{option}(.|\n)*evaluate after training"
    ):
        trainer.train()
    assert training.equal(training.trained(callback), before)

    trainer, callback = trained(tmp_path, 9, move, **{option: True})
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "saved"))
    assert {value.dtype for value in training.trained(callback).values()} == {torch.float32}


def test_a_prompt_that_is_removed_in_between(tmp_path: Path) -> None:
    trainer, callback = trained(tmp_path, 3, lambda model: callback.soft_prompt.remove())  # type: ignore[union-attr]
    model: Any = trainer.model
    base = training.base_of(model)
    with pytest.raises(TrainerError, match=r"'default' is not attached at step 4"):
        trainer.train()
    assert training.equal(model.state_dict(), base)


# --- other options ----------------------------------------------------------------------------------------------------


def resumed(folder: Path, callback: SoftPromptCallback, **options: Any) -> tuple[tf.Trainer, Any]:
    trainer = training.make(folder, zoo.build("llama"), "causal", [callback], **{**SAVING, **options})
    return trainer, lambda: trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


@pytest.mark.parametrize(
    ("callback", "options", "words"),
    [
        (
            {},
            {"optim": "sgd"},
            r"this run and the checkpoint differ in the optimizer(.|\n)*adamw_torch(.|\n)*sgd",
        ),
        ({"freeze_dropout": True}, {}, r"dropout of the base(.|\n)*as the model has it(.|\n)*freeze_dropout"),
        ({"trainable": "model.norm.weight"}, {}, r"share of the base that trains(.|\n)*none(.|\n)*model\.norm\.weight"),
    ],
    ids=["optimizer", "dropout", "trainable"],
)
def test_a_resumed_run_with_other_options_is_refused(tmp_path: Path, callback: Any, options: Any, words: str) -> None:
    trainer, _ = trained(tmp_path, 9, move)
    trainer.train()
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    other = SoftPromptCallback(PromptTuning(4), **callback)
    _, resume = resumed(tmp_path, other, **options)
    before = training.trained(other)
    with pytest.raises(TrainerError, match=words):
        resume()
    assert training.equal(training.trained(other), before)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == files


@pytest.mark.parametrize("options", [{"optim": "adamw_torch"}, {"check_frozen": "end"}], ids=["unfused", "proof"])
def test_options_that_change_nothing_resume(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer, _ = trained(tmp_path, 9, move)
    trainer.train()
    again, _ = trained(tmp_path, 9, move, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 6


def test_without_its_state_another_optimizer_may_go_on(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path, 9, move, save_only_model=True)
    trainer.train()
    again, _ = trained(tmp_path, 9, move, optim="sgd")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 6


@pytest.mark.parametrize("name", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimizers_that_step_inside_the_backward_are_refused(tmp_path: Path, name: str) -> None:
    model = zoo.build("llama")
    with pytest.raises(TrainerError, match=rf"optim='{name}' steps inside the backward"):
        training.make(tmp_path, model, "causal", [SoftPromptCallback(PromptTuning(4))], optim=name)
    assert not hasattr(model, "soft_prompt")
    if "lomo" not in name:  # the Trainer steps LOMO by the name alone
        own = torch.optim.SGD(model.parameters(), lr=0.1)
        callback = SoftPromptCallback(PromptTuning(4))
        training.make(tmp_path, model, "causal", [callback], given={"optimizers": (own, None)}, optim=name).train()


def test_other_names_of_optimizers_are_not() -> None:
    for name in {option.value for option in tf.training_args.OptimizerNames}:
        if "layerwise" not in name and "lomo" not in name:
            refuse_fused(name)


# --- out of memory, noise ---------------------------------------------------------------------------------------------


class OutOfMemory(tf.TrainerCallback):
    """Run out of memory once, at the start of a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.sizes: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sizes.append(state.train_batch_size)
        if len(self.sizes) == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate")


@pytest.mark.parametrize("resume", [False, True])
def test_a_batch_size_is_found(tmp_path: Path, resume: bool) -> None:
    if resume:
        trained(tmp_path, 9, move)[0].train()
    model = zoo.build("llama")
    base = training.base_of(model)
    callback, memory = SoftPromptCallback(PromptTuning(4)), OutOfMemory(0)
    trainer = training.make(tmp_path, model, "causal", [callback, memory], auto_find_batch_size=True, **SAVING)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
    assert resume or memory.sizes[0] > memory.sizes[-1]  # a resumed run shows the size of its checkpoint
    assert memory.sizes[0] == 4
    assert trainer.state.global_step == 6
    assert training.equal(training.base_of(model), base)
    assert callback.report is not None
    whole = tmp_path / "whole"
    zoo.build("llama").save_pretrained(whole)
    (whole / "trainer_state.json").write_bytes((tmp_path / "checkpoint-2" / "trainer_state.json").read_bytes())
    with pytest.raises(TrainerError, match="has no prompt named 'default'"):
        trainer.train(resume_from_checkpoint=str(whole))


@pytest.mark.parametrize("injection", ["shared", "slots"])
def test_noise_on_the_embeddings_spares_the_prompt(tmp_path: Path, injection: Any) -> None:
    model = zoo.build("llama")
    prompt = softhooks.attach(model, PromptTuning(4), injection=injection)
    trainer, _ = training.prompted(
        tmp_path, model, "causal", PromptTuning(4), neftune_noise_alpha=1000.0, max_steps=1, learning_rate=0.0
    )
    seen: list[torch.Tensor] = []
    embed = model.get_input_embeddings()
    original = prompt.prompted_model.embed_last

    def listen() -> None:
        original()
        embed.register_forward_hook(lambda module, args, output: seen.append(output.detach()))

    prompt.prompted_model.embed_last = listen  # type: ignore[method-assign]
    trainer.train()
    rows = prompt.embeddings().detach()
    assert any(torch.equal(output[0, :4], rows) for output in seen), "the prompt itself"
    assert all(output.abs().max() > 50 for output in seen if not torch.equal(output[0, :4], rows)), (
        "the text with its noise"
    )
    if injection == "slots":
        assert all(output[:, 4:].abs().max() > 50 for output in seen)


# --- two of them ------------------------------------------------------------------------------------------------------


def test_a_second_callback_that_comes_later_is_refused(tmp_path: Path) -> None:
    trainer, callback = trained(tmp_path, 9, move)
    before = training.trained(callback)
    with pytest.raises(TrainerError, match=r"two SoftPromptCallbacks(.|\n)*PrefixTuning"):
        trainer.add_callback(SoftPromptCallback(PrefixTuning(4)))
    assert training.equal(training.trained(callback), before)
