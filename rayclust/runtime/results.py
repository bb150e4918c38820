"""Runs in Python (`rayclust.run`, `rayclust.load`): tables, images, search, and clusters for new images.

Apart from `api`, which every command imports, because it needs encoders and torch.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rayclust.arrays import require_matrix
from rayclust.config import RunConfig, validate
from rayclust.encoders.decode import Undecodable, flatten
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.runtime import log
from rayclust.runtime.api import load_config, load_run, with_absolute_paths
from rayclust.runtime.edits import shown_clusters
from rayclust.runtime.encoder import RunEncoders, with_run_engines
from rayclust.runtime.pipeline import content_digest, run_all
from rayclust.runtime.rows import transform_of
from rayclust.runtime.tensors import load_method, method_inputs
from rayclust.store import storage, tables
from rayclust.store.manifest import EncodeOutputs, read_json_output, read_manifest
from rayclust.store.run import Run, parts
from rayclust.store.sources import fetch_many

if TYPE_CHECKING:
    import pandas as pd

_OF_EVERY_ROW = {"neighbors": "neighbors", "assignments": "assign"}
"""Tables with a line for every row, and the stages that write them."""


def run(
    config: RunConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str] = (), *, progress: bool = True
) -> RunTables:
    """Run every stage that is not complete; return the run's tables.

    The config is a RUN.yaml's path or URI, its content as a mapping, or a `RunConfig`; `KEY=VALUE` overrides go with a
    path or URI. `progress` shows bars and lines as the command does, unless the program has set up logging itself.
    Raise `RayclustError` with the line that the command would show.
    """
    if isinstance(config, str | Path):
        settings = load_config(str(config), overrides)
    else:
        settings = with_absolute_paths(config if isinstance(config, RunConfig) else validate(dict(config)))
    with log.shown(progress):
        run_all(settings)
    return load(settings.run)


def load(run: str | Path) -> RunTables:
    """Open a run, by its folder, URI or RUN.yaml, read on demand; raise `ArtefactError` if there is no run."""
    return RunTables(load_run(str(run)))


class RunTables:
    """Artefacts of a run, read on demand; `repr` lists the tables that are there. See docs/python.md."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        """As the run was last started."""
        self._run = Run(config.run, config.spaces)
        self.report = self._run.report
        """URI of the page."""

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each table that a finished stage has written, by name."""
        found = {stage: read_manifest(self._run, stage) for stage in ("encode", "neighbors", "assign", "label")}
        encode = found["encode"]
        if encode is None:
            return {}
        counts = {"embeddings": encode.counts["rows"], "rejects": encode.counts["rejects"]}
        counts |= {name: encode.counts["rows"] for name, stage in _OF_EVERY_ROW.items() if found[stage] is not None}
        return counts | ({} if found["label"] is None else {"clusters": self.clusters.num_rows})

    def __repr__(self) -> str:
        method = self.config.method
        lines = [f"rayclust run {self.config.run}: {method.name}, {method.clusters} clusters"]
        lines += [f"  {name:<12} {count:>12,} rows" for name, count in self.counts.items()]
        return "\n".join(lines if len(lines) > 1 else [*lines, "  no table yet: the stage encode has not run"])

    def frame(self, name: str | None = None, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return a table as a pandas frame, all columns or some.

        Args:
            name: embeddings, rejects, neighbors, assignments or clusters; None gives one line per image: row, key, uri,
                label, cluster, confidence and the cluster's name.
            columns: None takes all.
        """
        if name == "clusters":
            return (self.clusters if columns is None else self.clusters.select(list(columns))).to_pandas()
        if name is not None:
            return self.table(name, columns).to_pandas()
        table = self.table("rows", ["row", "key", "uri", "label"])
        assigned = self.table("assignments", ["cluster", "confidence"])
        shown = shown_clusters(self._run)
        names = pa.nulls(assigned.num_rows, pa.string())
        if shown is not None:
            clusters = shown.edited.of(assigned["cluster"].to_numpy(), table["key"])
            assigned, names = assigned.set_column(0, "cluster", pa.array(clusters)), shown.names_at(clusters)
        assigned = assigned.append_column("name", names)
        frame = pa.table({name: t[name] for t in (table, assigned) for name in t.column_names}).to_pandas()
        return frame if columns is None else frame[list(columns)]

    def images(self, rows: Iterable[int]) -> list[Image.Image]:
        """Return the images of some rows, as Pillow's, in the order given.

        Raises:
            DataError: there is no such row, an image is no longer where the run found it, or the run is of ready
                embeddings.
        """
        wanted, known = [int(row) for row in rows], self.table("rows", ["uri"])["uri"]
        for row in wanted:
            if not 0 <= row < len(known):
                raise DataError(f"row {row}: the run has rows 0 to {len(known) - 1}")
        uris = known.take(pa.array(wanted, pa.int64())).to_pylist()
        found = dict(fetch_many(uris, self.config.images.columns))
        for uri in uris:
            if found.get(uri) is None:
                raise DataError(f"{uri}: no image is there now: was it moved, or is the run of ready embeddings?")
        return [Image.open(io.BytesIO(found[uri] or b"")) for uri in uris]

    def search(
        self,
        text: str | None = None,
        *,
        image: str | Path | Image.Image | None = None,
        like: str | None = None,
        top: int = 10,
        space: str | None = None,
    ) -> pd.DataFrame:
        """Return the images nearest to words or to an image, nearest first, as the command `search` does.

        Args:
            text: words, for encoders that read text; or
            image: a path or URI, or a Pillow image; or
            like: the key of one of the run's images, which needs no encoder.
            top: how many.
            space: `encoder`, or `z` for methods that learn a space of their own; of several encoders the name of one.
                None is `z` for methods that learn from pixels, `encoder` for others.

        Returns:
            Columns row, similarity (cosine), key, uri, cluster and name.
        """
        known = ("encoder", *self.config.spaces)
        if space not in (*known, "z", None):
            raise ConfigError(f"space = {space!r}: must be {', '.join(map(repr, known))} or 'z'")
        # Stages lie above this module, so they are imported by name, as the pipeline does.
        stage = import_module("rayclust.stages.search")
        query: str | bytes | None = None if image is None else str(image)
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            flatten(ImageOps.exif_transpose(image), "RGB").save(buffer, "PNG")
            query = buffer.getvalue()
        [hits] = stage.search(self.config, image=query, text=text, like=like, top=top, space=space).values()
        names = [field.name for field in fields(stage.Hit)]
        return pa.table({name: [getattr(hit, name) for hit in hits] for name in names}).to_pandas()

    def predict(self, images: NDArray[Any] | str | Path | Sequence[str | Path]) -> pd.DataFrame:
        """Return the clusters of new images, or of embeddings that the run's own encoder made.

        Args:
            images: Float[B D] embeddings; paths or URIs of single images, encoded here; or a folder or URI of anything
                that `images.uri` takes, encoded as the command `predict` does.

        Returns:
            Columns cluster, name and confidence; for images key, uri and the reason of what cannot be read as well.

        Raises:
            ArtefactError: the run is not trained.
            DataError: an embedding is zero or not finite.
            ShapeError: embeddings are no matrix of the run's width.
        """
        if isinstance(images, str | Path):
            with tempfile.TemporaryDirectory(prefix="rayclust-predict-") as folder, log.shown():
                out = str(Path(folder) / "table.parquet")
                import_module("rayclust.stages.predict").predict(self.config, str(images), out)
                return tables.read_table(out).to_pandas()
        encode, train = read_manifest(self._run, "encode"), read_manifest(self._run, "train")
        if encode is None or train is None:
            raise ArtefactError(f"{self._run.uri}: is not trained: run `rayclust run RUN.yaml` first")
        uris, reasons, dimension = None, list[str | None](), encode.outputs_of(EncodeOutputs).dimension
        if isinstance(images, np.ndarray):
            rows = images
            require_matrix(rows, "images", dimension)
            is_usable = np.isfinite(rows).all(axis=1) & rows.any(axis=1)
            if not is_usable.all():
                raise DataError(f"images: row {is_usable.argmin()} is zero or not finite, and belongs to no cluster")
        else:
            uris = [str(path) for path in images]
            # Single images: the rows of those that can be read, and why each of the others cannot.
            encoders, encoded = RunEncoders(with_run_engines(self.config)), [np.zeros((0, dimension), np.float32)]
            for uri in uris:
                try:
                    pixels = encoders.decode(storage.read_bytes(uri))
                except (Undecodable, DataError) as error:
                    reasons.append(error.reason if isinstance(error, Undecodable) else "missing")
                else:
                    encoded.append(encoders.encode([kind[None] for kind in pixels]))
                    reasons.append(None)
            rows = np.concatenate(encoded)
        method = load_method(self._run.uri, content_digest(train))
        features = method_inputs(method, transform_of(encode, self.config.features), rows)
        stage = import_module("rayclust.stages.assign")
        clusters, confidence = stage.assign(method, features)
        shown = shown_clusters(self._run)
        clusters = clusters if shown is None else shown.edited.of(clusters)
        names = [None] * len(clusters) if shown is None else shown.names_at(clusters).to_pylist()
        found = {"cluster": clusters.tolist(), "name": names}
        found["confidence"] = stage.calibration_of(self.config, encode, train)(confidence).tolist()
        if uris is not None:
            good = iter(range(len(clusters)))
            places = [None if reason else next(good) for reason in reasons]
            found = {name: [None if at is None else values[at] for at in places] for name, values in found.items()}
            found = {"key": [Path(uri).name for uri in uris], "uri": uris, **found, "reason": reasons}
        return pa.table(found).to_pandas()

    def iter(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the parts of a table (embeddings, rejects, neighbors or assignments) in order, all columns or some.

        Raises:
            ArtefactError: a part is missing or damaged.
        """
        folder = self._run.rows_folder if name == "rows" else self._run.at(name)
        return (tables.read_table(uri, columns) for _, uri in parts(folder))

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a whole table; see `iter`. Raise `ArtefactError` if the run has none of that name."""
        found = list(self.iter(name, columns))
        if not found:
            there = ", ".join(self.counts) or "no table yet"
            raise ArtefactError(f"{self._run.at(name)}: no parts there; the run has {there}")
        return pa.concat_tables(found)

    @cached_property
    def clusters(self) -> pa.Table:
        """One row per cluster: size, name, score, runners-up, exemplars, outliers."""
        return tables.read_table(self._run.clusters)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Scores by name. Raises `ArtefactError` if the stage evaluate has not run."""
        try:
            scores: dict[str, Any] = read_json_output(self._run, "evaluate", self._run.metrics)
        except storage.MissingError:
            raise ArtefactError(f"{self._run.metrics}: is missing: run evaluate first") from None
        return scores
