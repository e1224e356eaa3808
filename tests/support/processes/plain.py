"""A Trainer script without any softhooks code."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as tf


@dataclass
class ScriptArguments:
    rows: int = 8
    trainers: int = 1


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 64, (6,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def build() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def main() -> None:
    own, args = tf.HfArgumentParser((ScriptArguments, tf.TrainingArguments)).parse_args_into_dataclasses()
    for number in range(own.trainers):
        trainer = tf.Trainer(model=build(), args=args, train_dataset=rows(own.rows))
        trainer.train()
        trainer.save_model(f"{args.output_dir}/saved{number or ''}")


if __name__ == "__main__":
    main()
