"""Ray Train: a Trainer with a prompt in Ray's workers, whose checkpoints Ray keeps and gives back.

`SoftPromptCallback` trains in a `TorchTrainer`'s loop as anywhere, in one process or in several. But Ray's own
`RayTrainReportCallback` lets every worker copy the checkpoint while the first one may still be writing it, and all copies go into
one directory. So `ReportCallback` stands in its place: workers wait until the checkpoint is whole, the first one reports it, the
others add the state of their random numbers. Names and layout are Ray's (`checkpoint/` in the reported directory), and hold the
prompt only.
`last_checkpoint` gives the path from which a restarted or resumed run goes on bit for bit.

Refused: a save that has left no checkpoint of the Trainer. Loops that are not a Trainer's report as they like, with
`prompt.save_pretrained`; what goes on bit for bit there is `softhooks.integrations.accelerate`.

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
"""Where in a directory that is reported the Trainer's checkpoint lies: as Ray's own callback has it."""


class ReportCallback(TrainerCallback):
    """Report each checkpoint of a Trainer, with the latest metrics, to Ray Train.

    Raises:
        SoftHooksError: Ray is not installed.
    """

    def __init__(self) -> None:
        _ray_train()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the checkpoint once it is whole.

        Raises:
            TrainerError: there is none.
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
    """Give the path of the last checkpoint that this run has reported, also before Ray restarted it; None: there is none.

    Args:
        start: a checkpoint of another run (`result.checkpoint`), to go on from where this one has none yet.

    Raises:
        SoftHooksError: Ray is not installed.
        TrainerError: the checkpoint is of something else.
    """
    checkpoint = _ray_train().get_checkpoint() or start
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        path = Path(folder) / CHECKPOINT
        if not path.is_dir():
            raise TrainerError(
                "a run goes on from a checkpoint that ReportCallback has reported.",
                "Give the run another name or storage path, or resume from such a checkpoint.",
                checkpoint=repr(checkpoint),
                holds=", ".join(sorted(entry.name for entry in Path(folder).iterdir())) or "nothing",
                expected=f"{CHECKPOINT}/",
            )
        yield str(path)


def _copy(folder: Path, target: Path) -> None:
    """Copy a checkpoint, without what only its writer needs: locks and temporary files."""
    if not folder.is_dir():
        raise TrainerError(
            "a Trainer's save must leave a checkpoint to report.",
            "Use the Trainer's own `output_dir` and names.",
            expected=folder,
        )
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(".*"))


def _ray_train() -> Any:
    return import_framework("ray.train", "Ray Train", "ray")
