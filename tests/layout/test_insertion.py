"""Layouts for existing ids: slots at the ends of a row and next to anchors, compared with rows built by hand."""

from __future__ import annotations

import copy
from typing import Any

import naive
import oracles
import pytest
import tokens
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import softhooks
from softhooks import Layout, OptionError, PTuning, UnsupportedModeError
from softhooks.layout.anchors import Anchor

CLOSE = {"rtol": 1e-4, "atol": 5e-5}
CAUSAL = (*zoo.CAUSAL, *zoo.CACHED)
A, B, C = 90, 91, 92
"""Ids of anchors; the rows below hold them, and nothing else does."""


def row(*parts: int, length: int = 7, seed: int = 0) -> Tensor:
    """Ordinary ids with anchors at given places: (place, id, place, id, ...)."""
    ids = zoo.text(1, length, seed=seed)[0] % 80 + 4
    for place, token in zip(parts[::2], parts[1::2], strict=True):
        ids[place] = token
    return ids


ROWS = [row(2, A, 5, B, 6, C), row(0, B, 3, A, length=4, seed=1), row(1, A, 2, B, 3, A, length=5, seed=2)]
SLOTS = {"start": 2, "after": {A: 2}, "before": {(B,): 1}}


def offsets_of(ids: Tensor, end: int = 0, last: bool = False) -> list[int]:
    """The places of SLOTS in a row, found by a search."""
    listed = ids.tolist()
    pick = (lambda token: len(listed) - 1 - listed[::-1].index(token)) if last else listed.index
    return [0, 0, pick(A) + 1, pick(A) + 1, pick(B), *[len(listed)] * end]


def right_padded(rows: list[Tensor], pad: int = zoo.PAD) -> dict[str, Tensor]:
    flipped = naive.left_padded([ids.flip(0) for ids in rows], pad=pad)
    return {key: value.flip(1) for key, value in flipped.items()}


def h_of(prompt: Any) -> Tensor:
    return prompt.encoder("embeddings")


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", CAUSAL)
def test_slots_next_to_anchors_in_a_decoder(arch: str, side: str, which: Any) -> None:
    model = zoo.build(arch)
    batch = naive.left_padded(ROWS) if side == "left" else right_padded(ROWS)
    with softhooks.attach(model, PTuning(layout=Layout.insert(**SLOTS, which=which))) as prompt:
        assert prompt.injection == "slots"
        h = h_of(prompt)
        logits = model(**batch).logits
        with softhooks.disabled(model):
            expected = [
                oracles.woven_logits(model, ids[None], h, offsets_of(ids, last=which == "last"), causal=True)[0]
                for ids in ROWS
            ]
        ours = [logits[i, batch["attention_mask"][i].bool()] for i in range(len(ROWS))]
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
        mine = torch.autograd.grad(sum(one.square().sum() for one in ours), prompt.parameters(), retain_graph=True)
        theirs = torch.autograd.grad(sum(one.square().sum() for one in expected), prompt.parameters())
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize("head", ["tokens", "masked"])
@pytest.mark.parametrize("arch", zoo.ENCODERS)
def test_slots_next_to_anchors_in_an_encoder(arch: str, head: str) -> None:
    model = zoo.build(arch, head)
    batch = right_padded(ROWS, pad=zoo.pad_id(model))
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=Layout.insert(**SLOTS, end=1))) as prompt:
        prompt.encoder.eval()
        logits, h = model(**batch).logits, h_of(prompt)
        with softhooks.disabled(model):
            for ours, ids in zip(logits, ROWS, strict=True):
                expected = oracles.woven_logits(model, ids[None], h, offsets_of(ids, end=1), causal=False)[0]
                torch.testing.assert_close(ours[: len(ids)], expected, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "bloom"])
def test_a_decoders_classification_pools_what_stands_behind_the_last_token(arch: str, side: str) -> None:
    """Slots after the text are allowed here: nothing is generated, and the class is read after them."""
    model, bare = zoo.build(arch, "sequence"), zoo.build(arch, "sequence")
    batch = naive.left_padded(ROWS) if side == "left" else right_padded(ROWS)
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=Layout.insert(**SLOTS, end=2))) as prompt:
        logits, h = model(**batch).logits, h_of(prompt)
    for ours, ids in zip(logits, ROWS, strict=True):
        wide, _ = oracles.woven(bare.get_input_embeddings()(ids[None]), h, offsets_of(ids, end=2))
        state = bare.base_model(inputs_embeds=wide).last_hidden_state[0, -1]
        torch.testing.assert_close(ours, bare.score(state), **CLOSE)


