"""P-tuning v2: deep prompts in all layers or in some, compared with attention computed by hand; heads, spans, and
learning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import naive
import oracles
import pytest
import torch
import training
import zoo
from torch import Tensor
from torch.nn import functional
from untouched import remove_all, untouched

import softhooks
from softhooks import (
    CheckpointError,
    OptionError,
    PrefixTuning,
    PromptTooLongError,
    PTuningV2,
    SoftPromptCallback,
    UnsupportedModeError,
)
from softhooks.formats.files import read_json

P, T = 4, 9
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
SDPA_ENCODERS = ("bert", "roberta", "albert", "electra", "distilbert", "modernbert", "esm")
LAYERS = {"bert": 2, "roberta": 2, "albert": 3, "electra": 2, "distilbert": 2, "modernbert": 3, "esm": 2}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


def sizeable(prompt: Any) -> None:
    """Set values that matter to every output; N(0, 0.02) hardly would."""
    prompt.encoder.eval()
    with torch.no_grad():
        for parameter in prompt.encoder.parameters():
            parameter.normal_(std=0.7)


def pairs_of(prompt: Any, layers: int, heads: int, group: str = "text") -> list[tuple[Tensor, Tensor]]:
    """The prompt's keys and values by layer, [1, Hk, P, D] each, cut by hand."""
    keys, values = oracles.cut_table(prompt.encoder(group), layers, heads)
    return list(zip(keys, values, strict=True))


# --- deep prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["sequence", "tokens", "qa", "masked"])
@pytest.mark.parametrize("arch", SDPA_ENCODERS)
def test_deep_prompts_are_columns_of_attention(arch: str, head: str) -> None:
    """Each layer has its own; in ALBERT each run of the one layer. In ModernBERT they are seen past the window too."""
    if (arch, head) == ("esm", "qa"):
        pytest.skip("transformers has no such model")
    model, ids = zoo.build(arch, head), zoo.text(2, T)
    with softhooks.attach(model, PTuningV2(P)) as prompt:
        sizeable(prompt)
        assert prompt.injection == "attention"
        ours = zoo.main_output(model(ids))
        (gradient,) = torch.autograd.grad(ours.square().sum(), prompt.encoder.text)
        with softhooks.disabled(model), oracles.patched_attention(pairs_of(prompt, LAYERS[arch], 4)):
            expected = zoo.main_output(model(ids))
    torch.testing.assert_close(ours, expected, **CLOSE)
    by_layer = gradient.view(P, LAYERS[arch], 2, -1).abs().sum(-1)
    assert bool((by_layer > 0).all()), "each layer's keys and values are trained"


@pytest.mark.parametrize(("arch", "heads"), [("llama", 2), ("qwen3", 2), ("mixtral", 2), ("gpt2", 4), ("opt", 4)])
@pytest.mark.parametrize("head", ["sequence", "tokens", "qa"])
def test_deep_prompts_on_a_decoder_are_a_seeded_cache(arch: str, heads: int, head: str) -> None:
    if (arch, head) == ("opt", "tokens"):
        pytest.skip("transformers has no such model")
    model, ids = zoo.build(arch, head), zoo.text(2, T)
    with softhooks.attach(model, PTuningV2(P)) as prompt:
        sizeable(prompt)
        ours = zoo.main_output(model(ids))
        keys, values = oracles.cut_table(prompt.encoder("text"), 2, heads)
        stack = prompt.prompted_model.structure.entry.module
        with softhooks.disabled(model):
            mask = torch.ones(1, P + T, dtype=torch.long)
            caches = [oracles.seeded_cache(model, keys, values) for _ in ids]
            states = [
                stack(row[None], attention_mask=mask, past_key_values=cache)[0]
                for row, cache in zip(ids, caches, strict=True)
            ]
        own = next(iter(prompt.heads.values()))(torch.cat(states))
    torch.testing.assert_close(ours, own[:, -1] if head == "sequence" else own, **CLOSE)


