"""Few-shot classification with P-tuning: a template with virtual tokens, and a word for each class.

python examples/few_shot_p_tuning.py                        # SmolLM2-135M and 16 rows of each class: about two minutes
python examples/few_shot_p_tuning.py --shots 32 --steps 120
"""

# %% [markdown]
# The template puts virtual tokens (`{soft:8}`) around the text and ends with the word to predict (`{mask}`). The verbalizer
# compares only the words of the classes, so the model chooses among them.

# %%
import argparse

from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from softhooks import Layout, PTuning, SoftPromptCallback, Verbalizer
from softhooks.demo.corpus import read_corpus, split
from softhooks.demo.smollm2 import smollm2

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a directory or a Hub id; by default SmolLM2-135M, from its Python package")
parser.add_argument("--shots", type=int, default=16, help="training rows of each class")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--tests", type=int, default=20, help="test rows of each class")
parser.add_argument("--output", default="few-shot-p-tuning")
options = parser.parse_args()
set_seed(0)

# %%
CLASSES = ["email", "http", "logging", "xml"]
model_path = options.model or smollm2(Console()).path
tokenizer = AutoTokenizer.from_pretrained(model_path)
layout = Layout("{soft:8} {text}\nPackage:{soft:2} {mask}")
words = Verbalizer(CLASSES, tokenizer, causal=True)


def encode(rows, per_class):
    """Fill the template with the first rows of each class; the mapper makes labels of the column `label`."""
    chosen = [row for name in CLASSES for row in [row for row in rows if row.package == name][:per_class]]
    fields = Dataset.from_list([{"text": row.text, "label": CLASSES.index(row.package)} for row in chosen])
    return fields.map(layout.mapper(tokenizer, max_length=96, verbalizer=words))


train_rows, test_rows = split(read_corpus().rows, 0.3, seed=0)
train, test = encode(train_rows, options.shots), encode(test_rows, options.tests)

# %%
model = AutoModelForCausalLM.from_pretrained(model_path)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        options.output,
        max_steps=options.steps,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        logging_steps=10,
        report_to="none",
    ),
    train_dataset=train,
    eval_dataset=test,
    processing_class=tokenizer,
    compute_loss_func=words,
    preprocess_logits_for_metrics=words.scores_at_labels,
    callbacks=[SoftPromptCallback(PTuning(layout=layout, tokenizer=tokenizer))],
)
trainer.train()
trainer.save_model(options.output)

# %%
# A row without a class ends where the model predicts the word.
rows = layout.collator(tokenizer, max_length=96, verbalizer=words)([{"text": "Return the sender of the message."}])
batch = {name: values.to(model.device) for name, values in rows.items()}
scores = words.scores(model(**batch).logits, batch["input_ids"], batch["attention_mask"])
print(f"a new text belongs to {CLASSES[int(scores.argmax())]}")
output = trainer.predict(test)
accuracy = (output.predictions.argmax(-1) == words.classes(output.label_ids).numpy()).mean()
print(f"accuracy {accuracy:.3f} on {len(test)} rows, {1 / len(CLASSES):.3f} by chance")
