"""Cartridges: initialization, the frozen sink, the teacher with the document, concatenation, and learning."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
import toy
import training
import zoo
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

import softhooks
from softhooks import (
    Cartridge,
    OptionError,
    PrefixTuning,
    PromptMismatchError,
    PromptTooLongError,
    UnsupportedMethodError,
    UnsupportedModeError,
)

CLOSE = {"rtol": 1e-4, "atol": 5e-5}
P = 4
DOCUMENT = [zoo.BOS, 11, 12, 13, 21, 22, 31, 32, 33, 34, 41, 42]
DECODERS = (*zoo.CAUSAL, *zoo.CACHED)


def method(count: int = P, **options: Any) -> Cartridge:
    return Cartridge(count, **{"document": DOCUMENT, **options})


def behind(model: Any, context: list[int], ids: Tensor) -> Tensor:
    """The bare model's logits of the text with ids in front of every row."""
    return model(torch.cat([torch.tensor(context).expand(len(ids), -1), ids], 1)).logits[:, len(context) :]


def divergence(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """The mean KL over the labeled positions, by hand."""
    total, count = torch.zeros(()), 0
    for row in range(labels.shape[0]):
        for column in range(1, labels.shape[1]):
            if labels[row, column] != -100:
                p, q = teacher[row, column - 1].log_softmax(-1), student[row, column - 1].log_softmax(-1)
                total, count = total + functional.kl_div(q, p, reduction="sum", log_target=True), count + 1
    return total / count


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", DECODERS)
def test_it_starts_as_the_first_tokens_of_the_document(arch: str) -> None:
    model, ids = zoo.build(arch), zoo.text(2, 6)
    with torch.no_grad():
        expected = behind(model, DOCUMENT[:P], ids)
        with softhooks.attach(model, method()):
            torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


def test_a_text_is_its_ids_behind_bos() -> None:
    import tokens

    spoken = Cartridge(3, document=tokens.words([11, 12, 13]), tokenizer=tokens.tokenizer())
    assert spoken == Cartridge(3, document=[zoo.BOS, 11, 12, 13])


# --- the frozen slots -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [0, 1, 3])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_frozen_slots_never_move_and_the_others_do(optimizer: str, frozen: int) -> None:
    """They are not parameters, so momentum and weight decay cannot change them."""
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    options = {"lr": 0.1, "weight_decay": 0.3} | ({"momentum": 0.9} if optimizer == "SGD" else {})
    with softhooks.attach(model, method(frozen_slots=frozen)) as prompt:
        start = prompt.encoder("text").detach().clone()
        assert prompt.num_parameters == (P - frozen) * start.shape[1]
        model.train()
        stepper = getattr(torch.optim, optimizer)(list(prompt.parameters()), **options)
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            stepper.step()
            stepper.zero_grad()
        prompt.fold()
        after = prompt.encoder("text").detach()
        assert torch.equal(after[:frozen], start[:frozen])
        assert bool((after[frozen:] != start[frozen:]).all(-1).all())
        assert prompt.num_parameters == (P - frozen) * start.shape[1], "folding must not thaw the sink"


# --- the teacher ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", DECODERS)
def test_the_loss_is_the_divergence_from_the_model_with_the_document(arch: str) -> None:
    """Compared with the bare model with the document in each row, gradients included."""
    model, ids = naive.without_dropout(zoo.build(arch)), zoo.text(3, 7)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[2] = -100
    with softhooks.attach(model, method(top_k=zoo.VOCABULARY)) as prompt:
        with softhooks.disabled(model), torch.no_grad():
            teacher = behind(model, DOCUMENT, ids)
        expected = divergence(teacher, model(ids).logits, labels)
        theirs = torch.autograd.grad(expected, list(prompt.parameters()))
        model.train()
        output = model(ids, labels=labels)
        ours = torch.autograd.grad(output.loss, list(prompt.parameters()))
        torch.testing.assert_close(output.loss, expected, rtol=1e-3, atol=1e-5)
        for mine, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))


def test_padding_changes_nothing() -> None:
    model = zoo.build("llama")
    rows = [zoo.text(1, n, seed=n)[0] for n in (7, 4)]
    with softhooks.attach(model, method()):
        model.train()
        alone = [model(row[None], labels=row[None]).loss for row in rows]
        batch = naive.left_padded(rows)
        left = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
    # The first real token is predicted too where padding stands before it; nothing else differs.
    flipped = {key: value.flip(1) for key, value in naive.left_padded([row.flip(0) for row in rows]).items()}
    with softhooks.attach(model, method()):
        model.train()
        right = model(**flipped, labels=flipped["input_ids"].masked_fill(flipped["attention_mask"] == 0, -100)).loss
        masked = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(-1) <= 1, -100)
        same = model(**batch, labels=masked).loss
    expected = (alone[0] * 6 + alone[1] * 3) / 9
    torch.testing.assert_close(right, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-5)
    assert bool(left.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "bloom"])
