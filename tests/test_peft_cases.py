"""Cases that PEFT silently gets wrong are right here, compared with the bare model; with PEFT's own figures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import naive
import oracles
import peers
import pytest
import torch
import zoo
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, PromptTuning, PTuningV2

P, NEW = 4, 6
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
ROWS = [zoo.text(1, length, seed=length)[0] for length in (7, 4, 3)]


def rows_of(prompt: Any) -> Tensor:
    return next(prompt.encoder.parameters()).detach()


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


def right_padded() -> dict[str, Tensor]:
    batch = naive.left_padded([row.flip(0) for row in ROWS])
    return {key: value.flip(1) for key, value in batch.items()}


# --- 1 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [*zoo.CAUSAL, *zoo.CACHED])
def test_case_1_left_padding(arch: str) -> None:
    model, bare, batch = zoo.build(arch), naive.endless(zoo.build(arch)), naive.left_padded(ROWS)
    with torch.no_grad(), softhooks.attach(model, PromptTuning(P)) as prompt:
        step, rows = naive.step_of(bare, prompt), rows_of(prompt)
        expected = torch.stack([step(row) for row in ROWS])
        torch.testing.assert_close(model(**batch).logits[:, -1], expected, **CLOSE)
        found = model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        for ours, row in zip(found, ROWS, strict=True):
            assert torch.equal(ours[-len(row) - NEW :], naive.greedy(step, row, NEW))
        if peers.HAS_PEFT and arch not in ("opt", "bloom"):  # it has no prompt for the one; the other has no positions
            theirs = peers.prompted(bare, rows)
            with peers.quiet():
                assert distance(theirs(**batch).logits[:, -1][0], expected[0]) < 1e-4  # the row without padding
                assert distance(theirs(**batch).logits[:, -1], expected) > 0.1


@pytest.mark.parametrize("arch", ["gemma3", "mistral"])
def test_case_1_left_padding_of_a_prefix_on_sliding_windows(arch: str) -> None:
    model, bare, batch = zoo.build(arch), naive.endless(zoo.build(arch)), naive.left_padded(ROWS)
    with torch.no_grad(), softhooks.attach(model, PrefixTuning(P, init="random")) as prompt:
        prompt.encoder.text.normal_(std=0.5)
        step = naive.step_of(bare, prompt)
        expected = torch.stack([step(row) for row in ROWS])
        torch.testing.assert_close(model(**batch).logits[:, -1], expected, **CLOSE)
        if peers.HAS_PEFT:
            theirs = peers.prefixed(bare, rows_of(prompt), P)
            with peers.quiet():
                assert distance(theirs(**batch).logits[:, -1], expected) > 0.1


# --- 2, 3 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3", "mistral"])
def test_case_2_sequence_classification_on_a_decoder_with_right_padding(arch: str) -> None:
    model, bare, batch = zoo.build(arch, "sequence"), zoo.build(arch, "sequence"), right_padded()
    with torch.no_grad(), softhooks.attach(model, PromptTuning(P)) as prompt:
        rows = rows_of(prompt)
        backbone = bare.base_model
        expected = torch.cat([
            bare.score(backbone(inputs_embeds=oracles.concatenated(
                bare.get_input_embeddings()(row[None]), rows, "front")).last_hidden_state[:, -1])
            for row in ROWS
        ])  # fmt: skip
        torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)
        torch.testing.assert_close(model(**naive.left_padded(ROWS)).logits, expected, **CLOSE)
        if peers.HAS_PEFT:
            with peers.quiet():
                theirs = peers.prompted(bare, rows, "SEQ_CLS")(**batch).logits
            assert distance(theirs[0], expected[0]) < 1e-4
            assert distance(theirs, expected) > 0.1


@pytest.mark.parametrize("way", ["front", "after_first", "end", "prefix", "p-tuning-v2"])
def test_case_3_question_answering(way: Any) -> None:
    model, bare, ids = zoo.build("bert", "qa"), zoo.build("bert", "qa"), zoo.text(2, 7)
    starts, ends = torch.tensor([1, 3]), torch.tensor([2, 6])
    deep = {"prefix": PrefixTuning(P), "p-tuning-v2": PTuningV2(P)}
    method = deep[way] if way in deep else PromptTuning(P, placement=way)
    with torch.no_grad(), softhooks.attach(model, method) as prompt:
        if way == "p-tuning-v2":
            prompt.encoder.text.normal_(std=0.7)
        output = model(ids, start_positions=starts, end_positions=ends)
        if way in deep:
            keys, values = oracles.cut_table(rows_of(prompt), 2, 4)
            with oracles.patched_attention(list(zip(keys, values, strict=True))):
                wide = bare(ids)
            start, end = wide.start_logits, wide.end_logits
        else:
            embedded = bare.get_input_embeddings()(ids)
            wide = [bare(inputs_embeds=oracles.concatenated(e[None], rows_of(prompt), way)) for e in embedded]
            start, end = (
                torch.cat([oracles.text_states(getattr(one, key)[..., None], P, way, False)[..., 0] for one in wide])
                for key in ("start_logits", "end_logits")
            )
        torch.testing.assert_close(output.start_logits, start, **CLOSE)
        torch.testing.assert_close(output.end_logits, end, **CLOSE)
        loss = (functional.cross_entropy(start, starts) + functional.cross_entropy(end, ends)) / 2
        torch.testing.assert_close(output.loss, loss, **CLOSE)
        if peers.HAS_PEFT and way == "front":
            with peers.quiet():
                theirs = peers.prompted(bare, rows_of(prompt), "QUESTION_ANS")
                wrong = theirs(ids, start_positions=starts, end_positions=ends)
            assert wrong.start_logits.shape[1] == P + 7
            assert abs(float(wrong.loss - loss)) > 0.1


# --- 8, 10 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_case_8_prefix_of_an_encoder_decoder(arch: str) -> None:
    """Every layer has its own prefix, in the encoder, the decoder and between; all of it trains; no cache is needed."""
    model, bare = naive.endless(zoo.build(arch, "seq2seq")), zoo.build(arch, "seq2seq")
    ids, start = zoo.text(1, 7), torch.tensor([model.config.decoder_start_token_id])
    with softhooks.attach(model, PrefixTuning(P)) as prompt:
        assert set(prompt.encoder.groups) == {"encoder", "decoder", "cross"}
        assert all(p.shape == (P, 2 * 2 * 32) for p in prompt.encoder.parameters())
        model(ids, labels=zoo.text(1, 5)).loss.backward()
        for parameter in prompt.encoder.parameters():
            assert (parameter.grad.view(P, 2, 2, 32).abs().sum(-1) > 0).all()
        expected = naive.greedy(naive.seq2seq_step(bare, prompt, ids[0]), start, NEW)
        for use_cache in (True, False):
            found = model.generate(ids, max_new_tokens=NEW, do_sample=False, use_cache=use_cache)
            assert torch.equal(found[0], expected)
    if peers.HAS_PEFT:
        theirs = peers.prefixed(zoo.build(arch, "seq2seq"), None, P, "SEQ_2_SEQ_LM")
        with peers.quiet():
            theirs(ids, labels=zoo.text(1, 5)).loss.backward()
        gradient = theirs.prompt_encoder["default"].embedding.weight.grad
        assert float((gradient == 0).float().mean()) >= 0.5


@pytest.mark.parametrize("arch", zoo.SEQ2SEQ)
def test_case_10_prompt_of_an_encoder_decoder(arch: str) -> None:
    """P rows, all in the encoder, all trained."""
    model, ids = zoo.build(arch, "seq2seq"), zoo.text(2, 7)
    with softhooks.attach(model, PromptTuning(P)) as prompt:
        model(ids, labels=zoo.text(2, 5)).loss.backward()
        assert prompt.num_parameters == P * 32
        assert (prompt.encoder.embeddings.grad.abs().sum(-1) > 0).all()
        rows = rows_of(prompt)
    if peers.HAS_PEFT:
        theirs = peers.prompted(zoo.build(arch, "seq2seq"), rows, "SEQ_2_SEQ_LM")
        with peers.quiet():
            theirs(ids, labels=zoo.text(2, 5)).loss.backward()
        gradient = theirs.prompt_encoder["default"].embedding.weight.grad
        assert gradient.shape[0] == 2 * P
        assert int((gradient.abs().sum(-1) == 0).sum()) == P


# --- 11 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PrefixTuning(P), PTuningV2(P, dropout=0.0)], ids=["prefix", "p-tuning-v2"])
@pytest.mark.parametrize("head", ["masked", "sequence", "tokens"])
@pytest.mark.parametrize("arch", zoo.ENCODERS)
def test_case_11_gradient_checkpointing_turned_on_afterwards(arch: str, head: str, method: Any) -> None:
    model, ids = naive.without_dropout(zoo.build(arch, head)).train(), zoo.text(2, 7)
    labels = torch.tensor([0, 1]) if head == "sequence" else ids % 3
    with softhooks.attach(model, method) as prompt:
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(ids, labels=labels).loss.backward()
            gradients.append(prompt.encoder.text.grad.clone())
        assert float(gradients[0].abs().max()) > 0
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


# --- 12 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PromptTuning(P), PrefixTuning(P)], ids=["prompt", "prefix"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3", "gemma3", "mistral", "mixtral"])
def test_case_12_packed_documents(arch: str, method: Any) -> None:
    """Each document sees the prompt, and no other document."""
    model, bare = zoo.build(arch), zoo.build(arch)
    packed = torch.cat([ROWS[0], ROWS[1]])[None]
    positions = torch.cat([torch.arange(len(row)) for row in ROWS[:2]])[None]
    other = torch.cat([zoo.text(1, 7, seed=50)[0], ROWS[1]])[None]
    with torch.no_grad(), softhooks.attach(model, method) as prompt:
        step = naive.step_of(bare, prompt)
        logits = model(packed, position_ids=positions, use_cache=False).logits[0]
        torch.testing.assert_close(logits[6], step(ROWS[0]), **CLOSE)
        torch.testing.assert_close(logits[-1], step(ROWS[1]), **CLOSE)
        again = model(other, position_ids=positions, use_cache=False).logits[0]
        torch.testing.assert_close(again[7:], logits[7:], **CLOSE)
        if peers.HAS_PEFT and isinstance(method, PrefixTuning) and arch != "gemma3":
            theirs = peers.prefixed(copy.deepcopy(bare), rows_of(prompt), P)
            with peers.quiet():
                first, second = (theirs(ids, position_ids=positions).logits[0, 7:] for ids in (packed, other))
            assert distance(first, second) > 0.1


# --- 17 ---------------------------------------------------------------------------------------------------------------


def test_case_17_an_adapter_trains_the_head_of_a_sequence_classifier(tmp_path: Path) -> None:
    """PEFT freezes the randomly initialized head; here it is trained, saved and loaded."""
    ids, labels = torch.cat([zoo.text(1, 7, seed=seed) for seed in range(6)]), torch.arange(6) % 3
    model = zoo.build("llama", "sequence")
    own = model.score.weight.detach().clone()
    with softhooks.attach(model, LlamaAdapter(P)) as prompt:
        optimizer = torch.optim.AdamW(prompt.parameters(), lr=2e-2)
        for _ in range(60):
            model(ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(prompt.heads["score"].weight, own)
        assert torch.equal(model.score.weight, own)
        expected = model(ids).logits
        assert expected.argmax(-1).tolist() == labels.tolist()
        prompt.save_pretrained(tmp_path)
    fresh = zoo.build("llama", "sequence")
    softhooks.load(fresh, tmp_path)
    assert torch.equal(fresh(ids).logits, expected)
    if peers.HAS_PEFT:
        import peft

        config = peft.AdaptionPromptConfig(adapter_len=P, adapter_layers=2, task_type="SEQ_CLS")
        with peers.quiet():
            theirs = peft.get_peft_model(zoo.build("llama", "sequence"), config)
            trained = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
            assert all("adaption_" in name for name in trained)
            theirs.save_pretrained(tmp_path / "theirs")
        assert not [name for name in load_file(tmp_path / "theirs" / "adapter_model.safetensors") if "score" in name]


def test_an_adapter_on_biased_projections_starts_as_the_base() -> None:
    """PEFT adds it after the output projection, so that its bias counts twice: a measured error of 0.085."""
    ids = zoo.text(2, 7)
    model = zoo.build("llama", attention_bias=True).requires_grad_(False)
    bare = model(ids).logits
    with softhooks.attach(model, LlamaAdapter(P)):
        assert torch.equal(model(ids).logits, bare)
    if peers.HAS_PEFT:
        import peft

        config = peft.AdaptionPromptConfig(adapter_len=P, adapter_layers=2, task_type="CAUSAL_LM")
        assert distance(peft.get_peft_model(model, config)(ids).logits, bare) > 0.01
