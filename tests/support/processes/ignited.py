"""Train a prompt with Ignite under `torchrun`; each process starts with another prompt and has its own rows."""

from __future__ import annotations

import sys

import ignite.distributed as idist
import torch
import training
import zoo
from ignite.engine import Engine
from launch import leave
from torch import distributed

import softhooks
from softhooks.base_model.frozen_record import digest
from softhooks.integrations.ignite import track


def bits(prompt: softhooks.SoftPrompt) -> list[str]:
    """The bits that every process must hold alike."""
    everyone: list[list[str]] = [[], []]
    distributed.all_gather_object(everyone, [digest(parameter).bits for parameter in prompt.parameters()])
    assert everyone[0] == everyone[1], everyone
    return everyone[0]


def main() -> None:
    rank = idist.get_rank()
    model = zoo.build("bert", "sequence")
    torch.manual_seed(rank)
    prompt = softhooks.attach(model, softhooks.PromptTuning(4, init="random"))
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=1e-2)

    def step(engine: Engine, batch: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad()
        wrapped(**batch).loss.backward()
        optimizer.step()

    trainer = Engine(step)
    live = track(trainer, prompt, optimizer)
    start = bits(prompt)
    wrapped = model if "apart" in sys.argv else idist.auto_model(model)
    loader = torch.utils.data.DataLoader(training.rows("sequence", 16)[rank::2], batch_size=4)
    trainer.run(loader, max_epochs=2)
    assert bits(prompt) != start
    print(f"rank {rank} of {type(wrapped).__name__}: {live.report}")


torch.set_num_threads(1)
idist.initialize("gloo")
main()
leave()
