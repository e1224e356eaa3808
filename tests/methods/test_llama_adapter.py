"""LLaMA-Adapter: the base model at step 0, the formula afterwards, in every layer that it enters and no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import adapters
import naive
import pytest
import tiny_models as models
import torch
import zoo
from untouched import remove_all, same_bits

import softhooks
from softhooks import LlamaAdapter, OptionError, PrefixTuning, UnsupportedMethodError

K = 3
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
BIASED = {"attention_bias": True}
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    *[(arch, "causal", {}) for arch in zoo.CAUSAL],
    ("llama", "causal", BIASED),
    ("qwen3", "causal", BIASED),
    *[(arch, "masked", {}) for arch in zoo.ENCODERS],
    *[(arch, "seq2seq", {}) for arch in zoo.SEQ2SEQ],
]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def build(arch: str, head: str, changes: dict[str, Any], **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A frozen model (whether weights want gradients decides torch's kernel) and a padded call; `real` picks its real columns."""
    model = zoo.build(arch, head, **changes, **options).requires_grad_(False)
    ids = zoo.text(3, 7)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return model, zoo.inputs(zoo.Case(arch, head), ids, mask)


def real(call: dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """The logits of real tokens."""
    return logits if "decoder_input_ids" in call else logits[call["attention_mask"].bool()]


# --- step 0 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("arch", "head", "changes"), MODELS)
def test_step_zero_is_the_base_bit_for_bit(
    arch: str, head: str, changes: dict[str, Any], dtype: torch.dtype, attention: str
) -> None:
    model, call = build(arch, head, changes, attention=attention)
    model = model.to(dtype)
    bare = model(**call).logits
    for method in (LlamaAdapter(K), LlamaAdapter(K, gate="raw", scale_and_bias=True, gate_per="layer")):
        with softhooks.attach(model, method):
            assert torch.equal(real(call, model(**call).logits), real(call, bare))


def test_a_signed_zero_of_attention_stays_one() -> None:
    """The sum of a negative and a positive zero is positive zero: equal, and the only bits that a closed gate may change."""
    zero = torch.tensor([0.0, -0.0, 1.5, -2.5, 1e-40])
    assert torch.equal(zero + 0.0, zero)
    assert same_bits(zero + -0.0, zero)


@pytest.mark.parametrize(
    "more", [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}], ids=str
)
@pytest.mark.parametrize(("arch", "changes"), [("llama", {}), ("llama", BIASED), ("gpt2", {}), ("gemma3", {})])
def test_step_zero_generates_what_the_base_does(arch: str, changes: dict[str, Any], more: dict[str, Any]) -> None:
    model = naive.endless(zoo.build(arch, **changes)).requires_grad_(False)
    batch = naive.left_padded([zoo.text(1, n, seed=n)[0] for n in (7, 4)])
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, **more}
    bare = model.generate(**batch, **options)
    with softhooks.attach(model, LlamaAdapter(K)):
        ours = model.generate(**batch, **options)
    assert torch.equal(ours.sequences, bare.sequences)
    assert all(torch.equal(one, other) for one, other in zip(ours.logits, bare.logits, strict=True))


