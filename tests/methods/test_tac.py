"""TAC's config, presets, training and both forms of its partition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rayclust import methods
from rayclust.clustering import kmeans
from rayclust.errors import DataError
from rayclust.language.nouns import center_count, choose_nouns, counterparts, score_nouns
from rayclust.methods.base import Batch, Method, Pairing, Prototypes
from rayclust.methods.settings import EMBEDDINGS, Plan
from rayclust.methods.tac import COUNTERPARTS, Tac, side_by_side
from rayclust.methods.tac_settings import PAPER, TacConfig
from rayclust.metrics.external import accuracy
from rayclust.search.knn import nearest_others
from rayclust.settings import Config, KMeansOptions
from rayclust.training.loop import Trainer, fit_arrays
from rayclust.training.sampling import ArrayRows, RowSource, WordedArrayRows
from tests.workers import on_workers

SETS = {
    "cifar10": (50_000, 10), "cifar20": (50_000, 20), "stl10": (5_000, 10), "imagenet10": (13_000, 10),
    "imagenet_dogs": (19_500, 15), "dtd": (3_760, 47), "ucf101": (9_537, 101), "imagenet": (1_281_167, 1000),
}  # fmt: skip
"""Images of training and classes of the data sets that the paper reports."""


@pytest.mark.parametrize("preset", SETS)
def test_presets_are_the_published_settings(preset: str):
    count, clusters = SETS[preset]
    c = TacConfig(clusters=clusters, preset=preset).resolved(count)
    is_large = preset in ("ucf101", "imagenet")
    assert c.centers == PAPER[preset]["centers"] == center_count(count, clusters)
    assert (c.epochs, c.batch_size, c.temperature) == ((100, 8192, 5.0) if is_large else (20, 512, 0.5))
    assert c.learning_rate * Plan.of(c, count).batch_size / 256 == pytest.approx(1e-3)
    assert (c.min_learning_rate, c.warmup_epochs, c.weight_decay) == (c.learning_rate, 0, 0)
    assert (c.neighbors, c.nouns_per_center, c.retrieval_temperature, c.balance_weight) == (50, 5, 0.005, 5.0)
    assert (c.center_restarts, c.restarts, c.verbatim, c.normalize_prompts, len(c.templates)) == (
        10,
        20,
        True,
        False,
        7,
    )
    assert c.resolved(count) == c


def test_auto_takes_the_settings_for_many_clusters_and_enough_steps():
    few, many = (TacConfig(clusters=k).resolved(2_000) for k in (10, 200))
    assert (few.temperature, many.temperature) == (0.5, 5.0)
    assert Plan.of(few, 2_000).steps == 100
    assert Plan.of(TacConfig(clusters=10, epochs=2).resolved(2_000), 2_000).steps == 6
    assert TacConfig(clusters=10, learning_rate=1e-4).resolved(600).min_learning_rate == 1e-4
    assert TacConfig(clusters=10).resolved(20).centers == 20


def test_a_head_that_is_not_trained_cannot_predict():
    with pytest.raises(ValueError, match="predict = text: train = false leaves no head"):
        TacConfig(clusters=3, train=False, predict="text")


def planted(rows: int = 400, clusters: int = 4, width: int = 16, noise: float = 0.6, words: int = 300, seed: int = 0):
    """Unit rows around prototypes, nouns around the same ones behind a gap between the modalities, and the labels.

    A part of the rows' noise is not in the nouns' subspace of prototypes: text takes it away.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    labels = torch.arange(rows) % clusters
    spread = noise / width**0.5

    def around(chosen: Tensor, level: float) -> Tensor:
        return functional.normalize(axes[chosen] + level * torch.randn(len(chosen), width, generator=generator), dim=1)

    x = around(labels, spread)
    nouns = around(torch.randint(width, (words,), generator=generator), 0.5 * spread)
    gap = functional.normalize(torch.randn(width, generator=generator), dim=0)
    return x, functional.normalize(nouns + 0.5 * gap, dim=1), labels


