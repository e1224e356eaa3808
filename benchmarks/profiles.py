"""What is measured: the sizes of the models and texts, and how often."""

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
class Profile:
    """One run's sizes.

    Attributes:
        name: how the results are labelled.
        model: the model that trains and generates.
        shapes: the cases of the training step and of generation.
        memory_shapes, exact_shapes: the cases of those two.
        step_rounds: how many times each contestant's step is measured, for each shape.
        generation_rounds: how many times each contestant generates.
        new_tokens: how many tokens are generated.
        large: the model whose frozen tensors are verified.
        verifications: how often they are.
        seed: of weights, text and order.
    """

    name: str
    model: Size
    shapes: tuple[Shape, ...]
    memory_shapes: tuple[Shape, ...]
    exact_shapes: tuple[Shape, ...]
    step_rounds: tuple[int, ...]
    generation_rounds: int
    new_tokens: int
    large: Size
    verifications: int
    seed: int = SEED


FULL = Profile(
    name="full",
    model=Size(vocabulary=4096, width=384, inner=1024, layers=8, heads=6),  # 17.3 million parameters
    shapes=(Shape(20, 64, 8), Shape(100, 64, 8), Shape(300, 64, 8)),
    memory_shapes=(Shape(100, 64, 8), Shape(300, 64, 8)),
    exact_shapes=(Shape(20, 64, 8), Shape(100, 64, 8)),
    step_rounds=(40, 25, 15),
    generation_rounds=9,
    new_tokens=32,
    large=Size(vocabulary=16384, width=768, inner=2048, layers=8, heads=12),  # 327 MB in fp32
    verifications=9,
)

QUICK = replace(
    FULL, name="quick", step_rounds=(11, 7, 5), generation_rounds=3, verifications=3, exact_shapes=(Shape(100, 64, 8),)
)

SMOKE = Profile(
    name="smoke",
    model=Size(vocabulary=64, width=32, inner=48, layers=2, heads=4),
    shapes=(Shape(4, 6, 2),),
    memory_shapes=(Shape(4, 6, 2),),
    exact_shapes=(Shape(4, 6, 2),),
    step_rounds=(2,),
    generation_rounds=2,
    new_tokens=4,
    large=Size(vocabulary=64, width=32, inner=48, layers=2, heads=4),
    verifications=2,
)
