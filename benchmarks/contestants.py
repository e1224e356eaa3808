"""The contestants: softhooks, PEFT with the same prompt, and the bare frozen model."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import softhooks
from benchmarks.models import Batch, token_loss
from softhooks.method import Method

BARE, SOFTHOOKS, PEFT = "bare", "softhooks", "PEFT"


@dataclass(frozen=True)
class Pair:
    """One method in both libraries, made from P, the model's config, and the ids that a prefix starts from.

    Attributes:
        is_precise: whether PEFT computes in its model's precision.
        task_of: the task of each row of a batch, for methods of several tasks.
    """

    name: str
    softhooks: Callable[[int, LlamaConfig, Tensor], Method]
    peft: Callable[[int, LlamaConfig], peft.PeftConfig]
    is_precise: bool = True
    task_of: Callable[[int], int] | None = None


PROMPT = Pair(
    "prompt tuning",
    lambda count, config, ids: softhooks.PromptTuning(count),
    lambda count, config: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count),
)
P_TUNING = Pair(
    "P-tuning, LSTM",
    lambda count, config, ids: softhooks.PTuning(count),
    lambda count, config: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=count,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=config.hidden_size // 2,
    ),
)
PREFIX = Pair(
    "prefix tuning",
    lambda count, config, ids: softhooks.PrefixTuning(count, init_ids=ids.tolist()),
    lambda count, config: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count),
)
PREFIX_MLP = Pair(
    "prefix tuning, MLP",
    lambda count, config, ids: softhooks.PrefixTuning(
        count, init_ids=ids.tolist(), projection=True, hidden_size=config.hidden_size
    ),
    lambda count, config: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=count, prefix_projection=True, encoder_hidden_size=config.hidden_size
    ),
)
ADAPTER = Pair(
    "LLaMA-Adapter",
    lambda count, config, ids: softhooks.LlamaAdapter(count, gate="raw", gate_per="layer"),
    lambda count, config: peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=count, adapter_layers=config.num_hidden_layers
    ),
    is_precise=False,  # its second softmax is always in fp32
)
ADAPTER_DEFAULT = replace(
    ADAPTER, name="LLaMA-Adapter, by default", softhooks=lambda count, config, ids: softhooks.LlamaAdapter(count)
)
"""softhooks' default gates (a tanh, one gate per head), timed against PEFT's one raw gate per layer, opened equally far."""

ADAPTERS = (ADAPTER, ADAPTER_DEFAULT)
TASKS = 8
MPT, MPT_MIXED = (
    Pair(
        name,
        lambda count, _, ids: softhooks.MultitaskPromptTuning(count, tasks=TASKS),
        lambda count, _: peft.MultitaskPromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=count, num_tasks=TASKS, prompt_tuning_init="RANDOM"
        ),
        task_of=task_of,
    )
    for name, task_of in (("MPT, rows of one task", lambda row: 3), ("MPT, rows of 8 tasks", lambda row: row % TASKS))
)
MULTITASK = (MPT, MPT_MIXED)
PAIRS = (PROMPT, P_TUNING, PREFIX, PREFIX_MLP, ADAPTER, *MULTITASK)
GATE = 0.5
"""The value of an adapter's gates: at their initial value, 0, the adapter changes nothing and could not be compared."""

DECAY = 0.95
CONTEXT = Pair(
    "CPT",
    lambda count, width, ids: softhooks.ContextAwarePromptTuning(
        context_ids=ids.tolist(), token_types=context_types(count), decay=DECAY
    ),
    lambda count, width: peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_tokens_type_mask=context_types(count),
        cpt_token_ids=[0] * count,
        cpt_mask=[1] * count,
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=DECAY,
        opt_projection_epsilon=0.2,
        opt_projection_format_epsilon=0.1,
    ),
)


