"""Methods on arrays in memory with scikit-learn's contract: `fit`, `predict`, `labels_`; no Ray, no files."""
# ruff: noqa: N803 - scikit-learn's contract calls the rows X

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import _check_sample_weight
from torch import Tensor
from torch.nn import functional

from rayclust.arrays import require_matrix
from rayclust.clustering import kmeans
from rayclust.clustering.row_stats import even_sample
from rayclust.errors import ConfigError, ShapeError
from rayclust.estimators.base import SCORED_NEIGHBORS, PairEstimator, ProbabilisticEstimator, Transformer, as_array
from rayclust.features import FeatureTransform, SpaceTransforms
from rayclust.language.nouns import choose_nouns, counterparts, score_nouns
from rayclust.methods import build
from rayclust.methods.base import as_member
from rayclust.methods.cpp_settings import CppConfig
from rayclust.methods.settings import AutoConfig, ConsensusConfig
from rayclust.methods.tac_settings import TacConfig
from rayclust.methods.temi_settings import TemiConfig
from rayclust.methods.turtle_settings import TurtleConfig
from rayclust.metrics import internal, selection
from rayclust.metrics.nulls import null_silhouettes
from rayclust.metrics.selection import geometric_grid
from rayclust.search.knn import nearest_others
from rayclust.settings import KMeansOptions
from rayclust.training.loop import Trainer
from rayclust.training.sampling import ArrayRows, WordedArrayRows

__all__ = ["CPP", "TAC", "TEMI", "TURTLE", "Auto", "Consensus", "KMeans"]


_WEIGHTS: dict[str, Any] = {"dtype": np.float64, "ensure_non_negative": True}
"""What the weights of rows must be, for scikit-learn's check."""


