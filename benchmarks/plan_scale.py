"""A paper plan for very many images: bytes, requests, time and cost of each stage as it is written today.

Claim: none; nothing of this size has been run. What is not an input is arithmetic on what the stages do, except the
driver's bytes for each shard, and how close the lists lie that a shard opens, which are measured here.

    python benchmarks/plan_scale.py [--set KEY=VALUE ...]

Every input can be set; speeds of GPUs and CPUs and all prices are assumptions.
"""

from __future__ import annotations

import argparse
import json
import math
import tracemalloc
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from rayclust.runtime.shards import pack_moments
from rayclust.runtime.tasks import LARGEST_TASK_BYTES, Task, TaskResult, search_task_rows
from rayclust.search.ivf import list_count, ranked_lists, train_centers
from rayclust.stages.neighbors_ivf import FAN_IN, QUERIES, SAMPLE_BYTES, SAMPLED_PARTS, SAMPLED_PER_LIST
from rayclust.store.manifest import Output
from rayclust.store.sources import Shard

GIGA, TERA, HOUR = 1e9, 1e12, 3600.0
BLOCK = 32 << 20
"""Bytes of one ranged GET of a tar, and of one part of a large upload."""


@dataclass(frozen=True)
class Inputs:
    """What the plan starts from."""

    images: float = 2_322_161_807
    """LAION-2B-en's rows, without those that no longer download."""
    image_bytes: float = 50_000
    """Of an encoded image, on average (assumed)."""
    shard_images: float = 10_000
    """Images of a tar (img2dataset's default)."""
    dimension: float = 768
    """D of ViT-L/14."""
    nodes: float = 32
    gpus: float = 8
    """Of a node."""
    cpus: float = 192
    """Of a node."""
    memory: float = 2.0e12
    """Bytes of a node's memory."""
    disk: float = 28e12
    """Bytes of a node's local disk."""
    network: float = 5e9
    """Bytes a second that a node gets from object storage (assumed)."""
    encode_rate: float = 2_000
    """Images a second that one GPU encodes (assumed)."""
    decode_rate: float = 200
    """Images a second that one CPU decodes (assumed)."""
    gpu_flops: float = 3e13
    """Float32 operations a second that one GPU sustains in matrix products (assumed)."""
    cpu_flops: float = 5e10
    """The same of one CPU (assumed)."""
    fill_rate: float = 5e8
    """Bytes of float16 rows a second that one process copies from storage to a node's disk (assumed)."""
    number_seconds: float = 1.0
    """To read and write one part again with its row numbers (assumed)."""
    clusters: float = 25_000
    passes: float = 20
    """Of k-means."""
    restarts: float = 1
    neighbors: float = 50
    probes: float = 64
    """Lists that are opened for a row (assumed; the stage finds it from the recall that is asked for)."""
    halo: float = 58
    """Rows that a unit reads from other shards for each of its own when it searches (assumed; at most 4 * probes). 85
    for units of 256 MB, times 0.68 for units four times as large, as 100,000 planted rows show."""
    lists_a_get: float = 1.49
    """Lists of other shards that one GET reads, as planted rows show (printed below the table)."""
    gaps: float = 0.11
    """What these GETs read besides, between the lists, as a share of the lists; the same."""
    request_rate: float = 100_000
    """GETs a second that storage answers (assumed)."""
    stream_bytes: float = 60_000
    """Of the driver for each shard that is streamed through Ray Data, as scale_shards.py shows it at most."""
    node_dollars: float = 60
    """Of a node and hour (assumed)."""
    get_dollars: float = 4e-7
    """Of a GET (assumed)."""
    put_dollars: float = 5e-6
    """Of a PUT or LIST (assumed)."""

    @property
    def shards(self) -> float:
        """Parts of the run."""
        return math.ceil(self.images / self.shard_images)

    @property
    def rows_bytes(self) -> float:
        """Of all embeddings as float16, before Parquet."""
        return self.images * self.dimension * 2


@dataclass(frozen=True)
class Cost:
    """One stage."""

    name: str
    read: float
    written: float
    gets: float
    puts: float
    seconds: float
    bound: str


