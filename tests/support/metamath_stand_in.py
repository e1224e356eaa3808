"""A stand-in for the model and the data of `benchmarks.metamath`."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

QUERY = "Tom has {} apples and buys {}. How many apples has he?"


def write_model(folder: Path) -> Path:
    """Write a tiny random Llama whose tokens are characters."""
    words = {word: number for number, word in enumerate(["<bos>", "<eos>", *map(chr, range(32, 127)), "\n"])}
    tokens = Tokenizer(models.WordLevel(words, unk_token=" "))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokens.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_data(folder: Path, count: int = 20) -> Path:
    """Write additions in the formats of MetaMathQA and GSM8K; all have different lengths or numbers."""
    sums = [(3 ** (row % 8), 7 * row) for row in range(count)]
    metamath = [{"query": QUERY.format(a, b), "response": f"{a} + {b}.\nThe answer is: {a + b}"} for a, b in sums]
    gsm8k = [{"question": QUERY.format(a, b), "answer": f"<<{a}+{b}={a + b}>>\n#### {a + b}"} for a, b in sums]
    wikipedia = [{"text": text} for text in ("A town.", "A river in the north.", "The year 1900 was a common year.")]
    files = {"metamath": metamath, "gsm8k-train": gsm8k[:8], "gsm8k-test": gsm8k[8:14], "wiki": wikipedia}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder
