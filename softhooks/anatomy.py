"""What a model is made of, found by running it: its stacks, their attention, their positions.

Nothing here trusts a name or a config where a probe forward can tell: `OPTForCausalLM` calls its decoder past `base_model`, and
head sizes derived from a config are wrong for one architecture in eight.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from softhooks.errors import UnsupportedModelError, explain

if TYPE_CHECKING:
    from softhooks.host import Host
    from softhooks.inject.passes import Pass

Role = Literal["self", "cross"]
StackName = Literal["text", "encoder", "decoder"]


@dataclass(eq=False)
class Site:
    """One attention module that a key-value prefix can enter.

    Attributes:
        module: the module that calls the attention function; None where a cache is the way in.
        index: its place among the sites of its stack and role; the layer's index where a cache is the way in.
        heads: Hk. key_dim, value_dim: D of the keys and of the values.
    """

    stack: Stack
    role: Role
    index: int
    module: nn.Module | None
    heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers(self) -> int:
        """How many numbers one virtual token takes here."""
        return self.heads * (self.key_dim + self.value_dim)


@dataclass(eq=False)
class Positions:
    """How a stack learns where its tokens stand.

    Attributes:
        argument: whether its forward takes `position_ids`.
        table: its learned position embedding, if it has one.
        start: the id of the first real token in that table (RoBERTa: padding_idx + 1).
        padding: the id of a padding column.
        limit: how many real positions there are, where exceeding them is an error rather than a loss of quality.
        trained: how many positions the config declares.
    """

    argument: bool
    table: nn.Embedding | None
    start: int
    padding: int
    limit: int | None
    trained: int | None


@dataclass(eq=False)
class Stack:
    """A text backbone: what takes ids and returns one state a token.

    Attributes:
        live: the forward that is under way in it, if any; attention and embedding look here.
        owner: the host whose prompts enter here.
    """

    name: StackName
    path: str
    module: nn.Module
    embedding: nn.Module
    width: int
    causal: bool
    positions: Positions
    parameters: list[str]
    sites: list[Site] = field(default_factory=list)
    through: Literal["attention", "cache"] | None = None
    live: Pass | None = None
    owner: Host | None = None

    def expects_pass(self) -> bool:
        """Whether attention may run here only inside a pass."""
        return self.owner is not None and self.owner.is_on

    def sites_of(self, role: Role) -> list[Site]:
        """The sites of one role, in order of index."""
        return [site for site in self.sites if site.role == role]


@dataclass(eq=False)
class Anatomy:
    """The stacks of a model. An encoder-decoder has two, everything else one."""

    stacks: list[Stack]
    vocabulary: int

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether a decoder attends to an encoder here."""
        return len(self.stacks) == 2

    @property
    def entry(self) -> Stack:
        """The stack that the user's `input_ids` enter."""
        return self.stacks[0]


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Run probes without gradient, dropout, autocast or a trace in the random state; restore every mode."""
    training = [module for module in model.modules() if module.training]
    state = torch.get_rng_state()
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_rng_state(state)
        for module in training:
            module.training = True


def probe_ids(model: nn.Module, vocabulary: int, columns: int, seed: int = 0) -> Tensor:
    """Make one row of ordinary ids that ends, where the model has one, in its end-of-text id. -> [1, columns]."""
    config = getattr(model, "config", None)
    special = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id"):
        value = getattr(config, name, None)
        special.update(value if isinstance(value, list) else [value])
    ordinary = [i for i in range(min(vocabulary, 64)) if i not in special] or [0]
    ids = [ordinary[(7 * seed + 3 * column) % len(ordinary)] for column in range(columns)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, list):
        end = end[0]
    if end is not None and end < vocabulary:
        ids[-1] = end
    return torch.tensor([ids], device=_device(model))


def decoder_ids(ids: Tensor) -> Tensor:
    """Decoder ids that are as many as the encoder's (some heads ask for that) and not the same."""
    return ids.roll(1, dims=-1)


def _device(model: nn.Module) -> torch.device:
    weight = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    return weight.device if isinstance(weight, Tensor) else next(model.parameters()).device


def examine(model: nn.Module) -> Anatomy:
    """Find the stacks of a model with probe forwards of four tokens.

    Raises:
        UnsupportedModelError: the model has no token embeddings, or no stack was reached.
    """
    vocabulary = _vocabulary(model)
    with at_rest(model):
        ids = probe_ids(model, vocabulary, columns=4)
        inputs = {"input_ids": ids}
        if _is_encoder_decoder(model):
            inputs["decoder_input_ids"] = decoder_ids(ids)
        calls = _record_calls(model, inputs)
        names: list[StackName] = ["encoder", "decoder"] if len(inputs) == 2 else ["text"]
        stacks = [_stack(model, name, given, calls) for name, given in zip(names, inputs.values(), strict=True)]
        from softhooks.inject.survey import survey

        survey(stacks, ids)
    return Anatomy(stacks=stacks, vocabulary=vocabulary)


