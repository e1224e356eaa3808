"""Templates: parsing, the rows that they make, and the model's outputs, compared with rows built by hand."""

from __future__ import annotations

from typing import Any

import naive
import oracles
import pytest
import tokens
import torch
import transformers as tf
import zoo
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import softhooks
from softhooks import Layout, OptionError, PTuning, UnsupportedModeError
from softhooks.layout.template import Part, parse

CLOSE = {"rtol": 1e-4, "atol": 5e-5}
RTE = "{premise} question: {hypothesis}? {soft:3} answer: {mask}."
PAIRS = [
    {"premise": "the red cat was great", "hypothesis": "a cat was great", "label": 0},
    {"premise": "hello", "hypothesis": "it was bad", "label": 1},
    {"premise": "a b c d e f g h", "hypothesis": "yes", "label": 0},
]


def by_hand(template: list[Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and slots of a row given as texts and numbers of slots."""
    ids, slots = [tokenizer.cls_token_id], []
    for part in template:
        if isinstance(part, int):
            slots += [len(ids)] * part
        else:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.sep_token_id], slots


# --- parsing ----------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_template() -> None:
    parts = parse('{a}{{x}} Say:  {b} {soft:2, name=k}{soft:"it was"} yes {soft:1}! {mask} ')
    assert parts == [
        Part("field", "a"),
        Part("text", "{x} Say:"),
        Part("field", "b", space="  "),
        Part("soft", count=2, tie="k"),
        Part("soft", "it was"),
        Part("text", " yes"),
        Part("soft", count=1),
        Part("text", "!"),
        Part("mask"),
    ]


@pytest.mark.parametrize(
    "template",
    [
        "{soft:0}",
        "{soft}",
        "{soft:-1}",
        "{soft:two}",
        '{soft:""}',
        "{soft:1, name=}",
        "{soft:1, name=2}",
        "{soft:1",
        "{soft:1} }",
        "{} {soft:1}",
        "{a b} {soft:1}",
        "no slot {a}",
        "",
        "{soft:2, name=a} {soft:3, name=a}",
        [],
        [{"role": "user"}],
        [{"role": "user", "content": "{soft:1"}],
        [{"role": "user", "content": "no slot"}],
        ["{soft:1}"],
        3,
        None,
    ],
    ids=repr,
)
def test_templates_that_say_nothing_sensible(template: Any) -> None:
    with pytest.raises(OptionError):
        Layout(template)


def test_slots_with_words_need_a_tokenizer() -> None:
    layout = Layout('{a} {soft:"it was"}')
    with pytest.raises(OptionError, match=r"needs a tokenizer(.|\n)*it was"):
        PTuning(layout=layout)
    tokenizer = tokens.masked()
    bound = Layout('{a} {soft:"it was"}', tokenizer=tokenizer)
    assert PTuning(layout=layout, tokenizer=tokenizer).layout == bound
    assert PTuning(layout=bound).num_virtual_tokens == 2


# --- rendering --------------------------------------------------------------------------------------------------------


def test_a_row_is_the_template_with_its_fields() -> None:
    tokenizer = tokens.masked()
    row = Layout(RTE).render(tokenizer, PAIRS[0])
    ids, slots = by_hand(
        [PAIRS[0]["premise"], "question:", PAIRS[0]["hypothesis"], "?", 3, "answer:", "[MASK]", "."], tokenizer
    )
    assert row == {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "token_type_ids": [0] * len(ids),
        "soft_slots": slots,
    }
    assert tokenizer.decode(ids[: slots[0]]) == "[CLS] the red cat was great question : a cat was great ?"


def test_the_published_templates_of_lama() -> None:
    """(3, 3, 3) for an encoder, with [CLS] before the first slot; (3, 3) for a decoder that predicts the object."""
    tokenizer = tokens.masked()
    row = Layout("{soft:3} {mask} {soft:3} {subject} {soft:3}").render(tokenizer, {"subject": "red cat"})
    assert (row["input_ids"], row["soft_slots"]) == by_hand([3, "[MASK]", 3, "red cat", 3], tokenizer)
    bpe = tokens.merged()
    layout = Layout("{soft:3} {subject} {soft:3} {object}")
    row = layout.render(bpe, {"subject": "the cat", "object": "great"})
    assert bpe.decode(row["input_ids"]) == " the cat great"
    assert row["soft_slots"] == [0] * 3 + [len(bpe(" the cat")["input_ids"])] * 3
    prompt = layout.render(bpe, {"subject": "the cat", "object": ""})
    assert prompt["soft_slots"] == row["soft_slots"]
    assert prompt["input_ids"] == row["input_ids"][: row["soft_slots"][-1]]


def test_blanks_go_with_the_word_behind_them() -> None:
    """If a space is part of the next word's token, no token of a single space appears next to slots and fields."""
    tokenizer = tokens.merged()
    row = Layout("Question: {q} {soft:1} Answer: {soft:2} {a}").render(tokenizer, {"q": "what is it?", "a": "yes"})
    pieces = ["Question:", " what is it?", " Answer:", " yes"]
    assert row["input_ids"] == [i for piece in pieces for i in tokenizer(piece)["input_ids"]]
    lone = tokenizer(" ")["input_ids"][0]
    assert lone not in row["input_ids"]
    empty = Layout("Question: {q} {soft:1}").render(tokenizer, {"q": ""})
    assert empty["input_ids"] == tokenizer("Question:")["input_ids"]


def test_a_tokenizer_that_marks_first_words_itself() -> None:
    """SentencePiece marks the start of a text: a space before it would be an extra token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = {"<unk>": 0, "▁": 1, "▁a": 2, "▁yes": 3}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert tokenizer(" yes")["input_ids"] != tokenizer("yes")["input_ids"]
    row = Layout("a {soft:1} yes {x}").render(tokenizer, {"x": "a"})
    assert row["input_ids"] == [2, 3, 2]


@pytest.mark.parametrize(
    "fields", [{"premise": "a"}, {"premise": "a", "hypothesis": 3}, {"premise": "a", "hypothesis": None}]
)
def test_fields_that_are_missing_or_no_text(fields: Any) -> None:
    with pytest.raises(
        OptionError, match=r"field .hypothesis. .* is (not given|3|None); it must be a string(.|\n)*given: +premise"
    ):
        Layout(RTE).render(tokens.masked(), fields)


def test_a_mask_needs_a_mask_token() -> None:
    with pytest.raises(OptionError, match="no mask token"):
        Layout("{soft:1} {mask}").render(tokens.merged(), {})


# --- truncation -------------------------------------------------------------------------------------------------------


@given(lengths=st.tuples(st.integers(0, 12), st.integers(0, 12)), max_length=st.integers(12, 40), side=st.booleans())
@example(lengths=(12, 12), max_length=12, side=False)
@example(lengths=(12, 3), max_length=14, side=True)
def test_truncation_takes_text_only(lengths: tuple[int, int], max_length: int, side: bool) -> None:
    """Fields are truncated to `max_length`, the longest first; all anchors, slots and special tokens stay."""
    tokenizer = tokens.masked()
    tokenizer.truncation_side = "left" if side else "right"
    texts = [[*"abcdefghabcd"][:n] for n in lengths]
    row = Layout(RTE).render(
        tokenizer, dict(zip(("premise", "hypothesis"), map(" ".join, texts), strict=True)), max_length=max_length
    )
    kept = list(lengths)
    while sum(kept) + 9 + 3 > max_length:  # 2 special tokens, 7 of anchors and mask, 3 slots
        kept[0 if kept[0] >= kept[1] else 1] -= 1
    cut = [text[len(text) - n :] if side else text[:n] for text, n in zip(texts, kept, strict=True)]
    parts = [" ".join(cut[0]), "question:", " ".join(cut[1]), "?", 3, "answer:", "[MASK]", "."]
    assert (row["input_ids"], row["soft_slots"]) == by_hand(parts, tokenizer)
    assert len(row["input_ids"]) + len(row["soft_slots"]) <= max_length


def test_anchors_and_slots_that_leave_no_room() -> None:
    tokenizer = tokens.masked()
    fields = {"premise": "a b", "hypothesis": "c"}
    assert len(Layout(RTE).render(tokenizer, fields, max_length=12)["input_ids"]) == 9
    with pytest.raises(OptionError, match=r"max_length=11 is too short.* take up 12 tokens, which are never truncated"):
        Layout(RTE).render(tokenizer, fields, max_length=11)


# --- data sets, collators ---------------------------------------------------------------------------------------------


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_a_data_set_is_mapped_row_by_row_or_in_batches() -> None:
    mapper = Layout(RTE).mapper(tokens.masked(), max_length=20)
    rows = [mapper(row) for row in PAIRS]
    assert mapper(columns_of(PAIRS)) == columns_of(rows)
    assert {len(row["soft_slots"]) for row in rows} == {3}


def test_datasets_map() -> None:
    datasets = pytest.importorskip("datasets")
    tokenizer = tokens.masked()
    mapper = Layout(RTE).mapper(tokenizer, max_length=20)
    data = datasets.Dataset.from_list(PAIRS)
    for batched in (False, True):
        mapped = data.map(mapper, batched=batched, remove_columns=["premise", "hypothesis"])
        assert mapped[0]["soft_slots"] == mapper(PAIRS[0])["soft_slots"]
        batch = tf.DataCollatorWithPadding(tokenizer)([mapped[i] for i in range(3)])
        assert batch["soft_slots"].shape == (3, 3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_collator_of_raw_rows_and_of_mapped_ones(side: str) -> None:
    tokenizer = tokens.masked()
    tokenizer.padding_side = side
    layout = Layout(RTE)
    raw = layout.collator(tokenizer, max_length=22)(PAIRS)
    mapped = layout.collator(tokenizer)([{**layout.mapper(tokenizer, max_length=22)(row), **row} for row in PAIRS])
    assert set(raw) == {"input_ids", "attention_mask", "token_type_ids", "soft_slots", "labels"}
    assert all(torch.equal(raw[key], mapped[key]) for key in raw)
    assert raw["labels"].tolist() == [0, 1, 0]
    theirs = tf.DataCollatorWithPadding(tokenizer)([layout.mapper(tokenizer, max_length=22)(row) for row in PAIRS])
    assert all(torch.equal(raw[key], theirs[key]) for key in theirs)


def test_padding_is_known_from_the_mask_alone() -> None:
    """With the end token as padding, a real end token in the text is attended to and the padding is not."""
    tokenizer = tokens.merged()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    layout = Layout("{x}<|end|> {soft:2} Answer: {y}")
    batch = layout.collator(tokenizer)([{"x": "the cat", "y": "yes"}, {"x": "the cat was bad", "y": ""}])
    end = tokenizer.eos_token_id
    real = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert [row.count(end) for row in real] == [1, 1]
    model = zoo.build("llama", vocab_size=len(tokenizer))
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=layout)) as prompt:
        logits, h = model(**batch).logits, prompt.encoder("embeddings")
        with softhooks.disabled(model):
            for i, ids in enumerate(real):
                offsets = [ids.index(end) + 1] * 2
                expected = oracles.woven_logits(model, torch.tensor([ids]), h, offsets, causal=True)[0]
                torch.testing.assert_close(logits[i, batch["attention_mask"][i].bool()], expected, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_field_to_be_predicted(side: str) -> None:
    tokenizer = tokens.merged()
    tokenizer.padding_side = side
    layout = Layout("{x} {soft:2} Answer: {y}")
    rows = [{"x": "the cat", "y": "yes"}, {"x": "the cat was bad", "y": "it was<|end|>"}]
    batch = layout.collator(tokenizer, target="y")(rows)
    for i, row in enumerate(rows):
        wanted = tokenizer(f" {row['y']}")["input_ids"]
        kept = batch["labels"][i] != -100
        assert batch["labels"][i, kept].tolist() == wanted
        assert batch["input_ids"][i, kept].tolist() == wanted
        assert bool(batch["attention_mask"][i, kept].all())
    for target in ("z", "mask"):
        with pytest.raises(OptionError, match="exactly once among the template's fields"):
            layout.mapper(tokenizer, target=target)


def test_a_layout_that_inserts_renders_nothing() -> None:
    with pytest.raises(OptionError, match="is not a template, so it cannot render text"):
        Layout.insert(start=1).mapper(tokens.masked())


# --- chat -------------------------------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "user", "content": "{soft:2}Question: {q}\n{soft:1} Answer:"},
    {"role": "assistant", "content": "{a}{soft:1}"},
    {"role": "user", "content": " the {b} was {soft:3, name=t} bad{soft:3, name=t}"},
]
FIELDS = {"q": "what is it?", "a": "yes", "b": "cat"}


def filled(content: str) -> str:
    """A content with its fields and without its slots, by hand."""
    for slots in (" {soft:3, name=t}", "{soft:2}", "{soft:1}", "{soft:3, name=t}"):
        content = content.replace(slots, "")
    return content.format(**FIELDS)


@pytest.mark.parametrize("generation", [False, True])
def test_a_chat_goes_through_the_chat_template(generation: bool) -> None:
    """The ids are those that the tokenizer makes of the filled messages; the slots stand where their text would."""
    tokenizer = tokens.merged()
    row = Layout(MESSAGES).render(tokenizer, FIELDS, add_generation_prompt=generation)
    plain = [{**message, "content": filled(message["content"])} for message in MESSAGES]
    expected = tokenizer.apply_chat_template(plain, add_generation_prompt=generation, return_dict=True)["input_ids"]
    assert tokenizer.decode(row["input_ids"]) == tokenizer.decode(expected)
    assert row["input_ids"] == expected
    before = [tokenizer.decode(row["input_ids"][:place]) for place in row["soft_slots"]]
    start = "<|user|>\n"
    assert before[:2] == [start] * 2
    assert before[2] == f"{start}Question: what is it?\n"
    assert before[3].endswith("<|assistant|>\nyes")
    assert before[4:7] == [before[4]] * 3
    assert before[4].endswith("cat was")
    assert before[7].endswith("cat was bad")


def test_a_chat_in_a_model_and_its_file() -> None:
    tokenizer = tokens.merged()
    layout = Layout(MESSAGES)
    assert Layout.from_json(layout.to_json()) == layout
    model = zoo.build("llama", vocab_size=len(tokenizer))
    row = layout.render(tokenizer, FIELDS, add_generation_prompt=True)
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=layout)) as prompt:
        batch = {key: torch.tensor([value]) for key, value in row.items()}
        h = prompt.encoder("embeddings")[layout.form.table_rows]
        logits = model(**batch).logits
        with softhooks.disabled(model):
            expected = oracles.woven_logits(model, batch["input_ids"], h, row["soft_slots"], causal=True)
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_a_chat_template_that_drops_a_message() -> None:
    tokenizer = tokens.merged()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(OptionError, match=r"drops, repeats or reorders(.|\n)*parts: +\d+"):
        Layout(MESSAGES).render(tokenizer, FIELDS)


def test_a_long_chat_is_cut_in_its_fields() -> None:
    tokenizer = tokens.merged()
    long = {**FIELDS, "q": "what is it? " * 50}
    row = Layout(MESSAGES).render(tokenizer, long, max_length=120)
    assert len(row["input_ids"]) + len(row["soft_slots"]) == 120
    assert tokenizer.decode(row["input_ids"]).endswith("\nthe cat was bad<|end|>\n")


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", zoo.ENCODERS)
def test_anchors_keep_their_frozen_embeddings_at_their_places(arch: str, side: str) -> None:
    """In a ragged batch, what enters the first layer is the frozen lookup everywhere but at the slots."""
    tokenizer = tokens.masked()
    tokenizer.padding_side = side
    model, layout = zoo.build(arch, "masked"), Layout(RTE)
    seen: list[Tensor] = []
    with softhooks.attach(model, PTuning(layout=layout)) as prompt:
        batch = layout.collator(tokenizer)(PAIRS)
        batch.pop("labels")
        if arch == "roberta":
            batch.pop("token_type_ids")
        handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out))
        model(**batch)
        handle.remove()
        h = prompt.encoder("embeddings")
    table = model.get_input_embeddings().weight
    for i, row in enumerate(PAIRS):
        ids, slots = by_hand(
            [row["premise"], "question:", row["hypothesis"], "?", 3, "answer:", "[MASK]", "."], tokenizer
        )
        expected, _ = oracles.woven(table[ids][None], h, slots)
        width, real = seen[0].shape[1], expected.shape[1]
        own = seen[0][i, width - real :] if side == "left" else seen[0][i, :real]
        assert torch.equal(own, expected[0])


@pytest.mark.parametrize("head", ["masked", "tokens", "sequence"])
@pytest.mark.parametrize("arch", zoo.ENCODERS)
def test_a_template_in_an_encoder(arch: str, head: str) -> None:
    tokenizer = tokens.masked()
    model, layout = zoo.build(arch, head), Layout(RTE)
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=layout)) as prompt:
        batch = layout.collator(tokenizer)(PAIRS)
        batch.pop("labels")
        if arch == "roberta":
            batch.pop("token_type_ids")
        logits, h = model(**batch).logits, prompt.encoder("embeddings")
        alone = [model(**{k: torch.tensor([v]) for k, v in layout.render(tokenizer, row).items() if k in batch}).logits[0]
                 for row in PAIRS]  # fmt: skip
        with softhooks.disabled(model):
            for i, own in enumerate(alone):
                ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
                offsets = batch["soft_slots"][i].tolist()
                torch.testing.assert_close(logits[i] if head == "sequence" else logits[i, : len(ids)], own, **CLOSE)
                if head != "sequence":
                    expected = oracles.woven_logits(model, ids[None], h, offsets, causal=False)[0]
                    torch.testing.assert_close(own, expected, **CLOSE)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "gptj", "bloom"])
def test_generation_behind_slots(arch: str) -> None:
    """The object is generated; the last slots stand right before it and stay there. Beams repeat the column."""
    tokenizer = tokens.merged()
    tokenizer.padding_side = "left"
    layout = Layout("{soft:2} {subject} {soft:3} {object}")
    model = naive.endless(zoo.build(arch, vocab_size=len(tokenizer)))
    bare = zoo.build(arch, vocab_size=len(tokenizer))
    rows = [{"subject": text, "object": ""} for text in ("the cat", "the dog was bad", "it")]
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=layout)) as prompt:
        batch = layout.collator(tokenizer)(rows)
        h = prompt.encoder("embeddings")
        found = {
            "greedy": model.generate(**batch, max_new_tokens=5, do_sample=False),
            "uncached": model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=False),
            "beams": model.generate(**batch, max_new_tokens=5, do_sample=False, num_beams=3),
        }
    for i in range(3):
        ids, offsets = batch["input_ids"][i][batch["attention_mask"][i].bool()], batch["soft_slots"][i].tolist()
        assert offsets[-1] == len(ids)

        def step(grown: Tensor, offsets: list[int] = offsets) -> Tensor:
            wide, _ = oracles.woven(bare.get_input_embeddings()(grown[None]), h, offsets)
            return bare(inputs_embeds=wide, use_cache=False).logits[0, -1]

        greedy = naive.greedy(step, ids, 5)
        assert torch.equal(found["greedy"][i][-len(greedy) :], greedy)
        assert torch.equal(found["uncached"][i][-len(greedy) :], greedy)
        assert torch.equal(found["beams"][i][-len(greedy) :], naive.beam(step, ids, 3, 5))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_generation_of_an_encoder_decoder(arch: str, beams: int) -> None:
    tokenizer = tokens.masked()
    layout = Layout("{premise} question: {soft:3} {hypothesis} answer: {soft:1}")
    model, bare = naive.endless(zoo.build(arch, "seq2seq")), zoo.build(arch, "seq2seq")
    start = torch.tensor([model.config.decoder_start_token_id])
    with torch.no_grad(), softhooks.attach(model, PTuning(layout=layout)) as prompt:
        batch = layout.collator(tokenizer)(PAIRS)
        batch = {key: value for key, value in batch.items() if key not in ("labels", "token_type_ids")}
        h = prompt.encoder("embeddings")
        found = model.generate(**batch, max_new_tokens=5, do_sample=False, num_beams=beams)
    for i, ours in enumerate(found):
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        wide, _ = oracles.woven(bare.get_input_embeddings()(ids[None]), h, batch["soft_slots"][i].tolist())

        def step(grown: Tensor, wide: Tensor = wide) -> Tensor:
            return bare(inputs_embeds=wide, decoder_input_ids=grown[None], use_cache=False).logits[0, -1]

        assert torch.equal(ours, naive.greedy(step, start, 5) if beams == 1 else naive.beam(step, start, 3, 5))


def test_tied_slots_share_a_gradient() -> None:
    tokenizer = tokens.masked()
    layout = Layout("{soft:2, name=t} {a} {soft:1} ? {soft:2, name=t} {mask}")
    assert (layout.num_slots, layout.num_virtual_tokens, layout.form.table_rows) == (5, 3, [0, 1, 2, 0, 1])
    model = zoo.build("bert", "masked")
    batch = {k: torch.tensor([v]) for k, v in layout.render(tokenizer, {"a": "hello world"}).items()}
    with softhooks.attach(model, PTuning(layout=layout, encoder="none")) as prompt:
        assert prompt.num_parameters == 3 * 32
        table = prompt.encoder.embeddings
        logits = model(**batch).logits
        (ours,) = torch.autograd.grad(logits.square().sum(), table)
        apart = table.detach()[[0, 1, 2, 0, 1]].requires_grad_()
        with softhooks.disabled(model):
            expected = oracles.woven_logits(
                model, batch["input_ids"], apart, batch["soft_slots"][0].tolist(), causal=False
            )
        (theirs,) = torch.autograd.grad(expected.square().sum(), apart)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert bool((theirs[0] - theirs[3]).abs().max() > 1e-3)
    torch.testing.assert_close(ours, torch.stack([theirs[0] + theirs[3], theirs[1] + theirs[4], theirs[2]]), **CLOSE)


def test_prompts_of_different_templates_in_one_batch() -> None:
    tokenizer = tokens.masked()
    one, two = Layout("{a} {soft:3} ? {mask}"), Layout("{soft:1} {a} . {mask}")
    model = zoo.build("bert", "masked")
    rows = [one.render(tokenizer, {"a": "hello"}), two.render(tokenizer, {"a": "red cat"})]
    with torch.no_grad():
        softhooks.attach(model, PTuning(layout=one), "one")
        softhooks.attach(model, PTuning(layout=two), "two")
        alone = []
        for name, row in zip(("one", "two"), rows, strict=True):
            softhooks.activate(model, name)
            alone.append(model(**{key: torch.tensor([value]) for key, value in row.items()}).logits[0])
        rows[1]["soft_slots"] += [0, 0]  # the column is as wide as the template with the most slots
        batch = dict(tokenizer.pad(rows, return_tensors="pt"))
        with softhooks.rows(model, ["one", "two"]):
            together = model(**batch).logits
    for ours, own in zip(together, alone, strict=True):
        torch.testing.assert_close(ours[: len(own)], own, **CLOSE)


# --- the column -------------------------------------------------------------------------------------------------------


def test_the_column_is_required_and_must_fit() -> None:
    tokenizer = tokens.masked()
    model, layout = zoo.build("bert", "masked"), Layout(RTE)
    with softhooks.attach(model, PTuning(layout=layout)):
        batch = layout.collator(tokenizer)(PAIRS)
        batch.pop("labels")
        column = batch.pop("soft_slots")
        with pytest.raises(
            UnsupportedModeError, match=r"the batch column `soft_slots`.* is missing(.|\n)*given: *absent"
        ):
            model(**batch)
        with pytest.raises(UnsupportedModeError, match=r"given: *\[3, 2\]\nexpected: *\[3, 3\]"):
            model(**batch, soft_slots=column[:, :2])
        for wrong in (column + 40, -column):
            with pytest.raises(UnsupportedModeError, match="`soft_slots` is out of range"):
                model(**batch, soft_slots=wrong)
        cut = {key: value[:, :6] for key, value in batch.items()}
        with pytest.raises(
            UnsupportedModeError,
            match=r"tokens before a slot must be between 0 and the length of the row(.|\n)*max_length",
        ):
            model(**cut, soft_slots=column)
        with softhooks.disabled(model):
            model(**batch, soft_slots=column)  # the model itself never sees it


def test_slots_behind_the_end_of_a_language_models_template() -> None:
    with pytest.raises(softhooks.UnsupportedMethodError, match=r"move as the text grows(.|\n)*subject(.|\n)*"):
        softhooks.attach(zoo.build("llama"), PTuning(layout=Layout("{soft:3} {subject} {soft:3}")))


# --- as JSON ----------------------------------------------------------------------------------------------------------

STORED = [
    Layout(RTE),
    Layout('{a} {soft:"it was"} b {soft:2, name=k}{soft:2, name=k}', tokenizer=tokens.masked()),
    Layout(MESSAGES),
    Layout.insert(start=2, after={7: 1, (8, 9): 2}, before={5: 1}, end=3, which="last", missing="skip"),
    Layout.insert(after={"[SEP]": 2, "it was": 1}, tokenizer=tokens.masked()),
]


@pytest.mark.parametrize("layout", STORED, ids=repr)
def test_a_layout_is_what_its_json_says(layout: Layout) -> None:
    import json

    told = json.loads(json.dumps(layout.to_json()))
    again = Layout.from_json(told)
    assert again == layout
    assert hash(again) == hash(layout)
    assert again.form.table_rows == layout.form.table_rows
    assert again.form.starts == layout.form.starts
    assert repr(again) == repr(layout)


@pytest.mark.parametrize(
    "told",
    [
        None,
        [],
        {},
        {"template": "{soft:1}", "insert": []},
        {"template": "{soft:1}"},
        {"template": "{soft:1}", "words": [[1]]},
        {"template": '{soft:"a"}', "words": []},
        {"template": '{soft:"a"}', "words": [["a"]]},
        {"template": '{soft:"a"}', "words": [[True]]},
        {"template": "{soft:1}", "words": [], "more": 1},
        {"template": 3, "words": []},
        {"insert": [], "which": "first", "missing": "error"},
        {"insert": {}, "which": "first", "missing": "error"},
        {"insert": [{"at": "start", "count": 1}]},
        {"insert": [{"at": "start", "count": 1}], "which": [], "missing": "error"},
        {"insert": [{"at": "start", "count": 0}], "which": "first", "missing": "error"},
        {"insert": [{"at": "start", "count": True}], "which": "first", "missing": "error"},
        {"insert": [{"at": "nowhere", "count": 1}], "which": "first", "missing": "error"},
        {"insert": [{"at": ["start"], "count": 1}], "which": "first", "missing": "error"},
        {"insert": [{"at": "after", "count": 1}], "which": "first", "missing": "error"},
        {"insert": [{"at": "after", "count": 1, "anchor": "x", "ids": []}], "which": "first", "missing": "error"},
        {"insert": [{"at": "after", "count": 1, "anchor": "x", "ids": [[]]}], "which": "first", "missing": "error"},
        {"insert": [{"at": "after", "count": 1, "anchor": 3, "ids": [[4]]}], "which": "first", "missing": "error"},
        {"insert": [{"at": "after", "count": 1, "anchor": {}, "ids": [[4]]}], "which": "first", "missing": "error"},
        {"insert": ["start"], "which": "first", "missing": "error"},
    ],
    ids=repr,
)
def test_json_that_is_no_layout(told: Any) -> None:
    with pytest.raises(OptionError):
        Layout.from_json(told)