@pytest.mark.parametrize(("arch", "head", "changes"), MODELS)
def test_at_a_closed_gate_rows_have_no_gradient_and_gates_do(arch: str, head: str, changes: dict[str, Any]) -> None:
    model, call = build(arch, head, changes)
    for gate in ("tanh", "raw"):
        with softhooks.attach(model, LlamaAdapter(K, gate=gate)) as prompt:
            model(**call).logits.square().sum().backward()
            for name, parameter in prompt.encoder.named_parameters():
                assert parameter.grad is not None
                assert bool((parameter.grad == 0).all()) is name.endswith("prompts"), name
                assert name.endswith("prompts") or bool((parameter.grad != 0).all()), name


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["tanh", "raw"])
@pytest.mark.parametrize(("arch", "head", "changes"), MODELS)
def test_an_open_gate_against_the_naive_formula(arch: str, head: str, changes: dict[str, Any], gate: str) -> None:
    model, call = build(arch, head, changes)
    bare = model(**call).logits
    with softhooks.attach(model, LlamaAdapter(K, gate=gate)) as prompt:
        adapters.stir(prompt)
        parameters = list(prompt.encoder.parameters())
        logits = real(call, model(**call).logits)
        expected = real(call, adapters.naive(model, prompt, **call))
        torch.testing.assert_close(logits, expected, **CLOSE)
        assert float((logits - real(call, bare)).detach().abs().max()) > 0.01
        for ours, theirs in zip(
            torch.autograd.grad(logits.square().sum(), parameters),
            torch.autograd.grad(expected.square().sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("layers", [1, 2])
def test_only_the_top_layers_are_touched(layers: int) -> None:
    model, call = build("gemma3", "causal", {})
    bare = model(**call, output_hidden_states=True).hidden_states
    with softhooks.attach(model, LlamaAdapter(K, num_layers=layers)) as prompt:
        adapters.stir(prompt)
        output = model(**call, output_hidden_states=True)
        torch.testing.assert_close(output.logits, adapters.naive(model, prompt, **call), **CLOSE)
        same = [torch.equal(ours, theirs) for ours, theirs in zip(output.hidden_states, bare, strict=True)]
    assert same == [True] * (4 - layers) + [False] * layers
    assert sum(p.numel() for p in prompt.encoder.parameters()) == layers * (K * 32 + 4)


def test_one_gate_a_layer_is_that_gate_in_every_head() -> None:
    model, call = build("llama", "causal", {})
    with softhooks.attach(model, LlamaAdapter(K, gate="raw", gate_per="layer")) as prompt:
        adapters.stir(prompt)
        single = model(**call).logits
        tables = dict(prompt.encoder.named_parameters())
    with softhooks.attach(model, LlamaAdapter(K, gate="raw")) as prompt, torch.no_grad():
        prompt.encoder.text_prompts.copy_(tables["text_prompts"])
        prompt.encoder.text_gates.copy_(tables["text_gates"].repeat_interleave(4, dim=1))
        assert torch.equal(model(**call).logits, single)


def test_the_paper_writes_the_gate_raw_and_its_code_takes_the_tanh() -> None:
    """A saved prompt records which of them it was trained with."""
    model, call = build("llama", "causal", {})
    found = {}
    for gate in ("tanh", "raw"):
        with softhooks.attach(model, LlamaAdapter(K, gate=gate)) as prompt, torch.no_grad():
            assert prompt.conventions["gate"] == gate
            prompt.encoder.text_prompts.fill_(0.5)
            prompt.encoder.text_gates.fill_(0.8 if gate == "tanh" else float(torch.tensor(0.8).tanh()))
            found[gate] = model(**call).logits
    torch.testing.assert_close(found["tanh"], found["raw"], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_cap_on_the_models_scores_is_on_the_branchs_too() -> None:
    import transformers as tf

    config = tf.Gemma2Config(
        **zoo.SMALL, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=0.5
    )
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    found = {}
    with softhooks.attach(model, LlamaAdapter(K)) as prompt:
        adapters.stir(prompt)
        prompt.encoder.text_prompts.mul_(20)
        seen: list[torch.Tensor] = []
        module = prompt.prompted_model.structure.entry.sites[0].module
        handle = module.o_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
        model(zoo.text(1, 5))
        seen = seen[1:]  # the rows come first
        with softhooks.disabled(model):
            model(zoo.text(1, 5))
        handle.remove()
        rows = prompt.encoder.text_prompts[:K]
        key, value = (adapters.project(module, rows)[i].repeat_interleave(2, 0) for i in (0, 1))
        query: list[torch.Tensor] = []
        model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda m, args, kwargs: query.append((m.q_proj(kwargs["hidden_states"]), *kwargs["position_embeddings"])),
            with_kwargs=True,
        )
        with softhooks.disabled(model):
            model(zoo.text(1, 5))
        states, cosine, sine = query[0]
        q = states.view(1, 5, 4, 8).transpose(1, 2)
        q = q * cosine[:, None] + torch.cat([-q[..., 4:], q[..., :4]], -1) * sine[:, None]
        for cap in (0.5, None):
            scores = q @ key.mT * 8**-0.5
            scores = scores if cap is None else cap * (scores / cap).tanh()
            added = prompt.encoder.text_gates[0, :4].tanh()[:, None, None] * (scores.softmax(-1) @ value)
            found[cap] = added.transpose(1, 2).reshape(1, 5, 32)
    torch.testing.assert_close(seen[0] - seen[1], found[0.5], **CLOSE)
    assert not torch.allclose(seen[0] - seen[1], found[None], atol=1e-3)


def test_nothing_of_the_branch_enters_the_cache() -> None:
    model, call = build("llama", "causal", {})
    bare = model(**call, use_cache=True).past_key_values
    with softhooks.attach(model, LlamaAdapter(K)) as prompt:
        adapters.stir(prompt)
        cache = model(**call, use_cache=True).past_key_values
        assert cache.get_seq_length() == bare.get_seq_length() == 7
        assert torch.equal(cache.layers[0].keys, bare.layers[0].keys)


def test_rows_skip_the_norm_of_the_layers_input() -> None:
    """Doubling the rows doubles the keys, unless a norm follows."""
    model, call = build("llama", "causal", {})
    with softhooks.attach(model, LlamaAdapter(K)) as prompt, torch.no_grad():
        adapters.stir(prompt)
        once = model(**call).logits
        prompt.encoder.text_prompts.mul_(2)
        assert not torch.allclose(model(**call).logits, once, atol=1e-3)


@torch.no_grad()
def test_keys_and_values_are_computed_once_where_they_are_kept() -> None:
    model = naive.endless(zoo.build("llama"))
    with softhooks.attach(model, LlamaAdapter(K)) as prompt, softhooks.kept(model):
        model.generate(zoo.text(2, 5), max_new_tokens=6, do_sample=False)
        before = prompt.computed
        model.generate(zoo.text(3, 4), max_new_tokens=6, do_sample=False)
        assert prompt.computed == before
        prompt.encoder.text_gates.fill_(1.0)
        model(zoo.text(1, 4))
        assert prompt.computed == before + 1


def test_the_encoder_runs_once_whatever_the_batch() -> None:
    """Rows go through the projections without a batch dimension."""
    model = zoo.build("llama")
    with softhooks.attach(model, LlamaAdapter(K)):
        seen: list[torch.Size] = []
        handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(
            lambda _m, args, _o: seen.append(args[0].shape)
        )
        model(zoo.text(6, 5))
        handle.remove()
    assert seen == [torch.Size([K, 1, 32]), torch.Size([6, 5, 32])]


# --- what cannot be entered -------------------------------------------------------------------------------------------


def test_models_without_attention_are_refused_by_name() -> None:
    model = models.build("mamba2", "causal")
    with pytest.raises(
        UnsupportedMethodError, match=r"\w+ does not use transformers' attention interface; a gated branch"
    ):
        softhooks.attach(model, LlamaAdapter(K))


def test_layers_that_share_keys_are_refused_by_name() -> None:
    import transformers as tf

    config = tf.Gemma3nTextConfig(
        **{**zoo.SMALL, "num_hidden_layers": 4}, num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=zoo.VOCABULARY,
        hidden_size_per_layer_input=8, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    shared = tf.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(
        UnsupportedMethodError, match=r"do not match two hidden states(.|\n)*Gemma3nTextAttention, number 2"
    ):
        softhooks.attach(shared, LlamaAdapter(K))


@pytest.mark.parametrize("options", [{"num_layers": 3}, {"early_fusion": 2}, {"early_fusion": 1, "num_layers": 2}])
def test_more_layers_than_there_are(options: dict[str, Any]) -> None:
    with pytest.raises(
        UnsupportedMethodError, match=r"layers with attention are too few(.|\n)*layers with attention: 2"
    ):
        softhooks.attach(zoo.build("llama"), LlamaAdapter(K, **options))


@pytest.mark.parametrize("options", [
    {"gate": "sigmoid"}, {"gate_per": "token"}, {"num_layers": 0}, {"num_layers": True}, {"num_layers": 1.5}, {"context_size": 0},
    {"early_fusion": -1}, {"early_fusion": None}, {"init_std": -1.0}, {"init_std": float("nan")},
])  # fmt: skip
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        LlamaAdapter(K, **options)


def test_the_other_ways_in_are_refused() -> None:
    with pytest.raises(UnsupportedMethodError, match="possible: 'branch'"):
        softhooks.attach(zoo.build("llama"), LlamaAdapter(K), injection="attention")
    with pytest.raises(UnsupportedMethodError, match="possible: 'attention'"):
        softhooks.attach(zoo.build("llama"), PrefixTuning(K), injection="branch")
