"""A user's project, as the README shows it; type checkers must accept it in strict mode."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import softhooks
from softhooks import (
    CheckpointError,
    Layout,
    PrefixTuning,
    PromptEnsemble,
    PromptTuning,
    PTuning,
    SoftHooksError,
    SoftPrompt,
    SoftPromptCallback,
)


def train(model: LlamaForCausalLM, loader: Iterable[dict[str, Tensor]]) -> SoftPrompt:
    """The README's training loop."""
    with softhooks.attach(model, PrefixTuning(num_virtual_tokens=16)) as prompt:
        optimizer = torch.optim.AdamW(prompt.parameters(), lr=5e-3)
        for batch in loader:
            loss: Tensor = model(**batch).loss
            loss.backward()  # pyright: ignore[reportUnknownMemberType]: torch does not annotate it
            optimizer.step()  # pyright: ignore[reportUnknownMemberType]: as above
            optimizer.zero_grad()
        tensors: int = prompt.verify_frozen().tensors
        print(tensors, f"{prompt.num_parameters:,}", prompt.name)
        prompt.save_pretrained("sst2-prefix")
    return prompt


def train_with_a_trainer(model: LlamaForCausalLM, data: Dataset[dict[str, Tensor]]) -> None:
    """The README's Trainer script."""
    callback = SoftPromptCallback(PromptTuning(num_virtual_tokens=20))
    trainer = Trainer(model=model, args=TrainingArguments("out"), train_dataset=data, callbacks=[callback])
    trainer.train()
    found: SoftPrompt | None = callback.soft_prompt
    if found is not None:
        embeddings: Tensor = found.embeddings()
        print(embeddings.shape)


@softhooks.tune(PTuning(layout=Layout("{soft:3} {text}"), encoder="none"), save_to="tuned")
def tuned(model: LlamaForCausalLM, steps: int, *, soft_prompt: SoftPrompt) -> float:
    """The README's decorator."""
    return float(sum(parameter.numel() for parameter in soft_prompt.parameters()) * steps)


def use(model: LlamaForCausalLM, folder: Path, batch: dict[str, Tensor]) -> Tensor | None:
    """Load prompts and choose among them."""
    try:
        prompt = softhooks.load(model, folder, name="en", strict=False)
        softhooks.load(model, str(folder), name="de")
    except CheckpointError as error:
        print(error)
        return None
    except SoftHooksError:
        raise
    with softhooks.rows(model, ["en", "de", None]):
        logits: Tensor = model(**batch).logits
    with softhooks.disabled(model):
        model(**batch)
    ensemble = PromptEnsemble(model, ["en", "de"])
    print(ensemble, prompt.is_attached)
    prompt.remove()
    return logits


def main() -> None:
    """Run it."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    answer: float = tuned(model, 3)
    print(train(model, []), answer, softhooks.__version__)


if __name__ == "__main__":
    main()
