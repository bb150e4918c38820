"""List a run's input: its shards, and the digest of everything that the embeddings of each depend on."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rayclust.config import RunConfig
from rayclust.errors import ConfigError
from rayclust.runtime import datasets
from rayclust.runtime.encoder import weights_stamp
from rayclust.store.manifest import digest_of
from rayclust.store.sources import Shard, plan_shards


@dataclass(frozen=True)
class InputPlan:
    """Input shards as listed, once for the whole run."""

    digest: str
    shards: tuple[Shard, ...]
    """Without the names of their images."""
    digests: tuple[str, ...]
    """By shard: of all that its embeddings depend on."""
    packed: tuple[bytes, ...]
    """By shard: compressed JSON of the whole shard, some bytes per image of a folder."""

    def shard_json(self, index: int) -> bytes:
        """Return a shard with the names of its images, as JSON that `Shard.from_json` reads."""
        return zlib.decompress(self.packed[index])


def plan_inputs(config: RunConfig, settings: dict[str, Any]) -> InputPlan:
    """List the input, and the digests of all that its embeddings depend on: `settings`, weights and content.

    The listing streams: one small record per shard, and packed names of images, stay in memory.

    Raises:
        ConfigError: the run lies where its tables would be taken for input.
        DataError: the input is missing, unreadable or empty.
    """
    settings = settings | {"weights": weights_stamp(config)}
    shards, digests, packed = [], [], []
    for shard in input_shards(config):
        has_tables = shard.kind not in ("folder", "webdataset")
        if shard.index == 0 and has_tables and config.run.startswith(config.images.uri.rstrip("/") + "/"):
            raise ConfigError(
                f"run = {config.run}: lies within images.uri = {config.images.uri}, so that its tables would be read "
                "as input; choose a folder outside"
            )
        packed.append(zlib.compress(json.dumps(asdict(shard)).encode(), 1))
        shards.append(replace(shard, members=()))
        # A shard's place among the others is left out, so that a grown input keeps what was done.
        content = asdict(shards[-1])
        del content["index"], content["first"]
        digests.append(digest_of({"shard": content, "settings": settings}))
    return InputPlan(digest_of(digests), tuple(shards), tuple(digests), tuple(packed))


def input_shards(config: RunConfig) -> Iterator[Shard]:
    """Yield the shards of the run's input, in order."""
    images = config.images
    uri = datasets.local_folder(images.uri)
    return plan_shards(uri, images.format, images.labels, shard_size=images.shard_size, classes=images.classes)
