"""Ray Train: a callback that reports a Trainer's checkpoints, which hold only a prompt, to Ray.

With Ray's own `RayTrainReportCallback`, every worker copies the checkpoint into the same directory, possibly before the first
worker has finished writing the checkpoint. With `ReportCallback`, workers wait until the checkpoint is complete; the first worker
reports it, and the other workers add their random state. Like Ray's callback, `ReportCallback` reports a directory that contains
the checkpoint as `checkpoint/`. A restarted run resumes bit for bit from the path that `last_checkpoint` yields.

An error is raised if the Trainer has not saved the checkpoint. In a training loop without a Trainer, call `ray.train.report` with
the directory that `prompt.save_pretrained` writes; if the loop must resume, use `softhooks.integrations.accelerate`.

Example:
    import ray.train
    import softhooks
    from ray.train.torch import TorchTrainer
    from softhooks.integrations.ray import ReportCallback, last_checkpoint

    def loop(config):
        callbacks = [softhooks.SoftPromptCallback(softhooks.PromptTuning(20)), ReportCallback()]
        trainer = Trainer(load_model(), TrainingArguments(**options), train_dataset=dataset, callbacks=callbacks)
        with last_checkpoint() as path:
            trainer.train(resume_from_checkpoint=path)

    result = TorchTrainer(loop, scaling_config=ray.train.ScalingConfig(num_workers=1)).fit()
    with result.checkpoint.as_directory() as folder:
        softhooks.load(model, f"{folder}/checkpoint")

Versions tested: ray 2.60.0
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from softhooks.errors import TrainerError
from softhooks.integration_support.training import is_single_process

from ._imports import import_framework

__all__ = ["ReportCallback", "last_checkpoint"]

CHECKPOINT = "checkpoint"
"""The subdirectory that holds the Trainer's checkpoint in a reported directory."""


class ReportCallback(TrainerCallback):
    """Reports each checkpoint of a Trainer and the latest metrics to Ray Train.

    Raises:
        SoftHooksError: Ray is not installed.
    """

    def __init__(self) -> None:
        _ray_train()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the checkpoint once it is complete.

        Raises:
            TrainerError: there is no checkpoint.
        """
        train = _ray_train()
        if not is_single_process():
            distributed.barrier()
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        metrics = {name: value for entry in state.log_history for name, value in entry.items()}
        with TemporaryDirectory() as temporary:
            target = Path(temporary) / CHECKPOINT
            if args.process_index == 0:
                if not folder.is_dir():
                    raise TrainerError(
                        f"the Trainer has saved no checkpoint in {folder}.",
                        "Do not change the Trainer's `output_dir` or the names of its checkpoints.",
                    )
                shutil.copytree(
                    folder, target, ignore=shutil.ignore_patterns(".*")
                )  # without locks and temporary files
            else:
                target.mkdir()
                own = folder / f"rng_state_{args.process_index}.pth"
                if own.is_file():
                    shutil.copy(own, target)
            train.report(metrics=metrics, checkpoint=train.Checkpoint.from_directory(temporary))


@contextmanager
def last_checkpoint(start: Any = None) -> Iterator[str | None]:
    """Yield the path of the last checkpoint that this run has reported, including before a restart; None if there is none.

    Args:
        start: a checkpoint of another run (`result.checkpoint`), which is used if this run has not reported one.

    Raises:
        SoftHooksError: Ray is not installed.
        TrainerError: the checkpoint was not reported by ReportCallback.
    """
    checkpoint = _ray_train().get_checkpoint() or start
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        path = Path(folder) / CHECKPOINT
        if not path.is_dir():
            raise TrainerError(
                f"{checkpoint!r} has no `{CHECKPOINT}/`, so it was not reported by ReportCallback.",
                "Resume from a checkpoint of ReportCallback, or give the run another name or storage path.",
                contents=", ".join(sorted(entry.name for entry in Path(folder).iterdir())) or "nothing",
            )
        yield str(path)


def _ray_train() -> Any:
    return import_framework("ray.train", "Ray Train", "ray")
