from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.config import RunConfig, validate
from rayclust.errors import ConfigError, DataError
from rayclust.language.vocabulary import Vocabulary, merged
from rayclust.runtime import encoder as run_encoder
from rayclust.runtime import vocabularies as words_module
from rayclust.runtime.vocabularies import check_classes, read_lists, vocabulary_kinds, word_embeddings
from tests.stages.runs import tree


def config(vocabulary: str | list[str], encoder: str = "pixels", **label: str) -> RunConfig:
    return validate(tree("/run", "/images", label={"vocabulary": vocabulary, **label}) | {"encoder": {"name": encoder}})


@pytest.mark.parametrize(
    ("vocabulary", "encoder", "kind"),
    [
        ("auto", "pixels", []),
        ("auto", "timm/resnet18", []),
        ("auto", "open_clip/ViT-B-32", ["imagenet"]),
        ("none", "open_clip/ViT-B-32", []),
        ("words.txt", "pixels", ["text"]),
        ("s3://b/words.parquet", "pixels", ["embeddings"]),
        (["words.txt", "imagenet", "classes"], "open_clip/ViT-B-32", ["text", "imagenet", "classes"]),
    ],
)
def test_auto_asks_for_names_where_the_encoder_reads_text(vocabulary: str, encoder: str, kind: list[str]):
    assert list(vocabulary_kinds(config(vocabulary, encoder)).values()) == kind


def test_words_with_rows_keep_them(tmp_path: Path):
    path = tmp_path / "words.parquet"
    pq.write_table(
        pa.table(
            {"embedding": [[3, 4], [1, 1], [0, 2]], "word": ["ä dog", None, "cat"], "hypernyms": [[None, 7], [], None]}
        ),
        path,
    )
    [words] = read_lists(config(str(path)))
    assert words.words == ("ä dog", "cat")
    assert words.hypernyms == {"ä dog": ("7",), "": (), "cat": ()}
    rows = word_embeddings(config(str(path)), merged([words]))
    assert rows.dtype == np.float32
    cosines = rows @ np.array([[3.0, 4.0], [0.0, 2.0]]).T
    assert (cosines.argmax(1) == [0, 0]).all() or (cosines > 0).all()


BAD_WORDS = {
    "no such file": (None, "none"),
    "not parquet": (b"words", "is not a readable parquet file"),
    "no embeddings": (pa.table({"word": ["a"], "vector": [[1.0]]}), "needs the columns word and embedding"),
    "two widths": (pa.table({"word": ["a", "b"], "embedding": [[1.0], [1.0, 2.0]]}), "lists of numbers of one width"),
    "text for numbers": (pa.table({"word": ["a"], "embedding": [["x"]]}), "lists of numbers"),
    "numbers for lists": (pa.table({"word": ["a", "b"], "embedding": [1.0, 2.0]}), "must hold lists of numbers"),
    "a word without numbers": (pa.table({"word": ["a", "b"], "embedding": [[1.0], None]}), "of one width"),
    "no number in a list": (pa.table({"word": ["a"], "embedding": [[]]}), "at least one"),
    "hypernyms that are words": (pa.table({"word": ["a"], "embedding": [[1.0]], "hypernyms": ["b"]}), "lists of words"),
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
        read_lists(config(str(path)))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_classes_are_a_list_only_for_whoever_knows_the_labels():
    settings = config("classes", "open_clip/ViT-B-32")
    assert read_lists(settings) == []
    assert read_lists(settings, lambda: ["tench", "gas_pump", "tench"])[0].words == ("gas pump", "tench")
    with pytest.raises(DataError, match="no image has a label"):
        read_lists(settings, list)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (config("classes"), "the encoder pixels reads no text"),
        (config(["classes", "words.txt"]), "the encoder pixels reads no text"),
        (
            config("classes", "open_clip/ViT-B-32").model_copy(
                update={"images": config("classes").images.model_copy(update={"labels": "none"})}
            ),
            "images.labels = none leaves no classes",
        ),
    ],
)
def test_classes_that_cannot_be_had_are_one_line(settings: RunConfig, wanted: str):
    with pytest.raises(ConfigError, match=wanted):
        check_classes(settings)
    check_classes(config(["classes", "words.parquet"]))
    check_classes(config("classes", "open_clip/ViT-B-32"))


ROWS = Vocabulary(("cat", "dog"), np.eye(2, 3, dtype=np.float32))


def test_names_without_rows_are_read_by_the_encoder_where_that_is_one_space(monkeypatch: pytest.MonkeyPatch):
    class Reader:
        @staticmethod
        def encode_texts(texts: list[str]) -> np.ndarray:
            return np.array([[0.0, 0.0, len(text)] for text in texts], np.float32)

    monkeypatch.setattr(run_encoder, "load_run_encoder", lambda config, **options: Reader())
    both = merged([ROWS, Vocabulary(("Dog", "eel"))])
    found = word_embeddings(config(["a.parquet", "b.txt"], "open_clip/ViT-B-32", space="encoder"), both)
    np.testing.assert_allclose(found, [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    with pytest.raises(ConfigError, match=r"say with label\.space"):
        word_embeddings(config(["a.parquet", "b.txt"], "open_clip/ViT-B-32"), both)
    with pytest.raises(ConfigError, match="'eel' have no embedding in any list, and the encoder pixels reads no text"):
        word_embeddings(config(["a.parquet", "classes"]), both)
    wide = merged([Vocabulary(("cat",), np.ones((1, 5), np.float32)), Vocabulary(("eel",))])
    with pytest.raises(ConfigError, match="embeddings of 5 values; the encoder's have 3"):
        word_embeddings(config(["a.parquet", "b.txt"], "open_clip/ViT-B-32", space="encoder"), wide)


def test_wordnet_is_found_where_its_own_variables_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "dict").mkdir()
    noun = tmp_path / "dict" / "data.noun"
    noun.write_bytes(b"00001740 03 n 01 entity 0 000 | that which is perceived\n")
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    monkeypatch.setenv("WNHOME", str(tmp_path))
    settings = config("wordnet", "open_clip/ViT-B-32")
    assert read_lists(settings)[0].words == ("entity",)
    assert words_module.word_stamps(["wordnet", "classes"]) == words_module.word_stamps([str(noun)])
    monkeypatch.delenv("WNHOME")
    monkeypatch.setattr(words_module, "WORDNET_FOLDERS", (str(tmp_path / "none"),))
    with pytest.raises(ConfigError, match="this machine has no WordNet; install it, set WNSEARCHDIR"):
        read_lists(settings)
    assert read_lists(config(str(noun), "open_clip/ViT-B-32"))[0].words == ("entity",)
