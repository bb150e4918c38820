"""Two ways to take TEMI's heads forward and back on the CPU: in torch alone, and on the processor's matrix tiles.

Both compute one head at a time, in whichever thread, from parameters that lie where they lie. The teachers' logits of
all heads are kept for the students where they fit, and else made a second time, by the same products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rayclust.kernels import plain_head, tile_head
from rayclust.kernels.crew import Crew
from rayclust.kernels.native import library
from rayclust.kernels.products import Shared
from rayclust.kernels.tile_head import SIDE, padded
from rayclust.methods.heads import Heads

STUDENT, TEACHER = 0, 1
KEPT_BYTES = 1 << 31
"""Size of all heads' logits up to which the teachers' are kept."""
GRADIENTS = ("weights.0", "weights.1", "biases.0", "biases.1", "direction", "scale")


@dataclass(frozen=True)
class Step:
    """What the heads need to know of a step."""

    rows: int
    """B."""
    beta: float
    """Power on the product of probabilities."""
    scale: float
    """Of a column's part in the sum over workers that the gradient is of."""
    factors: tuple[float, float]
    """1/τ of student and teacher."""
    bounds: tuple[list[float], list[float]]
    """What no logit of student and teacher exceeds, by head."""
    last_learns: bool
    """Whether the last layer is trained."""


class Exchange:
    """What heads tell each other. `half` is B with padding.

    Args:
        heads: H.
        clusters: K.
        half: columns of a view.
        wide: dtype.
    """

    def __init__(self, heads: int, clusters: int, half: int, wide: torch.dtype) -> None:
        def room(*sizes: int) -> Tensor:
            return torch.zeros(*sizes, dtype=wide)

        self.normalizers, self.agreement = room(heads, 2 * half), room(heads, half)
        self.sums, self.losses = room(heads, clusters), room(heads)
        self.log_marginal, self.weights = room(heads, clusters), room(half)


class Engine(Protocol):
    """Takes heads forward and back."""

    exchange: Exchange

    def refresh(self) -> None:
        """Looks at parameters that others have set."""

    def tiles(self, name: str, head: int) -> tuple[Tensor, Tensor] | None:
        """Copies of student and teacher that the optimiser is to keep up, for one head of a parameter."""

    def take_in(self, views: Tensor) -> None:
        """A batch, Float[2 B D]."""

    def teach(self, step: Step, head: int, member: int) -> None:
        """A teacher forward; fills its part of the exchange but the losses. `member` is the thread's number."""

    def learn(self, step: Step, head: int, member: int) -> dict[str, Tensor]:
        """A student forward and back; its loss times scale goes to the exchange.

        Returns:
            Gradients by the parameters' names in `Heads`, valid until this thread's next head.
        """


class PlainEngine:
    """Torch alone, in any dtype."""

    def __init__(self, student: Heads, teacher: Heads, crew: Crew, narrow: torch.dtype) -> None:
        self.shape, self.crew, self.narrow, self.wide = student.shape, crew, narrow, student.direction.dtype
        self._nets = [[_plain_net(heads, head) for head in range(self.shape.heads)] for heads in (student, teacher)]
        self._rows = 0

    def refresh(self) -> None:
        """Nothing is kept of the parameters."""

    def tiles(self, name: str, head: int) -> tuple[Tensor, Tensor] | None:
        """None."""
        return None

    def take_in(self, views: Tensor) -> None:
        """Float[2 B D]; made narrow, and packed for both kinds of product."""
        if views.shape[1] != self._rows:
            self._make_room(views.shape[1])
        x = views.to(self.narrow).flatten(0, 1)

        def pack(side: int, member: int) -> None:
            self._packed[side] = Shared(x.T.contiguous() if side else x, self.shape.hidden)

        self.crew.each(pack, 2)

    def _make_room(self, rows: int) -> None:
        heads, clusters = self.shape.heads, self.shape.clusters
        columns = 2 * rows
        sizes = plain_head.Sizes(self.shape.hidden, self.shape.bottleneck, clusters, columns, self.narrow, self.wide)
        self._rows, self._packed = rows, dict[int, Shared]()
        self._rooms = [plain_head.Room(sizes) for _ in range(self.crew.size)]
        one = clusters * columns * self.narrow.itemsize
        self._keeps = heads * one <= KEPT_BYTES
        self._logits = torch.empty(heads if self._keeps else self.crew.size, clusters, columns, dtype=self.narrow)
        self.exchange = Exchange(heads, clusters, rows, self.wide)

    def teach(self, step: Step, head: int, member: int) -> None:
        """See `Engine`."""
        e = self.exchange
        place = head if self._keeps else member
        out = self._logits[place], e.normalizers[head], e.sums[head], e.agreement[head]
        self._rooms[member].teach(self._nets[TEACHER][head], self._packed[0], step.factors[TEACHER], out)

    def learn(self, step: Step, head: int, member: int) -> dict[str, Tensor]:
        """See `Engine`."""
        e, x = self.exchange, self._packed
        if not self._keeps:
            self.teach(step, head, member)
        told = self._logits[head if self._keeps else member], e.normalizers[head], e.log_marginal[head], e.weights
        lesson = plain_head.Lesson(*told, step.beta, step.scale)
        net, factor = self._nets[STUDENT][head], step.factors[STUDENT]
        loss, gradients = self._rooms[member].learn(net, x[0], x[1], factor, lesson, step.last_learns)
        e.losses[head] = loss
        return gradients


