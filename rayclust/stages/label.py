"""Stage `label`: each cluster's most typical and least certain images, and its name by vote where words are given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from rayclust.arrays import unit_rows
from rayclust.config import RunConfig
from rayclust.errors import DataError
from rayclust.features import SpaceTransforms
from rayclust.language.naming import (
    ClusterName,
    TopRows,
    cluster_votes,
    name_clusters,
    name_distinctly,
    shuffled_null,
    typicality,
)
from rayclust.language.vocabulary import merged, same_name
from rayclust.methods.settings import EMBEDDINGS
from rayclust.runtime.cluster import run_remotely
from rayclust.runtime.pipeline import StageContext, StageResult
from rayclust.runtime.rows import (
    all_clusters,
    filled_parts,
    part_clusters,
    part_embeddings,
    part_features,
    row_starts,
    transform_of,
)
from rayclust.runtime.tasks import Task, TaskResult, run_tasks
from rayclust.runtime.vocabularies import check_classes, read_lists, vocabulary_kinds, word_embeddings
from rayclust.store import storage, tables
from rayclust.store.manifest import AssignOutputs, EncodeOutputs, digest_of, put_table
from rayclust.store.run import Run

FEW_WORDS = 5000
"""With at most so many words, all images vote under `label.voters: auto`."""
VOTERS = 300
"""With more words, so many images per cluster vote."""
NULL_VOTERS, NULL_IMAGES = 300, 200_000
"""Images per cluster, and of all clusters about, that are shuffled to see which names say something."""
WITHOUT_CLASSES = "without_classes"
"""Key of the names by all lists but the data set's own class names."""
CLASSES = "classes"
"""Column of the words that are the data set's own class names."""
BINS = 20
"""Equal bins of the histogram of confidence over [0, 1]."""


