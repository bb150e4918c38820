"""List a run's input, with digests of all that its embeddings depend on, and choose an encoder that fits it."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rayclust.config import RunConfig
from rayclust.encoders.settings import EncoderConfig
from rayclust.errors import ArtefactError, ConfigError
from rayclust.runtime import datasets
from rayclust.runtime.spaces import ReadySpace, plan_ready
from rayclust.store import storage
from rayclust.store.manifest import digest_of
from rayclust.store.run import Run
from rayclust.store.sources import Shard, plan_shards

logger = logging.getLogger(__name__)

ON_GPU = {"name": "open_clip/ViT-L-14"}
"""Chosen by `encoder.name: auto` for GPUs."""
ON_CPU = {"name": "open_clip/ViT-B-32", "pretrained": "openai"}
"""Chosen for CPUs: a laptop encodes some ten images a second."""


@dataclass(frozen=True)
class InputPlan:
    """Input shards as listed, once for the whole run."""

    digest: str
    shards: tuple[Shard, ...]
    """Without the names of their images."""
    digests: tuple[str, ...]
    """By shard: of all that its embeddings depend on."""
    packed: tuple[bytes, ...]
    """By shard: JSON of the shard with the names of its images, as `Shard.from_json` reads it, compressed by zlib to
    some bytes per image of a folder."""
    ready: tuple[ReadySpace, ...] = ()
    """Ready embeddings of further spaces."""


def plan_inputs(config: RunConfig, settings: dict[str, Any]) -> InputPlan:
    """List the input, and the digests of all that its embeddings depend on: `settings`, weights and content.

    The listing streams: one small record per shard, and packed names of images, stay in memory.

    Raises:
        ConfigError: the run lies where its tables would be taken for input.
        DataError: the input is missing, unreadable or empty.
    """
    refuse_misplaced(config)
    stamps = [weights_stamp(config, encoder) for encoder in config.each_encoder]
    settings = settings | {"weights": stamps if config.encoders else stamps[0]}
    shards, contents, packed = list[Shard](), list[dict[str, Any]](), []
    for shard in input_shards(config):
        has_tables = shard.kind not in ("folder", "webdataset")
        if shard.index == 0 and has_tables and within(config.run, config.images.uri):
            raise ConfigError(
                f"run = {config.run}: lies within images.uri = {config.images.uri}, so that its tables would be read "
                "as input; choose a folder outside"
            )
        if shards and shard.has_embeddings != shards[0].has_embeddings:
            raise ConfigError(f"images.test = {config.images.test}: one input holds images and the other embeddings")
        packed.append(zlib.compress(json.dumps(asdict(shard)).encode(), 1))
        shards.append(replace(shard, members=()))
        # A shard's place among the others is left out, so that a grown input keeps what was done.
        content = asdict(shards[-1])
        del content["index"], content["first"]
        contents.append(content)
    ready = tuple(plan_ready(config, shards))
    if ready:
        # Without the places of the files, so that a listing may move.
        listed = {space.name: [[s.name, s.stamp, s.start, s.row_groups] for s in space.shards] for space in ready}
        settings |= {"ready": {name: digest_of(listing) for name, listing in listed.items()}}
    digests = tuple(digest_of({"shard": content, "settings": settings}) for content in contents)
    return InputPlan(digest_of(digests), tuple(shards), digests, tuple(packed), ready)


def refuse_misplaced(config: RunConfig) -> None:
    """Raise ConfigError where the input is written by the run itself, or would be read twice."""
    run, images = Run(config.run, config.spaces), config.images
    own = (
        run.rows_folder,
        run.embeddings_folder,
        run.rejects_folder,
        run.neighbors_folder,
        run.assignments_folder,
        run.index_folder,
    )
    for key, uri in (("uri", images.uri), ("test", images.test)):
        if uri is not None and any(within(uri, folder) for folder in own):
            raise ConfigError(f"images.{key} = {uri}: is written by run = {config.run}; choose another run")
    if images.test is not None and within(images.test, images.uri):
        inside = images.test.removeprefix(images.uri).strip("/")
        mend = f"set images.split: {inside}/* instead" if inside else "set images.split to keep some of its rows aside"
        raise ConfigError(
            f"images.test = {images.test}: lies within images.uri, so that its rows would be read twice; {mend}"
        )


def source_shards(config: RunConfig, source: str) -> Iterator[Shard]:
    """Yield the shards of `images.uri` or `images.test`."""
    images = config.images
    settings = images.model_dump(include={"shard_size", "classes", "columns"})
    return plan_shards(datasets.local_folder(source), images.format, images.labels, **settings)


def input_shards(config: RunConfig) -> Iterator[Shard]:
    """Yield the shards of the run's input, in order, and those of a second one that is kept aside behind them."""
    images, index, first = config.images, 0, 0
    for source in (images.uri,) if images.test is None else (images.uri, images.test):
        start, rows = index, first
        for shard in source_shards(config, source):
            yield replace(shard, index=start + shard.index, first=rows + shard.first)
            index, first = start + shard.index + 1, rows + shard.first + (shard.count or 0)


