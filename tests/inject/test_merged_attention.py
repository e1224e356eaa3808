"""Attention over a shared prefix that is merged with attention over the text: equal results, nothing kept for each row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import naive
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import softhooks
from softhooks import ContextAwarePromptTuning, PrefixTuning, PromptTuning
from softhooks.inject.prefix import merged_attention as merging
from softhooks.inject.prefix import prefix_pass

P = 7
ROWS = [zoo.text(1, length, seed=length)[0] for length in (6, 4, 5)]
METHODS = {"prompt": PromptTuning(P), "prefix": PrefixTuning(P)}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the queries of merged calls; all prefixes are long enough for merging."""
    calls: list[torch.Size] = []
    original = merging.merged_attention

    def spy(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(query.shape)
        return original(query, *args, **kwargs)

    monkeypatch.setattr(merging, "_pays", lambda *_: True)
    monkeypatch.setattr(prefix_pass, "merged_attention", spy)
    return calls


@contextmanager
def attached(model: Any, method: Any, merged: list[Any]) -> Iterator[Any]:
    """Attach a prompt, and forget the calls in which `attach` tried it."""
    with softhooks.attach(model, method) as prompt:
        merged.clear()
        yield prompt


@contextmanager
def unmerged() -> Iterator[None]:
    """Concatenate prefix and text while the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_pass, "can_merge", lambda *_: False)
        yield


def written_out(parts: list[Tensor], mask: Tensor | None, visible: Tensor | None, causal: bool) -> Tensor:
    """Attention in formulas over the concatenation."""
    query, prefix_key, prefix_value, key, value = parts
    batch, heads, columns, size = query.shape
    keys, values = (
        torch.cat([first.expand(batch, -1, -1, -1), own], dim=2).repeat_interleave(heads // own.shape[1], 1)
        for first, own in ((prefix_key, key), (prefix_value, value))
    )
    length = prefix_key.shape[2]
    scores = query @ keys.mT * size**-0.5
    seen = torch.ones(batch, 1, columns, keys.shape[2], dtype=torch.bool)
    if causal:
        seen[..., length:] = torch.ones(columns, columns, dtype=torch.bool).tril()
    if mask is not None:
        seen[..., length:] = mask
    if visible is not None:
        seen[..., :length] = visible
    return scores.masked_fill(~seen, torch.finfo(query.dtype).min).softmax(-1) @ values


@given(st.data())
def test_the_function_is_attention_over_both(data: st.DataObject) -> None:
    """Outputs and gradients, for all shapes, masks and dtypes, also if a query sees none of the text."""
    batch, groups, kv_heads, columns, length = (
        data.draw(st.integers(1, most), name) for name, most in zip("BGHTP", (3, 3, 2, 5, 6), strict=True)
    )
    size = data.draw(st.sampled_from([4, 8, 16]), "D")
    dtype = data.draw(st.sampled_from(list(TOLERANCES)), "dtype")
    kind = data.draw(st.sampled_from(["causal", "mask", "none"]), "mask")
    more = 0 if kind == "causal" else data.draw(st.integers(0, 4), "cached")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    prefix, text = (1, kv_heads, length, size), (batch, kv_heads, columns + more, size)
    shapes = [(batch, groups * kv_heads, columns, size), prefix, prefix, text, text]
    parts = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    mask = torch.rand(batch, 1, columns, columns + more) < 0.5 if kind == "mask" else None
    visible = torch.rand(batch, 1, columns, length) < 0.6 if data.draw(st.booleans(), "hidden") else None
    if visible is not None:
        visible[..., 0] = True  # a query that sees nothing has no defined output
    ours = merging.merged_attention(
        parts[0],
        (parts[1], parts[2]),
        (parts[3], parts[4]),
        None if mask is None else merging.additive_mask(mask, dtype),
        None if visible is None else merging.joined_mask(visible, parts[0]),
        causal=kind == "causal",
    )
    exact = [part.detach().double().requires_grad_() for part in parts]
    theirs = written_out(exact, mask, visible, kind == "causal")
    weights = torch.randn_like(ours)
    close = {"rtol": 0.0, "atol": TOLERANCES[dtype]}
    torch.testing.assert_close(ours.double(), theirs, **close)
    own = torch.autograd.grad((ours * weights).sum(), parts)
    expected = torch.autograd.grad((theirs * weights.double()).sum(), exact)
    for found, right in zip(own, expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=TOLERANCES[dtype], atol=batch * 2 * TOLERANCES[dtype])


def test_minus_infinity_hides_too() -> None:
    """An additive mask of the caller, in which a query sees none of the text."""
    parts = [torch.randn(2, 2, 3, 4)] + [torch.randn(1, 2, 5, 4)] * 2 + [torch.randn(2, 2, 3, 4)] * 2
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
    mask[0, :, 0] = False
    additive = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    ours = merging.merged_attention(
        parts[0], (parts[1], parts[2]), (parts[3], parts[4]), merging.additive_mask(additive, torch.float32)
    )
    torch.testing.assert_close(ours, written_out(parts, mask, None, False))


def outcome(model: Any, prompt: Any, batch: dict[str, Tensor], **call: Any) -> tuple[Tensor, Tensor]:
    """Logits of real tokens, and the prompt's gradient."""
    model.zero_grad()
    logits = model(**batch, **call).logits
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    logits[real].square().sum().backward()
    return logits[real].detach(), next(iter(prompt.parameters())).grad.clone()


def compare(*args: Any, **call: Any) -> None:
    ours = outcome(*args, **call)
    with unmerged():
        theirs = outcome(*args, **call)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-4 * float(theirs[1].abs().max()))


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("way", METHODS)
@pytest.mark.parametrize("arch", zoo.CAUSAL)
def test_every_family_gives_the_same_numbers(merged: list[Any], arch: str, way: str, padding: str) -> None:
    """Also with sliding windows, which hide a part of the prefix from late tokens."""
    model = zoo.build(arch)
    batch = {"input_ids": zoo.text(3, 6)} if padding == "none" else naive.left_padded(ROWS)
    with attached(model, METHODS[way], merged) as prompt:
        compare(model, prompt, batch)
        assert len(merged) in (0, model.config.num_hidden_layers)
        if prompt.injection == "attention" and model.config._attn_implementation == "sdpa":
            assert merged


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(merged: list[Any], reentrant: bool) -> None:
    model = naive.without_dropout(zoo.build("llama")).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with attached(model, PromptTuning(P), merged) as prompt:
        compare(model, prompt, {"input_ids": zoo.text(3, 6)})
    assert merged


