"""Training, with evaluations in between and at the end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from benchmarks.metamath import data
from benchmarks.metamath.contestants import Contestant, optimizer_of
from benchmarks.metamath.evaluate import loss_per_token, solved
from benchmarks.metamath.memory import Memory
from benchmarks.metamath.settings import ExperimentError, Settings

_WARMUP = 0.1
_STEPS_TO_RELEASE = 10
_LLAMA_LOSS = (1.0, 2.0)


@dataclass
class Log:
    """What a run has measured so far; a run that fails or is canceled leaves what it has.

    Attributes:
        losses, seconds, tokens: of each training step; the tokens include one EOS for each row.
        allocated, reserved: the memory after each training step.
        rows: the number of training rows so far.
        metrics: the entries of the result: one for each evaluation, and one for the test.
        evaluating: the seconds of all evaluations on the validation rows.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)
    rows: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluating: float = 0.0

    def loss(self, steps: int) -> float:
        """Return the mean loss of the last steps."""
        return sum(self.losses[-steps:]) / steps


@dataclass
class Training:
    """A training run.

    Attributes:
        contestant, tokenizer, rows, settings: what to train, and how.
        memory: measures the memory.
        log: the measurements.
        published: whether the model and the data are those of PEFT's comparison, whose loss on Wikipedia is known.
    """

    contestant: Contestant
    tokenizer: PreTrainedTokenizerBase
    rows: data.Data
    settings: Settings
    memory: Memory
    log: Log
    published: bool

    def run(self) -> None:
        """Train, evaluate on the validation rows every `eval_steps` steps, and test."""
        settings, model = self.settings, self.contestant.model
        required = settings.max_steps * settings.batch_size
        if len(self.rows.train) < required:
            raise ExperimentError(
                f"there are {len(self.rows.train)} training rows, but max_steps={settings.max_steps} with "
                f"batch_size={settings.batch_size} needs {required}. Reduce max_steps."
            )
        began = time.perf_counter()
        self.optimizer = optimizer_of(self.contestant.parameters, settings)
        self.schedule = self._schedule()
        model.eval()
        with self.contestant.bare():
            before = self._wikipedia_loss()
        if self.published and not _LLAMA_LOSS[0] < before < _LLAMA_LOSS[1]:
            raise RuntimeError(
                f"the base model's loss on Wikipedia is {before:.2f}; that of Llama 3.2 3B is between 1 and 2. The model or the "
                "texts are not those of PEFT's comparison."
            )
        model.train()
        batches = islice(data.training_batches(self.rows.train, self.tokenizer, settings), settings.max_steps)
        bar = tqdm(batches, total=settings.max_steps, desc="training", disable=None)
        for step, rows in enumerate(bar, start=1):
            self._step(rows)
            bar.set_postfix(loss=f"{self.log.losses[-1]:.3f}")
            if step % settings.eval_steps == 0:
                self._evaluate(step, began)
            if step % _STEPS_TO_RELEASE == 0:
                self.memory.release()
        self._test(before)

    def _schedule(self) -> Any:
        if self.settings.lr_scheduler is None:
            return torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        steps = self.settings.max_steps
        return get_cosine_schedule_with_warmup(self.optimizer, int(_WARMUP * steps), steps)

    def _step(self, rows: list[list[int]]) -> None:
        began = time.perf_counter()
        contestant, log = self.contestant, self.log
        batch = data.training_batch(self.tokenizer, rows)
        device = contestant.model.device
        batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        self.optimizer.zero_grad()
        loss = contestant.model(**batch).loss
        loss.backward()
        if self.settings.grad_norm_clip:
            torch.nn.utils.clip_grad_norm_(contestant.parameters, self.settings.grad_norm_clip)
        self.optimizer.step()
        self.schedule.step()
        log.losses.append(loss.item())
        log.rows += len(rows)
        log.tokens.append(sum(map(len, rows)) + len(rows))
        log.allocated.append(self.memory.allocated)
        log.reserved.append(self.memory.reserved)
        log.seconds.append(time.perf_counter() - began)

    def _evaluate(self, step: int, began: float) -> None:
        started = time.perf_counter()
        log, steps, model = self.log, self.settings.eval_steps, self.contestant.model
        model.eval()
        right = solved(model, self.tokenizer, self.rows.validation, self.settings)
        model.train()
        ended = time.perf_counter()
        log.evaluating += ended - started
        seconds = sum(log.seconds[-steps:])
        log.metrics.append(
            {
                "step": step,
                "valid accuracy": right,
                "train loss": log.loss(steps),
                "train samples": log.rows,
                "train time": seconds,
                "eval time": ended - started,
                "tokens / sec": sum(log.tokens[-steps:]) / seconds,
                "mem allocated avg": sum(log.allocated[-steps:]) / steps,
                "mem reserved avg": sum(log.reserved[-steps:]) / steps,
                "elapsed time": ended - began,
            }
        )
        tqdm.write(f"step {step}: loss {log.loss(steps):.4f}, validation accuracy {right:.3f}")

    def _test(self, before: float) -> None:
        log, model = self.log, self.contestant.model
        model.eval()
        right = solved(model, self.tokenizer, self.rows.test, self.settings)
        log.metrics.append(
            {
                "step": len(log.losses),
                "test accuracy": right,
                "train loss": log.loss(self.settings.eval_steps),
                "train samples": log.rows,
                "train total tokens": sum(log.tokens),
                "forgetting": self._wikipedia_loss() - before,
            }
        )

    def _wikipedia_loss(self) -> float:
        model, rows = self.contestant.model, self.rows.wikipedia
        return loss_per_token(model, self.tokenizer, rows, self.settings.batch_size)
