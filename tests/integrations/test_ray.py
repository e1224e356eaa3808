"""Ray Train: two workers train one prompt, and a run resumed from Ray's checkpoint ends with the same bits."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

import examples
import torch
import training
import transformers as tf
import zoo

import softhooks
from softhooks import PrefixTuning, SoftHooksError, TrainerError
from softhooks.formats.files import read_tensors
from softhooks.formats.softhooks_files import LIVE
from softhooks.integrations import ray as integration
from softhooks.integrations.ray import ReportCallback, last_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own, in threads of its own


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    runpy.run_path(str(examples.HERE / "given" / "ray.py"))["start"]()
    yield
    import ray

    ray.shutdown()


def loop(config: dict[str, Any]) -> None:
    """The training function of each worker."""
    from ray import train

    import softhooks as own

    callback = own.SoftPromptCallback(own.PrefixTuning(4, projection=True, hidden_size=16, dropout=0.1))
    model = zoo.build("llama")
    base = training.base_of(model)
    trainer = training.make(
        Path(config["output_dir"]), model, "causal", [ReportCallback(), callback],
        save_strategy="steps", save_steps=2, max_steps=4, per_device_train_batch_size=2,
    )  # fmt: skip
    with last_checkpoint(config["start"]) as path:
        assert (path is not None) == (config["start"] is not None)
        trainer.train(resume_from_checkpoint=path)
    assert train.get_context().get_world_size() == torch.distributed.get_world_size() == 2
    assert trainer.state.global_step == 4
    assert training.equal(training.base_of(model), base)
    assert callback.report is not None


def fit(folder: Path, resumed: Any = None) -> Any:
    import ray.train
    from ray.train.torch import TorchTrainer

    config = {"output_dir": str(folder / "out"), "start": resumed}
    return TorchTrainer(
        loop, train_loop_config=config, scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(storage_path=str(folder), name="run"),
    ).fit()  # fmt: skip


def test_two_workers_train_report_and_go_on_bit_for_bit(tmp_path: Path, cluster: None) -> None:
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    whole = fit(tmp_path / "whole")
    middle = next(kept for kept, metrics in whole.best_checkpoints if metrics["step"] == 2)
    later = fit(tmp_path / "later", middle)
    ends = []
    for result in (whole, later):
        held = Path(result.checkpoint.path) / "checkpoint"
        assert result.error is None
        assert result.metrics["soft_prompt/norm"] > 0
        assert not list(held.glob(".*"))
        assert not (held / "config.json").exists()
        assert {file.name for file in held.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}
        ends.append(read_tensors(held / LIVE)[0])
        prompt = softhooks.load(zoo.build("llama"), held)
        assert prompt.method == PrefixTuning(4, projection=True, hidden_size=16, dropout=0.1)
        prompt.remove()
    assert training.equal(*ends)
    before = read_tensors(Path(middle.path) / "checkpoint" / LIVE)[0]
    assert not training.equal(before, ends[0])


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train import Checkpoint

    (tmp_path / "model.bin").write_bytes(b"")
    train = SimpleNamespace(get_checkpoint=lambda: Checkpoint.from_directory(tmp_path))
    monkeypatch.setattr(integration, "_ray_train", lambda: train)
    with pytest.raises(TrainerError, match=r"model\.bin"), last_checkpoint():
        pass


def test_a_save_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    state = tf.TrainerState(global_step=2)
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=0)
    with pytest.raises(TrainerError, match="checkpoint-2"):
        ReportCallback().on_save(args, state, tf.TrainerControl())  # type: ignore[arg-type]


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SoftHooksError, match=r'pip install "softhooks\[ray\]"'):
        ReportCallback()


def test_the_example_runs(cluster: None) -> None:
    names = examples.run("ray")
    assert names["result"].error is None
    assert "soft_prompt" in dict(names["model"].named_children())
