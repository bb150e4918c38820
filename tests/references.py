"""Slow and obvious forms of what the library computes fast."""

from __future__ import annotations

import itertools

import numpy as np
import torch


def lloyd(x: np.ndarray, centers: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray, float]:
    """k-means in float64, one row and one cluster at a time, until no row moves: centres, labels, inertia."""

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    if metric == "cosine":
        x, centers = unit(x), unit(centers)
    labels = np.full(len(x), -1)
    while True:
        distances = np.array([[((row - center) ** 2).sum() for center in centers] for row in x])
        if np.array_equal(distances.argmin(1), labels):
            return centers, labels, float(distances.min(1).sum())
        labels = distances.argmin(1)
        centers = np.array([x[labels == k].mean(0) for k in range(len(centers))])
        centers = unit(centers) if metric == "cosine" else centers


def temi_losses(
    student: np.ndarray, teacher: np.ndarray, shares: np.ndarray, beta: float, weights: np.ndarray | None = None
) -> np.ndarray:
    """TEMI's loss of each head in plain probabilities, one head, view and row at a time.

    `student` and `teacher` are probabilities H V B K, `shares` H K; `weights` H B takes the place of TEMI's own.
    """
    heads, views, rows, _ = student.shape
    pairs = [(a, b) for a in range(views) for b in range(views) if a != b]
    if weights is None:
        trust = np.zeros(rows)
        for h in range(heads):
            for a, b in pairs:
                trust += (teacher[h, a] * teacher[h, b]).sum(-1) / (len(pairs) * heads)
        weights = np.tile(trust, (heads, 1))
    losses = np.zeros(heads)
    for h in range(heads):
        for i in range(rows):
            for s, t in pairs:
                joint = (student[h, s, i] * teacher[h, t, i]) ** beta / shares[h]
                losses[h] -= weights[h, i] * np.log(joint.sum()) / (len(pairs) * rows)
    return losses


class ClusteringHead(torch.nn.Module):
    """One head of two layers, made of torch's own layers with the numbers of one of the stacked heads."""

    def __init__(self, state: dict[str, torch.Tensor], head: int) -> None:
        super().__init__()
        hidden, dimension = state["weights.0"].shape[1:]
        clusters, bottleneck = state["direction"].shape[1:]
        self.first = torch.nn.Linear(dimension, hidden)
        self.second = torch.nn.Linear(hidden, bottleneck)
        self.last = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(bottleneck, clusters, bias=False))
        parts = {"first.weight": "weights.0", "first.bias": "biases.0", "second.weight": "weights.1"}
        parts |= {"second.bias": "biases.1", "last.parametrizations.weight.original1": "direction"}
        own = {name: state[stacked][head] for name, stacked in parts.items()}
        own["last.parametrizations.weight.original0"] = state["scale"][head][:, None]
        self.to(state["direction"].dtype).load_state_dict(own)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(self.first(x))
        return self.last(torch.nn.functional.normalize(self.second(hidden), dim=-1))


def nearest_rows(
    queries: np.ndarray, database: np.ndarray, k: int, query_ids: list[int], ids: list[int]
) -> list[list[tuple[float, int]]]:
    """(similarity, id) of each query's k nearest other rows, all pairs in float64, by similarity and then by id."""
    found = []
    for query, own in zip(queries, query_ids, strict=True):
        pairs = [(float(query @ row), i) for row, i in zip(database, ids, strict=True) if i != own]
        found.append(sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:k])
    return found


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bicubic resize (a = -1/2) of H W C in float64: one output pixel at a time along each axis."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    def along_rows(image: np.ndarray, size: int) -> np.ndarray:
        scale = len(image) / size
        stretch = max(scale, 1.0)
        rows = []
        for i in range(size):
            center = (i + 0.5) * scale
            weights = np.array([kernel((j + 0.5 - center) / stretch) for j in range(len(image))])
            rows.append(np.tensordot(weights / weights.sum(), image, 1))
        return np.array(rows)

    # Decoders round to bytes between the two passes, columns first.
    columns = np.clip(np.rint(along_rows(pixels.astype(float).swapaxes(0, 1), width)), 0, 255).swapaxes(0, 1)
    return np.clip(np.rint(along_rows(columns, height)), 0, 255)


def center_cropped(pixels: np.ndarray, size: int, short: int) -> np.ndarray:
    """The shorter side scaled to `short`, then the middle `size` by `size`."""
    height, width = pixels.shape[:2]
    if height <= width:
        image = resized(pixels, short, int(short * width / height))
    else:
        image = resized(pixels, int(short * height / width), short)
    top, left = round((image.shape[0] - size) / 2), round((image.shape[1] - size) / 2)
    return image[top : top + size, left : left + size]


