"""Models that compute attention inline: a prefix adds columns to it; compared with the model's own code with a wider
softmax.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import naive
import oracles
import pytest
import torch
import transformers as tf
import zoo
from torch import Tensor, nn
from untouched import remove_all, untouched

import softhooks
from softhooks import (
    PrefixTuning,
    PromptNotReachedError,
    PromptTuning,
    PTuningV2,
    UnsupportedMethodError,
    UnsupportedModeError,
)

P, T = 4, 9
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ROWS = [zoo.text(1, length, seed=length)[0] for length in (7, 4, 3)]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def sizeable(prompt: Any) -> Any:
    """Set values that matter to every output; N(0, 0.02) hardly would."""
    prompt.encoder.eval()
    with torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.normal_(std=0.7)
    return prompt


def pairs_of(prompt: Any, layers: int) -> list[tuple[Tensor, Tensor]]:
    """The prompt's keys and values by layer, [1, 4, P, 8] each, cut by hand."""
    parts = prompt.encoder("text").reshape(-1, layers, 2, 4, 8).permute(1, 2, 3, 0, 4)
    return [(key[None], value[None]) for key, value in parts]


def right_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    flipped = naive.left_padded([row.flip(0) for row in rows])
    return {key: value.flip(1) for key, value in flipped.items()}


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["sequence", "tokens", "qa", "masked"])
@pytest.mark.parametrize("arch", zoo.WRITTEN_OUT)
def test_a_prefix_is_columns_of_the_models_own_attention(arch: str, head: str) -> None:
    model, ids = zoo.build(arch, head), zoo.text(2, T)
    with softhooks.attach(model, PTuningV2(P)) as prompt:
        sizeable(prompt)
        assert prompt.injection == "written_out"
        assert "written_out" in repr(prompt)
        ours = zoo.main_output(model(ids))
        (gradient,) = torch.autograd.grad(ours.square().sum(), prompt.encoder.text)
        with softhooks.disabled(model), oracles.written_out(model, pairs_of(prompt, 2)):
            expected = zoo.main_output(model(ids))
        (right,) = torch.autograd.grad(expected.square().sum(), prompt.encoder.text)
    torch.testing.assert_close(ours, expected, **CLOSE)
    torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))
    assert bool((gradient.view(P, 2, 2, -1).abs().sum(-1) > 0).all()), "each layer's keys and values are trained"


@pytest.mark.parametrize("chosen", [0, 1])
@pytest.mark.parametrize("arch", zoo.WRITTEN_OUT)
def test_a_layer_without_a_prefix_runs_as_it_is(arch: str, chosen: int) -> None:
    model, ids = zoo.build(arch, "tokens"), zoo.text(2, T)
    with torch.no_grad(), softhooks.attach(model, PTuningV2(P, layers=[chosen])) as prompt:
        sizeable(prompt)
        (pair,) = pairs_of(prompt, 1)
        output = model(ids, output_hidden_states=True)
        with softhooks.disabled(model):
            bare = model(ids, output_hidden_states=True).hidden_states
            with oracles.written_out(model, [pair, None] if chosen == 0 else [None, pair]):
                expected = model(ids).logits
    torch.testing.assert_close(output.logits, expected, **CLOSE)
    for below, own in zip(bare[: chosen + 1], output.hidden_states[: chosen + 1], strict=True):
        assert torch.equal(own, below)


KINDS = [
    ("deberta-v2", {"pos_att_type": ["c2p"], "share_att_key": False}),
    ("deberta-v2", {"pos_att_type": ["p2c"], "share_att_key": False, "position_buckets": -1}),
    ("deberta-v2", {"pos_att_type": []}),
    ("deberta-v2", {"relative_attention": False, "position_biased_input": True}),
    ("deberta-v2", {"conv_kernel_size": 0, "norm_rel_ebd": "none"}),
    ("deberta", {"pos_att_type": ["p2c"], "talking_head": False}),
    ("deberta", {"relative_attention": False}),
    ("roformer", {"rotary_value": True}),
]


