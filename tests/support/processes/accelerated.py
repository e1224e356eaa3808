"""A loop with an Accelerator in one of two processes: `accelerated.py FOLDER`; writes its results to `rankN.pt`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import training
import zoo
from accelerate import Accelerator
from accelerate.state import PartialState
from launch import leave

import softhooks
from softhooks import PrefixTuning, PromptTuning, SoftHooksError
from softhooks.integrations.accelerate import track

METHODS = {"prompt": PromptTuning(4), "mlp": PrefixTuning(4, projection=True, hidden_size=8)}


def begin(method: Any, seed: int = 3) -> tuple[Any, Any, Any, Any, Any]:
    """Set up a script with four rows per step, over all processes."""
    accelerator, model = Accelerator(cpu=True), zoo.build("llama")
    torch.manual_seed(seed)
    prompt = track(accelerator, softhooks.attach(model, method))
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=2e-2)
    rows = torch.utils.data.DataLoader(training.rows("causal"), batch_size=4 // accelerator.num_processes)
    return accelerator, prompt, *accelerator.prepare(model, optimizer, rows)


def epoch(accelerator: Any, prompt: Any, model: Any, optimizer: Any, rows: Any) -> dict[str, torch.Tensor]:
    """One pass over the rows; return the trained parameters."""
    model.train()
    for batch in rows:
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(prompt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    prompt.verify_frozen()
    return {name: parameter.detach().clone() for name, parameter in prompt.named_parameters()}


def train_and_resume(folder: Path, seen: dict[str, Any]) -> None:
    """Train each method, then resume it from the middle on a new model."""
    for name, method in METHODS.items():
        run = begin(method)
        seen[f"{name} start"] = {key: value.detach().clone() for key, value in run[1].named_parameters()}
        epoch(*run)
        run[0].save_state(str(folder / name))
        seen[name] = epoch(*run)
        again = begin(method, seed=4)
        again[0].wait_for_everyone()
        again[0].load_state(str(folder / name))
        seen[f"{name} resumed"] = epoch(*again)


def refusal(attempt: Any) -> str:
    """The error that a call raises."""
    try:
        attempt()
    except SoftHooksError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def ranks(folder: Path, rank: int, seen: dict[str, Any]) -> None:
    """Ranks that start with different random numbers, attach late, or diverge."""
    accelerator, model = Accelerator(cpu=True), zoo.build("bert", "sequence")
    torch.manual_seed(rank)
    model.classifier.reset_parameters()
    prompt = track(accelerator, softhooks.attach(model, METHODS["prompt"]))
    accelerator.prepare(model)
    seen["head"] = prompt.heads["classifier"].weight.detach().clone()
    prompt.verify_frozen()

    late = zoo.build("llama")
    accelerator.prepare(late)
    seen["late"] = refusal(lambda: track(accelerator, softhooks.attach(late, METHODS["prompt"])))

    apart = begin(METHODS["prompt"])
    with torch.no_grad():
        next(apart[1].parameters()).add_(rank)
    seen["apart"] = refusal(lambda: apart[0].save_state(str(folder / "apart")))


def main() -> None:
    """Run everything and write the results."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    state = PartialState(cpu=True, backend="gloo")
    seen: dict[str, Any] = {}
    train_and_resume(folder, seen)
    ranks(folder, state.process_index, seen)
    torch.save(seen, folder / f"rank{state.process_index}.pt")
    leave()


if __name__ == "__main__":
    main()
