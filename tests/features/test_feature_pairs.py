"""Encoder-decoders that hear or see, and write: prefixes and gated branches in both stacks, generation, and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapters
import features
import oracles
import pytest
import torch
import transformers as tf
from datasets import Dataset
from test_feature_models import CLOSE, HEADS, LAYERS, METHODS, P, answer, attentions, louder
from torch import Tensor
from untouched import untouched

import softhooks
from softhooks import LlamaAdapter, PrefixTuning, SoftPrompt, SoftPromptCallback

PAIRS = list(features.MODELS_OF_PAIRS)
SDPA = [name for name in PAIRS if name != "speech2text"]
"""Speech2Text has no attention by torch's function, in which the formulas are put."""


def tables_of(prompt: SoftPrompt) -> dict[str, Tensor]:
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in prompt.encoder.named_parameters()}


def three_prefixes(tables: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of each call: the encoder's layers, and then self- and cross-attention in turn."""
    cut = {}
    for group, table in tables.items():
        parts = table.reshape(P, LAYERS, 2, HEADS, 8)
        cut[group] = [
            (parts[:, n, 0].transpose(0, 1)[None], parts[:, n, 1].transpose(0, 1)[None]) for n in range(LAYERS)
        ]
    both = [pair for layer in zip(cut["decoder"], cut["cross"], strict=True) for pair in layer]
    return [*cut["encoder"], *both]


@pytest.mark.parametrize("name", SDPA)
def test_three_prefixes_equal_keys_and_values_added_by_hand(name: str) -> None:
    model, call = features.build_pair(name), features.pair_batch(name)
    prompt = louder(softhooks.attach(model, PrefixTuning(P)))
    found = answer(model, call)
    found.square().sum().backward()
    tables = tables_of(prompt)
    with softhooks.disabled(model), oracles.patched_attention(three_prefixes(tables)):
        expected = answer(model, call)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected, **CLOSE)
    for group, table in prompt.encoder.named_parameters():
        assert table.grad is not None
        scale = float(table.grad.abs().max())
        torch.testing.assert_close(table.grad, tables[group].grad, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("name", SDPA)
def test_gated_branches_equal_the_formula(name: str) -> None:
    model, call = features.build_pair(name), features.pair_batch(name)
    prompt = louder(softhooks.attach(model, LlamaAdapter(P)))
    found = answer(model, call)
    tables = dict(prompt.encoder.named_parameters())
    branches: list[Any] = []
    for stack in prompt.structure.stacks:
        rows = tables[f"{stack.name}_prompts"].view(LAYERS, P, -1)
        gates = tables[f"{stack.name}_gates"].view(LAYERS, HEADS).tanh()
        own = [site.module for site in stack.sites_of("self")]
        assert [module for module in attentions(stack.module) if module in own] == own
        for module, prompts, gate in zip(own, rows, gates, strict=True):
            keys, values = adapters.project(module, prompts)
            branches.append((keys[None], values[None], gate))
            branches += [None] * (stack.name == "decoder")
    with softhooks.disabled(model), adapters.patched(branches):
        expected = answer(model, call)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_nothing_of_the_model_changes(name: str, method: softhooks.Method) -> None:
    model, call = features.build_pair(name), features.pair_batch(name)
    with torch.no_grad():
        before = answer(model, call)
    with untouched(model), softhooks.attach(model, method) as prompt:
        optimizer = torch.optim.SGD(prompt.parameters(), lr=0.1)
        answer(model, call).square().mean().backward()
        optimizer.step()
        prompt.verify_frozen()
    with torch.no_grad():
        assert torch.equal(answer(model, call), before)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("method", [PrefixTuning(P), LlamaAdapter(P)], ids=str)
@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generated_tokens_are_those_of_forwards_without_a_cache(
    name: str, method: softhooks.Method, options: dict[str, Any]
) -> None:
    """Greedy search step by step; beams equal those without a cache."""
    model, call = features.build_pair(name), features.pair_batch(name)
    louder(softhooks.attach(model, method))
    argument = next(iter(call))
    found = model.generate(call[argument], max_new_tokens=6, do_sample=False, **options)
    if options.get("num_beams") == 3:
        expected = model.generate(call[argument], max_new_tokens=6, do_sample=False, use_cache=False, **options)
    else:
        expected = torch.full((2, 1), 1)
        for _ in range(6):
            logits = answer(model, {argument: call[argument], "decoder_input_ids": expected})
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found[:, -6:], expected[:, -6:])
    with softhooks.disabled(model):
        bare = model.generate(call[argument], max_new_tokens=6, do_sample=False)
    assert not torch.equal(bare, found)


