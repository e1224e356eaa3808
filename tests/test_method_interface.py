"""The interface of methods: variants, extra arguments, hidden tokens, objectives, constraints."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import naive
import pytest
import torch
import training
import zoo
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

import softhooks
from softhooks import AttachError, UnsupportedMethodError, UnsupportedModeError, constraint
from softhooks.inject.prefill import logits_of
from softhooks.method import Method
from softhooks.objectives.base import Objective, with_loss
from softhooks.prompt_encoder import EMBEDDINGS, PromptEncoder

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
P = 3


class Several(PromptEncoder):
    """Two prompts in one encoder; a row chooses by `which`, and may hide tokens by `hide`."""

    groups = (EMBEDDINGS,)
    is_constrained = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tables = nn.Parameter(torch.randn(2, P, width) * 0.5)

    def forward(self, group: str, variant: int = 0) -> Tensor:
        return self.tables[variant]

    def choose_variants(self, given: dict[str, Tensor], batch: int) -> Sequence[int] | None:
        return given["which"].tolist() if "which" in given else None

    def hidden_tokens(self, given: dict[str, Tensor], batch: int) -> Tensor | None:
        return given["hide"].bool() if "hide" in given else None

    def constrain(self) -> None:
        self.tables.clamp_(-1, 1)


class TwiceTheLoss(Objective):
    """Doubles the loss, and adds the mean square of the prompt's own logits."""

    def begin(self, prompt: Any, call: dict[str, Any], given: dict[str, Tensor]) -> Any:
        stack = prompt.prompted_model.structure.entry

        def finish(output: Any) -> Any:
            logits = logits_of(prompt.model, stack, prompt.states, prompt.prompted_model.placeholder_id)
            return with_loss(output, 2 * output["loss"] + logits.square().mean(), has_loss=True)

        return finish


@dataclass(frozen=True)
class Toy(Method):
    kind: ClassVar[str] = "toy"
    columns: ClassVar[tuple[str, ...]] = ("which", "hide")
    num_virtual_tokens: int = P
    own_objective: bool = False

    def build(self, structure: Any) -> PromptEncoder:
        return Several(structure.entry.width)

    def objective(self) -> Objective | None:
        return TwiceTheLoss() if self.own_objective else None


def separate(model: Any, ids: Tensor, tables: Tensor, which: Sequence[int]) -> Tensor:
    """Each row alone, with its prompt in front by hand."""
    rows = []
    for row, number in zip(ids, which, strict=True):
        embedded = torch.cat([tables[number][None], model.get_input_embeddings()(row[None])], 1)
        rows.append(model(inputs_embeds=embedded).logits[:, P:])
    return torch.cat(rows)


# --- variants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("injection", ["shared", "slots"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "gptj"])
def test_rows_meet_the_variant_that_they_choose(arch: str, injection: Any) -> None:
    model, ids, which = zoo.build(arch), zoo.text(4, 6), [1, 0, 1, 1]
    with softhooks.attach(model, Toy(), injection=injection) as prompt:
        tables = prompt.encoder.tables
        logits = model(ids, which=torch.tensor(which)).logits
        (ours,) = torch.autograd.grad(logits.square().sum(), tables)
        with softhooks.disabled(model):
            expected = separate(model, ids, tables, which)
        (theirs,) = torch.autograd.grad(expected.square().sum(), tables)
        torch.testing.assert_close(logits, expected, **CLOSE)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
        (only_one,) = torch.autograd.grad(model(ids, which=torch.ones(4).long()).logits.square().sum(), tables)
        assert bool((only_one[0] == 0).all())
        assert bool((only_one[1] != 0).any())


def test_variants_stand_beside_other_prompts_in_rows() -> None:
    model, ids = zoo.build("llama"), zoo.text(3, 6)
    with (
        softhooks.attach(model, Toy(), "toy") as toy,
        softhooks.attach(model, softhooks.PromptTuning(5), "long") as other,
    ):
        with softhooks.rows(model, ["toy", "long", "toy"]), torch.no_grad():
            mixed = model(ids, which=torch.tensor([0, 0, 1])).logits
        with torch.no_grad(), softhooks.disabled(model):
            expected = separate(model, ids[::2], toy.encoder.tables, [0, 1])
        softhooks.activate(model, "long")
        with torch.no_grad():
            long = model(ids[1:2]).logits
    assert not other.is_attached
    torch.testing.assert_close(mixed[::2], expected, **CLOSE)
    torch.testing.assert_close(mixed[1:2], long, **CLOSE)


