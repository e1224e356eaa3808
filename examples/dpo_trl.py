"""Preferences with TRL's DPO: answers that name the right package are preferred. The reference needs no second model.

python examples/dpo_trl.py                        # SmolLM2-135M-Instruct: about four minutes on two cores
"""

import argparse

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

from softhooks import PrefixTuning, SoftPromptCallback
from softhooks.demo.corpus import read_corpus, split
from softhooks.demo.smollm2 import smollm2
from softhooks.integrations.trl import reference

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a directory or a Hub id; by default SmolLM2-135M, from its Python package")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--tests", type=int, default=64, help="test rows")
parser.add_argument("--output", default="dpo")
options = parser.parse_args()
set_seed(0)

corpus = read_corpus()


def preference(number, row):
    """A question with the right package as the preferred answer, and another one as the rejected answer."""
    others = [name for name in corpus.labels if name != row.package]
    answers = {"chosen": row.package, "rejected": others[number % len(others)]}
    question = f"To which package of Python's standard library does this belong?\n\n{row.text}"
    return {
        "prompt": [{"role": "user", "content": question}],
        **{kind: [{"role": "assistant", "content": answer}] for kind, answer in answers.items()},
    }


train, test = (
    Dataset.from_list([preference(number, row) for number, row in enumerate(rows)])
    for rows in split(corpus.rows, 0.2, seed=0)
)
model_path = options.model or smollm2(Console()).path
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path)
trainer = DPOTrainer(
    model,
    ref_model=reference(model),  # the same model without its prompt
    args=DPOConfig(
        options.output,
        max_steps=options.steps,
        learning_rate=5e-3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_length=160,
        logging_steps=10,
        report_to="none",
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=train,
    eval_dataset=test.shuffle(seed=0).select(range(min(options.tests, len(test)))),
    processing_class=tokenizer,
    callbacks=[SoftPromptCallback(PrefixTuning(16))],
)
trainer.train()
trainer.save_model(options.output)
print(f"the preferred answer is likelier in {trainer.evaluate()['eval_rewards/accuracies']:.0%} of the test rows")