@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_slots_next_to_anchors_in_an_encoder_decoder(arch: str) -> None:
    model, bare = naive.endless(zoo.build(arch, "seq2seq")), zoo.build(arch, "seq2seq")
    batch, start = right_padded(ROWS), torch.tensor([model.config.decoder_start_token_id])
    decoder_ids = zoo.text(3, 5, seed=3)
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=Layout.insert(**SLOTS, end=1))) as prompt:
        h = h_of(prompt)
        output = model(**batch, decoder_input_ids=decoder_ids)
        found = model.generate(**batch, max_new_tokens=5, do_sample=False)
        beams = model.generate(**batch, max_new_tokens=5, do_sample=False, num_beams=3)
        encoded = model.get_encoder()(**batch)
        again = model(encoder_outputs=encoded, attention_mask=batch["attention_mask"], decoder_input_ids=decoder_ids)
    torch.testing.assert_close(again.logits, output.logits, **CLOSE)
    torch.testing.assert_close(again.encoder_last_hidden_state, output.encoder_last_hidden_state)
    for i, ids in enumerate(ROWS):
        wide, places = oracles.woven(bare.get_input_embeddings()(ids[None]), h, offsets_of(ids, end=1))

        def step(grown: Tensor, wide: Tensor = wide) -> Tensor:
            return bare(inputs_embeds=wide, decoder_input_ids=grown[None], use_cache=False).logits[0, -1]

        alone = bare(inputs_embeds=wide, decoder_input_ids=decoder_ids[i : i + 1])
        torch.testing.assert_close(output.logits[i], alone.logits[0], **CLOSE)
        own = alone.encoder_last_hidden_state[0, places]
        torch.testing.assert_close(output.encoder_last_hidden_state[i, : len(ids)], own, **CLOSE)
        assert torch.equal(found[i], naive.greedy(step, start, 5))
        assert torch.equal(beams[i], naive.beam(step, start, 3, 5))


@given(lengths=st.lists(st.integers(3, 8), min_size=1, max_size=4), seed=st.integers(0, 99), side=st.booleans())
def test_anchors_are_found_as_python_finds_them(lengths: list[int], seed: int, side: bool) -> None:
    """Random rows of few ids: some anchors occur, some overlap, some occur only in the padding."""
    rows = [torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed + n)) for n in lengths]
    batch = naive.left_padded(rows, pad=1) if side else right_padded(rows, pad=1)
    for which in ("first", "last"):
        for anchor in ((1,), (1, 2), (0, 0), (2, 1, 1)):
            layout = Layout.insert(after={anchor: 1}, before={anchor: 2}, which=which, missing="skip")  # type: ignore[arg-type]
            places = layout.places(batch["attention_mask"], batch["input_ids"], None, range(len(rows)))
            for i, ids in enumerate(rows):
                listed = ids.tolist()
                starts = [s for s in range(len(listed)) if tuple(listed[s : s + len(anchor)]) == anchor]
                assert places.live[i].tolist() == [bool(starts)] * 3
                if starts:
                    place = starts[0 if which == "first" else -1]
                    assert places.offsets[i].tolist() == [place + len(anchor), place, place]


def test_of_several_ways_to_write_an_anchor_the_first_counts_and_the_longer() -> None:
    anchor = Anchor("words", ((5, 6), (5,), (7, 5), (9,)))
    for listed, first, last in (
        ([1, 9, 5, 6, 2], (1, 2), (2, 4)),
        ([7, 5, 6, 5, 1], (0, 2), (3, 4)),
        ([1, 5, 6, 9, 9], (1, 3), (4, 5)),
        ([9, 1, 7, 5, 5], (0, 1), (4, 5)),
    ):
        ids = torch.tensor([listed])
        for which, expected in (("first", first), ("last", last)):
            found, start, end = anchor.find(ids, torch.ones_like(ids), which)  # type: ignore[arg-type]
            assert (found.item(), start.item(), end.item()) == (True, *expected)


