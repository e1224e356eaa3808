"""Training loops of PyTorch-Ignite: its `Checkpoint` holds the prompt in the place of the model.

`softhooks.attach` works in an Engine's step as in any other loop; constraints run after each step of the optimizer by themselves.
`track` gives what `Checkpoint` asks its objects for (`state_dict`, `load_state_dict`): the live parameters and a description,
tensors only, which `Checkpoint.load_objects` reads without a pickle's classes; a run goes on bit for bit.
Each run begins with a check of the optimizer, each step with one that the loss has reached the prompt, and each run ends with the
proof that nothing else has moved (its report is the handle's `report`). In several processes, ranks begin with rank 0's prompt
and must end with one; attach and track before `idist.auto_model`.

Refused: an optimizer that holds other parameters than the prompt's, or not all of them; a checkpoint of another method, base or
optimizer, before anything is loaded; two prompts on one model; a prompt removed in mid-run.

Example:
    import softhooks
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint
    from softhooks.integrations.ignite import track

    prompt = softhooks.attach(model, softhooks.PrefixTuning(16))
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=5e-3)

    def step(engine, batch):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    trainer = Engine(step)
    to_save = {"prompt": track(trainer, prompt, optimizer), "optimizer": optimizer, "trainer": trainer}
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(to_save, "checkpoints"))
    trainer.run(loader, max_epochs=2)  # to go on: Checkpoint.load_objects(to_save, "checkpoints/checkpoint_4.pt")

Versions tested: pytorch-ignite 0.5.5
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from softhooks.errors import SoftHooksError, TrainerError
from softhooks.integration_support.training import broadcast_from_rank_0, require_same_on_all_ranks
from softhooks.prompt import SoftPrompt

from ._training_state import LivePrompt, require_optimizer

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["track"]


def track(engine: Engine, prompt: SoftPrompt, optimizer: Optimizer, *, check_frozen: bool = True) -> LivePrompt:
    """Watch an Engine that trains a prompt, and give what its checkpoints hold of it.

    Args:
        engine: the one that steps the optimizer.
        prompt: what it trains.
        optimizer: what it steps.
        check_frozen: at each `COMPLETED`, compare the digests of the base.

    Returns:
        an object for `Checkpoint`'s `to_save` and `load_objects`.

    Raises:
        TrainerError: the engine is none, or the optimizer does not hold exactly what the prompt trains; nothing is changed.
        SoftHooksError: Ignite is not installed.
    """
    try:
        import ignite.distributed as idist
        from ignite.engine import Engine, Events
    except ImportError as error:
        raise SoftHooksError('this needs PyTorch-Ignite; install it with `pip install "softhooks[ignite]"`.') from error
    if not isinstance(engine, Engine):
        raise TrainerError(f"track takes an ignite.engine.Engine; it was given {type(engine).__name__}.")
    live = LivePrompt(prompt, optimizer)
    broadcast_from_rank_0(prompt, idist.device())

    def begin(_engine: Any) -> None:
        prompt._require_attached()
        require_optimizer(prompt, optimizer)

    def before_step(*_given: Any) -> None:
        live.require_gradient(engine.state.iteration - 1)

    def end(_engine: Any) -> None:
        prompt._require_attached()
        require_same_on_all_ranks(prompt)
        if check_frozen:
            live.verify_frozen()

    prompt.prompted_model.outside_patches.keep(optimizer.register_step_pre_hook(before_step))
    engine.add_event_handler(Events.STARTED, begin)
    engine.add_event_handler(Events.COMPLETED, end)
    return live
