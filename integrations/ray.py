"""Ray Train: a callback that reports a Trainer's checkpoints, with a prompt, from Ray's workers.

`SoftPromptCallback` works in the loop of a `TorchTrainer` as in any other Trainer, in one process or several. But with Ray's own
`RayTrainReportCallback`, every worker copies the checkpoint, possibly while the first worker is still writing it, and all copies
go to the same directory. With `ReportCallback`, workers wait until the checkpoint is complete; the first worker reports it, and
the other workers add their random state. Names and layout are the same as with Ray's callback (`checkpoint/` in the reported
directory). Checkpoints hold only the prompt. `last_checkpoint` provides the path from which a restarted run resumes bit for bit.

Refused with an error: a save that left no checkpoint of the Trainer. In a training loop without a Trainer, report the result of
`prompt.save_pretrained` yourself, or resume with `softhooks.integrations.accelerate`.

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
"""The subdirectory of a reported directory with the Trainer's checkpoint, as in Ray's own callback."""


class ReportCallback(TrainerCallback):
    """Reports each checkpoint of a Trainer, with the latest metrics, to Ray Train.

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
                _copy(folder, target)
            else:
                target.mkdir()
                own = folder / f"rng_state_{args.process_index}.pth"
                if own.is_file():
                    shutil.copy(own, target)
            train.report(metrics=metrics, checkpoint=train.Checkpoint.from_directory(temporary))


@contextmanager
def last_checkpoint(start: Any = None) -> Iterator[str | None]:
    """Yield the path of the last checkpoint that this run reported, including before a restart by Ray, or None if there is none.

    Args:
        start: a checkpoint of another run (`result.checkpoint`) to start from if this run has no checkpoint yet.

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
                f"{checkpoint!r} has no {CHECKPOINT}/, so ReportCallback has not reported it.",
                "Use a different name or storage path for the run, or resume from a checkpoint of ReportCallback.",
                contents=", ".join(sorted(entry.name for entry in Path(folder).iterdir())) or "nothing",
            )
        yield str(path)


def _copy(folder: Path, target: Path) -> None:
    """Copy a checkpoint without locks and temporary files."""
    if not folder.is_dir():
        raise TrainerError(
            f"the Trainer has saved no checkpoint in {folder}.",
            "Do not change the Trainer's `output_dir` or the names of its checkpoints.",
        )
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(".*"))


def _ray_train() -> Any:
    return import_framework("ray.train", "Ray Train", "ray")
