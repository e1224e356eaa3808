"""Initialization of prefixes: keys and values of words, zero, random; their outputs and gradients."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import tokens
import torch
import zoo
from torch import Tensor

import softhooks
from softhooks import PrefixTuning, PromptTuning

CLOSE = {"rtol": 1e-4, "atol": 5e-5}
DECODERS = [*zoo.CAUSAL, *zoo.CACHED]
SPOKEN = [21, 35, 11, 52, 44, 60, 13, 77, 31, 5]  # longer than every sliding window here
FROM_IDS = PrefixTuning(10, init_ids=SPOKEN)
STARTS = {
    "words": FROM_IDS,
    "zero": PrefixTuning(3, init="zero"),
    "mlp": PrefixTuning(3, init="random", projection=True),
}
OTHERS = {"shared": PromptTuning(3), "prefix": PrefixTuning(3), "slots": PromptTuning(3, placement="after_first")}


def tables(model: Any, method: PrefixTuning) -> dict[str, Tensor]:
    """The keys and values that a method starts from, by group."""
    with softhooks.attach(model, method) as prompt, torch.no_grad():
        prompt.encoder.eval()
        return {group: prompt.encoder(group).clone() for group in prompt.encoder.groups}


def spoken_logits(bare: Any, ids: Tensor) -> Tensor:
    spoken = torch.cat([torch.tensor(SPOKEN).expand(len(ids), -1), ids], dim=1)
    return bare(spoken).logits[:, len(SPOKEN) :]


# --- real words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("arch", DECODERS)
def test_a_prefix_of_words_is_the_text_before(arch: str, projection: bool) -> None:
    """Also with the MLP, fitted to rounding; also where the text is longer than a sliding window."""
    model, bare, ids = zoo.build(arch), zoo.build(arch), zoo.text(2, 7)
    method = PrefixTuning(10, init_ids=SPOKEN, projection=projection, hidden_size=16)
    texts = [ids[0], ids[1, :4]]
    loose = {"rtol": 1e-3, "atol": 1e-3} if projection else CLOSE
    with softhooks.attach(model, method):
        torch.testing.assert_close(model(ids).logits, spoken_logits(bare, ids), **loose)
        found = model.generate(**naive.left_padded(texts), max_new_tokens=4, do_sample=False, eos_token_id=None)
    for row, text in zip(found, texts, strict=True):
        right = naive.greedy(naive.bare_step(bare), torch.cat([torch.tensor(SPOKEN), text]), 4)
        assert torch.equal(row[-len(text) - 4 :], right[len(SPOKEN) :])


def test_an_mlp_too_narrow_for_the_prefix_comes_as_near_as_it_can() -> None:
    torch.manual_seed(2)
    model = zoo.build("llama")
    exact = tables(model, FROM_IDS)["text"]
    with softhooks.attach(model, PrefixTuning(10, init_ids=SPOKEN, projection=True, hidden_size=4)) as prompt:
        encoder = prompt.encoder
        hidden = torch.tanh(encoder.down["text"](encoder.rows["text"])).detach()
        rest = (encoder("text") - exact).detach()
    assert rest.norm() < exact.norm()
    assert (hidden.T @ rest).abs().max() < 1e-3 * hidden.norm() * exact.norm()  # what is left is out of its reach


def test_text_is_repeated_up_to_the_prefix_and_cut() -> None:
    model = zoo.build("llama")
    long = tables(model, PrefixTuning(5, init_text=tokens.words([9, 8]), tokenizer=tokens.tokenizer()))
    by_ids = tables(model, PrefixTuning(5, init_ids=[9, 8, 9, 8, 9]))
    assert torch.equal(long["text"], by_ids["text"])
    cut = tables(model, PrefixTuning(2, init_text=tokens.words([9, 8, 7]), tokenizer=tokens.tokenizer()))
    torch.testing.assert_close(cut["text"], by_ids["text"][:2])


def test_without_a_text_words_are_drawn() -> None:
    model = zoo.build("llama")
    drawn = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        drawn.append(tables(model, PrefixTuning(6))["text"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    torch.manual_seed(4)
    ids = torch.randperm(zoo.VOCABULARY)[:6].tolist()
    assert torch.equal(drawn[0], tables(model, PrefixTuning(6, init_ids=ids))["text"])


@pytest.mark.parametrize("arch", ["llama", "gptj"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_words_are_read_by_the_bare_model(arch: str, other: Any) -> None:
    """Without the active prompt and without dropout; modes are restored."""
    expected = tables(zoo.build(arch), FROM_IDS)
    model = zoo.build(arch).train()
    softhooks.attach(model, other, "other")
    with softhooks.attach(model, FROM_IDS, "words") as prompt:
        assert torch.equal(prompt.encoder("text"), expected["text"])
    assert all(module.training for module in model.modules())


def test_words_are_read_in_the_models_precision() -> None:
    model = zoo.build("llama")
    exact = tables(model, FROM_IDS)["text"]
    half = tables(model.to(torch.bfloat16), FROM_IDS)["text"]
    assert half.dtype == torch.float32
    assert torch.equal(half, half.to(torch.bfloat16).float())
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.1)


def projections(model: Any, arch: str) -> dict[str, list[tuple[Any, Any]]]:
    """The linear layers that make keys and values, for each group of an encoder-decoder."""
    encoder, decoder = model.get_encoder(), model.get_decoder()
    if arch == "t5":
        pick = lambda block, i, name: (getattr(block.layer[i], name).k, getattr(block.layer[i], name).v)  # noqa: E731
        return {
            "encoder": [pick(block, 0, "SelfAttention") for block in encoder.block],
            "decoder": [pick(block, 0, "SelfAttention") for block in decoder.block],
            "cross": [pick(block, 1, "EncDecAttention") for block in decoder.block],
        }
    pair = lambda attention: (attention.k_proj, attention.v_proj)  # noqa: E731
    return {
        "encoder": [pair(layer.self_attn) for layer in encoder.layers],
        "decoder": [pair(layer.self_attn) for layer in decoder.layers],
        "cross": [pair(layer.encoder_attn) for layer in decoder.layers],
    }


@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_an_encoder_decoder_starts_from_three_readings_of_the_words(arch: str) -> None:
    model, seen = zoo.build(arch, "seq2seq"), {}

    def note(module: Any, _args: Any, output: Tensor) -> None:
        seen[module] = output[0].detach()

    groups = projections(model, arch)
    handles = [part.register_forward_hook(note) for pairs in groups.values() for pair in pairs for part in pair]
    words = torch.tensor(SPOKEN)[None]
    model(input_ids=words, decoder_input_ids=words)
    for handle in handles:
        handle.remove()
    found = tables(model, FROM_IDS)
    assert set(found) == {"encoder", "decoder", "cross"}
    for group, pairs in groups.items():
        expected = torch.cat([seen[part] for pair in pairs for part in pair], dim=-1)
        torch.testing.assert_close(found[group], expected, **CLOSE)


@pytest.mark.parametrize("method", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_the_encoders_states_change(arch: str, method: Any) -> None:
    model = zoo.build(arch, "seq2seq")
    call = {"input_ids": zoo.text(2, 7), "decoder_input_ids": zoo.text(2, 3)}
    bare = model(**call)
    with softhooks.attach(model, method):
        ours = model(**call)
        alone = model.get_encoder()(call["input_ids"]).last_hidden_state
    assert ours.encoder_last_hidden_state.shape == bare.encoder_last_hidden_state.shape
    assert (ours.encoder_last_hidden_state - bare.encoder_last_hidden_state).abs().amax((1, 2)).min() > 1e-2
    torch.testing.assert_close(alone, ours.encoder_last_hidden_state)


# --- zero and random --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(
    ("arch", "head"), [("llama", "causal"), ("gptj", "causal"), ("bert", "masked"), ("t5", "seq2seq")]
)
def test_zero_and_random(arch: str, head: str, projection: bool) -> None:
    model = zoo.build(arch, head)
    more = {"projection": projection, "hidden_size": 64}
    for table in tables(model, PrefixTuning(40, init="zero", **more)).values():
        assert table.abs().max() < 1e-5
        assert projection or table.abs().max() == 0
    for table in tables(model, PrefixTuning(40, init="random", **more)).values():
        assert abs(float(table.std()) - 0.02) < 0.001
        assert abs(float(table.mean())) < 0.001


# --- shapes, gradients, dropout ---------------------------------------------------------------------------------------

SIZES = {  # layers, key-value heads, head size
    "llama": (2, 2, 8), "gpt2": (2, 4, 8), "qwen3": (2, 2, 8), "gemma3": (3, 2, 8), "mistral": (2, 2, 8), "mixtral": (2, 2, 8),
    "opt": (2, 4, 8), "gptj": (2, 4, 8), "bloom": (2, 4, 8), "falcon": (2, 4, 8),
}  # fmt: skip


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("arch", DECODERS)
def test_shapes_follow_the_key_value_heads_and_gradients_reach_every_layer(arch: str, projection: bool) -> None:
    """Falcon widens its two key-value heads to four before anything can enter."""
    model, ids = zoo.build(arch), zoo.text(2, 7)
    layers, heads, size = SIZES[arch]
    with softhooks.attach(model, PrefixTuning(5, projection=projection, hidden_size=16)) as prompt:
        found = {}
        prompt.encoder.register_forward_hook(
            lambda _m, args, output: output.retain_grad() or found.update({args[0]: output})
        )
        model(ids, labels=ids).loss.backward()
        assert {group: tuple(table.shape) for group, table in found.items()} == {"text": (5, layers * 2 * heads * size)}
        each = found["text"].grad.view(5, layers, 2, heads, size).abs().sum((0, 3, 4))
        assert (each > 0).all(), "of each layer, keys and values"
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in prompt.encoder.parameters())


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_dropout_acts_in_training_only(projection: bool) -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 7)
    method = PrefixTuning(10, init_ids=SPOKEN, projection=projection, hidden_size=16, dropout=0.4)
    with softhooks.attach(model, method) as prompt, torch.no_grad():
        whole = prompt.encoder("text").clone()
        torch.testing.assert_close(model(ids).logits, spoken_logits(zoo.build("llama"), ids), rtol=1e-3, atol=1e-3)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        dropped = prompt.encoder("text")
        kept = dropped != 0
        assert 0.5 < float(kept.float().mean()) < 0.7
        torch.testing.assert_close(dropped[kept], whole[kept] / 0.6)
        assert torch.equal(prompt.encoder.folded()["text"], whole)
        assert prompt.encoder.training
        model.eval()
        assert torch.equal(prompt.encoder("text"), whole)
        assert torch.equal(model(ids).logits, model(ids).logits)
