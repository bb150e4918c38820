from __future__ import annotations

import pytest
import torch
from torch import nn

from rayclust.methods.ema import cosine, follow


def _twins() -> tuple[nn.Linear, nn.Linear]:
    teacher, student = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.fill_(1.0)
        for parameter in student.parameters():
            parameter.zero_()
    return teacher, student


def test_the_gap_to_a_constant_student_shrinks_by_the_momentum():
    teacher, student = _twins()
    for step in range(1, 4):
        follow(teacher, student, 0.996)
        assert teacher.weight.flatten().tolist() == pytest.approx([0.996**step] * 6)
    assert not student.weight.any()


def test_momentum_one_keeps_the_teacher_and_zero_copies_the_student():
    teacher, student = _twins()
    follow(teacher, student, 1.0)
    assert (teacher.weight == 1).all()
    follow(teacher, student, 0.0)
    assert teacher.bias.equal(student.bias)


def test_buffers_are_the_teachers_own():
    teacher, student = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    student.running_mean.fill_(5.0)
    follow(teacher, student, 0.5)
    assert not teacher.running_mean.any()


def test_cosine_starts_at_its_start_is_half_way_in_the_middle_and_stays_at_its_end():
    assert cosine(0.996, 1.0, 0, 100) == 0.996
    assert cosine(0.996, 1.0, 50, 100) == pytest.approx(0.998)
    assert cosine(0.996, 1.0, 100, 100) == 1.0
    assert cosine(0.996, 1.0, 500, 100) == 1.0
    assert cosine(0.3, 0.3, 7, 100) == 0.3
    assert cosine(1.0, 0.0, 0, 0) == 0.0