@pytest.mark.parametrize("arch", ["gemma3", "mistral"])
def test_deep_prompts_are_seen_past_a_sliding_window(arch: str) -> None:
    """Deep prompts stand for no tokens, and the last token is classified."""
    model, ids = zoo.build(arch, "sequence"), zoo.text(1, 16)
    with softhooks.attach(model, PTuningV2(P, layers=[0])) as prompt:
        sizeable(prompt)
        assert model.config.sliding_window < 16
        logits = model(ids).logits
        (gradient,) = torch.autograd.grad(logits.sum(), prompt.encoder.text)
        assert bool((gradient.abs().sum(-1) > 0).all())
        with softhooks.disabled(model), _every_layer_but_the_first_is_bare(prompt, model):
            model.config.use_cache = False
            expected = model(ids).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


@contextmanager
def _every_layer_but_the_first_is_bare(prompt: Any, model: Any) -> Iterator[None]:
    """Torch's attention with the prefix in its first call; the text stands P positions further."""
    ((key, value),) = pairs_of(prompt, 1, 2)
    original, calls = functional.scaled_dot_product_attention, []
    stack = prompt.prompted_model.structure.entry.module

    def attend(query: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False, **kw: Any) -> Any:
        calls.append(None)
        if len(calls) > 1:
            return original(query, k, v, attn_mask=attn_mask, is_causal=is_causal, **kw)
        seen = torch.ones(1, 1, query.shape[2], P, dtype=torch.bool)
        mask = torch.cat([seen, attn_mask], -1)
        more_keys, more_values = (part.repeat_interleave(k.shape[1] // 2, 1) for part in (key, value))
        return original(query, torch.cat([more_keys, k], 2), torch.cat([more_values, v], 2), attn_mask=mask, **kw)

    def move(_module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_ids": torch.arange(P, P + 16)[None]}

    with pytest.MonkeyPatch.context() as patch, ExitStack() as hooks:
        patch.setattr(functional, "scaled_dot_product_attention", attend)
        hooks.callback(stack.register_forward_pre_hook(move, with_kwargs=True).remove)
        yield


def test_its_start_and_dropout_are_the_papers() -> None:
    torch.manual_seed(0)
    model = zoo.build("bert", "sequence")
    with softhooks.attach(model, PTuningV2(64)) as prompt:
        table = prompt.encoder.text.detach()
        assert abs(float(table.std()) - 0.02) < 0.001
        assert abs(float(table.mean())) < 0.001
        dropped = prompt.encoder.train()("text")
        assert abs(float((dropped == 0).float().mean()) - 0.1) < 0.02
        assert torch.equal(prompt.encoder.eval()("text"), table)
        assert prompt.num_parameters == 64 * 2 * 2 * 32 + 3 * 32 + 3
    with softhooks.attach(model, PTuningV2(16, projection=True, hidden_size=32)) as prompt:
        start = prompt.encoder.folded()["text"]
        assert abs(float(start.std()) - 0.02) < 0.002


def test_positions_stay_in_an_encoder_or_move_if_asked_to() -> None:
    """The authors' BERT places the first token at position P; a saved prompt records the convention."""
    model, ids = zoo.build("bert", "tokens"), zoo.text(2, T)
    for shift, first in ((None, 0), (True, P)):
        with softhooks.attach(model, PTuningV2(P, shift_positions=shift)) as prompt:
            sizeable(prompt)
            assert prompt.conventions == {"shift_positions": bool(shift), "windowed": False}
            logits = model(ids).logits
            with softhooks.disabled(model), oracles.patched_attention(pairs_of(prompt, 2, 4)):
                expected = model(ids, position_ids=torch.arange(first, first + T)[None]).logits
        torch.testing.assert_close(logits, expected, **CLOSE)


def test_unmoved_positions_leave_an_encoder_its_whole_length() -> None:
    model, ids = zoo.build("bert", "tokens"), zoo.text(1, 96)
    with torch.no_grad(), softhooks.attach(model, PTuningV2(P)):
        assert model(ids).logits.shape == (1, 96, 3)
    with softhooks.attach(model, PTuningV2(P, shift_positions=True)), pytest.raises(PromptTooLongError, match="96"):
        model(ids)


# --- a choice of layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "top"), [("albert", 1), ("modernbert", 1), ("deberta-v2", 1), ("gemma3", 1), ("bert", 1)]
)
def test_deep_prompts_in_the_top_layers_touch_only_these(arch: str, top: int) -> None:
    head = "masked" if arch == "deberta-v2" else "sequence"
    model, ids = zoo.build(arch, head), zoo.text(2, T)
    with torch.no_grad():
        bare = model(ids, output_hidden_states=True).hidden_states
    with torch.no_grad(), softhooks.attach(model, PTuningV2(P, layers=range(-top, 0), shift_positions=False)) as prompt:
        sizeable(prompt)
        prompted = model(ids, output_hidden_states=True).hidden_states
    for below, own in zip(bare[:-top], prompted[:-top], strict=True):
        assert torch.equal(own, below)
    for above, own in zip(bare[-top:], prompted[-top:], strict=True):
        assert not torch.allclose(own, above, atol=1e-3)


@pytest.mark.parametrize("arch", ["bert", "albert", "modernbert"])
@pytest.mark.parametrize("layers", [[0], [-1], [1, 0]])
def test_a_layer_that_is_not_chosen_sees_no_prompt(arch: str, layers: list[int]) -> None:
    model, ids, count = zoo.build(arch, "tokens"), zoo.text(2, T), LAYERS[arch]
    chosen = sorted(layer % count for layer in layers)
    nothing = torch.zeros(1, 4, 0, 8)
    with torch.no_grad(), softhooks.attach(model, PTuningV2(P, layers=layers)) as prompt:
        sizeable(prompt)
        pairs = dict(zip(chosen, pairs_of(prompt, len(chosen), 4), strict=True))
        logits = model(ids).logits
        each = [pairs.get(layer, (nothing, nothing)) for layer in range(count)]
        with softhooks.disabled(model), oracles.patched_attention(each):
            torch.testing.assert_close(logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_layers_are_counted_in_each_stack(arch: str, projection: bool) -> None:
    model, ids, decoder_ids = zoo.build(arch, "seq2seq"), zoo.text(2, T), zoo.text(2, 5, seed=3)
    nothing = torch.zeros(1, 4, 0, 8)
    method = PTuningV2(P, layers=[1], projection=projection, hidden_size=8)
    with torch.no_grad(), softhooks.attach(model, method) as prompt:
        sizeable(prompt)
        assert set(prompt.encoder.groups) == {"encoder", "decoder", "cross"}
        ((encoder,), (decoder,), (cross,)) = (pairs_of(prompt, 1, 4, g) for g in ("encoder", "decoder", "cross"))
        logits = model(input_ids=ids, decoder_input_ids=decoder_ids).logits
        order = [(nothing, nothing), encoder, (nothing, nothing), (nothing, nothing), decoder, cross]
        with softhooks.disabled(model), oracles.patched_attention(order):
            expected = model(input_ids=ids, decoder_input_ids=decoder_ids).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


@contextmanager
def masked_in(layer: Any, columns: int) -> Iterator[None]:
    """Hide the first columns from one layer's attention by its own mask."""

    def mask(_module: Any, args: Any, kwargs: Any) -> Any:
        hidden = kwargs["attention_mask"].clone()
        hidden[..., :columns] = False if hidden.dtype == torch.bool else torch.finfo(hidden.dtype).min
        return args, {**kwargs, "attention_mask": hidden}

    handle = layer.register_forward_pre_hook(mask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("chosen", [0, 1])
@pytest.mark.parametrize("arch", zoo.CACHED)
def test_layers_where_prompts_enter_through_a_cache(arch: str, chosen: int) -> None:
    """The oracle gives the other layer a prefix too, and hides it by the mask."""
    model, ids = zoo.build(arch), zoo.text(2, T)
    with torch.no_grad(), softhooks.attach(model, PTuningV2(P, layers=[chosen])) as prompt:
        sizeable(prompt)
        assert prompt.injection == "cache"
        ((key, value),) = pairs_of(prompt, 1, prompt.prompted_model.structure.entry.sites[0].heads)
        logits = model(ids).logits
        attentions = model(ids, output_attentions=True).attentions  # with these, Falcon's own logits are others
        assert [tuple(weights.shape) for weights in attentions] == [(2, 4, T, T)] * 2
        attention = [m for m in model.modules() if type(m).__name__.endswith("Attention")][1 - chosen]
        other = torch.randn_like(key)
        keys, values = ([key, other], [value, other]) if chosen == 0 else ([other, key], [other, value])
        with softhooks.disabled(model), masked_in(attention, P):
            expected = torch.cat([oracles.prefixed(model, row[None], keys, values) for row in ids])
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("arch", zoo.CACHED)
def test_layers_through_a_cache_generate_and_are_checkpointed(arch: str) -> None:
    model = naive.endless(zoo.build(arch))
    with softhooks.attach(model, PTuningV2(P, layers=[1])) as prompt:
        sizeable(prompt)
        batch = naive.left_padded([zoo.text(1, n, seed=n)[0] for n in (6, 3)])
        plain = model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=False)
        assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), plain)
        gradients = []
        naive.without_dropout(model).train()
        prompt.encoder.eval()
        for checkpointing in (None, False, True):
            if checkpointing is not None:
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model(zoo.text(2, T), labels=zoo.text(2, T)).loss.backward()
            gradients.append(prompt.encoder.text.grad)
            prompt.encoder.zero_grad()
    assert float(gradients[0].abs().sum()) > 0
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("arch", ["bert", "electra", "modernbert", "llama"])
def test_layers_under_gradient_checkpointing(arch: str, use_reentrant: bool) -> None:
    model, ids = naive.without_dropout(zoo.build(arch, "sequence")).train(), zoo.text(2, T)
    with softhooks.attach(model, PTuningV2(P, layers=[-1])) as prompt:
        sizeable(prompt)
        model(ids, labels=torch.tensor([0, 2])).loss.backward()
        expected = prompt.encoder.text.grad.clone()
        prompt.encoder.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(ids, labels=torch.tensor([0, 2])).loss.backward()
    assert float(expected.abs().sum()) > 0
    torch.testing.assert_close(prompt.encoder.text.grad, expected, rtol=1e-4, atol=1e-7)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[], "01", [0, 0], [1.0], [True], 3, ["0"], range(0)])
