"""Lightning: one callback; checkpoints without the base that resume bit for bit; refusals."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import examples
import pytest
import torch
import training
import zoo
from contexts import method as cpt
from launch import ROOT, SCRIPTS, results
from untouched import remove_all, untouched

import softhooks
from softhooks import (
    AttachError,
    NameTakenError,
    OptionError,
    PrefixTuning,
    PromptTuning,
    PTuning,
    SoftHooksError,
    TrainerError,
)
from softhooks.errors import FrozenModifiedError
from softhooks.runtime.prompted_model import prompted_model_of
from softhooks.trainer.checkpoint import saver_of

pytest.importorskip("lightning")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")
    for words in (
        "`isinstance.treespec, LeafSpec.` is deprecated", "You defined a `validation_step` but have no `val_dataloader`",
        "Be aware that when using `ckpt_path`, callbacks", "Found .* module.s. in eval mode", ".*does not have many workers",
    )
]  # fmt: skip
METHODS = {
    "prompt": PromptTuning(4),
    "mlp": PrefixTuning(4, projection=True, hidden_size=8),
    "lstm": PTuning(4, encoder="lstm", hidden_size=8),
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""Lightning saves no random number states, so a run with dropout cannot resume bit for bit."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def pl() -> Any:
    return importlib.import_module("lightning.pytorch")


@pytest.fixture(scope="module")
def callback_of(pl: Any) -> Any:
    return importlib.import_module("softhooks.integrations.lightning").SoftPromptCallback


@pytest.fixture(scope="module")
def lit(pl: Any) -> Any:
    """A plain LightningModule, without prompts."""

    class Lit(pl.LightningModule):  # type: ignore[misc]
        def __init__(self, arch: str = "llama", head: str = "causal", optimizer: str = "AdamW", seed: int = 0) -> None:
            super().__init__()
            self.model = zoo.build(arch, head, seed=seed, **STILL).train()
            self.chosen = optimizer
            self.seen: list[float] = []
            self.checked: list[float] = []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss = self.model(**batch).loss
            self.seen.append(float(loss.detach()))
            return loss

        def validation_step(self, batch: Any, _: int) -> None:
            loss = self.model(**batch).loss
            self.log("val", loss)
            self.checked.append(float(loss))

        def predict_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.model(**batch).logits

        def configure_optimizers(self) -> Any:
            kinds = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}
            named = self.named_parameters() if self.chosen == "AdamW" else self.parameters()
            optimizer = kinds[self.chosen](named, lr=2e-2)
            return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)]

    return Lit


@pytest.fixture
def trainer_of(pl: Any, tmp_path: Path) -> Any:
    def make(*callbacks: Any, epochs: int = 2, **options: Any) -> Any:
        return pl.Trainer(
            **{
                "max_epochs": epochs, "callbacks": list(callbacks), "accelerator": "cpu", "devices": 1, "logger": False,
                "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path),
                "enable_checkpointing": any(hasattr(c, "save_top_k") for c in callbacks), **options,
            }
        )  # fmt: skip

    return make


def loader(head: str = "causal", size: int = 4) -> Any:
    return torch.utils.data.DataLoader(training.rows(head), batch_size=size)


def each_epoch(pl: Any, folder: Path, **options: Any) -> Any:
    return pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **options)


# --- training and checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_bit_for_bit_in_a_fresh_module(
    pl: Any, lit: Any, callback_of: Any, trainer_of: Any, tmp_path: Path, name: str
) -> None:
    module, callback = lit(), callback_of(METHODS[name])
    base = training.base_of(module.model)
    trainer_of(callback, each_epoch(pl, tmp_path)).fit(module, loader())
    assert training.equal(training.base_of(module.model), base)
    assert callback.report.tensors >= len(base) > 0
    assert module.seen[2] != module.seen[0]

    again, second = lit(), callback_of(METHODS[name])
    trainer = trainer_of(second)
    trainer.fit(again, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert again.seen == module.seen[2:]
    assert training.equal(training.trained(second), training.trained(callback))
    (group,) = trainer.optimizers[0].param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in second.soft_prompt.parameters()]
    assert group["param_names"] == [f"model.{name}" for name in training.trained(second)]


def test_a_checkpoint_holds_the_prompt_in_plain_tensors_and_a_directory_beside_it(
    pl: Any, lit: Any, callback_of: Any, trainer_of: Any, tmp_path: Path
) -> None:
    module, callback = lit(), callback_of(METHODS["mlp"])
    checkpoints = pl.callbacks.ModelCheckpoint(
        tmp_path / "c", filename="{epoch}", save_top_k=1, save_last=True, monitor="val"
    )
    trainer = trainer_of(callback, checkpoints, epochs=3)
    trainer.fit(module, loader(), loader(size=8))
    for options in ({}, {"weights_only": True}):
        trainer.save_checkpoint(tmp_path / "saved.ckpt", **options)
        content = torch.load(tmp_path / "saved.ckpt", weights_only=True)
        assert set(content["state_dict"]) == {
            *(f"model.{name}" for name in training.trained(callback)), "model.soft_prompt.default.description"
        }  # fmt: skip
        assert all(type(value) is torch.Tensor for value in content["state_dict"].values())
        assert (tmp_path / "saved.ckpt").stat().st_size < 60_000
    best = Path(checkpoints.best_model_path)
    kept = {path.name for path in (tmp_path / "c").iterdir()}
    assert kept == {best.name, best.name.replace(".ckpt", ".prompt"), "last.ckpt", "last.prompt"}

    fresh = zoo.build("llama")
    softhooks.load(fresh, tmp_path / "saved.prompt")
    module.eval()
    with torch.no_grad():
        assert torch.equal(fresh(zoo.text()).logits, module.model(zoo.text()).logits)
        assert fresh(zoo.text()).logits.shape == zoo.build("llama")(zoo.text()).logits.shape


def test_validation_and_prediction_meet_the_prompt_as_it_is(
    pl: Any, lit: Any, callback_of: Any, trainer_of: Any, tmp_path: Path
) -> None:
    module, callback = lit(), callback_of(METHODS["prompt"])
    trainer = trainer_of(callback, each_epoch(pl, tmp_path))
    trainer.fit(module, loader(), loader(size=8))
    batch = next(iter(loader(size=8)))
    module.eval()
    with torch.no_grad():
        now = module.model(**batch)
    assert module.checked[-1] == float(now.loss)
    assert len(set(module.checked)) == 3  # before the first epoch, and after each
    assert torch.equal(trainer.predict(module, loader(size=8))[0], now.logits)
    assert trainer.validate(module, loader(size=8), verbose=False)[0]["val"] == pytest.approx(float(now.loss))
    assert callback.soft_prompt.is_attached

    other = trainer_of(callback_of(METHODS["prompt"]))
    assert torch.equal(other.predict(lit(), loader(size=8), ckpt_path=tmp_path / "epoch=1.ckpt")[0], now.logits)
    bare = zoo.build("llama")
    with softhooks.disabled(module.model):
        assert torch.equal(module.model(**batch).logits, bare(**batch).logits)


def test_accumulation_clipping_and_bf16_are_as_ever(lit: Any, callback_of: Any, trainer_of: Any) -> None:
    def train(size: int, **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        module, callback = lit(optimizer="SGD"), callback_of(METHODS["prompt"])
        accumulate = {"accumulate_grad_batches": 8 // size, "gradient_clip_val": 0.05}
        trainer_of(callback, **accumulate, **options).fit(module, loader(size=size))
        assert callback.report is not None
        return callback.soft_prompt.encoder.embeddings.detach()

    large = train(8)
    assert torch.allclose(train(2), large, atol=1e-6)
    mixed = train(8, precision="bf16-mixed")
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, large)
    assert torch.allclose(mixed, large, atol=2e-2)


def test_a_base_in_bf16_trains_in_true_bf16_and_no_other_does(lit: Any, callback_of: Any, trainer_of: Any) -> None:
    module = lit()
    with pytest.raises(TrainerError, match="bf16-mixed"):
        trainer_of(callback_of(METHODS["prompt"]), precision="bf16-true").fit(module, loader())
    assert prompted_model_of(module.model) is None
    module, callback = lit(), callback_of(METHODS["prompt"])
    module.model.to(torch.bfloat16)
    trainer_of(callback, precision="bf16-true").fit(module, loader())
    assert callback.report.tensors > 0
    assert callback.soft_prompt.encoder.embeddings.dtype == torch.float32


def test_a_constraint_and_an_objective_work_here_too(lit: Any, callback_of: Any, trainer_of: Any) -> None:
    module, callback = lit(optimizer="SGD"), callback_of(cpt())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=50.0)
    trainer_of(callback).fit(module, loader())
    encoder = callback.soft_prompt.encoder
    lengths = torch.linalg.vector_norm(encoder.delta.detach(), dim=1)
    assert bool((lengths <= encoder.bounds * (1 + 1e-5)).all())
    assert float((lengths / encoder.bounds).max()) > 0.99
    module = lit()
    module.model.eval()
    with pytest.raises(TrainerError, match="in evaluation mode"):
        trainer_of(callback_of(cpt())).fit(module, loader())


# --- modules that hold more, and modules that load ---------------------------------------------------------------------


def several(lit: Any) -> Any:
    class Several(lit):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__("bert", "sequence")
            self.teacher = zoo.build("bert", "sequence", seed=5)
            torch.manual_seed(1)
            self.own = torch.nn.Linear(3, 1)
            self.alias = self.model.bert

        def training_step(self, batch: Any, step: int) -> torch.Tensor:
            return super().training_step(batch, step) + self.own(self.model(**batch).logits).square().mean()

    return Several


def test_one_of_several_models_is_prompted_and_all_else_is_trained_and_saved(
    pl: Any, lit: Any, callback_of: Any, trainer_of: Any, tmp_path: Path
) -> None:
    remove_all()
    kind = several(lit)
    module = kind()
    with untouched(module.model), pytest.raises(TrainerError, match="models: model, teacher"):
        trainer_of(callback_of(METHODS["prompt"])).fit(module, loader("sequence"))
    with pytest.raises(TrainerError, match="configure_model"):
        trainer_of(callback_of(METHODS["prompt"], attribute="net.model")).fit(module, loader("sequence"))

    module.teacher.requires_grad_(False)
    callback = callback_of(METHODS["prompt"], attribute="model")
    trainer_of(callback, each_epoch(pl, tmp_path)).fit(module, loader("sequence"))
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in state} == {"model", "teacher", "own"}
    assert all(".soft_prompt." in name for name in state if name.startswith("model."))
    assert "model.soft_prompt.default.heads.classifier.weight" in state

    again = kind()
    again.teacher.requires_grad_(False)
    other = callback_of(METHODS["prompt"], attribute="model")
    trainer_of(other).fit(again, loader("sequence"), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert training.equal(dict(again.state_dict()), dict(module.state_dict()))
    fresh = kind()
    assert not torch.equal(fresh.own.weight, again.own.weight)
    assert training.equal(training.base_of(fresh.model), training.base_of(again.model))


def test_two_models_of_one_module_have_a_prompt_each(
    pl: Any, lit: Any, callback_of: Any, trainer_of: Any, tmp_path: Path
) -> None:
    class Two(lit):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.other = zoo.build("gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0).train()

        def training_step(self, batch: Any, step: int) -> torch.Tensor:
            return super().training_step(batch, step) + self.other(**batch).loss

    def pair(name: str = "second") -> list[Any]:
        return [
            callback_of(METHODS["mlp"], attribute="model"),
            callback_of(METHODS["prompt"], attribute="other", name=name),
        ]

    module, both = Two(), pair()
    trainer_of(*both, each_epoch(pl, tmp_path)).fit(module, loader())
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert {".".join(name.split(".")[:3]) for name in state} == {
        "model.soft_prompt.default",
        "other.soft_prompt.second",
    }
    again, others = Two(), pair()
    trainer_of(*others).fit(again, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    for one, other in zip(both, others, strict=True):
        assert training.equal(training.trained(one), training.trained(other))
        assert one.report.tensors > 0
    softhooks.load(zoo.build("llama"), tmp_path / "epoch=0.prompt")
    softhooks.load(zoo.build("gpt2"), tmp_path / "epoch=0.second.prompt")
    with pytest.raises(TrainerError, match="two SoftPromptCallbacks of the Trainer have the name"):
        trainer_of(*pair("default")).fit(Two(), loader())


def test_load_from_checkpoint_restores_a_module_that_attaches_itself(
    pl: Any, lit: Any, callback_of: Any, trainer_of: Any, tmp_path: Path
) -> None:
    from softhooks.integrations.lightning import attach

    class Own(lit):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            attach(self, METHODS["mlp"])

    module, callback = Own(), callback_of(METHODS["mlp"])
    prompt = prompted_model_of(module.model).prompts["default"]
    trainer_of(callback, each_epoch(pl, tmp_path)).fit(module, loader())
    assert callback.soft_prompt is prompt
    path = tmp_path / "epoch=1.ckpt"
    for options in ({}, {"strict": True}):
        loaded = Own.load_from_checkpoint(path, **options)
        assert training.equal(dict(loaded.state_dict()), dict(module.state_dict()))
    assert not training.equal(dict(Own().state_dict()), dict(module.state_dict()))
    with pytest.raises(RuntimeError, match="soft_prompt"):
        lit.load_from_checkpoint(path)
    content = torch.load(path, weights_only=True)["state_dict"]

    class Other(lit):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(seed=9)
            attach(self, METHODS["mlp"])

    with pytest.raises(TrainerError, match="differ in the base model"):
        Other.load_from_checkpoint(path)
    Own().load_state_dict(content)


def test_the_learning_rate_finder_leaves_the_prompt_where_it_was(
    pl: Any, lit: Any, callback_of: Any, trainer_of: Any, tmp_path: Path
) -> None:
    from lightning.pytorch.tuner import Tuner

    class Rated(lit):  # type: ignore[misc]
        lr = 0.1

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module, callback = Rated(), callback_of(METHODS["prompt"])
    trainer, start = trainer_of(callback, epochs=5), {}
    module.setup = lambda stage: start.update(training.trained(callback))
    Tuner(trainer).lr_find(module, loader(), num_training=5, update_attr=False)
    assert len(module.seen) == 5
    assert training.equal(training.trained(callback), start)
    assert not list(tmp_path.iterdir())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_something_else_is_refused_by_name(
    pl: Any, lit: Any, callback_of: Any, trainer_of: Any, tmp_path: Path
) -> None:
    trainer_of(callback_of(METHODS["mlp"]), each_epoch(pl, tmp_path), epochs=1).fit(lit(), loader())
    path = tmp_path / "epoch=0.ckpt"

    def refused(match: str, module: Any, callback: Any, path: Path = path) -> None:
        remove_all()
        with untouched(module.model), pytest.raises(TrainerError, match=match):
            trainer_of(callback).fit(module, loader(), ckpt_path=path)
        assert not module.seen

    refused("differ in the method", lit(), callback_of(METHODS["prompt"]))
    refused("differ in the method", lit(), callback_of(PrefixTuning(5, projection=True, hidden_size=8)))
    refused("differ in the base model", lit(seed=9), callback_of(METHODS["mlp"]))
    refused("differ in the optimizer", lit(optimizer="SGD"), callback_of(METHODS["mlp"]))
    refused("names and shapes must match", lit(), callback_of(METHODS["mlp"], name="other"))

    trainer_of(each_epoch(pl, tmp_path / "bare"), epochs=1).fit(lit(), loader())
    refused(
        "the checkpoint lacks the prompt 'default'",
        lit(),
        callback_of(METHODS["mlp"]),
        tmp_path / "bare" / "epoch=0.ckpt",
    )
    with pytest.raises(RuntimeError, match="soft_prompt"):
        trainer_of().fit(lit(), loader(), ckpt_path=path)


def test_only_the_base_may_be_missing(lit: Any, callback_of: Any, trainer_of: Any, tmp_path: Path) -> None:
    module = several(lit)()
    module.teacher.requires_grad_(False)
    trainer = trainer_of(callback_of(METHODS["prompt"], attribute="model"), epochs=1)
    trainer.fit(module, loader("sequence"))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    whole = dict(content["state_dict"])
    del content["state_dict"]["own.bias"]
    torch.save(content, tmp_path / "b.ckpt")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "own.bias"\. *$'):
        trainer.fit(module, loader("sequence"), ckpt_path=tmp_path / "b.ckpt")
    key = next(name for name in module.state_dict() if name.startswith("model.bert."))
    content["state_dict"] = whole | {key: module.state_dict()[key]}
    torch.save(content, tmp_path / "c.ckpt")
    with pytest.raises(TrainerError, match="names and shapes must match"):
        trainer.fit(module, loader("sequence"), ckpt_path=tmp_path / "c.ckpt")


def test_strategies_and_callbacks_that_cannot_be_right_are_refused_with_the_model_untouched(
    pl: Any, lit: Any, callback_of: Any, trainer_of: Any
) -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    class FSDPStrategy:
        launcher = None

    class DeepSpeedStrategy(SingleDeviceStrategy):
        pass

    class Spawned(SingleDeviceStrategy):
        launcher = _MultiProcessingLauncher.__new__(_MultiProcessingLauncher)

    remove_all()
    module = lit()
    with untouched(module.model):
        for strategy in (FSDPStrategy, DeepSpeedStrategy, Spawned):
            trainer = trainer_of()
            object.__setattr__(
                trainer, "_accelerator_connector", type("C", (), {"strategy": strategy.__new__(strategy)})()
            )
            with pytest.raises(TrainerError, match=strategy.__name__):
                callback_of(METHODS["prompt"]).setup(trainer, module, "fit")
        for average in (
            pl.callbacks.StochasticWeightAveraging(1e-2), pl.callbacks.EMAWeightAveraging()
        ):  # fmt: skip
            trainer = trainer_of(average)
            with pytest.raises(TrainerError, match="averag"):
                callback_of(METHODS["prompt"]).setup(trainer, module, "fit")


def test_modules_that_would_not_train_the_prompt_are_refused(
    lit: Any, callback_of: Any, trainer_of: Any, tmp_path: Path
) -> None:
    module = lit()
    early = torch.optim.SGD(module.parameters(), lr=0.1)
    module.configure_optimizers = lambda: early
    remove_all()
    with untouched(module.model), pytest.raises(TrainerError, match="configure_optimizers"):
        trainer_of(callback_of(METHODS["prompt"])).fit(module, loader())

    lost = lit()
    lost.training_step = lambda batch, batch_idx: torch.ones((), requires_grad=True) * 2
    with untouched(lost.model), pytest.raises(TrainerError, match="no gradient reached the prompt"):
        trainer_of(callback_of(METHODS["prompt"])).fit(lost, loader())

    other = lit()
    softhooks.attach(other.model, PromptTuning(5))
    with pytest.raises(NameTakenError):
        trainer_of(callback_of(METHODS["prompt"])).fit(other, loader())
    done = lit()
    softhooks.attach(zoo.build("llama"), METHODS["prompt"]).save_pretrained(tmp_path / "saved")
    softhooks.load(done.model, tmp_path / "saved")
    with pytest.raises(TrainerError, match="has no trainable parameters"):
        trainer_of(callback_of(METHODS["prompt"])).fit(done, loader())
    trainer_of(callback_of(METHODS["prompt"])).validate(done, loader(), verbose=False)

    compiled = torch.compile(lit())
    with pytest.raises(TrainerError, match=r"torch\.compile"):
        trainer_of(callback_of(METHODS["prompt"])).fit(compiled, loader())
    inner = lit()
    inner.model = torch.compile(inner.model)
    with pytest.raises(AttachError, match=r"torch\.compile"):
        trainer_of(callback_of(METHODS["prompt"], attribute="model")).fit(inner, loader())


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("softhooks.integrations.lightning")
    monkeypatch.delitem(vars(module), "SoftPromptCallback", raising=False)
    for package in module.PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SoftHooksError, match=r"softhooks\[lightning\]"):
        _ = module.SoftPromptCallback
    with pytest.raises(AttributeError, match="Callbacks"):
        _ = module.Callbacks


def test_checks_that_lightning_has_no_moment_for_are_refused(callback_of: Any) -> None:
    for asked in ("log", "never"):
        with pytest.raises(OptionError, match=asked):
            callback_of(METHODS["prompt"], check_frozen=asked)


@pytest.mark.parametrize("when", ["save", "end"])
def test_a_base_that_moves_is_found(
    pl: Any, lit: Any, callback_of: Any, trainer_of: Any, tmp_path: Path, when: str
) -> None:
    class Moves(lit):  # type: ignore[misc]
        def training_step(self, batch: Any, step: int) -> torch.Tensor:
            with torch.no_grad():
                self.model.lm_head.weight[0, 0] += 1
            return super().training_step(batch, step)

    callback = callback_of(METHODS["prompt"], check_frozen=when)
    with pytest.raises(FrozenModifiedError, match="lm_head"):
        trainer_of(callback, each_epoch(pl, tmp_path / "c")).fit(Moves(), loader())
    assert len(list((tmp_path / "c").glob("*.ckpt"))) == {"save": 0, "end": 2}[when]
    if when == "end":
        softhooks.load(zoo.build("llama"), tmp_path / "unproven-4")


def test_without_its_prompt_a_module_is_as_before(lit: Any, callback_of: Any, trainer_of: Any, tmp_path: Path) -> None:
    remove_all()
    module, callback = lit(), callback_of(METHODS["prompt"])
    hooks = [module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks]
    before = [len(found) for found in hooks]
    trainer = trainer_of(callback, epochs=1)
    with untouched(module.model):
        trainer.fit(module, loader())
        assert [len(found) for found in hooks] != before
        callback.soft_prompt.remove()
    assert [len(found) for found in hooks] == before
    assert saver_of(module.model) is None
    assert prompted_model_of(module.model) is None
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    assert (tmp_path / "whole.ckpt").stat().st_size > 80_000
    assert not (tmp_path / "whole.prompt").exists()


def test_the_model_saves_its_prompt_and_another_module_may_take_it(
    pl: Any, lit: Any, callback_of: Any, trainer_of: Any, tmp_path: Path
) -> None:
    first, second, callback = lit(), lit(), callback_of(METHODS["mlp"])
    second.model = first.model
    trainer_of(callback, each_epoch(pl, tmp_path), epochs=1).fit(first, loader())
    first.model.save_pretrained(tmp_path / "checkpoint-4")
    assert {f.name for f in (tmp_path / "checkpoint-4").iterdir()} == {"soft_prompt.json", "soft_prompt.safetensors"}
    taken = callback_of(METHODS["mlp"])
    trainer_of(taken, epochs=2).fit(second, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert taken.soft_prompt is callback.soft_prompt
    assert not first._load_state_dict_pre_hooks
    assert not first._load_state_dict_post_hooks
    assert len(second._load_state_dict_pre_hooks) == 1


# --- where it runs ----------------------------------------------------------------------------------------------------


def test_the_example_trains() -> None:
    left = examples.run("lightning")
    fresh = softhooks.attach(zoo.build("llama"), PromptTuning(20))
    assert not torch.equal(left["callback"].soft_prompt.encoder.embeddings, fresh.encoder.embeddings)
    assert left["callback"].report.tensors > 0
    assert left["callback"].soft_prompt.model is left["model"]


def test_pytorch_lightning_is_served_by_the_same_callback(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    assert importlib.metadata.version("pytorch-lightning") == importlib.metadata.version("lightning")
    told = subprocess.run(
        [sys.executable, str(SCRIPTS / "lit.py"), "pytorch_lightning", str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False, env=environment(),
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-3000:]
    seen = torch.load(tmp_path / "rank0.pt")
    assert seen["modules"] == ["pytorch_lightning"]
    assert training.equal(seen["resumed"], seen["trained"])


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def test_two_processes_train_and_go_on_as_one_does(pl: Any, tmp_path: Path) -> None:
    first, second = results(tmp_path, SCRIPTS / "lit.py", "lightning.pytorch", tmp_path)
    script = runpy.run_path(str(SCRIPTS / "lit.py"))
    alone = training.trained(script["train"](pl, tmp_path, script["make"](pl)(), script["METHOD"]))
    assert all(torch.allclose(first["trained"][name], alone[name], atol=2e-5) for name in alone)
    for seen in (first, second):
        assert training.equal(seen["trained"], first["trained"])
        assert training.equal(seen["resumed"], first["trained"])
        assert seen["checked"] > 0
        assert torch.equal(seen["head"], first["head"])
        assert seen["apart"].startswith("TrainerError: the prompt of rank 1 differs from that of rank 0;")
