"""The passes of pair_softmax.py as Triton kernels: logits come in as they are, sums run in float32, nothing is stored.

A program owns some pairs of one head, both views of each, and goes along the clusters with running log-sum-exps: when a
larger logit turns up, what was summed is scaled down. Sums over pairs are taken by programs that own clusters, in one
order. No two programs write to one place, so that the same logits always give the same bits. The way back computes
probabilities again from the log-sum-exps instead of reading them.

Block sizes are fixed: 4,096 logits of each of a teacher's views in 8 warps, 2,048 of each of the four that a student's
comparison reads in 4 warps; 16 values of each a thread.

Source: arXiv 1805.02867 for the running log-sum-exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayclust.kernels.pair_softmax import Lesson, Normalizers

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-1e30)
"""Stands for a logit that is not there."""
TEACHER_PAIRS, TEACHER_CLUSTERS, TEACHER_WARPS = 8, 512, 8
STUDENT_PAIRS, STUDENT_CLUSTERS, STUDENT_WARPS = 4, 512, 4
SUM_PAIRS, SUM_CLUSTERS, SUM_WARPS = 32, 128, 4


@triton.jit
def _larger(top, x):
    return tl.maximum(top, tl.max(x, axis=1))


@triton.jit
def _tile(place, columns, room, known):
    """Logits in units of ln 2, Float32[pairs clusters].

    The mask of the load is one of whole lines, with the filling of a row inside: so it is one load for 8 values.
    """
    x = tl.load(place + columns[None, :], mask=room, other=0.0).to(tl.float32)
    return tl.where(known[None, :], x * LOG2E, NOTHING)


@triton.jit
def _teach_pairs(
    logits, normalizer, agreement, pairs, clusters, row_stride, view_stride,
    pair_block: tl.constexpr, cluster_block: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of both views of some pairs, and Σ_c of the products of their probabilities."""
    head = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0) * pair_block + tl.arange(0, pair_block)
    here = pair < pairs
    first = logits + ((2 * head * pairs + pair) * row_stride)[:, None]
    second = first + view_stride
    top_a = tl.full([pair_block], NOTHING, tl.float32)
    top_b = tl.full([pair_block], NOTHING, tl.float32)
    sum_a = tl.zeros([pair_block], tl.float32)
    sum_b = tl.zeros([pair_block], tl.float32)
    product = tl.zeros([pair_block], tl.float32)
    for start in range(0, clusters, cluster_block):
        columns = start + tl.arange(0, cluster_block)
        known, room = columns < clusters, here[:, None] & (columns < row_stride)[None, :]
        a = _tile(first, columns, room, known)
        b = _tile(second, columns, room, known)
        new_a, new_b = _larger(top_a, a), _larger(top_b, b)
        shrink_a, shrink_b = tl.exp2(top_a - new_a), tl.exp2(top_b - new_b)
        a = tl.exp2(a - new_a[:, None])
        b = tl.exp2(b - new_b[:, None])
        sum_a = sum_a * shrink_a + tl.sum(a, axis=1)
        sum_b = sum_b * shrink_b + tl.sum(b, axis=1)
        product = product * shrink_a * shrink_b + tl.sum(a * b, axis=1)
        top_a, top_b = new_a, new_b
    place = normalizer + 2 * head * pairs + pair
    tl.store(place, (top_a + tl.log2(sum_a)) * LN2, mask=here)
    tl.store(place + pairs, (top_b + tl.log2(sum_b)) * LN2, mask=here)
    tl.store(agreement + head * pairs + pair, product / (sum_a * sum_b), mask=here)


@triton.jit
def _sum_shares(
    logits, normalizer, sums, rows, clusters, row_stride,
    row_block: tl.constexpr, cluster_block: tl.constexpr,
):  # fmt: skip
    """Probabilities of some clusters, added up over all views and pairs of a head, always in the same order."""
    head = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * cluster_block + tl.arange(0, cluster_block)
    total = tl.zeros([cluster_block], tl.float32)
    for start in range(0, rows, row_block):
        row = start + tl.arange(0, row_block)
        here = row < rows
        known, room = columns < clusters, here[:, None] & (columns < row_stride)[None, :]
        x = _tile(logits + ((head * rows + row) * row_stride)[:, None], columns, room, known)
        z = tl.load(normalizer + head * rows + row, mask=here, other=0.0) * LOG2E
        total += tl.sum(tl.where(here[:, None], tl.exp2(x - z[:, None]), 0.0), axis=0)
    tl.store(sums + head * clusters + columns, total, mask=columns < clusters)


