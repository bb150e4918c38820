"""Stage `evaluate`: metrics of the partition, against labels where there are any and without."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from rayclust.arrays import unit_rows
from rayclust.config import RunConfig
from rayclust.features import SpaceTransforms
from rayclust.methods.base import Membership
from rayclust.runtime.cluster import run_remotely
from rayclust.runtime.members import plan_members
from rayclust.runtime.pipeline import StageContext, StageResult, content_digest
from rayclust.runtime.rows import features_at, kept_aside, row_starts, transform_of
from rayclust.runtime.tensors import load_method
from rayclust.store import tables
from rayclust.store.manifest import AssignOutputs, EncodeOutputs, put_json, put_table
from rayclust.store.run import Run

if TYPE_CHECKING:  # they bring torchvision
    from rayclust.methods.pixels.base import PixelMethod
    from rayclust.methods.pixels.cpp import CppPixels

SPACE_ROWS = 2000
"""Rows of the seeded samples on which a space that was learnt from pixels is probed: of each side of a probe."""
MEMBERSHIP_ROWS = 1000
"""Rows of the seeded sample on which a method's Π is measured."""
VOTES = {"knn_accuracy": 1, "knn_accuracy_top5": 5}
"""How many classes of the nearest neighbours' vote count, by score."""
EDGE = 0.1
"""Entries of Π, n × n, count as non-zero above this share of 1/n, the value of a uniform Π."""


def run(context: StageContext) -> StageResult:
    """Score the run in one worker, which holds two integers per row and one more for each coarser level."""
    encode, assigned = context.inputs["encode"], context.inputs["assign"].outputs_of(AssignOutputs)
    starts = row_starts(encode)
    model = content_digest(context.inputs["train"]) if "train" in context.inputs else None
    transform = transform_of(encode, context.config.features)
    metrics: dict[str, Any]
    scoring = _Scoring(context.run, encode.outputs_of(EncodeOutputs), transform, context.config, assigned.levels, model)
    metrics, counts = run_remotely(scoring.score)
    outputs = put_json(context.run, context.run.metrics, metrics | {"sizes": assigned.sizes})
    if counts is not None:
        outputs |= put_table(context.run, context.run.contingency, counts)
    scores = metrics | metrics.get("test", {})
    shown = [f"{name} {scores[name]:.4f}" for name in ("accuracy", "nmi", "ari", "silhouette") if name in scores]
    return StageResult(outputs, {"rows": starts[-1], "labelled": encode.counts["labelled"]}, {}, ", ".join(shown))