def test_words_are_found_as_the_tokenizer_writes_them() -> None:
    """A word has different ids at the start of a text and after a space."""
    tokenizer = tokens.merged()
    layout = Layout.insert(after={"Answer:": 1}, tokenizer=tokenizer)
    for text, before in (("Answer: yes", ""), ("what is it? Answer: yes", "what is it?")):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        (place,) = layout.places(torch.ones_like(ids), ids, None, [0]).offsets[0].tolist()
        assert tokenizer.decode(ids[0, :place]) == f"{before} Answer:".strip()


def test_anchors_stand_as_tokens_of_the_vocabulary() -> None:
    tokenizer = tokens.masked()
    by_text = Layout.insert(start=1, after={"[SEP]": 2, "it was": 1}, before={"?": 1}, tokenizer=tokenizer)
    late = Layout.insert(start=1, after={"[SEP]": 2, "it was": 1}, before={"?": 1})
    assert PTuning(layout=late, tokenizer=tokenizer).layout == by_text
    ids = torch.tensor([tokenizer("it was great ?")["input_ids"]])
    assert by_text.places(torch.ones_like(ids), ids, None, [0]).offsets.tolist() == [[0, 6, 6, 3, 4]]


# --- generation -------------------------------------------------------------------------------------------------------


def woven_step(model: Any, h: Tensor, offsets: list[int]) -> naive.Step:
    def step(grown: Tensor) -> Tensor:
        wide, _ = oracles.woven(model.get_input_embeddings()(grown[None]), h, offsets)
        call = {"inputs_embeds": wide, "attention_mask": torch.ones(wide.shape[:2], dtype=torch.long)}
        if model.config.model_type != "bloom":
            call["position_ids"] = torch.arange(wide.shape[1])[None]
        return model(**call, use_cache=False).logits[0, -1]

    return step


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("arch", CAUSAL)
def test_generation_searches_the_prompt_only(arch: str, which: Any) -> None:
    """Slots stay in their places whatever is generated, with and without a cache, also in beams and samples."""
    model, bare = naive.endless(zoo.build(arch)), zoo.build(arch)
    layout = Layout.insert(**SLOTS, which=which)
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=layout)) as prompt:
        h = h_of(prompt)
        steps = [woven_step(bare, h, offsets_of(ids, last=which == "last")) for ids in ROWS]
        expected = [naive.greedy(step, ids, 6) for step, ids in zip(steps, ROWS, strict=True)]
        for use_cache in (True, False):
            found = model.generate(**naive.left_padded(ROWS), max_new_tokens=6, do_sample=False, use_cache=use_cache)
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours[-len(theirs) :], theirs)
        beams = model.generate(**naive.left_padded(ROWS), max_new_tokens=4, do_sample=False, num_beams=3)
        torch.manual_seed(5)
        drawn = model.generate(
            **naive.left_padded(ROWS), max_new_tokens=4, do_sample=True, top_k=0, num_return_sequences=2
        )
    for ours, step, ids in zip(beams, steps, ROWS, strict=True):
        assert torch.equal(ours[-len(ids) - 4 :], naive.beam(step, ids, 3, 4))
    twice = [(step, ids) for step, ids in zip(steps, ROWS, strict=True) for _ in range(2)]
    with torch.no_grad():
        right = naive.sample([step for step, _ in twice], [ids for _, ids in twice], 4, seed=5)
    for ours, theirs in zip(drawn, right, strict=True):
        assert torch.equal(ours[-len(theirs) :], theirs)


def test_generated_anchors_move_nothing_without_a_cache() -> None:
    """Only the anchor can be generated; without a cache each step sees the whole row again."""
    model, bare = naive.endless(zoo.build("llama")), zoo.build("llama")
    ids = ROWS[0]
    layout = Layout.insert(after={A: 1, C: 1}, which="last", missing="skip")
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=layout)) as prompt:
        constrained = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [i for i in range(96) if i != A]}
        plain = model.generate(
            ids[None], use_cache=False, output_logits=True, return_dict_in_generate=True, **constrained
        )
        assert plain.sequences[0, -4:].tolist() == [A] * 4
        step = woven_step(bare, h_of(prompt), [3, 7])
        grown = ids
        for logits in plain.logits:
            torch.testing.assert_close(logits[0], step(grown), **CLOSE)
            grown = torch.cat([grown, torch.tensor([A])])
    assert "generate" not in model.__dict__