def test_layers_must_be_distinct_whole_numbers(layers: Any) -> None:
    with pytest.raises(OptionError, match="must be a list of distinct whole numbers"):
        PTuningV2(P, layers=layers)


def test_layers_may_be_any_iterable_of_numbers() -> None:
    assert PTuningV2(P, layers=range(-2, 0)) == PTuningV2(P, layers=(-2, -1)) == PTuningV2(P, layers=iter([-2, -1]))
    assert PTuningV2(P).layers is None


@pytest.mark.parametrize(
    ("arch", "layers", "known"),
    [
        ("bert", [2], r"layers: *\[2\]\nmodel: *BertModel, 2 layers with self-attention: -2 to 1"),
        ("albert", [-4], r"AlbertModel, 3 layers"),
        ("bert", [1, -1], r"each once.(.|\n)*\[1, -1\]"),
        ("llama", range(12), "LlamaModel, 2 layers"),
    ],
)
def test_a_layer_that_does_not_exist(arch: str, layers: Any, known: str) -> None:
    model = zoo.build(arch, "sequence")
    with untouched(model), pytest.raises(OptionError, match=known):
        softhooks.attach(model, PTuningV2(P, layers=layers))


@pytest.mark.parametrize(("options", "words"), [({"dropout": 1.0}, "dropout"), ({"hidden_size": 0}, "hidden_size")])
def test_other_options_that_are_wrong(options: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        PTuningV2(P, **options)


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch", ["bert", "roberta", "albert", "electra", "distilbert", "megatron-bert", "deberta-v2", "modernbert", "llama"]
)
def test_extracted_spans_are_not_shifted(arch: str) -> None:
    """Start and end count the text's own tokens, in padded rows too, and so does the loss."""
    model = zoo.build(arch, "qa")
    rows = [zoo.text(1, length, seed=length)[0] for length in (T, 5)]
    flipped = naive.left_padded([row.flip(0) for row in rows])
    batch = {key: value.flip(1) for key, value in flipped.items()}
    start, end = torch.tensor([T - 1, 0]), torch.tensor([T - 1, 4])
    with torch.no_grad(), softhooks.attach(model, PTuningV2(P)) as prompt:
        sizeable(prompt)
        output = model(**batch, start_positions=start, end_positions=end)
        assert output.start_logits.shape == output.end_logits.shape == (2, T)
        by_hand = [
            functional.cross_entropy(output.start_logits, start),
            functional.cross_entropy(output.end_logits, end),
        ]
        torch.testing.assert_close(output.loss, sum(by_hand) / 2)
        alone = model(rows[1][None])
        torch.testing.assert_close(output.start_logits[1, :5], alone.start_logits[0], **CLOSE)
        torch.testing.assert_close(output.end_logits[1, :5], alone.end_logits[0], **CLOSE)


