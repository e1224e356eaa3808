"""Context-aware prompt tuning (CPT): start from in-context learning, and train the embeddings of the examples.

python examples/cpt.py                        # SmolLM2-135M, four examples of each class: about a minute
python examples/cpt.py --shots 8 --seed 1     # more examples, and others
"""

import argparse
import random

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed

import softhooks
from softhooks.demo.corpus import read_corpus, split
from softhooks.demo.smollm2 import smollm2

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a directory or a Hub id; by default SmolLM2-135M, from its Python package")
parser.add_argument("--shots", type=int, default=4, help="examples of each class")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--tests", type=int, default=30, help="test rows of each class")
parser.add_argument("--seed", type=int, default=0, help="which rows are examples, and which are test rows")
parser.add_argument("--output", default="cpt")
options = parser.parse_args()
set_seed(options.seed)

CLASSES = ["asyncio", "tkinter"]
model_path = options.model or smollm2(Console()).path
tokenizer = AutoTokenizer.from_pretrained(model_path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(model_path)


def draw(rows, count):
    """Draw short rows of each class, and list the classes in turn, as the fields of the template."""
    short = [[row for row in rows if row.package == name and len(row.text) < 80] for name in CLASSES]
    drawn = [random.sample(rows, count) for rows in short]
    return [{"text": row.text, "label": row.package} for turn in zip(*drawn, strict=True) for row in turn]


train_rows, test_rows = split(read_corpus().rows, 0.3, seed=0)
shots, tests = draw(train_rows, options.shots), draw(test_rows, options.tests)
# The default bounds are those of a large model. This model is small, and its embeddings must move further to change its answers.
method = softhooks.ContextAwarePromptTuning(
    examples=shots,
    template="Text: {text}\nTopic: {label}",
    tokenizer=tokenizer,
    leave_one_out=True,
    epsilon_input=1.0,
    epsilon_format=1.0,
)
collate = DataCollatorForSeq2Seq(tokenizer)
batch = collate([method.render(shot) for shot in shots])  # the examples themselves, with the column `example_ids`
words = softhooks.Verbalizer(CLASSES, tokenizer, causal=True)


@torch.no_grad()
def accuracy():
    """The share of test rows whose package is the likelier of the classes."""
    model.eval()
    unlabeled = collate([method.render({"text": row["text"]}) for row in tests])
    best = words.scores(model(**unlabeled).logits, unlabeled["input_ids"], unlabeled["attention_mask"]).argmax(-1)
    return sum(CLASSES[found] == row["label"] for found, row in zip(best, tests, strict=True)) / len(tests)


with softhooks.attach(model, method) as prompt:
    print(f"accuracy {accuracy():.3f} by in-context learning")
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=3e-3)
    model.train()  # the loss of CPT is computed in training mode only
    for step in range(options.steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    print(f"accuracy {accuracy():.3f} after training")
    prompt.save_pretrained(options.output)
