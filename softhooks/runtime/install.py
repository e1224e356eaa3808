"""Install the hooks that make a model's forwards use its prompts, and remove them."""

from __future__ import annotations

from torch import nn

from softhooks.backbone.attention_interface import mark_sites, modeling_files
from softhooks.backbone.container import CONTAINER, Container
from softhooks.backbone.position_table import PositionedForward
from softhooks.compat.peft import unwrapped
from softhooks.constraint import unwatch
from softhooks.inject.prefix.cache_pass import hook_masks
from softhooks.runtime.added_token_hooks import AddedTokenHooks
from softhooks.runtime.arguments import SignedForward
from softhooks.runtime.continuous_batching import GenerateBatch, StartContinuousBatching
from softhooks.runtime.generate import ExpandInputs, Generate
from softhooks.runtime.hooks import HeadHooks, ModelHooks, StackHooks
from softhooks.runtime.prompted_model import PromptedModel


def install(prompted: PromptedModel) -> None:
    """Register all hooks on a model, and replace its methods and attention functions."""
    model, stacks, keep = prompted.model, prompted.structure.stacks, prompted.patches.keep
    outermost = ModelHooks(prompted)
    keep(model.register_forward_pre_hook(outermost.enter, with_kwargs=True))
    for stack in stacks:
        stack.state.owner = prompted
        hooks = StackHooks(prompted, stack)
        keep(stack.module.register_forward_pre_hook(hooks.enter, with_kwargs=True))
        keep(stack.module.register_forward_hook(hooks.leave, always_call=True))
        prompted.embedding_hooks.append(stack.embedding.register_forward_hook(hooks.embed))
        keep(prompted.embedding_hooks[-1])
        pooler = getattr(stack.module, "pooler", None)
        if stack.pooled_module is not None:
            keep(stack.pooled_module.register_forward_hook(hooks.strip_slots))
        elif isinstance(pooler, nn.Module):
            keep(pooler.register_forward_pre_hook(hooks.pool))
    keep(model.register_load_state_dict_pre_hook(prompted.note_loaded_state))
    # If the model itself is the stack, the model's hook must run after the stack's hook.
    keep(model.register_forward_hook(outermost.leave, with_kwargs=True, always_call=True))
    mark_sites(stacks, prompted.patches)
    for stack in stacks:
        table = stack.positions.table
        if table is not None:
            prompted.patches.set(table.module, "forward", PositionedForward(stack, table))
        for handle in hook_masks(stack):
            keep(handle)
    StartContinuousBatching.replace(prompted, "init_continuous_batching")
    GenerateBatch.replace(prompted, "generate_batch")
    Generate.replace(prompted, "generate")
    ExpandInputs.replace(prompted, "_expand_inputs_for_generation")
    prompted.files = modeling_files(module for stack in stacks for module in stack.module.modules())
    prompted.join_shared_patches()


def uninstall(prompted: PromptedModel) -> None:
    """Remove all hooks, and restore all attributes."""
    prompted.embedding_hooks.clear()
    prompted.outside_patches.undo()
    prompted.patches.undo()
    for stack in prompted.structure.stacks:
        stack.state.owner = None
    prompted.leave_shared_patches()


def install_head(prompted: PromptedModel, path: str) -> None:
    """Make the forwards use the prompts' copies of one of the model's heads."""
    hooks, head = HeadHooks(prompted, path.replace(".", "/")), prompted.model.get_submodule(path)
    prompted.patches.keep(head.register_forward_hook(hooks.answer, with_kwargs=True))
    prompted.expected_heads.add([head])


def install_added_tokens(prompted: PromptedModel) -> None:
    """Make the forwards use the prompts' copies of added tokens' embeddings."""
    if prompted.has_added_tokens:
        return
    prompted.has_added_tokens = True
    head = AddedTokenHooks(prompted).head
    prompted.embed_last()  # after the hook on added tokens, because a virtual token may have the id of an added token
    if head is not None:
        prompted.expected_heads.add([head])


def sign_forward(prompted: PromptedModel) -> None:
    """Add the columns that the prompts use to the signature of the model's forward."""
    signed = []
    for module in {id(m): m for m in (prompted.model, unwrapped(prompted.model))}.values():
        known = getattr(module.__dict__.get("forward"), "names", ())
        new = [name for name in prompted.columns if name not in known]
        if new:
            signed.append((module, SignedForward(module, new, prompted.accepted)))
    for module, forward in signed:
        prompted.patches.set(module, "forward", forward)


def detach(prompted: PromptedModel, name: str) -> None:
    """Remove a prompt. If it was active, activate the prompt attached last; if it was the only prompt, remove all hooks."""
    model = prompted.model
    container = model._modules.get(CONTAINER)
    prompt = prompted.prompts.pop(name, None)
    if prompt is not None:
        unwatch(prompt.encoder)
    if isinstance(container, Container) and name in container:
        del container[name]
    if prompted.active == name:
        prompted.active = next(reversed(prompted.prompts), None)
    if prompted.prompts:
        return
    uninstall(prompted)
    model._modules.pop(CONTAINER, None)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in prompted.was_trainable:
            parameter.requires_grad_(prompted.was_trainable[parameter_name])
    prompted.stashed_gradients.restore(model.named_parameters())
