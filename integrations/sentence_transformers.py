"""Soft prompts in sentence-transformers: embedding models, cross-encoders and sparse encoders.

The prompt stands on the transformers model inside (`model.transformers_model`); pooling, normalization and all that follows see
the text alone. `SentencePromptCallback` trains it with the library's trainers and losses; everything else in the model stays as
it is. `attach` puts a prompt on without a Trainer; `softhooks.disabled` and `activate` take the sentence model itself.

What `model.save_pretrained` and `trainer.save_model` write is a whole model with its prompt, of which `modules.json` says that it
needs softhooks: `load(folder)` reads it, and so does `SentenceTransformer(folder, trust_remote_code=True)`, which the library
asks for whenever a module is not its own; without that it raises. A Trainer's checkpoints hold the prompt alone; they resume bit
for bit, and `load_prompt(model, folder)` puts one on its base.

Refused by name: several transformers models in one (Router), other first modules than `Transformer`, backends other than torch,
adapters of PEFT, one prompt a row (`rows`: the library sorts texts), losses with weights of their own (SoftmaxLoss), pools of
processes, `torch_compile`, FSDP; DDP trains as one process does. Inputs are padded even where the library would pack them for
flash attention, and texts are cut earlier where slots need positions.

Versions tested: sentence-transformers 6.2.0

Example:
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from softhooks import PrefixTuning
    from softhooks.integrations.sentence_transformers import SentencePromptCallback, load

    trainer = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=pairs,
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[SentencePromptCallback(PrefixTuning(num_virtual_tokens=8))],
    )
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
from softhooks.errors import (
    CheckpointError,
    TrainerError,
)
from softhooks.integration_support.checkpoints import CONTAINER
from softhooks.integration_support.training import FrozenRecord, SoftPromptCallback, fsdp_plugin
from softhooks.load import load as load_onto_model
from softhooks.method import Method
from softhooks.prompt import SoftPrompt

from ._inner_model import refuse_bare
from ._sentence_transformers import (
    FAMILIES,
    KIND,
    PROMPTED,
    WHOLE,
    dress,
    prompted_transformer,
    sentence_library,
    transformer_of,
)

__all__ = ["SentencePromptCallback", "attach", "load", "load_prompt"]


# --- without a Trainer ------------------------------------------------------------------------------------------------


def attach(model: Any, method: Method, name: str = "default", **options: Any) -> SoftPrompt:
    """Attach a prompt to a sentence model and freeze everything else in it.

    Args:
        model: a `SentenceTransformer`, `CrossEncoder` or `SparseEncoder`.
        method, name: as in `softhooks.attach`.
        options: as in `softhooks.attach`.

    Raises:
        AttachError: the prompt cannot be attached. The model is as it was.
    """
    transformer = transformer_of(model)
    prompt = attach_to_model(transformer.model, method, name, **options)
    dress(model)
    return prompt


def load_prompt(model: Any, path: str | Path, name: str = "default", **options: Any) -> SoftPrompt:
    """Load a saved prompt onto the sentence model that it was trained on: from a whole model, a checkpoint, or the hub.

    Args:
        model: the base, unmodified.
        path, name, options: as in `softhooks.load`.

    Raises:
        CheckpointError, PromptMismatchError, AttachError: as in `softhooks.load`. The model is as it was.
    """
    prompt = load_onto_model(transformer_of(model).model, path, name, **options)
    dress(model)
    return prompt


def load(folder: str | Path, **options: Any) -> Any:
    """Load a model that was saved with its prompt. Of other modules than the library's and this one no code is run.

    Args:
        folder: a directory that `model.save_pretrained` or `trainer.save_model` wrote.
        options: as for `SentenceTransformer`, `CrossEncoder` or `SparseEncoder`, whichever it holds.

    Raises:
        CheckpointError: there is no model with a prompt.
    """
    library, folder = sentence_library(), Path(folder)
    refuse_bare(folder, WHOLE)
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        family = json.loads((folder / "config_sentence_transformers.json").read_bytes()).get("model_type")
        kinds = [module["type"] for module in modules]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} must hold a sentence model; it does not: {error}") from error
    if KIND not in kinds or family not in FAMILIES:
        raise CheckpointError(
            "only a model that was saved with its prompt is loaded so.",
            "Load any other with sentence-transformers itself.",
            folder=folder,
            model=family,
            modules=", ".join(map(str, kinds)),
        )
    classes = {KIND: prompted_transformer()}
    return getattr(library, family)._load_with_module_classes(str(folder), classes, **options)


# --- with one ---------------------------------------------------------------------------------------------------------


class SentencePromptCallback(SoftPromptCallback):
    """Train a prompt with a `SentenceTransformerTrainer`, `CrossEncoderTrainer` or `SparseEncoderTrainer`.

    Arguments and attributes are those of `SoftPromptCallback`.

    Raises:
        UnsupportedModelError, TrainerError: when the Trainer is made, or before its first step.
    """

    _around: FrozenRecord | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the transformers model inside."""
        model = kwargs["model"]
        inner = transformer_of(model).model
        _refuse_arguments(args)
        super().on_init_end(args, state, control, **{**kwargs, "model": inner})
        dress(model)

    def on_model_init(self, args: Any, control: Any, model: Any, trial: Any) -> None:
        """Attach to the transformers model inside of one that `model_init` has made."""
        super().on_model_init(args, control, transformer_of(model).model, trial)
        dress(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Meet the model and the optimizer that will train."""
        model = kwargs["model"]
        inner = transformer_of(model).model
        _refuse_arguments(args)
        _refuse_weights_of_losses(kwargs["optimizer"], model)
        super().on_train_begin(args, state, control, **{**kwargs, "model": inner})
        dress(model)
        if self._saver is not None:
            self._saver.loaded = False  # from now on: whether the best checkpoint was
        self._around = (
            FrozenRecord(model, lambda name: f".{CONTAINER}." not in name) if self._frozen_check.asked else None
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prove that the best checkpoint was loaded, where it should, and that nothing else moved."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and self._saver is not None and not self._saver.loaded:
            raise TrainerError(
                "a run that should end with its best prompt must have loaded it; the library only logs why it has not.",
                "See the error logged above; `load_prompt` reads the checkpoint.",
                best=best,
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
            "a prompt on a sentence model trains uncompiled and unsharded; several processes train it with DDP.",
            "Leave this out.",
            found=", ".join(found),
        )


def _refuse_weights_of_losses(optimizer: Any, model: nn.Module) -> None:
    known = {id(parameter) for parameter in model.parameters()}
    groups = getattr(optimizer, "param_groups", [])
    shapes = [list(p.shape) for group in groups for p in group["params"] if p.requires_grad and id(p) not in known]
    if shapes:
        raise TrainerError(
            "a loss must have no weights of its own: the library's checkpoints lose them.",
            "Use a loss without, such as MultipleNegativesRankingLoss or CoSENTLoss; for classes, a CrossEncoder or SetFit.",
            found=f"{len(shapes)} tensors {shapes}",
        )


def __getattr__(name: str) -> Any:
    """The class that `modules.json` names; it is made when sentence-transformers is there."""
    if name == PROMPTED:
        return prompted_transformer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