def encode(i: Inputs) -> list[Cost]:
    """Images to embeddings, then the numbering: a tar does not say how many images it holds."""
    bytes_read = i.images * i.image_bytes
    times = {
        "GPUs": i.images / (i.encode_rate * i.gpus * i.nodes),
        "CPUs that decode": i.images / (i.decode_rate * i.cpus * i.nodes),
        "network": bytes_read / (i.network * i.nodes),
    }
    bound = max(times, key=times.__getitem__)
    blocks = i.shards * math.ceil(i.shard_images * i.image_bytes / BLOCK)
    # Shard read and written, marker looked at twice; part, marker and shard's record written.
    first = Cost("encode", bytes_read, i.rows_bytes, blocks + 3 * i.shards, 3 * i.shards, times[bound], bound)
    times = {
        "CPUs": i.shards * i.number_seconds / (i.cpus * i.nodes),
        "network": 2 * i.rows_bytes / (i.network * i.nodes),
    }
    bound = max(times, key=times.__getitem__)
    numbering = Cost("encode: numbering", i.rows_bytes, i.rows_bytes, 2 * i.shards, 3 * i.shards, times[bound], bound)
    return [first, numbering]


def neighbors(i: Inputs) -> list[Cost]:
    """The join over inverted lists: its centres, then the phases over units."""
    lists, unit = list_count(int(i.images)), search_task_rows(int(i.images), int(i.dimension), int(i.neighbors))
    groups, units = math.ceil(i.shards / math.ceil(unit / i.shard_images)), math.ceil(i.images / unit)
    row, found = 2 * i.dimension + 8, 8 * i.neighbors + 8
    sample = min(SAMPLED_PER_LIST * lists, SAMPLE_BYTES / (4 * i.dimension))
    bounds, nearest = groups * lists * 8, groups * QUERIES * i.neighbors * 16
    product, parents = 2 * i.dimension, lists**0.5
    flops = {
        # Ten passes over the sample for centres below their parent; four parents' centres for each row.
        "centres": 11 * sample * parents * product,
        "sorting": i.images * (5 * parents + QUERIES) * product,
        "searching": (i.images * (4 * i.probes + i.probes * i.images / lists) + lists * lists) * product,
    }
    read_sample = SAMPLED_PARTS * i.shard_images * 2 * i.dimension
    alone = flops["centres"] / i.cpu_flops + read_sample / i.fill_rate
    probing = (bounds + nearest) / i.fill_rate
    halo = i.images * i.halo * row * (1 + i.gaps)
    return [
        Cost("neighbors: centres", read_sample, lists * i.dimension * 4, SAMPLED_PARTS, 2, alone, "one CPU"),
        spread(
            i,
            "sorting",
            (i.rows_bytes, i.images * row + bounds + nearest),
            (i.shards, 3 * groups),
            flops["sorting"],
            groups,
        ),
        Cost("neighbors: probing", bounds + nearest, 0, 2 * groups, 2, probing, "one worker reads"),
        *exchange(i, ("merging", "sharding"), i.images * row + bounds, i.images * row, (groups, units)),
        spread(
            i,
            "searching",
            (i.images * row + halo, i.images * found),
            (units * (1 + i.halo * unit * lists / i.images / i.lists_a_get), 2 * units),
            flops["searching"],
            units,
        ),
        *exchange(
            i,
            ("gathering", "collecting"),
            i.images * found,
            i.images * (found + 2 * i.neighbors),
            (units, groups),
            i.shards - groups,
        ),
    ]


def exchange(
    i: Inputs, names: tuple[str, str], read: float, written: float, files: tuple[int, int], more: float = 0
) -> list[Cost]:
    """Tasks that each read a range of each file of others, in two rounds where there are many files.

    Args:
        i: inputs.
        names: of the rounds.
        read: bytes of the files.
        written: bytes of the last round.
        files: of the others, and tasks.
        more: files that the last round writes besides one and a mark a task.
    """
    count, tasks = files
    if count <= FAN_IN:
        return [spread(i, names[1], (read, written), (2 * count * tasks, 2 * tasks + more), 0, tasks)]
    step = math.isqrt(count)
    batches, ranges = math.ceil(count / step), math.ceil(tasks / math.isqrt(tasks))
    merged = batches * ranges
    return [
        spread(i, names[0], (read, read), (2 * step * merged, 2 * merged), 0, merged),
        spread(i, names[1], (read, written), (2 * batches * tasks, 2 * tasks + more), 0, tasks),
    ]


