"""Attach a prompt to a model. If an error occurs, every change to the model is undone."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from softhooks.backbone.container import CONTAINER, Container
from softhooks.backbone.dependence import reads_ids
from softhooks.backbone.examine import examine
from softhooks.backbone.example import without_columns
from softhooks.backbone.max_positions import without_position_warning
from softhooks.backbone.probing import probing, probing_with_prompt
from softhooks.base_model.frozen_record import FrozenRecord
from softhooks.base_model.take_fingerprint import take_fingerprint
from softhooks.checks.attach_arguments import check_arguments, check_length, require_tokens, too_long_error
from softhooks.checks.causality import check_causality
from softhooks.checks.choose_injection import choose_injection, probe_inputs
from softhooks.checks.content_masks import require_common_masks
from softhooks.checks.example_batch import check_example
from softhooks.checks.left_padding import takes_left_padding
from softhooks.checks.reaches_output import prove_reach
from softhooks.checks.remedies import names_tried_remedies
from softhooks.checks.transformers_version import check_transformers
from softhooks.checks.unread_slots import check_unread
from softhooks.compat.bitsandbytes import keep_unpacked, unpacked
from softhooks.compat.peft import refuse_peft_prompts, refuse_unloading
from softhooks.constraint import watch
from softhooks.errors import OptionError, PromptTooLongError
from softhooks.inject.slots.argument_values import find_fills
from softhooks.method import Method
from softhooks.prompt import SoftPrompt
from softhooks.runtime.added_token_hooks import check_added_rows
from softhooks.runtime.attached_prompt import Injection
from softhooks.runtime.exclusive import exclusive
from softhooks.runtime.generate import CandidateGenerator
from softhooks.runtime.install import detach, install, install_added_tokens, install_head, sign_forward
from softhooks.runtime.prompt_parts import NewPrompt, PromptSource, build_module
from softhooks.runtime.prompted_model import PromptedModel, prompted_model_of
from softhooks.runtime.selection import RecomputeCheck
from softhooks.runtime.with_blocks import Block
from softhooks.saving.save_pretrained import replace_saving

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
    example: Mapping[str, Any] | None = None,
) -> SoftPrompt:
    """Attach a soft prompt to a model and freeze everything else.

    The new prompt becomes active, and all others inactive; `activate` and `rows` select other prompts. When the active prompt is
    removed, the prompt that was attached last becomes active.

    Args:
        model: any transformers model that embeds tokens, or that takes images or sound, with or without LoRA from PEFT.
        method: the method and its options, such as `PromptTuning(20)`.
        name: the prompt's name; a model can have several prompts.
        train_head: train a copy of a newly initialized task head (`score`, `classifier`, `qa_outputs`, ...) with the prompt.
        trainable: name patterns, such as `*lora_*`, of other parameters to train with the prompt.
        freeze_dropout: disable the backbone's dropout during training.
        injection: how the prompt enters the model; see `SoftPrompt.injection`. The default is the fastest injection that is
            exact for the model. If that is 'shared', model calls that it does not support use 'slots' instead; if you pass
            'shared', they raise an error.
        train_added_tokens: train copies of the embeddings of added tokens, and save them with the prompt. Pass the token ids,
            the tokenizer to which tokens were added, or True for all tokens that `resize_token_embeddings` has added since the
            model was created or loaded. The model's own embeddings do not change.
        example: a batch of the model's inputs. `attach` checks that the model runs on it with the prompt. If the model does not
            run on token ids alone, the other checks use the batch's other inputs too, such as bounding boxes or images.

    Returns:
        the prompt; as a context manager, it removes itself at the end of the `with` block.

    Raises:
        AttachError: the prompt cannot be attached; the model is unchanged.
        UnsupportedModeError: this is the model's first prompt, and another thread is running the model.
        OptionError, PromptMismatchError: the method's options are invalid for this model.
    """
    return attach_prompt(
        model,
        method,
        name,
        NewPrompt(method, train_head, train_added_tokens),
        trainable=(trainable,) if isinstance(trainable, str) else tuple(trainable),
        freeze_dropout=freeze_dropout,
        injection=injection,
        frozen_record=True,
        example=example,
    )


@exclusive
@names_tried_remedies(attach)
def attach_prompt(
    model: nn.Module,
    method: Method,
    name: str,
    source: PromptSource,
    *,
    trainable: tuple[str, ...] = (),
    freeze_dropout: bool,
    injection: Injection | None,
    frozen_record: bool,
    example: Mapping[str, Any] | None = None,
) -> SoftPrompt:
    """Attach a new or stored prompt; see `attach`. If `frozen_record` is True, hash the frozen tensors for `verify_frozen`."""
    check_transformers()
    if example is not None and not isinstance(example, Mapping):
        raise OptionError(
            f"`example` has the type {type(example).__name__}; it must be a batch: a dict of the model's inputs by name."
        )
    present = prompted_model_of(model)
    check_arguments(model, method, name, present, trainable)
    refuse_peft_prompts(model)
    model = present.model if present else model  # prompts are attached to the model inside a wrapper
    with unpacked(model), _all_off(present):
        structure = (
            present.structure if present else examine(model, without_columns(example, model, method.batch_columns))
        )
        require_tokens(structure, method)
        needs_ids = method.enters == "embeddings" and reads_ids(model, structure)
        source.check_fit(structure)
        check_length(structure, method)
        encoder = source.build(structure)
    module, conventions, heads = build_module(model, structure, source, encoder, needs_ids)

    prompted = present or PromptedModel(model, structure)
    prompt = SoftPrompt(prompted, name, method, module, conventions)
    prompt.labels = source.labels
    before = prompted.active
    try:
        if present is None:
            _freeze_and_install(prompted, trainable, frozen_record)
        elif frozen_record and prompted.record is None:
            prompted.record = FrozenRecord(model)
        _add(prompted, prompt, heads, freeze_dropout)
        with without_position_warning(structure):
            _check_attached(prompt, injection, source)
            if example is not None:
                check_example(prompt, example)
        sign_forward(prompted)
    except BaseException as error:
        detach(prompted, name)
        prompted.active = before
        limit = structure.entry.positions.limit
        if isinstance(error, PromptTooLongError) and error.text is not None and limit is not None:
            raise too_long_error(method.token_layout.num_slots, limit, error.text) from None
        raise
    prompt.is_attached = True
    prompted.recompute_check = RecomputeCheck()  # forget the checks' forward passes
    if method.batch_columns:
        CandidateGenerator.replace(prompted, "_get_candidate_generator")
    return prompt


def _check_attached(prompt: SoftPrompt, injection: Injection | None, source: PromptSource) -> None:
    """Choose the injection, and run the model to check that the prompt works with it."""
    method, added = prompt.method, prompt.added
    with probing(prompt.model):
        prompt.injection = choose_injection(prompt, injection)
    if added is not None:
        check_added_rows(prompt, probe_inputs(prompt))
        source.fill_added_tokens(added)
    prompt.requires_sharing = injection == "shared"
    entry = prompt.structure.entry
    if prompt.injection == "slots" and not entry.slot_values:
        with probing(prompt.model), _all_off(prompt.prompted_model):
            entry.slot_values = find_fills(entry, probe_inputs(prompt)["input_ids"].flatten(0, -2)[:1])
    prove_reach(prompt)
    with probing_with_prompt(prompt.model):
        check_causality(prompt)
        check_unread(prompt)
        require_common_masks(prompt)
        prompt.takes_left_padding = takes_left_padding(prompt)
    method.check(prompt)
    if prompt.objective is not None and prompt.takes_gradients:
        prompt.objective.check(prompt)


def _all_off(prompted: PromptedModel | None) -> AbstractContextManager[object]:
    """Return a context manager that disables the prompts that are already attached."""
    return nullcontext() if prompted is None else Block(prompted.model, off=True)


def _freeze_and_install(prompted: PromptedModel, trainable: tuple[str, ...], frozen_record: bool) -> None:
    """Freeze the model, add the container for the prompts' parameters, and register the hooks."""
    model = prompted.model
    prompted.was_trainable.update((name, parameter.requires_grad) for name, parameter in model.named_parameters())
    container = Container()
    container.prompted_model = prompted
    container.training = model.training
    model.add_module(CONTAINER, container)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatch(name, pattern) for pattern in trainable))
    prompted.stashed_gradients.take(
        (name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad
    )
    if frozen_record:
        prompted.record = FrozenRecord(model)
    prompted.fingerprint = take_fingerprint(model, prompted.structure, frozen=True)
    keep_unpacked(model, prompted.patches)
    refuse_unloading(model, prompted.patches)
    replace_saving(prompted)
    install(prompted)


def _add(prompted: PromptedModel, prompt: SoftPrompt, heads: dict[str, nn.Module], freeze_dropout: bool) -> None:
    """Add a prompt to the model, activate it, and register the hooks for its heads and added tokens."""
    container: Container = getattr(prompted.model, CONTAINER)
    container[prompt.name] = prompt.module
    prompted.labels.add(prompt)
    prompted.prompts[prompt.name] = prompt
    prompted.active = prompt.name
    watch(prompt.encoder)
    if prompt.added is not None:
        install_added_tokens(prompted)
    prompted.freeze_dropout = prompted.freeze_dropout or freeze_dropout
    for path in heads:
        install_head(prompted, path)
