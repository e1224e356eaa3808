"""Attach and detach: check everything, then change the model; undo all of it on any error."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from softhooks.backbone.added_vocabulary import warn_of_added
from softhooks.backbone.container import CONTAINER, Container
from softhooks.backbone.examine import examine
from softhooks.backbone.heads import check_heads, copy_heads, find_heads
from softhooks.backbone.id_dependence import reads_ids
from softhooks.backbone.max_positions import unwarned
from softhooks.backbone.placeholder_ids import BUFFER, fresh_ids, stored_ids
from softhooks.backbone.probing import probing, probing_with_prompt
from softhooks.backbone.stack import ModelStructure
from softhooks.base_model.frozen_record import FrozenRecord
from softhooks.base_model.take_fingerprint import take_fingerprint
from softhooks.checks.attach_arguments import check_arguments, check_length, too_long_error
from softhooks.checks.causality import check_causality
from softhooks.checks.content_masks import require_common_masks
from softhooks.checks.injection import choose_injection, probe_inputs
from softhooks.checks.left_padding import takes_left_padding
from softhooks.checks.reach import prove_reach
from softhooks.checks.remedies import names_tried_remedies
from softhooks.checks.unread_slots import check_unread
from softhooks.compat.bitsandbytes import keep_unpacked, unpacked
from softhooks.compat.offload import device_of
from softhooks.compat.peft import home, keep_wrapped, refuse_prompts
from softhooks.constraint import watch
from softhooks.encoder import EMBEDDINGS, PromptEncoder
from softhooks.errors import PromptTooLongError
from softhooks.formats.labels import Labels
from softhooks.inject.slots.argument_values import find_fills
from softhooks.layout.tokenizing import tokenizer_of
from softhooks.method import Method
from softhooks.prompt import SoftPrompt
from softhooks.runtime.added_token_hooks import check_added_rows
from softhooks.runtime.added_tokens import ADDED, AddedTokens, chosen_ids, copy_rows
from softhooks.runtime.attached_prompt import Injection
from softhooks.runtime.contexts import Block
from softhooks.runtime.exclusive import exclusive
from softhooks.runtime.generate import wrap_candidate_generator
from softhooks.runtime.install import detach, install, install_added_tokens, install_head, sign_forward
from softhooks.runtime.prompted_model import PromptedModel, prompted_model_of
from softhooks.runtime.recomputed_forward import RecomputeCheck
from softhooks.saving.model import replace_saving

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def attach(
    model: nn.Module,
    method: Method,
    name: str = "default",
    *,
    train_head: bool = True,
    trainable: str | Sequence[str] = (),
    freeze_dropout: bool = False,
    injection: Injection | None = None,
    train_added_tokens: bool | Sequence[int] | PreTrainedTokenizerBase = False,
) -> SoftPrompt:
    """Attach a soft prompt to a model and freeze everything else.

    The new prompt is on; another one attached before is off until `activate`, `rows`, or until this one is removed.

    Args:
        model: any transformers model that embeds tokens, also one that carries LoRA from PEFT.
        method: what to attach.
        name: under which; several prompts may stand on one model.
        train_head: train a copy of a new task head (`score`, `classifier`, `qa_outputs`, ...) with the prompt.
        trainable: patterns (`*lora_*`) of the names of other parameters that stay trainable.
        freeze_dropout: keep the backbone's dropout off while it trains.
        injection: the way in; None lets a check at attach choose the fastest that is exact, and takes slots for single calls in
            which it is not; 'shared' refuses those.
        train_added_tokens: train rows of the vocabulary with the prompt, and save them with it: True, those that
            `resize_token_embeddings` has added since the model was made or loaded; or the ids of tokens; or the tokenizer that
            they were added to. The model's rows stay.

    Returns:
        the handle; also a context manager that removes the prompt.

    Raises:
        AttachError: the prompt cannot be attached. The model is as it was.
        UnsupportedModeError: another thread runs the model.
        OptionError, PromptMismatchError: the method's options do not fit the model.
    """
    return attach_encoder(
        model,
        method,
        name,
        make=lambda structure: method.build(structure),
        conventions=None,
        head_states=None if train_head else {},
        source="given",
        trainable=(trainable,) if isinstance(trainable, str) else tuple(trainable),
        freeze_dropout=freeze_dropout,
        injection=injection,
        frozen_record=True,
        make_added=lambda structure: _added(train_added_tokens, method, model, structure),
    )


def _added(asked: Any, method: Method, model: nn.Module, structure: ModelStructure) -> AddedTokens | None:
    tokenizer = getattr(method, "tokenizer", None)
    if asked is True and tokenizer is not None:
        asked = tokenizer_of(tokenizer)
    ids = chosen_ids(asked, model, structure)
    return copy_rows(ids, model, structure) if ids else None


@exclusive
@names_tried_remedies(attach)
def attach_encoder(
    model: nn.Module,
    method: Method,
    name: str,
    *,
    make: Callable[[ModelStructure], PromptEncoder],
    conventions: dict[str, Any] | None,
    head_states: dict[str, dict[str, Tensor]] | None,
    source: str,
    freeze_dropout: bool,
    injection: Injection | None,
    frozen_record: bool,
    trainable: tuple[str, ...] = (),
    labels: Labels | None = None,
    check: Callable[[ModelStructure], None] | None = None,
    make_added: Callable[[ModelStructure], AddedTokens | None] | None = None,
    take_added: Callable[[AddedTokens], None] | None = None,
    check_base: Callable[[ModelStructure], None] | None = None,
) -> SoftPrompt:
    """Attach an encoder that the method builds or that was saved. See `attach`.

    Args:
        make: makes the encoder for a model.
        head_states: the heads that come with the encoder, by their path in the transformers model; None: copies of every new
            head of the model.
        source: what to call the encoder in errors.
        labels: the names of the heads' labels; None: the model's.
        frozen_record: take the digests that `verify_frozen` compares with.
        make_added: copies rows of the vocabulary that the prompt trains, or none.
        take_added: puts stored rows into these copies.
        check: raises if the encoder was made for a model of another kind.
        check_base: raises if it was made for another model of the kind; the heads fit then.
    """
    present = prompted_model_of(model)
    check_arguments(model, method, name, present, trainable)
    refuse_prompts(model)
    model = present.model if present else model  # a wrapper around a model with a prompt stands for that model
    with unpacked(model), _all_off(present):
        structure = present.structure if present else examine(model)
        needs_ids = method.enters == "embeddings" and reads_ids(model, structure)
        if check is not None:
            check(structure)
        check_length(structure, method)
        encoder = make(structure)
    encoder.to(device_of(structure.entry.embedding))
    module = nn.ModuleDict({"encoder": encoder, "heads": nn.ModuleDict()})
    count = method.num_virtual_tokens
    if conventions is None:
        known = encoder.start_ids
        rows = encoder.folded().get(EMBEDDINGS) if needs_ids and known is None else None
        ids = fresh_ids(model, structure, count, known, rows) if needs_ids else None
        conventions = method.conventions(structure)
    else:
        ids, conventions = stored_ids(model, structure, count, conventions, source, needed=needs_ids)
    if ids is not None:
        module.register_buffer(BUFFER, ids.to(encoder.device))
    heads = find_heads(model, structure)
    if head_states is not None:
        head_states = {home(model) + path: state for path, state in head_states.items()}
        heads = {path: head for path, head in heads.items() if path in head_states}
    module["heads"] = own = copy_heads(heads)
    check_heads(own, head_states or {}, source)
    added = None if make_added is None else make_added(structure)
    if added is not None:
        module[ADDED] = added
    warn_of_added(model, structure, () if added is None else frozenset(added.ids.tolist()))
    if check_base is not None:
        check_base(structure)
    module.train(model.training)

    prompted = present or PromptedModel(model, structure)
    prompt = SoftPrompt(prompted, name, method, module, conventions)
    prompt.labels = labels
    before = prompted.active
    try:
        if present is None:
            _open(prompted, trainable, frozen_record)
        elif frozen_record and prompted.record is None:
            prompted.record = FrozenRecord(model)
        _add(prompted, prompt, heads, freeze_dropout)
        with unwarned(structure):
            with probing(model):
                prompt.injection = choose_injection(prompt, injection)
            if added is not None:
                check_added_rows(prompt, probe_inputs(prompt))
                if take_added is not None:
                    take_added(added)
            prompt.requires_sharing = injection == "shared"
            _prove_reached(prompt)
            method.check(prompt)
            if prompt.objective is not None and prompt.takes_gradients:
                prompt.objective.check(prompt)
        sign_forward(prompted)
    except BaseException as error:
        detach(prompted, name)
        prompted.active = before
        limit = structure.entry.positions.limit
        if isinstance(error, PromptTooLongError) and error.text is not None and limit is not None:
            raise too_long_error(method.where.columns, limit, error.text) from None
        raise
    prompt.is_attached = True
    prompted.recompute_check = RecomputeCheck()  # probes count for nothing
    if method.batch_columns:
        wrap_candidate_generator(prompted)
    return prompt


# --- proofs -----------------------------------------------------------------------------------------------------------


def _prove_reached(prompt: SoftPrompt) -> None:
    """Run the probes of what was attached."""
    entry = prompt.prompted_model.structure.entry
    if prompt.injection == "slots" and not entry.slot_values:
        with probing(prompt.model), _all_off(prompt.prompted_model):
            entry.slot_values = find_fills(entry, probe_inputs(prompt)["input_ids"].flatten(0, -2)[:1])
    prove_reach(prompt)
    with probing_with_prompt(prompt.model):
        check_causality(prompt)
        check_unread(prompt)
        require_common_masks(prompt)
        prompt.takes_left_padding = takes_left_padding(prompt)


# --- changes ----------------------------------------------------------------------------------------------------------


def _all_off(prompted: PromptedModel | None) -> AbstractContextManager[object]:
    """Turn a model's prompts off while its own keys and values are read."""
    return nullcontext() if prompted is None else Block(prompted.model, off=True)