@triton.jit
def _compare_pairs(
    student, teacher, log_marginal, own, both, pairs, clusters, row_stride, view_stride, beta,
    pair_block: tl.constexpr, cluster_block: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of both views of a student, each alone and with the teacher's other view."""
    head = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0) * pair_block + tl.arange(0, pair_block)
    here = pair < pairs
    row = ((2 * head * pairs + pair) * row_stride)[:, None]
    top_a = tl.full([pair_block], NOTHING, tl.float32)
    top_b = tl.full([pair_block], NOTHING, tl.float32)
    top_ab = tl.full([pair_block], NOTHING, tl.float32)
    top_ba = tl.full([pair_block], NOTHING, tl.float32)
    sum_a = tl.zeros([pair_block], tl.float32)
    sum_b = tl.zeros([pair_block], tl.float32)
    sum_ab = tl.zeros([pair_block], tl.float32)
    sum_ba = tl.zeros([pair_block], tl.float32)
    for start in range(0, clusters, cluster_block):
        columns = start + tl.arange(0, cluster_block)
        known, room = columns < clusters, here[:, None] & (columns < row_stride)[None, :]
        share = tl.load(log_marginal + head * clusters + columns, mask=known, other=0.0) * LOG2E
        a = _tile(student + row, columns, room, known)
        b = _tile(student + row + view_stride, columns, room, known)
        ab = beta * (a + _tile(teacher + row + view_stride, columns, room, known)) - share[None, :]
        ba = beta * (b + _tile(teacher + row, columns, room, known)) - share[None, :]
        new_a, new_b, new_ab, new_ba = _larger(top_a, a), _larger(top_b, b), _larger(top_ab, ab), _larger(top_ba, ba)
        sum_a = sum_a * tl.exp2(top_a - new_a) + tl.sum(tl.exp2(a - new_a[:, None]), axis=1)
        sum_b = sum_b * tl.exp2(top_b - new_b) + tl.sum(tl.exp2(b - new_b[:, None]), axis=1)
        sum_ab = sum_ab * tl.exp2(top_ab - new_ab) + tl.sum(tl.exp2(ab - new_ab[:, None]), axis=1)
        sum_ba = sum_ba * tl.exp2(top_ba - new_ba) + tl.sum(tl.exp2(ba - new_ba[:, None]), axis=1)
        top_a, top_b, top_ab, top_ba = new_a, new_b, new_ab, new_ba
    place = 2 * head * pairs + pair
    tl.store(own + place, (top_a + tl.log2(sum_a)) * LN2, mask=here)
    tl.store(own + place + pairs, (top_b + tl.log2(sum_b)) * LN2, mask=here)
    tl.store(both + place, (top_ab + tl.log2(sum_ab)) * LN2, mask=here)
    tl.store(both + place + pairs, (top_ba + tl.log2(sum_ba)) * LN2, mask=here)


@triton.jit
def _give_way(
    student, teacher, log_marginal, own, both, gains, pairs, clusters, row_stride, view_stride, beta,
    pair_block: tl.constexpr, cluster_block: tl.constexpr,
):  # fmt: skip
    """gain·(softmax − posterior) of a tile of both views, over the student's logits; 0 behind the last cluster."""
    head = tl.program_id(2).to(tl.int64)
    pair = tl.program_id(0) * pair_block + tl.arange(0, pair_block)
    columns = tl.program_id(1) * cluster_block + tl.arange(0, cluster_block)
    here, known = pair < pairs, columns < clusters
    room = here[:, None] & (columns < row_stride)[None, :]
    row = ((2 * head * pairs + pair) * row_stride)[:, None]
    share = tl.load(log_marginal + head * clusters + columns, mask=known, other=0.0) * LOG2E
    gain = tl.load(gains + head * pairs + pair, mask=here, other=0.0)
    place = 2 * head * pairs + pair
    own_a = tl.load(own + place, mask=here, other=0.0) * LOG2E
    own_b = tl.load(own + place + pairs, mask=here, other=0.0) * LOG2E
    both_a = tl.load(both + place, mask=here, other=0.0) * LOG2E
    both_b = tl.load(both + place + pairs, mask=here, other=0.0) * LOG2E
    a = _tile(student + row, columns, room, known)
    b = _tile(student + row + view_stride, columns, room, known)
    ab = beta * (a + _tile(teacher + row + view_stride, columns, room, known)) - share[None, :]
    ba = beta * (b + _tile(teacher + row, columns, room, known)) - share[None, :]
    slope_a = gain[:, None] * (tl.exp2(a - own_a[:, None]) - tl.exp2(ab - both_a[:, None]))
    slope_b = gain[:, None] * (tl.exp2(b - own_b[:, None]) - tl.exp2(ba - both_b[:, None]))
    dtype = student.dtype.element_ty
    tl.store(student + row + columns[None, :], tl.where(known[None, :], slope_a, 0.0).to(dtype), mask=room)
    tl.store(
        student + row + view_stride + columns[None, :], tl.where(known[None, :], slope_b, 0.0).to(dtype), mask=room
    )


