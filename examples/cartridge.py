"""A cartridge of a document: keys and values that replace a module's documentation, trained on questions of the model itself.

python examples/cartridge.py                        # SmolLM2-135M and the documentation of `logging`: about two minutes
python examples/cartridge.py --module argparse --questions 32
"""

# %% [markdown]
# The model reads the document, asks itself questions about it, and answers them. A cartridge of far fewer virtual tokens is then
# trained to give the same answers without the document.

# %%
import argparse
import copy
import importlib
import inspect
import itertools

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import softhooks
from softhooks.demo.smollm2 import smollm2

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a directory or a Hub id; by default SmolLM2-135M, from its Python package")
parser.add_argument("--module", default="logging", help="the module whose classes are the document")
parser.add_argument("--document-tokens", type=int, default=500)
parser.add_argument("--tokens", type=int, default=50, help="the number of virtual tokens")
parser.add_argument("--questions", type=int, default=12)
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--output", default="cartridge")
options = parser.parse_args()
set_seed(0)

# %%
model_path = options.model or smollm2(Console()).path
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path)
module = importlib.import_module(options.module)
parts = {name: inspect.getdoc(item) for name, item in inspect.getmembers(module) if inspect.isclass(item)}
text = "\n\n".join(f"{name}: {part}" for name, part in parts.items())
document = tokenizer(text, add_special_tokens=False)["input_ids"][: options.document_tokens]
with torch.no_grad():
    read = model(torch.tensor([document])).past_key_values  # the keys and values of the document

# %% [markdown]
# Self-made questions and answers: the model reads the document, ends a question about one of its classes, and answers it.


# %%
def read_and_write(text, tokens):
    """The line that the model writes behind the document and a text."""
    start = torch.tensor([document + tokenizer(text, add_special_tokens=False)["input_ids"]])
    sampling = {"do_sample": True, "temperature": 0.7, "pad_token_id": 0}
    written = model.generate(start, past_key_values=copy.deepcopy(read), max_new_tokens=tokens, **sampling)
    return tokenizer.decode(written[0, start.shape[1] :], skip_special_tokens=True).strip().split("\n")[0]


rows = []
for _, name in zip(range(options.questions), itertools.cycle(parts), strict=False):
    question = f"\n\nQuestion: What does {name} " + read_and_write(f"\n\nQuestion: What does {name}", 12)
    answer = read_and_write(f"{question}\nAnswer:", 40)
    rows.append(tokenizer(f"{question}\nAnswer: {answer}", add_special_tokens=False, return_tensors="pt")["input_ids"])
    print(f"{question.strip()} | {answer}")

# %%
method = softhooks.Cartridge(min(options.tokens, len(document)), document=document)
with softhooks.attach(model, method) as prompt, softhooks.kept(model):  # the document is read only once
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=2e-2)
    model.train()
    for step in range(options.epochs * len(rows)):
        ids = rows[step % len(rows)]
        loss = model(ids, labels=ids).loss  # the distance from the model with the document
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: KL divergence {loss.item():.3f}")
    prompt.save_pretrained(options.output)
print(f"{method.num_virtual_tokens} virtual tokens instead of {len(document)} tokens")
