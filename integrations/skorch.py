"""scikit-learn's interface by skorch: nets over a Hugging Face model with a prompt, also in `GridSearchCV`.

`PromptedModule` is a net's module: it attaches the prompt before skorch makes the optimizer. The method is a parameter like any
other (`module__method`), so `clone`, `set_params` and searches work. Its `state_dict` is the prompt, live, with a description of
its run: so skorch's `Checkpoint`, `TrainEndCheckpoint`, `LoadInitState`, `save_params` and `load_params`, with and without
`use_safetensors`, hold and restore the prompt only, and go on bit for bit. Copies and pickles (what skorch, joblib and
scikit-learn do with nets) are made anew from the model that was given: their prompt is their own. Nets share the weights of a
model that is given, which itself stays bare. `FrozenCheck` proves after each fit that nothing else has moved.

Give the model as a function (`functools.partial(AutoModel.from_pretrained, path)`) where nets are cloned or pickled: a model is
copied and pickled whole each time.

Refused: a model that carries a prompt already; methods with a loss of their own, which need the labels in the forward (CPT,
distilled MPT and cartridges); files of another prompt, method or base, before anything is loaded.

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
    search.fit(X, y)  # X: a skorch.helper.SliceDict of what the model takes
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
from softhooks.errors import AttachError, OptionError, SoftHooksError, TrainerError, UnsupportedMethodError
from softhooks.integration_support.checkpoints import is_prompt_key
from softhooks.integration_support.models import Container, prompted_model_of, soft_prompts_of
from softhooks.integration_support.training import require_gradient
from softhooks.method import Method
from softhooks.prompt import SoftPrompt

from ._training_state import LivePrompt

__all__ = ["FrozenCheck", "PromptedModule"]

FrozenCheck: Any  # made by `__getattr__`

_BASE = "model."
_MADE_ANEW = ("model", "prompt", "_live")
"""What a copy does not take over: it is made from the arguments."""


class PromptedModule(nn.Module):
    """A model with a prompt, as the module of a skorch net. A subclass may give another `answer`, and have modules beside it.

    Args:
        model: the bare model, or a function without arguments that makes it.
        method: what to attach.
        name, train_head, freeze_dropout: as in `softhooks.attach`.

    Attributes:
        model: the model with the prompt; its weights are those of the one that was given.
        prompt: the handle.

    Raises:
        AttachError: the model carries a prompt already, or the prompt cannot be attached.
        UnsupportedMethodError: the method has a loss of its own.
        OptionError: `model` is neither.
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
        """Give what the criterion and the predictions take of the model's output."""
        return self.answer(self.model(*args, **inputs))

    def answer(self, output: Any) -> Any:
        """Take what the net answers from the model's output."""
        return output.logits

    # --- files --------------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The prompt, live, and what a subclass has beside the model; not the model."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name in [name for name in state if name.startswith(prefix + _BASE)]:
            del state[name]
        state.update({prefix + _BASE + name: tensor for name, tensor in self._live.state_dict().items()})
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Bring back what `state_dict` gave; nothing is loaded where the prompt is another.

        Raises:
            TrainerError: it is of another prompt, method or base.
        """
        of_prompt = {name.removeprefix(_BASE): v for name, v in state_dict.items() if name.startswith(_BASE)}
        others = {name: value for name, value in state_dict.items() if not name.startswith(_BASE)}
        self._live.load_state_dict(of_prompt)
        found = super().load_state_dict(others, strict=False, assign=assign)
        missing = [name for name in found.missing_keys if not name.startswith(_BASE)]
        if strict and (missing or found.unexpected_keys):
            raise TrainerError(f"a state must fit its module; missing: {missing}, unknown: {found.unexpected_keys}.")
        return type(found)(missing, found.unexpected_keys)

    # --- copies -------------------------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as: the arguments, and what is trained. Hooks and the state of the prompts are made anew."""
        own = {name: value for name, value in self.__dict__.items() if name not in (*_MADE_ANEW, "_modules")}
        state = {
            "own": own,
            "modules": {name: module for name, module in self._modules.items() if name != "model"},
            "trained": dict(_trained(self)),
            "mode": {name: module.training for name, module in self.model.named_modules()},
        }
        return _made_anew, (type(self), self._arguments), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put the very tensors of the copy into a module that was made anew: an optimizer may hold them too."""
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


def _made_anew(cls: type[PromptedModule], arguments: dict[str, Any]) -> PromptedModule:
    """Make a copy's module without a change to anybody's random numbers; `__setstate__` gives it its tensors."""
    module = cls.__new__(cls)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        PromptedModule.__init__(module, **arguments)
    return module


def _trained(module: PromptedModule) -> dict[str, Tensor]:
    """The parameters and buffers of a module's prompt, by their names in the model; the objects themselves."""
    named = [*module.model.named_parameters(), *module.model.named_buffers()]
    return {name: tensor for name, tensor in named if is_prompt_key(name)}


