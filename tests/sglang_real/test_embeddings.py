"""SGLang with input embeddings: a prompt that consists of words gets the answer that the same server gives for the words' ids."""

from __future__ import annotations

from pathlib import Path

import prompted
import pytest
import tokens
import torch
import transformers as tf
from served import GREEDY, answer_in, serving

import softhooks
from softhooks import PromptTuning
from softhooks.integrations import sglang

KINDS = ["llama", "qwen3", "gemma", "gemma2", "gemma3", "granite"]
prompted.CONFIGS["gemma"] = tf.GemmaConfig(**prompted.SIZES)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_words(kind: str, tmp_path: Path) -> None:
    """The server computes in bfloat16, to which SGLang converts embeddings; a wrong factor changes answers by more than 0.3."""
    model = prompted.tiny(kind).bfloat16().eval()
    if kind == "gemma2":
        model.config.hidden_act = model.config.hidden_activation  # as in Google's files; SGLang reads it
    model.save_pretrained(tmp_path / "model")
    tokens.merged().save_pretrained(tmp_path / "model")
    words, *texts = prompted.texts(model, (6, 3, 20, 70))
    with softhooks.attach(model, PromptTuning(len(words))) as prompt, torch.no_grad():
        [parameter] = prompt.encoder.parameters()
        parameter.copy_(model.get_input_embeddings()(torch.tensor(words)))
        rows = [sglang.embeddings(model, list(text)) for text in texts]
    options = ("--disable-radix-cache", "--dtype", "bfloat16")
    with serving(str(tmp_path / "model"), tmp_path, *options) as server:
        for text, given in zip(texts, rows, strict=True):
            found = answer_in(server.post(**sglang.request(given, sampling_params=GREEDY, return_logprob=True)))
            own = server.answer(None, (*words, *text))
            assert found.logprobs[0] == pytest.approx(own.logprobs[0], abs=0.1)
            assert found.tokens[0] == own.tokens[0]