def within(uri: str, folder: str) -> bool:
    """Return whether a path or URI is a folder or lies in it, also by another spelling or a symbolic link."""
    resolved = [
        place
        if storage.is_remote(place) or place.startswith(datasets.SCHEME)
        else str(storage.to_path(place).resolve())
        for place in (uri, folder)
    ]
    inner, outer = (place.rstrip("/") + "/" for place in resolved)
    return inner.startswith(outer)


def with_encoder(config: RunConfig, has_gpus: Callable[[], bool]) -> RunConfig:
    """Return the config with `encoder.name: auto` resolved, so that every later call of the run finds the same encoder.

    Args:
        config: of the run.
        has_gpus: asked only where images are encoded for the first time.
    """
    if config.encoders:
        # Of several encoders: ready embeddings are of an unknown one, and those of images need a name.
        is_ready = next(input_shards(config)).has_embeddings
        encoders = []
        for place, encoder in enumerate(config.encoders):
            key = f"encoders.{place}"
            if is_ready and place == 0 and encoder.embeddings is not None:
                raise ConfigError(f"{key}.embeddings: those of the first space are images.uri = {config.images.uri}")
            if is_ready and place > 0 and encoder.embeddings is None:
                raise ConfigError(
                    f"{key}.embeddings: is missing; images.uri = {config.images.uri} holds no images to encode"
                )
            is_encoded = not is_ready and encoder.embeddings is None
            if is_encoded and encoder.name in ("auto", "unknown"):
                raise ConfigError(
                    f"{key}.name: is missing; one of several encoders needs a name, such as open_clip/ViT-B-32"
                )
            encoders.append(encoder.model_copy(update={"name": "unknown"}) if encoder.name == "auto" else encoder)
        return config.model_copy(update={"encoders": tuple(encoders)})
    # The only one: as this run began, else by the input.
    if config.encoder.name != "auto":
        return config
    chosen, why = {"name": "unknown"}, "the rows are ready embeddings: no names for clusters, no search by text"
    try:
        saved = storage.read_json(Run(config.run).config)
    except (storage.MissingError, ArtefactError):
        saved = {}
    before = saved.get("encoder", {}) if saved.get("images", {}).get("uri") == config.images.uri else {}
    if before.get("name", "auto") != "auto":
        chosen = {key: before[key] for key in ("name", "pretrained") if key in before}
        why = "as this run began"
    elif not next(input_shards(config)).has_embeddings:
        on_gpus = has_gpus()
        chosen, why = (ON_GPU, "for GPUs") if on_gpus else (ON_CPU, "small, for CPUs")
    logger.info("encoder: %s, %s; encoder.name takes another", chosen["name"], why)
    settings = config.encoder.model_dump(exclude_unset=True) | chosen
    return config.model_copy(update={"encoder": EncoderConfig.model_validate(settings)})


def weights_stamp(config: RunConfig, settings: EncoderConfig | None = None) -> str:
    """Return a string that changes with an encoder's weights: a hub tag, or a file's size and time, or its ETag."""
    settings = config.encoder if settings is None else settings
    uri = settings.weights_uri
    if uri is None:
        return str(settings.pretrained)
    found = storage.stat(uri)
    if found is None:
        raise ConfigError(f"encoder.pretrained = {uri}: no such file; give a tag, a path or a URI")
    return found.stamp
