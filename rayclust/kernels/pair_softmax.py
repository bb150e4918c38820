"""Softmaxes of pairs of views and the information between them, from logits alone, with the gradient in closed form.

Logits are Compute[H V B P]: heads, views of a row, rows of a chunk, and K clusters padded to P columns, divided by the
temperature. *Compute* is BFloat16, Float32 or Float64; *Accum*, the dtype of all sums, Float32 or Float64. Rows and
heads are independent but for `TeacherStats.sums`, which add up, so that callers may pass any chunk of them.

Two forms of the same passes: plain torch, and Triton kernels for two views on a GPU. Source: arXiv 2303.17896.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayclust.kernels.screening import accum_dtype

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch for CPUs alone
    triton = None

COLUMN_MULTIPLE = 64
"""On a GPU rows of logits are a multiple of this many columns long, so that each starts on a whole line of memory."""


@dataclass(frozen=True)
class TeacherStats:
    """Statistics of a teacher's logits that the student's loss needs."""

    normalizer: Tensor
    """Accum[H V B], log-sum-exp over clusters."""
    agreement: Tensor
    """Accum[H B], probability that two views of a row fall into one cluster, averaged over the pairs of views."""
    sums: Tensor
    """Accum[H K], probabilities summed over views and rows."""


@dataclass(frozen=True)
class PairLossInputs:
    """Everything but logits that the student's loss takes."""

    normalizer: Tensor
    """Accum[H V B], the teacher's."""
    log_marginal: Tensor
    """Accum[H K], ln p̂."""
    weights: Tensor
    """Accum[H B], of the rows; may be expanded over heads."""
    beta: float
    """Power on the product of probabilities."""
    scale: float
    """Factor on each ordered pair of views."""
    positive: bool = False
    """Whether pairs whose information is negative cost nothing."""


