"""Prompts in SetFit: both phases, either head, checkpoints, saving, and which parameters SetFit unfreezes."""

from __future__ import annotations

import examples
import pytest
import torch
from training import equal, trained
from untouched import remove_all, untouched

import softhooks
from softhooks import PrefixTuning, PromptTuning
from softhooks.errors import TrainerError, UnsupportedModelError

pytestmark = [
    pytest.mark.filterwarnings(line)
    for line in (
        "ignore:'pin_memory' argument is set as true:UserWarning",
        "ignore:Importing from 'sentence_transformers:DeprecationWarning",
    )
]

TEXTS = ["the cat was great", "the dog was great", "hello great world", "it was bad", "a bad dog", "no bad cat"]
LABELS = [1, 1, 1, 0, 0, 0]


@pytest.fixture(autouse=True)
def _nothing_left():
    yield
    remove_all()


@pytest.fixture(scope="module")
def setfit():
    pytest.importorskip("datasets")
    return pytest.importorskip("setfit")


def model_of(setfit, folder, differentiable=False):
    import sentence_models as made
    from sklearn.linear_model import LogisticRegression

    body = made.embedder(folder)
    torch.manual_seed(0)
    head = setfit.SetFitHead(in_features=32, out_features=2, device="cpu") if differentiable else LogisticRegression()
    return setfit.SetFitModel(model_body=body, model_head=head)


def trainer_of(setfit, folder, model, method=None, callback=None, **options):
    """A Trainer as a script would make it, and its callback."""
    from datasets import Dataset

    from softhooks.integrations.setfit import SetFitPromptCallback

    callback = SetFitPromptCallback(PrefixTuning(3) if method is None else method) if callback is None else callback
    given = {
        "batch_size": 4, "num_epochs": (1, 3), "max_steps": 6, "body_learning_rate": 1e-2, "report_to": "none",
        "logging_steps": 1, "show_progress_bar": False, "save_strategy": "no", "max_length": 32,
    }  # fmt: skip
    data = Dataset.from_dict({"text": TEXTS, "label": LABELS})
    trainer = setfit.Trainer(
        model=model,
        args=setfit.TrainingArguments(output_dir=str(folder / "run"), **{**given, **options}),
        train_dataset=data,
        eval_dataset=data,
        metric=lambda found, known: {"right": sum(int(a) == int(b) for a, b in zip(found, known, strict=True))},
        callbacks=[callback],
    )
    return trainer, callback


def base(model):
    return {
        name: tensor.clone() for name, tensor in model.model_body.state_dict().items() if "soft_prompt." not in name
    }


@pytest.mark.parametrize(
    ("differentiable", "end_to_end"),
    [(False, False), (True, False), (True, True)],
    ids=["regression", "head", "end-to-end"],
)
def test_both_phases_train_prompt_and_head_and_nothing_else(setfit, tmp_path, differentiable, end_to_end):
    model = model_of(setfit, tmp_path, differentiable)
    before = base(model)
    trainer, callback = trainer_of(setfit, tmp_path, model, end_to_end=end_to_end)
    start = trained(callback)
    trainer.train_embeddings(TEXTS, LABELS, args=trainer.args)
    embedded = trained(callback)
    assert all(not torch.equal(start[name], now) for name, now in embedded.items())
    head = {name: p.clone() for name, p in model.model_head.named_parameters()} if differentiable else {}
    trainer.train_classifier(TEXTS, LABELS, args=trainer.args)
    assert equal(trained(callback), embedded) is not end_to_end
    assert all(not torch.equal(head[name], now) for name, now in (model.model_head.named_parameters() if head else ()))
    assert equal(base(model), before)
    callback.soft_prompt.verify_frozen()
    names = [name for name, p in model.model_body.named_parameters() if p.requires_grad]
    assert names == [f"0.model.{name}" for name, _ in callback.soft_prompt.named_parameters()]
    assert trainer.evaluate()["right"] >= 3
    trainer.train()  # SetFit has thawed the body in between
    assert equal(base(model), before)
    assert not equal(trained(callback), embedded)
    callback.soft_prompt.remove()
    assert all(p.requires_grad for p in model.model_body.parameters())
    assert "_freeze_or_not" not in model.__dict__


