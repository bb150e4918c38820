"""Data sets: `fiftyone`, `hf`, `webdataset` and `clip-retrieval`, each a folder."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rayclust.arrays import unit_rows
from rayclust.errors import DataError
from rayclust.export.rows import IMAGES_AT_ONCE, RunRows
from rayclust.export.tables import IMAGE
from rayclust.runtime.rows import part_embeddings
from rayclust.store import storage
from rayclust.store.sources.base import IMAGE_SUFFIXES

FIFTYONE = "0.25.0"
"""Version of FiftyOne whose fields are written; later ones migrate them when they import."""
_SIZES = {"n<1K": 10**3, "1K<n<10K": 10**4, "10K<n<100K": 10**5, "100K<n<1M": 10**6, "1M<n<10M": 10**7}
"""Size categories of a card, with the numbers of rows below which they hold."""


def write_hf(rows: RunRows, out: str, images: bool) -> dict[str, Any]:
    """Write a folder for Hugging Face's `datasets.load_dataset`: a parquet for each part, and a card.

    With images a column `image` holds the files' bytes, which datasets decodes; else `uri` alone says where they lie.
    """
    missing, size, count = 0, 0, len(rows.parts)
    for place, part in enumerate(rows.parts):
        table = rows.table(part)
        features: dict[str, Any] = {
            name: {"dtype": {"float": "float32"}.get(kind, kind), "_type": "Value"}
            for name, kind in zip(table.column_names, map(str, table.schema.types), strict=True)
        }
        if images:
            features["image"] = {"_type": "Image"}
            table = table.append_column("image", pa.nulls(table.num_rows, IMAGE))
        schema = table.schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        uri = storage.join(out, "data", f"train-{place:05d}-of-{count:05d}.parquet")
        with storage.open_output(uri) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for some, found in _with_images(rows, table) if images else [(table, [])]:
                if images:
                    missing += found.count(None)
                    cells = [
                        None if data is None else {"bytes": data, "path": f"{row}.{suffix(uri, data)}"}
                        for row, uri, data in zip(some["row"].to_pylist(), some["uri"].to_pylist(), found, strict=True)
                    ]
                    some = some.set_column(some.num_columns - 1, "image", pa.array(cells, IMAGE))
                writer.write_table(some.cast(schema))
            size += file.tell()
    _refuse_none(rows, missing if images else 0)
    names = sum(name is not None for name in rows.shown.names.values())
    card = _CARD.format(
        size=next((name for name, bound in _SIZES.items() if rows.count < bound), "n>10M"),
        run=rows.run.uri.rpartition("/")[2],
        count=rows.count,
        clusters=len(rows.shown.edited.shown),
        named=names,
        encoder=" and ".join(encoder.name for encoder in rows.config.each_encoder),
        method=rows.config.method.name,
        images="`image` is the image itself; " if images else "",
    )
    storage.write_bytes(storage.join(out, "README.md"), card.encode())
    return {"files": count + 1, "bytes": size} | ({"missing": missing} if images else {})


def push(folder: str, name: str) -> str:
    """Upload a folder that `hf` has written as a private data set of Hugging Face's hub, and return its address.

    The hub's own client finds the token: in HF_TOKEN, or where `hf auth login` has left it.

    Args:
        folder: path of the folder.
        name: OWNER/NAME of the data set; it is made where there is none.

    Raises:
        DataError: the hub cannot be reached, or refuses name or token.
    """
    from huggingface_hub import HfApi  # takes half a second

    hub = HfApi()
    try:
        address = hub.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, repo_type="dataset", folder_path=folder, commit_message="Clusters by rayclust")
    except Exception as error:
        raise DataError(f"--push {name}: {' '.join(str(error).split())}; the files are in {folder}") from error
    return str(address)


def write_webdataset(rows: RunRows, out: str, images: bool) -> dict[str, Any]:
    """Write a tar for each part, of images that are called by their row, with all else in a .json beside each."""
    missing = 0
    for place, part in enumerate(rows.parts):
        with (
            storage.open_output(storage.join(out, f"{place:05d}.tar")) as file,
            tarfile.open(fileobj=file, mode="w") as tar,
        ):
            for some, found in _with_images(rows, rows.table(part)):
                for record, data in zip(some.to_pylist(), found, strict=True):
                    if data is None:
                        missing += 1
                        continue
                    about = json.dumps(record, ensure_ascii=False).encode()
                    for ending, content in ((suffix(record["uri"], data), data), ("json", about)):
                        # No time and no owner: equal runs give equal tars.
                        member = tarfile.TarInfo(f"{record['row']:012d}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    _refuse_none(rows, missing)
    return {"files": len(rows.parts), "missing": missing}


def write_clip_retrieval(rows: RunRows, out: str, images: bool) -> dict[str, Any]:
    """Write unit embeddings as float16 npy and metadata as parquet, part by part, as clip-retrieval does.

    Of several encoders the embeddings are those of the first.
    """
    width = len(str(max(1, len(rows.parts) - 1)))
    for place, part in enumerate(rows.parts):
        embeddings = part_embeddings(rows.run, part, rows.run.spaces[:1])
        buffer = io.BytesIO()
        np.save(buffer, unit_rows(embeddings.astype(np.float32)).astype(np.float16))
        storage.write_bytes(storage.join(out, "img_emb", f"img_emb_{place:0{width}d}.npy"), buffer.getvalue())
        table = rows.table(part)
        names = ["image_path" if name == "uri" else name for name in table.column_names]
        with storage.open_output(storage.join(out, "metadata", f"metadata_{place:0{width}d}.parquet")) as file:
            pq.write_table(table.rename_columns(names), file, compression="zstd")
    return {"files": 2 * len(rows.parts)}


def write_fiftyone(rows: RunRows, out: str, images: bool) -> dict[str, Any]:
    """Write a folder that FiftyOne imports as `fiftyone.types.FiftyOneDataset`.

    Images that are local files are named where they lie; others are written to `data/`.
    """
    missing, files = 0, 2
    encoders = [encoder.name for encoder in rows.config.each_encoder]
    fields = [
        _field("id", "ObjectIdField", db_field="_id"),
        _field("filepath", "StringField"),
        _field("tags", "ListField", subfield="fiftyone.core.fields.StringField"),
        _field("metadata", "EmbeddedDocumentField", embedded_doc_type="fiftyone.core.metadata.ImageMetadata"),
        *(_field(name, kind) for name, kind in (("key", "StringField"), ("uri", "StringField"), ("row", "IntField"))),
        _field("cluster_number", "IntField"),
        *(
            _field(name, "EmbeddedDocumentField", embedded_doc_type="fiftyone.core.labels.Classification")
            for name in ("cluster", "ground_truth")
        ),
    ]
    about = {
        "version": FIFTYONE,
        "name": rows.run.uri.rpartition("/")[2],
        "media_type": "image",
        "sample_fields": fields,
        "info": {"run": rows.run.uri, "method": rows.config.method.name, "encoders": encoders},
        **{name: {} for name in ("classes", "evaluations", "brain_methods", "annotation_runs")},
    }
    storage.write_json(storage.join(out, "metadata.json"), about)
    with storage.open_output(storage.join(out, "samples.json")) as file:
        file.write(b'{"samples": [')
        for part in rows.parts:
            for record in rows.table(part).to_pylist():
                path, row = storage.to_path(record["uri"]), record["row"]
                where = str(path) if not storage.is_remote(record["uri"]) and path.is_file() else ""
                if not where:
                    data = next(rows.images([record["uri"]]))[1]
                    missing += data is None
                    where = record["uri"] if data is None else f"data/{row:012d}.{suffix(record['uri'], data)}"
                    if data is not None:
                        storage.write_bytes(storage.join(out, where), data)
                        files += 1
                label = record["name"] or f"cluster {record['cluster']}"
                sample = {
                    "_id": {"$oid": f"{row:024x}"},
                    "_media_type": "image",
                    "_rand": row / rows.count,
                    "filepath": where,
                    "tags": [],
                    "metadata": None,
                    **{name: record[name] for name in ("key", "uri", "row")},
                    "cluster_number": record["cluster"],
                    "cluster": _classification(2 * row, label, record["confidence"]),
                    "ground_truth": record["label"] and _classification(2 * row + 1, record["label"], None),
                }
                file.write((b"," if row else b"") + b"\n" + json.dumps(sample, ensure_ascii=False).encode())
        file.write(b"\n]}\n")
    _refuse_none(rows, missing)
    return {"files": files, "missing": missing}


def suffix(uri: str, data: bytes) -> str:
    """Return an image's ending: that of its URI where it is one of an image, else that of its format, else `img`."""
    ending = PurePosixPath(uri.rpartition("#")[2]).suffix[1:].lower()
    if ending in IMAGE_SUFFIXES:
        return ending
    try:
        with Image.open(io.BytesIO(data)) as image:
            return (image.format or "img").lower().replace("jpeg", "jpg")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "img"