def spread(
    i: Inputs, name: str, moved: tuple[float, float], requests: tuple[float, float], flops: float, tasks: float
) -> Cost:
    """A phase of neighbors over all CPUs, or as many as it has tasks: bytes moved, GETs and PUTs, products."""
    times = {
        "products on CPUs": flops / (i.cpu_flops * min(i.cpus * i.nodes, tasks)),
        "network": sum(moved) / (i.network * i.nodes),
        "GETs": requests[0] / i.request_rate,
    }
    bound = max(times, key=times.__getitem__)
    return Cost(f"neighbors: {name}", *moved, *requests, times[bound], bound)


def train(i: Inputs) -> list[Cost]:
    """Every node copies all rows; then k-means passes, each worker over its share."""
    fill = Cost("train: rows to every node", i.rows_bytes * i.nodes, 0, i.shards * i.nodes, 0,
                i.rows_bytes / i.fill_rate, "one process a node copies")  # fmt: skip
    flops = 2 * i.images * i.clusters * i.dimension * i.passes * i.restarts
    seconds = flops / (i.gpu_flops * i.gpus * i.nodes)
    return [fill, Cost("train: k-means", 0, 0, 0, seconds / 30, seconds, "float32 products")]


def assign(i: Inputs) -> Cost:
    """Each row against every centre, on CPUs."""
    seconds = 2 * i.images * i.clusters * i.dimension / (i.cpu_flops * i.cpus * i.nodes)
    written = i.images * 16
    return Cost("assign", i.rows_bytes, written, 2 * i.shards, 2 * i.shards, seconds, "products on CPUs")


def stages(i: Inputs) -> list[Cost]:
    """Those up to assign, in order."""
    return [*encode(i), *neighbors(i), *train(i), assign(i)]


def limits(i: Inputs, per_shard: float) -> list[tuple[str, float, float]]:
    """What a place must hold, and what it has, in bytes."""
    lists = list_count(int(i.images))
    sample = min(SAMPLED_PER_LIST * lists, SAMPLE_BYTES / (4 * i.dimension))
    part = i.shard_images * i.clusters * 4
    share = i.images * i.dimension * 4 / i.nodes
    return [
        ("neighbors: three times a unit's bytes, on every CPU of a node", 3 * LARGEST_TASK_BYTES * i.cpus, i.memory),
        ("neighbors: centres of all lists, on every CPU of a node", lists * i.dimension * 4 * i.cpus, i.memory),
        ("neighbors: three times the sample that trains them, in one worker", 12 * sample * i.dimension, i.memory),
        ("train: rows on a node's disk", i.images * i.dimension * 4, i.disk),
        ("train: neighbours on a node's disk (TEMI)", i.images * i.neighbors * 8, i.disk),
        ("train: what a node's workers read of it, page cache", share, i.memory),
        ("assign: three arrays of a part × K, on every CPU of a node", 3 * part * i.cpus, i.memory),
        ("driver: results of one stage", per_shard * i.shards, i.memory),
        ("driver: encode's stream of shards", i.stream_bytes * i.shards, i.memory),
    ]


def driver_bytes(width: int, *, with_moments: bool, count: int = 2000) -> float:
    """Bytes that the driver keeps for each shard of encode: shard, unit, result, and its line in the manifest."""
    moments = pack_moments(2, np.full((2, width), 2.0))
    text = json.dumps({"row_start": 0, "reasons": {}} | ({"moments": moments} if with_moments else {}))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = []
    for n in range(count):
        shard = Shard(n, "webdataset", f"s3://bucket/laion/{n:05d}.tar", f"{n:05d}", f"{n:064d}")
        output = {"digest": f"{n:064d}", "size": 10**7 + n, "stamp": f"{n:064d}"}
        result = TaskResult({f"embeddings/part-{n:05d}.parquet": output}, {"rows": n, "rejects": 0}, json.loads(text))
        kept.append((Task(n, f"{n:032d}", shard, 1), result, Output(**output)))  # type: ignore[arg-type]
    found = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return found / len(kept)


