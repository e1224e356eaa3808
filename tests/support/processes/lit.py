"""Lightning in one of several processes: `lit.py PACKAGE FOLDER`; writes its results to `rankN.pt`."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import training
import zoo
from launch import leave

from softhooks import PrefixTuning, PromptTuning, SoftHooksError

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
METHOD = PrefixTuning(4, projection=True, hidden_size=8)


def make(pl: Any) -> type:
    """A plain LightningModule."""

    class Lit(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, arch: str = "llama", head: str = "causal", nudge: int = 0) -> None:
            super().__init__()
            self.model = zoo.build(arch, head).train()
            self.nudge = nudge

        def training_step(self, batch: Any, step: int) -> torch.Tensor:
            if self.nudge and step:
                with torch.no_grad():
                    next(self.model.soft_prompt.parameters()).add_(self.nudge)
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=2e-2)

    return Lit


def train(pl: Any, folder: Path, module: Any, method: Any, *callbacks: Any, head: str = "causal", **fit: Any) -> Any:
    """Fit with four rows per step, over all processes."""
    from softhooks.integrations.lightning import SoftPromptCallback

    class Seed(pl.Callback):  # type: ignore[misc, name-defined]
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            torch.manual_seed(3)

    callback = SoftPromptCallback(method)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=PROCESSES, strategy="ddp" if PROCESSES > 1 else "auto", logger=False,
        callbacks=[Seed(), callback, *callbacks], enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        enable_checkpointing=bool(callbacks), use_distributed_sampler=False,  # its own shuffles
    )  # fmt: skip
    data = training.rows(head)
    sampler = torch.utils.data.DistributedSampler(data, PROCESSES, int(os.environ.get("RANK", "0")), shuffle=False)
    rows = torch.utils.data.DataLoader(data, batch_size=4 // PROCESSES, sampler=sampler)
    trainer.fit(module, rows, **fit)
    return callback


def main() -> None:
    """Train, resume, and train with ranks that start apart or diverge."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pl, folder = importlib.import_module(sys.argv[1]), Path(sys.argv[2])
    for name in (sys.argv[1], "lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rank, kind = int(os.environ.get("RANK", "0")), make(pl)
    keep = pl.callbacks.ModelCheckpoint(folder / "c", filename="{epoch}", save_top_k=-1)
    callback = train(pl, folder, kind(), METHOD, keep)
    assert isinstance(callback, pl.Callback)
    seen: dict[str, Any] = {"trained": training.trained(callback), "checked": callback.report.tensors}
    again = train(pl, folder, kind(), METHOD, ckpt_path=folder / "c" / "epoch=0.ckpt")
    seen["resumed"] = training.trained(again)
    seen["modules"] = [name for name in ("lightning", "pytorch_lightning") if name in sys.modules]
    if PROCESSES > 1:
        module = kind("bert", "sequence")
        torch.manual_seed(rank)
        module.model.classifier.reset_parameters()
        begun = train(pl, folder, module, PromptTuning(4), head="sequence")
        seen["head"] = begun.soft_prompt.heads["classifier"].weight.detach().clone()
        try:
            train(pl, folder, kind(nudge=rank), PromptTuning(4))
        except SoftHooksError as error:
            seen["apart"] = f"{type(error).__name__}: {error}"
        del module, begun
    torch.save(seen, folder / f"rank{rank}.pt")
    del callback, again, keep
    if PROCESSES > 1:
        leave()


if __name__ == "__main__":
    main()