def _open(prompted: PromptedModel, trainable: tuple[str, ...], frozen_record: bool) -> None:
    """Freeze the model, put the container in, register the hooks."""
    model = prompted.model
    for name, parameter in model.named_parameters():
        prompted.was_trainable[name] = parameter.requires_grad
    container = Container()
    container.prompted_model = prompted
    container.training = model.training
    model.add_module(CONTAINER, container)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatch(name, pattern) for pattern in trainable))
    prompted.set_aside.take(
        (name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad
    )
    if frozen_record:
        prompted.record = FrozenRecord(model)
    prompted.fingerprint = take_fingerprint(model, prompted.structure, frozen=True)
    keep_unpacked(model, prompted.patches)
    keep_wrapped(model, prompted.patches)
    replace_saving(prompted)
    install(prompted)


def _add(prompted: PromptedModel, prompt: SoftPrompt, heads: dict[str, nn.Module], freeze_dropout: bool) -> None:
    container: Container = getattr(prompted.model, CONTAINER)
    container[prompt.name] = prompt.module
    prompted.labels.begin(prompt)
    prompted.prompts[prompt.name] = prompt
    prompted.active = prompt.name
    watch(prompt.encoder)
    if prompt.added is not None:
        install_added_tokens(prompted)
    prompted.freeze_dropout = prompted.freeze_dropout or freeze_dropout
    for path in heads:
        install_head(prompted, path)
