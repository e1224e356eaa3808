"""skorch: scikit-learn's interface for models with a prompt, including `GridSearchCV`.

Pass `PromptedModule` as the module of a net. The method is an ordinary parameter (`module__method`), so `clone`, `set_params` and
searches work. `Checkpoint`, `TrainEndCheckpoint`, `LoadInitState`, `save_params` and `load_params`, with and without
`use_safetensors`, save and restore only the prompt, and training resumes bit for bit. Each copy of a net, even an
unpickled one, has its own prompt on a new model. Nets share the weights of the model that you pass, but do not change them.
`FrozenCheck` checks after each fit that the base has not changed.

If nets are cloned or pickled, pass a function that returns the model (`functools.partial(AutoModel.from_pretrained, path)`);
otherwise, each clone or pickle contains a copy of the model's weights.

These raise an error: a model that already has a prompt; methods with their own objective, which need the labels in the forward
pass (CPT, distilled MPT and cartridges); files of another prompt, method or base (checked before anything is loaded).

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

from ._imports import create_at_first_use, import_framework
from ._training_state import LivePrompt

__all__ = ["FrozenCheck", "PromptedModule"]

FrozenCheck: Any  # created at its first use, because it derives from a class of skorch

_BASE = "model."
_REBUILT = ("model", "prompt", "_live")
"""The attributes that a copy recreates from its arguments."""


class PromptedModule(nn.Module):
    """A model with a prompt, as the module of a skorch net. Subclasses may override `answer` and add modules.

    Args:
        model: a model without a prompt, or a function without arguments that returns one.
        method: the method and its options, such as `PromptTuning(20)`.
        name, train_head, freeze_dropout: as in `softhooks.attach`.

    Attributes:
        model: the model with the prompt.
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
        if isinstance(method, Method) and method.objective() is not None:
            raise UnsupportedMethodError(
                f"{method.kind} needs the labels in the forward pass; skorch passes them only to the criterion.",
                "Train this method with the Trainer or with your own training loop.",
            )
        base = _make(model)
        self.prompt: SoftPrompt = attach(base, method, **options)  # type: ignore[arg-type]
        self.model = base
        self._live = LivePrompt(self.prompt)

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Run the model and return its `answer`."""
        return self.answer(self.model(*args, **inputs))

    def answer(self, output: Any) -> Any:
        """Return the part of the model's output that the criterion and the predictions use."""
        return output.logits

    # --- files --------------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the training state of the prompt and the tensors of modules that a subclass adds, but not the model."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name in [name for name in state if name.startswith(prefix + _BASE)]:
            del state[name]
        state.update({prefix + _BASE + name: tensor for name, tensor in self._live.state_dict().items()})
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict that `state_dict` returned.

        Raises:
            TrainerError: the state dict belongs to another prompt, method or base; nothing is loaded.
        """
        of_prompt = {name.removeprefix(_BASE): v for name, v in state_dict.items() if name.startswith(_BASE)}
        others = {name: value for name, value in state_dict.items() if not name.startswith(_BASE)}
        self._live.load_state_dict(of_prompt)
        found = super().load_state_dict(others, strict=False, assign=assign)
        missing = [name for name in found.missing_keys if not name.startswith(_BASE)]
        if strict and (missing or found.unexpected_keys):
            raise TrainerError(
                "the state dict has missing or unknown keys; it must have exactly the keys of the module.",
                missing=missing,
                unknown=found.unexpected_keys,
            )
        return type(found)(missing, found.unexpected_keys)

    # --- copies -------------------------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle only the arguments and the trained tensors; a copy recreates the model and its hooks from them."""
        own = {name: value for name, value in self.__dict__.items() if name not in (*_REBUILT, "_modules")}
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        state = {
            "own": own,
            "modules": {name: module for name, module in self._modules.items() if name != "model"},
            "trained": {name: tensor for name, tensor in named if is_prompt_key(name)},
            "mode": {name: module.training for name, module in self.model.named_modules()},
        }
        return _rebuild, (type(self), self._arguments), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        trained: dict[str, Tensor] = state["trained"]
        self.__dict__.update(state["own"])
        self._modules.update(state["modules"])
        self.model.to(next(iter(trained.values())).device)
        for name, tensor in trained.items():  # the tensors themselves, because a copied optimizer may hold them
            path, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(path)
            tensors: dict[str, Any] = owner._parameters if isinstance(tensor, nn.Parameter) else owner._buffers
            tensors[leaf] = tensor
        for name, mode in state["mode"].items():
            self.model.get_submodule(name).training = mode


def _rebuild(cls: type[PromptedModule], arguments: dict[str, Any]) -> PromptedModule:
    """Create a copied or unpickled module from its arguments; `__setstate__` then sets its tensors."""
    module = cls.__new__(cls)
    # a copy must not change the random state
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        PromptedModule.__init__(module, **arguments)
    return module


def _make(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Return the model for a net: the function's result, or a copy of the given model that shares its weights."""
    made = model if isinstance(model, nn.Module) else model() if callable(model) else None
    if not isinstance(made, nn.Module):
        raise OptionError(
            f"`model` is of type {type(model).__name__}{f' and returns {type(made).__name__}' if callable(model) else ''}; a "
            "PromptedModule takes a model or a function that returns one.",
            "Pass `module__model=model`, or `module__model=functools.partial(AutoModel.from_pretrained, path)`.",
        )
    prompted = prompted_model_of(made)
    if prompted is not None:
        raise AttachError(
            f"the {type(made).__name__} already has a prompt; a PromptedModule attaches its own.",
            "Pass a model without prompts, and the method as `module__method`.",
            prompts=", ".join(map(repr, prompted.prompts)),
        )
    if made is not model:
        return made
    # `deepcopy` takes the values of this dictionary as copies of the weights with these ids
    shared: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), weight.requires_grad)
        for weight in made.parameters()
        if type(weight) is nn.Parameter
    }
    return copy.deepcopy(made, shared)


# --- the callback -----------------------------------------------------------------------------------------------------


def _prompts(net: Any) -> list[SoftPrompt]:
    """Return the active prompts on all modules of a net."""
    modules = [getattr(net, f"{name}_") for name in net._modules]
    containers = [part for module in modules for part in module.modules() if isinstance(part, Container)]
    prompted_models = [container.prompted_model for container in containers]
    found = [soft_prompts_of(each)[each.active] for each in prompted_models if each.active is not None]
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
        """Checks in each step of a fit that the prompt has a gradient, and at the end that the base has not changed.

        Attributes:
            reports_: the reports of the last check, one for each prompt.
        """

        def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
            _prompts(net)
            self.reports_: list[Any] = []

        def on_grad_computed(self, net: Any, named_parameters: Any, training: bool = False, **kwargs: Any) -> None:
            for prompt in _prompts(net) if training else ():
                require_gradient(prompt, sum(len(epoch.get("batches", ())) for epoch in net.history) - 1)

        def on_train_end(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
            self.reports_ = [prompt.verify_frozen() for prompt in _prompts(net)]

    return FrozenCheck


__getattr__ = create_at_first_use(__name__, FrozenCheck=_frozen_check)