def padded_columns(clusters: int, device_type: str) -> int:
    """Return P, the number of columns that logits of K clusters have on a type of device."""
    return clusters if device_type == "cpu" else -(-clusters // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def teacher_forward(logits: Tensor, clusters: int) -> TeacherStats:
    """Compute the statistics of a teacher's logits.

    Args:
        logits: Compute[H V B P], V at least 2.
        clusters: K, at most P.

    Returns:
        Normalisers, agreement and summed probabilities, in the accumulation dtype.
    """
    if _has_kernels(logits):  # two of them, for contiguous BFloat16 or Float32[H 2 B P]
        heads, _, rows, stride = logits.shape
        normalizer = logits.new_empty(heads, 2, rows, dtype=torch.float32)
        agreement, sums = (logits.new_empty(heads, n, dtype=torch.float32) for n in (rows, clusters))
        _teacher_pairs_kernel[(triton.cdiv(rows, TEACHER_PAIRS), heads)](
            logits, normalizer, agreement, rows, clusters, stride, rows * stride,
            pair_block=TEACHER_PAIRS, cluster_block=TEACHER_CLUSTERS, num_warps=TEACHER_WARPS,
        )  # fmt: skip
        _cluster_sums_kernel[(triton.cdiv(clusters, SUM_CLUSTERS), heads)](
            logits, normalizer, sums, 2 * rows, clusters, stride,
            row_block=SUM_PAIRS, cluster_block=SUM_CLUSTERS, num_warps=SUM_WARPS,
        )  # fmt: skip
        return TeacherStats(normalizer, agreement, sums)
    wide = logits[..., :clusters].to(accum_dtype(logits.dtype))
    normalizer = torch.logsumexp(wide, dim=-1)
    probabilities = (wide - normalizer[..., None]).exp_()
    views = logits.shape[1]
    pairs = [(a, b) for a in range(views) for b in range(a + 1, views)]
    agreement = torch.stack([(probabilities[:, a] * probabilities[:, b]).sum(-1) for a, b in pairs]).mean(0)
    return TeacherStats(normalizer, agreement, probabilities.sum((1, 2)))


def student_forward_backward(student: Tensor, teacher: Tensor, inputs: PairLossInputs, with_gradient: bool) -> Tensor:
    """Compute the weighted −PMI of each student's view with each other view of the teacher, and its gradient.

    With ℓ = −ln Σ_c (q_s q_t)^β / p̂ of student's logits z and teacher's z_t,
    dℓ/dz = β·(softmax(z) − softmax(β(z + z_t) − ln p̂)).

    Args:
        student: Compute[H V B P]; with `with_gradient` overwritten by the gradient of the sum of the losses, which is 0
            in the padding.
        teacher: Compute[H V B P].
        inputs: teacher's normalisers, ln p̂ (which gives K), weights, β and the factor.
        with_gradient: whether to compute the gradient.

    Returns:
        Accum[H], scale·Σ over ordered pairs of different views and rows of w·ℓ, in nats.

    Source: arXiv 2303.17896, eq. 5 and 8.
    """
    clusters = inputs.log_marginal.shape[1]
    if _has_kernels(student) and not inputs.positive:  # one forward and one backward, for BFloat16 or Float32[H 2 B P]
        heads, _, pairs, stride = student.shape
        own, joint = student.new_empty(2, heads, 2, pairs, dtype=torch.float32)
        log_marginal = inputs.log_marginal.contiguous()
        blocks = {"pair_block": STUDENT_PAIRS, "cluster_block": STUDENT_CLUSTERS, "num_warps": STUDENT_WARPS}
        rows = triton.cdiv(pairs, STUDENT_PAIRS)
        _student_pairs_kernel[(rows, heads)](
            student, teacher, log_marginal, own, joint, pairs, clusters, stride, pairs * stride, inputs.beta, **blocks
        )
        losses = inputs.beta * (own + inputs.normalizer.flip(1)) - joint
        if with_gradient:
            gains = (inputs.scale * inputs.beta * inputs.weights).expand(heads, -1).contiguous()
            _student_backward_kernel[(rows, triton.cdiv(stride, STUDENT_CLUSTERS), heads)](
                student, teacher, log_marginal, own, joint, gains,
                pairs, clusters, stride, pairs * stride, inputs.beta, **blocks,
            )  # fmt: skip
        total: Tensor = inputs.scale * (inputs.weights[:, None] * losses).sum((1, 2))
        return total
    logits = student[..., :clusters].to(accum_dtype(student.dtype))
    softmax = torch.softmax(logits, dim=-1)
    normalizer = _normalizer(logits, softmax)
    total, gradient = torch.zeros_like(normalizer[:, 0, 0]), torch.zeros((), dtype=logits.dtype, device=logits.device)
    for shift in range(1, student.shape[1]):  # the student's view v meets the teacher's view v + shift
        joint = (logits + teacher[..., :clusters].roll(-shift, 1)).mul_(inputs.beta)
        joint.sub_(inputs.log_marginal[:, None, None])
        posterior = torch.softmax(joint, dim=-1)
        losses = inputs.beta * (normalizer + inputs.normalizer.roll(-shift, 1)) - _normalizer(joint, posterior)
        weights = inputs.weights[:, None].expand_as(losses)
        if inputs.positive:
            weights = weights * (losses < 0)
        total = total + inputs.scale * (weights * losses).sum((1, 2))
        if with_gradient:
            gap = torch.sub(softmax, posterior, out=posterior)
            gradient = gap.mul_((inputs.scale * inputs.beta) * weights[..., None]).add_(gradient)
    if with_gradient:
        student[..., :clusters] = gradient
        student[..., clusters:] = 0
    return total


def _normalizer(logits: Tensor, softmax: Tensor) -> Tensor:
    """Return the log-sum-exp over the last axis from the softmax over it, without another pass of exponentials."""
    return logits.amax(-1) - softmax.amax(-1).log_()


def _has_kernels(logits: Tensor) -> bool:
    """Return whether the Triton kernels take these logits."""
    return logits.is_cuda and triton is not None and logits.dtype != torch.float64 and logits.shape[1] == 2


# The Triton form. A program holds both views of some rows of one head and goes along the clusters with running
# log-sum-exps (arXiv 1805.02867): where a larger logit turns up, the sums so far are scaled down. Sums over rows are
# taken by programs that hold clusters, in a fixed order. No two programs write to one place, so that equal logits give
# equal bits. The backward pass recomputes probabilities from the log-sum-exps instead of reading them.

TEACHER_PAIRS, TEACHER_CLUSTERS, TEACHER_WARPS = 8, 512, 8
"""4,096 logits of each of the teacher's views a program, 16 a thread."""
STUDENT_PAIRS, STUDENT_CLUSTERS, STUDENT_WARPS = 4, 512, 4
"""2,048 logits of each of the four views that the student's loss reads, 16 a thread."""
SUM_PAIRS, SUM_CLUSTERS, SUM_WARPS = 32, 128, 4

if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)
    LN2 = tl.constexpr(0.6931471805599453)
    MISSING = tl.constexpr(-1e30)
    """Stands for a logit that does not exist; finite, so that differences of two of them are numbers."""

    @triton.jit
    def _row_max(running, x):
        return tl.maximum(running, tl.max(x, axis=1))

    @triton.jit
    def _load_logits(pointer, columns, mask, valid):
        """Logits in units of ln 2, Float32[pairs clusters].

        The load's mask spans whole rows with their padding: so each thread loads 8 values at once.
        """
        x = tl.load(pointer + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        return tl.where(valid[None, :], x * LOG2E, MISSING)

    @triton.jit
    def _teacher_pairs_kernel(
        logits, normalizer, agreement, pairs, clusters, row_stride, view_stride,
        pair_block: tl.constexpr, cluster_block: tl.constexpr,
    ):  # fmt: skip
        """Log-sum-exp of both views of some pairs, and Σ_c of the products of their probabilities."""
        head = tl.program_id(1).to(tl.int64)
        pair = tl.program_id(0) * pair_block + tl.arange(0, pair_block)
        is_pair = pair < pairs
        first = logits + ((2 * head * pairs + pair) * row_stride)[:, None]
        second = first + view_stride
        max_a = tl.full([pair_block], MISSING, tl.float32)
        max_b = tl.full([pair_block], MISSING, tl.float32)
        sum_a = tl.zeros([pair_block], tl.float32)
        sum_b = tl.zeros([pair_block], tl.float32)
        product = tl.zeros([pair_block], tl.float32)
        for start in range(0, clusters, cluster_block):
            columns = start + tl.arange(0, cluster_block)
            valid, mask = columns < clusters, is_pair[:, None] & (columns < row_stride)[None, :]
            a = _load_logits(first, columns, mask, valid)
            b = _load_logits(second, columns, mask, valid)
            new_a, new_b = _row_max(max_a, a), _row_max(max_b, b)
            shrink_a, shrink_b = tl.exp2(max_a - new_a), tl.exp2(max_b - new_b)
            a = tl.exp2(a - new_a[:, None])
            b = tl.exp2(b - new_b[:, None])
            sum_a = sum_a * shrink_a + tl.sum(a, axis=1)
            sum_b = sum_b * shrink_b + tl.sum(b, axis=1)
            product = product * shrink_a * shrink_b + tl.sum(a * b, axis=1)
            max_a, max_b = new_a, new_b
        out = normalizer + 2 * head * pairs + pair
        tl.store(out, (max_a + tl.log2(sum_a)) * LN2, mask=is_pair)
        tl.store(out + pairs, (max_b + tl.log2(sum_b)) * LN2, mask=is_pair)
        tl.store(agreement + head * pairs + pair, product / (sum_a * sum_b), mask=is_pair)

    @triton.jit
    def _cluster_sums_kernel(
        logits, normalizer, sums, rows, clusters, row_stride,
        row_block: tl.constexpr, cluster_block: tl.constexpr,
    ):  # fmt: skip
        """Probabilities of some clusters, added up over all views and rows of a head in a fixed order."""
        head = tl.program_id(1).to(tl.int64)
        columns = tl.program_id(0) * cluster_block + tl.arange(0, cluster_block)
        total = tl.zeros([cluster_block], tl.float32)
        for start in range(0, rows, row_block):
            row = start + tl.arange(0, row_block)
            is_row = row < rows
            valid, mask = columns < clusters, is_row[:, None] & (columns < row_stride)[None, :]
            x = _load_logits(logits + ((head * rows + row) * row_stride)[:, None], columns, mask, valid)
            z = tl.load(normalizer + head * rows + row, mask=is_row, other=0.0) * LOG2E
            total += tl.sum(tl.where(is_row[:, None], tl.exp2(x - z[:, None]), 0.0), axis=0)
        tl.store(sums + head * clusters + columns, total, mask=columns < clusters)

    @triton.jit
    def _student_pairs_kernel(
        student, teacher, log_marginal, own, joint, pairs, clusters, row_stride, view_stride, beta,
        pair_block: tl.constexpr, cluster_block: tl.constexpr,
    ):  # fmt: skip
        """Log-sum-exps of both student's views, alone and joint with the teacher's other view."""
        head = tl.program_id(1).to(tl.int64)
        pair = tl.program_id(0) * pair_block + tl.arange(0, pair_block)
        is_pair = pair < pairs
        row = ((2 * head * pairs + pair) * row_stride)[:, None]
        max_a = tl.full([pair_block], MISSING, tl.float32)
        max_b = tl.full([pair_block], MISSING, tl.float32)
        max_ab = tl.full([pair_block], MISSING, tl.float32)
        max_ba = tl.full([pair_block], MISSING, tl.float32)
        sum_a = tl.zeros([pair_block], tl.float32)
        sum_b = tl.zeros([pair_block], tl.float32)
        sum_ab = tl.zeros([pair_block], tl.float32)
        sum_ba = tl.zeros([pair_block], tl.float32)
        for start in range(0, clusters, cluster_block):
            columns = start + tl.arange(0, cluster_block)
            valid, mask = columns < clusters, is_pair[:, None] & (columns < row_stride)[None, :]
            prior = tl.load(log_marginal + head * clusters + columns, mask=valid, other=0.0) * LOG2E
            a = _load_logits(student + row, columns, mask, valid)
            b = _load_logits(student + row + view_stride, columns, mask, valid)
            ab = beta * (a + _load_logits(teacher + row + view_stride, columns, mask, valid)) - prior[None, :]
            ba = beta * (b + _load_logits(teacher + row, columns, mask, valid)) - prior[None, :]
            new_a, new_b, new_ab, new_ba = (
                _row_max(max_a, a),
                _row_max(max_b, b),
                _row_max(max_ab, ab),
                _row_max(max_ba, ba),
            )
            sum_a = sum_a * tl.exp2(max_a - new_a) + tl.sum(tl.exp2(a - new_a[:, None]), axis=1)
            sum_b = sum_b * tl.exp2(max_b - new_b) + tl.sum(tl.exp2(b - new_b[:, None]), axis=1)
            sum_ab = sum_ab * tl.exp2(max_ab - new_ab) + tl.sum(tl.exp2(ab - new_ab[:, None]), axis=1)
            sum_ba = sum_ba * tl.exp2(max_ba - new_ba) + tl.sum(tl.exp2(ba - new_ba[:, None]), axis=1)
            max_a, max_b, max_ab, max_ba = new_a, new_b, new_ab, new_ba
        out = 2 * head * pairs + pair
        tl.store(own + out, (max_a + tl.log2(sum_a)) * LN2, mask=is_pair)
        tl.store(own + out + pairs, (max_b + tl.log2(sum_b)) * LN2, mask=is_pair)
        tl.store(joint + out, (max_ab + tl.log2(sum_ab)) * LN2, mask=is_pair)
        tl.store(joint + out + pairs, (max_ba + tl.log2(sum_ba)) * LN2, mask=is_pair)

    @triton.jit
    def _student_backward_kernel(
        student, teacher, log_marginal, own, joint, gains, pairs, clusters, row_stride, view_stride, beta,
        pair_block: tl.constexpr, cluster_block: tl.constexpr,
    ):  # fmt: skip
        """gain·(softmax − posterior) of a tile of both views, over the student's logits; 0 in the padding."""
        head = tl.program_id(2).to(tl.int64)
        pair = tl.program_id(0) * pair_block + tl.arange(0, pair_block)
        columns = tl.program_id(1) * cluster_block + tl.arange(0, cluster_block)
        is_pair, valid = pair < pairs, columns < clusters
        mask = is_pair[:, None] & (columns < row_stride)[None, :]
        row = ((2 * head * pairs + pair) * row_stride)[:, None]
        prior = tl.load(log_marginal + head * clusters + columns, mask=valid, other=0.0) * LOG2E
        gain = tl.load(gains + head * pairs + pair, mask=is_pair, other=0.0)
        stats = 2 * head * pairs + pair
        own_a = tl.load(own + stats, mask=is_pair, other=0.0) * LOG2E
        own_b = tl.load(own + stats + pairs, mask=is_pair, other=0.0) * LOG2E
        joint_a = tl.load(joint + stats, mask=is_pair, other=0.0) * LOG2E
        joint_b = tl.load(joint + stats + pairs, mask=is_pair, other=0.0) * LOG2E
        a = _load_logits(student + row, columns, mask, valid)
        b = _load_logits(student + row + view_stride, columns, mask, valid)
        ab = beta * (a + _load_logits(teacher + row + view_stride, columns, mask, valid)) - prior[None, :]
        ba = beta * (b + _load_logits(teacher + row, columns, mask, valid)) - prior[None, :]
        slope_a = gain[:, None] * (tl.exp2(a - own_a[:, None]) - tl.exp2(ab - joint_a[:, None]))
        slope_b = gain[:, None] * (tl.exp2(b - own_b[:, None]) - tl.exp2(ba - joint_b[:, None]))
        dtype = student.dtype.element_ty
        tl.store(student + row + columns[None, :], tl.where(valid[None, :], slope_a, 0.0).to(dtype), mask=mask)
        tl.store(
            student + row + view_stride + columns[None, :],
            tl.where(valid[None, :], slope_b, 0.0).to(dtype), mask=mask,
        )  # fmt: skip
