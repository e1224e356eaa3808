"""The rewritten forwards of models that compute attention inline: each is the model's own in every mode, or it is refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import real_words
import torch
import zoo
from inline_families import CLOSE, FAMILIES, P, T, build, inline_modules, loud, text
from torch import Tensor
from untouched import remove_all, untouched

import softhooks
from softhooks import LlamaAdapter, PTuningV2, UnsupportedMethodError, UnsupportedModeError
from softhooks.backbone.inline.rewritten_forward import argument_names

ALL = pytest.mark.parametrize("arch", FAMILIES)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


# --- a rewritten forward that differs is refused ----------------------------------------------------------------------


def _doubled(output: Any) -> Any:
    if isinstance(output, dict):
        first = next(iter(output))
        return {**output, first: 2 * output[first]}
    parts = list(output)
    parts[0] = 2 * parts[0]
    return type(output)(parts)


def _always(module: Any, call: dict[str, Any]) -> bool:
    return True


def _in_training(module: Any, call: dict[str, Any]) -> bool:
    return bool(module.training)


def _with_weights(module: Any, call: dict[str, Any]) -> bool:
    return bool(call.get("output_attentions"))


def _with_a_mask(module: Any, call: dict[str, Any]) -> bool:
    mask = call.get("attention_mask", call.get("mask"))
    if not isinstance(mask, Tensor):
        return False
    return bool(
        (mask[..., -1] == 0).any() if "mask" in call or mask.dtype == torch.bool else (mask[..., -1, -1] < -1).any()
    )


def _change(model: Any, when: Any) -> None:
    """Let the first inline attention module compute something else in some calls."""
    module = inline_modules(model)[0]
    own, names = type(module), argument_names(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own.forward(self, *args, **kwargs)
        return _doubled(output) if when(self, dict(zip(names, args, strict=False)) | kwargs) else output

    forward.__signature__ = inspect.signature(own.forward)  # type: ignore[attr-defined]
    module.__class__ = type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})


@pytest.mark.parametrize("when", [_always, _in_training, _with_a_mask])
@ALL
def test_a_module_that_computes_something_else_is_refused(arch: str, when: Any) -> None:
    model = build(arch)
    _change(model, when)
    for method in (PTuningV2(P), LlamaAdapter(P)):
        with untouched(model), pytest.raises(UnsupportedMethodError, match="attention interface"):
            softhooks.attach(model, method)


@pytest.mark.parametrize("arch", ["flaubert", "lilt", "luke", "mvp", "openai-gpt", "squeezebert", "tapas", "xlm"])
def test_a_module_that_computes_something_else_with_attention_weights_is_refused(arch: str) -> None:
    model = build(arch)
    _change(model, _with_weights)
    with pytest.raises(UnsupportedMethodError, match="attention interface"):
        softhooks.attach(model, PTuningV2(P))


def test_luke_is_refused_if_only_its_attention_to_entities_differs() -> None:
    model = build("luke")
    _change(model, lambda _, call: call.get("entity_hidden_states") is not None)
    with pytest.raises(UnsupportedMethodError, match="attention interface"):
        softhooks.attach(model, PTuningV2(P))


# --- what prompts compute ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "changes"),
    [*((arch, {}) for arch in FAMILIES if arch not in ("convbert", "layoutlmv3")),
     ("layoutlmv3", {"has_relative_attention_bias": False, "has_spatial_attention_bias": False})],
)  # fmt: skip
@pytest.mark.parametrize("padding", [{}, {"left": 3}, {"right": 3}, {"left": 2, "positions": True}], ids=str)
def test_a_prefix_of_words_is_these_words(arch: str, changes: dict[str, Any], padding: dict[str, Any]) -> None:
    if padding.get("positions") and FAMILIES[arch] == "seq2seq":
        pytest.skip("takes no position ids")
    model, ids = build(arch, **changes), zoo.text(1, T, seed=2)
    try:
        assert real_words.prefix_gap(model, ids, P, **padding) < 1e-4
    except UnsupportedModeError:
        assert padding.get("left")
        assert arch in ("bigbird_pegasus", "mvp")


def test_in_convbert_too_if_its_convolution_returns_nothing() -> None:
    """A convolution reads words in the text, but not those of a prefix."""
    model = build("convbert")
    with torch.no_grad():
        for module in inline_modules(model):
            for parameter in module.conv_out_layer.parameters():
                parameter.zero_()
    for left in (0, 3):
        assert real_words.prefix_gap(model, zoo.text(1, T), P, left=left) < 1e-4


@torch.no_grad()
def test_the_prefix_of_layoutlmv3_has_no_relative_bias() -> None:
    """Compared with the model's own code, whose softmax gets more columns."""
    model, call = build("layoutlmv3"), text("layoutlmv3")
    image = torch.randn(2, 3, model.config.input_size, model.config.input_size)
    with softhooks.attach(model, PTuningV2(P)) as prompt:
        loud(prompt)
        heads = model.config.num_attention_heads
        parts = prompt.encoder("text").reshape(P, 2, 2, heads, -1).permute(1, 2, 3, 0, 4)
        for given in (call, {**call, "pixel_values": image}):
            ours = model(**given).logits
            with softhooks.disabled(model):
                handles = [
                    handle
                    for module, (key, value) in zip(inline_modules(model), parts, strict=True)
                    for handle in _wider(module, key, value)
                ]
                expected = model(**given).logits
            for handle in handles:
                handle()
            torch.testing.assert_close(ours, expected, **CLOSE)