def worded(x: Tensor, words: Tensor, clusters: int, columns: int = 20) -> WordedArrayRows:
    """Nouns, counterparts and neighbours of rows in memory."""
    options = KMeansOptions(clusters=3 * clusters, restarts=3)
    chosen = choose_nouns(score_nouns(kmeans.fit(lambda: [x], options).centers, words))
    texts = counterparts(x, words[chosen])
    near = [nearest_others(z, columns) for z in (x, texts)]
    return WordedArrayRows(x, near[0], words[chosen], ArrayRows(texts, near[1]))


def fitted(config: TacConfig, rows: WordedArrayRows, seed: int = 0) -> Method:
    method = methods.build(config, rows.dimension, rows.count, seed)
    method.fit(rows, Trainer(seed))
    return method.eval()


FORMS = {
    "trained": {"steps": 80, "batch_size": 128, "neighbors": 20, "learning_rate": 0.02},
    "text head": {"steps": 80, "batch_size": 128, "neighbors": 20, "learning_rate": 0.02, "predict": "text"},
    "training-free": {"train": False, "restarts": 5},
}


@pytest.mark.parametrize("form", FORMS)
def test_planted_clusters_are_found_with_words(form: str):
    x, words, labels = planted()
    method = fitted(TacConfig(clusters=4, **FORMS[form]), worded(x, words, 4))
    probabilities = method.predict_proba(x)
    assert accuracy(labels, probabilities.argmax(1)) > 0.98
    # Each row is predicted alone, and after a round trip with the same bits.
    assert probabilities.sum(1).allclose(torch.ones(len(x)))
    assert torch.cat([method.predict_proba(row[None]) for row in x[:9]]).allclose(probabilities[:9], atol=1e-5)
    assert methods.load(method.state()).predict_proba(x).equal(probabilities)
    assert isinstance(method, Prototypes)
    assert method.prototypes().norm(dim=1).allclose(torch.ones(4))


def test_both_heads_reach_the_least_distillation_on_clear_clusters():
    x, words, _ = planted(noise=0.2)
    rows: list[dict[str, float]] = []
    data = worded(x, words, 4)
    method = methods.build(
        TacConfig(clusters=4, steps=200, batch_size=400, neighbors=10, learning_rate=0.01), 16, 400, 0
    )
    method.fit(data, Trainer(0, on_row=rows.append))
    floor = 2 * 0.5993  # ln(1 + 6 e^-2)
    assert floor - 0.01 < rows[-1]["distillation"] < floor + 0.1
    assert rows[-1]["balance"] == pytest.approx(2 * 1.3863, abs=0.01)
    assert rows[-1]["loss"] == pytest.approx(
        rows[-1]["distillation"] + rows[-1]["consistency"] - 5 * rows[-1]["balance"], abs=1e-4
    )


