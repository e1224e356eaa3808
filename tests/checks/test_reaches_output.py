"""The check at attach that the prompt changes the output and that all of its trainable parts get gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from table import TABLE, Entry, fitting
from torch import Tensor, nn

import softhooks
from softhooks import AttachError, LlamaAdapter, PrefixTuning, PromptTuning, PTuningV2, UnsupportedModelError
from softhooks.backbone.examine import examine
from softhooks.checks import reaches_output

METHODS = [PromptTuning(3), PrefixTuning(3), LlamaAdapter(3)]


def hrm() -> Any:
    torch.manual_seed(0)
    small = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    return tf.HrmTextForCausalLM(
        tf.HrmTextConfig(**small, num_key_value_heads=4, num_layers_per_stack=1, pad_token_id=0)
    ).eval()


CASES = [
    zoo.Case("llama", "causal"),
    zoo.Case("bert", "sequence"),
    zoo.Case("bart", "seq2seq"),
    zoo.Case("gptj", "causal"),
]


@pytest.mark.parametrize(("entry", "case"), fitting(TABLE, CASES), ids=str)
def test_the_proof_leaves_nothing_behind(entry: Entry, case: zoo.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build(case.arch, case.head)
    model.train()
    model.config.problem_type = None
    seen: list[Any] = []
    own = reaches_output.prove_reach

    def watched(prompt: softhooks.SoftPrompt) -> None:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        versions = {name: value._version for name, value in prompt.encoder.named_parameters()}
        state, encoder, computed = torch.get_rng_state(), prompt.encoder, prompt.computed
        own(prompt)
        assert prompt.encoder is encoder
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert versions == {name: value._version for name, value in prompt.encoder.named_parameters()}
        assert torch.equal(state, torch.get_rng_state())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(module.training for module in model.modules())
        assert model.config.problem_type is None
        assert not encoder._forward_hooks
        assert prompt.computed == computed
        seen.append(prompt)

    monkeypatch.setitem(softhooks.attach.__globals__, "prove_reach", watched)
    with entry.attach(model, 4):
        assert len(seen) == 1


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [entry for entry, _ in fitting(TABLE, [zoo.Case("llama", "causal")]) if "template" not in entry.name],
    ids=str,
)
def test_one_virtual_token_is_attached(entry: Entry) -> None:
    """The recurrent weights of an LSTM with one step have no gradient."""
    model = zoo.build("llama")
    with softhooks.attach(model, entry.make(1)) as prompt:
        assert not prompt.encoder.zero_gradient_parameters or "weight_hh" in "".join(
            prompt.encoder.zero_gradient_parameters
        )
    assert not entry.make(2).build(examine(model)).zero_gradient_parameters


@pytest.mark.parametrize("method", [PrefixTuning(3), PTuningV2(3), LlamaAdapter(3)], ids=lambda m: m.kind)
def test_keys_and_values_that_no_gradient_reaches_are_named(method: Any) -> None:
    """HRM runs its early iterations without gradients, so prefixes there would never be trained."""
    model = hrm()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AttachError, match=r"found: *no gradient reaches .*attention 0(.|\n)*PromptTuning"):
        softhooks.attach(model, method)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_the_refusal_names_instead_works() -> None:
    model, ids = hrm(), zoo.text(2, 6)
    with softhooks.attach(model, PromptTuning(3)) as prompt:
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prompt.encoder.parameters())


class _Refusing(torch.autograd.Function):
    """A kernel without a backward."""

    @staticmethod
    def forward(_ctx: Any, states: Tensor) -> Tensor:
        return states.clone()

    @staticmethod
    def backward(_ctx: Any, _gradient: Tensor) -> Tensor:
        raise NotImplementedError("this kernel has no backward")


def _without_backward(model: Any) -> Any:
    model.lm_head.register_forward_hook(lambda _module, _args, output: _Refusing.apply(output))
    return model


def _cut_off(model: Any) -> Any:
    model.model.norm.register_forward_hook(lambda _module, _args, output: output.detach())
    return model


def _blind(model: Any) -> Any:
    """The output does not depend on the stack."""
    model.lm_head.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))
    return model


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_backward, r"cause: *NotImplementedError: this kernel has no backward"),
        (_cut_off, "no gradient reaches any part of the prompt"),
        (_blind, "no gradient reaches any part of the prompt"),
    ],
)
def test_a_prompt_that_cannot_be_trained_is_refused(change: Callable[[Any], Any], message: str, method: Any) -> None:
    model = change(zoo.build("llama"))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=message):
        softhooks.attach(model, method)
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- the output, where nothing trains ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)
def test_a_prompt_loaded_to_be_used_needs_an_effect_and_no_gradient(tmp_path: Path, method: Any) -> None:
    with softhooks.attach(zoo.build("llama"), method) as prompt:
        with torch.no_grad():
            for parameter in prompt.encoder.parameters():
                parameter.zero_()  # it does nothing as it is; another one would
        prompt.save_pretrained(tmp_path)
    for change in (_without_backward, _cut_off):
        softhooks.load(change(zoo.build("llama")), tmp_path)
        with pytest.raises(UnsupportedModelError):
            softhooks.load(change(zoo.build("llama")), tmp_path, trainable=True)
    with pytest.raises(UnsupportedModelError, match="two different prompts give the same output"):
        softhooks.load(_blind(zoo.build("llama")), tmp_path)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)
def test_a_prompt_can_be_attached_and_loaded_where_no_gradients_are_made(
    tmp_path: Path, method: Any, mode: Callable[[], Any]
) -> None:
    model, ids = zoo.build("bert", "sequence"), zoo.text(2, 6)
    with mode():
        with softhooks.attach(model, method) as prompt:
            expected = model(ids).logits
            prompt.save_pretrained(tmp_path)
        softhooks.load(model, tmp_path)
        torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_proof_holds_in_low_precision_and_for_untrained_weights(
    case: zoo.Case, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    auto = getattr(tf, zoo.HEADS[case.head][0])
    model = auto.from_config(zoo.CONFIGS[case.arch](), attn_implementation="eager").to(dtype)
    for method in (PromptTuning(3), PrefixTuning(3)):
        with softhooks.attach(model, method) as prompt:
            prompt.save_pretrained(tmp_path / method.kind)
        softhooks.load(model, tmp_path / method.kind).remove()


def test_a_checkpointed_model_is_proven_too() -> None:
    model = zoo.build("llama").train()
    model.gradient_checkpointing_enable()
    for method in METHODS:
        softhooks.attach(model, method).remove()
    assert all(getattr(part, "gradient_checkpointing", True) for part in model.modules())


@pytest.mark.parametrize(("path", "message"), [("lm_head", "the output is not finite"), ("model.norm", "not finite")])
def test_a_model_that_gives_no_numbers_is_refused(path: str, message: str) -> None:
    model = zoo.build("llama")
    nn.init.constant_(model.get_submodule(path).weight, float("nan"))
    with pytest.raises(UnsupportedModelError, match=message):
        softhooks.attach(model, PromptTuning(3))


def test_what_was_kept_trainable_gets_no_gradient_from_the_proof() -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, PromptTuning(3), trainable="*norm*"):
        assert all(parameter.grad is None for parameter in model.parameters())
        second = softhooks.attach(model, PrefixTuning(3), "second")
        assert all(parameter.grad is None for parameter in model.parameters())
        second.remove()