class TileEngine:
    """On matrix tiles in bf16; see kernels/tile_head.py."""

    def __init__(self, student: Heads, teacher: Heads, crew: Crew) -> None:
        self.shape, self.crew, self._heads = student.shape, crew, (student, teacher)
        self._tiles = {f"weights.{i}": _tile_room(weight) for i, weight in enumerate(student.weights)}
        self._nets = [[self._net(role, head) for head in range(self.shape.heads)] for role in (STUDENT, TEACHER)]
        self._rows = 0

    @staticmethod
    def fits(heads: Heads) -> bool:
        """Whether the sizes are whole blocks, and the passes are at hand."""
        widths = (heads.shape.dimension, heads.shape.hidden, heads.shape.bottleneck)
        return all(width % SIDE == 0 for width in widths) and library() is not None

    def _net(self, role: int, head: int) -> tile_head.Net:
        heads = self._heads[role]
        matrices = [self._tiles[f"weights.{i}"][role, head] for i in (0, 1)]
        vectors = [bias.data[head] for bias in heads.biases]
        return tile_head.Net.of(*matrices, *vectors, heads.direction.data[head], heads.scale.data[head])

    def refresh(self) -> None:
        """Orders the matrices anew."""
        for role, heads in enumerate(self._heads):
            for i, weight in enumerate(heads.weights):
                for head, matrix in enumerate(weight.data):
                    self._tiles[f"weights.{i}"][role, head] = tile_head.to_left(matrix)

    def tiles(self, name: str, head: int) -> tuple[Tensor, Tensor] | None:
        """LEFT, of matrices."""
        kept = self._tiles.get(name)
        return None if kept is None else (kept[STUDENT, head], kept[TEACHER, head])

    def take_in(self, views: Tensor) -> None:
        """Float[2 B D]; made bf16, padded, and put in order for both kinds of product."""
        rows = views.shape[1]
        if rows != self._rows:
            self._make_room(rows)
        self._x.view(2, -1, self.shape.dimension)[:, :rows].copy_(views)

        def order(side: int, member: int) -> None:
            tile_head.to_right(self._x, self._ordered[side], transposed=side == 0)

        self.crew.each(order, 2)

    def _make_room(self, rows: int) -> None:
        s, half, height = self.shape, padded(rows), padded(self.shape.clusters)
        self._rows, columns = rows, 2 * half
        self._layout = tile_head.Shape(s.dimension, s.hidden, s.bottleneck, s.clusters, height, columns, rows)
        self._x = torch.zeros(columns, s.dimension, dtype=torch.bfloat16)
        self._ordered = torch.empty(2, self._x.numel(), dtype=torch.bfloat16)
        self._inputs = tile_head.Inputs.of(*self._ordered)
        self._keeps = s.heads * height * columns * torch.bfloat16.itemsize <= KEPT_BYTES
        self._logits = torch.empty(s.heads if self._keeps else self.crew.size, height * columns, dtype=torch.bfloat16)
        self._rooms = [tile_head.room(self._layout) for _ in range(self.crew.size)]
        self._gradients = [self._gradient_room() for _ in range(self.crew.size)]
        self.exchange = Exchange(s.heads, s.clusters, half, torch.float32)

    def _gradient_room(self) -> tuple[dict[str, Tensor], tile_head.Gradients]:
        student = self._heads[STUDENT]
        made = {}
        for name in GRADIENTS:
            narrow = torch.bfloat16 if name in self._tiles else torch.float32
            made[name] = torch.empty_like(student.get_parameter(name).data[0], dtype=narrow)
        return made, tile_head.Gradients.of(*made.values())

    def teach(self, step: Step, head: int, member: int) -> None:
        """See `Engine`."""
        e = self.exchange
        place = head if self._keeps else member
        out = tile_head.Taught(self._logits[place], e.normalizers[head], e.sums[head], e.agreement[head])
        net, factor, bound = self._nets[TEACHER][head], step.factors[TEACHER], step.bounds[TEACHER][head]
        tile_head.teach(self._layout, net, self._inputs, self._rooms[member], out, factor, bound)

    def learn(self, step: Step, head: int, member: int) -> dict[str, Tensor]:
        """See `Engine`."""
        e = self.exchange
        if not self._keeps:
            self.teach(step, head, member)
        told = self._logits[head if self._keeps else member], e.normalizers[head], e.log_marginal[head], e.weights
        bounds = step.bounds[STUDENT][head], step.bounds[TEACHER][head]
        lesson = tile_head.Lesson.of(*told, step.beta, step.scale, *bounds)
        gradients, places = self._gradients[member]
        where = self._layout, self._nets[STUDENT][head], self._inputs, self._rooms[member]
        out = e.losses[head : head + 1], places
        tile_head.learn(*where, lesson, out, step.factors[STUDENT], step.last_learns)
        return gradients


def _plain_net(heads: Heads, head: int) -> plain_head.Net:
    weights, biases = ([p.data[head] for p in stacked] for stacked in (heads.weights, heads.biases))
    last = heads.direction.data[head], heads.scale.data[head]
    return plain_head.Net((weights[0], weights[1]), (biases[0], biases[1]), *last)


def _tile_room(weight: Tensor) -> Tensor:
    return torch.empty(2, len(weight), weight[0].numel(), dtype=torch.bfloat16)
