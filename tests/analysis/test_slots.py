"""Facts about virtual tokens, gates, nearest words and attention, against values that are computed in another way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokens
import torch
import zoo
from on_disk import base, saved
from untouched import remove_all

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptMismatchError, PromptTuning
from softhooks.analysis.on_model import PromptOnBase
from softhooks.analysis.slots import gates_of, slots_of
from softhooks.backbone.placeholder_ids import BUFFER
from softhooks.formats.find import read
from softhooks.methods.stored_method import method_of

P = 4
TEXT = "word5 word9 word7 word6 word11"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    remove_all()


# --- rows -------------------------------------------------------------------------------------------------------------


def test_norms_similarities_and_drift(tmp_path: Path) -> None:
    model = zoo.build("llama")
    with softhooks.attach(model, PromptTuning(P)) as prompt:
        prompt.save_pretrained(tmp_path / "initial")
        start = prompt.embeddings().detach().clone()
    stored = read(saved(tmp_path / "saved", model, PromptTuning(P)))
    rows = stored.tables["embeddings"]
    [one] = slots_of(stored, method_of(stored), read(tmp_path / "initial"), matrix=True)
    assert one["norms"] == pytest.approx(rows.norm(dim=1).tolist())
    cosines = [[torch.cosine_similarity(a, b, dim=0).item() for b in rows] for a in rows]
    for number, (row, told) in enumerate(zip(cosines, one["similarity"], strict=True)):
        assert told == pytest.approx(row, abs=1e-5)
        others = [(cosine, slot) for slot, cosine in enumerate(row) if slot != number]
        assert one["most_similar"][number]["slot"] == max(others)[1]
        assert one["most_similar"][number]["cosine"] == pytest.approx(max(others)[0], abs=1e-5)
    assert one["drift"]["distance"] == pytest.approx((rows - start).norm(dim=1).tolist(), rel=1e-5)
    assert one["drift"]["cosine"] == pytest.approx(torch.cosine_similarity(rows, start).tolist(), abs=1e-5)
    assert "similarity" not in slots_of(stored, method_of(stored))[0]


def test_one_virtual_token_is_similar_to_no_other(tmp_path: Path) -> None:
    stored = read(saved(tmp_path, zoo.build("llama"), PromptTuning(1)))
    assert slots_of(stored, method_of(stored))[0]["most_similar"] is None


def test_the_initial_prompt_must_have_the_same_tensors(tmp_path: Path) -> None:
    model = zoo.build("llama")
    stored = read(saved(tmp_path / "a", model, PromptTuning(P)))
    with pytest.raises(PromptMismatchError, match="--initial"):
        slots_of(stored, method_of(stored), read(saved(tmp_path / "b", model, PrefixTuning(P))))


@pytest.mark.parametrize("gate", ["tanh", "raw"])
@pytest.mark.parametrize("per", ["head", "layer"])
def test_gates_by_layer(tmp_path: Path, gate: Any, per: Any) -> None:
    model = zoo.build("llama")
    stored = read(saved(tmp_path, model, LlamaAdapter(P, gate=gate, gate_per=per)))
    [one] = gates_of(stored, method_of(stored))
    values = stored.tables["text_gates"].view(2, -1)
    values = (values.tanh() if gate == "tanh" else values).abs()
    assert one["mean"] == pytest.approx(values.mean(1).tolist())
    assert one["largest"] == pytest.approx(values.max(1).values.tolist())
    assert gates_of(read(saved(tmp_path / "other", model, PromptTuning(P))), PromptTuning(P)) == []


# --- on the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("injection", ["shared", "slots"])
def test_attention_is_what_the_prompt_gets_if_it_is_concatenated_by_hand(tmp_path: Path, injection: Any) -> None:
    folder, model = base(tmp_path / "base", "llama")
    stored = read(saved(tmp_path / "prompt", model, PromptTuning(P), scale=0.5))
    on_base = PromptOnBase(stored, str(folder), strict=True)
    on_base.prompt.injection = injection
    shares, reason = on_base.attention(TEXT)
    assert shares is not None
    assert reason is None
    model.set_attn_implementation("eager")
    ids = torch.tensor([tokens.tokenizer()(TEXT)["input_ids"]])
    rows = torch.cat([stored.tables["embeddings"][None], model.get_input_embeddings()(ids)], dim=1)
    weights = model(inputs_embeds=rows, output_attentions=True).attentions
    expected = [layer[..., P:, :P].sum(-1).mean().item() for layer in weights]
    assert shares["self-attention"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("arch", "head"), [("llama", "causal"), ("bert", "sequence"), ("t5", "seq2seq"), ("bloom", "causal")]
)
def test_a_prefix_gets_attention_in_every_layer_and_has_no_words(tmp_path: Path, arch: str, head: str) -> None:
    folder, model = base(tmp_path / "base", arch, head)
    stored = read(saved(tmp_path / "prompt", model, PrefixTuning(P)))
    facts = PromptOnBase(stored, str(folder), strict=True).facts(3, TEXT)
    assert facts["nearest_words"] is None
    count = {"t5": 3}.get(arch, 1)
    assert len(facts["attention"]) == count
    assert all(0 < share < 1 for layers in facts["attention"].values() for share in layers)
    assert all(len(layers) == 2 for layers in facts["attention"].values())


def test_a_gated_branch_has_gates_instead(tmp_path: Path) -> None:
    folder, model = base(tmp_path / "base", "llama")
    stored = read(saved(tmp_path / "prompt", model, LlamaAdapter(P)))
    shares, reason = PromptOnBase(stored, str(folder), strict=True).attention(TEXT)
    assert shares is None
    assert reason is not None
    assert "see the gates" in reason


def test_words_are_those_of_nearest_words(tmp_path: Path) -> None:
    folder, model = base(tmp_path / "base", "llama")
    prompt = softhooks.attach(model, PromptTuning(P, init="text", init_text=TEXT, tokenizer=tokens.tokenizer()))
    prompt.save_pretrained(tmp_path / "prompt")
    expected = softhooks.nearest_words(prompt, tokens.tokenizer(), 3)
    words = PromptOnBase(read(tmp_path / "prompt"), str(folder), strict=True).words(3)
    assert words is not None
    assert [[word["id"] for word in row] for row in words] == [[word.id for word in row] for row in expected]
    assert [row[0]["token"] for row in words] == TEXT.split()[:P]


def test_words_that_initialized_a_prompt_are_known_if_the_model_reads_ids(tmp_path: Path) -> None:
    folder, model = base(tmp_path / "base", "llama")
    stored = read(saved(tmp_path / "prompt", model, PromptTuning(P)))
    on_base = PromptOnBase(stored, str(folder), strict=True)
    assert on_base.start_rows() is None
    stored.conventions[BUFFER] = [5, 6, 7, 8]
    rows = on_base.start_rows()
    assert rows is not None
    assert torch.equal(rows, model.get_input_embeddings().weight[5:9])