@pytest.mark.parametrize(("arch", "changes"), KINDS, ids=str)
def test_every_kind_of_relative_attention(arch: str, changes: dict[str, Any]) -> None:
    model, ids = zoo.build(arch, "tokens", **changes), zoo.text(2, T)
    with torch.no_grad(), softhooks.attach(model, PTuningV2(P)) as prompt:
        sizeable(prompt)
        logits = model(ids).logits
        with softhooks.disabled(model), oracles.written_out(model, pairs_of(prompt, 2)):
            torch.testing.assert_close(logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", [*zoo.WRITTEN_OUT, "esm"])
def test_padding_changes_nothing(arch: str, side: str) -> None:
    """RoFormer gives all rows of a batch the same positions, so that a prefix takes no rows that begin in different columns."""
    model = zoo.build(arch, "tokens")
    batch = naive.left_padded(ROWS) if side == "left" else right_padded(ROWS)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, zoo.pad_id(model))
    for method in (PTuningV2(P), PromptTuning(P)):
        with torch.no_grad(), softhooks.attach(model, method) as prompt:
            sizeable(prompt)
            if (arch, side, prompt.injection) == ("roformer", "left", "written_out"):
                with pytest.raises(UnsupportedModeError, match="the same positions"):
                    model(**batch)
                continue
            together = model(**batch).logits
            for place, row in enumerate(ROWS):
                own = together[place][batch["attention_mask"][place].bool()]
                torch.testing.assert_close(own, model(row[None]).logits[0], **CLOSE)


@pytest.mark.parametrize("arch", [*zoo.WRITTEN_OUT, "esm", "albert", "electra", "distilbert", "modernbert"])
@pytest.mark.parametrize("placement", ["front", "after_first", "end"])
def test_slots_are_the_concatenation_by_hand(arch: str, placement: Any) -> None:
    """A prompt in the sequence takes the model's own attention, where relative positions count the slots."""
    model, ids = zoo.build(arch, "tokens"), zoo.text(2, T)
    with torch.no_grad(), softhooks.attach(model, PromptTuning(P, placement=placement)) as prompt:
        assert prompt.injection == "slots"
        logits, rows = model(ids).logits, prompt.encoder("embeddings")
        with softhooks.disabled(model):
            expected = [oracles.prompted(model, row[None], rows, placement, causal=False) for row in ids]
    torch.testing.assert_close(logits, torch.cat(expected), **CLOSE)


@pytest.mark.parametrize("placement", ["front", "after_first", "end"])
def test_alberts_pooler_sees_the_first_token_and_not_the_prompt(placement: Any) -> None:
    """It is given one column, so the slots must be removed before."""
    model, ids = zoo.build("albert", "sequence"), zoo.text(2, T)
    with torch.no_grad(), softhooks.attach(model, PromptTuning(P, placement=placement)) as prompt:
        output, rows = model(ids, output_hidden_states=True), prompt.encoder("embeddings")
        assert all(states.shape[1] == T for states in output.hidden_states)
        embedded = model.get_input_embeddings()(ids)
        wide = torch.cat([oracles.concatenated(row[None], rows, placement) for row in embedded])
        with softhooks.disabled(model):
            states = model.albert(inputs_embeds=wide).last_hidden_state
        own = torch.cat([oracles.text_states(row[None], P, placement, causal=False) for row in states])
        expected = model.classifier(torch.tanh(model.albert.pooler(own[:, 0])))
    torch.testing.assert_close(output.logits, expected, **CLOSE)


