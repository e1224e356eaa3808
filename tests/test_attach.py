"""The lifecycle of a prompt: attaching, freezing, injections, removal."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
import zoo
from table import TABLE, Entry, fitting
from torch import nn
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama import modeling_llama

import softhooks
from softhooks import PrefixTuning, PromptTuning, PTuningV2, errors
from softhooks.backbone import attention_interface
from softhooks.methods import METHODS


def _hooks(model: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return [(name, kind, list(getattr(m, kind))) for name, m in model.named_modules() for kind in kinds]


def _attributes(model: nn.Module) -> list[Any]:
    return [(name, sorted(module.__dict__), sorted(module._modules)) for name, module in model.named_modules()]


INJECTIONS = [
    ("llama", "causal", PromptTuning(3), "shared"), ("gptj", "causal", PromptTuning(3), "shared"),
    ("gemma3", "causal", PromptTuning(3), "shared"), ("llama", "sequence", PromptTuning(3), "shared"),
    ("llama", "causal", PromptTuning(3, placement="after_first"), "slots"), ("bert", "masked", PromptTuning(3), "slots"),
    ("t5", "seq2seq", PromptTuning(3), "slots"), ("llama", "causal", PrefixTuning(3), "attention"),
    ("bart", "seq2seq", PrefixTuning(3), "attention"), ("bert", "qa", PrefixTuning(3), "attention"),
    ("gptj", "causal", PrefixTuning(3), "cache"), ("bloom", "causal", PrefixTuning(3), "cache"),
    ("falcon", "causal", PrefixTuning(3), "cache"), ("bert", "sequence", PTuningV2(3), "attention"),
    ("gptj", "sequence", PTuningV2(3), "cache"), ("deberta-v2", "sequence", PTuningV2(3), "written_out"),
    ("megatron-bert", "masked", PrefixTuning(3), "written_out"), ("megatron-bert", "masked", PromptTuning(3), "slots"),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "head", "method", "injection"), INJECTIONS)
def test_the_injection_is_chosen_by_a_check_and_visible(arch: str, head: str, method: Any, injection: str) -> None:
    with softhooks.attach(zoo.build(arch, head), method) as prompt:
        assert prompt.injection == injection
        assert injection in repr(prompt)


def test_a_decoder_that_takes_no_positions_is_told_them_at_its_table() -> None:
    """Otherwise BART's prompt, computed once, would have the text's positions."""
    from transformers import BartForCausalLM

    config = zoo.CONFIGS["bart"]()
    config.is_decoder, config.is_encoder_decoder = True, False
    model = BartForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    ids = zoo.text(2, 6)
    with softhooks.attach(model, PromptTuning(3)) as prompt:
        assert prompt.injection == "shared"
        rows = prompt.encoder("embeddings")
        logits = model(ids).logits
        with softhooks.disabled(model):
            embedded = torch.cat([rows.expand(2, -1, -1), model.get_input_embeddings()(ids)], 1)
            expected = model(inputs_embeds=embedded).logits[:, 3:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


REMOVED = [
    zoo.Case("llama", "sequence"),
    zoo.Case("t5", "seq2seq"),
    zoo.Case("bert", "qa"),
    zoo.Case("gptj", "sequence"),
]


@pytest.mark.parametrize(("entry", "case"), fitting(TABLE, REMOVED), ids=str)
def test_remove_gives_the_model_back(entry: Entry, case: zoo.Case) -> None:
    model = zoo.build(case.arch, case.head)
    next(model.parameters()).requires_grad_(False)
    model.train()
    before = _hooks(model), _attributes(model), [p.requires_grad for p in model.parameters()], list(model.state_dict())
    training = [m.training for m in model.modules()]
    prompt = entry.attach(model, 3)
    assert hasattr(AttentionInterface._global_mapping["sdpa"], attention_interface.MARK)
    prompt.remove()
    prompt.remove()
    after = _hooks(model), _attributes(model), [p.requires_grad for p in model.parameters()], list(model.state_dict())
    assert before == after
    assert training == [m.training for m in model.modules()]
    if not attention_interface.users:  # another test's model may still be alive with its prompt
        assert not hasattr(AttentionInterface._global_mapping["sdpa"], attention_interface.MARK)
        assert not hasattr(modeling_llama.eager_attention_forward, attention_interface.MARK)


@pytest.mark.parametrize(("arch", "head"), [("llama", "sequence"), ("bert", "tokens"), ("bart", "sequence")])
def test_a_second_prompt_copies_the_models_heads_and_not_those_of_the_first(arch: str, head: str) -> None:
    model = zoo.build(arch, head)
    with (
        softhooks.attach(model, PromptTuning(3)) as first,
        softhooks.attach(model, PromptTuning(3), "second") as second,
    ):
        assert list(second.heads) == list(first.heads)
        assert second.num_parameters == first.num_parameters


def test_a_model_with_a_prompt_can_be_collected() -> None:
    model = zoo.build("llama")
    softhooks.attach(model, PromptTuning(3))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_attention_is_bare_again_when_the_last_model_with_a_prompt_has_been_collected() -> None:
    models = [zoo.build("llama"), zoo.build("llama")]
    for model in models:
        softhooks.attach(model, PrefixTuning(3))
    del model
    for left in (1, 0):
        del models[0]
        gc.collect()
        assert hasattr(AttentionInterface._global_mapping["sdpa"], attention_interface.MARK) == (left > 0)
        assert hasattr(modeling_llama.eager_attention_forward, attention_interface.MARK) == (left > 0)


def test_attach_does_not_disturb_the_random_state_beyond_its_own_draws() -> None:
    model = zoo.build("gpt2").train()
    torch.manual_seed(1)
    softhooks.attach(model, PromptTuning(3, init="tensor", init_tensor=torch.zeros(3, 32))).remove()
    first = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(first, torch.rand(1))


def test_an_error_while_attaching_undoes_everything() -> None:
    """A check that fails after the hooks are registered leaves nothing behind."""
    model = zoo.build("llama")
    before = _hooks(model), _attributes(model), [p.requires_grad for p in model.parameters()]
    original = softhooks.attach.__globals__["_check_attached"]

    def fail(*_args: Any) -> None:
        raise KeyboardInterrupt

    softhooks.attach.__globals__["_check_attached"] = fail
    try:
        with pytest.raises(KeyboardInterrupt):
            softhooks.attach(model, PromptTuning(3))
    finally:
        softhooks.attach.__globals__["_check_attached"] = original
    assert before == (_hooks(model), _attributes(model), [p.requires_grad for p in model.parameters()])


@pytest.mark.parametrize(("arch", "head", "name"), [
    ("llama", "sequence", "score"), ("bert", "sequence", "classifier"), ("bert", "qa", "qa_outputs"),
    ("bart", "sequence", "classification_head"), ("t5", "tokens", "classifier"), ("gpt2", "tokens", "classifier"),
])  # fmt: skip
def test_a_new_head_is_trained_as_a_copy_and_the_models_own_stays(arch: str, head: str, name: str) -> None:
    model, case = zoo.build(arch, head), zoo.Case(arch, head)
    ids = zoo.text(2, 6, end=True)
    own = {k: v.clone() for k, v in model.get_submodule(name).state_dict().items()}
    with softhooks.attach(model, PromptTuning(3)) as prompt:
        assert list(prompt.heads) == [name]
        before = zoo.main_output(model(**zoo.inputs(case, ids)))
        with torch.no_grad():
            for parameter in prompt.heads.parameters():
                parameter.add_(1.0)
        assert not torch.allclose(before, zoo.main_output(model(**zoo.inputs(case, ids))))
        assert all(torch.equal(own[k], v) for k, v in model.get_submodule(name).state_dict().items())
        prompt.verify_frozen()
    with softhooks.attach(model, PromptTuning(3), train_head=False) as prompt:
        assert list(prompt.heads) == []
        assert prompt.num_parameters == 3 * 32


@pytest.mark.parametrize("head", ["causal", "masked", "seq2seq"])
def test_a_language_model_head_is_not_a_new_head(head: str) -> None:
    arch = {"causal": "llama", "masked": "bert", "seq2seq": "t5"}[head]
    with softhooks.attach(zoo.build(arch, head), PromptTuning(3)) as prompt:
        assert prompt.num_parameters == 3 * 32


def test_named_parameters_may_stay_trainable() -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, PromptTuning(3), trainable=["*norm*"]) as prompt:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert "model.norm.weight" in trained
        assert {name for name, _ in prompt.named_parameters()} == trained
        with torch.no_grad():
            model.model.norm.weight.add_(1)
        prompt.verify_frozen()
    with pytest.raises(softhooks.AttachError, match="no_such"):
        softhooks.attach(model, PromptTuning(3), trainable="no_such*")


def test_on_a_model_that_carries_lora() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        zoo.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    ids = zoo.text(2, 6)
    flags = [p.requires_grad for p in model.parameters()]
    bare = model(ids).logits
    for method, injection in ((PromptTuning(3), "shared"), (PrefixTuning(3), "attention")):
        with softhooks.attach(model, method, trainable="*lora_*") as prompt:
            assert prompt.injection == injection
            model(ids, labels=ids).loss.backward()
            trained = {n.split(".")[-3] for n, p in model.named_parameters() if p.grad is not None and "lora" in n}
            assert trained == {"lora_A", "lora_B"}
            assert all(bool(p.grad.abs().sum() > 0) for p in prompt.encoder.parameters())
            prompt.verify_frozen()
        model.zero_grad()
        assert torch.equal(model(ids).logits, bare)
        assert [p.requires_grad for p in model.parameters()] == flags


def test_verify_frozen_names_what_moved() -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, PromptTuning(3)) as prompt:
        report = prompt.verify_frozen()
        expected = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) - 3 * 32 * 4
        assert report.bytes == expected
        assert report.gigabytes_per_second > 0
        assert "unchanged" in str(report)
        weight = model.model.layers[1].mlp.up_proj.weight
        with torch.no_grad():
            weight.view(-1)[5] = torch.nextafter(weight.view(-1)[5], torch.tensor(9.0))  # one bit
        with pytest.raises(softhooks.FrozenModifiedError, match=r"layers\.1\.mlp\.up_proj\.weight: values changed"):
            prompt.verify_frozen()


@pytest.mark.parametrize("change", ["buffer", "precision", "shape", "gone", "new"])
def test_verify_frozen_sees_every_kind_of_change(change: str) -> None:
    model = zoo.build("bert", "masked")
    with softhooks.attach(model, PromptTuning(3)) as prompt:
        if change == "buffer":
            model.bert.embeddings.position_ids[0, 3] += 1
        elif change == "precision":
            model.bert.half()
        elif change == "shape":
            model.resize_token_embeddings(zoo.VOCABULARY + 1)
        elif change == "gone":
            del model.bert.embeddings.token_type_embeddings
        else:
            model.register_buffer("stranger", torch.zeros(1))
        with pytest.raises(softhooks.FrozenModifiedError):
            prompt.verify_frozen()


@pytest.mark.parametrize("entry", TABLE, ids=str)
def test_in_bf16_the_prompt_stays_in_fp32(entry: Entry) -> None:
    head = "sequence" if entry.fits(zoo.Case("llama", "sequence")) else "causal"
    model, ids = zoo.build("llama", head), zoo.text(2, 6)
    with entry.attach(model, 3) as prompt:
        exact = [p.detach().clone() for p in prompt.parameters()]
        model.to(torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(exact, prompt.parameters(), strict=True))
        output = model(ids, **entry.extra(range(2)))
        assert output.logits.dtype == torch.bfloat16
        output.logits.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in prompt.parameters())


PLAIN = [e for e in TABLE if "random" not in e.name and "end" not in e.name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("entry", "case"), fitting(PLAIN, [zoo.Case("llama", "causal"), zoo.Case("gptj", "causal")]), ids=str
)
def test_under_autocast(entry: Entry, dtype: torch.dtype, case: zoo.Case) -> None:
    model, ids, extra = zoo.build(case.arch), zoo.text(2, 6), entry.extra(range(2))
    with entry.attach(model, 3) as prompt:
        exact = model.eval()(ids, **extra).logits
        model.train()  # an objective is not computed in evaluation; these models have no dropout of their own
        prompt.encoder.eval()
        with torch.autocast("cpu", dtype=dtype):
            loss = model(ids, labels=ids, **extra)
            loss.loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in prompt.parameters())
        torch.testing.assert_close(loss.logits.float(), exact, rtol=0.1, atol=0.2)


CHECKPOINTED = [zoo.Case(a, "causal") for a in ("llama", "gpt2", "gptj", "bloom")]
CHECKPOINTED += [zoo.Case("bert", "masked"), zoo.Case("t5", "seq2seq"), zoo.Case("bart", "seq2seq")]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("entry", "case"), fitting([e for e in PLAIN if "distilled" not in e.name], CHECKPOINTED), ids=str
)
def test_activation_checkpointing_changes_no_gradient(entry: Entry, case: zoo.Case, reentrant: bool) -> None:
    """Two forwards before one backward, so that a recomputation must find the prompt of its own forward."""
    model = zoo.build(case.arch, case.head)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    model.train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        losses = []
        for n in (6, 7):
            call = zoo.inputs(case, zoo.text(2, n, seed=n)) | entry.extra(range(2))
            if prompt.objective is None:
                losses.append(zoo.main_output(model(**call)).square().mean())
            else:
                losses.append(model(**call, labels=call["input_ids"]).loss)
        (losses[0] + 2 * losses[1]).backward()
        return [p.grad.clone() for p in prompt.parameters()]

    with entry.attach(model, 3) as prompt:
        prompt.encoder.eval()
        plain = gradients()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        functions = {m: m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()}
        checkpointed = gradients()
    assert all(m.__dict__.get("_gradient_checkpointing_func") == functions[m] for m in model.modules())
    assert all(m.__dict__.get("gradient_checkpointing") in (None, True) for m in model.modules())
    for ours, theirs in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_freeze_dropout_keeps_the_backbone_at_rest_and_its_mode_as_it_was() -> None:
    model, ids = zoo.build("gpt2"), zoo.text(2, 6)
    with softhooks.attach(model, PromptTuning(3), freeze_dropout=True):
        model.train()
        assert torch.equal(model(ids).logits, model(ids).logits)
        assert all(module.training for module in model.modules())
    with softhooks.attach(model, PromptTuning(3)):
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_a_deep_copy_is_a_model_with_a_prompt_of_its_own() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, PromptTuning(3)):
        twin = copy.deepcopy(model)
        expected = model(ids).logits
        assert torch.equal(twin(ids).logits, expected)
        with torch.no_grad():
            twin.soft_prompt["default"]["encoder"].embeddings.add_(1)
        assert torch.equal(model(ids).logits, expected)
        assert not torch.equal(twin(ids).logits, expected)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo looks at every input's
@pytest.mark.parametrize(
    "entry", [e for e in TABLE if e.name in ("prompt", "prompt-after-first", "prefix", "adapter")], ids=str
)
def test_under_torch_compile(entry: Entry) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with entry.attach(model, 3) as prompt:
        expected = model(ids, labels=ids)
        references = torch.autograd.grad(expected.loss, list(prompt.parameters()))
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(3):
            output = compiled(ids, labels=ids)
            gradients = torch.autograd.grad(output.loss, list(prompt.parameters()))
            torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
            for ours, reference in zip(gradients, references, strict=True):
                torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-6)
        assert softhooks.activate(compiled, "default") is prompt
    torch._dynamo.reset()


def test_attach_after_torch_compile_is_refused() -> None:
    model = zoo.build("llama")
    with pytest.raises(softhooks.AttachError, match=r"before `torch\.compile`"):
        softhooks.attach(torch.compile(model), PromptTuning(3))
    model.compile(backend="eager")
    with pytest.raises(softhooks.AttachError, match=r"before `torch\.compile`"):
        softhooks.attach(model, PromptTuning(3))


def test_the_public_names() -> None:
    """Every documented name, method and exception is exported, and every exported name exists."""
    designed = {
        "attach", "load", "tune", "activate", "rows", "disabled", "SoftPrompt", "SoftPromptCallback", "PromptTuning",
        "PrefixTuning", "PTuning", "PTuningV2", "MultitaskPromptTuning", "ContextAwarePromptTuning", "LlamaAdapter", "Layout",
        "SoftHooksError",
    }  # fmt: skip
    methods = {method.__name__ for method in METHODS.values()}
    exceptions = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert designed | methods | exceptions <= set(softhooks.__all__)
    assert set(softhooks.__all__) <= set(dir(softhooks))
    assert all(issubclass(getattr(softhooks, name), softhooks.SoftHooksError) for name in exceptions)


@pytest.mark.parametrize("arch", sorted(zoo.CONFIGS))
@pytest.mark.parametrize("method", [PromptTuning(3), PrefixTuning(3)], ids=["prompt", "prefix"])
def test_on_a_bare_backbone_also_as_a_tuple(arch: str, method: Any) -> None:
    """The model is its own stack here; a tuple has no names by which to find the encoder's state."""
    import transformers

    model, call = transformers.AutoModel.from_config(zoo.CONFIGS[arch]()).eval(), {"input_ids": zoo.text(2, 7)}
    if arch in zoo.SEQ2SEQ:
        call["decoder_input_ids"] = zoo.text(2, 4)
    bare = model(**call)
    with softhooks.attach(model, method) as prompt:
        expected = {PromptTuning: "shared", PrefixTuning: "attention"}[type(method)]
        if arch in (*zoo.CAUSAL, *zoo.CACHED):
            assert prompt.injection == ("cache" if arch in zoo.CACHED and expected == "attention" else expected)
        named, plain = model(**call), model(**call, return_dict=False)
    assert named.last_hidden_state.shape == bare.last_hidden_state.shape
    assert not torch.allclose(named.last_hidden_state, bare.last_hidden_state)
    shapes = [value.shape for value in bare.values() if isinstance(value, torch.Tensor)]
    assert [value.shape for value in plain if isinstance(value, torch.Tensor)] == shapes


