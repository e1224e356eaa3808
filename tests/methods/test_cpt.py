"""Context-aware prompt tuning: its outputs, its loss, its bounds, and what is saved."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contexts
import naive
import peers
import pytest
import torch
import zoo
from contexts import IDS, MOVABLE, OWN, TYPES, P, loss_of, method, padded, ragged, row_loss, stirred
from torch import Tensor
from untouched import remove_all, untouched

import softhooks
from softhooks import (
    CheckpointError,
    ContextAwarePromptTuning,
    PrefixTuning,
    PromptMismatchError,
    PromptTuning,
    UnsupportedMethodError,
    UnsupportedModeError,
)

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
CAUSAL = (*zoo.CAUSAL, *zoo.CACHED)
H = 32


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def trained(arch: str = "llama", **changes: Any) -> Any:
    """A model in training mode, without dropout."""
    return naive.without_dropout(zoo.build(arch, **changes)).train()


def delta_of(table_gradient: Tensor) -> Tensor:
    return table_gradient[MOVABLE]


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", CAUSAL)
def test_step_0_is_in_context_learning_on_the_same_ids(arch: str) -> None:
    model, bare, ids = zoo.build(arch), zoo.build(arch), zoo.text(2, 7)
    with torch.no_grad(), softhooks.attach(model, method()) as prompt:
        assert prompt.injection == "shared"
        assert prompt.num_parameters == len(MOVABLE) * model.get_input_embeddings().weight.shape[1]
        expected = bare(torch.cat([torch.tensor(IDS).expand(2, -1), ids], 1)).logits[:, P:]
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("arch", CAUSAL)
def test_words_move_and_labels_and_separators_do_not(arch: str) -> None:
    model, bare, ids = zoo.build(arch), zoo.build(arch), zoo.text(1, 7)
    with torch.no_grad(), softhooks.attach(model, method()) as prompt:
        table = stirred(prompt)
        torch.testing.assert_close(model(ids).logits[0], contexts.logits_of(bare, table, ids[0])[P:], **CLOSE)
        words = bare.get_input_embeddings()(torch.tensor(IDS))
        same = (prompt.encoder("embeddings") == words).all(-1).tolist()
        assert same == [place not in MOVABLE for place in range(P)]


# --- what it is trained on --------------------------------------------------------------------------------------------


def test_the_weighted_loss_by_hand() -> None:
    """Two examples, with the formula written out."""
    model, bare = trained(), zoo.build("llama")
    ids, types = [5, 6, 7, 8, 9, 10, 11], [1, 2, 4, 4, 5, 6, 8]
    row, labels = torch.tensor([[12, 13, 14, 15]]), torch.tensor([[-100, -100, 14, 15]])
    own = ContextAwarePromptTuning(context_ids=ids, token_types=types, decay=0.5)
    with softhooks.attach(model, own):
        loss = model(row, labels=labels).loss
    chances = bare(torch.cat([torch.tensor([ids]), row], 1)).logits[0].log_softmax(-1)
    first = -chances[1, 7] - chances[2, 8]  # the first example: g squared, shared by its two tokens
    last = -chances[5, 11]  # the last example: g
    wanted = -chances[8, 14] - chances[9, 15]  # the row: 1
    torch.testing.assert_close(loss, (0.25 * first + 0.5 * last + wanted) / 5)


@pytest.mark.parametrize("arch", CAUSAL)
def test_loss_and_gradient_equal_the_oracles(arch: str) -> None:
    model, bare = trained(arch), zoo.build(arch)
    rows, labels = ragged()
    with softhooks.attach(model, method(decay=0.7)) as prompt:
        table = stirred(prompt)
        loss = model(**padded(rows, labels)).loss
        loss.backward()
        expected = loss_of(bare, table, rows, labels, decay=0.7)
        (gradient,) = torch.autograd.grad(expected, table)
        torch.testing.assert_close(loss, expected, **CLOSE)
        wanted = delta_of(gradient)
        torch.testing.assert_close(prompt.encoder.delta.grad, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "gptj"])
def test_padding_and_the_order_of_rows_change_neither_loss_nor_gradient(arch: str, side: str) -> None:
    model = trained(arch)
    rows, labels = ragged()
    with softhooks.attach(model, method()) as prompt:
        stirred(prompt)
        found = []
        for order, extra, where in (([0, 1, 2, 3], 0, "right"), ([2, 0, 3, 1], 0, side), ([3, 2, 1, 0], 4, side)):
            model.zero_grad()
            batch = padded([rows[i] for i in order], [labels[i] for i in order], where, extra)
            loss = model(**batch).loss
            loss.backward()
            found.append((loss.detach(), prompt.encoder.delta.grad.clone()))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], **CLOSE)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-5)


def test_micro_batches_of_any_size_equal_one_batch() -> None:
    """With the number of label tokens given, as by a Trainer; labels of different lengths."""
    model = trained()
    rows, labels = ragged()
    with softhooks.attach(model, method()) as prompt:
        stirred(prompt)
        model(**padded(rows, labels)).loss.backward()
        whole = prompt.encoder.delta.grad.clone()
        for parts in ([[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]]):
            for items in (10, torch.tensor(10)):
                model.zero_grad()
                for part in parts:
                    batch = padded([rows[i] for i in part], [labels[i] for i in part])
                    model(**batch, num_items_in_batch=items).loss.backward()
                torch.testing.assert_close(prompt.encoder.delta.grad, whole, rtol=1e-4, atol=1e-6)


def test_without_bounds_decay_and_context_loss_it_is_prompt_tuning_from_text() -> None:
    rows, labels = ragged()
    batch = padded(rows, labels)
    model, other = trained(), trained()
    own = method(epsilon_input=None, epsilon_format=math.inf, decay=1.0, context_loss=False)
    words = model.get_input_embeddings()(torch.tensor(IDS)).detach()
    with (
        softhooks.attach(model, own) as prompt,
        softhooks.attach(other, PromptTuning(P, init="tensor", init_tensor=words)) as plain,
    ):
        ours = torch.optim.SGD(list(prompt.parameters()), lr=3.0)
        theirs = torch.optim.SGD(list(plain.parameters()), lr=3.0)
        for _ in range(3):
            losses = model(**batch).loss, other(**batch).loss
            torch.testing.assert_close(*losses)
            for loss, stepper in zip(losses, (ours, theirs), strict=True):
                stepper.zero_grad()
                loss.backward()
            gradient = plain.encoder.embeddings.grad
            torch.testing.assert_close(prompt.encoder.delta.grad, gradient[MOVABLE])
            gradient[[place for place in range(P) if place not in MOVABLE]] = 0
            ours.step()
            theirs.step()
        torch.testing.assert_close(prompt.encoder("embeddings"), plain.encoder("embeddings"))


def test_without_decay_every_label_token_counts_the_same() -> None:
    model, bare = trained(), zoo.build("llama")
    rows, labels = ragged()
    with softhooks.attach(model, method(decay=1.0)) as prompt:
        table = stirred(prompt)
        chances = contexts.logits_of(bare, table, rows[0]).log_softmax(-1)
        places = [place for place, kind in enumerate(TYPES) if kind and kind % 4 == 0]
        losses = [-chances[place - 1, IDS[place]] for place in places]
        losses += [-chances[P + column - 1, label] for column, label in enumerate(labels[0]) if label != -100]
        loss = model(rows[0][None], labels=labels[0][None]).loss
        torch.testing.assert_close(loss, torch.stack(losses).mean(), **CLOSE)


def test_the_context_and_its_logits_are_computed_once_a_step() -> None:
    """For any batch; the head runs only on the states before labels."""
    model = trained()
    shapes: list[tuple[int, ...]] = []
    layers: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _m, args, _out: shapes.append(tuple(args[0].shape)))
    model.model.layers[0].mlp.register_forward_hook(lambda _m, args, _out: layers.append(tuple(args[0].shape)))
    with softhooks.attach(model, method()) as prompt:
        for batch in (1, 8):
            shapes.clear()
            layers.clear()
            before = prompt.computed
            model(zoo.text(batch, 6), labels=zoo.text(batch, 6)).loss.backward()
            assert prompt.computed == before + 1
            assert sorted(shapes) == sorted([(batch, 6, H), (1, 6, H)])
            assert layers == [(1, P, H), (batch, 6, H)]


def test_an_evaluations_loss_is_the_models_own_on_the_row_alone() -> None:
    model, bare = zoo.build("llama"), zoo.build("llama")
    rows, labels = ragged()
    with softhooks.attach(model, method()) as prompt, torch.no_grad():
        table = stirred(prompt)
        expected = loss_of(bare, table, rows, labels, context=False)
        torch.testing.assert_close(model(**padded(rows, labels)).loss, expected, **CLOSE)
        model.train()
        torch.testing.assert_close(model(**padded(rows, labels)).loss, expected, **CLOSE)
        with torch.enable_grad():
            assert not torch.allclose(model(**padded(rows, labels)).loss, expected, atol=1e-2)


def test_a_prompt_that_does_not_train_leaves_the_models_loss_alone(tmp_path: Path) -> None:
    rows, labels = ragged()
    with softhooks.attach(trained(), method()) as prompt:
        prompt.save_pretrained(tmp_path)
    model, bare = trained(), zoo.build("llama")
    prompt = softhooks.load(model, tmp_path)
    table = bare.get_input_embeddings()(torch.tensor(IDS))
    model.lm_head.weight.requires_grad_(True)
    loss = model(**padded(rows, labels)).loss
    torch.testing.assert_close(loss, loss_of(bare, table, rows, labels, context=False), **CLOSE)
    assert model(rows[0][None]).loss is None


@pytest.mark.parametrize("form", ["named", "tuple"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "gptj", "bloom"])
def test_the_output_is_the_models_own_but_for_the_loss(arch: str, form: str) -> None:
    model, ids = trained(arch), zoo.text(2, 6)
    call: dict[str, Any] = {"labels": ids, "output_hidden_states": True, "return_dict": form == "named"}
    bare = model(ids, **call)
    with softhooks.attach(model, method()):
        output = model(ids, **call)
        first = output.loss if form == "named" else output[0]
        assert first.dim() == 0
        assert first is output[0]
        assert naive.shapes(tuple(output.values()) if form == "named" else output) == naive.shapes(
            tuple(bare.values()) if form == "named" else bare
        )
        if form == "named":
            assert list(output) == list(bare)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_the_loss_is_in_fp32(precision: str) -> None:
    model, exact = trained(), trained()
    rows, labels = ragged()
    batch = padded(rows, labels)
    with softhooks.attach(exact, method()):
        expected = exact(**batch).loss
    with softhooks.attach(model, method()) as prompt:
        if precision == "bf16":
            model.to(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            loss = model(**batch).loss
        loss.backward()
        assert loss.dtype == torch.float32
        assert prompt.encoder.delta.grad.dtype == prompt.encoder.words.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)


def test_a_batch_without_labels_has_no_nan() -> None:
    model, ids = trained(), zoo.text(2, 6)
    with softhooks.attach(model, method()) as prompt:
        loss = model(ids, labels=torch.full_like(ids, -100)).loss
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert bool((prompt.encoder.delta.grad == 0).all())


def test_labels_that_are_shifted_already() -> None:
    model = trained()
    rows, labels = ragged()
    batch = padded(rows, labels)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    with softhooks.attach(model, method()):
        torch.testing.assert_close(model(**batch, shift_labels=shifted).loss, model(**batch).loss)


def test_fewer_logits_than_labels_are_refused() -> None:
    model, ids = trained(), zoo.text(2, 6)
    with softhooks.attach(model, method()), pytest.raises(UnsupportedModeError, match="logits_to_keep"):
        model(ids, labels=ids, logits_to_keep=2)


def test_training_without_labels_is_refused() -> None:
    model = trained()
    with softhooks.attach(model, method()), pytest.raises(UnsupportedModeError, match="labels"):
        model(zoo.text(2, 6))


# --- leave one out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "mistral", "gptj"])
def test_a_row_that_is_an_example_does_not_see_it(arch: str) -> None:
    """Loss and gradient against masks by hand: neither its keys and values nor its label in the context count for the row."""
    model, bare = trained(arch), zoo.build(arch, attention="eager")
    rows, labels = ragged()
    examples = [2, 0, -1, 1]
    if arch in ("gemma3", "mistral"):  # by hand there is one mask for all layers
        model = trained(arch, sliding_window=90)
        bare = zoo.build(arch, attention="eager", sliding_window=90)
    with softhooks.attach(model, method(leave_one_out=True, decay=0.7)) as prompt:
        table = stirred(prompt)
        loss = model(**padded(rows, labels, "left"), example_ids=torch.tensor(examples)).loss
        loss.backward()
        expected = loss_of(bare, table, rows, labels, examples, decay=0.7)
        (gradient,) = torch.autograd.grad(expected, table)
        torch.testing.assert_close(loss, expected, **CLOSE)
        wanted = delta_of(gradient)
        torch.testing.assert_close(prompt.encoder.delta.grad, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_what_is_hidden_are_an_examples_keys_and_values() -> None:
    """A poisoned value has no effect, also through the separator after the label; later examples stay visible."""
    model, ids = zoo.build("llama"), zoo.text(3, 6)
    own = torch.tensor([0, 1, -1])
    with softhooks.attach(model, method(leave_one_out=True)) as prompt, torch.no_grad():
        before, plain = model(ids, example_ids=own).logits, model(ids).logits
        torch.testing.assert_close(before[2], plain[2], **CLOSE)
        assert not torch.allclose(before[:2], plain[:2], atol=1e-3)
        with softhooks.kept(model):
            model(ids, example_ids=own)
            kept = prompt.key_values(prompt.prompted_model.structure.entry)["self"]
            for value in kept.values.values():
                value[:, :, list(OWN[1])] = 1e4
            after = model(ids, example_ids=own).logits
        torch.testing.assert_close(after[1], before[1], **CLOSE)
        assert not torch.allclose(after[0], before[0], atol=1e-3)


def test_rows_must_say_which_example_they_are_in_training_alone() -> None:
    model, ids = trained(), zoo.text(2, 6)
    with softhooks.attach(model, method(leave_one_out=True)):
        with pytest.raises(UnsupportedModeError, match="example_ids"):
            model(ids, labels=ids)
        with torch.no_grad():
            model(ids, labels=ids)
        model.eval()
        model(ids, labels=ids)
    model.train()
    with softhooks.attach(model, method()):
        model(ids, labels=ids)


@pytest.mark.parametrize(
    "own",
    [
        torch.tensor([0, 3]),
        torch.tensor([-2, 0]),
        torch.tensor([0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
    ],
    ids=str,
)
def test_examples_that_are_none_are_refused(own: Tensor) -> None:
    model, ids = trained(), zoo.text(2, 6)
    with softhooks.attach(model, method(leave_one_out=True)), pytest.raises(UnsupportedModeError, match="example ids"):
        model(ids, labels=ids, example_ids=own)


def test_generation_hides_the_example_of_each_row() -> None:
    model, bare = naive.endless(zoo.build("llama")), zoo.build("llama", attention="eager")
    ids, own = zoo.text(2, 5), [1, -1]
    with softhooks.attach(model, method(leave_one_out=True)) as prompt, torch.no_grad():
        table = stirred(prompt)
        found = model.generate(ids, max_new_tokens=5, do_sample=False, example_ids=torch.tensor(own))
        for row, text, example in zip(found, ids, own, strict=True):
            hide = OWN[example] if example >= 0 else ()
            step = lambda grown, hide=hide: contexts.logits_of(bare, table, grown, hide)[-1]  # noqa: E731
            assert torch.equal(row, naive.greedy(step, text, 5))


# --- where it may not go ----------------------------------------------------------------------------------------------

ELSEWHERE = [
    zoo.Case("llama", "sequence"),
    zoo.Case("llama", "qa"),
    zoo.Case("gpt2", "tokens"),
    zoo.Case("bert", "masked"),
    zoo.Case("t5", "seq2seq"),
    zoo.Case("bart", "seq2seq"),
]


@pytest.mark.parametrize("case", ELSEWHERE, ids=str)
def test_other_models_are_refused_by_name(case: zoo.Case) -> None:
    model = zoo.build(case.arch, case.head)
    with untouched(model), pytest.raises(UnsupportedMethodError, match=type(model).__name__):
        softhooks.attach(model, method())


def test_a_decoder_that_cannot_share_its_prompt_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(
        MambaConfig(vocab_size=zoo.VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8)
    ).eval()
    with untouched(model), pytest.raises(UnsupportedMethodError, match="'slots'"):
        softhooks.attach(model, method())
    with pytest.raises(UnsupportedMethodError, match="'slots'"):
        softhooks.attach(zoo.build("llama"), method(), injection="slots")


def test_a_bare_backbone_is_refused() -> None:
    with pytest.raises(UnsupportedMethodError, match="LlamaModel"):
        softhooks.attach(zoo.build("llama").model, method())


# --- how far it moves -------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=5.0, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=1.0),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1.0),
}
EPSILON = {"epsilon_input": 0.8, "epsilon_format": 0.5}


def bounds() -> Tensor:
    scale = math.sqrt(H / 2048)
    return torch.tensor([(0.8 if TYPES[place] % 4 == 2 else 0.5) * scale for place in MOVABLE])


def lengths(encoder: Any) -> Tensor:
    return encoder.delta.detach().double().square().sum(-1).sqrt()


def inside(encoder: Any) -> bool:
    """Whether no delta is longer than its bound, without tolerance."""
    plain = torch.linalg.vector_norm(encoder.delta.detach(), dim=1)
    return bool((lengths(encoder) <= bounds().double()).all()) and bool((plain <= bounds()).all())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_delta_is_inside_its_bound_right_after_each_step(name: str) -> None:
    """In a plain loop, without extra calls; labels and separators keep every bit under momentum and weight decay."""
    model = trained()
    rows, labels = ragged()
    words = model.get_input_embeddings()(torch.tensor(IDS)).detach()
    with softhooks.attach(model, method(**EPSILON)) as prompt:
        optimizer = OPTIMIZERS[name](list(prompt.parameters()))
        for _ in range(12):
            model(**padded(rows, labels)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert inside(prompt.encoder)
        assert bool((lengths(prompt.encoder) > 0.99 * bounds()).any()), "some must have been brought back"
        moved = prompt.encoder("embeddings").detach() - words
        fixed = [place for place in range(P) if place not in MOVABLE]
        assert bool((moved[fixed] == 0).all())
        assert bool((moved[MOVABLE] != 0).any(-1).all())
        assert list(prompt.encoder.state_dict()) == ["delta"]


def test_a_projected_delta_keeps_its_direction_and_is_left_alone_the_next_time() -> None:
    with softhooks.attach(zoo.build("llama"), method(**EPSILON)) as prompt:
        encoder = prompt.encoder
        with torch.no_grad():
            encoder.delta.normal_()
            encoder.delta[0] *= 1e-4
            before = encoder.delta.clone()
            encoder.constrain()
            once = encoder.delta.clone()
            encoder.constrain()
        assert torch.equal(encoder.delta, once)
        assert torch.equal(once[0], before[0]), "what is inside is not touched"
        expected = before[1:] * (bounds()[1:] / before[1:].norm(dim=-1))[:, None]
        torch.testing.assert_close(once[1:], expected, rtol=1e-5, atol=1e-8)
        assert inside(encoder)


@pytest.mark.parametrize("seed", range(5))
def test_rounding_never_leaves_a_delta_outside(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with softhooks.attach(zoo.build("llama"), method(**EPSILON)) as prompt, torch.no_grad():
        for factor in (1 - 1e-7, 1.0, 1 + 1e-7, 1 + 1e-6, 3.0, 1e6):
            random = torch.randn(len(MOVABLE), H, generator=generator)
            prompt.encoder.delta.copy_(random / random.norm(dim=-1, keepdim=True) * bounds()[:, None] * factor)
            prompt.encoder.constrain()
            assert inside(prompt.encoder)
            assert bool((lengths(prompt.encoder) > bounds() * (1 - 3e-6)).all())


def test_bounds_of_zero_and_none() -> None:
    model, ids = trained(), zoo.text(2, 6)
    with softhooks.attach(model, method(epsilon_input=0, epsilon_format=None)) as prompt:
        optimizer = torch.optim.AdamW(list(prompt.parameters()), lr=10.0)
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        moved = lengths(prompt.encoder)
        is_input = torch.tensor([TYPES[place] % 4 == 2 for place in MOVABLE])
        assert bool((moved[is_input] == 0).all())
        assert bool((moved[~is_input] > 50).all())


def test_a_deep_copy_is_projected_too() -> None:
    model, ids = trained(), zoo.text(2, 6)
    with softhooks.attach(model, method(**EPSILON)) as prompt:
        twin = copy.deepcopy(model)
        encoder = twin.soft_prompt["default"]["encoder"]
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1.0)
        twin(ids, labels=ids).loss.backward()
        optimizer.step()
        assert inside(encoder)
        assert bool((lengths(encoder) > 0).all())
        assert bool((lengths(prompt.encoder) == 0).all())


def test_under_accelerate(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Prepared model and optimizer, accumulated gradients, mixed precision: still no call by the user."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # as a process of its own would find it: Trainers of other tests have set a precision
    request.addfinalizer(AcceleratorState._reset_state)
    model = trained()
    rows, labels = ragged()
    with softhooks.attach(model, method(**EPSILON)) as prompt:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
        prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(list(prompt.parameters()), lr=1.0))
        for step in range(6):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**padded(rows, labels)).loss)
                optimizer.step()
                optimizer.zero_grad()
            assert inside(prompt.encoder)
            assert bool((lengths(prompt.encoder) > 0).any()) == (step > 0)


def test_it_says_how_far_tokens_may_move(caplog: pytest.LogCaptureFixture) -> None:
    model = zoo.build("llama")
    with caplog.at_level(logging.INFO, "softhooks"), softhooks.attach(model, method(**EPSILON)) as prompt:
        words = model.get_input_embeddings()(torch.tensor(IDS)[MOVABLE]).norm(dim=-1)
        torch.testing.assert_close(prompt.encoder.reach, bounds() / words)
        low, high = prompt.encoder.reach.aminmax()
        assert f"by {low:.3g} to {high:.3g}" in caplog.text
        assert f"{P} tokens and 3 examples" in caplog.text


# --- several on one model ---------------------------------------------------------------------------------------------


def test_rows_of_several_methods() -> None:
    model, ids = zoo.build("llama"), zoo.text(4, 6)
    with torch.no_grad():
        own = softhooks.attach(model, method(leave_one_out=True), "context")
        stirred(own)
        softhooks.attach(model, PromptTuning(5), "prompt")
        softhooks.attach(model, PrefixTuning(3), "prefix")
        alone = {}
        for name in ("context", "prompt", "prefix"):
            softhooks.activate(model, name)
            alone[name] = model(ids).logits
        names = ["prefix", "context", None, "prompt"]
        with softhooks.rows(model, names):
            mixed = model(ids).logits
            hidden = model(ids, example_ids=torch.tensor([1, 1, 1, 1])).logits
        softhooks.activate(model, "context")
        own_hidden = model(ids, example_ids=torch.tensor([1, 1, 1, 1])).logits
    with softhooks.disabled(model), torch.no_grad():
        alone[None] = model(ids).logits
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone[name][i], **CLOSE)
        torch.testing.assert_close(hidden[i], own_hidden[i] if name == "context" else alone[name][i], **CLOSE)


@pytest.mark.parametrize("arch", CAUSAL)
def test_generation(arch: str) -> None:
    model, bare = naive.endless(zoo.build(arch)), zoo.build(arch)
    rows = [zoo.text(1, length, seed=length)[0] for length in (7, 4, 3)]
    with torch.no_grad(), softhooks.attach(model, method()) as prompt:
        table = stirred(prompt)
        found = model.generate(**naive.left_padded(rows), max_new_tokens=6, do_sample=False)
        step = naive.prompt_step(bare, table)
        for ours, row in zip(found, rows, strict=True):
            assert torch.equal(ours[-len(row) - 6 :], naive.greedy(step, row, 6))


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_file_holds_the_context_in_plain_numbers(tmp_path: Path) -> None:
    with softhooks.attach(zoo.build("llama"), method(epsilon_input=None, leave_one_out=True)) as prompt:
        prompt.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "soft_prompt.json").read_text())
    assert told["options"]["context_ids"] == list(IDS)
    assert told["options"]["token_types"] == list(TYPES)
    assert told["options"]["epsilon_input"] is None
    assert (told["options"]["epsilon_format"], told["options"]["decay"]) == (0.1, 0.95)
    assert "examples" not in told["options"]
    assert told["tensors"] == {"prompt.embeddings": [P, H]}
    loaded = softhooks.load(zoo.build("llama"), tmp_path)
    assert loaded.method == method(epsilon_input=None, leave_one_out=True)


@pytest.mark.parametrize("arch", CAUSAL)
def test_a_loaded_prompt_answers_the_same_and_goes_on_training(tmp_path: Path, arch: str) -> None:
    rows, labels = ragged()
    batch, own = padded(rows, labels), torch.tensor([0, 1, 2, -1])
    model = trained(arch)
    with softhooks.attach(model, method(leave_one_out=True, **EPSILON)) as prompt:
        stirred(prompt)
        softhooks.constraint.constrain(prompt.encoder)
        prompt.save_pretrained(tmp_path)
        loss = model(**batch, example_ids=own).loss
        loss.backward()
        gradient = prompt.encoder.delta.grad
        model.eval()
        expected = model(rows[0][None], example_ids=own[:1]).logits
    fresh = zoo.build(arch)
    with torch.no_grad(), softhooks.load(fresh, tmp_path) as done:
        assert not list(done.parameters())
        assert torch.equal(fresh(rows[0][None], example_ids=own[:1]).logits, expected)
    fresh = trained(arch)
    with softhooks.load(fresh, tmp_path, trainable=True) as on:
        torch.testing.assert_close(on.encoder.delta, prompt.encoder.delta, rtol=1e-4, atol=1e-6)
        again = fresh(**batch, example_ids=own).loss
        again.backward()
        torch.testing.assert_close(again, loss, **CLOSE)
        torch.testing.assert_close(on.encoder.delta.grad, gradient, rtol=1e-3, atol=1e-5)
        torch.optim.AdamW(list(on.parameters()), lr=1.0).step()
        assert inside(on.encoder)


def test_a_folded_context_does_not_train() -> None:
    """An optimizer would change labels too."""
    model, ids = trained(), zoo.text(2, 6)
    with softhooks.attach(model, method()) as prompt:
        table = stirred(prompt)
        expected = model.eval()(ids).logits
        prompt.fold()
        assert torch.equal(model(ids).logits, expected)
        torch.testing.assert_close(prompt.encoder("embeddings"), table, rtol=0, atol=0)
        prompt.encoder.requires_grad_(True)
        assert list(prompt.parameters()) == []
        assert torch.equal(prompt.fold().encoder("embeddings"), table)
        model.to(torch.bfloat16)
        assert prompt.encoder("embeddings").dtype == torch.float32


def test_a_context_of_another_base_does_not_go_on_training(tmp_path: Path) -> None:
    with softhooks.attach(zoo.build("llama"), method()) as prompt:
        prompt.save_pretrained(tmp_path)
    other = zoo.build("llama", seed=5)
    with untouched(other), pytest.raises(PromptMismatchError, match="which are not trained"):
        softhooks.load(other, tmp_path, trainable=True)
    same = zoo.build("llama").to(torch.bfloat16)
    softhooks.load(same, tmp_path, trainable=True).remove()


def test_a_delta_that_was_saved_outside_its_bound_is_brought_back_aloud(tmp_path: Path) -> None:
    with softhooks.attach(zoo.build("llama"), method(**EPSILON)) as prompt:
        stirred(prompt, 3.0)
        prompt.save_pretrained(tmp_path)
    model = zoo.build("llama")
    with pytest.warns(UserWarning, match=f"^{len(MOVABLE)} embeddings of this context exceed their bounds"):
        loaded = softhooks.load(model, tmp_path, trainable=True)
    assert inside(loaded.encoder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("token_types", [1] * P),
        ("token_types", [*TYPES[:-1], 99]),
        ("token_types", None),
        ("context_ids", list(IDS[:-1])),
        ("context_ids", "ids"),
        ("decay", None),
        ("decay", 2.0),
        ("epsilon_input", "far"),
        ("num_virtual_tokens", 3),
        ("context_loss", 1),
        ("template", "{label}"),
    ],
    ids=str,
)  # fmt: skip
def test_a_file_whose_options_make_no_sense_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    from stored_options import change

    model = zoo.build("llama")
    with softhooks.attach(model, method()) as prompt:
        prompt.save_pretrained(tmp_path)
    change(tmp_path, key, value)
    with pytest.raises(CheckpointError):
        softhooks.load(model, tmp_path)
    assert not hasattr(model, "soft_prompt")


# --- the strongest peer -----------------------------------------------------------------------------------------------


def peft_config(**options: Any) -> Any:
    import peft

    given = {"cpt_token_ids": list(IDS), "cpt_tokens_type_mask": list(TYPES), "cpt_mask": [1] * P, **options}
    return peft.CPTConfig(task_type="CAUSAL_LM", **given)


@pytest.mark.skipif(not peers.HAS_PEFT, reason="PEFT is not installed")
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3", "gemma3", "mixtral"])
def test_pefts_contexts_answer_as_in_peft(tmp_path: Path, arch: str) -> None:
    """PEFT's file holds words and deltas in one table; PEFT's own unpadded logits are the reference."""
    import peft

    ids = zoo.text(2, 7)
    with peers.quiet():
        theirs = peft.get_peft_model(zoo.build(arch), peft_config(opt_projection_epsilon=8.0, opt_weighted_loss_type="decay",
                                                                 opt_loss_decay_factor=0.7)).eval()  # fmt: skip
        with torch.no_grad():
            delta = theirs.prompt_encoder["default"].delta_embedding.weight
            delta[MOVABLE] = torch.randn(len(MOVABLE), H) * 0.1
            expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), labels=None).logits[:, P:]
        theirs.save_pretrained(tmp_path)
    model = zoo.build(arch)
    with torch.no_grad(), softhooks.load(model, tmp_path) as loaded:
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        assert loaded.method == method(epsilon_input=8.0, epsilon_format=0.1, decay=0.7)
    on = softhooks.load(model, tmp_path, trainable=True)
    torch.testing.assert_close(on.encoder.delta, delta[MOVABLE], rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not peers.HAS_PEFT, reason="PEFT is not installed")
def test_pefts_contexts_without_labels_are_read_without_their_loss(tmp_path: Path) -> None:
    import peft

    with peers.quiet():
        theirs = peft.get_peft_model(zoo.build("llama"), peft_config(cpt_tokens_type_mask=None))
        theirs.save_pretrained(tmp_path)
    loaded = softhooks.load(zoo.build("llama"), tmp_path)
    assert loaded.method == method(
        token_types=[1] * P, context_loss=False, epsilon_input=0.1, epsilon_format=0.1, decay=1.0
    )


@pytest.mark.skipif(not peers.HAS_PEFT, reason="PEFT is not installed")
@pytest.mark.parametrize("epsilon", [0.2, None])
def test_peft_answers_the_same_to_what_is_written_for_it(tmp_path: Path, epsilon: float | None) -> None:
    import peft

    model, ids = zoo.build("llama"), zoo.text(2, 7)
    with softhooks.attach(model, method(epsilon_input=epsilon)) as prompt, torch.no_grad():
        stirred(prompt, 0.1)
        prompt.save_pretrained(tmp_path, as_peft=True)
        expected = model(ids).logits
    with peers.quiet(), torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(zoo.build("llama"), str(tmp_path)).eval()
        found = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), labels=None).logits[:, P:]
    torch.testing.assert_close(found, expected, **CLOSE)
    back = softhooks.load(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    assert back.method.token_types == TYPES  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["default", "context", "other-1"])
def test_under_any_name(name: str) -> None:
    """PEFT's loss looks for an adapter called default."""
    model, bare = trained(), zoo.build("llama")
    rows, labels = ragged()
    with softhooks.attach(model, method(), name) as prompt:
        table = stirred(prompt)
        torch.testing.assert_close(
            model(**padded(rows, labels)).loss, loss_of(bare, table, rows, labels, decay=0.95), **CLOSE
        )
    if peers.HAS_PEFT and name != "default":
        import peft

        with peers.quiet():
            theirs = peft.get_peft_model(bare, peft_config(), adapter_name=name)
            with pytest.raises(KeyError):
                theirs(input_ids=rows[0][None], labels=labels[0][None], input_type_mask=torch.full((1, 7), 4))