def test_a_deep_copy_notes_its_own_prompts() -> None:
    model = naive.endless(zoo.build("llama"))
    layout = Layout.insert(after={A: 1}, which="last")
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=layout)) as prompt:
        twin = copy.deepcopy(model)
        assert twin.generate.model is twin
        assert twin.generate.prompted is softhooks.runtime.prompted_model.prompted_model_of(twin)
        expected = model.generate(ROWS[0][None], max_new_tokens=3, do_sample=False)
        prompt.encoder.rows.zero_()
        assert torch.equal(twin.generate(ROWS[0][None], max_new_tokens=3, do_sample=False), expected)


def test_a_refused_prompt_leaves_generate_alone() -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, PTuning(2)):
        generate = model.generate
        for layout in (Layout.insert(end=1), Layout.insert(start=1, after={A: 1}, end=1)):
            with pytest.raises(softhooks.UnsupportedMethodError):
                softhooks.attach(model, PTuning(layout=layout), "other")
        assert model.generate is generate
    assert "generate" not in model.__dict__


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gptj"])
def test_a_prefilled_cache_is_repeated_for_several_continuations(arch: str) -> None:
    """Rows with slots at different places, each continued twice in a manual decoding loop."""
    model, bare = zoo.build(arch), zoo.build(arch)
    batch, more = naive.left_padded(ROWS), torch.tensor([[4], [5], [6], [7], [8], [9]])
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=Layout.insert(**SLOTS))) as prompt:
        cache = model(**batch, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        mask = torch.cat([batch["attention_mask"].repeat_interleave(2, 0), torch.ones(6, 1, dtype=torch.long)], 1)
        logits = model(more, attention_mask=mask, past_key_values=cache).logits[:, -1]
        for i, ids in enumerate(ids for ids in ROWS for _ in range(2)):
            expected = woven_step(bare, h_of(prompt), offsets_of(ids))(torch.cat([ids, more[i]]))
            torch.testing.assert_close(logits[i], expected, **CLOSE)


@pytest.mark.parametrize("chunk", [1, 3])
def test_an_anchor_must_not_be_split_from_its_prompt(chunk: int) -> None:
    model = naive.endless(zoo.build("llama"))
    for layout in (Layout.insert(after={A: 1}), Layout.insert(after={A: 1}, missing="skip")):
        with (
            softhooks.attach(model, PTuning(layout=layout)),
            pytest.raises(UnsupportedModeError, match=r"of 7 tokens(.|\n)*the whole text at once(.|\n)*prefill_chunk"),
        ):
            model.generate(ROWS[0][None], max_new_tokens=2, prefill_chunk_size=chunk)


def test_front_slots_are_computed_once_whatever_they_are_called() -> None:
    model, ids = zoo.build("llama"), zoo.text(2, 6)
    with softhooks.attach(model, PTuning(layout=Layout.insert(start=4), encoder="none")) as prompt:
        assert prompt.injection == "shared"
        assert prompt.conventions == {"placement": "front"}
        assert PTuning(4, encoder="none").token_layout == prompt.layout
        model(ids)


# --- several prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "gptj"])
def test_rows_with_different_layouts_in_one_batch(arch: str) -> None:
    model, bare = naive.endless(zoo.build(arch)), zoo.build(arch)
    layouts = {
        "one": Layout.insert(**SLOTS),
        "two": Layout.insert(after={A: 1}),
        "front": Layout.insert(start=3),
    }
    where = {"one": offsets_of, "two": lambda ids: [ids.tolist().index(A) + 1], "front": lambda ids: [0, 0, 0]}
    prompts = {
        name: softhooks.attach(model, PTuning(layout=layout), name, injection="slots")
        for name, layout in layouts.items()
    }
    rows = [*ROWS, row(length=3, seed=9)]
    names = ["two", "one", "front", None]
    with softhooks.rows(model, names), torch.no_grad():
        found = model.generate(**naive.left_padded(rows), max_new_tokens=5, do_sample=False)
        for ours, name, ids in zip(found, names, rows, strict=True):
            step = naive.bare_step(bare) if name is None else woven_step(bare, h_of(prompts[name]), where[name](ids))
            assert torch.equal(ours[-len(ids) - 5 :], naive.greedy(step, ids, 5))


# --- anchors that are not there ---------------------------------------------------------------------------------------


def test_a_lacking_anchor_is_an_error_that_names_row_and_anchor() -> None:
    model = zoo.build("llama")
    rows = [ROWS[0], row(length=7, seed=4), ROWS[2][:1]]
    with softhooks.attach(model, PTuning(layout=Layout.insert(after={A: 1}))):
        with pytest.raises(UnsupportedModeError, match=rf"anchor: +{A}, ids \({A},\)\nrows: +1, 2\n"):
            model(**naive.left_padded(rows))
        assert model(**naive.left_padded(ROWS)).logits.shape[0] == 3
    layout = Layout.insert(after={"world": 1}, tokenizer=tokens.masked())
    with (
        softhooks.attach(model, PTuning(layout=layout)),
        pytest.raises(UnsupportedModeError, match=r"anchor: +'world', ids \(\d+,\)\nrows: +0\n"),
    ):
        model(zoo.text(1, 5) % 5 + 4)


def test_an_anchor_in_the_padding_is_none() -> None:
    """Padding has the id of a real token, so only the mask identifies it."""
    model = zoo.build("llama")
    rows = [row(1, zoo.EOS, length=5), row(length=3, seed=1)]
    with (
        softhooks.attach(model, PTuning(layout=Layout.insert(after={zoo.EOS: 1}))),
        pytest.raises(UnsupportedModeError, match=r"rows: +1\n"),
    ):
        model(**naive.left_padded(rows, pad=zoo.EOS))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_a_lacking_anchor_is_skipped_when_asked(arch: str) -> None:
    model, bare = naive.endless(zoo.build(arch)), zoo.build(arch)
    rows = [ROWS[0], row(2, B, length=4, seed=4), row(length=3, seed=5)]
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=Layout.insert(**SLOTS, missing="skip"))) as prompt:
        h = h_of(prompt)
        found = model.generate(**naive.left_padded(rows), max_new_tokens=5, do_sample=False)
    kept = [(h, offsets_of(rows[0])), (h[[0, 1, 4]], [0, 0, 2]), (h[:2], [0, 0])]
    with torch.no_grad():
        for ours, ids, (own, offsets) in zip(found, rows, kept, strict=True):
            assert torch.equal(ours[-len(ids) - 5 :], naive.greedy(woven_step(bare, own, offsets), ids, 5))