def test_a_cartridge_that_is_the_document_has_nothing_to_learn(arch: str, dtype: torch.dtype) -> None:
    model, ids = naive.without_dropout(zoo.build(arch)).to(dtype), zoo.text(3, 6)
    with softhooks.attach(model, method(len(DOCUMENT), top_k=5)) as prompt:
        model.train()
        loss = model(ids, labels=ids).loss
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == 0.0
        few = model(
            ids[:2], labels=ids[:2]
        ).loss  # fewer tokens than the prefix has are joined behind it, and round otherwise
        assert abs(float(few.detach())) < (1e-6 if dtype == torch.float32 else 1e-4)
        loss.backward()
        assert all(float(p.grad.abs().max()) < 1e-6 for p in prompt.parameters())


def test_the_teacher_has_no_dropout_and_takes_no_random_number() -> None:
    model, ids = zoo.build("gpt2"), zoo.text(2, 6)  # with dropout of 0.1
    after = []
    for distill in (False, True):
        with softhooks.attach(model, method(distill=distill)) as prompt:
            model.train()
            torch.manual_seed(0)
            model(ids, labels=ids)
            after.append(torch.rand(1))
            if distill:
                everywhere = torch.ones(2, 5, dtype=torch.bool)
                taught = prompt.objective._teach(prompt, {"input_ids": ids}, everywhere)
                model.eval()
                with softhooks.disabled(model), torch.no_grad():
                    expected = behind(model, DOCUMENT, ids)[:, :-1].flatten(0, 1)
                torch.testing.assert_close(taught, expected, **CLOSE)
    assert torch.equal(*after)


def test_the_document_is_read_once_where_it_is_kept_and_again_when_the_base_changes() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, method()) as prompt, softhooks.kept(model):
        model.train()
        memory = prompt.objective._memory
        for _ in range(3):
            loss = model(ids, labels=ids).loss
        assert memory.computed == 1
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
        changed = model(ids, labels=ids).loss
        assert memory.computed == 2
        model.eval()
        with softhooks.disabled(model), torch.no_grad():
            teacher = behind(model, DOCUMENT, ids)
        expected = divergence(teacher, model(ids).logits, ids)
        assert not torch.allclose(loss, changed)
        assert float(changed.detach()) <= float(expected.detach()) * 1.001, (
            "20 tokens and the rest see no more than all"
        )


def test_the_output_is_what_the_caller_asked_for() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, method()):
        plain = model(ids).logits
        model.train()
        output = model(ids, labels=ids)
        assert torch.equal(output.logits, plain)
        assert output.hidden_states is None
        named = model(ids, labels=ids, output_hidden_states=True)
        assert len(named.hidden_states) == 3
        as_tuple = model(ids, labels=ids, return_dict=False)
        assert torch.equal(as_tuple[0], output.loss)
        assert torch.equal(as_tuple[1], plain)
        model.eval()
        labeled = model(ids, labels=ids).loss
        expected = functional.cross_entropy(plain[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(labeled, expected)


def test_no_label_is_no_loss_and_no_error() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, method()) as prompt:
        model.train()
        loss = model(ids, labels=torch.full_like(ids, -100)).loss
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert all(bool((p.grad == 0).all()) for p in prompt.parameters())


def test_labels_and_no_cache_are_needed() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, method()):
        model.train()
        with pytest.raises(UnsupportedModeError, match="labels"):
            model(ids)
        with pytest.raises(UnsupportedModeError, match="logits_to_keep"):
            model(ids, labels=ids, logits_to_keep=2)
        with pytest.raises(UnsupportedModeError, match="past_key_values"):
            model(ids, labels=ids, past_key_values=DynamicCache(config=model.config))
        assert bool(model(ids, labels=ids).loss.isfinite())


@pytest.mark.parametrize(
    ("arch", "head"), [("llama", "sequence"), ("gpt2", "tokens"), ("bert", "masked"), ("t5", "seq2seq")]
)
def test_what_is_no_causal_language_model_is_refused(arch: str, head: str) -> None:
    model = zoo.build(arch, head)
    with pytest.raises(UnsupportedMethodError, match=r"(?s)causal language model.*distill=False"):
        softhooks.attach(model, method())
    assert not hasattr(model, "soft_prompt")
    with softhooks.attach(model, method(distill=False)) as prompt:
        assert prompt.objective is None