def _wider(module: Any, key: Tensor, value: Tensor) -> list[Any]:
    seen: dict[str, Tensor] = {}

    def before(_: Any, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        query = module.query(states).unflatten(-1, (len(key), -1)).transpose(1, 2)
        seen["scores"] = query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5

    def softmax(scores: Tensor) -> Tensor:
        seen["weights"] = torch.cat([seen["scores"], scores], -1).softmax(-1)
        return seen["weights"][..., P:]

    def after(_: Any, _args: Any, output: Any) -> Any:
        return output[0] + (seen["weights"][..., :P] @ value).transpose(1, 2).flatten(2), *output[1:]

    module.cogview_attention = softmax
    first = module.register_forward_pre_hook(before, with_kwargs=True)
    second = module.register_forward_hook(after)
    return [first.remove, second.remove, lambda: delattr(module, "cogview_attention")]


@ALL
def test_attention_weights_are_those_of_the_text(arch: str) -> None:
    model, call = build(arch), text(arch)
    with torch.no_grad(), softhooks.attach(model, PTuningV2(P)) as prompt:
        loud(prompt)
        output = model(**call, output_attentions=True)
        with softhooks.disabled(model):
            bare = model(**call, output_attentions=True)
    for name in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        own, of_bare = (getattr(one, name, None) for one in (output, bare))
        assert (own is None) == (of_bare is None)
        for ours, theirs in zip(own or (), of_bare or (), strict=True):
            assert ours.shape == theirs.shape
            if arch != "squeezebert":  # it returns scores
                assert bool((ours.sum(-1) < theirs.sum(-1)).all())


@ALL
def test_every_layer_is_trained_and_checkpointing_changes_nothing(arch: str) -> None:
    model, call = build(arch).train(), text(arch)
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "p", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    with softhooks.attach(model, PTuningV2(P)) as prompt:
        loud(prompt)
        gradients = []
        for checkpointing in (False, True):
            if checkpointing and not model.supports_gradient_checkpointing:
                break
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model(**call).logits.square().mean().backward()
            gradients.append({name: p.grad.clone() for name, p in prompt.encoder.named_parameters()})
            model.zero_grad()
    for name, gradient in gradients[0].items():
        assert bool((gradient.unflatten(-1, (2 * 2, -1)).abs().sum((0, 2)) > 0).all()), name
        torch.testing.assert_close(gradients[-1][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("arch", [arch for arch in FAMILIES if arch != "lilt"])
def test_a_closed_gate_changes_nothing(arch: str) -> None:
    model, call = build(arch), text(arch)
    with torch.no_grad():
        bare = model(**call).logits
        with softhooks.attach(model, LlamaAdapter(P)) as prompt:
            assert prompt.injection == "branch"
            assert torch.equal(model(**call).logits, bare)
            loud(prompt)
            assert not torch.allclose(model(**call).logits, bare, atol=1e-3)
        assert torch.equal(model(**call).logits, bare)


def test_lilts_gated_branch_is_refused() -> None:
    with pytest.raises(UnsupportedMethodError, match=r"each token needs layout inputs(.|\n)*depend only on"):
        softhooks.attach(build("lilt"), LlamaAdapter(P))