def best_matching(labels_true: list[int], labels_pred: list[int]) -> float:
    """Clustering accuracy by trying every way to match clusters with different classes."""
    classes, clusters = sorted(set(labels_true)), sorted(set(labels_pred))
    classes += [None] * max(0, len(clusters) - len(classes))  # type: ignore[list-item]
    best = 0
    for chosen in itertools.permutations(classes, len(clusters)):
        name = dict(zip(clusters, chosen, strict=True))
        best = max(best, sum(name[p] == t for t, p in zip(labels_true, labels_pred, strict=True)))
    return best / len(labels_true)


def votes(x: np.ndarray, clusters: np.ndarray, nouns: np.ndarray, count: int, scale: float, top: int) -> np.ndarray:
    """Each cluster's sum of its images' `top` largest word probabilities, one image at a time: K V."""
    total = np.zeros((count, len(nouns)))
    for row, cluster in zip(x, clusters, strict=True):
        cosines = nouns @ row / np.linalg.norm(nouns, axis=1) / np.linalg.norm(row)
        probabilities = np.exp(scale * cosines) / np.exp(scale * cosines).sum()
        for word in sorted(range(len(nouns)), key=lambda v: -probabilities[v])[:top]:
            total[cluster, word] += probabilities[word]
    return total


def greedy_seeds(x: np.ndarray, clusters: int, seed: int | tuple[int, ...]) -> list[int]:
    """Greedy k-means++ seeds, one candidate at a time."""
    trials = 2 + int(np.log(clusters))
    uniform = np.random.default_rng(seed).random((clusters, trials))
    chosen = [int(uniform[0, 0] * len(x))]
    while len(chosen) < clusters:
        closest = ((x[:, None] - x[chosen]) ** 2).sum(2).min(1)
        shares = np.cumsum(closest) / closest.sum()
        candidates = [int(np.argmax(shares > u)) for u in uniform[len(chosen)]]
        left = [np.minimum(closest, ((x - x[c]) ** 2).sum(1)).sum() for c in candidates]
        chosen.append(candidates[int(np.argmin(left))])
    return chosen


def coding_length(z: np.ndarray, labels: np.ndarray, distortion: float) -> float:
    """Lossy coding length in nats, one cluster at a time, by the d×d determinant."""
    count, width = z.shape
    total = 0.0
    for k in np.unique(labels):
        own = z[labels == k]
        m = len(own)
        total += (m + width) / 2 * np.linalg.slogdet(np.eye(width) + width / (distortion * m) * own.T @ own)[1]
        total -= m * np.log(m / count)
    return total


def membership(codes: np.ndarray, temperature: float, half_steps: int) -> np.ndarray:
    """Doubly stochastic membership by alternating half-steps on the whole matrix, rows first and last."""
    kernel = np.exp(np.abs(codes @ codes.T) / temperature)
    rows = columns = np.ones(len(codes))
    for step in range(half_steps):
        if step % 2 == 0:
            rows = 1 / (kernel @ columns)
        else:
            columns = 1 / (kernel.T @ rows)
    return rows[:, None] * kernel * columns


def spectral_embedding(codes: np.ndarray, temperature: float, clusters: int, half_steps: int) -> np.ndarray:
    """Row-normalised leading eigenvectors of the normalised membership: diagonal dropped, column degrees."""
    linked = membership(codes, temperature, half_steps)
    np.fill_diagonal(linked, 0.0)
    degrees = linked.sum(0)
    similarity = 0.5 * (linked + linked.T) / np.sqrt(degrees[:, None] * degrees)
    vectors = np.linalg.eigh(similarity)[1][:, ::-1][:, :clusters]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def compression_rate(z: torch.Tensor, membership: torch.Tensor, distortion: float) -> torch.Tensor:
    """R_c as published: every group's weighted rows, their d × d matrix, its log-determinant by LU."""
    count, width = z.shape
    sums = membership.sum(0) + 1e-8
    weighted = membership.T[:, :, None] * z  # one copy of the rows for each group
    moments = torch.einsum("jid,ie->jde", weighted, z)
    matrices = torch.eye(width, dtype=z.dtype) + (width / (sums * distortion))[:, None, None] * moments
    return (sums / (2 * count) * torch.logdet(matrices)).sum()


def near_pairs_by_rows(x: np.ndarray, least: float) -> set[tuple[int, int]]:
    """All pairs (i, j), i < j, whose cosine is at least `least`, one by one."""
    wide = x.astype(np.float64)
    return {(i, j) for i in range(len(x)) for j in range(i + 1, len(x)) if wide[i] @ wide[j] >= least}


def greedy_kept(first: np.ndarray, second: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Rows in order, each kept if no kept one is near."""
    near = [set[int]() for _ in rank]
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        near[i].add(j)
        near[j].add(i)
    kept = set[int]()
    for row in np.argsort(rank).tolist():
        if not near[row] & kept:
            kept.add(row)
    return np.isin(np.arange(len(rank)), list(kept))
