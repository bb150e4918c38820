from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rayclust import collectives
from rayclust.losses import chunked
from rayclust.methods import Temi, TemiConfig, build, temi_losses, temi_parts, temi_steps
from rayclust.methods.base import Batch, Plan
from rayclust.methods.temi_parts import Parts, by_cluster
from rayclust.methods.temi_plan import Layout, Load, estimate
from tests.methods.test_temi_plan import Kept, assert_same, trained
from tests.workers import on_two_workers, on_workers

K = 7
"""Divides by neither 2 nor 4."""
GRIDS = ("clusters", "1x2x2", "2x1x2")
KINDS = ("autograd", "chunks")
FEW = {"heads": 2, "clusters": K}


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch):
    """What `trained` sets."""
    monkeypatch.setattr(temi_losses, "LEAST_LOGITS", 0)
    monkeypatch.setattr(temi_steps, "LEAST_WORK", 0.0)


def _on_every_grid(rank: int, world: int) -> dict[tuple[str, str], dict[str, Any]]:
    found = {(kind, grid): trained(kind, grid, **FEW) for kind in KINDS for grid in GRIDS}
    chunked.CHUNK_BYTES["cpu"], chunked.KEPT_BYTES["cpu"] = 2048, 0  # two pairs of one head; made twice
    return found | {("chunks", "1x2x2 in small ones"): trained("chunks", "1x2x2", **FEW)}


def test_four_workers_that_divide_clusters_train_as_one():
    """Loss of each step, health, checkpoints and heads to 1e-10, by both routes and in every grid."""
    alone = {kind: trained(kind, "auto", **FEW) for kind in KINDS}
    for worker in on_workers(4, _on_every_grid):
        for (kind, grid), found in worker.items():
            assert_same(found, alone[kind], f"{kind}, {grid}")


def _gone_on(rank: int, world: int, start: Kept) -> dict[str, dict[str, Any]]:
    """From a checkpoint of one worker, and from one of another grid."""
    other: Kept = trained("chunks", "2x1x2", **FEW)["kept"][0]
    return {
        "from one worker": trained("chunks", "1x2x2", start, **FEW),
        "from 2x1x2": trained("chunks", "clusters", other, **FEW),
        "from 2x1x2, heads": trained("autograd", "2x2", other, **FEW),
        "kept": {"first": other},
    }


def test_a_checkpoint_goes_on_with_other_parts():
    alone = trained("chunks", "auto", **FEW)
    for worker in on_workers(4, _gone_on, alone["kept"][0]):
        kept = worker.pop("kept")["first"]
        for start, found in worker.items():
            assert_same(found, alone, start)
    assert_same(trained("chunks", "auto", kept, **FEW), alone, "one worker from 2x1x2")


OPTIONS: dict[str, dict[str, Any]] = {
    "scan": {"loss": "scan"},
    "wmi": {"loss": "wmi", "entropy_weight": 0.7},
    "pmi": {"loss": "pmi", "positive_pmi": True},
    "repeats": {"repeats": 2, "noise": 0.1},
    "layers": {"layers": 3, "dropout": 0.3, "final_gelu": True},
    # A bias in front of a batch norm has no gradient but rounding, which AdamW would blow up.
    "sgd": {"optimizer": "sgd", "batch_norm": True, "learn_scale": False, "freeze_last_layer": 2},
    "start": {"warm_start": "kmeans", "start_restarts": 3, "start_neighbors": 2, "selection": "modularity"},
}


def _with_options(rank: int, world: int) -> dict[str, dict[str, Any]]:
    return {name: trained("chunks", "clusters", **FEW, **options) for name, options in OPTIONS.items()}


def test_every_option_is_the_one_of_a_single_worker():
    alone = {name: trained("chunks", "auto", **FEW, **options) for name, options in OPTIONS.items()}
    for worker in on_two_workers(_with_options):
        for name, found in worker.items():
            assert_same(found, alone[name], name)


def _method(parallel: str = "auto", **settings: Any) -> Temi:
    written = {"clusters": K, "preset": "none", "heads": 2, "hidden": K, "bottleneck": 5, "batch_size": 9}
    method = build(TemiConfig.model_validate(written | settings | {"parallel": parallel}), 6, 500, seed=0)
    assert isinstance(method, Temi)
    return method


