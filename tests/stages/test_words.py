from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.config import RunConfig, validate
from rayclust.errors import DataError
from rayclust.stages.words import cluster_names, embedded, read_vocabulary, vocabulary_kind
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run
from tests.stages.conftest import Sealed
from tests.stages.runs import tree


def config(vocabulary: str, encoder: str = "pixels") -> RunConfig:
    return validate(tree("/run", "/images", label={"vocabulary": vocabulary}) | {"encoder": {"name": encoder}})


@pytest.mark.parametrize(
    ("vocabulary", "encoder", "kind"),
    [
        ("auto", "pixels", "none"),
        ("auto", "timm/resnet18", "none"),
        ("auto", "open_clip/ViT-B-32", "imagenet"),
        ("none", "open_clip/ViT-B-32", "none"),
        ("words.txt", "pixels", "text"),
        ("s3://b/words.parquet", "pixels", "embeddings"),
    ],
)
def test_auto_asks_for_names_where_the_encoder_reads_text(vocabulary: str, encoder: str, kind: str):
    assert vocabulary_kind(config(vocabulary, encoder)) == kind


def test_words_with_rows_keep_them(tmp_path: Path):
    path = tmp_path / "words.parquet"
    pq.write_table(pa.table({"embedding": [[3.0, 4.0], [0.0, 2.0]], "word": ["ä dog", "cat"], "more": [1, 2]}), path)
    words = read_vocabulary(config(str(path)))
    assert words is not None
    assert words.words == ("ä dog", "cat")
    table = embedded(config(str(path)), words)
    assert table["word"].to_pylist() == ["ä dog", "cat"]
    rows = tables.matrix(table["embedding"])
    assert rows.dtype == np.float32
    cosines = rows @ np.array([[3.0, 4.0], [0.0, 2.0]]).T
    assert (cosines.argmax(1) == [0, 0]).all() or (cosines > 0).all()


BAD_WORDS = {
    "no such file": (None, "none"),
    "not parquet": (b"words", "is not a readable parquet file"),
    "no embeddings": (pa.table({"word": ["a"], "vector": [[1.0]]}), "needs the columns word and embedding"),
    "two widths": (pa.table({"word": ["a", "b"], "embedding": [[1.0], [1.0, 2.0]]}), "not numbers of one width"),
    "text for numbers": (pa.table({"word": ["a"], "embedding": [["x"]]}), "not numbers of one width"),
    "numbers for lists": (pa.table({"word": ["a", "b"], "embedding": [1.0, 2.0]}), "must hold lists of numbers"),
    "no words": (pa.table({"word": [], "embedding": []}), "at least one"),
}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_a_table_of_words_that_cannot_be_used_is_one_line(name: str, tmp_path: Path):
    content, wanted = BAD_WORDS[name]
    path = tmp_path / ("none.parquet" if content is None else "words.parquet")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        pq.write_table(content, path)
    with pytest.raises(DataError, match=wanted) as caught:
        read_vocabulary(config(str(path)))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_names_hold_only_for_the_assignment_that_they_were_given_to(pictures_run: Sealed, tmp_path: Path):
    assert cluster_names(pictures_run.run) == {0: None, 1: None, 2: None}
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    run = Run(str(tmp_path / "run"))
    manifest = filesystem.read_json(run.manifest("assign"))
    filesystem.write_json(run.manifest("assign"), manifest | {"extra": {"sizes": [24, 0, 0]}})
    assert cluster_names(run) == {}
    filesystem.remove(run.manifest("assign"))
    assert cluster_names(run) == {}
