"""skorch: scikit-learn's interface for models with a prompt, including `GridSearchCV`.

`PromptedModule` is the module of a net. It attaches the prompt before skorch creates the optimizer. The method is an ordinary
parameter (`module__method`), so `clone`, `set_params` and searches work. The `state_dict` is the training state of the prompt:
`Checkpoint`, `TrainEndCheckpoint`, `LoadInitState`, `save_params` and `load_params`, with and without `use_safetensors`, save and
restore only the prompt, and training resumes bit for bit. Copies and pickles of a net, as created by skorch, joblib and
scikit-learn, have their own prompt on a new model. Nets share the weights of the model that is passed, but do not change it.
`FrozenCheck` checks after each fit that the base has not changed.

Pass the model as a function (`functools.partial(AutoModel.from_pretrained, path)`) if nets are cloned or pickled: a model would
be copied and pickled with its weights each time.

Refused with an error: a model that already has a prompt; methods with their own objective, which need the labels in the forward
(CPT, distilled MPT and cartridges); files of another prompt, method or base, before anything is loaded.

Example:
    import softhooks
    from sklearn.model_selection import GridSearchCV
    from skorch import NeuralNetClassifier
    from softhooks.integrations.skorch import FrozenCheck, PromptedModule

    net = NeuralNetClassifier(
        PromptedModule, module__model=load_model, module__method=softhooks.PromptTuning(8), max_epochs=3,
        criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, lr=1e-2, callbacks=[FrozenCheck], verbose=0,
    )
    search = GridSearchCV(net, {"module__method": [softhooks.PromptTuning(4), softhooks.PrefixTuning(8)]}, cv=2)
    search.fit(X, y)  # X: a skorch.helper.SliceDict of the model's inputs
    search.best_estimator_.save_params("prompt.safetensors", use_safetensors=True)

Versions tested: skorch 1.4.0 with scikit-learn 1.9.1
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from softhooks.attach import attach
from softhooks.errors import AttachError, OptionError, TrainerError, UnsupportedMethodError
from softhooks.integration_support.checkpoints import is_prompt_key
from softhooks.integration_support.models import Container, prompted_model_of, soft_prompts_of
from softhooks.integration_support.training import require_gradient
from softhooks.method import Method
from softhooks.prompt import SoftPrompt

from ._imports import import_framework
from ._training_state import LivePrompt

__all__ = ["FrozenCheck", "PromptedModule"]

FrozenCheck: Any  # created by `__getattr__`

_BASE = "model."
_REBUILT = ("model", "prompt", "_live")
"""Attributes that a copy makes anew from the arguments."""


class PromptedModule(nn.Module):
    """The module of a skorch net: a model with a prompt. Subclasses may override `answer` and add modules.

    Args:
        model: a model without a prompt, or a function without arguments that returns one.
        method: the method to train.
        name, train_head, freeze_dropout: as in `softhooks.attach`.

    Attributes:
        model: the model with the prompt, which shares the weights of the given model.
        prompt: the attached prompt.

    Raises:
        AttachError: the model already has a prompt, or the prompt cannot be attached.
        UnsupportedMethodError: the method has its own objective.
        OptionError: `model` is neither a model nor a function that returns one.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        method: Method,
        name: str = "default",
        train_head: bool = True,
        freeze_dropout: bool = False,
    ) -> None:
        super().__init__()
        options = {"name": name, "train_head": train_head, "freeze_dropout": freeze_dropout}
        self._arguments: dict[str, Any] = {"model": model, "method": method, **options}
        _refuse_own_loss(method)
        base = _make(model)
        self.prompt: SoftPrompt = attach(base, method, **options)  # type: ignore[arg-type]
        self.model = base
        self._live = LivePrompt(self.prompt)

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Run the model and return its `answer`."""
        return self.answer(self.model(*args, **inputs))

    def answer(self, output: Any) -> Any:
        """Return the part of the model's output that the net passes to the criterion and to predictions."""
        return output.logits

    # --- files --------------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the training state of the prompt and the tensors of a subclass's modules, but not the model."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name in [name for name in state if name.startswith(prefix + _BASE)]:
            del state[name]
        state.update({prefix + _BASE + name: tensor for name, tensor in self._live.state_dict().items()})
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the state; a state of another prompt is refused before anything is loaded.

        Raises:
            TrainerError: the state belongs to another prompt, method or base.
        """
        of_prompt = {name.removeprefix(_BASE): v for name, v in state_dict.items() if name.startswith(_BASE)}
        others = {name: value for name, value in state_dict.items() if not name.startswith(_BASE)}
        self._live.load_state_dict(of_prompt)
        found = super().load_state_dict(others, strict=False, assign=assign)
        missing = [name for name in found.missing_keys if not name.startswith(_BASE)]
        if strict and (missing or found.unexpected_keys):
            raise TrainerError(
                "the state does not fit the module: keys are missing or unknown.",
                missing=missing,
                unknown=found.unexpected_keys,
            )
        return type(found)(missing, found.unexpected_keys)

    # --- copies -------------------------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the arguments and the trained tensors; the model and its hooks are created anew."""
        own = {name: value for name, value in self.__dict__.items() if name not in (*_REBUILT, "_modules")}
        state = {
            "own": own,
            "modules": {name: module for name, module in self._modules.items() if name != "model"},
            "trained": dict(_trained(self)),
            "mode": {name: module.training for name, module in self.model.named_modules()},
        }
        return _rebuild, (type(self), self._arguments), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put the copied tensors into the new module without copying them again, because a copied optimizer may hold them."""
        trained: dict[str, Tensor] = state["trained"]
        self.__dict__.update(state["own"])
        self._modules.update(state["modules"])
        self.model.to(next(iter(trained.values())).device)
        for name, tensor in trained.items():
            path, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(path)
            if isinstance(tensor, nn.Parameter):
                owner._parameters[leaf] = tensor
            else:
                owner._buffers[leaf] = tensor
        for name, mode in state["mode"].items():
            self.model.get_submodule(name).training = mode


def _rebuild(cls: type[PromptedModule], arguments: dict[str, Any]) -> PromptedModule:
    """Create the module of a copy without changing the random state; `__setstate__` sets its tensors."""
    module = cls.__new__(cls)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        PromptedModule.__init__(module, **arguments)
    return module


def _trained(module: PromptedModule) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module's prompt, by their names in the model."""
    named = [*module.model.named_parameters(), *module.model.named_buffers()]
    return {name: tensor for name, tensor in named if is_prompt_key(name)}