def test_a_pooler_outside_the_stack_is_trained_with_the_head() -> None:
    """DeBERTa's is as new as its classifier; BERT's belongs to the stack and stays."""
    new = {
        "deberta-v2": {"pooler", "classifier"},
        "bert": {"classifier"},
        "distilbert": {"pre_classifier", "classifier"},
    }
    for arch, heads in new.items():
        model = zoo.build(arch, "sequence")
        with softhooks.attach(model, PTuningV2(P)) as prompt:
            assert set(prompt.heads) == heads
            model(zoo.text(2, T), labels=torch.tensor([0, 1])).loss.backward()
            assert all(parameter.grad is not None for parameter in prompt.heads.parameters())


@pytest.mark.parametrize("head", ["sequence", "tokens", "qa"])
@pytest.mark.parametrize("arch", ["albert", "deberta-v2", "llama"])
def test_the_head_is_saved_and_loaded(tmp_path: Path, arch: str, head: str) -> None:
    method = PTuningV2(P, layers=[-1], projection=True, hidden_size=8)
    model, ids = zoo.build(arch, head), zoo.text(2, T)
    with torch.no_grad(), softhooks.attach(model, method) as prompt:
        for parameter in prompt.parameters():
            parameter.add_(torch.randn_like(parameter))
        prompt.encoder.eval()
        expected = zoo.main_output(model(ids))
        prompt.save_pretrained(tmp_path)
        told = read_json(tmp_path / "soft_prompt.json")
    assert told["options"]["layers"] == [-1]
    assert told["tensors"]["prompt.text"] == [P, 2 * 32 if arch != "llama" else 2 * 16], (
        "folded, and the chosen layer only"
    )
    fresh = zoo.build(arch, head)
    loaded = softhooks.load(fresh, tmp_path)
    assert loaded.method == method
    torch.testing.assert_close(zoo.main_output(fresh(ids)).detach(), expected, **CLOSE)