class KMeans(
    Transformer,
    config=KMeansOptions,
    fields={"metric": "metric", "n_init": "restarts", "max_iter": "max_iterations", "tol": "tolerance"},
    defaults={"metric": "euclidean", "normalize": False},
):
    """k-means of the rows as they are (default) or of their directions, from greedy k-means++ seeds.

    Args:
        n_clusters: K.
        metric: `euclidean`: centres are means of the rows. `cosine`: rows and centres are unit vectors, whatever
            `normalize` says.
        n_init: starts from different seeds, advanced together; the least inertia is kept.
        max_iter: most passes of one start.
        tol: shift of the centres at which a start stops, relative to the features' mean variance.

    Attributes:
        cluster_centers_: Float32[K D], in feature space; Float64 of rows whose values are far from 1.
        labels_: Int64[N].
        inertia_: sum of squared distances to the nearest centre, weighted; for cosine 2·(1 − cosine) of each row.
        n_iter_: passes of the best start.
        n_features_in_: D.
    """

    def fit(self, X: ArrayLike, y: Any = None, sample_weight: ArrayLike | None = None) -> Self:
        """Find the centres of rows X, Float[N D]; `y` is not used.

        A row counts as often as its weight, Float[N], says; those of weight 0 get a label and change nothing.
        """
        config = self._config()
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X, **_WEIGHTS)
        if weights is not None and self.n_clusters > (count := np.count_nonzero(weights)):
            at_hand = f"the number of rows with a weight above 0, {count}"
            raise ConfigError(f"n_clusters = {self.n_clusters}: at most {at_hand}")
        is_cosine = self.metric == "cosine"
        x = self._fit_features(X, {}, normalize=self.normalize or is_cosine, weights=weights).to(self._device())
        rows, counts = x, None
        if weights is not None:
            counts = torch.from_numpy(weights).to(x.device)
            rows, counts = x[counts > 0], counts[counts > 0]
        with self._progress():
            result = kmeans.fit(lambda: [rows], config, seed=self._seed(), weights=counts)
        # Features of rows that were scaled are themselves scaled, unless that cancels in them.
        self._feature_scale = 1.0 if self.features_.normalize or self.standardize else self._scale
        centers = result.centers.cpu().numpy()
        self.cluster_centers_ = centers if self._feature_scale == 1 else centers / np.float64(self._feature_scale)
        self._n_features_out = len(centers)
        self.labels_ = kmeans.assign(x, result.centers)[0].cpu().numpy()
        self.inertia_, self.n_iter_ = result.inertia / self._feature_scale / self._feature_scale, result.n_iter
        return self

    def _scaled_centers(self) -> Tensor:
        return torch.from_numpy((self.cluster_centers_ * self._feature_scale).astype(np.float32))

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """Return the nearest centre of each row: Int64[N]."""
        return np.asarray(kmeans.assign(self._features(X), self._scaled_centers())[0])

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return distances of features to centres: Float64[N K]."""
        # In float64 a row's distances do not depend on the other rows of the call.
        x = self._features(X).double()
        return np.asarray(kmeans.squared_distances(x, self._scaled_centers().double()).sqrt() / self._feature_scale)

    def score(self, X: ArrayLike, y: Any = None, sample_weight: ArrayLike | None = None) -> float:
        """Return minus the inertia of rows X, weighted; larger is better. `y` is not used."""
        squares = np.asarray(kmeans.assign(self._features(X), self._scaled_centers())[1].double())
        if sample_weight is not None:
            squares = squares * _check_sample_weight(sample_weight, X, **_WEIGHTS)
        return -float(squares.sum()) / self._feature_scale / self._feature_scale


class Auto(
    PairEstimator,
    config=AutoConfig,
    fields={"n_init": "restarts", "n_neighbors": "neighbors"},
    defaults={"center": True},
):
    """The default: k-means, replaced by a consensus of partitions and by trainings where unlabelled evidence allows it.

    Args:
        n_clusters: K, or `auto`: the middle of what several criteria choose among k-means partitions.
        n_init: starts of k-means in each of three views of the rows.
        n_neighbors: nearest neighbours that are averaged, and that count as evidence.

    Attributes:
        labels_: Int64[N].
        n_clusters_: K.
        choice_: with `auto`, the `rayclust.metrics.selection.Choice` with its reason; else None.
        candidates_: for each candidate its name, its evidence, and whether it was chosen.
        method_: the fitted `rayclust.methods.auto.Auto`; None for a single cluster, which needs none.
        n_features_in_: D.
    """

    _columns = SCORED_NEIGHBORS

    def fit(self, X: ArrayLike, y: Any = None, **unsupported: Any) -> Self:
        """Cluster rows X, Float[N D]; `y` is not used, and a `sample_weight` is refused."""
        self.choice_: selection.Choice | None = None
        self.candidates_: list[dict[str, Any]] = []
        super().fit(X, y, **unsupported)
        if self.method_ is not None:
            self.candidates_ = self.method_.report
        return self

    def _choose(self, x: Tensor, neighbors: Tensor) -> int:
        unit = functional.normalize(x, dim=1).numpy()
        device, table = self._device(), dict[int, dict[str, float]]()
        for k in geometric_grid(2, min(math.ceil(2 * math.sqrt(len(x))), len(x))):
            options = KMeansOptions(clusters=k, restarts=3, metric="euclidean")
            labels = []
            for seed in range(2):
                result = kmeans.fit(lambda: [x.to(device)], options, seed=self._seed() + seed)
                labels.append(kmeans.assign(x, result.centers.cpu())[0].numpy())
            table[k] = internal.measure(unit, labels, neighbors.numpy()) | null_silhouettes(unit, k, seed=self._seed())
        choice = self.choice_ = selection.choose(table)
        return choice.k


class Consensus(
    PairEstimator,
    config=ConsensusConfig,
    fields={"n_init": "restarts", "n_neighbors": "neighbors"},
    defaults={"center": True},
):
    """One partition out of many: a vote, and a linear classifier fitted to the rows on which they agree.

    Args:
        n_clusters: K.
        n_init: members that k-means makes where `fit` is given none.
        n_neighbors: nearest neighbours that count as evidence for a member.

    Attributes:
        labels_: Int64[N].
        members_: for each member, the vote and the classifier its name, the evidence, and what the gate said.
        method_: the fitted `rayclust.methods.consensus.Consensus`; None for a single cluster, which needs none.
        n_features_in_: D.
    """

    def fit(
        self, X: ArrayLike, y: Any = None, *, members: Sequence[ArrayLike] | None = None, **unsupported: Any
    ) -> Self:
        """Cluster rows X, Float[N D]; `y` is not used, and a `sample_weight` is refused.

        `members` are partitions of the rows: labels [N] of any kind, −1, None or NaN for no opinion, or probabilities
        Float[N K].
        """
        self._members = None if members is None else [as_member(np.asarray(as_array(member))) for member in members]
        try:
            super().fit(X, y, **unsupported)
        finally:
            self._members = None
        self.members_: list[dict[str, Any]] = [] if self.method_ is None else self.method_.report
        return self


class TEMI(
    PairEstimator,
    config=TemiConfig,
    fields={"preset": "preset", "n_heads": "heads", "n_neighbors": "neighbors", "beta": "beta", "max_steps": "steps"}
    | {"batch_size": "batch_size", "learning_rate": "learning_rate"},
):
    """TEMI (arXiv 2303.17896): heads trained to agree with their moving averages on pairs of neighbours.

    None leaves a setting to the preset. Clusters that no row of the fit belongs to are numbered last.

    Args:
        n_clusters: K.
        preset: `auto` chooses from N, D and K; `readme` and `paper` are the published settings.
        n_heads: H; one is kept, of the highest modularity (`auto`) or, in the other presets, the lowest training loss.
        n_neighbors: neighbours of a row among which its partner is drawn; at most N − 1 are used.
        beta: β, balance of the clusters.
        max_steps: optimiser steps.
        batch_size: rows per step.
        learning_rate: per 256 rows of batch.
        settings: more keys of `rayclust.methods.temi.TemiConfig` and their values.

    Attributes:
        labels_: Int64[N].
        method_: the fitted `rayclust.methods.temi.Temi`; None for a single cluster, which needs none.
        n_steps_: optimiser steps taken.
        n_features_in_: D.
    """


class TAC(
    PairEstimator,
    config=TacConfig,
    fields={"preset": "preset", "train": "train", "predict_by": "predict", "n_centers": "centers"}
    | {"n_neighbors": "neighbors", "max_steps": "steps", "batch_size": "batch_size", "learning_rate": "learning_rate"},
    defaults={"words": None},
):
    """TAC (arXiv 2310.11989): clusters guided by the nouns of a vocabulary that are near to the images.

    None leaves a setting to the preset. Clusters that no row of the fit belongs to are numbered last.

    Args:
        n_clusters: K.
        words: Float[V D], embeddings of nouns where the rows lie once they are centred, as `center` says; needed.
        preset: `auto` chooses by N and K; the others are the published settings for that data set.
        train: False clusters images and counterparts in text by k-means, without training.
        predict_by: the head, `image` or `text`, that predicts.
        n_centers: semantic centres by which nouns are chosen.
        n_neighbors: neighbours of a row, in image and in text space, among which its partners are drawn.
        max_steps: optimiser steps.
        batch_size: rows per step.
        learning_rate: per 256 rows of batch.
        settings: more keys of `rayclust.methods.tac.TacConfig` and their values.

    Attributes:
        labels_: Int64[N].
        nouns_: Int64[M], places in `words` of the chosen nouns, by semantic centre.
        method_: the fitted `rayclust.methods.tac.Tac`; None for a single cluster, which needs none.
        n_steps_: optimiser steps taken.
        n_features_in_: D.
    """

    def _train(self, x: Tensor, neighbors: Tensor | None, config: Any) -> None:
        """Choose nouns, find the rows' counterparts and their neighbours, and fit `method_`."""
        if self.words is None:
            raise ConfigError("words = None: TAC needs embeddings of nouns, Float[V D]")
        device, seed, resolved = self._device(), self._seed(), config.resolved(len(x))
        words = torch.as_tensor(np.asarray(as_array(self.words)), dtype=x.dtype)
        require_matrix(words, "words", x.shape[1])
        unit = functional.normalize(x, dim=1).to(device)
        options = KMeansOptions(clusters=resolved.centers, restarts=resolved.center_restarts)
        places = even_sample(len(x), resolved.center_rows * resolved.centers, seed)
        with self._progress():
            centers = kmeans.fit(lambda: [unit[places.to(device)]], options, seed=seed).centers
            self.nouns_ = choose_nouns(score_nouns(centers.cpu(), words), resolved.nouns_per_center).numpy()
            nouns = functional.normalize(words[self.nouns_], dim=1)
            texts = counterparts(unit, nouns.to(device), resolved.retrieval_temperature, resolved.retrieval_nouns)
            near = nearest_others(texts, min(resolved.neighbors, len(x) - 1)).cpu() if resolved.train else None
            rows = WordedArrayRows(x, neighbors, nouns, ArrayRows(texts.cpu(), near))
            method = build(config, x.shape[1], len(x), seed)
            method.fit(rows, Trainer(seed, device))
        self.method_ = method.eval().cpu().double()
        self.n_steps_ = method.plan.steps if hasattr(method, "plan") else 0