def _make(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Create the model of a net: call the function, or copy the model with shared weights."""
    made = model if isinstance(model, nn.Module) else model() if callable(model) else None
    if not isinstance(made, nn.Module):
        raise OptionError(
            f"`model` is {type(model).__name__}{f', which returns {type(made).__name__}' if callable(model) else ''}; a "
            "PromptedModule takes a model or a function that returns one.",
            "Pass `module__model=model`, or `module__model=functools.partial(AutoModel.from_pretrained, path)`.",
        )
    if prompted_model_of(made) is not None:
        raise AttachError(
            f"the {type(made).__name__} already has a prompt; a PromptedModule attaches a new prompt.",
            "Pass a model without prompts, and the method as `module__method`.",
            prompts=", ".join(map(repr, prompted_model_of(made).prompts)),  # type: ignore[union-attr]
        )
    if made is not model:
        return made
    shared: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), weight.requires_grad)
        for weight in made.parameters()
        if type(weight) is nn.Parameter
    }
    return copy.deepcopy(made, shared)


def _refuse_own_loss(method: Method) -> None:
    if isinstance(method, Method) and method.objective() is not None:
        raise UnsupportedMethodError(
            f"{method.kind} has its own objective and needs the labels in the forward; skorch passes them to the criterion only.",
            "Train this method with the Trainer or with your own training loop.",
        )


# --- the callback -----------------------------------------------------------------------------------------------------


def _prompts(net: Any) -> list[SoftPrompt]:
    """Return the active prompts on all of a net's modules, not only on a PromptedModule."""
    modules = [getattr(net, f"{name}_") for name in net._modules]
    prompted_models = [
        sub.prompted_model for module in modules for sub in module.modules() if isinstance(sub, Container)
    ]
    found = [
        prompt
        for prompted in prompted_models
        for prompt in soft_prompts_of(prompted).values()
        if prompt.name == prompted.active
    ]
    if not found:
        raise TrainerError(
            "FrozenCheck found no prompt on the net's modules.",
            "Use PromptedModule, or call `softhooks.attach` in the module's `__init__`.",
            modules=", ".join(type(module).__name__ for module in modules),
        )
    return found


def _frozen_check() -> type:
    import_framework("skorch.callbacks", "skorch", "skorch")
    from skorch.callbacks import Callback

    class FrozenCheck(Callback):
        """Checks that the prompt has a gradient in each step of a fit, and that the base has not changed at the end.

        Attributes:
            reports_: the reports of the last check, one for each prompt.
        """

        def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
            """Check that there is a prompt."""
            _prompts(net)
            self.reports_: list[Any] = []

        def on_grad_computed(self, net: Any, named_parameters: Any, training: bool = False, **kwargs: Any) -> None:
            """Check that the prompts have a gradient."""
            for prompt in _prompts(net) if training else ():
                require_gradient(prompt, sum(len(epoch.get("batches", ())) for epoch in net.history) - 1)

        def on_train_end(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
            """Check that the base has not changed."""
            self.reports_ = [prompt.verify_frozen() for prompt in _prompts(net)]

    FrozenCheck.__module__, FrozenCheck.__qualname__ = __name__, "FrozenCheck"
    return FrozenCheck


def __getattr__(name: str) -> Any:
    """Create the class that derives from skorch's `Callback` at its first use, and only once, so that it can be pickled."""
    if name != "FrozenCheck":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _frozen_check())