def _vocabulary(model: nn.Module) -> int:
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        return int(embedding.weight.shape[0])
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise UnsupportedModelError(
            explain(
                "a soft prompt needs a model that embeds tokens.",
                "Attach to the transformers model itself, or to the text model inside.",
                model=f"{type(model).__name__}, which has no input embeddings",
            )
        ) from error


def _is_encoder_decoder(model: nn.Module) -> bool:
    plain = unwrapped(model)
    takes = "decoder_input_ids" in inspect.signature(plain.forward).parameters
    return bool(getattr(plain.config, "is_encoder_decoder", False)) and takes


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model; any other model as it is."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


@dataclass(eq=False)
class _Call:
    """One module's call in a probe forward."""

    path: str
    module: nn.Module
    tensors: list[Tensor]
    output: Any = None


def _record_calls(model: nn.Module, inputs: dict[str, Tensor]) -> list[_Call]:
    """Run the model once and note which modules were called with which tensors."""
    calls: list[_Call] = []
    running: dict[int, _Call] = {}
    handles = []
    for path, module in model.named_modules():

        def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            call = _Call(path, module, tensors)
            calls.append(call)
            running[id(module)] = call

        def after(module: nn.Module, args: Any, output: Any) -> None:
            running[id(module)].output = output

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        model(**inputs)
    except Exception as error:
        raise UnsupportedModelError(
            explain(
                "a soft prompt needs a model that runs on token ids alone.",
                "Attach to the text model inside, or see the cause above.",
                model=type(model).__name__,
                cause=f"{type(error).__name__}: {error}",
            )
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _given(call: _Call, ids: Tensor) -> bool:
    return any(t.dtype == ids.dtype and t.shape == ids.shape and torch.equal(t, ids) for t in call.tensors)


def _stack(model: nn.Module, name: StackName, ids: Tensor, calls: list[_Call]) -> Stack:
    """Find the innermost module that takes the ids and holds layers, and the embedding that it looks them up in."""
    reached = [call for call in calls if _given(call, ids)]
    holders = [call for call in reached if any(isinstance(part, nn.ModuleList) for part in call.module.modules())]
    lookups = [call for call in reached if isinstance(call.module, nn.Embedding) and isinstance(call.output, Tensor)]
    if not holders or not lookups:
        raise UnsupportedModelError(
            explain(
                "a soft prompt needs a model in which token ids reach an embedding and a stack of layers.",
                "Attach to the text model inside.",
                model=type(model).__name__,
                found=f"{len(lookups)} embeddings and {len(holders)} stacks for the {name}'s ids",
            )
        )
    holder, lookup = holders[-1], lookups[0]
    module = holder.module
    parameters = inspect.signature(module.forward).parameters
    return Stack(
        name=name,
        path=holder.path,
        module=module,
        embedding=lookup.module,
        width=lookup.output.shape[-1],
        causal=_is_causal(model, module, ids, name),
        positions=_positions(module, parameters),
        parameters=[key for key, value in parameters.items() if value.kind is not value.VAR_KEYWORD],
    )


def _is_causal(model: nn.Module, module: nn.Module, ids: Tensor, name: str) -> bool:
    """Change the second token and see whether the first one's state follows."""
    states = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append(first_state(output)[:, 0].float())

    other = ids.clone()
    other[:, 1] = ids[:, 0] if ids[0, 1] != ids[0, 0] else ids[:, 2]
    handle = module.register_forward_hook(keep)
    try:
        for row in (ids, other):
            if name == "text":
                model(input_ids=row)
            elif name == "encoder":
                model(input_ids=row, decoder_input_ids=decoder_ids(ids))
            else:
                model(input_ids=probe_ids(model, _vocabulary(model), columns=4), decoder_input_ids=row)
    finally:
        handle.remove()
    change = (states[0] - states[1]).abs().max()
    return bool(change <= 1e-6 * states[0].abs().max().clamp(min=1e-6))


def first_state(output: Any) -> Tensor:
    """The last hidden state of a stack's output, whatever form the output has."""
    state = output if isinstance(output, Tensor) else output[0]
    if not isinstance(state, Tensor):
        raise UnsupportedModelError(f"a stack must return a tensor of states first; it returned {type(state).__name__}.")
    return state


def _positions(module: nn.Module, parameters: Any) -> Positions:
    table = None
    for path, part in module.named_modules():
        name = path.rsplit(".", 1)[-1]
        if isinstance(part, nn.Embedding) and ("position" in name or name == "wpe") and "relative" not in name:
            table = part
    config = getattr(module, "config", None)
    trained = getattr(config, "max_position_embeddings", None)
    start, padding = 0, 0
    limit: int | None = None
    if table is not None:
        if table.padding_idx is not None and getattr(table, "offset", None) is None:
            start, padding = table.padding_idx + 1, table.padding_idx
        limit = table.num_embeddings - start - int(getattr(table, "offset", 0))
    elif any("embed_positions" in name for name, _ in module.named_buffers()):
        limit = trained
    return Positions(
        argument="position_ids" in parameters,
        table=table,
        start=start,
        padding=padding,
        limit=limit,
        trained=trained if isinstance(trained, int) else None,
    )