@dataclass(frozen=True)
class _Scoring:
    """Scores a run in a worker."""

    run: Run
    encode: EncodeOutputs
    transform: SpaceTransforms
    config: RunConfig
    levels: tuple[int, ...]
    """Numbers of clusters of the coarser levels, finest first."""
    model: str | None
    """Digest of the method, if its membership is to be measured."""

    def score(self) -> tuple[dict[str, Any], pa.Table | None]:
        """Return the metrics, and the contingency table where there are labels."""
        from rayclust.metrics import external, geometry, internal

        levels, codes, classes = _columns(self.run, self.encode.starts, self.levels)
        clusters, labelled, is_labelled = levels[0], codes >= 0, len(classes) > 1
        metrics: dict[str, Any] = {"rows": len(clusters), "clusters": self.config.method.clusters}
        counts, aside = None, kept_aside(self.run, self.encode)
        if is_labelled:
            metrics |= {"classes": len(classes), "labelled": int(labelled.sum())}
            # The cells that are not empty, by class and cluster.
            pairs, sizes = np.unique(np.stack([codes[labelled], clusters[labelled]]), axis=1, return_counts=True)
            cells = {"label": [classes[code] for code in pairs[0]], "cluster": pairs[1], "count": sizes}
            counts = pa.table(cells)
        # 1. The partition, against the labels of those rows that have one: of all rows, or of each split.
        if aside is None:
            metrics |= self._partition(levels, codes, np.ones(len(codes), bool), is_labelled=is_labelled)
        else:
            for name, rows in (("train", ~aside), ("test", aside)):
                metrics[name] = {"rows": int(rows.sum()), "labelled": int((rows & labelled).sum())}
                metrics[name] |= self._partition(levels, codes, rows, is_labelled=is_labelled)
            known, asked = ~aside & labelled, aside & labelled
            if known.any() and asked.any():
                commonest = external.majority_map(codes[known], clusters[known])
                held_out = external.mapped_accuracy(codes[asked], clusters[asked], commonest)
                metrics["test"]["accuracy_held_out"] = held_out
        # 2. The embedding, by probes and by how far the clusters are apart; for pixels, what was learnt from them.
        method: Any = None
        if self.model is not None:
            torch.set_num_threads(1)
            method = load_method(self.run.uri, self.model)
        if self.config.method.reads_pixels:
            measured, found = self._learnt_space(method, clusters, codes if is_labelled else None, aside)
            metrics |= measured
        else:
            found = self._probes(codes, aside) if is_labelled else {}
            sample = _sample(len(clusters), self.config.evaluate.silhouette_rows, self.config.seed)
            if len(sample) and len(np.unique(clusters[sample])) > 1:
                features = features_at(self.run, self.encode.starts, self.transform, sample)
                metrics["silhouette"] = internal.silhouette(features, clusters[sample])
                metrics["silhouette_rows"] = len(sample)
        (metrics if aside is None else metrics["test"]).update(found)
        # 3. The accuracy of each partition that the method read, on the labelled rows of which it says something.
        members = plan_members(self.config) if is_labelled else None
        if members is not None:
            metrics["members"] = list[float | None]()
            for labels in members.labels(self.run, len(self.encode.parts)):
                both = (codes >= 0) & (labels >= 0)
                metrics["members"].append(external.accuracy(codes[both], labels[both]) if both.any() else None)
        # 4. The membership Π of a sample of rows, labelled ones where there are.
        if isinstance(method, Membership):
            places = np.flatnonzero(codes >= 0) if is_labelled else np.arange(len(codes))
            drawn = places[_sample(len(places), MEMBERSHIP_ROWS, self.config.seed)]
            x = torch.from_numpy(features_at(self.run, self.encode.starts, self.transform, drawn))
            with torch.inference_mode():
                matrix, least = method.membership(x).double().numpy(), EDGE / len(drawn)
            measured = geometry.membership_scores(matrix, codes[drawn] if is_labelled else None, least)
            metrics |= {f"membership_{name}": value for name, value in measured.items()}
        return metrics, counts

    def _partition(
        self, levels: np.ndarray, codes: np.ndarray, rows: np.ndarray, *, is_labelled: bool
    ) -> dict[str, Any]:
        """Score the clusters and the coarser levels, Int32[1 + L, N], of some rows, Bool[N]."""
        from rayclust.metrics import external

        labelled = rows & (codes >= 0)
        truth, found = codes[labelled], [dict[str, float]() for _ in levels]
        for scores, level in zip(found, levels, strict=True):
            if is_labelled and len(truth):
                scores |= external.scores(truth, level[labelled])
                if len(np.unique(level[labelled])) > len(np.unique(truth)):
                    scores["accuracy_held_out"] = external.halves_accuracy(truth, level[labelled])
                    scores["accuracy_in_sample"] = external.in_sample_accuracy(truth, level[labelled])
        if not self.levels:
            return found[0]
        occupied = [len(np.unique(level[rows])) for level in levels[1:]]
        sizes = [{"clusters": k, "occupied": used} for k, used in zip(self.levels, occupied, strict=True)]
        return found[0] | {"levels": [size | scores for size, scores in zip(sizes, found[1:], strict=True)]}

    def _probes(self, codes: np.ndarray, aside: np.ndarray | None) -> dict[str, float]:
        """Return the accuracy of a linear probe and of the k-NN vote, over rows with labels.

        With a split they learn from its train rows and are scored on its test rows. Without one the linear probe is
        trained on half of a sample and measured on the other half, and the vote is leave-one-out.
        """
        from rayclust.metrics import probes

        found, options, rng = dict[str, float](), self.config.evaluate, np.random.default_rng(self.config.seed)
        known = np.flatnonzero(codes >= 0)
        # 1. The linear probe.
        if aside is None:
            drawn = rng.choice(known, min(options.linear_probe_rows, len(known)), replace=False)
            sides = [drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]]
        else:
            sides = [known[~aside[known]], known[aside[known]]]
            sides = [rng.choice(side, min(options.linear_probe_rows, len(side)), replace=False) for side in sides]
        if all(map(len, sides)):
            own, others = (np.sort(side) for side in sides)
            x, z = (features_at(self.run, self.encode.starts, self.transform, rows) for rows in (own, others))
            found["linear_probe"] = probes.linear_probe_accuracy(x, codes[own], z, codes[others])
        # 2. The vote. Neighbours are fitted rows; those with a label vote.
        scored = codes >= 0 if aside is None else (codes >= 0) & aside
        right = defaultdict[str, float](float)
        for part, (start, stop) in enumerate(pairwise(self.encode.starts)):
            asked = np.flatnonzero(scored[start:stop])
            if len(asked):
                table = tables.read_table(self.run.neighbors(part), ["neighbors", "similarity"])
                ids, similarity = (tables.matrix(table[name])[asked] for name in ("neighbors", "similarity"))
                ids = np.where((ids >= 0) & (codes[ids] >= 0), ids, -1)
                order = np.argsort(ids < 0, axis=1, kind="stable")  # those that vote first, still the nearest first
                ids, similarity = (np.take_along_axis(values, order, axis=1) for values in (ids, similarity))
                for name, top in VOTES.items():
                    truth, k = codes[start + asked], options.probe_neighbors
                    right[name] += len(asked) * probes.knn_accuracy(ids, similarity, codes, truth, k=k, top=top)
        return found | {name: right[name] / scored.sum() for name in VOTES if scored.any()}

    def _learnt_space(
        self, method: PixelMethod | CppPixels, clusters: np.ndarray, codes: np.ndarray | None, aside: np.ndarray | None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Measure what a method has learnt from pixels, on a sample of rows: labelled ones, Int32[N] codes, if given.

        Returns:
            Of its space z: "space_std", 1 where z fills all directions and 0 where it has collapsed to a point;
            "space_rank", the exponential of the entropy of its shares of variance: directions that it uses, of d; and
            the silhouette. Then, with labels, the probes of `_probes`: the vote in z, the linear probe on the rows of
            the network below the projector, as encoders of other runs give them.
        """
        from rayclust.metrics import internal, probes

        options, seed = self.config.evaluate, self.config.seed
        # 1. Rows to learn from, and with a split rows to be asked.
        known = np.arange(len(clusters)) if codes is None else np.flatnonzero(codes >= 0)
        sides = (known,) if aside is None else (known[~aside[known]], known[aside[known]])
        rows = np.sort(np.concatenate([side[_sample(len(side), SPACE_ROWS, seed)] for side in sides]))
        votes = np.ones(len(rows), bool) if aside is None else ~aside[rows]
        asked = votes if aside is None else ~votes
        x = torch.from_numpy(features_at(self.run, self.encode.starts, self.transform, rows))
        with torch.inference_mode():
            z, features = method.transform(x).double(), unit_rows(method.read(x).numpy())
        # 2. Whether the space has collapsed, and how far the clusters are apart in it.
        variances = torch.linalg.svdvals(z - z.mean(0)).square()
        shares = variances / variances.sum().clamp(min=torch.finfo(variances.dtype).tiny)
        measured = {
            "space_std": float(z.std(dim=0, correction=0).mean()) * z.shape[1] ** 0.5,
            "space_rank": float(torch.special.entr(shares).sum().exp()),
        }
        if options.silhouette_rows and len(np.unique(clusters[rows])) > 1:
            measured |= {"silhouette": internal.silhouette(z.numpy(), clusters[rows]), "silhouette_rows": len(rows)}
        # 3. Probes.
        if codes is None or votes.sum() < 2 or not asked.any():
            return measured, {}
        truth, cosines = codes[rows], z[asked] @ z[votes].T
        if aside is None:
            cosines.fill_diagonal_(-torch.inf)  # a row has no vote on itself
        similarity, neighbors = cosines.topk(min(options.probe_neighbors, int(votes.sum()) - 1))
        found = {
            name: probes.knn_accuracy(neighbors.numpy(), similarity.numpy(), truth[votes], truth[asked], top=top)
            for name, top in VOTES.items()
        }
        own, others = np.flatnonzero(votes), np.flatnonzero(asked)
        if aside is None:
            own, others = np.array_split(np.random.default_rng(seed).permutation(len(rows)), 2)
        probed = probes.linear_probe_accuracy(features[own], truth[own], features[others], truth[others])
        found["linear_probe"] = probed
        if options.linear_epochs:
            found |= self._linear_evaluation(method, codes, aside)
        return measured, found

    def _linear_evaluation(
        self, method: PixelMethod | CppPixels, codes: np.ndarray, aside: np.ndarray | None
    ) -> dict[str, float]:
        """Train a linear layer on views of all labelled images, of one half of them without a split; score the rest."""
        from rayclust.methods.pixels import augment
        from rayclust.methods.pixels.backbones import SMALL_IMAGE
        from rayclust.metrics import probes

        seed, known = self.config.seed, np.flatnonzero(codes >= 0)
        sides = np.array_split(np.random.default_rng(seed).permutation(known), 2)
        own, others = map(np.sort, sides if aside is None else (known[~aside[known]], known[aside[known]]))
        x, z = (torch.from_numpy(features_at(self.run, self.encode.starts, self.transform, r)) for r in (own, others))
        shape = method.shape
        options = augment.SHIFTED if shape.side <= SMALL_IMAGE else augment.CROPPED

        def view(rows: torch.Tensor, step: int) -> torch.Tensor:
            numbers = augment.draw(len(rows), augment.keyed_seed(seed, step))
            images = augment.random_view(shape.images(x[rows]), options, numbers)
            return method.read(shape.rows(images)).float()

        found = probes.linear_evaluation(
            view, codes[own], method.read(z).float().numpy(), codes[others], epochs=self.config.evaluate.linear_epochs
        )
        return {"linear_evaluation": found[1], "linear_evaluation_top5": found[5]}


def _columns(run: Run, starts: list[int], levels: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read the clusters and the labels of all rows.

    Returns:
        Int32[1 + L, N], the clusters and those of each coarser level; Int32[N] label codes, −1 without a label; and
        the labels in order of their codes.
    """
    columns = ["cluster", *map(tables.level_column, levels)]
    clusters = np.empty((len(columns), starts[-1]), np.int32)
    codes = np.full(starts[-1], -1, np.int32)
    known: dict[str, int] = {}
    for part, (start, stop) in enumerate(pairwise(starts)):
        if stop == start:
            continue
        assigned = tables.read_table(run.assignments(part), columns)
        for place, column in enumerate(columns):
            clusters[place, start:stop] = assigned[column].to_numpy()
        labels = tables.read_table(run.rows(part), ["label"])["label"].combine_chunks().dictionary_encode()
        names = labels.dictionary.to_pylist()
        # The last place stands for null, whose index is filled with −1.
        code_of = np.array([known.setdefault(name, len(known)) for name in names] + [-1], np.int32)
        codes[start:stop] = code_of[labels.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    return clusters, codes, list(known)


def _sample(count: int, wanted: int, seed: int) -> np.ndarray:
    """Draw at most `wanted` of `count` rows, Int64[n], sorted."""
    return np.sort(np.random.default_rng(seed).choice(count, min(wanted, count), replace=False))