# --- the Trainer ------------------------------------------------------------------------------------------------------


def test_gradient_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """With rows of different lengths, so that a mean of means would differ."""
    found = []
    for size, steps in ((8, 1), (2, 4)):
        model = zoo.build("llama")
        trainer, callback = training.prompted(
            tmp_path, model, "causal", method(), per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            max_steps=3, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        )  # fmt: skip
        for number, row in enumerate(trainer.train_dataset):
            row["labels"][: number % 5] = -100
        trainer.train()
        found.append((training.trained(callback), training.losses(trainer)))
        callback.soft_prompt.remove()
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], tensor, rtol=1e-4, atol=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}
    whole, callback = training.prompted(tmp_path, zoo.build("llama"), "causal", method(), **options)
    whole.train()
    resumed, other = training.prompted(tmp_path, zoo.build("llama"), "causal", method(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert training.losses(resumed) == training.losses(whole)
    assert training.equal(training.trained(other), training.trained(callback))
    for each in (callback, other):
        each.soft_prompt.remove()


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_activation_checkpointing_and_autocast(reentrant: bool) -> None:
    model, ids = naive.without_dropout(zoo.build("llama")), zoo.text(2, 6)

    def gradients() -> list[Tensor]:
        parameters = list(prompt.parameters())
        for parameter in parameters:
            parameter.grad = None
        model(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in parameters]

    with softhooks.attach(model, method()) as prompt:
        model.train()
        plain = gradients()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = gradients()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        again = gradients()
    for a, b, c in zip(plain, again, rough, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert float(functional.cosine_similarity(a.flatten(), c.flatten(), dim=0)) > 0.9


# --- saved and loaded -------------------------------------------------------------------------------------------------


def test_a_loaded_cartridge_goes_on_with_its_document(tmp_path: Path) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, method()) as prompt:
        with torch.no_grad():
            prompt.encoder.rows["text"].add_(0.1)
        model.train()
        expected = model(ids, labels=ids).loss
        prompt.save_pretrained(tmp_path)
    with softhooks.load(model, tmp_path, trainable=True) as again:
        assert again.method == method()
        model.train()
        assert torch.equal(model(ids, labels=ids).loss, expected)
        assert again.num_parameters == (P - 1) * again.encoder("text").shape[1]
    classifier = zoo.build("llama", "sequence")
    classifier.model.load_state_dict(model.model.state_dict(), strict=False)
    with softhooks.load(classifier, tmp_path) as elsewhere:
        width = elsewhere.encoder("text").shape[1]
        assert elsewhere.num_parameters == (P - 1) * width, "to use it, no language model is needed"
        assert not list(elsewhere.parameters()), "and nothing of it trains"


# --- joined -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bloom"])
def test_joined_cartridges_stand_one_behind_the_other(tmp_path: Path, arch: str) -> None:
    """Compared with a cache of both documents' keys and values, each read at the start of a context."""
    model, ids = zoo.build(arch), zoo.text(2, 6)
    first, second = DOCUMENT[:5], DOCUMENT[5:]
    with torch.no_grad():
        caches = [model(torch.tensor([part]), use_cache=True).past_key_values for part in (first, second)]
        joined = DynamicCache(config=model.config)
        for index, (one, other) in enumerate(zip(caches[0].layers, caches[1].layers, strict=True)):
            keys, values = torch.cat([one.keys, other.keys], 2), torch.cat([one.values, other.values], 2)
            joined.update(keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1), index)
        expected = model(ids, past_key_values=joined, attention_mask=torch.ones(2, 12 + 6)).logits
        with softhooks.attach(model, Cartridge(5, document=first, frozen_slots=2)) as saved:
            saved.save_pretrained(tmp_path)
        attached = softhooks.attach(model, Cartridge(7, document=second), "second")
        with pytest.warns(UserWarning, match="2 cartridges that were not trained together were joined") as warned:
            whole = Cartridge.concatenate(model, [tmp_path, attached], "whole", trainable=True)
        assert len(warned) == 1
        assert warned[0].filename == __file__
        assert whole.method == Cartridge(12, frozen_slots=2, distill=False)
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        whole.save_pretrained(tmp_path / "whole")
        kept = model(ids).logits
    attached.remove()
    whole.remove()
    with softhooks.load(model, tmp_path / "whole"), torch.no_grad():
        assert torch.equal(model(ids).logits, kept)


def test_what_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, method(), "one") as one:
        with softhooks.attach(model, PrefixTuning(3), "other") as other:
            for sources in ([], [one], [one, other]):
                with pytest.raises(OptionError, match="two or more cartridges"):
                    Cartridge.concatenate(model, sources, "joined")
        with (
            softhooks.attach(zoo.build("gpt2"), method()) as foreign,
            pytest.raises(PromptMismatchError, match="must be trained on the same base model"),
        ):
            Cartridge.concatenate(model, [one, foreign], "joined")
        classifier = softhooks.attach(zoo.build("llama", "sequence"), method(distill=False))
        with pytest.raises(OptionError, match="that were saved without a head"):
            Cartridge.concatenate(model, [one, classifier], "joined")
        with pytest.raises(PromptTooLongError):
            Cartridge.concatenate(model, [one] * 24, "joined")
        assert list(one.prompted_model.prompts) == ["one"]