def test_variants_are_computed_once_where_they_are_kept() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, Toy()) as prompt, torch.no_grad(), softhooks.kept(model):
        before = prompt.computed
        for _ in range(3):
            model(ids, which=torch.tensor([0, 1]))
        assert prompt.computed == before + 1
        model(ids, which=torch.tensor([1, 1]))
        assert prompt.computed == before + 2


def test_a_choice_for_other_rows_is_refused() -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, Toy()), pytest.raises(UnsupportedModeError, match=r"3 values for a batch of 2 rows"):
        model(zoo.text(2, 6), which=torch.tensor([0, 1, 1]))


# --- hidden tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "gptj", "bloom"])
def test_a_hidden_token_is_not_seen_by_its_row(arch: str) -> None:
    model, ids = zoo.build(arch), zoo.text(2, 6)
    hide = torch.tensor([[0, 0, 0], [0, 1, 0]])
    with softhooks.attach(model, Toy()) as prompt, torch.no_grad(), softhooks.kept(model):
        assert prompt.injection == "shared"
        plain, logits = model(ids).logits, model(ids, hide=hide).logits
        torch.testing.assert_close(logits[0], plain[0], **CLOSE)
        assert not torch.allclose(logits[1], plain[1], atol=1e-3)
        # The others still carry what they read of it: hiding is not leaving out. A poisoned value must not come through.
        stack = prompt.prompted_model.structure.entry
        kept = prompt.key_values(stack)["self"]
        for value in kept.values.values():
            value[:, :, 1] = 1e4
        torch.testing.assert_close(model(ids, hide=hide).logits[1], logits[1], **CLOSE)
        assert not torch.allclose(model(ids).logits[1], plain[1], atol=1e-3)


def test_hidden_tokens_in_slots_are_refused() -> None:
    model = zoo.build("llama")
    with (
        softhooks.attach(model, Toy(), injection="slots"),
        pytest.raises(UnsupportedModeError, match="hides virtual tokens"),
    ):
        model(zoo.text(2, 6), hide=torch.zeros(2, P))


# --- extra arguments --------------------------------------------------------------------------------------------------


def test_the_signature_names_the_columns_and_the_model_never_sees_them() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    bare = inspect.signature(model.forward)
    seen: list[dict[str, Any]] = []
    handle = model.model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    with softhooks.attach(model, Toy()):
        signed = inspect.signature(model.forward).parameters
        assert set(signed) - set(bare.parameters) == {"which", "hide"}
        model(ids, which=torch.tensor([0, 1]))
        with softhooks.disabled(model):
            model(ids, which=torch.tensor([0, 1]))
    assert all("which" not in kwargs for kwargs in seen)
    assert inspect.signature(model.forward) == bare
    assert "forward" not in model.__dict__
    handle.remove()


def test_a_deep_copy_runs_its_own_forward() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, Toy()):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        which = torch.tensor([0, 1])
        assert bool((twin(ids, which=which).logits == 0).all())
        assert bool((model(ids, which=which).logits != 0).any())


def test_generate_passes_the_columns_on() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 5)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": zoo.PAD}
    with softhooks.attach(model, Toy()):
        mixed = model.generate(ids, which=torch.tensor([0, 1]), num_beams=2, **options)
        for number in (0, 1):
            alone = model.generate(ids[number][None], which=torch.tensor([number]), num_beams=2, **options)
            assert torch.equal(mixed[number][: alone.shape[1]], alone[0])