def test_examples_that_are_hidden_from_their_own_rows(merged: list[Any]) -> None:
    method = ContextAwarePromptTuning(
        context_ids=zoo.text(1, 6)[0].tolist(), token_types=[2, 2, 4, 0, 6, 8], leave_one_out=True
    )
    model = zoo.build("llama")
    with attached(model, method, merged) as prompt:
        compare(model, prompt, naive.left_padded(ROWS), example_ids=torch.tensor([0, 1, -1]))
    assert len(merged) == 2


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_in_half_precision(merged: list[Any], precision: str) -> None:
    model, ids = zoo.build("llama"), zoo.text(3, 6)
    with attached(model, PrefixTuning(P), merged) as prompt:
        exact = outcome(model, prompt, {"input_ids": ids})
        if precision == "bf16":
            model.to(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            half = outcome(model, prompt, {"input_ids": ids})
    torch.testing.assert_close(half[0].float(), exact[0], rtol=0.1, atol=0.2)
    torch.testing.assert_close(half[1].float(), exact[1], rtol=0.2, atol=0.1 * float(exact[1].abs().max()))
    assert len(merged) == 4


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "gpt2", "mistral"])
def test_generation_is_the_naive_one(merged: list[Any], arch: str) -> None:
    """Padded rows, one new token at a time, with a cache."""
    model, twin = zoo.build(arch), zoo.build(arch)
    batch = naive.left_padded(ROWS)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with attached(model, PrefixTuning(P), merged) as prompt:
        with torch.no_grad():
            for parameter in prompt.parameters():
                parameter.normal_()
        found = model.generate(**batch, **options)
        step = naive.step_of(twin, prompt)
        for row, new in zip(ROWS, found[:, batch["input_ids"].shape[1] :], strict=True):
            text = row
            for token in new:
                assert int(step(text).argmax()) == int(token)
                text = torch.cat([text, token[None]])
    assert any(shape[2] == 1 for shape in merged)