@pytest.mark.parametrize("entry", [e for e in TABLE if e.name in ("prompt", "prompt-after-first", "prefix")], ids=str)
def test_a_routers_logits_and_loss_are_those_of_the_text(entry: Entry) -> None:
    model, ids = zoo.build("mixtral"), zoo.text(2, 7)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "output_router_logits": True}
    bare = model(**call)
    with entry.attach(model, 3):
        output = model(**call)
    assert [logits.shape for logits in output.router_logits] == [logits.shape for logits in bare.router_logits]
    assert bool(output.aux_loss.isfinite())


@pytest.mark.parametrize("entry", TABLE, ids=str)
def test_attentions_have_the_bare_models_shapes_also_in_a_tuple(entry: Entry) -> None:
    def shapes(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
        return [shapes(item) for item in value] if isinstance(value, (tuple, list)) else None

    for arch, head in (
        ("llama", "sequence"),
        ("bert", "tokens"),
        ("t5", "seq2seq"),
        ("bart", "seq2seq"),
        ("gptj", "sequence"),
    ):
        model, case = zoo.build(arch, head, attention="eager"), zoo.Case(arch, head)
        if not entry.fits(case):
            continue
        call = {
            **zoo.inputs(case, zoo.text(2, 7)),
            "output_attentions": True,
            "output_hidden_states": True,
            "use_cache": False,
        }
        if arch == "bert":
            del call["use_cache"]
        bare = [model(**call, return_dict=named) for named in (True, False)]
        with entry.attach(model, 3):
            ours = [model(**call, **entry.extra(range(2)), return_dict=named) for named in (True, False)]
        assert {k: shapes(v) for k, v in ours[0].items()} == {k: shapes(v) for k, v in bare[0].items()}, arch
        assert shapes(ours[1]) == shapes(bare[1]), arch


@pytest.mark.parametrize("method", [PromptTuning(3), PrefixTuning(3)], ids=["prompt", "prefix"])
def test_a_fused_optimizer_leaves_no_stale_keys_behind(method: Any) -> None:
    """A fused optimizer, the Trainer's default, does not change the parameters' versions."""
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, method) as prompt:
        optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.5, fused=True)
        with torch.no_grad():
            before = model(ids).logits
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        with torch.no_grad():
            after = model(ids).logits
        fresh = model(ids).logits  # under autograd nothing is kept
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, fresh.detach(), rtol=1e-5, atol=1e-6)
