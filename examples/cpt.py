"""Context-aware prompt tuning (CPT): start from in-context learning, and train the embeddings of the examples.

python examples/cpt.py                        # SmolLM2-135M, four examples of each class: about three minutes
"""

import argparse

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed

import softhooks
from softhooks.demo.corpus import read_corpus, split
from softhooks.demo.smollm2 import smollm2

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a directory or a Hub id; by default SmolLM2-135M, from its Python package")
parser.add_argument("--shots", type=int, default=4, help="examples of each class")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--tests", type=int, default=20, help="test rows of each class")
parser.add_argument("--output", default="cpt")
options = parser.parse_args()
set_seed(0)

CLASSES = ["email", "unittest", "xml"]
model_path = options.model or smollm2(Console()).path
tokenizer = AutoTokenizer.from_pretrained(model_path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(model_path)


def first_of_each(rows, count):
    """The first short rows of each class, taken in turn, as the fields of the template."""
    short = [[row for row in rows if row.package == name and len(row.text) < 160][:count] for name in CLASSES]
    return [{"text": row.text, "label": row.package} for turn in zip(*short, strict=True) for row in turn]


train_rows, test_rows = split(read_corpus().rows, 0.3, seed=0)
shots, tests = first_of_each(train_rows, options.shots), first_of_each(test_rows, options.tests)
method = softhooks.ContextAwarePromptTuning(
    examples=shots, template="Text: {text}\nTopic: {label}", tokenizer=tokenizer, leave_one_out=True
)
rows = [method.render(shot) for shot in shots]  # with the column `example_ids`
loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
answers = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"][0] for name in CLASSES]


@torch.no_grad()
def accuracy():
    """The share of test rows whose package is the likeliest of the classes."""
    model.eval()
    right = 0
    with softhooks.kept(model):  # the context is computed once
        for row in tests:
            ids = torch.tensor([method.render({"text": row["text"]})["input_ids"]])
            logits = model(ids).logits[0, -1, answers]
            right += CLASSES[int(logits.argmax())] == row["label"]
    return right / len(tests)


with softhooks.attach(model, method) as prompt:
    print(f"accuracy {accuracy():.3f} by in-context learning")
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=1e-3)
    for epoch in range(options.epochs):
        model.train()  # the loss of CPT is computed in training mode only
        losses = []
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}")
    print(f"accuracy {accuracy():.3f} after training")
    prompt.save_pretrained(options.output)
