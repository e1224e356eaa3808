"""PyTorch-Ignite: a `Checkpoint` that holds the prompt instead of the model.

`track` returns an object to save in a `Checkpoint`, from which training resumes bit for bit. The state of this object consists
only of tensors, so loading the state unpickles no classes. `track` makes the Engine check the optimizer at the start of each
run, the prompt's gradient before each step, and the base at the end of each run (the object's `report` holds the result). With
several processes, all ranks start with the prompt of rank 0, and must end with equal prompts; call `attach` and `track` before
`idist.auto_model`.

These raise an error: an optimizer that does not hold exactly the prompt's parameters; a checkpoint of another method, base or
optimizer, before anything is loaded; two prompts on one model; a prompt that is removed during a run.

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
    trainer.run(loader, max_epochs=2)  # to resume: Checkpoint.load_objects(to_save, "checkpoints/checkpoint_4.pt")

Versions tested: pytorch-ignite 0.5.5
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from softhooks.errors import TrainerError
from softhooks.integration_support.training import broadcast_from_rank_0, require_same_on_all_ranks
from softhooks.prompt import SoftPrompt

from ._imports import import_framework
from ._training_state import LivePrompt, require_optimizer

if TYPE_CHECKING:
    from ignite.engine import Engine

__all__ = ["track"]


def track(engine: Engine, prompt: SoftPrompt, optimizer: Optimizer, *, check_frozen: bool = True) -> LivePrompt:
    """Check a prompt while an Engine trains it, and return an object for `Checkpoint`'s `to_save` and `load_objects`.

    Args:
        engine: the Engine that trains the prompt.
        prompt: the attached prompt.
        optimizer: the optimizer; it must hold exactly the prompt's parameters.
        check_frozen: whether to check at the end of each run that the base has not changed.

    Raises:
        TrainerError: `engine` is not an Engine, or the optimizer does not hold exactly the prompt's parameters. Nothing is
            changed.
        SoftHooksError: Ignite is not installed.
    """
    import_framework("ignite.engine", "PyTorch-Ignite", "ignite")
    import ignite.distributed as idist
    from ignite.engine import Engine, Events

    if not isinstance(engine, Engine):
        raise TrainerError(f"`track` was given {type(engine).__name__} instead of an ignite.engine.Engine.")
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