def _with_images(rows: RunRows, table: pa.Table) -> Iterator[tuple[pa.Table, list[bytes | None]]]:
    """Yield slices of a table with the images of their rows, as many as are read together."""
    for start in range(0, table.num_rows, IMAGES_AT_ONCE):
        some = table.slice(start, IMAGES_AT_ONCE)
        yield some, [data for _, data in rows.images(some["uri"].to_pylist())]


def _refuse_none(rows: RunRows, missing: int) -> None:
    if rows.count and missing == rows.count:
        raise DataError(
            f"{rows.config.images.uri}: none of the {missing:,} images can be read now: were they moved, or is the run "
            "of ready embeddings?"
        )


def _field(name: str, kind: str, **more: Any) -> dict[str, Any]:
    """Return a field of FiftyOne's samples as its documents describe it."""
    empty = dict.fromkeys(("subfield", "embedded_doc_type", "description", "info"))
    ftype = f"fiftyone.core.fields.{kind}"
    return {"name": name, "ftype": ftype, "db_field": name, "fields": [], "read_only": False} | empty | more


def _classification(number: int, label: str, confidence: float | None) -> dict[str, Any]:
    return {
        "_id": {"$oid": f"{number:024x}"},
        "_cls": "Classification",
        "tags": [],
        "label": label,
        "confidence": confidence,
        "logits": None,
    }


_CARD = """---
size_categories:
- {size}
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---

# {run}: clusters by rayclust

{count:,} images in {clusters:,} clusters, of which {named:,} have names. Clusters were found without labels, by the
method {method} on embeddings of {encoder}; names are guesses unless people gave them.

{images}`key` and `uri` say which image a row is, `cluster` and `name` where it is, `confidence` the probability that
the method gives that, `label` its true class where one is known.
"""