def timed_whisper() -> Any:
    """A Whisper with languages, tasks and timestamps, as its multilingual checkpoints have."""
    model = features.build_pair("whisper")
    config = model.generation_config
    config.is_multilingual, config.lang_to_id = True, {"<|en|>": 60, "<|de|>": 61}
    config.task_to_id = {"transcribe": 62, "translate": 63}
    config.no_timestamps_token_id, config.prev_sot_token_id = 69, 64
    config.max_initial_timestamp_index, config.alignment_heads = 4, [[0, 0]]
    config.eos_token_id, config.decoder_start_token_id, config.max_length = 2, 1, 30
    config.begin_suppress_tokens = config.suppress_tokens = None
    return model


WANTED = {"language": "de", "task": "transcribe", "return_timestamps": True, "max_new_tokens": 10, "do_sample": False}


def test_a_closed_gate_leaves_languages_and_timestamps_alone() -> None:
    model, call = timed_whisper(), features.pair_batch("whisper")
    bare = model.generate(call["input_features"], **WANTED)
    with softhooks.attach(model, LlamaAdapter(P)):
        assert torch.equal(model.generate(call["input_features"], **WANTED), bare)


@pytest.mark.parametrize("method", [PrefixTuning(P), LlamaAdapter(P)], ids=str)
@pytest.mark.parametrize("language", ["en", "de"])
def test_whisper_writes_after_its_special_tokens_what_forwards_predict(method: softhooks.Method, language: str) -> None:
    """The tokens after start, language, task and the mark for text without timestamps."""
    model, call = timed_whisper(), features.pair_batch("whisper")
    louder(softhooks.attach(model, method))
    found = model.generate(
        call["input_features"], language=language, task="translate", max_new_tokens=6, do_sample=False
    )
    special = [1, model.generation_config.lang_to_id[f"<|{language}|>"], 63, 69]
    tokens = torch.tensor([special]).expand(2, -1)
    for _ in range(6):
        logits = answer(model, {"input_features": call["input_features"], "decoder_input_ids": tokens})
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found[:, :6], tokens[:, -6:])


@pytest.mark.parametrize("method", [PrefixTuning(P), LlamaAdapter(P)], ids=str)
def test_long_sound_is_written_window_by_window(method: softhooks.Method) -> None:
    """Each window of 40 frames is transcribed with the prompt, as it is alone."""
    model = timed_whisper()
    louder(softhooks.attach(model, method))
    sound = torch.randn(1, 8, 100, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(1, 100, dtype=torch.long)
    found = model.generate(sound, attention_mask=mask, return_segments=True, **WANTED)
    alone = model.generate(sound[:, :, :40], return_segments=True, **WANTED)
    first, only = found["segments"][0][0], alone["segments"][0][0]
    assert torch.equal(first["tokens"], only["tokens"])
    assert found["segments"][0][-1]["end"] > only["end"]
    with softhooks.disabled(model):
        bare = model.generate(sound, attention_mask=mask, return_segments=True, **WANTED)
    assert not torch.equal(bare["sequences"], found["sequences"])


@pytest.mark.parametrize("method", METHODS[:3], ids=str)
def test_reentrant_checkpoints_give_the_same_gradients(method: softhooks.Method) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = features.build_pair("whisper")
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        prompt = louder(softhooks.attach(model, method))
        model.train()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        prompt.encoder.eval()
        torch.manual_seed(4)
        answer(model, features.pair_batch("whisper")).square().sum().backward()
        gradients.append([parameter.grad for parameter in prompt.encoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)


# --- training ---------------------------------------------------------------------------------------------------------


def test_whisper_in_a_seq2seq_trainer(tmp_path: Path) -> None:
    """Trained with the callback, evaluated by generation, saved, and loaded onto a fresh model, which generates the same."""
    model, callback = features.build_pair("whisper"), SoftPromptCallback(PrefixTuning(P))
    rows = features.pair_batch("whisper", 8)["input_features"]
    dataset = Dataset.from_list([{"input_features": row.tolist(), "labels": [7, 8, 9]} for row in rows]).with_format(
        "torch"
    )
    arguments = tf.Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=8, per_device_train_batch_size=4,
        learning_rate=3e-2, logging_steps=1, save_strategy="no", predict_with_generate=True, generation_max_length=6,
    )  # fmt: skip
    trainer = tf.Seq2SeqTrainer(
        model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset, callbacks=[callback]
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    prompt = callback.soft_prompt
    assert prompt is not None
    prompt.verify_frozen()
    predicted = trainer.predict(dataset).predictions
    prompt.save_pretrained(tmp_path / "prompt")
    fresh = features.build_pair("whisper")
    with softhooks.load(fresh, tmp_path / "prompt"):
        found = fresh.generate(rows, max_length=6)
    assert (found.numpy() == predicted[:, : found.shape[1]]).all()


def test_methods_that_need_words_are_refused() -> None:
    model = features.build_pair("whisper")
    with (
        untouched(model),
        pytest.raises(softhooks.UnsupportedMethodError, match=r"`input_features` instead of token ids"),
    ):
        softhooks.attach(model, softhooks.PromptTuning(P))
    with untouched(model), pytest.raises(softhooks.OptionError, match="init_ids is given"):
        softhooks.attach(model, PrefixTuning(P, init_ids=[3, 4]))
