"""Chat fine-tuning with TRL: the assistant answers with the name of a package; only the prompt is trained.

python examples/chat_sft_trl.py                        # SmolLM2-135M-Instruct: about four minutes on two cores
python examples/chat_sft_trl.py --model Qwen/Qwen3-0.6B
"""

import argparse

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from softhooks import PrefixTuning, SoftPromptCallback
from softhooks.demo.corpus import read_corpus, split
from softhooks.demo.smollm2 import smollm2

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a directory or a Hub id; by default SmolLM2-135M, from its Python package")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--tests", type=int, default=40, help="test rows")
parser.add_argument("--output", default="chat-sft")
options = parser.parse_args()
set_seed(0)


def chat(row):
    """Turn a row of the corpus into a question and an answer; TRL computes the loss on the answer."""
    question = f"To which package of Python's standard library does this belong?\n\n{row.text}"
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row.package}],
    }


train_rows, test_rows = split(read_corpus().rows, 0.2, seed=0)
model_path = options.model or smollm2(Console()).path
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path)
trainer = SFTTrainer(
    model,
    args=SFTConfig(
        options.output,
        max_steps=options.steps,
        learning_rate=5e-3,
        per_device_train_batch_size=8,
        max_length=160,
        logging_steps=10,
        report_to="none",
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list([chat(row) for row in train_rows]),
    processing_class=tokenizer,
    callbacks=[SoftPromptCallback(PrefixTuning(16))],
)
trainer.train()
trainer.save_model(options.output)

model.eval()
right = 0
for row in test_rows[:: max(1, len(test_rows) // options.tests)]:
    inputs = tokenizer.apply_chat_template(
        chat(row)["prompt"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs.to(model.device), max_new_tokens=6, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    right += tokenizer.decode(answer, skip_special_tokens=True).strip() == row.package
print(
    f"{right} of {len(test_rows[:: max(1, len(test_rows) // options.tests)])} test rows answered with the right package"
)