def test_words_keys_are_what_the_projections_make_of_them() -> None:
    """Initialization from text in the first layer, by hand."""
    spoken = [21, 35, 11, 52]
    for arch in ("megatron-bert", "deberta-v2"):
        model = zoo.build(arch, "tokens")
        with torch.no_grad(), softhooks.attach(model, PrefixTuning(P, init_ids=spoken)) as prompt:
            (key, value), _ = pairs_of(prompt, 2)
            with softhooks.disabled(model):
                states = model(torch.tensor([spoken]), output_hidden_states=True).hidden_states[0]
            stack = prompt.prompted_model.structure.entry.module
            if arch == "megatron-bert":
                attention = stack.encoder.layer[0].attention
                made = (getattr(attention.self, name)(attention.ln(states)) for name in ("key", "value"))
            else:
                attention = stack.encoder.layer[0].attention.self
                made = (getattr(attention, name)(states) for name in ("key_proj", "value_proj"))
        for ours, right in zip((key, value), made, strict=True):
            torch.testing.assert_close(ours, right.view(1, P, 4, 8).transpose(1, 2), **CLOSE)


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", zoo.WRITTEN_OUT)
def test_attentions_are_those_of_the_text(arch: str) -> None:
    model, ids = zoo.build(arch, "tokens"), zoo.text(2, T)
    with torch.no_grad(), softhooks.attach(model, PTuningV2(P)) as prompt:
        sizeable(prompt)
        ours = model(ids, output_attentions=True).attentions
        with softhooks.disabled(model), oracles.written_out(model, pairs_of(prompt, 2)):
            expected = model(ids, output_attentions=True).attentions
    for own, right in zip(ours, expected, strict=True):
        assert own.shape == (2, 4, T, T)
        torch.testing.assert_close(own, right, **CLOSE)
        assert bool((own.sum(-1) < 1).all()), "the rest lies on the prompt"


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("arch", [a for a in zoo.WRITTEN_OUT if a != "mpnet"])
def test_gradient_checkpointing(arch: str, use_reentrant: bool) -> None:
    model, ids = naive.without_dropout(zoo.build(arch, "tokens")).train(), zoo.text(2, T)
    with softhooks.attach(model, PTuningV2(P)) as prompt:
        sizeable(prompt)
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model(ids, labels=ids % 3).loss.backward()
            gradients.append(prompt.encoder.text.grad.clone())
            model.zero_grad()
    assert float(gradients[0].abs().sum()) > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("arch", zoo.WRITTEN_OUT)
