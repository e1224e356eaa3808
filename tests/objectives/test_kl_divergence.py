"""The divergence of two distributions, against torch's own and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from softhooks.objectives.losses import kl_divergence


def by_hand(teacher: torch.Tensor, student: torch.Tensor, kept: int) -> float:
    """KL over the teacher's `kept` most likely tokens and one more for all others."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    order = sorted(range(len(p)), key=lambda i: -float(p[i]))
    parts = [[i] for i in order[:kept]] + [order[kept:]]
    total = 0.0
    for part in parts:
        here, there = float(p[part].sum()), float(q[part].sum())
        total += here * float(torch.log(torch.tensor(here / there, dtype=torch.float64))) if here > 0 else 0.0
    return total


def test_it_is_torchs_divergence() -> None:
    teacher, student = torch.randn(4, 3, 11), torch.randn(4, 3, 11)
    expected = functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    torch.testing.assert_close(kl_divergence(teacher, student), expected.sum(-1))
    torch.testing.assert_close(kl_divergence(teacher, student, top_k=11), expected.sum(-1))
    torch.testing.assert_close(kl_divergence(teacher, student, top_k=10), expected.sum(-1))


@given(kept=st.integers(1, 7), seed=st.integers(0, 1000), sharp=st.sampled_from([0.1, 1.0, 5.0]))
def test_the_likeliest_tokens_and_the_rest(kept: int, seed: int, sharp: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(8, generator=generator) * sharp for _ in range(2))
    found = float(kl_divergence(teacher, student, top_k=kept))
    assert found == pytest.approx(by_hand(teacher, student, kept), rel=1e-4, abs=1e-5)
    assert -1e-6 <= found <= float(kl_divergence(teacher, student)) + 1e-5


@pytest.mark.parametrize("top_k", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_zero_where_student_is_teacher(top_k: int | None, dtype: torch.dtype) -> None:
    logits = (torch.randn(5, 9) * 40).to(dtype)
    assert bool((kl_divergence(logits, logits.clone(), top_k) == 0).all())


def test_a_teacher_that_is_certain_gives_finite_gradients() -> None:
    teacher = torch.full((1, 6), -500.0)
    teacher[0, 2] = 500.0
    student = torch.randn(1, 6, requires_grad=True)
    for top_k in (None, 1, 3):
        kl_divergence(teacher, student, top_k).sum().backward()
        assert student.grad is not None
        assert bool(student.grad.isfinite().all())


def test_gradients_are_those_of_cross_entropy_with_the_teacher() -> None:
    teacher, student = torch.randn(3, 7), torch.randn(3, 7, requires_grad=True)
    (ours,) = torch.autograd.grad(kl_divergence(teacher, student).sum(), student)
    (theirs,) = torch.autograd.grad(-(teacher.softmax(-1) * student.log_softmax(-1)).sum(), student)
    torch.testing.assert_close(ours, theirs)
