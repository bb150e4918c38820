from __future__ import annotations

import numpy as np
import pytest
from open_clip import IMAGENET_CLASSNAMES

from rayclust.config import LabelConfig, kind_of, validate
from rayclust.errors import ConfigError, DataError, ShapeError
from rayclust.language.vocabulary import (
    LONGEST,
    Vocabulary,
    from_names,
    from_rows,
    from_text,
    from_wordnet,
    merged,
    same_name,
)
from tests.stages.runs import tree


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("imagenet", "imagenet"),
        ("wordnet", "wordnet"),
        ("s3://bucket/dict/data.noun", "wordnet"),
        ("classes", "classes"),
        ("s3://bucket/nouns.parquet", "embeddings"),
        ("words.PQ", "embeddings"),
        ("nouns.txt", "text"),
        ("s3://bucket/nouns.tsv", "text"),
        ("imagenet.txt", "text"),
    ],
)
def test_kinds(value: str, kind: str) -> None:
    assert kind_of(value) == kind


def test_lines_are_cleaned_and_distinct() -> None:
    text = "\ufeff# animals\ncat\n\n  great   white_shark \r\nCat\nnull\nnan\nñandú\n  # end\n"
    assert from_text(text.encode(), "words.txt").words == ("cat", "great white shark", "null", "nan", "ñandú")


def test_a_column_of_a_table() -> None:
    table = 'word,definition\ncat,"a feline, small"\nsea_cow,x\nnull,nothing\n'
    assert from_text(table.encode(), "nouns.csv").words == ("cat", "sea cow", "null")
    assert from_text(b"synset\tLemma\n1\tcat\n2\tdog\n3\n", "s3://b/nouns.TSV").words == ("cat", "dog")