class TURTLE(
    ProbabilisticEstimator,
    config=TurtleConfig,
    fields={"preset": "preset", "n_init": "seeds", "gamma": "gamma", "max_steps": "steps", "batch_size": "batch_size"},
):
    """TURTLE (arXiv 2406.07236): the labels that linear classifiers learn best, in one or several feature spaces.

    Wherever rows X are wanted, a list of arrays is the same rows in several spaces, each of which is centred, z-scored
    and scaled to length 1 by itself. None leaves a setting to the preset. Clusters that no row of the fit belongs to
    are numbered last.

    Args:
        n_clusters: K.
        preset: `auto` chooses from N, D and K and takes seconds; `published` has the published settings, which are
            meant for rows as the encoder gives them: set `normalize` to False.
        n_init: starts; the one whose labels linear classifiers predict best on held-out rows is kept.
        gamma: γ, on the entropy of the clusters' shares.
        max_steps: outer steps.
        batch_size: rows per outer step.
        settings: more keys of `rayclust.methods.turtle.TurtleConfig` and their values.

    Attributes:
        labels_: Int64[N].
        candidates_: for each start or setting its score and sizes, and whether it was chosen.
        method_: the fitted `rayclust.methods.turtle.Turtle`; None for a single cluster, which needs none.
        n_steps_: outer steps taken.
        n_features_in_: D, of all spaces together.
    """

    def fit(self, X: ArrayLike, y: Any = None, **unsupported: Any) -> Self:
        """Find labels of rows X, Float[N D] or a list of them; `y` is not used, and a `sample_weight` is refused."""
        together, widths = _side_by_side(X)
        rows = self._fit_rows(together, unsupported)
        widths = widths or (rows.shape[1],)
        bounds = np.cumsum(widths)[:-1]
        options = {"center": self.center, "standardize": self.standardize, "normalize": self.normalize}
        parts = enumerate(np.split(rows, bounds, axis=1))
        self.spaces_ = SpaceTransforms({str(n): FeatureTransform.fitted(part, **options) for n, part in parts}, widths)
        x = self._joined(rows)
        self.method_, self.n_steps_, self.n_clusters_, self.candidates_ = None, 0, 1, []
        if self.n_clusters != 1:
            config = self._config()
            self.n_clusters_ = config.clusters
            self._train(self._method_inputs(x), None, config)
            self.candidates_ = self.method_.report
        self._number_clusters(x)
        return self

    def _features(self, X: ArrayLike) -> Tensor:
        return self._joined(self._rows(_side_by_side(X)[0]))

    def _joined(self, rows: NDArray[Any]) -> Tensor:
        """Return each space's features side by side."""
        return torch.from_numpy(np.concatenate(list(self.spaces_.split(rows).values()), axis=1))

    def _method_inputs(self, x: Tensor) -> Any:
        """Return the features of each space by its name."""
        return dict(zip(self.spaces_.transforms, torch.split(x, list(self.spaces_.widths), dim=1), strict=True))


