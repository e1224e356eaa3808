"""Text classification with the Trainer: to which package of Python's standard library does a docstring belong?

python examples/text_classification.py                        # MiniLM and P-tuning v2: about two minutes on two cores
python examples/text_classification.py --model bert-base-cased --method prefix
"""

# %% [markdown]
# The callback is the only line that a soft prompt adds to this script: the encoder stays frozen, and the Trainer trains,
# saves and restores the prompt and the new head.

# %%
import argparse

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import softhooks
from softhooks.demo.corpus import read_corpus, split
from softhooks.demo.models import minilm

METHODS = {"p-tuning-v2": softhooks.PTuningV2, "prefix": softhooks.PrefixTuning, "prompt": softhooks.PromptTuning}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a directory or a Hub id; by default MiniLM, from its Python package")
parser.add_argument("--method", choices=METHODS, default="p-tuning-v2")
parser.add_argument("--tokens", type=int, default=16, help="the number of virtual tokens")
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--output", default="text-classification")
options = parser.parse_args()
set_seed(0)

# %% [markdown]
# The data: the docstrings of the running Python. Training and test rows come from different source files.

# %%
corpus = read_corpus()
model_path = options.model or minilm().path
tokenizer = AutoTokenizer.from_pretrained(model_path)


def encode(rows):
    """Tokenize rows of the corpus."""
    columns = tokenizer([row.text for row in rows], truncation=True, max_length=96)
    return Dataset.from_dict({**columns, "labels": [corpus.labels.index(row.package) for row in rows]})


train, test = (encode(rows) for rows in split(corpus.rows, 0.2, seed=0))
print(f"{len(train)} training rows, {len(test)} test rows, {len(corpus.labels)} packages")

# %%
names = dict(enumerate(corpus.labels))
model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=len(names), id2label=names)
callback = softhooks.SoftPromptCallback(METHODS[options.method](options.tokens))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        options.output, max_steps=options.steps, learning_rate=1e-2, per_device_train_batch_size=32, report_to="none"
    ),
    train_dataset=train,
    eval_dataset=test,
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=lambda result: {"accuracy": float(np.mean(result.predictions.argmax(-1) == result.label_ids))},
    callbacks=[callback],
)
trainer.train()
trainer.save_model(options.output)
print(
    f"accuracy {trainer.evaluate()['eval_accuracy']:.3f} with {callback.soft_prompt.num_parameters:,} trained parameters"
)
