"""Calls with more than text: a prompt that is normally computed once sees the other inputs too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cross
import pytest
import torch
import transformers as tf
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import softhooks
from softhooks import PromptTuning
from softhooks.errors import UnsupportedModeError

LENGTH = 4


def _text(rows: int, columns: int) -> Tensor:
    return torch.randint(5, cross.VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(3))


def _encoded(rows: int, columns: int = 7) -> Tensor:
    return torch.randn(rows, columns, cross.WIDTH, generator=torch.Generator().manual_seed(4))


def _attach(name: str, **options: Any) -> tuple[Any, Any, softhooks.SoftPrompt]:
    model = cross.make(name)
    return cross.make(name), model, softhooks.attach(model, PromptTuning(LENGTH), **options)


@pytest.mark.parametrize("name", cross.DECODERS)
@torch.no_grad()
def test_virtual_tokens_of_a_decoder_see_the_encoders_states(name: str) -> None:
    bare, model, prompt = _attach(name)
    ids, encoded, rows = _text(2, 6), _encoded(2), prompt.embeddings()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    by_column = name in ("pegasus", "blenderbot", "mllama")  # padding on the left moves their text, bare as well
    for padded in (mask.flip(-1),) if by_column else (mask, mask.flip(-1)):
        got = model(input_ids=ids, attention_mask=padded, **cross.states_of(name, encoded)).logits
        for row in range(2):
            real = padded[row].bool()
            own = cross.states_of(name, encoded[row : row + 1])
            want = cross.by_hand(bare, ids[row : row + 1, real], rows, **own)
            torch.testing.assert_close(got[row : row + 1, real], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", cross.DECODERS)
@torch.no_grad()
def test_decoding_with_a_cache_goes_on_as_it_began(name: str) -> None:
    bare, model, prompt = _attach(name)
    ids, encoded, rows = _text(2, 6), _encoded(2), prompt.embeddings()
    call = cross.states_of(name, encoded)
    want = torch.cat(
        [
            cross.by_hand(bare, ids[row : row + 1], rows, **cross.states_of(name, encoded[row : row + 1]))
            for row in range(2)
        ]
    )
    got = [model(input_ids=ids[:, :4], use_cache=True, **call)]
    later = {} if name == "mllama" else call  # its cache holds what the images gave
    for column in (4, 5):
        mask = torch.ones(2, column + 1, dtype=torch.long)
        cache = got[-1].past_key_values
        step = model(
            input_ids=ids[:, column : column + 1], attention_mask=mask, past_key_values=cache, use_cache=True, **later
        )
        got.append(step)
    torch.testing.assert_close(torch.cat([out.logits for out in got], 1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "bert", "trocr", "bart", "xglm"])
@torch.no_grad()
def test_a_decoder_generates_with_a_prompt_and_an_encoders_states(name: str) -> None:
    bare, model, prompt = _attach(name)
    ids, encoded = _text(2, 5), _encoded(2)
    model.generation_config.forced_eos_token_id = None
    cache = tf.EncoderDecoderCache(tf.DynamicCache(), tf.DynamicCache())  # as a model around the decoder gives it
    got = model.generate(
        ids, encoder_hidden_states=encoded, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    want = ids
    for _ in range(4):
        logits = [
            cross.by_hand(bare, want[row : row + 1], prompt.embeddings(), encoder_hidden_states=encoded[row : row + 1])
            for row in range(2)
        ]
        want = torch.cat([want, torch.cat(logits)[:, -1].argmax(-1)[:, None]], 1)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("name", ["gpt2", "bert", "xglm", "mllama"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_the_loss_and_its_gradient_are_those_of_the_rows_written_by_hand(name: str, checkpointing: bool | None) -> None:
    bare, model, prompt = _attach(name)
    ids, encoded = _text(1, 6), _encoded(1)
    call = cross.states_of(name, encoded)
    for module in (bare, model):
        module.requires_grad_(module is not bare)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path.startswith("soft_prompt"))
    rows = prompt.embeddings().detach().clone().requires_grad_()
    logits = cross.by_hand(bare, ids, rows, **call)
    want = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    want.backward()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.train()
    cross.without_dropout(model)
    loss = model(input_ids=ids, labels=ids, **call).loss
    loss.backward()
    (parameter,) = prompt.parameters()
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parameter.grad, rows.grad, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_token_types_that_a_call_brings_reach_the_prompts_rows_as_the_first_type() -> None:
    bare, model, prompt = _attach("gpt2")
    ids = _text(1, 6)
    types = torch.tensor([[5, 5, 5, 7, 7, 7]])
    wide = torch.cat([torch.zeros(1, LENGTH, dtype=torch.long), types], 1)
    want = cross.by_hand(bare, ids, prompt.embeddings(), token_type_ids=wide)
    torch.testing.assert_close(model(input_ids=ids, token_type_ids=types).logits, want, rtol=1e-4, atol=1e-4)


def test_a_language_for_each_row_reaches_the_prompt() -> None:
    bare, model, prompt = _attach("xmod")
    for languages in ([0, 1], [1, 1]):
        ids, lang_ids = _text(2, 6), torch.tensor(languages)
        with torch.no_grad():
            got = model(input_ids=ids, lang_ids=lang_ids).logits
            for row in range(2):
                want = cross.by_hand(bare, ids[row : row + 1], prompt.embeddings(), lang_ids=lang_ids[row : row + 1])
                torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def attached_gpt2() -> Iterator[tuple[Any, Any, softhooks.SoftPrompt]]:
    bare, model, prompt = _attach("gpt2")
    yield bare, model, prompt
    prompt.remove()


@settings(max_examples=25, deadline=None)
@given(
    states=st.booleans(),
    encoder_mask=st.booleans(),
    types=st.booleans(),
    left=st.integers(0, 2),
    tuples=st.booleans(),
    embedded=st.booleans(),
)
def test_whatever_a_call_brings_a_prompt_equals_its_rows_written_by_hand(
    attached_gpt2: tuple[Any, Any, softhooks.SoftPrompt],
    states: bool,
    encoder_mask: bool,
    types: bool,
    left: int,
    tuples: bool,
    embedded: bool,
) -> None:
    bare, model, prompt = attached_gpt2
    ids, rows = _text(1, 6), prompt.embeddings()
    common: dict[str, Any] = {"encoder_hidden_states": _encoded(1)} if states else {}
    if states and encoder_mask:
        common["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    own, wide = dict(common), dict(common)
    mask = torch.ones(1, 6, dtype=torch.long)
    mask[:, :left] = 0
    if types:
        own["token_type_ids"] = torch.full((1, 6), 9)
        wide["token_type_ids"] = torch.cat(
            [torch.zeros(1, LENGTH, dtype=torch.long), own["token_type_ids"][:, left:]], 1
        )
    text = {"inputs_embeds": bare.get_input_embeddings()(ids)} if embedded else {"input_ids": ids}
    with torch.no_grad():
        got = model(**text, attention_mask=mask, return_dict=not tuples, **own)[0]
        want = cross.by_hand(bare, ids[:, left:], rows, **wide)
    torch.testing.assert_close(got[:, left:], want, rtol=1e-4, atol=1e-4)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_prompt_that_may_only_be_computed_once_refuses_an_encoders_states() -> None:
    _, model, prompt = _attach("gpt2", injection="shared")
    assert prompt.injection == "shared"
    model(input_ids=_text(1, 5))
    with pytest.raises(UnsupportedModeError, match="encoder_hidden_states"):
        model(input_ids=_text(1, 5), encoder_hidden_states=_encoded(1))


def test_a_cache_filled_without_an_encoder_goes_on_as_it_began() -> None:
    bare, model, prompt = _attach("gpt2")
    ids, encoded = _text(1, 6), _encoded(1)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        got = model(input_ids=ids[:, 4:], past_key_values=cache, encoder_hidden_states=encoded).logits
        embedded = bare.get_input_embeddings()(ids[:, :4])
        wide = torch.cat([prompt.embeddings()[None], embedded], 1)
        own = bare(inputs_embeds=wide, use_cache=True).past_key_values
        want = bare(input_ids=ids[:, 4:], past_key_values=own, encoder_hidden_states=encoded).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_mask_for_each_query_is_refused_where_virtual_tokens_have_none() -> None:
    _, model, _ = _attach("mllama")
    ids, mask = _text(1, 6), torch.zeros(1, 1, 6, 7)
    with pytest.raises(UnsupportedModeError, match="cross_attention_mask"):
        model(input_ids=ids, cross_attention_states=_encoded(1), cross_attention_mask=mask)
    _, model, _ = _attach("bert")
    with pytest.raises(UnsupportedModeError, match="encoder_attention_mask"):
        model(input_ids=ids, encoder_hidden_states=_encoded(1), encoder_attention_mask=torch.ones(1, 6, 7))
    with pytest.raises(
        UnsupportedModeError, match="encoder_attention_mask"
    ):  # one token, whose mask would be broadcast
        model(input_ids=ids[:, :1], encoder_hidden_states=_encoded(1), encoder_attention_mask=torch.ones(1, 1, 7))


def test_a_static_cache_with_an_encoders_states_is_refused_with_the_reason() -> None:
    _, model, _ = _attach("gpt2")
    cache = tf.StaticCache(config=model.config, max_cache_len=32)
    model(input_ids=_text(1, 5), past_key_values=tf.StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(UnsupportedModeError, match=r"encoder_hidden_states(.|\n)*cache"):
        model(input_ids=_text(1, 5), past_key_values=cache, encoder_hidden_states=_encoded(1))


# --- positions that change what all positions are ---------------------------------------------------------------------


def _rotating(kind: str) -> Any:
    small = {**zoo.SMALL, "num_key_value_heads": 2}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
        config = tf.Phi3Config(
            **{**small, "max_position_embeddings": 64}, original_max_position_embeddings=16,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, **factors
            },
        )  # fmt: skip
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        config = tf.LlamaConfig(**{**small, "max_position_embeddings": 16}, rope_parameters=rope)
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@pytest.mark.parametrize("columns", [6, 11, 12, 13, 20])
@torch.no_grad()
def test_rotations_that_depend_on_the_texts_length_reach_the_prompt(kind: str, columns: int) -> None:
    bare, model = _rotating(kind), _rotating(kind)
    for one in (bare, model):
        torch.manual_seed(1)
        for parameter in one.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    prompt = softhooks.attach(model, PromptTuning(LENGTH))
    assert prompt.injection == "shared"
    ids = zoo.text(1, columns)
    want = cross.by_hand(bare, ids, prompt.embeddings())
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)


# --- a prefix in a decoder that attends to an encoder -----------------------------------------------------------------

PREFIXED = ["gpt2", "bert", "roberta", "electra", "rembert", "trocr", "whisper", "xglm"]


def _behind_keys(bare: Any, ids: Tensor, prompt: softhooks.SoftPrompt, call: dict[str, Any]) -> Tensor:
    """Logits of one row after a cache that holds the prefix as read tokens. [1, T] -> [1, T, V]."""
    prefix = prompt.key_values(prompt.prompted_model.structure.entry)["self"]
    cache = tf.EncoderDecoderCache(tf.DynamicCache(), tf.DynamicCache())
    for layer in prefix.keys:
        cache.self_attention_cache.update(prefix.keys[layer], prefix.values[layer], layer)
    return bare(input_ids=ids, past_key_values=cache, use_cache=True, **call).logits


@pytest.mark.parametrize("name", PREFIXED)
@torch.no_grad()
def test_a_prefix_stands_before_the_text_and_not_before_the_encoders_states(name: str) -> None:
    bare, model = cross.make(name), cross.make(name)
    prompt = softhooks.attach(model, softhooks.PrefixTuning(LENGTH, init="random"))
    ids, encoded = _text(2, 6), _encoded(2)
    call = cross.states_of(name, encoded)
    want = torch.cat(
        [
            _behind_keys(bare, ids[row : row + 1], prompt, cross.states_of(name, encoded[row : row + 1]))
            for row in range(2)
        ]
    )
    for use_cache in (False, True):
        got = model(input_ids=ids, use_cache=use_cache, **call).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    padded = torch.cat([ids, torch.zeros(2, 2, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 2)], 1).long()
    got = model(input_ids=padded, attention_mask=mask, **call).logits[:, :6]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for empty in (None, tf.EncoderDecoderCache(tf.DynamicCache(), tf.DynamicCache())):
        out = model(input_ids=ids[:, :4], use_cache=True, past_key_values=empty, **call)
        steps = [out.logits]
        for column in (4, 5):
            cache = out.past_key_values
            assert isinstance(cache, tf.EncoderDecoderCache)
            assert cache.get_seq_length() == column
            seen = torch.ones(2, column + 1, dtype=torch.long)
            token = ids[:, column : column + 1]
            out = model(input_ids=token, attention_mask=seen, past_key_values=cache, use_cache=True, **call)
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "trocr", "xglm"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_give_a_prefix_the_same_gradient(name: str, reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = cross.make(name)
        prompt = softhooks.attach(model, softhooks.PrefixTuning(LENGTH, init="random"))
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        cross.without_dropout(model)
        ids, call = _text(2, 6), cross.states_of(name, _encoded(2))
        model(input_ids=ids, use_cache=False, **call).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in prompt.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
