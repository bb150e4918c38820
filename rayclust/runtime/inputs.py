"""What a run reads: the shards of its input and their identities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rayclust.config import RunConfig
from rayclust.errors import ConfigError
from rayclust.runtime import datasets
from rayclust.runtime.models import weights_stamp
from rayclust.runtime.pipeline import STAGES
from rayclust.store.manifest import digest_of
from rayclust.store.sources import Shard, plan_shards


@dataclass(frozen=True)
class InputPlan:
    """The input shards as listed: identities in order, without the names of their images."""

    digest: str
    shards: tuple[Shard, ...]
    digests: tuple[str, ...]


def plan_inputs(config: RunConfig) -> InputPlan:
    """Lists the input. The listing streams: what stays in memory is one small record per shard.

    Raises:
        DataError: the input is missing, unreadable or empty.
    """
    shards, digests = [], []
    for shard, digest in listing(config):
        digests.append(digest)
        shards.append(replace(shard, members=()))
    return InputPlan(digest_of(digests), tuple(shards), tuple(digests))


def listing(config: RunConfig) -> Iterator[tuple[Shard, str]]:
    """The shards of the run's input with the digests of all that their embeddings depend on.

    Raises:
        ConfigError: the run lies where its tables would be taken for input.
        DataError: the input is missing, unreadable or empty.
    """
    settings = STAGES["encode"].settings(config) | {"weights": weights_stamp(config)}
    for shard in input_shards(config):
        if shard.index == 0 and shard.kind not in ("folder", "webdataset"):
            _refuse_run_within(config)
        yield shard, digest_of({"shard": _identity(shard), "settings": settings})


def _refuse_run_within(config: RunConfig) -> None:
    if config.run.startswith(config.images.uri.rstrip("/") + "/"):
        raise ConfigError(
            f"run = {config.run}: lies within images.uri = {config.images.uri}, so that its tables would be read as "
            "input; choose a folder outside"
        )


def _identity(shard: Shard) -> dict[str, Any]:
    """What its embeddings depend on; not its place among the others, so that a grown input keeps what was done."""
    content = replace(shard, members=()).to_json()
    return {key: value for key, value in content.items() if key not in ("index", "first")}


def input_shards(config: RunConfig) -> Iterator[Shard]:
    """The shards of the run's input, in order, streamed."""
    images = config.images
    uri = datasets.local_folder(images.uri)
    return plan_shards(uri, images.format, images.labels, shard_size=images.shard_size, classes=images.classes)