def context_types(count: int) -> list[int]:
    """The types of a context of examples of about 50 tokens: format, input, format, three tokens of label, separator."""
    examples = max(1, count // 50)
    sizes = [count // examples + (number < count % examples) for number in range(examples)]
    return [
        kind and 4 * number + kind
        for number, size in enumerate(sizes)
        for kind in (1, *[2] * (size - 6), 3, 4, 4, 4, 0)
    ]


@dataclass
class Contestant:
    """A model that trains.

    Attributes:
        name: BARE, SOFTHOOKS or PEFT.
        model: the module that is called.
        prompt: the trained parameters, in the same order for both libraries; none in the bare model.
        handle: softhooks' handle.
        arrange: brings gradients into the order and the shapes of softhooks' own.
        task_of: the task of each row, if a call has to name it.
    """

    name: str
    model: nn.Module
    prompt: list[nn.Parameter] = field(default_factory=list)
    handle: softhooks.SoftPrompt | None = None
    optimizer: torch.optim.Optimizer | None = None
    arrange: Callable[[list[Tensor]], list[Tensor]] = list
    task_of: Callable[[int], int] | None = None

    def call(self, batch: Batch) -> Any:
        """Run forward, with the rows' tasks if the method needs them."""
        given = {} if self.task_of is None else {"task_ids": task_ids(self.task_of, batch)}
        return self.model(**batch, **given)

    def backward(self, batch: Batch) -> Tensor:
        """Run forward and backward. -> the loss."""
        loss: Tensor = self.call(batch).loss
        loss.backward()
        return loss.detach()

    def backward_in_fp64(self, batch: Batch) -> Tensor:
        """Run forward and backward with a loss in fp64; transformers' own is fp32. -> the loss."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: Tensor = self.call(inputs).logits
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
        """Set the gradients of the prompt's parameters to None."""
        taken = [parameter.grad for parameter in self.prompt]
        for parameter in self.prompt:
            parameter.grad = None
        return self.arrange([gradient for gradient in taken if gradient is not None])


def bare(base: LlamaForCausalLM) -> Contestant:
    """The frozen model on the text alone. Its backward goes down to the text's embeddings, as with a prompt."""
    model = copy.deepcopy(base)
    model.enable_input_require_grads()
    return Contestant(BARE, model)


def with_softhooks(base: LlamaForCausalLM, pair: Pair, ids: Tensor) -> Contestant:
    """Attach softhooks' prompt, initialized as the words `ids`, so that it acts as these words in the text."""
    model = copy.deepcopy(base)
    handle = softhooks.attach(model, pair.softhooks(len(ids), base.config, ids))
    handle.encoder.to(next(base.parameters()).dtype)  # prompts are fp32 by default; the comparison in fp64 needs fp64
    prompt = list(handle.encoder.parameters())
    if pair is PROMPT:
        with torch.no_grad():
            prompt[0].copy_(base.get_input_embeddings()(ids))
    if pair in ADAPTERS:
        with torch.no_grad():
            prompt[1].fill_(GATE if pair is ADAPTER else math.atanh(GATE))
    if pair is CONTEXT:
        with torch.no_grad():
            prompt[0].normal_(std=1e-3)  # inside its bounds
    return Contestant(SOFTHOOKS, model, prompt, handle, task_of=pair.task_of)


def with_peft(base: LlamaForCausalLM, pair: Pair, like: Contestant) -> Contestant:
    """Attach PEFT's prompt and copy softhooks' values into it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a renamed attribute
        config = pair.peft(_length(like), base.config)
        model = peft.get_peft_model(copy.deepcopy(base), config)
    model.train(base.training)
    if pair in ADAPTERS:
        return _adapted(model, like)
    if pair is CONTEXT:
        return _contextual(model, base, like)
    encoder = model.prompt_encoder["default"].to(next(base.parameters()).dtype)
    prompt = list(encoder.parameters())
    if pair in MULTITASK:
        return _multitask(model, encoder, pair, like)
    with torch.no_grad():
        for mine, theirs in zip(prompt, like.prompt, strict=True):
            mine.copy_(theirs)
    return Contestant(PEFT, model, prompt)


def _adapted(model: nn.Module, like: Contestant) -> Contestant:
    """Copy softhooks' tables into PEFT's prompts and gates of each layer."""
    prompts = [p for name, p in model.named_parameters() if name.endswith("adaption_prompt")]
    gates = [p for name, p in model.named_parameters() if name.endswith("adaption_gate")]
    with torch.no_grad():
        for parameter, rows in zip(prompts, like.prompt[0].chunk(len(prompts)), strict=True):
            parameter.copy_(rows[None])
        for parameter in gates:
            parameter.fill_(GATE)

    def arrange(gradients: list[Tensor]) -> list[Tensor]:
        count = len(prompts)
        return [torch.cat([rows[0] for rows in gradients[:count]]), torch.cat(gradients[count:])[None]]

    return Contestant(PEFT, model, [*prompts, *gates], arrange=arrange)


def _multitask(model: nn.Module, encoder: nn.Module, pair: Pair, like: Contestant) -> Contestant:
    """Copy softhooks' shared prompt and task vectors, which are stored as their difference from one, into PEFT's."""
    assert like.handle is not None
    rate = like.handle.method.task_rate
    prompt = [encoder.embedding.weight, encoder.prefix_task_cols, encoder.prefix_task_rows]
    with torch.no_grad():
        shared, left, right = like.prompt
        for mine, theirs in zip(prompt, (shared, 1 + rate * left, (1 + rate * right).mT), strict=True):
            mine.copy_(theirs)

    def arrange(gradients: list[Tensor]) -> list[Tensor]:
        shared, left, right = gradients
        return [shared, rate * left, rate * right.mT]

    return Contestant(PEFT, model, prompt, arrange=arrange, task_of=pair.task_of)


def task_ids(task_of: Callable[[int], int], batch: Batch) -> Tensor:
    """The task of each row of a batch, [B]."""
    return torch.tensor([task_of(row) for row in range(batch["input_ids"].shape[0])])


def _contextual(model: nn.Module, base: LlamaForCausalLM, like: Contestant) -> Contestant:
    """Copy softhooks' context and deltas into PEFT's, which has a delta for every token."""
    assert like.handle is not None
    method = like.handle.method
    assert isinstance(method, softhooks.ContextAwarePromptTuning)
    encoder = model.prompt_encoder["default"]
    delta: nn.Parameter = encoder.delta_embedding.weight
    model.peft_config["default"].cpt_token_ids = list(method.context.ids)
    with torch.no_grad():
        encoder.embedding.weight.copy_(base.get_input_embeddings()(torch.tensor(method.context.ids)))
        delta[method.context.movable] = like.prompt[0]
    return Contestant(PEFT, model, [delta])


def _length(contestant: Contestant) -> int:
    assert contestant.handle is not None
    return contestant.handle.method.num_virtual_tokens