def normalize(logits: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """The first sweep of `pair_softmax.teach`: Float32[H 2 B] log-sum-exps and Float32[H B] agreement.

    Args:
        logits: BFloat16 or Float32[H 2 B P], contiguous.
        clusters: K, at most P.
    """
    heads, _, pairs, stride = logits.shape
    normalizer, agreement = _room(logits, heads, 2, pairs), _room(logits, heads, pairs)
    _teach_pairs[(triton.cdiv(pairs, TEACHER_PAIRS), heads)](
        logits, normalizer, agreement, pairs, clusters, stride, pairs * stride,
        pair_block=TEACHER_PAIRS, cluster_block=TEACHER_CLUSTERS, num_warps=TEACHER_WARPS,
    )  # fmt: skip
    return normalizer, agreement


def sum_shares(logits: Tensor, normalizer: Tensor, clusters: int) -> Tensor:
    """The second sweep: Float32[H K], probabilities summed over views and pairs.

    Args:
        logits: as given to `normalize`.
        normalizer: Float32[H 2 B], log-sum-exps over all clusters.
        clusters: K.
    """
    heads, _, pairs, stride = logits.shape
    sums = _room(logits, heads, clusters)
    _sum_shares[(triton.cdiv(clusters, SUM_CLUSTERS), heads)](
        logits, normalizer.contiguous(), sums, 2 * pairs, clusters, stride,
        row_block=SUM_PAIRS, cluster_block=SUM_CLUSTERS, num_warps=SUM_WARPS,
    )  # fmt: skip
    return sums


def compare(student: Tensor, teacher: Tensor, lesson: Lesson) -> Normalizers:
    """See `pair_softmax.compare`."""
    heads, _, pairs, stride = student.shape
    found = Normalizers(_room(student, heads, 2, pairs), _room(student, heads, 2, pairs))
    clusters = lesson.log_marginal.shape[1]
    _compare_pairs[(triton.cdiv(pairs, STUDENT_PAIRS), heads)](
        student, teacher, lesson.log_marginal.contiguous(), found.own, found.both,
        pairs, clusters, stride, pairs * stride, lesson.beta,
        pair_block=STUDENT_PAIRS, cluster_block=STUDENT_CLUSTERS, num_warps=STUDENT_WARPS,
    )  # fmt: skip
    return found


def give_way(student: Tensor, teacher: Tensor, lesson: Lesson, found: Normalizers) -> None:
    """See `pair_softmax.give_way`."""
    heads, _, pairs, stride = student.shape
    gains = (lesson.scale * lesson.beta * lesson.weights).expand(heads, -1).contiguous()
    clusters = lesson.log_marginal.shape[1]
    _give_way[(triton.cdiv(pairs, STUDENT_PAIRS), triton.cdiv(stride, STUDENT_CLUSTERS), heads)](
        student, teacher, lesson.log_marginal.contiguous(), found.own, found.both, gains,
        pairs, clusters, stride, pairs * stride, lesson.beta,
        pair_block=STUDENT_PAIRS, cluster_block=STUDENT_CLUSTERS, num_warps=STUDENT_WARPS,
    )  # fmt: skip


def _room(like: Tensor, *sizes: int) -> Tensor:
    return torch.empty(*sizes, dtype=torch.float32, device=like.device)
