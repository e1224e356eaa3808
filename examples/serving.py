"""Serving: one model with a prompt for each user, a batch of requests, and a request for vLLM.

python examples/serving.py                             # SmolLM2-135M with two new prompts: about a minute
python examples/serving.py --prompts run-a run-b       # prompts that other examples have saved
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import softhooks
from softhooks.demo.smollm2 import smollm2
from softhooks.integrations import vllm

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a directory or a Hub id; by default SmolLM2-135M, from its Python package")
parser.add_argument("--prompts", nargs=2, help="two saved prompts; by default, two prompts are trained")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--output", default="serving")
options = parser.parse_args()
set_seed(0)

model_path = options.model or smollm2(Console()).path
tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(model_path)


def train(answer, directory):
    """Train a prompt that answers every request in the same way, so that the effect is easy to see."""
    text = [f"{request}{answer}" for request in REQUESTS]
    batch = tokenizer(text, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with softhooks.attach(model, softhooks.PromptTuning(8)) as prompt:
        optimizer = torch.optim.AdamW(prompt.parameters(), lr=3e-2)
        for _ in range(options.steps):
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        prompt.save_pretrained(directory)
    return directory


REQUESTS = ["Question: is it open?\nAnswer:", "Question: how much is it?\nAnswer:", "Question: who is there?\nAnswer:"]
answers = {"polite": " I am glad you ask.", "short": " No."}
default = [Path(options.output) / name for name in answers]
if not options.prompts:
    default = [train(answer, path) for answer, path in zip(answers.values(), default, strict=True)]
for name, path in zip(answers, options.prompts or default, strict=True):
    softhooks.load(model, path, name=name)

# One batch, another prompt for each row; None is the bare model.
model.eval()
users = ["polite", "short", None]
inputs = tokenizer(REQUESTS, return_tensors="pt", padding=True)
with softhooks.rows(model, users):
    texts = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
for user, row in zip(users, texts, strict=True):
    print(f"{user}: {tokenizer.decode(row[inputs['input_ids'].shape[1] :], skip_special_tokens=True)!r}")

# vLLM and SGLang accept the embeddings of prompt and text; start vLLM with --enable-prompt-embeds.
softhooks.activate(model, "polite")
rows = vllm.embeddings(model, REQUESTS[0], tokenizer)
body = vllm.request("the/base-model", rows, max_tokens=16, temperature=0)
(Path(options.output) / "request.json").write_text(json.dumps(body), encoding="utf-8")
print(f"a request with {rows.shape[0]} embeddings for vLLM is in {options.output}/request.json")
