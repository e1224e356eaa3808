"""Parameters without a gradient in some steps, in one of two processes: `mpt.py FOLDER`; writes its results to
`rankN.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import naive
import torch
import training
import transformers as tf
import zoo
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedDataParallelKwargs
from launch import leave
from processes.train import SHARDING, refusal
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import softhooks
from softhooks import LlamaAdapter, MultitaskPromptTuning
from softhooks.compat.sharding import full
from softhooks.integrations.accelerate import track
from softhooks.method import Method

METHOD = MultitaskPromptTuning(3, tasks=3, sampling=None, teachers="train", teacher_steps=2)
ADAPTER = LlamaAdapter(3, context_size=5)
SEARCHING: dict[str, Any] = {"ddp_find_unused_parameters": True}
AGAIN: dict[str, Any] = {"gradient_checkpointing": True}
REENTRANT: dict[str, Any] = {**AGAIN, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


def rows() -> list[dict[str, torch.Tensor]]:
    """Rows of three tasks with different numbers of labels."""
    found = training.rows("causal", 8)
    for number, row in enumerate(found):
        row["task_ids"] = torch.tensor(number % 3)
        row["labels"][: number % 4] = -100
    return found


def train(folder: Path, size: int, steps: int, **options: Any) -> dict[str, torch.Tensor]:
    """Two steps of teachers and two of the decomposition, with eight rows each; return the trained parameters."""
    torch.manual_seed(7)
    trainer, callback = training.prompted(
        folder, naive.without_dropout(zoo.build("llama")), "causal", METHOD, given={"train_dataset": rows()},
        optim="sgd", learning_rate=0.3, max_grad_norm=0.0, lr_scheduler_type="constant",
        per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options,
    )  # fmt: skip
    trainer.train()
    assert callback.soft_prompt is not None
    encoder = callback.soft_prompt.encoder
    assert not encoder.trains_teachers
    learned = training.trained(callback) | {"teachers": encoder.teachers.clone()}
    return {name: full(tensor) for name, tensor in learned.items()}


def loop(method: Method, *, searching: bool, extra: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Three steps with an Accelerator; the gradients after the last."""
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=searching)]
    accelerator, model = Accelerator(cpu=True, kwargs_handlers=handlers), naive.without_dropout(zoo.build("llama"))
    torch.manual_seed(7)
    prompt = track(accelerator, softhooks.attach(model, method))
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(prompt.parameters(), lr=0.1))
    assert isinstance(wrapped, DistributedDataParallel)
    ids = zoo.text(3, 6, seed=accelerator.process_index)
    wrapped.train()
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(wrapped(input_ids=ids, labels=ids, **(extra or {})).loss)
        optimizer.step()
    return {name: p.grad.clone() for name, p in prompt.encoder.named_parameters() if p.grad is not None}


def loop_in_parts() -> dict[str, torch.Tensor]:
    """Steps on a model whose root, too, is put back in parts whenever a forward of it ends; the third has a teacher."""
    model = naive.without_dropout(zoo.build("llama"))
    torch.manual_seed(7)
    prompt = softhooks.attach(model, METHOD, injection="slots")
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(model, reshard_after_forward=True)
    optimizer, ids = torch.optim.SGD(prompt.parameters(), lr=0.1), zoo.text(3, 6)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, task_ids=torch.arange(3)).loss.backward()
        optimizer.step()
    assert not prompt.encoder.trains_teachers
    return {name: full(p.detach()) for name, p in prompt.encoder.named_parameters()}


def main() -> None:
    """Train in each supported way, and record the refusals of the others."""
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    folder = Path(sys.argv[1])
    state = PartialState(cpu=True, backend="gloo")
    seen: dict[str, Any] = {}
    ways = {"as it is": {}, "again": {**AGAIN, **SEARCHING}, "reentrant": {**REENTRANT, **SEARCHING}}
    for name, options in ways.items():
        seen[name] = train(folder / name, 2, 2, ddp_backend="gloo", **options)
    refused = {"checkpointing": AGAIN, "not searching": {"ddp_find_unused_parameters": False}}
    refused["static"] = {**SEARCHING, "ddp_static_graph": True}
    for name, options in refused.items():
        seen[name] = refusal(lambda options=options: train(folder / "x", 2, 2, ddp_backend="gloo", **options))

    tasks, context = {"task_ids": torch.arange(3)}, {"prompt_context": torch.ones(3, 5)}
    seen["loop"] = refusal(lambda: loop(METHOD, searching=False, extra=tasks))
    seen["loop of texts"] = refusal(lambda: loop(ADAPTER, searching=False))
    seen["gradients"] = {
        "teachers": loop(METHOD, searching=True, extra=tasks),
        "texts": loop(ADAPTER, searching=True),
        "images": loop(ADAPTER, searching=False, extra=context),
        "mixed": loop(ADAPTER, searching=True, extra=context if state.process_index else None),
    }
    for name, options in {"sharded": SHARDING, "sharded, again": {**SHARDING, **AGAIN}}.items():
        seen[name] = train(folder / name, 2, 2, ddp_backend="gloo", **options)
    seen["saved in shards"] = refusal(
        lambda: train(folder / "x", 2, 2, ddp_backend="gloo", **SHARDING, save_strategy="steps")
    )
    seen["in parts"] = loop_in_parts()
    torch.save(seen, folder / f"rank{state.process_index}.pt")
    leave()


if __name__ == "__main__":
    main()