def _drawn(rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    method = _method("clusters")
    own = {name: x.clone() for name, x in method.state_dict().items()}
    whole = {name: x.clone() for name, x in method.whole(own).items()}
    return own, whole, method.part(whole)


def test_first_weights_are_those_of_whole_heads_and_come_together_and_apart():
    alone = _method().state_dict()
    for rank, (own, whole, part) in enumerate(on_workers(4, _drawn)):
        some = collectives.stretches(K, 4)[rank]
        assert own.keys() == whole.keys() == part.keys() == alone.keys()
        for name, expected in alone.items():
            assert whole[name].equal(expected), name
            divided = name in temi_parts.BY_CLUSTER
            assert own[name].equal(expected[:, some] if divided else expected), name
            assert part[name].equal(own[name]), name


def _in_blocks(rank: int, world: int) -> list[Tensor]:
    temi_parts.BLOCK = 2
    grid = collectives.Grid.of(2, 2)
    parts = Parts(grid, heads=3, clusters=K)
    x = torch.arange(3 * K * 2).view(3, K, 2)
    own = {"marginal.shares": x[parts.own_heads, parts.own_clusters], "loss": torch.tensor(1.0 + grid.column.rank)}
    whole = parts.whole(own, temi_parts.BY_CLUSTER)
    return [whole["marginal.shares"], whole["loss"], parts.part(whole, temi_parts.BY_CLUSTER)["loss"]]


def test_parts_come_together_block_by_block():
    for rank, (x, loss, part) in enumerate(on_workers(4, _in_blocks)):
        assert x.equal(torch.arange(3 * K * 2).view(3, K, 2))
        assert loss == 3.0  # of the two halves of the heads
        assert part == (3.0 if rank < 2 else 0.0)


@pytest.mark.parametrize("learn_scale", [True, False])
def test_what_is_divided_is_known_by_name_and_by_place_in_the_optimiser(learn_scale: bool):
    method = _method(learn_scale=learn_scale, batch_norm=True)
    trained_ones = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    order = [name for name, p in trained_ones if method.is_decayed(name, p)]
    places = [f"{order.index(name)}.exp_avg" for name in ("student.direction", "student.scale") if name in order]
    names = [*method.state_dict(), *(f"{place}.exp_avg" for place in range(len(trained_ones))), "head_loss"]
    assert sorted(by_cluster(method, names)) == sorted([*temi_parts.BY_CLUSTER, *places])
    assert len(places) == 1 + learn_scale


def _on_a_stack(rank: int, world: int) -> dict[str, Any]:
    """One layer that differs by worker, before and after they agree; and for which parts steps are written out."""
    method = _method("clusters", batch_norm=True)
    with torch.no_grad():
        for x in method.student.state_dict().values():
            x += rank
    before = {name: x.clone() for name, x in method.student.state_dict().items()}
    method.parts.agree((method.student, method.teacher))
    fits = [temi_steps.fits(_method(parallel)) for parallel in ("clusters", "heads")]
    return {"before": before, "after": dict(method.student.state_dict()), "fits": fits}


def test_workers_of_a_stack_agree_on_layers_before_the_last_and_need_no_written_out_steps():
    found = on_two_workers(_on_a_stack)
    for one in found:
        for name, x in one["after"].items():
            expected = one if name in ("direction", "scale") else found[0]
            assert x.equal(expected["before"][name]), name
        assert one["fits"] == [False, True]


def _sent(rank: int, world: int) -> list[tuple[str, int]]:
    """What goes through the stack in one step: the kind of exchange, and how many numbers each worker gives."""
    method, sent = _method("clusters", clusters=500, heads=1, hidden=8), list[tuple[str, int]]()
    temi_losses.LEAST_LOGITS = 0
    reduce, gather = dist.all_reduce, dist.all_gather

    def counted_reduce(x: Tensor, **options: Any) -> Any:
        sent.append(("sum", x.numel()))
        return reduce(x, **options)

    def counted_gather(parts: list[Tensor], x: Tensor, **options: Any) -> Any:
        sent.append(("gather", x.numel()))
        return gather(parts, x, **options)

    dist.all_reduce, dist.all_gather = counted_reduce, counted_gather
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    with collectives.sharing_rows(method.grid.row):
        method.losses(Batch(x, torch.arange(9), 0, 0))["loss"].backward()
    return sent


def test_nothing_with_an_axis_of_clusters_is_sent_and_the_estimate_counts_the_rest():
    shape = _method(clusters=500, heads=1, hidden=8).student.shape
    estimated = estimate(Load(shape, Plan(9, 1, 1, 0)), Layout(1, 1, 2)).sent_bytes
    for sent in on_two_workers(_sent):
        assert sent == [("gather", 3 * 9), ("gather", 4 * 9), ("sum", 2 * 9 * 5)]
        assert estimated == 4 * sum(count for _, count in sent)  # of two workers each sends as much as it gives