def test_pefts_own_composition_is_ours(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.cartridge.utils import compose_cartridge_adapters

    ids = zoo.text(2, 6)
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
        peft.get_peft_model(zoo.build("llama"), config).save_pretrained(tmp_path / str(seed))
    compose_cartridge_adapters([tmp_path / "1", tmp_path / "2"], output_path=tmp_path / "both")
    theirs = peft.PeftModel.from_pretrained(zoo.build("llama"), str(tmp_path / "both")).eval()
    model = zoo.build("llama")
    with pytest.warns(UserWarning, match="were joined"):
        joined = Cartridge.concatenate(model, [tmp_path / "1", tmp_path / "2"])
    with torch.no_grad(), joined:
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


# --- wrong options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"document": None}, "needs a document, but none is given"),
        ({"document": []}, "a string or a list of at least one token id"),
        ({"document": "word5 word6"}, "tokenizer"),
        ({"document": [5, 6]}, r"(?s)not be longer than its document.*2 tokens"),
        ({"frozen_slots": P}, "it must be less than num_virtual_tokens="),
        ({"frozen_slots": -1}, "frozen_slots"),
        ({"frozen_slots": True}, "frozen_slots"),
        ({"top_k": 0}, "top_k"),
    ],
    ids=lambda item: str(item),
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        method(**options)


def test_a_document_beyond_the_window_is_refused_with_a_way_out() -> None:
    model = zoo.build("llama")
    with pytest.raises(PromptTooLongError, match=r"(?s)window.*document: +96.*Cartridge.concatenate"):
        softhooks.attach(model, method(document=[5] * 96))
    assert not hasattr(model, "soft_prompt")
    with pytest.raises(OptionError, match="is initialized from a document, but none"):
        softhooks.attach(model, Cartridge(P, distill=False))


# --- it learns --------------------------------------------------------------------------------------------------------


def test_it_learns_to_answer_as_with_the_document() -> None:
    """The document shows a function on many words; two slots, one of them frozen, learn it without any labels."""
    model, function = toy.model(), 2
    shown = [word for word in range(toy.WORDS) if word % 4]
    document = [zoo.BOS, *toy.pairs(function, shown).flatten().tolist()][:22]
    context = torch.tensor(document)
    words = range(toy.WORDS)
    taught = toy.share_right(model, function, words, before=context)
    with softhooks.attach(model, Cartridge(2, document=document)) as prompt:
        before = toy.share_right(model, function, words)
        queries = toy.word(torch.tensor(list(toy.TUNED)))
        rows = torch.stack([queries, torch.zeros_like(queries)], 1)  # a wrong answer: only its place is used
        optimizer = torch.optim.AdamW(list(prompt.parameters()), lr=2e-2)
        model.train()
        losses = []
        for _ in range(80):
            loss = model(rows, labels=rows).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        model.eval()
        after = toy.share_right(model, function, words)
        prompt.verify_frozen()
    assert taught >= 0.9
    assert before <= 0.5
    assert losses[-1] < 0.1 * losses[0]
    assert after >= 0.9


def test_a_trainer_inside_kept_reads_the_document_once(tmp_path: Path) -> None:
    """It learns the same as outside of `kept`, where the document is read in each step."""
    trained = []
    for keeps in (True, False):
        model = zoo.build("llama")
        torch.manual_seed(0)
        trainer, callback = training.prompted(tmp_path / str(keeps), model, "causal", method(), max_steps=3)
        read = callback.soft_prompt.objective._memory
        with softhooks.kept(model) if keeps else contextlib.nullcontext():
            trainer.train()
        assert read.computed == (1 if keeps else 3)
        trained.append([p.detach().clone() for p in callback.soft_prompt.parameters()])
    assert all(map(torch.equal, *trained))