def closeness(rows: int = 300_000, lists: int = 20_000, shards: int = 10) -> tuple[float, float, float]:
    """How close the lists lie that shards of a tenth of a parent's lists open in others, on planted rows.

    Returns:
        Lists of others for each of a shard's own, lists that one GET reads, and what it reads besides, as a share.
    """
    random = np.random.default_rng(0)
    planted = random.normal(size=(1000, 64)).astype(np.float32)[random.integers(1000, size=rows)]
    x = torch.from_numpy(planted + 0.5 * random.standard_normal(planted.shape, np.float32))
    x /= x.norm(dim=1, keepdim=True)
    trained = train_centers(x, lists)
    homes = trained.assign(x)
    sizes, order = torch.bincount(homes, minlength=len(trained.centers)), homes.argsort(stable=True)
    bounds, own = [0, *sizes.cumsum(0).tolist()], len(trained.centers) // len(trained.parents) // 10
    opened = gets = between = 0
    for first in random.integers(0, len(trained.centers) - own, shards).tolist():
        found = set[int]()
        for home in range(first, first + own):
            some = x[order[bounds[home] : bounds[home + 1]]]
            near, is_open = ranked_lists(trained.centers, sizes, some, home, k=50, reach=256, nprobe=64)
            found.update(near[is_open].tolist())
        steps = np.diff(sorted(found - set(range(first, first + own))))
        opened, gets, between = opened + len(steps) + 1, gets + 1 + (steps > 2).sum(), between + (steps == 2).sum()
    return opened / (own * shards), opened / gets, between / opened


def cost_table(i: Inputs) -> None:
    """A row for each stage, and their sum."""
    titles = "stage read,_TB written,_TB GETs PUTs requests/s hours node_dollars request_dollars bound_by"
    print(f"| {' | '.join(titles.split())} |".replace("_", " "))
    print("|---|---|---|---|---|---|---|---|---|---|")
    hours = asked = 0.0
    for c in stages(i):
        own, own_asked = c.seconds / HOUR, c.gets * i.get_dollars + c.puts * i.put_dollars
        hours, asked = hours + own, asked + own_asked
        cells = [c.name, f"{c.read / TERA:.1f}", f"{c.written / TERA:.2f}", f"{c.gets:,.0f}", f"{c.puts:,.0f}"]
        cells += [f"{(c.gets + c.puts) / c.seconds:,.0f}", f"{own:.2f}", f"{own * i.nodes * i.node_dollars:,.0f}"]
        print(f"| {' | '.join([*cells, f'{own_asked:,.0f}', c.bound])} |")
    print(f"| all of these | | | | | | {hours:.2f} | {hours * i.nodes * i.node_dollars:,.0f} | {asked:,.0f} | |\n")


def show(i: Inputs) -> None:
    """The tables."""
    cost_table(i)
    unit = search_task_rows(int(i.images), int(i.dimension), int(i.neighbors))
    rows, found = i.images * (2 * i.dimension + 8), i.images * (8 * i.neighbors + 8)
    print(f"neighbors: {list_count(int(i.images)):,} lists, {math.ceil(i.images / unit):,} shards of {unit:,} rows")
    gets = sum(cost.gets for cost in neighbors(i))
    print(f"neighbors: {gets / 1e6:.1f} million GETs")
    around, together, between = closeness()
    print(
        f"Planted rows: a shard opens {around:.0f} lists of others for each of its own; a GET reads {together:.2f} of "
        f"them, and {between:.2f} times as much between them"
    )
    print(f"Its scratch files, until it is sealed: {(3 * rows + 2 * found) / TERA:.1f} TB")
    without, held = (driver_bytes(int(i.dimension), with_moments=kept) for kept in (False, True))
    print(f"{i.shards:,.0f} shards; a listing takes {math.ceil(i.shards / 1000):,} requests")
    print(
        f"Driver's bytes for each shard of encode, measured: {without:,.0f}; {held:,.0f} if results kept their moments"
    )
    print(f"For all shards: {without * i.shards / GIGA:.2f} GB, and {held * i.shards / GIGA:.2f} GB")
    sizes = 8 * i.clusters * i.shards
    print(f"Sizes of clusters of every part, if the driver kept them: {sizes / GIGA:.0f} GB\n")
    print("| what must be held | GB | there are, GB | fits |")
    print("|---|---|---|---|")
    for what, needed, there in limits(i, without):
        print(f"| {what} | {needed / GIGA:,.1f} | {there / GIGA:,.0f} | {'yes' if needed <= there else '**no**'} |")


def main() -> None:
    """Prints the inputs, then the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    changes = dict(item.split("=", 1) for item in parser.parse_args().set)
    i = replace(Inputs(), **{key: float(value) for key, value in changes.items()})
    given = " ".join(f"{key}={value}" for key, value in changes.items())
    print(f"python benchmarks/plan_scale.py{' --set ' + given if given else ''}")
    print("inputs: " + ", ".join(f"{field.name} {getattr(i, field.name):,.10g}" for field in fields(i)) + "\n")
    show(i)


if __name__ == "__main__":
    main()