def _make(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Make the model of a net: what a function gives, or one that shares the weights of the one given."""
    made = model if isinstance(model, nn.Module) else model() if callable(model) else None
    if not isinstance(made, nn.Module):
        raise OptionError(
            "a PromptedModule takes a model, or a function without arguments that makes one.",
            "Give `module__model=model`, or `module__model=functools.partial(AutoModel.from_pretrained, path)`.",
            model=f"{type(model).__name__}" + (f", which gives {type(made).__name__}" if callable(model) else ""),
        )
    if prompted_model_of(made) is not None:
        raise AttachError(
            "a PromptedModule attaches its prompt itself: a copy of a model that has one would hold two.",
            "Give the bare model, and the method as `module__method`.",
            model=type(made).__name__,
            carries=", ".join(map(repr, prompted_model_of(made).prompts)),  # type: ignore[union-attr]
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
            "skorch gives the labels to its criterion, and not to the model.",
            "Train this method with a Trainer or a loop of your own.",
            method=f"{method.kind}, which has a loss of its own and needs the labels in the forward",
        )


# --- the callback -----------------------------------------------------------------------------------------------------


def _prompts(net: Any) -> list[SoftPrompt]:
    """The prompts of a net's modules, also of modules that attach theirs by themselves."""
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
            "FrozenCheck watches a net whose module has a prompt.",
            "Use PromptedModule, or call `softhooks.attach` in the module's `__init__`.",
            modules=", ".join(type(module).__name__ for module in modules),
        )
    return found


def _frozen_check() -> type:
    try:
        from skorch.callbacks import Callback
    except ImportError as error:
        raise SoftHooksError('this needs skorch; install it with `pip install "softhooks[skorch]"`.') from error

    class FrozenCheck(Callback):
        """Check each step of a fit for a gradient at the prompt, and prove at its end that nothing else has moved.

        Attributes:
            reports_: what the last proof has read, one for each prompt.
        """

        def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
            """Find the prompts, before anything trains."""
            _prompts(net)
            self.reports_: list[Any] = []

        def on_grad_computed(self, net: Any, named_parameters: Any, training: bool = False, **kwargs: Any) -> None:
            """Refuse a step that would train nothing."""
            for prompt in _prompts(net) if training else ():
                require_gradient(prompt, sum(len(epoch.get("batches", ())) for epoch in net.history) - 1)

        def on_train_end(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
            """Compare the base with its record."""
            self.reports_ = [prompt.verify_frozen() for prompt in _prompts(net)]

    FrozenCheck.__module__, FrozenCheck.__qualname__ = __name__, "FrozenCheck"
    return FrozenCheck


def __getattr__(name: str) -> Any:
    """Build what subclasses skorch when it is asked for, once, so that it pickles."""
    if name != "FrozenCheck":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _frozen_check())
