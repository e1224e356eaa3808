"""Who is compared: softhooks, PEFT with the very same prompt, and the bare frozen model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import softhooks
from benchmarks.models import Batch, token_loss
from softhooks.method import Method

BARE, SOFTHOOKS, PEFT = "bare", "softhooks", "PEFT"


@dataclass(frozen=True)
class Pair:
    """One method as both libraries offer it, from P, the model's width, and the ids that a prefix starts from."""

    name: str
    softhooks: Callable[[int, int, Tensor], Method]
    peft: Callable[[int, int], peft.PeftConfig]


PROMPT = Pair(
    "prompt tuning",
    lambda count, width, ids: softhooks.PromptTuning(count),
    lambda count, width: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count),
)
PREFIX = Pair(
    "prefix tuning",
    lambda count, width, ids: softhooks.PrefixTuning(count, init_ids=ids.tolist()),
    lambda count, width: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count),
)
PREFIX_MLP = Pair(
    "prefix tuning, MLP",
    lambda count, width, ids: softhooks.PrefixTuning(count, init_ids=ids.tolist(), projection=True, hidden_size=width),
    lambda count, width: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=count, prefix_projection=True, encoder_hidden_size=width
    ),
)
PAIRS = (PROMPT, PREFIX, PREFIX_MLP)


@dataclass
class Contestant:
    """A model that trains.

    Attributes:
        name: BARE, SOFTHOOKS or PEFT.
        model: what is called.
        prompt: what is trained, in the same order for both libraries; nothing in the bare model.
        handle: softhooks' handle.
    """

    name: str
    model: nn.Module
    prompt: list[nn.Parameter] = field(default_factory=list)
    handle: softhooks.SoftPrompt | None = None
    optimizer: torch.optim.Optimizer | None = None

    def backward(self, batch: Batch) -> Tensor:
        """Run forward and backward. -> the loss."""
        loss: Tensor = self.model(**batch).loss
        loss.backward()
        return loss.detach()

    def backward_in_fp64(self, batch: Batch) -> Tensor:
        """Run forward and backward with a loss in fp64; transformers' own is fp32. -> the loss."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: Tensor = self.model(**inputs).logits
        loss = token_loss(logits[:, -batch["labels"].shape[1] :], batch)
        loss.backward()
        return loss.detach()

    def step(self, batch: Batch) -> None:
        """Run one training step: forward, backward, AdamW, zero_grad."""
        if self.optimizer is None and self.prompt:
            self.optimizer = torch.optim.AdamW(self.prompt, lr=1e-4)
        self.backward(batch)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradients(self) -> list[Tensor]:
        """Take the gradients away from the prompt's parameters."""
        taken = [parameter.grad for parameter in self.prompt]
        for parameter in self.prompt:
            parameter.grad = None
        return [gradient for gradient in taken if gradient is not None]


def bare(base: LlamaForCausalLM) -> Contestant:
    """The frozen model on the text alone; its backward goes down to the text's embeddings, as a prompt's does."""
    model = copy.deepcopy(base)
    model.enable_input_require_grads()
    return Contestant(BARE, model)


def with_softhooks(base: LlamaForCausalLM, pair: Pair, ids: Tensor) -> Contestant:
    """Attach softhooks' prompt, which starts from the words `ids`: it does what these words would do in the text."""
    model = copy.deepcopy(base)
    handle = softhooks.attach(model, pair.softhooks(len(ids), base.config.hidden_size, ids))
    handle.encoder.to(next(base.parameters()).dtype)  # prompts stay in fp32; the comparison in fp64 needs fp64
    prompt = list(handle.encoder.parameters())
    if pair is PROMPT:
        with torch.no_grad():
            prompt[0].copy_(base.get_input_embeddings()(ids))
    return Contestant(SOFTHOOKS, model, prompt, handle)


def with_peft(base: LlamaForCausalLM, pair: Pair, like: Contestant) -> Contestant:
    """Attach PEFT's prompt and give it the numbers of softhooks' one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a renamed attribute
        config = pair.peft(_length(like), base.config.hidden_size)
        model = peft.get_peft_model(copy.deepcopy(base), config)
    model.train(base.training)
    encoder = model.prompt_encoder["default"].to(next(base.parameters()).dtype)
    prompt = list(encoder.parameters())
    with torch.no_grad():
        for mine, theirs in zip(prompt, like.prompt, strict=True):
            mine.copy_(theirs)
    return Contestant(PEFT, model, prompt)


def _length(contestant: Contestant) -> int:
    assert contestant.handle is not None
    return contestant.handle.method.num_virtual_tokens