def test_autocast_and_half_precision(arch: str) -> None:
    ids = zoo.text(2, T)
    model = zoo.build(arch, "tokens")
    with softhooks.attach(model, PTuningV2(P)) as prompt:
        sizeable(prompt)
        exact = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(ids, labels=ids % 3)
        output.loss.backward()
        assert prompt.encoder.text.dtype == prompt.encoder.text.grad.dtype == torch.float32
        torch.testing.assert_close(output.logits.float(), exact, rtol=0.1, atol=0.1 * float(exact.detach().abs().max()))
    half = zoo.build(arch, "tokens").to(torch.bfloat16)
    with torch.no_grad(), softhooks.attach(half, PTuningV2(P)) as prompt:
        sizeable(prompt)
        assert prompt.injection == "written_out"
        logits = half(ids).logits
        assert logits.dtype == torch.bfloat16
        with softhooks.disabled(half):
            pairs = [(key.bfloat16(), value.bfloat16()) for key, value in pairs_of(prompt, 2)]
            with oracles.written_out(half, pairs):
                expected = half(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("arch", zoo.WRITTEN_OUT)
def test_attentions_own_dropout_falls_on_the_prefix_too(arch: str) -> None:
    """With a dropout of 1, neither the prompt nor the text has an effect."""
    model, ids = naive.without_dropout(zoo.build(arch, "tokens")).train(), zoo.text(2, T)
    with torch.no_grad(), softhooks.attach(model, PTuningV2(P)) as prompt:
        sizeable(prompt)
        prompted = model(ids).logits
        for module in model.modules():
            if type(module).__name__.endswith("SelfAttention"):
                module.dropout.p = 1.0
        dropped = model(ids).logits
        with softhooks.disabled(model):
            torch.testing.assert_close(dropped, model(ids).logits, **CLOSE)
    assert not torch.allclose(prompted, dropped, atol=1e-3)


@pytest.mark.parametrize("arch", zoo.WRITTEN_OUT)
def test_rows_with_prompts_of_different_lengths(arch: str) -> None:
    model, names = zoo.build(arch, "tokens"), ["long", None, "short"]
    for name, length in (("long", 5), ("short", 2)):
        sizeable(softhooks.attach(model, PTuningV2(length), name))
    with torch.no_grad():
        with softhooks.rows(model, names):
            together = model(**right_padded(ROWS)).logits
        for place, (name, row) in enumerate(zip(names, ROWS, strict=True)):
            with softhooks.disabled(model) if name is None else softhooks.rows(model, [name]):
                alone = model(row[None]).logits[0]
            torch.testing.assert_close(together[place, : len(row)], alone, **CLOSE)


@pytest.mark.parametrize("arch", ["megatron-bert", "rembert", "roformer"])
def test_as_decoders_they_generate_with_their_cache(arch: str) -> None:
    config = zoo.CONFIGS[arch]()
    config.is_decoder = True
    torch.manual_seed(0)
    model = naive.endless(tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    first, last = ROWS[0][None], ROWS[0][None].clone()
    last[:, -1] += 1
    if not torch.allclose(model(first).logits[:, 0], model(last).logits[:, 0], atol=1e-5):
        pytest.skip("this transformers runs it without a causal mask")
    batch = naive.left_padded(ROWS)
    for method in (PrefixTuning(P), PTuningV2(P, layers=[1])):
        with softhooks.attach(model, method) as prompt:
            sizeable(prompt)
            assert prompt.injection == "written_out"
            assert prompt.prompted_model.structure.entry.causal
            for row in ROWS:
                expected = row[None]
                for _ in range(5):
                    following = model(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                    expected = torch.cat([expected, following], 1)
                found = model.generate(row[None], max_new_tokens=5, do_sample=False)
                assert torch.equal(found, expected)
            if arch == "megatron-bert":  # it takes positions, so that padding does not move its text
                together = model.generate(**batch, max_new_tokens=5, do_sample=False)
                assert torch.equal(together[-1, -8:], expected[0])


# --- on the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", zoo.WRITTEN_OUT)
def test_removed_leaves_no_trace(arch: str) -> None:
    model, ids = zoo.build(arch, "tokens").requires_grad_(False), zoo.text(2, T)
    with torch.no_grad():
        before = model(ids).logits
        with untouched(model):
            with softhooks.attach(model, PTuningV2(P)):
                assert not torch.equal(model(ids).logits, before)
                with softhooks.disabled(model):
                    assert torch.equal(model(ids).logits, before)
            assert torch.equal(model(ids).logits, before)
    there = weakref.ref(model)
    prompt = softhooks.attach(model, PTuningV2(P))
    del model, prompt
    gc.collect()
    assert there() is None


def test_a_copy_has_a_prompt_of_its_own() -> None:
    model, ids = zoo.build("deberta-v2", "tokens"), zoo.text(2, T)
    with torch.no_grad(), softhooks.attach(model, PTuningV2(P)) as prompt:
        sizeable(prompt)
        expected = model(ids).logits
        other = copy.deepcopy(model)
        sizeable(prompt)
        assert torch.equal(other(ids).logits, expected)
        assert not torch.allclose(model(ids).logits, expected, atol=1e-3)


@pytest.mark.parametrize("arch", ["megatron-bert", "deberta-v2", "mpnet"])
def test_a_forward_past_the_hooks_is_refused(arch: str) -> None:
    model, ids = zoo.build(arch, "tokens"), zoo.text(2, T)
    with softhooks.attach(model, PTuningV2(P)) as prompt:
        stack = prompt.prompted_model.structure.entry.module
        with pytest.raises(
            PromptNotReachedError,
            match=r"^\w*SelfAttention ran outside a call to the model, so the prompt's hooks did not run",
        ):
            stack.forward(ids)
        with softhooks.disabled(model):
            stack.forward(ids)


def test_attention_to_other_states_is_refused() -> None:
    model, ids = zoo.build("deberta-v2", "tokens"), zoo.text(2, T)

    def attend_elsewhere(_module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "query_states": args[0]}

    with softhooks.attach(model, PTuningV2(P, layers=[0])):
        for number, attention in enumerate(layer.attention.self for layer in model.deberta.encoder.layer):
            handle = attention.register_forward_pre_hook(attend_elsewhere, with_kwargs=True)
            if number == 0:
                with pytest.raises(UnsupportedModeError, match="called with encoder or query states"):
                    model(ids)
            else:
                model(ids)  # a layer without a prefix runs its own code
            handle.remove()


def _written_otherwise(module: Any) -> None:
    """A module of a known family with other code than the recipe expects."""
    own = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own.forward(self, *args, **kwargs)
        return (2 * output[0], *output[1:])

    module.__class__ = type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})


def _replaced(module: Any) -> None:
    module.forward = module.forward


@pytest.mark.parametrize("change", [_written_otherwise, _replaced])
@pytest.mark.parametrize("arch", zoo.WRITTEN_OUT)
def test_attention_that_is_written_otherwise_is_refused_by_name(arch: str, change: Any) -> None:
    model = zoo.build(arch, "tokens")
    attention = [module for module in model.modules() if type(module).__name__.endswith("SelfAttention")][-1]
    change(attention)
    for method in (PTuningV2(P), PrefixTuning(P)):
        with untouched(model), pytest.raises(UnsupportedMethodError, match=rf"^{_stack_name(model)} has no attention"):
            softhooks.attach(model, method)
    with softhooks.attach(model, PromptTuning(P)) as prompt:
        assert prompt.injection == "slots"


def _stack_name(model: nn.Module) -> str:
    return type(model).__name__.removesuffix("ForTokenClassification") + "Model"


def test_a_shared_layer_that_runs_more_often_than_at_attach_is_refused() -> None:
    model, ids = zoo.build("albert", "tokens"), zoo.text(2, T)
    with softhooks.attach(model, PTuningV2(P)):
        model.config.num_hidden_layers = 4
        with pytest.raises(UnsupportedModeError, match=r"more than 3 times in one forward(.|\n)*more\s+times"):
            model(ids)
        model.config.num_hidden_layers = 3
        model(ids)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_shared_layer_takes_its_turns_again_when_it_is_checkpointed(use_reentrant: bool) -> None:
    """A backward runs the layers again, in another order than the forward did."""
    model, ids = naive.without_dropout(zoo.build("bert", "tokens")), zoo.text(2, T)
    layer = model.bert.encoder.layer[0]
    model.bert.encoder.layer = nn.ModuleList([layer, layer, layer])
    with softhooks.attach(model.train(), PTuningV2(P)) as prompt:
        sizeable(prompt)
        with torch.no_grad(), softhooks.disabled(model), oracles.patched_attention(pairs_of(prompt, 3)):
            expected = model(ids).logits
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            output = model(ids, labels=ids % 3)
            torch.testing.assert_close(output.logits, expected, **CLOSE)
            output.loss.backward()
            gradients.append(prompt.encoder.text.grad.clone())
            model.zero_grad()
    assert bool((gradients[0].view(P, 3, 2, -1).abs().sum(-1) > 0).all())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo looks at every input's
@pytest.mark.parametrize("arch", ["albert", "deberta-v2"])
def test_under_torch_compile(arch: str) -> None:
    model, ids = zoo.build(arch, "tokens"), zoo.text(2, T)
    with softhooks.attach(model, PTuningV2(P, layers=[0, -1])) as prompt:
        sizeable(prompt)
        expected = model(ids).logits
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            logits = compiled(ids).logits
            torch.testing.assert_close(logits, expected, **CLOSE)
        (ours,) = torch.autograd.grad(logits.square().sum(), prompt.encoder.text)
        (right,) = torch.autograd.grad(expected.square().sum(), prompt.encoder.text)
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))
    torch._dynamo.reset()
