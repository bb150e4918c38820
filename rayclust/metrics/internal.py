"""Quality of a partition by itself, without true classes.

`labels` are Int[N], their names play no part; `neighbors` are Int[N M], each row's nearest others, −1 where there are
fewer. Arrays that disagree are ShapeErrors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.special import xlogy
from sklearn import metrics

from rayclust.arrays import FloatArray, IntArray, require_matrix, unit_rows
from rayclust.errors import ConfigError, DataError, ShapeError
from rayclust.metrics.external import ari, contingency

NEAREST = 10
"""Nearest neighbours that the map equation and a second modularity look at in a choice of K: with more than a cluster
has rows, neighbours are of other clusters and few clusters look best."""
DISTORTION = 0.1
"""ε² of the published program, for unit rows."""
_ROWS_AT_ONCE = 8192


def measure(
    x: FloatArray,
    partitions: Sequence[IntArray],
    neighbors: IntArray | None,
    *,
    distortion: float = DISTORTION,
    silhouette_rows: int = 10_000,
    seed: int = 0,
) -> dict[str, float]:
    """Compute all criteria of one candidate number of clusters.

    Args:
        x: Float[N D], unit rows: z for a method with a space of its own, else the features.
        partitions: label sets Int[N] of several seeds; the first is the one that would be kept, and all criteria but
            the stability are its own.
        neighbors: None leaves out what needs them.
        distortion: ε² of the coding length, in squared row lengths.
        silhouette_rows: rows of the seeded sample on which the silhouette is taken.
        seed: of that sample.

    Returns:
        `coding_length` in nats per row; `silhouette`; `calinski_harabasz` (1974) and `davies_bouldin` (1979),
        Euclidean, as in scikit-learn; `neighbor_agreement` and `modularity` where there are neighbours, with
        `map_equation` of the nearest 10 and, where there are more, `near_modularity`, the modularity of these;
        `merged`, the clusters left by `merged_clusters`, where there are neighbours; `stability` and
        `prediction_strength` where there are two label sets; `occupied`, `smallest`, `median`, `largest`, `entropy`
        of the sizes. What is not defined for one cluster is left out.

    Raises:
        DataError: there are no partitions.
    """
    if not partitions:
        raise DataError("partitions = 0: criteria need at least one label set")
    labels = np.unique(partitions[0], return_inverse=True)[1]
    criteria = {"coding_length": coding_length(x, labels, distortion) / max(len(labels), 1)}
    clusters = int(labels.max(initial=-1)) + 1
    if 2 <= clusters < len(labels):
        wide = x.astype(np.float64)
        try:
            criteria["silhouette"] = silhouette(x, labels, rows=silhouette_rows, seed=seed)
        except DataError:  # the sample lies in one cluster
            criteria["silhouette"] = 0.0
        criteria["calinski_harabasz"] = float(metrics.calinski_harabasz_score(wide, labels))
        criteria["davies_bouldin"] = float(metrics.davies_bouldin_score(wide, labels))
    if neighbors is not None:
        criteria |= graph_criteria(labels, neighbors)
    if len(partitions) > 1:
        criteria["stability"] = stability(partitions)
        criteria["prediction_strength"] = prediction_strength(partitions)
    return criteria | size_summary(labels, clusters)


def graph_criteria(labels: IntArray, neighbors: IntArray) -> dict[str, float]:
    """Compute those of `measure` that need a partition, Int[N], and neighbours, Int[N M], alone."""
    criteria = {
        "neighbor_agreement": neighbor_agreement(labels, neighbors),
        "modularity": modularity(labels, neighbors),
    }
    if neighbors.shape[1] > NEAREST:
        criteria["near_modularity"] = modularity(labels, neighbors[:, :NEAREST])
    return criteria | {
        "map_equation": map_equation(labels, neighbors[:, :NEAREST]),
        "merged": merged_clusters(labels, neighbors),
    }


def silhouette(x: FloatArray, labels: IntArray, *, rows: int | None = None, seed: int = 0) -> float:
    """Return the mean of (b − a) / max(a, b), a the mean distance within and b that to the nearest other cluster.

    The distance is 1 − cosine. From −1 to 1, larger is better; about 0 for clusters that overlap or labels at random.
    Rows alone in their cluster count 0. Costs N·K·D.

    Args:
        x: Float[N D], which need not be unit rows.
        labels: Int[N].
        rows: size of a seeded sample on which it is computed; None uses all rows.
        seed: of the sample.

    Raises:
        DataError: the rows lie in fewer than two clusters.

    Source: Rousseeuw 1987.
    """
    require_matrix(x, "x")
    labels = _one_per_row(labels, len(x))
    if rows is not None and rows < len(x):
        chosen = np.sort(np.random.default_rng(seed).choice(len(x), rows, replace=False))
        x, labels = x[chosen], labels[chosen]
    clusters, codes = np.unique(labels, return_inverse=True)
    if len(clusters) < 2:
        raise DataError(f"silhouette: {len(clusters)} cluster among {len(x)} rows: at least 2 are needed")
    each, sizes = np.arange(len(x)), np.bincount(codes)
    wide = unit_rows(x.astype(np.float64))
    # Sums of 1 − cosine to each cluster's rows: the mean of cosines is the cosine with the mean, without an N×N matrix.
    totals = np.zeros((len(sizes), x.shape[1]))
    np.add.at(totals, codes, wide)
    sums = np.asarray(sizes - wide @ totals.T, dtype=np.float64)
    sums[each, codes] -= 1.0 - np.square(wide).sum(axis=1)  # 0 from a row to itself
    sums = np.maximum(sums, 0.0)
    # a and b of each row.
    own = sizes[codes]
    inside = sums[each, codes] / np.maximum(own - 1, 1)
    means = sums / sizes
    means[each, codes] = np.inf
    outside = means.min(axis=1)
    larger = np.maximum(inside, outside)
    widths = np.divide(outside - inside, larger, out=np.zeros_like(larger), where=larger > 0)
    return float(np.where(own > 1, widths, 0.0).mean())


def coclustering_silhouettes(partitions: IntArray, labels: IntArray) -> FloatArray:
    """Return each cluster's mean silhouette where two rows are as far apart as partitions seldom join them.

    Args:
        partitions: Int[R N], of subsamples; −1 where a row was not drawn.
        labels: Int[N], in [0, K).

    Returns:
        Float64[K], from −1 to 1, larger is better. The distance is 1 − the share of the partitions with both rows that
        join them, and 1 where none has both.

    Source: Patterson-Cross, Levine and Menon, chooseR, BMC Bioinformatics 22:39, 2021.
    """
    labels, count = _one_per_row(labels, partitions.shape[1]), partitions.shape[1]
    together, drawn = np.zeros((count, count)), np.zeros((count, count))
    for one in partitions:
        known = one >= 0
        drawn += np.outer(known, known)
        together += (one[:, None] == one) & known
    distances = 1.0 - together / np.maximum(drawn, 1)
    np.fill_diagonal(distances, 0.0)
    each = metrics.silhouette_samples(distances, labels, metric="precomputed")
    sums, sizes = np.bincount(labels, weights=each), np.bincount(labels)
    return np.asarray(sums[sizes > 0] / sizes[sizes > 0])


def umap_silhouette(
    x: FloatArray, labels: IntArray, *, rows: int = 2_000, dimensions: int = 10, seed: int = 0
) -> float:
    """Return the silhouette, Euclidean, of a UMAP of a seeded sample of the rows.

    Args:
        x: Float[N D].
        labels: Int[N].
        rows: of the sample.
        dimensions: of the UMAP.
        seed: of sample and UMAP.

    Raises:
        ConfigError: umap-learn is not installed.
        DataError: the sample lies in fewer than two clusters.

    Source: arXiv 2406.02465, which finds it to go with accuracy over encoders; arXiv 1802.03426 for UMAP.
    """
    try:
        import umap  # an extra: it brings a compiler
    except ImportError:
        raise ConfigError("select_k.umap = true: umap-learn is not installed; pip install 'rayclust[umap]'") from None
    chosen = np.sort(np.random.default_rng(seed).choice(len(x), min(rows, len(x)), replace=False))
    labels = _one_per_row(labels, len(x))[chosen]
    if len(np.unique(labels)) < 2:
        raise DataError(f"umap silhouette: 1 cluster among {len(chosen)} rows: at least 2 are needed")
    model = umap.UMAP(n_components=min(dimensions, len(chosen) - 2), metric="cosine", random_state=seed, n_jobs=1)
    return float(metrics.silhouette_score(model.fit_transform(x[chosen]), labels))


def size_summary(labels: IntArray, clusters: int) -> dict[str, float]:
    """Summarise the sizes of K clusters, labelled from 0 to K − 1.

    Returns:
        `occupied`: clusters with a row; `smallest`, `median`, `largest`: rows, empty clusters included; `entropy`: that
        of the shares divided by ln K, 1 when all are equal and 0 when one holds everything (0 for K = 1).
    """
    sizes = np.bincount(labels, minlength=clusters)
    shares = sizes[sizes > 0] / max(sizes.sum(), 1)
    entropy = float(-(shares * np.log(shares)).sum()) / np.log(clusters) if clusters > 1 else 0.0
    return {
        "occupied": int((sizes > 0).sum()),
        "smallest": int(sizes.min()),
        "median": float(np.median(sizes)),
        "largest": int(sizes.max()),
        "entropy": entropy,
    }


def coding_length(z: FloatArray, labels: IntArray, distortion: float = DISTORTION) -> float:
    """Return the nats that code the rows when each cluster has its own code: Σ_k ℓ(Z_k) − N_k ln(N_k / N).

    A cluster of m rows costs ℓ(X) = (m + d)/2 · ln det(I + d/(ε² m) XᵀX). Smaller is better. Labels' names play no
    part. Holds one d×d or m×m matrix at a time, whichever is smaller; log-determinants are taken in float64.

    Args:
        z: Float[N d], unit rows for the usual distortion.
        labels: Int[N].
        distortion: ε², squared error allowed per row, in squared row lengths; above 0.

    Raises:
        ConfigError: `distortion` is not above 0.

    Source: arXiv 2306.05272, Algorithm 1; Ma, Derksen, Hong & Wright 2007, eq. 11.
    """
    require_matrix(z, "z")
    labels = _one_per_row(labels, len(z))
    if not distortion > 0:
        raise ConfigError(f"distortion = {distortion}: must be above 0")
    if len(labels) == 0:
        return 0.0
    order, d = np.argsort(labels, kind="stable"), z.shape[1]
    starts = np.unique(labels[order], return_index=True)[1]
    total, sizes = 0.0, np.diff([*starts, len(labels)]).astype(np.float64)
    for rows in np.split(order, starts[1:]):
        m = len(rows)
        if m >= d:
            gram = np.zeros((d, d))
            for low in range(0, m, _ROWS_AT_ONCE):
                part = z[rows[low : low + _ROWS_AT_ONCE]].astype(np.float64)
                gram += part.T @ part
        else:  # XXᵀ has the same determinant (Sylvester)
            own = z[rows].astype(np.float64)
            gram = own @ own.T
        # At least the identity, so that Cholesky needs no jitter.
        factor = np.linalg.cholesky(np.eye(len(gram)) + d / (distortion * m) * gram)
        total += float((m + d) * np.log(factor.diagonal()).sum())
    return total + float(-(sizes * np.log(sizes / sizes.sum())).sum()) + 0.0


def neighbor_agreement(labels: IntArray, neighbors: IntArray) -> float:
    """Return the share of the pairs of a row and one of its nearest neighbours that lie in one cluster.

    From 0 to 1, larger is better, but 1 for a single cluster and less with more clusters; see `modularity`.
    """
    require_matrix(neighbors, "neighbors")
    labels = _one_per_row(labels, len(neighbors))
    kept = pairs = 0
    for start in range(0, len(labels), _ROWS_AT_ONCE):
        ids = neighbors[start : start + _ROWS_AT_ONCE]
        there = ids >= 0
        same = labels[np.where(there, ids, 0)] == labels[start : start + _ROWS_AT_ONCE, None]
        kept, pairs = kept + int((same & there).sum()), pairs + int(there.sum())
    return kept / max(pairs, 1)


def modularity(labels: IntArray, neighbors: IntArray) -> float:
    """Return `neighbor_agreement` less what a partition of the same sizes keeps by chance, Σ_c (share of rows)².

    Below 1, larger is better; 0 for a single cluster and about 0 for random labels. The form for several workers is
    `clustering.neighborhood.modularity`.

    Source: Newman & Girvan 2004, eq. 5, for a graph in which every row has equally many neighbours.
    """
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return neighbor_agreement(labels, neighbors) - float(np.square(shares).sum())


def map_equation(labels: IntArray, neighbors: IntArray) -> float:
    """Return the nats per step that describe a random walk in the neighbour graph with a code book per cluster.

    At least 0, smaller is better. With too few clusters the code words of rows are long, with too many the walk leaves
    clusters often. Edges count in both directions.

    Source: Rosvall & Bergstrom 2008, eq. 4, of the two-level description.
    """
    require_matrix(neighbors, "neighbors")
    codes = np.unique(_one_per_row(labels, len(neighbors)), return_inverse=True)[1]
    there = neighbors >= 0
    ends = neighbors[there]
    starts = np.repeat(np.arange(len(codes)), there.sum(axis=1))
    # p_α of each row, q_i of each cluster, and q_i + Σ_{α ∈ i} p_α.
    visits = np.bincount(np.concatenate([starts, ends]), minlength=len(codes)) / max(2 * len(ends), 1)
    crossing = codes[starts] != codes[ends]
    across = np.concatenate([codes[starts][crossing], codes[ends][crossing]])
    leaving = np.bincount(across, minlength=int(codes.max(initial=-1)) + 1) / max(2 * len(ends), 1)
    used = leaving + np.bincount(codes, weights=visits)
    index = xlogy(leaving.sum(), leaving.sum()) - 2.0 * xlogy(leaving, leaving).sum()
    return float(index - xlogy(visits, visits).sum() + xlogy(used, used).sum()) + 0.0


def stability(partitions: Sequence[IntArray]) -> float:
    """Return the mean ARI of every two of several partitions of the same rows, such as those of several seeds.

    At most 1, larger is better; about 0 for independent random labels of any K.

    Raises:
        DataError: fewer than two partitions.
    """
    if len(partitions) < 2:
        raise DataError(f"stability: {len(partitions)} partition: at least 2 are needed")
    return float(np.mean([ari(a, b) for a, b in itertools.combinations(partitions, 2)]))


def prediction_strength(partitions: Sequence[IntArray]) -> float:
    """Return the share of a cluster's pairs of rows that another partition keeps together, of the worst cluster.

    From 0 to 1, larger is better; mean over every ordered two of several partitions of the same rows, such as those of
    several seeds. Clusters of one row have no pair and are left out. The paper compares a partition of held-out rows
    with the one that was fitted to the others.

    Raises:
        DataError: fewer than two partitions.

    Source: Tibshirani & Walther 2005, eq. 2.1.
    """
    if len(partitions) < 2:
        raise DataError(f"prediction strength: {len(partitions)} partition: at least 2 are needed")
    worst = []
    for one, other in itertools.permutations(partitions, 2):
        table = contingency(one, other)
        sizes = np.asarray(table.sum(axis=1)).ravel()
        kept = np.asarray(table.multiply(table).sum(axis=1)).ravel() - sizes
        pairs = sizes * (sizes - 1)
        worst.append(float((kept[pairs > 0] / pairs[pairs > 0]).min()) if pairs.any() else 0.0)
    return float(np.mean(worst))


def merged_clusters(labels: IntArray, neighbors: IntArray) -> int:
    """Return how many clusters are left where merging them along a tree reaches the most modularity.

    Two clusters are near if more neighbour pairs join them than chance would, e_uv / (a_u a_v). The tree of the nearest
    ones is followed edge by edge; of all steps the one of largest modularity counts.

    Source: Newman & Girvan 2004, eq. 5, for modularity; the tree is single linkage of clusters.
    """
    require_matrix(neighbors, "neighbors")
    codes = np.unique(_one_per_row(labels, len(neighbors)), return_inverse=True)[1]
    there = neighbors >= 0
    starts, ends = np.repeat(codes, there.sum(axis=1)), codes[neighbors[there]]
    clusters = int(codes.max(initial=-1)) + 1
    joined = sparse.coo_array((np.ones(len(starts)), (starts, ends)), shape=(clusters, clusters)).toarray()
    e = (joined + joined.T) / max(2 * len(starts), 1)
    a = e.sum(axis=1)
    # Costs fall with e / (a aᵀ) and are above 0: a zero is no edge.
    chance = np.outer(a, a)
    lift = np.divide(e, chance, out=np.zeros_like(e), where=chance > 0)
    np.fill_diagonal(lift, 0.0)
    costs = np.divide(1.0, lift, out=np.zeros_like(lift), where=lift > 0)
    tree = minimum_spanning_tree(sparse.csr_array(costs)).tocoo()
    group, left, gained, best, fewest = np.arange(clusters), clusters, 0.0, 0.0, clusters
    for edge in np.argsort(tree.data, kind="stable"):
        u, v = group[tree.coords[0][edge]], group[tree.coords[1][edge]]
        gained += 2.0 * (e[u, v] - a[u] * a[v])
        group[group == v] = u
        e[u], a[u] = e[u] + e[v], a[u] + a[v]
        e[:, u] += e[:, v]
        left -= 1
        if gained > best + 1e-12:
            best, fewest = gained, left
    return fewest


def _one_per_row(labels: IntArray, rows: int) -> IntArray:
    labels = np.asarray(labels)
    if labels.shape != (rows,):
        raise ShapeError(f"labels has shape {labels.shape}: one label for each of {rows} rows is needed")
    return labels