def test_anchors_need_ids_and_the_ends_do_not() -> None:
    model = zoo.build("bert", "tokens")
    embedded = model.get_input_embeddings()(ROWS[0][None]).detach()
    with (
        softhooks.attach(model, PTuning(layout=Layout.insert(start=1, after={A: 1}))),
        pytest.raises(UnsupportedModeError, match=r"`input_ids`(.|\n)*only `start` and `end`"),
    ):
        model(inputs_embeds=embedded)
    with softhooks.attach(model, PTuning(layout=Layout.insert(start=1, end=2))):
        torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ROWS[0][None]).logits, **CLOSE)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"start": -1},
        {"start": True},
        {"after": {A: 0}},
        {"after": [A]},
        {"after": {"": 1}},
        {"before": {(): 1}},
        {"before": {(1, -2): 1}},
        {"before": {(1, "a"): 1}},
        {"before": {1.5: 1}},
        {"start": 1, "which": "any"},
        {"start": 1, "missing": "ignore"},
    ],
    ids=str,
)
def test_layouts_that_insert_nothing_sensible(options: Any) -> None:
    with pytest.raises(OptionError):
        Layout.insert(**options)


def test_words_that_the_tokenizer_cannot_write() -> None:
    with pytest.raises(OptionError, match=r"encodes the anchor 'zebra' as '\[UNK\]', so texts cannot be searched"):
        Layout.insert(after={"zebra": 1}, tokenizer=tokens.masked())
    with pytest.raises(OptionError, match="needs a tokenizer"):
        PTuning(layout=Layout.insert(after={"world": 1}))


def test_ids_beyond_the_vocabulary() -> None:
    model = zoo.build("llama")
    with pytest.raises(softhooks.PromptMismatchError, match=r"vocabulary(.|\n)*\[500\]"):
        softhooks.attach(model, PTuning(layout=Layout.insert(after={500: 1})))
    assert not hasattr(model, "soft_prompt")


@pytest.mark.parametrize("layout", [Layout.insert(end=1), Layout.insert(start=1, end=2)], ids=str)
def test_slots_behind_the_text_of_a_language_model(layout: Layout) -> None:
    with pytest.raises(softhooks.UnsupportedMethodError, match=r"move as the text grows(.|\n)*end=\d|end"):
        softhooks.attach(zoo.build("llama"), PTuning(layout=layout))