def test_an_argument_that_the_model_has_is_refused() -> None:
    @dataclass(frozen=True)
    class Clash(Toy):
        columns: ClassVar[tuple[str, ...]] = ("labels",)

    model = zoo.build("llama")
    with pytest.raises(AttachError, match="labels"):
        softhooks.attach(model, Clash())
    assert "forward" not in model.__dict__
    assert not hasattr(model, "soft_prompt")
    with softhooks.attach(model, softhooks.PromptTuning(3)), pytest.raises(AttachError, match="labels"):
        softhooks.attach(model, Clash(), "second")
    with softhooks.attach(model, softhooks.PromptTuning(3)):
        with pytest.raises(UnsupportedMethodError, match="injection"):
            softhooks.attach(model, Toy(), "second", injection="cache")
        assert "forward" not in model.__dict__, "a prompt that is refused leaves no signature behind"


def test_a_trainer_keeps_the_columns(tmp_path: Path) -> None:
    model = zoo.build("llama")
    trainer, callback = training.prompted(tmp_path, model, "causal", Toy(), max_steps=2)
    for number, row in enumerate(trainer.train_dataset):
        row["which"] = torch.tensor(number % 2)
    chosen: list[int] = []
    encoder = callback.soft_prompt.encoder
    choose = encoder.choose_variants
    encoder.choose_variants = lambda given, batch: chosen.extend(given["which"].tolist()) or choose(given, batch)
    trainer.train()
    assert set(chosen) == {0, 1}


# --- objectives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma3", "opt", "gptj", "falcon"])
def test_an_objective_makes_the_loss_and_reads_the_prompts_own_logits(arch: str) -> None:
    model, ids = naive.without_dropout(zoo.build(arch)), zoo.text(2, 6)
    with softhooks.attach(model, Toy()) as prompt:
        model.train()
        plain = model(ids, labels=ids).loss
        tables = prompt.encoder.tables
        with softhooks.disabled(model):
            own = model(inputs_embeds=tables[:1]).logits.square().mean()
        softhooks.attach(model, Toy(own_objective=True), "other").encoder.load_state_dict(prompt.encoder.state_dict())
        changed = model(ids, labels=ids).loss
        torch.testing.assert_close(changed, 2 * plain + own, **CLOSE)
        changed.backward()
        softhooks.activate(model, "default")
        model.eval()
        torch.testing.assert_close(model(ids, labels=ids).loss, plain, **CLOSE)


def test_an_objective_without_labels_is_refused_in_training_only() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, Toy(own_objective=True)):
        model.train()
        with pytest.raises(UnsupportedModeError, match="labels"):
            model(ids)
        with torch.no_grad():
            model(ids)
        assert model(ids, labels=ids).loss.requires_grad
        model.eval()
        model(ids)


# --- constraints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor", "RMSprop"])
def test_a_constraint_holds_after_each_step_of_any_optimizer(name: str) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, Toy()) as prompt:
        optimizer = getattr(torch.optim, name)(list(prompt.parameters()), lr=10.0)
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            assert float(prompt.encoder.tables.detach().abs().max()) <= 1.0
    tables = prompt.encoder.tables
    tables.grad = torch.full_like(tables, -1.0)
    torch.optim.SGD([tables], lr=10.0).step()
    assert float(tables.detach().abs().max()) > 1.0, "a removed prompt is nobody's concern"


def test_a_copy_is_constrained_too() -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, Toy()):
        twin = copy.deepcopy(model)
        tables = twin.soft_prompt["default"]["encoder"].tables
        tables.grad = torch.full_like(tables, -1.0)
        torch.optim.SGD([tables], lr=10.0).step()
        assert float(tables.detach().abs().max()) <= 1.0


def test_nobody_listens_to_optimizers_when_the_last_constrained_prompt_is_gone() -> None:
    for encoder in constraint.watched:  # of models that other tests have dropped and nobody has collected yet
        constraint.unwatch(encoder)
    hooks = torch_optimizer._global_optimizer_post_hooks

    def count() -> int:
        return list(hooks.values()).count(constraint._after_step)

    assert count() == 0
    model = zoo.build("llama")
    with softhooks.attach(model, Toy()), softhooks.attach(model, Toy(), "second"):
        assert count() == 1
    assert count() == 0
    with softhooks.attach(model, softhooks.PromptTuning(3)):
        assert count() == 0