@pytest.mark.parametrize(
    ("data", "source", "message"),
    [
        (b"caf\xe9\n", "w.txt", "label.vocabulary = w.txt: byte 3 is not UTF-8"),
        (b"", "w.txt", "holds no name"),
        (b"\n# only a remark\n", "w.txt", "holds no name"),
        (b"a\0b\n", "w.txt", "holds zero bytes"),
        (b"cat\n" + b"x" * (LONGEST + 1), "w.txt", f"name 2 has {LONGEST + 1} characters"),
        (b"id,value\n1,2\n", "w.csv", "no column of names among id, value; call it `word`"),
        (b"", "w.csv", "no column of names among nothing"),
        (b"word\n", "w.csv", "holds no name"),
    ],
)
def test_bad_lists_give_one_clear_line(data: bytes, source: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        from_text(data, source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_imagenet_has_its_classes() -> None:
    words = from_names(IMAGENET_CLASSNAMES, "imagenet").words
    assert {"tench", "golf ball", "parachute"} <= set(words)
    assert 990 <= len(words) <= 1000


def test_words_with_rows_keep_the_first_of_equal_ones() -> None:
    rows = np.arange(10, dtype=np.float16).reshape(5, 2)
    vocabulary = from_rows(["cat", "sea_cow", "Cat", None, " "], rows, "v.parquet")
    assert vocabulary.words == ("cat", "sea cow")
    assert vocabulary.embeddings is not None
    assert vocabulary.embeddings.tolist() == [[0, 1], [2, 3]]
    assert vocabulary.embeddings.dtype == np.float32


def test_bad_rows_are_refused() -> None:
    with pytest.raises(DataError, match="2 words but 3 rows"):
        from_rows(["a", "b"], np.zeros((3, 2)), "v.parquet")
    with pytest.raises(DataError, match="the row of 'b' is not finite"):
        from_rows(["a", "b"], np.array([[0.0], [np.inf]]), "v.parquet")
    with pytest.raises(DataError, match="holds no name"):
        from_rows([""], np.zeros((1, 2)), "v.parquet")
    with pytest.raises(ShapeError):
        from_rows(["a"], np.zeros(3), "v.parquet")


def test_lists_are_merged_and_equal_names_count_once() -> None:
    rows = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    found = merged([Vocabulary(("cat", "Dog")), Vocabulary(("dog", "eel"), rows), Vocabulary(("CAT",))])
    assert found.words == ("cat", "Dog", "eel")
    assert found.sources == (frozenset({0, 2}), frozenset({0, 1}), frozenset({1}))
    assert found.has_row.tolist() == [False, True, True]
    assert found.embeddings.tolist() == [[0, 0], [1, 2], [3, 4]]
    assert merged([Vocabulary(("cat",))]).embeddings.shape == (1, 0)


def test_rows_of_two_widths_are_refused() -> None:
    one, two = Vocabulary(("a",), np.ones((1, 2), np.float32)), Vocabulary(("b",), np.ones((1, 3), np.float32))
    with pytest.raises(DataError, match="rows of 2 and of 3 values"):
        merged([one, two])


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [("gas pump", "Gas_Pump", True), ("cat", "cats", False), (None, "cat", False), (None, None, False)],
)
def test_names_are_equal_but_for_case_and_underscores(one: str | None, other: str | None, equal: bool) -> None:
    assert same_name(one, other) is equal


def test_one_name_is_a_list_of_one() -> None:
    assert LabelConfig().lists == ("auto",)
    assert LabelConfig(vocabulary="words.txt").lists == ("words.txt",)
    given = {"vocabulary": ["classes", "words.txt"]}
    assert validate(tree("/run", "/images", label=given)).label.lists == ("classes", "words.txt")


@pytest.mark.parametrize(
    ("label", "wanted"),
    [
        ({"voters": 0}, "label.voters = 0: must be at least 1, all or auto"),
        ({"unique": True}, "label.unique = True: is now distinct"),
        ({"vocabulary": []}, "a list needs at least one name"),
        ({"vocabulary": ["auto", "classes"]}, "neither auto nor none"),
    ],
)
def test_settings_that_mean_nothing_are_one_line(label: dict, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        validate(tree("/run", "/images", label=label))


WORDNET = b"""  1 This software and database is being provided to you, the LICENSEE, by
00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which is perceived
00001930 03 n 01 physical_entity 0 002 @ 00001740 n 0000 ~ 00002000 n 0000 | an entity
00002000 05 n 02 dog 0 Domestic_dog 0 002 @ 00001930 n 0000 ~ 00003000 n 0000 | a dog
00003000 05 n 01 Lassie 0 001 @i 00002000 n 0000 | a dog of films
00004000 05 n 01 dog 1 001 @ 00001740 n 0000 | a chap
"""


def test_wordnet_has_its_nouns_with_what_is_more_general() -> None:
    found = from_wordnet(WORDNET, "data.noun")
    assert found.words == ("entity", "physical entity", "dog", "Domestic dog", "Lassie")
    assert found.hypernyms["dog"] == ("physical entity", "entity")
    assert found.hypernyms["lassie"] == ("dog",)
    assert found.hypernyms["entity"] == ()
    written = from_wordnet(WORDNET, "data.noun", verbatim=True)
    assert written.words == ("entity", "physical_entity", "dog", "Domestic_dog", "Lassie", "dog")
    assert merged([written], verbatim=True).words == written.words
    assert merged([found, from_text(b"cat", "w")]).hypernyms == found.hypernyms
    with pytest.raises(DataError, match=r"is no data\.noun of WordNet"):
        from_wordnet(b"a list\nof words", "data.noun")


def test_names_may_stay_as_they_are_written() -> None:
    assert from_text(b"Sea_cow\nsea cow\nnan\n", "w").words == ("Sea cow", "nan")
    assert from_text(b"Sea_cow\nsea cow\nnan\n", "w", verbatim=True).words == ("Sea_cow", "sea cow", "nan")
    rows = np.eye(2, dtype=np.float32)
    found = from_rows(["a_b", "A b"], rows, "w", hypernyms=[["C_d"], None], verbatim=True)
    assert found.words == ("a_b", "A b")
    assert found.hypernyms == {"a b": ("c d",)}
