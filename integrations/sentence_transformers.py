"""sentence-transformers: prompts in embedding models, cross-encoders and sparse encoders.

A sentence model is a `SentenceTransformer`, `CrossEncoder` or `SparseEncoder`. The prompt is attached to its inner transformers
model (`model.transformers_model`); pooling and all later modules get only the hidden states of the text. `SentencePromptCallback`
trains the prompt with the library's trainers and losses, and freezes everything else; without a Trainer, call `attach`.
`softhooks.disabled` and `activate` accept the sentence model.

`model.save_pretrained` and `trainer.save_model` write the whole model with its prompt. `load(folder)` reads it, and so does
`SentenceTransformer(folder, trust_remote_code=True)`; without the flag, the library refuses modules from other packages. A
Trainer's checkpoints hold only the prompt, and training resumes from them bit for bit; `load_prompt(model, folder)` loads the
prompt of a checkpoint onto the base.

These raise an error: several inner transformers models (Router), a first module other than `Transformer`, backends other than
torch, PEFT adapters, one prompt per row (`rows`), losses with their own parameters (SoftmaxLoss), multi-process pools,
`torch_compile`, FSDP. DDP works. Inputs are padded, never packed. If virtual tokens and text together would need more positions
than the model has, the text is truncated to fewer tokens than without a prompt.

Versions tested: sentence-transformers 6.2.0

Example:
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from softhooks import PrefixTuning
    from softhooks.integrations.sentence_transformers import SentencePromptCallback, load

    callback, loss = SentencePromptCallback(PrefixTuning(num_virtual_tokens=8)), MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model, args, train_dataset=pairs, loss=loss, callbacks=[callback])
    trainer.train()
    trainer.save_model("prompted")
    embeddings = load("prompted").encode(["a sentence", "another"])
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from softhooks.attach import attach as attach_to_model
from softhooks.errors import CheckpointError, TrainerError
from softhooks.integration_support.checkpoints import CONTAINER
from softhooks.integration_support.training import FrozenRecord, SoftPromptCallback, fsdp_plugin
from softhooks.load import load as load_onto_model
from softhooks.method import Method
from softhooks.prompt import SoftPrompt

from ._imports import create_at_first_use
from ._sentence_transformers import (
    FAMILIES,
    KIND,
    prompted_transformer,
    refuse_checkpoint,
    sentence_library,
    transformer_of,
    wrap_sentence_model,
)

__all__ = ["SentencePromptCallback", "attach", "load", "load_prompt"]


# --- without a Trainer ------------------------------------------------------------------------------------------------


def attach(model: Any, method: Method, name: str = "default", **options: Any) -> SoftPrompt:
    """Attach a prompt to a sentence model and freeze everything else in it.

    Args:
        model: a `SentenceTransformer`, `CrossEncoder` or `SparseEncoder`.
        method, name, options: as in `softhooks.attach`.

    Raises:
        AttachError: the prompt cannot be attached. The model is unchanged.
    """
    transformer = transformer_of(model)
    prompt = attach_to_model(transformer.model, method, name, **options)
    wrap_sentence_model(model)
    return prompt


def load_prompt(model: Any, path: str | Path, name: str = "default", **options: Any) -> SoftPrompt:
    """Load a saved prompt onto a sentence model.

    Args:
        model: the sentence model that the prompt was trained on, without prompts.
        path: a Trainer's checkpoint, a saved sentence model with a prompt, or a Hub id.
        name, options: as in `softhooks.load`.

    Raises:
        CheckpointError, PromptMismatchError, AttachError: as in `softhooks.load`. The model is unchanged.
    """
    prompt = load_onto_model(transformer_of(model).model, path, name, **options)
    wrap_sentence_model(model)
    return prompt


def load(folder: str | Path, **options: Any) -> Any:
    """Load a sentence model that was saved with its prompt.

    Args:
        folder: a directory that `model.save_pretrained` or `trainer.save_model` wrote. No code from this directory is run.
        options: arguments of `SentenceTransformer`, `CrossEncoder` or `SparseEncoder`, whichever was saved.

    Raises:
        CheckpointError: the directory has no sentence model with a prompt.
    """
    library, folder = sentence_library(), Path(folder)
    refuse_checkpoint(folder)
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        family = json.loads((folder / "config_sentence_transformers.json").read_bytes()).get("model_type")
        kinds = [module["type"] for module in modules]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} contains no sentence model: {error}.") from error
    if KIND not in kinds or family not in FAMILIES:
        raise CheckpointError(
            f"{folder} contains a sentence model without a prompt.",
            "Load it with sentence-transformers itself.",
            model=family,
            modules=", ".join(map(str, kinds)),
        )
    classes = {KIND: prompted_transformer()}
    return getattr(library, family)._load_with_module_classes(str(folder), classes, **options)


# --- with a Trainer ---------------------------------------------------------------------------------------------------


class SentencePromptCallback(SoftPromptCallback):
    """Trains a prompt with a `SentenceTransformerTrainer`, `CrossEncoderTrainer` or `SparseEncoderTrainer`.

    Arguments and attributes are the same as for `SoftPromptCallback`.

    Raises:
        UnsupportedModelError, TrainerError: the model or a setting does not work with a prompt; raised when the Trainer is
            created, or before its first step.
    """

    _around: FrozenRecord | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the prompt to the inner transformers model."""
        model = kwargs["model"]
        inner = transformer_of(model).model
        _refuse_arguments(args)
        super().on_init_end(args, state, control, **{**kwargs, "model": inner})
        wrap_sentence_model(model)

    def on_model_init(self, args: Any, control: Any, model: Any, trial: Any) -> None:
        """Attach the prompt to the transformers model inside the sentence model that `model_init` returned."""
        super().on_model_init(args, control, transformer_of(model).model, trial)
        wrap_sentence_model(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the model and the optimizer of this run."""
        model = kwargs["model"]
        inner = transformer_of(model).model
        _refuse_arguments(args)
        _refuse_loss_parameters(kwargs["optimizer"], model)
        super().on_train_begin(args, state, control, **{**kwargs, "model": inner})
        wrap_sentence_model(model)
        if self._saver is not None:
            self._saver.loaded = False  # from now on, `loaded` tells whether the best checkpoint was loaded
        asked = self._frozen_check.asked
        self._around = FrozenRecord(model, lambda name: f".{CONTAINER}." not in name) if asked else None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that only the prompt has changed, and that the best checkpoint was loaded if `args` asks for that."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and self._saver is not None and not self._saver.loaded:
            raise TrainerError(
                f"the best checkpoint {best} was not loaded at the end of training.",
                "See the error that the library logged; load the checkpoint with `load_prompt`.",
            )
        super().on_train_end(args, state, control, **kwargs)
        if self._around is not None:
            self._around.verify(kwargs["model"])


def _refuse_arguments(args: Any) -> None:
    found = [name for name in ("torch_compile", "fsdp", "deepspeed") if getattr(args, name, None)]
    if fsdp_plugin() is not None and "fsdp" not in found:
        found.append("fsdp (accelerate's configuration)")
    if found:
        raise TrainerError(
            f"{', '.join(found)} cannot be used with a prompt on a sentence model.",
            "Remove the setting; in several processes, use DDP.",
        )


def _refuse_loss_parameters(optimizer: Any, model: nn.Module) -> None:
    known = {id(parameter) for parameter in model.parameters()}
    groups = getattr(optimizer, "param_groups", [])
    shapes = [list(p.shape) for group in groups for p in group["params"] if p.requires_grad and id(p) not in known]
    if shapes:
        raise TrainerError(
            f"the loss has its own parameters ({len(shapes)} tensors {shapes}), which the library does not save in checkpoints.",
            "Use a loss without parameters, such as MultipleNegativesRankingLoss; to classify, use a CrossEncoder or SetFit.",
        )


# the class that `modules.json` names
__getattr__ = create_at_first_use(__name__, PromptedTransformer=prompted_transformer)