@pytest.mark.skipif(not peers.HAS_PEFT, reason="PEFT is not installed")
def test_case_7_the_type_mask() -> None:
    """PEFT drops all labels of a row whose mask ends within an example, and returns nan if there is no label."""
    import peft

    rows, labels = ragged()
    call = {"input_ids": rows[0][None], "attention_mask": torch.ones(1, 7).long(), "labels": labels[0][None]}

    def theirs(types: Any, mask: Tensor) -> float:
        with peers.quiet():
            wrapped = peft.get_peft_model(zoo.build("llama"), peft_config(cpt_tokens_type_mask=types))
            return float(wrapped(**call, input_type_mask=mask).loss.detach())

    mask = torch.where(labels[0] == -100, 2, 4)[None]
    assert math.isnan(theirs(None, mask.clone()))
    given = mask.clone()
    whole = theirs(list(TYPES), given)
    assert not torch.equal(given, mask), "the caller's mask was modified"
    model = trained()
    with softhooks.attach(model, method(decay=1.0)):
        before = {key: value.clone() for key, value in call.items()}
        assert abs(float(model(**call).loss.detach()) - whole) < 1e-4
        assert all(torch.equal(call[key], before[key]) for key in call)
    cut = [*TYPES[:-1], 13]
    wrong = theirs(cut, mask.clone())
    chances = contexts.logits_of(
        zoo.build("llama"), zoo.build("llama").get_input_embeddings()(torch.tensor(IDS)), rows[0]
    )
    alone = row_loss(chances, torch.full_like(labels[0], -100))[0]
    assert abs(wrong - float(alone.detach())) < 1e-4, "of the row's labels none is left"
    for types in ([1] * P, cut):
        with pytest.raises(softhooks.OptionError, match="has no label"):
            method(token_types=types)


def test_case_1_left_padding() -> None:
    model, bare = zoo.build("llama"), zoo.build("llama")
    rows = [zoo.text(1, length, seed=length)[0] for length in (7, 4, 3)]
    batch = naive.left_padded(rows)
    with torch.no_grad(), softhooks.attach(model, method()):
        table = bare.get_input_embeddings()(torch.tensor(IDS))
        expected = torch.stack([contexts.logits_of(bare, table, row)[-1] for row in rows])
        torch.testing.assert_close(model(**batch).logits[:, -1], expected, **CLOSE)
    if peers.HAS_PEFT:
        import peft

        with peers.quiet(), torch.no_grad():
            theirs = peft.get_peft_model(bare, peft_config()).eval()(**batch, labels=None).logits[:, -1]
        assert float((theirs[0] - expected[0]).abs().max()) < 1e-4
        assert float((theirs - expected).abs().max()) > 0.1