def test_freezing_by_hand_is_undone_by_thawing_and_no_more(setfit, tmp_path):
    model = model_of(setfit, tmp_path, differentiable=True)
    _, callback = trainer_of(setfit, tmp_path, model)
    prompt = callback.soft_prompt
    model.freeze()
    assert not any(p.requires_grad for p in (*model.model_body.parameters(), *model.model_head.parameters()))
    model.unfreeze("head")
    assert all(p.requires_grad for p in model.model_head.parameters())
    assert not any(p.requires_grad for p in model.model_body.parameters())
    model.unfreeze()
    model.unfreeze()
    assert sum(p.requires_grad for p in model.model_body.parameters()) == len(list(prompt.encoder.parameters())) == 1


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_saved_classifier_answers_as_before(setfit, tmp_path, differentiable):
    model = model_of(setfit, tmp_path, differentiable)
    trainer, _ = trainer_of(setfit, tmp_path, model, PrefixTuning(3, projection=True, hidden_size=8))
    trainer.train()
    expected = model.predict_proba(TEXTS, as_numpy=True)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = setfit.SetFitModel.from_pretrained(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    assert (loaded.predict_proba(TEXTS, as_numpy=True) == expected).all()
    with softhooks.disabled(loaded.model_body):
        assert not (loaded.predict_proba(TEXTS, as_numpy=True) == expected).all()
    with pytest.raises(ValueError, match="trust_remote_code"):
        setfit.SetFitModel.from_pretrained(str(tmp_path / "saved"), device="cpu")


def test_the_best_prompt_comes_back_and_loads_on_a_fresh_body(setfit, tmp_path):
    from softhooks.integrations.sentence_transformers import load_prompt

    model = model_of(setfit, tmp_path)
    trainer, callback = trainer_of(
        setfit, tmp_path, model, PrefixTuning(3, projection=True, hidden_size=8), eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, save_total_limit=3, load_best_model_at_end=True,
    )  # fmt: skip
    values = iter([0.5, 0.1, 0.9])
    evaluate = trainer.st_trainer.evaluate

    def judged(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        metrics["eval_embedding_loss"] = next(values)
        return metrics

    trainer.st_trainer.evaluate = judged
    trainer.train()
    best = trainer.st_trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-4")
    assert not (tmp_path / "run" / "checkpoint-4" / "model.safetensors").exists()
    fresh = model_of(setfit, tmp_path).model_body
    load_prompt(fresh, best)
    assert (fresh.encode(TEXTS) == model.model_body.encode(TEXTS)).all()
    last = model_of(setfit, tmp_path).model_body
    load_prompt(last, tmp_path / "run" / "checkpoint-6")
    assert not (last.encode(TEXTS) == model.model_body.encode(TEXTS)).all()
    held = {id(p) for group in trainer.st_trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in callback.soft_prompt.parameters()}


# --- refused ----------------------------------------------------------------------------------------------------------


def test_callbacks_for_other_trainers_are_refused(setfit, tmp_path):
    import sentence_models as made
    import sentence_transformers as library

    from softhooks.integrations.sentence_transformers import SentencePromptCallback
    from softhooks.integrations.setfit import SetFitPromptCallback

    model = model_of(setfit, tmp_path)
    with untouched(model.model_body), pytest.raises(UnsupportedModelError, match="SetFitPromptCallback"):
        trainer_of(setfit, tmp_path, model, callback=SentencePromptCallback(PromptTuning(3)))
    with untouched(model.model_body), pytest.raises(TrainerError, match=r"setfit\.Trainer"):
        library.SentenceTransformerTrainer(
            model=model.model_body,
            args=made.arguments(tmp_path / "run"),
            train_dataset=made.pairs(),
            callbacks=[SetFitPromptCallback(PromptTuning(3))],
        )


def test_a_trainer_that_was_given_another_model_is_refused(setfit, tmp_path):
    """As in its hyperparameter search; SetFit itself would silently train neither of the two."""
    trainer, _ = trainer_of(setfit, tmp_path, model_of(setfit, tmp_path))
    trainer.model = later = model_of(setfit, tmp_path)
    with untouched(later.model_body), pytest.raises(TrainerError, match="made with"):
        trainer.train()


def test_the_two_models_of_aspect_based_sentiment_are_refused(setfit, tmp_path):
    from setfit.span.modeling import AspectModel

    plain = model_of(setfit, tmp_path)
    model = AspectModel(model_body=plain.model_body, model_head=plain.model_head)
    with untouched(model.model_body), pytest.raises(UnsupportedModelError, match="aspect-based"):
        trainer_of(setfit, tmp_path, model)


def test_the_example_runs(setfit):
    names = examples.run("setfit")
    assert list(names["answers"]) == list(names["model"].predict(["a text", "another"]))
    assert softhooks.runtime.prompted_model.prompted_model_of(names["model"].model_body) is not None
