from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from rayclust.errors import ConfigError, ShapeError
from rayclust.features import FeatureTransform
from rayclust.language import vocabulary
from rayclust.language.naming import ClusterName, TopRows, cluster_votes, encode_words, name_clusters, typicality
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


def test_unique_names_have_the_largest_sum() -> None:
    names = name_clusters(VOTES, SIZES, WORDS, unique=True, runners_up=1)
    # bee+cow+ant = 0.75+0.45+0.1 beats cow+bee+ant = 0.25+0.5+0.1.
    assert [name.name for name in names] == ["bee", "cow", None, "ant"]
    assert names[1] == ClusterName("cow", 0.45, (("bee", 0.5),))


def test_unique_names_when_words_run_out() -> None:
    votes = sparse.csr_array(np.array([[3.0], [2.0], [1.0]]))
    names = name_clusters(votes, np.array([4, 4, 4]), ["ant"], unique=True)
    assert [name.name for name in names] == ["ant", "ant (2)", "ant (3)"]
    assert [name.score for name in names] == [0.75, 0.5, 0.25]


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
