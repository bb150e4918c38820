from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import sparse

import rayclust as rc
from rayclust.errors import ConfigError, ShapeError
from rayclust.features import FeatureTransform
from rayclust.language import vocabulary
from rayclust.language.naming import (
    ClusterName,
    TopRows,
    cluster_votes,
    encode_words,
    name_clusters,
    name_distinctly,
    shuffled_null,
    typicality,
)
from tests import references


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_and_nouns(images: int = 40, words: int = 23, width: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.normal(size=(images, width)), rng.integers(0, 4, images), rng.normal(size=(words, width))


def test_one_image_votes_with_its_largest_probabilities() -> None:
    # On a circle, cosines are chosen by angle; logits 4, 3, 2, 1 and 0 for scale 10.
    cosines = np.array([0.4, 0.1, 0.3, 0.0, 0.2])
    nouns = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
    votes = cluster_votes(np.array([[2.0, 0.0]]), np.array([1]), nouns, 2, scale=10, top=3).toarray()
    total = sum(np.exp([4, 1, 3, 0, 2]))
    assert np.allclose(votes, [[0] * 5, [np.exp(4) / total, 0, np.exp(3) / total, 0, np.exp(2) / total]], atol=1e-6)


def test_five_of_seven_words_count_with_their_exact_masses() -> None:
    """Test vector 14 of the paper's procedure: one template, scale 100, the encoder's raw space, top five."""
    cosines = np.array([0.30, 0.28, 0.31, 0.05, 0.29, 0.27, 0.26])
    nouns = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
    mass = np.exp(100 * cosines) / np.exp(100 * cosines).sum()
    votes = cluster_votes(np.array([[1.0, 0.0]]), np.array([0]), nouns, 1).toarray()[0]
    assert np.allclose(votes, np.where(np.isin(np.arange(7), [3, 6]), 0, mass), rtol=1e-4)
    # A text that comes twice: either has p / (1 + p), half of it where it has all.
    twice = cluster_votes(np.array([[1.0, 0.0]]), np.array([0]), nouns[[2, 2, 0, 1, 3, 4, 5, 6]], 1).toarray()[0]
    assert np.allclose(twice[:2], mass[2] / (1 + mass[2]), rtol=1e-4)


def test_a_word_that_comes_twice_shares_its_probability() -> None:
    x, _, nouns = rows_and_nouns(images=1)
    best = int(np.argmax(unit(nouns) @ x[0]))
    once = cluster_votes(x, np.array([0]), nouns, 1, scale=100).toarray()[0]
    twice = cluster_votes(x, np.array([0]), np.vstack([nouns, nouns[best]]), 1, scale=100).toarray()[0]
    # Its mass was all but 1, so halves of 1/2 remain.
    assert once[best] > 0.999
    assert twice[[best, -1]] == pytest.approx([once[best] / 2] * 2, rel=2e-3)


def test_votes_equal_the_slow_form() -> None:
    x, clusters, nouns = rows_and_nouns()
    votes = cluster_votes(x, clusters, nouns, 4, scale=7)
    assert np.allclose(votes.toarray(), references.votes(x, clusters, nouns, 4, scale=7, top=5), atol=1e-6)
    assert votes.nnz <= 5 * len(x)


def test_shards_vote_apart() -> None:
    x, clusters, nouns = rows_and_nouns()
    whole = cluster_votes(x, clusters, nouns, 4)
    parts = cluster_votes(x[:11], clusters[:11], nouns, 4) + cluster_votes(x[11:], clusters[11:], nouns, 4)
    assert np.allclose(whole.toarray(), parts.toarray(), rtol=1e-6, atol=1e-12)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, clusters, nouns = rows_and_nouns()
    whole = cluster_votes(x, clusters, nouns, 4)
    monkeypatch.setattr("rayclust.language.naming._BLOCK", 50)
    assert np.allclose(cluster_votes(x, clusters, nouns, 4).toarray(), whole.toarray(), rtol=1e-5, atol=1e-9)


def test_of_equal_words_the_first_count() -> None:
    votes = cluster_votes(np.array([[1.0, 0.0]]), np.array([0]), np.tile([[0.0, 1.0]], (8, 1)), 1, top=3).toarray()
    assert np.allclose(votes, [[1 / 8] * 3 + [0] * 5])


def test_few_words_all_count_and_rows_without_cluster_do_not_vote() -> None:
    x, _, nouns = rows_and_nouns(images=3, words=2)
    votes = cluster_votes(x, np.array([0, -1, 0]), nouns, 1)
    assert votes.sum() == pytest.approx(2)
    assert cluster_votes(x[:0], np.array([], int), nouns, 3).toarray().tolist() == [[0, 0]] * 3


def test_length_of_rows_does_not_matter() -> None:
    x, clusters, nouns = rows_and_nouns()
    votes = cluster_votes(x, clusters, nouns, 4)
    again = cluster_votes((x * 9).astype(np.float16), clusters, nouns * 3, 4)
    assert np.allclose(votes.toarray(), again.toarray(), atol=0.2)


def test_images_may_be_centred_first() -> None:
    x, clusters, nouns = rows_and_nouns()
    moved = x + 50.0
    transform = FeatureTransform.fitted(moved, center=True, standardize=False, normalize=True)
    votes = cluster_votes(moved, clusters, nouns, 4, transform=transform)
    assert np.allclose(votes.toarray(), cluster_votes(x - x.mean(0), clusters, nouns, 4).toarray(), atol=1e-3)


def test_shapes_are_checked() -> None:
    x, clusters, nouns = rows_and_nouns()
    with pytest.raises(ShapeError, match="width 6: 5 is needed"):
        cluster_votes(x, clusters, nouns[:, :5], 4)
    with pytest.raises(ShapeError, match="length 39"):
        cluster_votes(x, clusters[:-1], nouns, 4)
    with pytest.raises(ShapeError, match="from 0 to 3: from -1 to 2 are possible"):
        cluster_votes(x, clusters, nouns, 3)


VOTES = sparse.csr_array(np.array([[0.0, 3.0, 1.0], [0.0, 2.0, 1.8], [0.0, 0.0, 0.0], [0.2, 0.0, 0.2]]))
SIZES, WORDS = np.array([4, 4, 0, 2]), ("ant", "bee", "cow")


def test_names_scores_and_runners_up() -> None:
    assert name_clusters(VOTES, SIZES, WORDS) == [
        ClusterName("bee", 0.75, (("cow", 0.25),)),
        ClusterName("bee", 0.5, (("cow", 0.45),)),
        ClusterName(None, None, ()),
        ClusterName("ant", 0.1, (("cow", 0.1),)),
    ]


def distinct(votes: list[list[float]], words: str = "abc", **options: Any) -> list[ClusterName]:
    """Names of clusters of one member each, whose votes are given."""
    return name_distinctly(sparse.csr_array(np.array(votes)), np.ones(len(votes), int), list(words), **options)


def test_of_two_clusters_with_one_best_word_the_surer_keeps_it() -> None:
    first, second = distinct([[0.6, 0.1, 0.0], [0.3, 0.0, 0.29]])
    assert (first.name, first.score, first.is_changed) == ("a", 0.6, False)
    assert (second.name, second.score, second.is_changed) == ("c", 0.29, True)
    assert second.runners_up == (("a", 0.3),)
    # Of the words that no other cluster has, "b" stands (1 + λ) ln(.6/.1) − λ ln(.45/.05) behind.
    assert first.margin == pytest.approx(1.5 * math.log(6) - 0.5 * math.log(9))
    assert second.margin is None


def test_words_that_all_clusters_vote_for_count_less() -> None:
    """The sum of votes alone would name the first "a": its best word is everybody's."""
    votes = [[0.40, 0.38, 0.0], [0.40, 0.0, 0.39]]
    assert [name.name for name in distinct(votes, specificity=0)] in (["a", "c"], ["b", "a"])
    alone = [[0.40, 0.38, 0.0], [0.40, 0.0, 0.0]]
    assert [name.name for name in distinct(alone)] == ["b", "a"]


@pytest.mark.parametrize("row", range(4))
def test_one_cluster_by_votes_alone_has_the_name_of_before(row: int) -> None:
    one = VOTES[[row]]
    for specificity in (0.0, 0.5):
        found = name_distinctly(one, SIZES[[row]], WORDS, specificity=specificity)
        assert [(name.name, name.score) for name in found] == [
            (name.name, name.score) for name in name_clusters(one, SIZES[[row]], WORDS)
        ]


def test_without_a_word_left_a_cluster_has_no_name() -> None:
    names = distinct([[3.0], [2.0], [1.0]], "a")
    assert [name.name for name in names] == ["a", None, None]
    assert [name.is_changed for name in names] == [False, True, True]


def test_numbers_of_clusters_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    votes, sizes, order = rng.random((6, 20)) ** 4, np.full(6, 9), rng.permutation(6)
    words = [f"word {i}" for i in range(20)]
    names = name_distinctly(sparse.csr_array(votes), sizes, words)
    assert len({name.name for name in names}) == 6
    again = name_distinctly(sparse.csr_array(votes[order]), sizes, words)
    assert [name.name for name in again] == [names[k].name for k in order]


def planted_votes(images: int = 600, clusters: int = 6, words: int = 60) -> tuple[sparse.csr_array, np.ndarray]:
    """Each image gives .5 to its cluster's word and the rest to words at random."""
    rng = np.random.default_rng(0)
    owners = np.arange(images) % clusters
    votes = np.zeros((images, words))
    votes[np.arange(images), owners] += 0.5
    for _ in range(4):
        votes[np.arange(images), rng.integers(0, words, images)] += 0.1
    return sparse.csr_array(votes), owners


def summed(votes: sparse.csr_array, clusters: np.ndarray, count: int) -> sparse.csr_array:
    members = (np.ones(len(clusters)), (clusters, np.arange(len(clusters))))
    return sparse.csr_array(members, shape=(count, len(clusters))) @ votes


def test_clusters_of_shuffled_members_get_no_name() -> None:
    votes, owners = planted_votes()
    words, sizes = [f"word {i}" for i in range(60)], np.bincount(owners)
    real = name_distinctly(summed(votes, owners, 6), sizes, words, null=shuffled_null(votes, owners, 6))
    assert [name.name for name in real] == words[:6]
    rng, unnamed = np.random.default_rng(1), 0
    for _ in range(20):
        shuffled = rng.permutation(owners)
        null = shuffled_null(votes, shuffled, 6)
        names = name_distinctly(summed(votes, shuffled, 6), sizes, words, null=null)
        unnamed += all(name.name is None for name in names)
        assert all(name.runners_up for name in names)
    assert unnamed >= 19


def test_a_small_cluster_does_not_raise_the_bar_for_large_ones() -> None:
    votes, owners = planted_votes()
    owners = np.where(np.arange(600) < 3, 6, owners)
    null = shuffled_null(votes, owners, 7)
    assert null.score[6] > null.score[:6].max() + 0.5
    assert np.ptp(null.score[:6]) < 0.3


HYPERNYMS = {"swan": ["bird"], "owl": ["bird"], "parrot": ["bird"], "bird": ["animal"], "cat": ["animal"]}


def test_many_words_with_a_more_general_one_in_common_give_it() -> None:
    words = ["swan", "owl", "parrot", "cat", "stone"]
    votes = np.array([[0.25, 0.25, 0.2, 0.1, 0.0], [0.0, 0.0, 0.0, 0.5, 0.1], [0.0, 0.0, 0.0, 0.0, 0.7]])
    names = name_distinctly(sparse.csr_array(votes), np.ones(3, int), words, hypernyms=HYPERNYMS)
    assert [name.name for name in names] == ["bird", "cat", "stone"]
    assert names[0].score == pytest.approx(0.7)
    assert names[0].is_changed
    # A word that is sure enough by itself stands.
    votes[0, 0] = 0.31
    names = name_distinctly(sparse.csr_array(votes), np.ones(3, int), words, hypernyms=HYPERNYMS)
    assert names[0].name == "swan"


def test_two_clusters_of_one_more_general_word_are_told_apart() -> None:
    words = ["swan", "owl", "parrot", "cat", "stone", "tree"]
    votes = np.array([[0.28, 0.1, 0.25, 0.0, 0.0, 0.0], [0.15, 0.29, 0.2, 0.0, 0.0, 0.0], *0.8 * np.eye(6)[3:]])
    names = name_distinctly(sparse.csr_array(votes), np.ones(5, int), words, hypernyms=HYPERNYMS)
    assert [name.name for name in names] == ["bird (swan)", "bird (owl)", "cat", "stone", "tree"]
    # Where most clusters are birds, that tells none of them apart.
    names = name_distinctly(sparse.csr_array(votes[:2]), np.ones(2, int), words, hypernyms=HYPERNYMS)
    assert [name.name for name in names] == ["swan", "owl"]


def test_a_word_gives_way_to_a_less_general_one_with_most_of_the_votes_below_it() -> None:
    words = ["dog", "spaniel", "terrier", "springer", "stone"]
    above = {"spaniel": ["dog"], "terrier": ["dog"], "springer": ["spaniel"]}
    votes = np.array([[0.4, 0.1, 0.1, 0.15, 0.0], [0.0, 0.0, 0.0, 0.0, 0.7]])

    def named(row: list[float], other: list[float] | None = None) -> list[str | None]:
        votes = np.array([row, other or [0.0, 0.0, 0.0, 0.0, 0.7]])
        return [name.name for name in name_distinctly(sparse.csr_array(votes), np.ones(2, int), words, hypernyms=above)]

    assert named([0.4, 0.1, 0.1, 0.15, 0.0]) == ["springer", "stone"]
    assert named([0.4, 0.1, 0.2, 0.1, 0.0]) == ["dog", "stone"], "no one word has most of what is below"
    assert named([0.6, 0.05, 0.0, 0.05, 0.0]) == ["dog", "stone"], "what is below has too little"
    assert named([0.4, 0.1, 0.1, 0.15, 0.0], [0.0, 0.0, 0.0, 0.5, 0.1])[0] == "dog", "the word is another cluster's"
    assert name_distinctly(sparse.csr_array(votes), np.ones(2, int), words)[0].name == "dog"


@pytest.mark.parametrize(("has_hypernyms", "least"), [(True, 9), (False, 7)])
def test_real_clusters_get_their_classes_names_and_shuffled_ones_none(
    shared_data: Path, has_hypernyms: bool, least: int
) -> None:
    """The whole vocabulary stands to choose from: 1,860 words, which are more and less general ones of each other."""
    rows = [json.loads(line) for line in (shared_data / "vocab" / "synsets.jsonl").read_text().splitlines()]
    heads = {row["wnid"]: row["lemmas"][0].replace("_", " ") for row in rows}
    table = pq.read_table(shared_data / "vocab" / "synsets_a.parquet")
    words = vocabulary.from_rows(
        table["word"].to_pylist(),
        np.array(table["embedding"].to_pylist(), np.float32),
        "synsets",
        hypernyms=[[heads[parent] for parent in row["parents"]] for row in rows],
    )
    synonyms = {row["lemmas"][0].replace("_", " "): row["lemmas"] for row in rows}
    folder = shared_data / "imagenette_val3k"
    labels, x = np.load(folder / "labels.npy"), np.load(folder / "features_mnv2a_f16.npy").astype(np.float32)
    classes = (folder / "classes.txt").read_text().split("\n")
    found = rc.KMeans(10, metric="cosine", center=True, n_init=3, random_state=0).fit(x[::3]).labels_
    labels, x = labels[::3], x[::3]
    transform = FeatureTransform.fitted(x, center=True, standardize=False, normalize=True)
    assert words.embeddings is not None
    votes = cluster_votes(x, np.arange(len(x)), words.embeddings, len(x), transform=transform)

    def named(clusters: np.ndarray) -> list[str | None]:
        null, sizes = shuffled_null(votes, clusters, 10), np.bincount(clusters, minlength=10)
        names = name_distinctly(summed(votes, clusters, 10), sizes, words.words, null=null, hypernyms=above)
        return [name.name for name in names]

    above, right = words.hypernyms if has_hypernyms else None, 0
    for cluster, name in enumerate(named(found)):
        true = classes[np.bincount(labels[found == cluster]).argmax()]
        right += name is not None and any(vocabulary.same_name(lemma, true) for lemma in synonyms.get(name, [name]))
    assert right >= least
    random = np.random.default_rng(0)
    nothing = [name is None for _ in range(10) for name in named(random.permutation(found))]
    assert np.mean(nothing) >= 0.95


def test_votes_of_other_shape_are_refused() -> None:
    with pytest.raises(ShapeError):
        name_clusters(VOTES, SIZES[:3], WORDS)


def spelled(texts: list[str]) -> np.ndarray:
    """A row that depends on the phrase: its length and how many a's it has."""
    return np.array([[len(text), 1 + text.count("a")] for text in texts], np.float32)


def test_prompts_are_averaged() -> None:
    one = encode_words(spelled, ["cat", "cow"], ["a {}"])
    assert np.allclose(one, unit(np.array([[5, 3], [5, 2]])), atol=1e-6)
    two = encode_words(spelled, ["cat"], ["a {}", "{}"])
    assert np.allclose(two, unit(unit(np.array([[5.0, 3]])) + unit(np.array([[3.0, 2]]))), atol=1e-6)


def test_prompts_averaged_raw_point_elsewhere() -> None:
    # (3,0) and (0,1): raw mean (3,1)/√10, unit first (1,1)/√2.
    rows = {"a x": [3.0, 0.0], "b x": [0.0, 1.0]}

    def encode(texts: list[str]) -> np.ndarray:
        return np.array([rows[text] for text in texts], np.float32)

    raw = encode_words(encode, ["x"], ["a {}", "b {}"], normalize_each=False)
    each = encode_words(encode, ["x"], ["a {}", "b {}"])
    assert np.allclose(raw, np.array([[3, 1]]) / np.sqrt(10), atol=1e-6)
    assert np.allclose(each, np.array([[1, 1]]) / np.sqrt(2), atol=1e-6)


@pytest.mark.parametrize("templates", [(), ("a photo",), ("{} {}",)])
def test_templates_need_one_place(templates: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"must hold \{\} once"):
        encode_words(spelled, ["cat"], templates)


def test_words_with_braces_are_fine() -> None:
    assert encode_words(spelled, ["{x}"]).shape == (1, 2)


def test_photographs_get_their_names(shared_data: Path) -> None:
    table = pq.read_table(shared_data / "vocab" / "synsets_a.parquet")
    nouns = vocabulary.from_rows(table["word"].to_pylist(), np.stack(table["embedding"].to_numpy()), "synsets")
    folder = shared_data / "imagenette_val3k"
    features = np.load(folder / "features_mnv2a_f16.npy").astype(np.float32)
    labels = np.load(folder / "labels.npy").astype(np.int64)
    transform = FeatureTransform.fitted(features, center=True, standardize=False, normalize=True)
    assert nouns.embeddings is not None
    votes = cluster_votes(features, labels, nouns.embeddings, 10, transform=transform)
    names = [name.name for name in name_clusters(votes, np.bincount(labels), nouns.words)]
    # Names of the class or of a group that holds it; two classes are commonly seen as what they are part of.
    assert names == [
        "tench",
        "spaniel",
        "electronic equipment",
        "chain saw",
        "building",
        "French horn",
        "garbage truck",
        "gas pump",
        "golf ball",
        "parachute",
    ]


def filled(count: int, largest: bool, rows: np.ndarray, clusters: np.ndarray, scores: np.ndarray) -> TopRows:
    top = TopRows(count, largest=largest)
    top.update(rows, clusters, scores)
    return top


def test_typical_and_odd_rows_by_hand() -> None:
    rows, clusters = np.array([10, 11, 12, 13, 14, 15]), np.array([0, 0, 0, 2, -1, 2])
    scores = np.array([0.5, 0.9, 0.7, 0.1, 1.0, np.nan])
    best, worst = (filled(2, largest, rows, clusters, scores) for largest in (True, False))
    assert [best.of(k) for k in range(4)] == [[11, 12], [], [13], []]
    assert [worst.of(k) for k in range(3)] == [[10, 12], [], [13]]


def test_equal_scores_keep_the_smaller_rows() -> None:
    top = filled(2, True, np.array([9, 3, 7]), np.zeros(3, int), np.ones(3))
    assert top.of(0) == [3, 7]


@pytest.mark.parametrize("largest", [True, False])
def test_order_and_cut_of_blocks_do_not_matter(largest: bool) -> None:
    rng = np.random.default_rng(0)
    rows, clusters = np.arange(300), rng.integers(0, 7, 300)
    scores = rng.integers(0, 20, 300) / 20
    whole = filled(5, largest, rows, clusters, scores)
    order = rng.permutation(300)
    parts = TopRows(5, largest=largest)
    for part in np.array_split(order, 9):
        parts.update(rows[part], clusters[part], scores[part])
    for cluster in range(7):
        mine = np.flatnonzero(clusters == cluster)
        slow = sorted(mine, key=lambda row: (-scores[row] if largest else scores[row], row))[:5]
        assert whole.of(cluster) == parts.of(cluster) == slow


def test_nothing_is_kept_when_nothing_is_wanted() -> None:
    assert filled(0, True, np.arange(3), np.zeros(3, int), np.ones(3)).of(0) == []


def test_lengths_must_agree() -> None:
    with pytest.raises(ShapeError, match="lengths 2, 3, 3"):
        TopRows(2).update(np.arange(2), np.zeros(3, int), np.zeros(3))


def test_typicality_is_the_cosine_with_the_prototype() -> None:
    prototypes = np.array([[2.0, 0.0], [0.0, 0.0]])
    rows = np.array([[3.0, 3.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [5.0, 0.0]])
    cosine = typicality(rows, np.array([0, 0, 0, 1, -1]), prototypes)
    assert cosine[:4] == pytest.approx([np.sqrt(0.5), -1, 0, 0])
    assert np.isnan(cosine[4])


def test_typicality_checks_its_shapes() -> None:
    with pytest.raises(ShapeError):
        typicality(np.zeros((2, 3)), np.zeros(2, int), np.zeros((1, 4)))
    with pytest.raises(ShapeError):
        typicality(np.zeros((2, 3)), np.array([0, 1]), np.zeros((1, 3)))
