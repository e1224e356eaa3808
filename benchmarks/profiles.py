"""Profiles: sizes of models and texts, and numbers of repetitions."""

from __future__ import annotations

from dataclasses import dataclass, replace

SEED = 20


@dataclass(frozen=True)
class Size:
    """A Llama's shape."""

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Shape:
    """One case: P virtual tokens before B rows of T text tokens."""

    virtual: int
    columns: int
    rows: int

    def __str__(self) -> str:
        return f"{self.virtual}/{self.columns}/{self.rows}"


@dataclass(frozen=True)
class Transfer:
    """Numbers of training steps on the toy tasks that share a prompt.

    Attributes:
        teacher_steps: each vanilla prompt of a source task.
        source_steps: the multitask prompt.
        target_steps: the prompt of a target task.
        examples: of each source task.
        shots: examples of a target task.
        seeds: of tasks, data and prompts.
    """

    teacher_steps: int = 200
    source_steps: int = 400
    target_steps: int = 100
    examples: int = 256
    shots: tuple[int, ...] = (4, 16, 64)
    seeds: int = 4


@dataclass(frozen=True)
class Profile:
    """One run's sizes.

    Attributes:
        name: how the results are labeled.
        model: the model that trains and generates.
        shapes: the cases of the training step and of generation.
        memory_shapes, exact_shapes: the cases of those two.
        context_shapes: the cases of CPT, in both, with the context's tokens for P.
        step_rounds: how many times each contestant's step is measured, for each shape.
        context_rounds: the same for the cases of CPT.
        generation_rounds: how many times each contestant generates.
        new_tokens: how many tokens are generated.
        large: the model whose frozen tensors are verified.
        verifications: how often they are.
        gate_pretraining, gate_steps, gate_seeds: how long the toy model of the gates learns, how long its adapters, and how many.
        shot_pretraining, shot_steps, shot_seeds: how long the toy model of few-shot tasks learns, how long its contexts, and how
            many.
        transfer: numbers of training steps on the toy tasks that share a prompt.
        seed: of weights, text and order.
    """

    name: str
    model: Size
    shapes: tuple[Shape, ...]
    memory_shapes: tuple[Shape, ...]
    exact_shapes: tuple[Shape, ...]
    context_shapes: tuple[Shape, ...]
    step_rounds: tuple[int, ...]
    context_rounds: int
    generation_rounds: int
    new_tokens: int
    large: Size
    verifications: int
    gate_pretraining: int
    gate_steps: int
    gate_seeds: int
    shot_pretraining: int
    shot_steps: int
    shot_seeds: int
    transfer: Transfer = Transfer()
    seed: int = SEED


FULL = Profile(
    name="full",
    model=Size(vocabulary=4096, width=384, inner=1024, layers=8, heads=6),  # 17.3 million parameters
    shapes=(Shape(20, 64, 8), Shape(100, 64, 8), Shape(300, 64, 8)),
    memory_shapes=(Shape(20, 64, 8), Shape(100, 64, 8), Shape(300, 64, 8)),
    exact_shapes=(Shape(20, 64, 8), Shape(100, 64, 8)),
    context_shapes=(Shape(400, 32, 8),),
    step_rounds=(40, 25, 15),
    context_rounds=9,
    generation_rounds=9,
    new_tokens=32,
    large=Size(vocabulary=16384, width=768, inner=2048, layers=8, heads=12),  # 327 MB in fp32
    verifications=9,
    gate_pretraining=800,
    gate_steps=100,
    gate_seeds=5,
    shot_pretraining=900,
    shot_steps=60,
    shot_seeds=36,
)

QUICK = replace(
    FULL,
    name="quick",
    step_rounds=(11, 7, 5),
    context_rounds=3,
    generation_rounds=3,
    verifications=3,
    memory_shapes=(Shape(20, 64, 8), Shape(100, 64, 8)),
    exact_shapes=(Shape(100, 64, 8),),
    gate_seeds=2,
    shot_seeds=18,
    transfer=Transfer(seeds=1),
)

SMOKE = Profile(
    name="smoke",
    model=Size(vocabulary=64, width=32, inner=48, layers=2, heads=4),
    shapes=(Shape(4, 6, 2),),
    memory_shapes=(Shape(4, 6, 2),),
    exact_shapes=(Shape(4, 6, 2),),
    context_shapes=(Shape(14, 6, 2),),
    step_rounds=(2,),
    context_rounds=2,
    generation_rounds=2,
    new_tokens=4,
    large=Size(vocabulary=64, width=32, inner=48, layers=2, heads=4),
    verifications=2,
    gate_pretraining=5,
    gate_steps=2,
    gate_seeds=2,
    shot_pretraining=3,
    shot_steps=2,
    shot_seeds=2,
    transfer=Transfer(2, 2, 2, 8, (4,), 1),
)
