"""Models with prompts, what transformers answers with them, and the exported prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import softhooks
from softhooks import Cartridge, ContextTuning, PrefixTuning, PromptTuning, PTuning, PTuningV2
from softhooks.integrations import vllm

VOCABULARY = 512
NEW = 10
"""The number of tokens of an answer."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOWS = {
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 32,
}
CONFIGS: dict[str, tf.PretrainedConfig] = {
    "llama": tf.LlamaConfig(**SIZES),
    "qwen3": tf.Qwen3Config(**SIZES),
    "qwen2": tf.Qwen2Config(**SIZES),
    "mistral": tf.MistralConfig(**{**SIZES, "sliding_window": 64}),
    "granite": tf.GraniteConfig(**SIZES, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.1),
    "phi3": tf.Phi3Config(**SIZES),
    "gemma2": tf.Gemma2Config(**{**SIZES, **_WINDOWS}),
    "gemma3": tf.Gemma3TextConfig(**{**SIZES, **_WINDOWS}),
}


@dataclass
class Answer:
    """What transformers generates after a text: the tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


@dataclass
class Prompted:
    """A saved model, its answers with each prompt (or with none) to each text, and prompt and text as embeddings."""

    model: str
    prompts: Path
    answers: dict[tuple[str | None, tuple[int, ...]], Answer] = field(default_factory=dict)
    rows: dict[tuple[str, tuple[int, ...]], torch.Tensor] = field(default_factory=dict)


def methods(windowed: bool) -> dict[str, softhooks.Method]:
    """One prompt per method, of lengths that are and are not multiples of a block."""
    return {
        "prefix": PrefixTuning(5),
        "mlp": PrefixTuning(40, projection=True, hidden_size=16),
        "p-tuning-v2": PTuningV2(70, windowed=windowed),
        "cartridge": Cartridge(33, document=list(range(10, 60))),
        "context": ContextTuning(demonstrations=[list(range(100, 120)), list(range(130, 137))]),
        "soft": PromptTuning(32),
        "p-tuning": PTuning(9),
    }


def texts(model: Any, lengths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Random texts of the given lengths."""
    drawn = torch.Generator().manual_seed(1)
    limit = min(model.config.vocab_size, VOCABULARY)
    return [tuple(torch.randint(3, limit, (n,), generator=drawn).tolist()) for n in lengths]


def answer(model: Any, text: tuple[int, ...]) -> Answer:
    """Generate greedily with transformers."""
    row = torch.tensor([text])
    out = model.generate(
        row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=NEW,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    new = out.sequences[0, len(text) :].tolist()
    scores = [torch.log_softmax(score[0].float(), -1) for score in out.scores]
    return Answer(new, [float(score[token]) for score, token in zip(scores, new, strict=True)])


def prepare(model: Any, folder: Path, lengths: tuple[int, ...] = (1, 7, 33, 90), noise: float = 0.5) -> Prompted:
    """Save a model, and its prompts as `softhooks export` writes them; compute the answers with transformers.

    `noise` is added to the initial prompts, relative to the mean of their absolute values.
    """
    torch.manual_seed(0)
    model.eval().save_pretrained(folder / "model")
    made = Prompted(str(folder / "model"), folder / "prompts")
    given = texts(model, lengths)
    for name, method in methods(windowed=bool(getattr(model.config, "sliding_window", None))).items():
        with softhooks.attach(model, method, name=name) as prompt, torch.no_grad():
            for parameter in prompt.encoder.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.abs().mean(), alpha=noise)
            vllm.export(model, made.prompts, name)
            made.answers |= {(name, text): answer(model, text) for text in given}
            if method.enters == "embeddings":
                made.rows |= {(name, text): vllm.embeddings(model, list(text)) for text in given}
    made.answers |= {(None, text): answer(model, text) for text in given}
    assert (
        len({tuple(found.tokens) for found in made.answers.values()}) > len(made.answers) * 0.9
    )  # every prompt matters
    assert sum(min(found.logprobs) < -0.5 for found in made.answers.values()) > len(made.answers) / 2
    return made


def tiny(kind: str) -> Any:
    """A tiny model with random weights, computed as vLLM computes it (Gemma 2 caps its attention logits, SDPA does not)."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation="eager").float()
    if kind.startswith("gemma"):  # whose output repeats the input if the embeddings, which it scales, are large
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(0.1)
            model.model.norm.weight.add_(9)
    return model