@dataclass(frozen=True)
class Labeling:
    """The work of the stage's workers; each part's votes are tables (cluster, word, mass) in a scratch folder.

    A run with its own class names beside other lists is named twice, with and without them.
    """

    run: Run
    config: RunConfig
    starts: list[int]
    transform: SpaceTransforms
    folder: str

    @property
    def namings(self) -> tuple[str, ...]:
        """Keys of the namings: by `all` lists, and without the classes where there are others."""
        found = vocabulary_kinds(self.config)
        return ("all", WITHOUT_CLASSES) if "classes" in found.values() and len(found) > 1 else ("all",)

    def prepare(self) -> int:
        """Write the words with their embeddings and the rows that vote; return the number of words."""
        # 1. The words, and which of them lists other than the classes hold as well.
        check_classes(self.config)
        labels = (tables.read_table(self.run.rows(part), ["label"])["label"] for part in filled_parts(self.starts))
        distinct = (column.unique().drop_null().to_pylist() for column in labels)
        words = merged(read_lists(self.config, lambda: {name for names in distinct for name in names}))
        classes = [place for place, kind in enumerate(vocabulary_kinds(self.config).values()) if kind == "classes"]
        is_blind = [bool(sources - set(classes)) for sources in words.sources]
        is_class = [bool(sources & set(classes)) for sources in words.sources]
        found = np.asarray(word_embeddings(self.config, words), np.float32)
        space = getattr(self.config.text_encoder, "space", EMBEDDINGS)
        width = dict(zip(self.transform.transforms, self.transform.widths, strict=True))[space]
        if found.shape[1] != width:
            raise DataError(f"label.vocabulary: words have {found.shape[1]} values, the rows {width}")
        rows = tables.fixed_list(found)
        above = pa.array([words.hypernyms.get(word.casefold(), ()) for word in words.words], pa.list_(pa.string()))
        columns = {"word": list(words.words), "embedding": rows, "all": [True] * len(words.words), "hypernyms": above}
        tables.write_table(
            self._at("words.parquet"), pa.table(columns | {WITHOUT_CLASSES: is_blind, CLASSES: is_class})
        )
        # 2. The voters, where not all vote, and those of them that are shuffled: so many of each cluster.
        most, samples = self.config.label.voters, dict[str, int]()
        if most == "auto" and len(words.words) > FEW_WORDS:
            samples["voters.parquet"] = VOTERS
        elif isinstance(most, int):
            samples["voters.parquet"] = most
        if self.config.label.distinct:
            few = min(NULL_VOTERS, max(20, NULL_IMAGES // self.config.method.clusters))
            samples["shuffled.parquet"] = min(few, most) if isinstance(most, int) else few
        if samples:
            # Rows in random order within each cluster: a sample is the first of these.
            clusters = all_clusters(self.run, self.starts)
            order = np.lexsort((np.random.default_rng(self.config.seed).random(len(clusters)), clusters))
            rank = np.arange(len(order)) - np.searchsorted(clusters[order], clusters[order])
            for name, most_of_each in samples.items():
                tables.write_table(self._at(name), pa.table({"row": np.sort(order[rank < most_of_each])}))
        return len(words.words)

    def vote(self, task: Task) -> TaskResult:
        """Write the votes of one part's images."""
        table = _read_scratch(self._at("words.parquet"))
        nouns = tables.matrix(table["embedding"])
        space = getattr(self.config.text_encoder, "space", EMBEDDINGS)
        embeddings = part_embeddings(self.run, task.index, (space,))
        clusters = self._clusters(task.index)
        label, count = self.config.label, self.config.method.clusters
        # Words that come with embeddings were made for features; a text tower's share the encoder's own space.
        has_embeddings = "embeddings" in vocabulary_kinds(self.config).values()
        in_features = label.space == "features" or (label.space == "auto" and has_embeddings)
        transform = self.transform.transforms[space] if in_features else None
        result = TaskResult({}, {"rows": int((clusters >= 0).sum())})
        own = np.flatnonzero(table[CLASSES].to_numpy())
        if len(own):
            x = unit_rows(embeddings.astype(np.float32)) if transform is None else transform(embeddings)
            nearest = [table["word"][place].as_py() for place in own[(x @ unit_rows(nouns[own]).T).argmax(1)]]
            labels = tables.read_table(self.run.rows(task.index), ["label"])["label"].to_pylist()
            result.counts["labelled"] = sum(label is not None for label in labels)
            result.counts["zero_shot"] = sum(map(same_name, nearest, labels))
        for naming in self.namings:
            some = np.flatnonzero(table[naming].to_numpy())
            votes = cluster_votes(embeddings, clusters, nouns[some], count, transform=transform, scale=label.scale)
            cells = votes.tocoo()
            columns = {"cluster": cells.coords[0], "word": some[cells.coords[1]], "mass": cells.data}
            result.outputs |= put_table(self.run, self._at(f"{naming}-{task.index:05d}.parquet"), pa.table(columns))
            if label.distinct:
                places = self._places("shuffled.parquet", task.index)
                votes = cluster_votes(
                    embeddings[places],
                    np.arange(len(places)),
                    nouns[some],
                    len(places),
                    transform=transform,
                    scale=label.scale,
                )
                cells = votes.tocoo()
                columns = {"image": cells.coords[0], "word": some[cells.coords[1]], "mass": cells.data}
                uri = self._at(f"{naming}-images-{task.index:05d}.parquet")
                result.outputs |= put_table(self.run, uri, pa.table(columns))
        return result

    def count(self) -> tuple[dict[str, list[ClusterName]], int]:
        """Return the names by all votes together, by naming, and how many images voted."""
        from scipy import sparse

        table = tables.read_table(self._at("words.parquet"), ["word", "hypernyms"])
        words = table["word"].to_pylist()
        above = {
            word.casefold(): names for word, names in zip(words, table["hypernyms"].to_pylist(), strict=True) if names
        }
        label, count = self.config.label, self.config.method.clusters
        voters = np.zeros(count, np.int64)
        for part in filled_parts(self.starts):
            clusters = self._clusters(part)
            voters += np.bincount(clusters[clusters >= 0], minlength=count)
        names = {}
        for naming in self.namings:
            total: Any = sparse.csr_array((count, len(words)))
            for part in range(len(self.starts) - 1):
                table = tables.read_table(self._at(f"{naming}-{part:05d}.parquet"))
                place = (table["cluster"].to_numpy(), table["word"].to_numpy())
                total = total + sparse.csr_array((table["mass"].to_numpy(), place), shape=total.shape)
            if not label.distinct:
                names[naming] = name_clusters(total, voters, words, runners_up=label.runners_up)
                continue
            # Of the images that are shuffled, their votes, sparse Float64[B V], and their clusters, Int32[B].
            images, of_images = [], [np.empty(0, np.int32)]
            for part in range(len(self.starts) - 1):
                places = self._places("shuffled.parquet", part)
                of_images.append(part_clusters(self.run, part)[places])
                table = tables.read_table(self._at(f"{naming}-images-{part:05d}.parquet"))
                place = (table["image"].to_numpy(), table["word"].to_numpy())
                images.append(sparse.csr_array((table["mass"].to_numpy(), place), shape=(len(places), len(words))))
            shuffled, clusters = sparse.vstack(images, format="csr"), np.concatenate(of_images)
            null = shuffled_null(shuffled, clusters, count, specificity=label.specificity, seed=self.config.seed)
            names[naming] = name_distinctly(
                total,
                voters,
                words,
                specificity=label.specificity,
                null=null,
                hypernyms=above,
                runners_up=label.runners_up,
            )
        return names, int(voters.sum())

    def named_as_classes(self, names: list[str | None]) -> float | None:
        """Return the share of the labelled images whose cluster has their class's name; None without labels."""
        right = labelled = 0
        for part in filled_parts(self.starts):
            column = tables.read_table(self.run.rows(part), ["label"])["label"]
            labels = column.combine_chunks().dictionary_encode()
            codes = labels.indices.fill_null(-1).to_numpy(zero_copy_only=False)
            clusters = part_clusters(self.run, part)
            known = codes >= 0
            labelled += int(known.sum())
            pairs, counts = np.unique(np.stack([clusters[known], codes[known]]), axis=1, return_counts=True)
            classes = labels.dictionary.to_pylist()
            right += sum(
                int(n) for k, code, n in zip(*pairs, counts, strict=True) if same_name(names[k], classes[code])
            )
        return right / labelled if labelled else None

    def extremes(self) -> dict[str, list[Any]]:
        """Find exemplars and outliers in two passes: the clusters' mean directions, then cosines to one's own.

        Returns:
            `exemplars` and `outliers`, rows of each cluster; `mean_confidence` of each cluster, None for an empty one;
            and `confidence`, the histogram over all rows.
        """
        from scipy import sparse

        count, label = self.config.method.clusters, self.config.label

        def read(part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            """Return features Float32[B D], clusters Int32[B] and confidence Float32[B] of one part."""
            assigned = tables.read_table(self.run.assignments(part), ["cluster", "confidence"])
            features = part_features(self.run, part, self.transform)
            return features, assigned["cluster"].to_numpy(), assigned["confidence"].to_numpy()

        # 1. Sums of features Float64[K D] and confidence Float64[K], sizes Int64[K], histogram Int64[BINS].
        confidence, sizes, histogram = np.zeros(count), np.zeros(count, np.int64), np.zeros(BINS, np.int64)
        sums: Any = 0.0
        for part in range(len(self.starts) - 1):
            features, clusters, certain = read(part)
            place = (clusters, np.arange(len(clusters)))
            members = sparse.csr_array((np.ones(len(clusters)), place), shape=(count, len(clusters)))
            sums = sums + members @ features.astype(np.float64)
            confidence += np.bincount(clusters, certain, count)
            sizes += np.bincount(clusters, minlength=count)
            histogram += np.histogram(certain, BINS, (0, 1))[0]
        # 2. The most typical and the least certain rows.
        typical, odd = TopRows(label.exemplars), TopRows(label.outliers, largest=False)
        for part, start in enumerate(self.starts[:-1]):
            features, clusters, certain = read(part)
            rows = np.arange(start, start + len(clusters))
            typical.update(rows, clusters, typicality(features, clusters, sums))
            odd.update(rows, clusters, certain)
        exemplars = [typical.of(cluster) for cluster in range(count)]
        outliers = [odd.of(cluster) for cluster in range(count)]
        for cluster, shown in enumerate(exemplars):
            # What is both is an exemplar, but one outlier stays: small clusters would show the same images twice.
            others = [row for row in outliers[cluster] if row not in shown]
            outliers[cluster] = others or outliers[cluster][:1]
        return {
            "exemplars": exemplars,
            "outliers": outliers,
            "mean_confidence": [float(c / n) if n else None for c, n in zip(confidence, sizes, strict=True)],
            "confidence": histogram.tolist(),
        }

    def _clusters(self, part: int) -> np.ndarray:
        """Return the clusters of one part, Int32[B], −1 for rows that do not vote."""
        clusters = part_clusters(self.run, part)
        if storage.stat(self._at("voters.parquet")) is None:
            return clusters
        voters = self._places("voters.parquet", part)
        voting = np.full_like(clusters, -1)
        voting[voters] = clusters[voters]
        return voting

    def _places(self, name: str, part: int) -> np.ndarray:
        """Return the places in a part of the rows that a scratch file names, Int64[n]."""
        rows = _read_scratch(self._at(name))["row"].to_numpy()
        start, stop = np.searchsorted(rows, self.starts[part : part + 2])
        return rows[start:stop] - self.starts[part]

    def _at(self, name: str) -> str:
        return storage.join(self.folder, name)


_read_scratch = lru_cache(3)(tables.read_table)
"""Cached, for words, voters and shuffled images: a worker votes for many parts. The URIs hold the stage's digest."""


def run(context: StageContext) -> StageResult:
    """Find exemplars and outliers in one worker, count votes part by part, and write a row per cluster."""
    encode, config = context.inputs["encode"], context.config
    folder, transform = context.run.at("label", context.digest), transform_of(encode, config.features)
    work = Labeling(context.run, config, row_starts(encode), transform, folder)
    names, facts = _names(context, work)
    extremes = run_remotely(work.extremes)
    blind = names.get(WITHOUT_CLASSES)
    rows = [
        {
            "cluster": cluster,
            "size": size,
            "name": named.name,
            "score": named.score,
            "runners_up": [{"name": name, "score": score} for name, score in named.runners_up],
            "name_without_classes": blind[cluster].name if blind else None,
            "score_without_classes": blind[cluster].score if blind else None,
            "exemplars": extremes["exemplars"][cluster],
            "outliers": extremes["outliers"][cluster],
            "margin": named.margin,
            "changed": named.is_changed,
        }
        for cluster, (size, named) in enumerate(
            zip(context.inputs["assign"].outputs_of(AssignOutputs).sizes, names["all"], strict=True)
        )
    ]
    schema = pa.schema([*tables.CLUSTERS, *tables.NAMING]) if config.label.distinct else tables.CLUSTERS
    outputs = put_table(context.run, context.run.clusters, pa.Table.from_pylist(rows, schema=schema))
    count = sum(name.name is not None for name in names["all"])
    summary = f"{count} of {len(rows)} clusters named" if count else f"{len(rows)} clusters, no vocabulary"
    if count and facts["name_accuracy"] is not None:
        summary += f", {facts['name_accuracy']:.1%} of the images by their class's name"
    if count and facts["true_names"]:
        summary += ", with the data set's own class names among the words"
    extra = {name: extremes[name] for name in ("confidence", "mean_confidence")} | facts
    return StageResult(outputs, {"clusters": len(rows), "named": count}, extra, summary)


def _names(context: StageContext, work: Labeling) -> tuple[dict[str, list[ClusterName]], dict[str, Any]]:
    """Return each cluster's name by the vote of its images, by naming, and facts for the manifest."""
    kinds = vocabulary_kinds(work.config)
    if not kinds:
        return {"all": [ClusterName(None, None, ())] * work.config.method.clusters}, {}
    words = run_remotely(work.prepare)
    parts = context.inputs["encode"].outputs_of(EncodeOutputs).parts
    tasks = [Task(i, digest_of([context.digest, i]), size=rows) for i, rows in enumerate(parts)]
    results = run_tasks(context.run, "label", tasks, work.vote)
    names, voters = run_remotely(work.count)
    facts: dict[str, Any] = {"words": words, "voters": voters, "true_names": "classes" in kinds.values()}
    for naming, key in (("all", "name_accuracy"), (WITHOUT_CLASSES, f"name_accuracy_{WITHOUT_CLASSES}")):
        if naming in names:
            facts[key] = run_remotely(work.named_as_classes, [name.name for name in names[naming]])
    if labelled := sum(result.counts.get("labelled", 0) for result in results):
        facts["zero_shot_accuracy"] = sum(result.counts["zero_shot"] for result in results) / labelled
    # Marks first: without marks the votes are counted again, marks without votes would be wrong.
    storage.remove_tree(context.run.at("manifests", "label"))
    storage.remove_tree(context.run.at("label"))
    return names, facts
