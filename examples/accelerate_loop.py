"""Your own loop with accelerate: train, save the state in the middle, and go on from it.

python examples/accelerate_loop.py                             # SmolLM2-135M: about two minutes on two cores
accelerate launch --num_processes 2 examples/accelerate_loop.py
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import softhooks
from softhooks.demo.corpus import read_corpus
from softhooks.demo.smollm2 import smollm2
from softhooks.integrations.accelerate import track

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a directory or a Hub id; by default SmolLM2-135M, from its Python package")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--output", default="accelerate-loop")
options = parser.parse_args()
set_seed(0)

model_path = options.model or smollm2(Console()).path
tokenizer = AutoTokenizer.from_pretrained(model_path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def encode(row):
    """A docstring and its package; the loss covers the package."""
    question = tokenizer(f"{row.text}\nPackage:", truncation=True, max_length=96, add_special_tokens=False)["input_ids"]
    answer = tokenizer(f" {row.package}", add_special_tokens=False)["input_ids"]
    return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}


rows = [encode(row) for row in read_corpus().rows]
loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))

accelerator = Accelerator()
model = AutoModelForCausalLM.from_pretrained(model_path)
prompt = track(accelerator, softhooks.attach(model, softhooks.PrefixTuning(16)))
optimizer = torch.optim.AdamW(prompt.parameters(), lr=5e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)


def run(first, last):
    """Train from one step to another, and return the last loss."""
    model.train()
    batches = iter(loader)
    for step in range(first, last):
        loss = model(**next(batches)).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.3f}")
    return loss.item()


state = Path(options.output) / "state"
run(0, options.steps // 2)
accelerator.save_state(str(state))  # the prompt, the optimizer and the random numbers, not the base model
accelerator.load_state(str(state))  # as a new process would, to go on from here
accelerator.print(f"loss {run(options.steps // 2, options.steps):.3f} at the end")
prompt.verify_frozen()
if accelerator.is_main_process:
    prompt.save_pretrained(options.output)