def test_a_file_whose_layers_are_none(tmp_path: Path) -> None:
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    with softhooks.attach(zoo.build("bert", "sequence"), PTuningV2(P, layers=[1])) as prompt:
        prompt.save_pretrained(tmp_path)
    path = tmp_path / "soft_prompt.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    told = json.loads(metadata["softhooks"])
    for layers in ("1", [1, 1], [0.5], {"1": 1}, 1):
        told["options"]["layers"] = layers
        save_file(tensors, path, {**metadata, "softhooks": json.dumps(told)})
        with pytest.raises(CheckpointError, match="valid options for p_tuning_v2"):
            softhooks.load(zoo.build("bert", "sequence"), tmp_path)


# --- rows -------------------------------------------------------------------------------------------------------------


MIXES = {
    "two layers": {"a": PTuningV2(5, layers=[0]), "b": PTuningV2(2, layers=[1])},
    "one layer and all": {"a": PTuningV2(3, layers=[1]), "b": PrefixTuning(3)},
    "one layer twice": {"a": PTuningV2(4, layers=[1]), "b": PTuningV2(2, layers=[-1])},
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("arch", ["bert", "albert", "modernbert", "deberta-v2", "llama", "mistral", "t5"])
def test_rows_with_prompts_in_different_layers(arch: str, mix: str) -> None:
    head = "masked" if arch == "deberta-v2" else "seq2seq" if arch == "t5" else "tokens"
    model, names = zoo.build(arch, head), ["a", "b", None, "a"]
    texts = [zoo.text(1, length, seed=length)[0] for length in (7, 4, 3, 5)]
    flipped = naive.left_padded([row.flip(0) for row in texts])
    batch = {key: value.flip(1) for key, value in flipped.items()}
    more = {"decoder_input_ids": zoo.text(1, 4, seed=9)} if arch == "t5" else {}
    for name, method in MIXES[mix].items():
        sizeable(softhooks.attach(model, method, name))
    with torch.no_grad():
        with softhooks.rows(model, names):
            together = model(**batch, **{key: ids.expand(4, -1) for key, ids in more.items()}).logits
        for place, (name, row) in enumerate(zip(names, texts, strict=True)):
            if name is not None:
                softhooks.activate(model, name)
            with ExitStack() as stack:
                if name is None:
                    stack.enter_context(softhooks.disabled(model))
                alone = model(row[None], **more).logits[0]
            torch.testing.assert_close(together[place, : len(alone)], alone, **CLOSE)


def test_rows_with_different_layers_are_refused_where_prompts_enter_through_a_cache() -> None:
    model = zoo.build("gptj")
    softhooks.attach(model, PTuningV2(P, layers=[0]), "low")
    softhooks.attach(model, PTuningV2(P, layers=[1]), "top")
    with softhooks.rows(model, ["low", "top"]), pytest.raises(UnsupportedModeError, match="must enter the same layers"):
        model(zoo.text(2, T))
    with softhooks.rows(model, ["top", None]), torch.no_grad():
        together = model(zoo.text(2, T)).logits
    softhooks.activate(model, "top")
    torch.testing.assert_close(together[0], model(zoo.text(2, T)).logits[0].detach(), **CLOSE)


# --- that it learns ---------------------------------------------------------------------------------------------------


def which_word(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Texts of six words; which of three stands among them is the label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 32, (count, 6), generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    ids[torch.arange(count), torch.randint(1, 6, (count,), generator=generator)] = 10 + labels
    ids[:, 0] = zoo.BOS
    return ids, labels


def accuracy(model: Any) -> float:
    ids, labels = which_word(400, seed=1)
    with torch.no_grad():
        return float((model.eval()(ids).logits.argmax(-1) == labels).float().mean())


def steps(model: Any, parameters: Any, count: int, learning_rate: float) -> None:
    ids, labels = which_word(2000, seed=0)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        chosen = torch.randint(len(ids), (64,), generator=generator)
        model.train()(ids[chosen], labels=labels[chosen]).loss.backward()
        optimizer.step()
        model.zero_grad()


def test_a_tuned_prompt_solves_what_the_frozen_model_and_its_head_cannot() -> None:
    model = zoo.build("bert", "sequence")
    assert accuracy(model) < 0.45
    with softhooks.attach(model, PTuningV2(16), freeze_dropout=True) as prompt:
        prompt.encoder.eval()
        steps(model, prompt.heads.parameters(), 200, 3e-2)
        head_only = accuracy(model)
    with softhooks.attach(model, PTuningV2(16), train_head=False, freeze_dropout=True) as prompt:
        steps(model, prompt.parameters(), 300, 3e-2)
        prompted = accuracy(model)
    assert head_only < 0.75
    assert prompted > 0.9
    assert accuracy(model) < 0.45


@pytest.mark.parametrize("arch", ["modernbert", "deberta-v2"])
def test_it_learns_on(arch: str) -> None:
    model = zoo.build(arch, "sequence")
    with softhooks.attach(model, PTuningV2(16), freeze_dropout=True) as prompt:
        before = accuracy(model)
        steps(model, prompt.parameters(), 300, 3e-2)
        assert accuracy(model) > max(0.8, before + 0.3)


# --- the three ways to train ------------------------------------------------------------------------------------------


def test_in_a_trainer_with_one_callback(tmp_path: Path) -> None:
    model = zoo.build("deberta-v2", "sequence")
    base = training.base_of(model)
    trainer, callback = training.prompted(tmp_path, model, "sequence", PTuningV2(P, layers=[1]), max_steps=30)
    trainer.train()
    losses = training.losses(trainer)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert callback.soft_prompt is not None
    trainer.save_model(str(tmp_path / "saved"))
    callback.soft_prompt.remove()
    assert training.equal(training.base_of(model), base)
    assert isinstance(softhooks.load(model, tmp_path / "saved").method, PTuningV2)
    assert isinstance(callback, SoftPromptCallback)


def test_in_a_decorated_loop(tmp_path: Path) -> None:
    @softhooks.tune(PTuningV2(P), save_to=tmp_path)
    def train(model: Any, soft_prompt: Any) -> Tensor:
        steps(model, soft_prompt.parameters(), 3, 1e-2)
        return model.eval()(zoo.text(2, 6)).logits.detach()

    model = zoo.build("electra", "sequence", problem_type="single_label_classification")
    with untouched(model):
        expected = train(model)
    softhooks.load(model, tmp_path)
    torch.testing.assert_close(model(zoo.text(2, 6)).logits.detach(), expected, **CLOSE)
