"""Finding the stack: the module that the text runs through, whatever it and its embeddings are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from torch import Tensor, nn

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, UnsupportedModelError

IDS = zoo.text(2, 6)


def markuplm() -> Any:
    torch.manual_seed(0)
    small = {**zoo.SMALL, "pad_token_id": 1, "bos_token_id": 0, "max_depth": 4, "xpath_unit_hidden_size": 4}
    model = tf.MarkupLMForSequenceClassification(tf.MarkupLMConfig(**small, num_labels=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


class Block(nn.Module):
    """A causal mean over the previous tokens, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, states: Tensor) -> Tensor:
        count = torch.arange(1, states.shape[1] + 1)[:, None]
        return states + torch.tanh(self.linear(states.cumsum(1) / count))


class Embeddings(nn.Module):
    """Embeddings with a list of further tables, as MarkupLM's."""

    def __init__(self, mixes: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 16)
        self.more = nn.ModuleList([nn.Embedding(64, 16), nn.Embedding(64, 16)])
        self.mixer = Block() if mixes else None

    def forward(self, input_ids: Tensor) -> Tensor:
        states: Tensor = self.words(input_ids) + self.more[0](input_ids) + self.more[1](input_ids)
        return states if self.mixer is None else self.mixer(states)


class Layered(nn.Module):
    """A backbone whose layers are held in one way or another."""

    def __init__(self, held: str) -> None:
        super().__init__()
        self.embeddings = Embeddings(mixes=held == "behind a mixing front")
        self.held = held
        if held == "list":
            self.layers = nn.ModuleList([Block(), Block()])
        elif held == "sequential":
            self.body = nn.Sequential(Block(), Block())
        else:
            self.first, self.second = Block(), Block()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        states = self.embeddings(input_ids)
        if self.held == "list":
            for layer in self.layers:
                states = layer(states)
        elif self.held == "sequential":
            states = self.body(states)
        elif self.held == "shared":
            states = self.first(self.first(states)) + 0 * self.second(states)
        else:
            states = self.second(self.first(states))
        return (states,)


class Headed(nn.Module):
    """A backbone and a head, as a user's own model."""

    def __init__(self, held: str) -> None:
        super().__init__()
        self.config = tf.PretrainedConfig(vocab_size=64)
        self.backbone = Layered(held)
        self.lm_head = nn.Linear(16, 64)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embeddings.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.lm_head(self.backbone(input_ids, attention_mask)[0])
        return logits


def test_embeddings_that_hold_lists_of_modules_are_no_stack() -> None:
    model = markuplm()
    with softhooks.attach(model, PromptTuning(5, init="random")) as prompt:
        assert prompt.prompted_model.structure.entry.path == "markuplm"
        out = model(input_ids=IDS, labels=torch.tensor([0, 1]))
        out.loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prompt.encoder.parameters())
        before = out.logits.detach().clone()
        with torch.no_grad():
            next(prompt.encoder.parameters()).mul_(100)
            assert not torch.allclose(model(input_ids=IDS).logits, before, atol=1e-3)


@pytest.mark.parametrize("method", [PrefixTuning(3), LlamaAdapter(3)], ids=repr)
def test_an_encoder_with_lists_in_its_embeddings_takes_what_enters_attention(method: Any) -> None:
    with softhooks.attach(markuplm(), method) as prompt:
        assert len(prompt.prompted_model.structure.entry.sites) == 2


@pytest.mark.parametrize("held", ["list", "sequential", "attributes", "shared", "behind a mixing front"])
def test_layers_may_be_held_in_any_way(held: str) -> None:
    torch.manual_seed(0)
    model = Headed(held)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    with softhooks.attach(model, PromptTuning(3, init="random")) as prompt:
        assert prompt.prompted_model.structure.entry.path == "backbone"
        ids = torch.randint(0, 64, (2, 6))
        found = model(ids)
        embeddings = model.backbone.embeddings.words
        with softhooks.disabled(model):
            rows = prompt.encoder("embeddings").detach()

            def put_in(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
                return torch.cat([rows.expand(2, -1, -1), output[:, 3:]], 1)

            placeholder = torch.full((2, 3), prompt.prompted_model.placeholder_id)
            with embeddings.register_forward_hook(put_in):
                expected = model(torch.cat([placeholder, ids], 1))[:, 3:]
    torch.testing.assert_close(found, expected)


class Bag(nn.Module):
    """A model whose tokens do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.config = tf.PretrainedConfig(vocab_size=64)
        self.words = nn.Embedding(64, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16)])

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states: Tensor = self.layers[0](self.words(input_ids))
        return states


def test_a_model_whose_tokens_never_meet_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"^Bag has no module that looks up(.|\n)*depends on other tokens too(.|\n)*each state",
    ):
        softhooks.attach(Bag(), PromptTuning(3))


class TwoStacks(Headed):
    """Two backbones with the same ids; the states of the first one are discarded."""

    def __init__(self) -> None:
        super().__init__("list")
        self.unused = Layered("list")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.unused(input_ids)
        return super().forward(input_ids, attention_mask)


class Misled(TwoStacks):
    """The same, returning the wrong input embedding."""

    def get_input_embeddings(self) -> nn.Module:
        return self.unused.embeddings.words


def test_of_two_stacks_the_one_of_the_named_embedding_is_taken() -> None:
    with softhooks.attach(TwoStacks(), PromptTuning(3)) as prompt:
        assert prompt.prompted_model.structure.entry.path == "backbone"


def test_a_stack_that_feeds_no_output_is_refused() -> None:
    model = Misled()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        UnsupportedModelError,
        match=r"no gradient reaches any part of the prompt; a prompt must change the model's output",
    ):
        softhooks.attach(model, PromptTuning(3))
    assert list(model.state_dict()) == list(state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