def refused(case: str, model: Any, prompt: Any) -> None:
    """Run a forward that cannot be merged."""
    ids = zoo.text(2, 5)
    if case == "rows":
        with softhooks.rows(model, ["default", None]):
            model(ids)
    elif case == "dropout":
        model.config.attention_dropout = 0.1
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
        model.train()(ids)
    elif case == "another kernel":
        with sdpa_kernel(SDPBackend.MATH):
            model(ids)
    elif case == "forward mode":
        with torch.autograd.forward_ad.dual_level():
            model(ids)
    elif case == "torch.func":
        torch.func.grad(lambda x: model(inputs_embeds=x).logits.sum())(model.get_input_embeddings()(ids).detach())
    else:
        model(ids)


@pytest.mark.parametrize("case", ["rows", "dropout", "another kernel", "forward mode", "torch.func", "eager"])
def test_what_cannot_be_merged_is_concatenated(merged: list[Any], case: str) -> None:
    model = zoo.build("llama", attention="eager" if case == "eager" else "sdpa")
    with attached(model, PrefixTuning(P), merged) as prompt:
        refused(case, model, prompt)
        assert not merged
        model.eval()
        model(zoo.text(2, 5))
        assert bool(merged) == (case != "eager")


def test_gradients_of_gradients_need_another_kernel(merged: list[Any]) -> None:
    """As without a prompt: the CPU's kernel has no second derivative, and the written-out kernel has one."""
    model, ids = zoo.build("llama"), zoo.text(2, 5)
    with attached(model, PrefixTuning(P), merged) as prompt, sdpa_kernel(SDPBackend.MATH):
        parameter = next(iter(prompt.parameters()))
        [first] = torch.autograd.grad(model(ids).logits.square().sum(), parameter, create_graph=True)
        [second] = torch.autograd.grad(first.square().sum(), parameter)
    assert second.abs().sum() > 0
    assert not merged


@pytest.mark.parametrize("is_merged", [True, False])
def test_what_a_training_step_keeps(is_merged: bool) -> None:
    """Nothing of the prefix's length for each row: what autograd saves with three more rows."""
    model = zoo.build("llama", max_position_embeddings=512)
    saved: list[int] = []
    for batch in (2, 5):
        seen: dict[int, int] = {}

        def note(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            softhooks.attach(model, PrefixTuning(400)),
            pytest.MonkeyPatch.context() as patch,
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            if not is_merged:
                patch.setattr(prefix_pass, "can_merge", lambda *_: False)
                patch.setattr(prefix_pass, "joining_pays", lambda *_: False)
            kept = model(zoo.text(batch, 6)).logits.sum()
        assert kept.requires_grad
        saved.append(sum(seen.values()))
    copies = (saved[1] - saved[0]) / (3 * 2 * 2 * 2 * 8 * 400 * 4)  # rows, layers, keys and values, two heads of eight
    assert (copies < 0.5) is is_merged


@pytest.mark.parametrize(
    ("length", "rows", "columns", "grad", "pays"),
    [
        (95, 8, 5, True, False),
        (96, 1, 5, True, True),
        (63, 8, 5, False, False),
        (64, 1, 5, False, True),
        (20, 8, 1, False, False),
        (20, 13, 1, False, True),
        (1024, 1, 1, False, False),
    ],
)
def test_short_prefixes_are_concatenated(length: int, rows: int, columns: int, grad: bool, pays: bool) -> None:
    with torch.set_grad_enabled(grad):
        assert merging._pays(length, torch.zeros(rows, 1, columns, 4)) is pays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_converts_as_it_does_for_torchs_function(dtype: torch.dtype) -> None:
    parts = [torch.randn(1, 2, 3, 4, dtype=dtype) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = torch.nn.functional.scaled_dot_product_attention(*parts).dtype
        assert {part.dtype for part in merging.cast_by_autocast(*parts)} == {expected}
    assert {part.dtype for part in merging.cast_by_autocast(*parts)} == {dtype}


def test_one_row_with_the_shorter_of_two_prompts(merged: list[Any]) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, PrefixTuning(P)), softhooks.attach(model, PrefixTuning(3), "short") as prompt:
        merged.clear()
        with softhooks.rows(model, ["short"]):
            compare(model, prompt, {"input_ids": zoo.text(1, 5)})


def test_a_trained_mask_is_not_merged(merged: list[Any]) -> None:
    """The operators give no gradient for a mask."""
    model = zoo.build("llama")
    mask = torch.zeros(2, 1, 5, 5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    with attached(model, PrefixTuning(P), merged):
        model(zoo.text(2, 5), attention_mask=mask)
        assert merged
        merged.clear()
        model(zoo.text(2, 5), attention_mask=mask.requires_grad_()).logits.sum().backward()
    assert not merged
    assert mask.grad is not None
