"""Soft prompts in SetFit: the contrastive phase trains the prompt on the body, the second phase a head on what it embeds.

`SetFitPromptCallback` goes into `setfit.Trainer(callbacks=[...])`. With a differentiable head and `end_to_end=True` the prompt
goes on training beside the head; without, only the head trains then. SetFit thaws the whole body after that phase; while a prompt
is on it, only what was trained is thawed, so a second `train()` leaves the base alone too.

`model.save_pretrained(folder)` saves body, prompt and head, and `SetFitModel.from_pretrained(folder, trust_remote_code=True)`
loads them: the flag because one module of the body is not sentence-transformers' own; without it the library raises. Checkpoints
of the first phase hold the prompt alone. `load_best_model_at_end` restores it; `load_prompt(model.model_body, checkpoint)` of
`softhooks.integrations.sentence_transformers` puts one on a fresh body. SetFit's Trainer resumes nothing by itself.

Refused by name: what `softhooks.integrations.sentence_transformers` refuses; the models of aspect-based sentiment analysis, since
one callback would serve two of them; and a Trainer that was given another model (`hyperparameter_search`), for SetFit then trains
neither of the two. SetFit renames the loss, so its logs lack the prompt's numbers.

Versions tested: setfit 1.2.0

Example:
    import setfit

    from softhooks import PrefixTuning
    from softhooks.integrations.setfit import SetFitPromptCallback

    trainer = setfit.Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        callbacks=[SetFitPromptCallback(PrefixTuning(num_virtual_tokens=8))],
    )
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

_FREEZE = "_freeze_or_not"
"""What SetFit's `freeze` and `unfreeze` call."""


class SetFitPromptCallback(SentencePromptCallback):
    """Train a prompt with a `setfit.Trainer`. Arguments and attributes are those of `SoftPromptCallback`.

    Raises:
        UnsupportedModelError, TrainerError: when the Trainer is made, or before its first step.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the body's transformers model."""
        model, args, kwargs = _of_the_body(args, kwargs)
        super().on_init_end(args, state, control, **kwargs)
        _keep_frozen(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Meet the body and the optimizer that will train."""
        model, args, kwargs = _of_the_body(args, kwargs)
        self._refuse_another(kwargs["model"])
        super().on_train_begin(args, state, control, **kwargs)
        _keep_frozen(model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is whole."""
        _, args, kwargs = _of_the_body(args, kwargs)
        super().on_save(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first phase is over: prove that nothing else moved."""
        _, args, kwargs = _of_the_body(args, kwargs)
        super().on_train_end(args, state, control, **kwargs)

    def _refuse_another(self, body: Any) -> None:
        known = None if self.soft_prompt is None else self.soft_prompt.model
        if known is not None and transformer_of(body).model is not known:
            raise TrainerError(
                "a setfit.Trainer must train the model that it was made with: it runs that one in its forwards, whatever its "
                "`model` is now, and steps the other.",
                "Make a new Trainer, with a callback of its own, for each model and each trial.",
                made_with=f"{type(known).__name__} at {id(known):#x}",
                found=f"{type(body.transformers_model).__name__} at {id(body.transformers_model):#x}",
            )


def _of_the_body(args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """SetFit's model, and what sentence-transformers would have told of the body's training."""
    if "st_model" not in kwargs:
        raise TrainerError(
            "this callback is for a setfit.Trainer.",
            "Use SentencePromptCallback, or SoftPromptCallback with a Trainer of transformers.",
            model=type(kwargs.get("model")).__name__,
        )
    model = kwargs["model"]
    if any(kind.__name__ == "SpanSetFitModel" for kind in type(model).__mro__):
        raise UnsupportedModelError(
            "one callback trains one model; aspect-based sentiment analysis trains two with it.",
            "Train the aspect and the polarity model without a prompt, or as two SetFit models.",
            model=type(model).__name__,
        )
    return model, kwargs["st_args"], {**kwargs, "model": kwargs["st_model"]}


class _Freeze:
    """SetFit's own freezing of a body or a head; of a body with a prompt, it touches only what trains.

    Args:
        model: the SetFit model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.before: Callable[..., None] = getattr(model, _FREEZE)
        self.frozen: list[nn.Parameter] = []

    def __call__(self, module: nn.Module, to_freeze: bool) -> None:
        """Freeze, or thaw what was frozen."""
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
    """Let SetFit thaw no more of a body than trains, as long as a prompt is on it."""
    if not isinstance(model.__dict__.get(_FREEZE), _Freeze):
        require_prompted_model(transformer_of(model.model_body).model).patches.set(model, _FREEZE, _Freeze(model))