def _side_by_side(X: Any) -> tuple[Any, tuple[int, ...]]:
    """Return the rows as one array, for scikit-learn's checks, and the width of each space; () for a single one."""
    if not (isinstance(X, list | tuple) and len(X) > 0 and all(np.ndim(space) == 2 for space in X)):
        return X, ()
    if len(X) == 1:
        return X[0], ()
    spaces = [np.asarray(as_array(space)) for space in X]
    counts = {len(space) for space in spaces}
    if len(counts) > 1:
        raise ShapeError(f"X has spaces of {sorted(counts)} rows: all must have the same rows, in the same order")
    return np.concatenate(spaces, axis=1), tuple(space.shape[1] for space in spaces)


class CPP(
    Transformer,
    config=CppConfig,
    fields={"preset": "preset", "variant": "variant", "temperature": "temperature", "max_steps": "steps"}
    | {"batch_size": "batch_size", "learning_rate": "learning_rate"},
):
    """CPP (arXiv 2306.05272): features by rate reduction, then spectral clusters; K plays no part in training.

    None leaves a setting to the preset.

    Args:
        n_clusters: K.
        preset: `auto` counts steps and stops on the loss; the others are the paper's settings for that data set.
        variant: whether the membership comes from z (`single_head`) or from a head of its own (`two_head`).
        temperature: η of the membership.
        max_steps: optimiser steps.
        batch_size: rows per step.
        learning_rate: per 256 rows of batch.
        settings: more keys of `rayclust.methods.cpp.CppConfig` and their values.

    Attributes:
        labels_: Int64[N].
        method_: the fitted `rayclust.methods.cpp.Cpp`; None for a single row.
        n_steps_: optimiser steps planned.
        n_features_in_: D.
    """

    def fit(self, X: ArrayLike, y: Any = None, **unsupported: Any) -> Self:
        """Train on rows X, Float[N D], and cut them into clusters; `y` is not used, a `sample_weight` is refused."""
        x = self._fit_features(X, unsupported, normalize=self.normalize)
        self.method_, self.n_steps_ = None, 0
        # For a single cluster features are learned all the same; their partition, which needs two, is not used.
        config = self._config(**({"clusters": 2} if self.n_clusters == 1 else {}))
        if len(x) > 1:
            self._train(x, None, config)
        self._n_features_out = int(self.method_.width) if self.method_ is not None else 0
        self.labels_ = self.predict(X)
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """Return the cluster of each row: Int64[N]."""
        x = self._features(X)
        if self.method_ is None or self.n_clusters == 1:
            return np.zeros(len(x), dtype=np.int64)
        return np.asarray(self.method_.predict_proba(x.double()).argmax(dim=1).cpu())

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the learned features z, unit rows: Float64[N d].

        Raises:
            ConfigError: a single row was fitted, from which nothing is learned.
        """
        x = self._features(X)
        if self.method_ is None:
            raise ConfigError("n_samples = 1: at least 2 are needed to learn features")
        return np.asarray(self.method_.transform(x.double()).cpu())