def test_with_images_for_texts_the_training_free_form_is_k_means_of_images():
    x, _, _ = planted(noise=1.2)
    joint = side_by_side(x, x, 1.0)
    torch.testing.assert_close(joint @ joint.T, x @ x.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(side_by_side(7 * x, 3 * x, 1.0), joint)
    torch.testing.assert_close(side_by_side(x.half(), x, 1.0), joint, rtol=0, atol=1e-3)


def test_rows_without_words_are_refused_in_one_line():
    x, _, _ = planted()
    with pytest.raises(DataError, match="needs words; name a list of nouns"):
        fit_arrays(x, None, TacConfig(clusters=4))


def test_each_space_draws_its_own_neighbours():
    x = torch.arange(8.0)[:, None]
    ring = (torch.arange(8)[:, None] + torch.tensor([[1, 2]])) % 8
    spaces = {EMBEDDINGS: ArrayRows(x, ring), COUNTERPARTS: ArrayRows(10 * x, (ring + 3) % 8)}
    config = TacConfig(clusters=2, preset="none", batch_size=8, epochs=6)

    def drawn(own: bool) -> tuple[Tensor, Tensor]:
        """How far from its row the neighbour in each space is, over six epochs."""
        source = RowSource(spaces, Pairing(2, own_neighbors=own), 0, torch.device("cpu"))
        batches = list(source.batches(Plan.of(config, 8), 0))
        views = [torch.stack([batch.views[name] for batch in batches]) for name in (EMBEDDINGS, COUNTERPARTS)]
        steps = [(view[:, 1] - view[:, 0])[..., 0] / scale for view, scale in zip(views, (1, 10), strict=True)]
        return steps[0].remainder(8), steps[1].remainder(8)

    images, texts = drawn(own=True)
    assert set(images.unique().tolist()) == {1, 2}
    assert set(texts.unique().tolist()) == {4, 5}
    assert not texts.equal(images + 3), "the two draws are the same"
    images, texts = drawn(own=False)
    assert texts.equal(images)


def _trained(rank: int, workers: int, *rows: Tensor) -> dict[str, Tensor]:
    """Heads after one step and after three, on the same rows, neighbours, nouns, counterparts and their neighbours."""
    x, near, nouns, texts, text_near = rows
    found = {}
    for steps in (1, 3):
        method = methods.build(TacConfig(clusters=4, steps=steps, batch_size=37, neighbors=5), 16, 100, 0).double()
        method.fit(WordedArrayRows(x, near, nouns, ArrayRows(texts, text_near)), Trainer(0))
        found |= {f"{name} after {steps}": value for name, value in method.state_dict().items()}
    return found


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_train_the_heads_of_one(workers: int):
    """Batches of 37 rows: parts are of unequal size; after three steps gradients and batch norm have had effect."""
    x, words, _ = planted(rows=100)
    rows = worded(x, words, 4)
    texts = rows.counterparts()
    given = (x.double(), rows.neighbors(), rows.nouns().double(), texts.tensor().double(), texts.neighbors())
    alone = _trained(0, 1, *given)
    for found in on_workers(workers, _trained, *given):
        for name, value in found.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-6, atol=1e-9, msg=name)


def test_the_batch_of_another_space_is_asked_for():
    config = TacConfig(clusters=4, preset="none")
    assert isinstance(config, Config)
    method = methods.build(config, 16, 50, 0)
    assert isinstance(method, Tac)
    x = torch.randn(2, 8, 16)
    terms = method.training_step(Batch({EMBEDDINGS: x, COUNTERPARTS: x.flip(0)}, torch.arange(8), 0, 0))
    assert set(terms) == {"loss", "distillation", "consistency", "balance"}
    assert bool(terms["loss"].isfinite())


@pytest.mark.parametrize("train", [False, True])
def test_ten_prototypes_behind_a_gap_between_images_and_words_are_told_apart(train: bool):
    """From nouns of which most name nothing in the images to clusters of images that were not fitted."""
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor, noise: float) -> Tensor:
        return functional.normalize(x + noise / 6 * torch.randn(x.shape, generator=generator), dim=1)

    prototypes = functional.normalize(torch.randn(10, 36, generator=generator), dim=1)
    labels = torch.randint(10, (1200,), generator=generator)
    x = noisy(prototypes[labels], 0.8)
    named = prototypes[torch.randint(10, (300,), generator=generator)]
    words = torch.cat([named, functional.normalize(torch.randn(700, 36, generator=generator), dim=1)])
    words = noisy(words, 0.4) + 0.7 * functional.normalize(torch.randn(36, generator=generator), dim=0)
    words = functional.normalize(words, dim=1)
    config = TacConfig(clusters=10, train=train, restarts=5, steps=80, learning_rate=0.01, neighbors=20)
    method = fitted(config, worded(x[:1000], words, 10))
    assert accuracy(labels[1000:], method.predict_proba(x[1000:]).argmax(1)) == 1.0
