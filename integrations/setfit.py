"""SetFit: the contrastive phase trains a prompt on the body, and the second phase trains the head.

With a differentiable head and `end_to_end=True`, the second phase trains the prompt too. The base stays frozen in every phase.

`model.save_pretrained(folder)` saves body, prompt and head; `SetFitModel.from_pretrained(folder, trust_remote_code=True)` loads
them (without the flag, sentence-transformers refuses the body's first module). Checkpoints of the first phase hold only the
prompt; `softhooks.integrations.sentence_transformers.load_prompt(model.model_body, checkpoint)` loads it onto a new body.
SetFit's Trainer does not support resuming.

These raise an error: everything that `softhooks.integrations.sentence_transformers` refuses; aspect-based sentiment analysis,
which trains two models with one callback; a Trainer whose model was replaced (`hyperparameter_search`), because SetFit then runs
one model and optimizes the other. SetFit's logs lack the prompt's metrics, because SetFit logs the loss under another name.

Versions tested: setfit 1.2.0

Example:
    import setfit

    from softhooks import PrefixTuning
    from softhooks.integrations.setfit import SetFitPromptCallback

    callback = SetFitPromptCallback(PrefixTuning(num_virtual_tokens=8))
    trainer = setfit.Trainer(model=model, args=args, train_dataset=dataset, callbacks=[callback])
    trainer.train()
    model.save_pretrained("classifier")
    answers = setfit.SetFitModel.from_pretrained("classifier", trust_remote_code=True).predict(["a text", "another"])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from softhooks.errors import TrainerError, UnsupportedModelError
from softhooks.integration_support.models import require_prompted_model
from softhooks.integrations.sentence_transformers import SentencePromptCallback

from ._sentence_transformers import transformer_of

__all__ = ["SetFitPromptCallback"]

_FREEZE = "_freeze_or_not"  # the method that SetFit's `freeze` and `unfreeze` call


class SetFitPromptCallback(SentencePromptCallback):
    """Trains a prompt with a `setfit.Trainer`. Arguments and attributes are the same as for `SoftPromptCallback`.

    Raises:
        UnsupportedModelError, TrainerError: the model or a setting does not work with a prompt; raised when the Trainer is
            created, or before its first step.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the prompt to the transformers model in the body."""
        model, args, kwargs = _of_the_body(args, kwargs)
        super().on_init_end(args, state, control, **kwargs)
        _keep_frozen(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the body and the optimizer of this run."""
        model, args, kwargs = _of_the_body(args, kwargs)
        self._refuse_another(kwargs["model"])
        super().on_train_begin(args, state, control, **kwargs)
        _keep_frozen(model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Release the checkpoint's lock and check the base."""
        _, args, kwargs = _of_the_body(args, kwargs)
        super().on_save(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the base after the first phase."""
        _, args, kwargs = _of_the_body(args, kwargs)
        super().on_train_end(args, state, control, **kwargs)

    def _refuse_another(self, body: Any) -> None:
        known = None if self.soft_prompt is None else self.soft_prompt.model
        if known is not None and transformer_of(body).model is not known:
            raise TrainerError(
                "the model of the setfit.Trainer was replaced; SetFit would run the first model and optimize the second.",
                "Create a new Trainer with a new callback for each model and each trial.",
                made_with=f"{type(known).__name__} at {id(known):#x}",
                found=f"{type(body.transformers_model).__name__} at {id(body.transformers_model):#x}",
            )


def _of_the_body(args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Return SetFit's model, and `args` and `kwargs` as a SentenceTransformerTrainer would pass them for the body."""
    if "st_model" not in kwargs:
        raise TrainerError(
            f"SetFitPromptCallback needs a setfit.Trainer; this Trainer's model is {type(kwargs.get('model')).__name__}.",
            "Use SentencePromptCallback with sentence-transformers, or SoftPromptCallback with the Trainer of transformers.",
        )
    model = kwargs["model"]
    if any(kind.__name__ == "SpanSetFitModel" for kind in type(model).__mro__):
        raise UnsupportedModelError(
            f"{type(model).__name__} is for aspect-based sentiment analysis, which would train two models with one callback.",
            "Train the aspect and polarity models without a prompt, or train each as a separate SetFit model.",
        )
    return model, kwargs["st_args"], {**kwargs, "model": kwargs["st_model"]}


class _Freeze:
    """Replaces SetFit's method for freezing and unfreezing modules; in the body, unfreezes only parameters that it froze."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.before: Callable[..., None] = getattr(model, _FREEZE)
        self.frozen: list[nn.Parameter] = []

    def __call__(self, module: nn.Module, to_freeze: bool) -> None:
        """Freeze a module, or unfreeze it."""
        if module is not self.model.model_body:
            self.before(module, to_freeze)
            return
        if to_freeze:
            self.frozen += [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(not to_freeze)
        if not to_freeze:
            self.frozen.clear()


def _keep_frozen(model: Any) -> None:
    if not isinstance(model.__dict__.get(_FREEZE), _Freeze):
        require_prompted_model(transformer_of(model.model_body).model).patches.set(model, _FREEZE, _Freeze(model))
