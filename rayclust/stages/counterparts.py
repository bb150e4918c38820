"""Stage `counterparts`: nouns that fit the run's images, each image's counterpart in text, and their neighbours there.

Only in runs whose method reads words. The nouns are chosen by semantic centres of a sample of the rows, in one worker;
words are encoded block by block and counterparts made part by part, and no worker sees more than a part, the chosen
nouns and, once, the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from rayclust.clustering import kmeans
from rayclust.clustering.row_stats import even_sample
from rayclust.config import RunConfig
from rayclust.errors import ConfigError, DataError
from rayclust.language import nouns
from rayclust.language.vocabulary import merged
from rayclust.methods.tac_settings import TacConfig
from rayclust.runtime.cluster import run_remotely
from rayclust.runtime.encoder import worker_device
from rayclust.runtime.pipeline import StageContext, StageResult
from rayclust.runtime.rows import features_at, fitted_count, kept_aside, part_features, row_starts, transform_of
from rayclust.runtime.tasks import Task, TaskResult, group_parts, run_tasks, search_task_rows
from rayclust.runtime.tensors import unit_rows
from rayclust.runtime.vocabularies import WordBank, noun_lists, read_lists
from rayclust.search.knn import RunningTopK
from rayclust.settings import KMeansOptions
from rayclust.stages.neighbors_ivf import IvfLayout, drop_scratch, search_ivf
from rayclust.store import storage, tables
from rayclust.store.manifest import (
    EncodeOutputs,
    Manifest,
    Outputs,
    digest_of,
    drop_stale_parts,
    put_neighbors,
    put_table,
)
from rayclust.store.run import Run


@dataclass(frozen=True)
class Guidance:
    """The work of the stage's workers."""

    run: Run
    config: RunConfig
    encode: Manifest
    method: TacConfig
    """The method's settings, written out for the run's rows."""

    def bank(self) -> WordBank | None:
        """Return the words that the encoder has to read; None if they come with embeddings.

        Raises:
            ConfigError: features are not the encoder's own space, in which its text tower's words lie.
        """
        words = merged(self._lists(), verbatim=self.method.verbatim)
        if words.has_row.all():
            return None
        if words.has_row.any():
            raise ConfigError(
                "method.vocabulary: some lists come with embeddings and some would be read by the encoder; name lists "
                "of one kind"
            )
        if self.config.spaces:
            raise ConfigError(
                "encoders: the words of a text tower lie in one encoder's space; take one encoder, or a parquet of "
                "words with embeddings of the features of all"
            )
        for key in ("center", "standardize"):
            if getattr(self.config.features, key):
                raise ConfigError(
                    f"features.{key} = true: the encoder's words lie in its own space; set it to false, or take a "
                    "parquet of words with embeddings of the features"
                )
        return WordBank(self.config, words.words, self.method.templates, self.method.normalize_prompts)

    def encode_words(self, task: Task) -> TaskResult:
        """Encode one block of the vocabulary."""
        torch.set_num_threads(1)
        bank: WordBank = task.payload
        bank.encode(task.index - len(self.encode.outputs_of(EncodeOutputs).parts))
        return TaskResult()

    def choose(self, bank: WordBank | None, seed: int) -> tuple[Outputs, dict[str, int]]:
        """Find semantic centres and write the nouns that they choose.

        Returns:
            The file, and the numbers of `words`, `centers` and `nouns`.
        """
        # 1. Semantic centres of a sample of the fitted rows.
        c, starts = self.method, row_starts(self.encode)
        aside = kept_aside(self.run, self.encode.outputs_of(EncodeOutputs))
        fitted = np.arange(starts[-1]) if aside is None else np.flatnonzero(~aside)
        places = even_sample(len(fitted), c.center_rows * int(c.centers or 1), seed).numpy()
        features = features_at(self.run, starts, transform_of(self.encode, self.config.features), fitted[places])
        sample = unit_rows(torch.from_numpy(features)).to(worker_device(self.config))
        options = KMeansOptions(clusters=int(c.centers or 1), restarts=c.center_restarts)
        centers = kmeans.fit(lambda: [sample], options, seed=seed).centers
        # 2. The most certain nouns of each.
        words = merged(self._lists(), verbatim=c.verbatim)
        rows = torch.from_numpy(words.embeddings if bank is None else bank.read())
        if rows.shape[1] != sample.shape[1]:
            raise DataError(f"method.vocabulary: words have {rows.shape[1]} values, the rows {sample.shape[1]}")
        scores = nouns.score_nouns(centers.cpu(), rows)
        chosen = nouns.choose_nouns(scores, c.nouns_per_center)
        columns = {
            "word": [words.words[place] for place in chosen.tolist()],
            "center": scores.centers[chosen].int().numpy(),
            "confidence": scores.confidence[chosen].numpy(),
            "embedding": tables.fixed_list(functional.normalize(rows[chosen], dim=1).numpy()),
        }
        table = pa.table(columns, schema=tables.NOUNS(rows.shape[1]))
        counts = {"words": len(words.words), "centers": len(centers), "nouns": len(chosen)}
        return put_table(self.run, self.run.nouns, table), counts

    def retrieve(self, task: Task) -> TaskResult:
        """Write the counterparts of one part's rows."""
        torch.set_num_threads(1)
        device, start = worker_device(self.config), row_starts(self.encode)[task.index]
        chosen = tables.matrix(tables.read_table(self.run.nouns, ["embedding"])["embedding"])
        transform = transform_of(self.encode, self.config.features)
        x = unit_rows(torch.from_numpy(part_features(self.run, task.index, transform))).to(device)
        words, c = torch.from_numpy(chosen.copy()).to(device), self.method
        texts = nouns.counterparts(x, words, c.retrieval_temperature, c.retrieval_nouns).half().cpu().numpy()
        columns = [pa.array(np.arange(start, start + len(texts))), tables.fixed_list(texts)]
        table = pa.table(columns, schema=tables.COUNTERPARTS(words.shape[1]))
        return TaskResult(put_table(self.run, self.run.counterparts(task.index), table), {"rows": len(texts)})

    def search(self, task: Task) -> TaskResult:
        """Write the neighbours in text space of the rows of a task's parts, among the fitted rows."""
        torch.set_num_threads(1)
        starts, aside = row_starts(self.encode), kept_aside(self.run, self.encode.outputs_of(EncodeOutputs))
        queries = torch.cat([self._texts(part) for part in task.payload]).to(worker_device(self.config))
        rows = torch.cat([torch.arange(starts[part], starts[part + 1]) for part in task.payload])
        best = RunningTopK(queries, rows, min(self.method.neighbors, fitted_count(self.encode) - 1))
        for part, start in enumerate(starts[:-1]):
            stop = starts[part + 1]
            kept = np.arange(stop - start) if aside is None else np.flatnonzero(~aside[start:stop])
            if len(kept):
                best.update(self._texts(part)[kept], torch.from_numpy(start + kept))
        neighbors, similarity = (found.cpu() for found in best.result())
        uris = {part: self.run.text_neighbors(part) for part in task.payload}
        outputs = put_neighbors(self.run, uris, starts, neighbors.numpy(), similarity.numpy())
        return TaskResult(outputs, {"rows": len(rows)})

    def texts(self, part: int) -> np.ndarray:
        """Return the counterparts of one part's rows as they are stored, Float32[B D]."""
        column = tables.read_table(self.run.counterparts(part), ["embedding"])["embedding"]
        return tables.matrix(column).astype(np.float32)

    def _texts(self, part: int) -> Tensor:
        """Return the same as unit rows, Float32[B D]."""
        return unit_rows(torch.from_numpy(self.texts(part)))

    def _lists(self) -> list[Any]:
        return read_lists(self.config, names=noun_lists(self.config), verbatim=self.method.verbatim)


def run(context: StageContext) -> StageResult:
    """Encode the vocabulary, choose nouns, and make counterparts part by part and their neighbours task by task."""
    config, encode = context.config, context.inputs["encode"]
    encoded, gpus = encode.outputs_of(EncodeOutputs), config.resources.gpus
    if not isinstance(config.method, TacConfig):
        raise ConfigError(f"method.name = {config.method.name}: reads no words")
    fitted, method = fitted_count(encode), config.method
    if config.needs_selection:  # one choice of nouns serves all candidates
        method = method.model_copy(update={"clusters": config.select_k.bounds(fitted)[1]})
    method = method.resolved(fitted)
    work = Guidance(context.run, config, encode, method)
    parts, count, searched = encoded.parts, sum(encoded.parts), ""
    is_approximate = config.neighbors.method == "ivf"
    if config.neighbors.method == "auto":
        is_approximate = count > config.neighbors.exact_rows and not encoded.test
    # 1. The vocabulary's embeddings; its blocks are numbered behind the parts.
    bank = run_remotely(work.bank)
    if bank is not None:
        blocks = range(bank.blocks)
        tasks = [Task(len(parts) + i, digest_of([bank.digest, i]), bank) for i in blocks]
        run_tasks(context.run, "counterparts", tasks, work.encode_words, section="words", gpus=gpus)
    # 2. The nouns.
    outputs, counts = run_remotely(work.choose, bank, config.seed, gpus=gpus)
    # 3. Counterparts, which depend on the nouns.
    [written] = outputs.values()
    tasks = [Task(i, digest_of([context.digest, written["digest"], i]), size=rows) for i, rows in enumerate(parts)]
    results = run_tasks(context.run, "counterparts", tasks, work.retrieve, gpus=gpus)
    drop_stale_parts(context.run.counterparts_folder, len(parts))
    # 4. Their neighbours.
    if method.train:
        rows = search_task_rows(count, encoded.dimension, method.neighbors)
        digest = digest_of([context.digest, written["digest"], "neighbors"])
        first = len(parts) + (bank.blocks if bank else 0)
        tasks = [
            Task(first + task.index, task.digest, task.payload, task.size) for task in group_parts(parts, digest, rows)
        ]
        if is_approximate:
            groups, k = [task.payload for task in tasks], min(method.neighbors, count - 1)
            layout = IvfLayout(
                *(context.run, digest, encoded.starts, groups, rows, encoded.dimension, k, work.texts),
                table=context.run.text_neighbors,
                stage="counterparts",
                first=first,
            )
            found, measured = search_ivf(layout, config.neighbors.min_recall, tasks)
            results += found
            searched = f"; text neighbours by inverted lists, recall@{k} {measured['recall']:.3f}"
            drop_scratch(context.run, first + len(tasks), "counterparts")
        else:
            results += run_tasks(context.run, "counterparts", tasks, work.search, section="neighbours", gpus=gpus)
        drop_stale_parts(storage.join(context.run.counterparts_folder, "neighbors"), len(parts))
    outputs |= {path: file for result in results for path, file in result.outputs.items()}
    summary = f"{counts['nouns']:,} of {counts['words']:,} words chosen by {counts['centers']:,} centres"
    summary += searched
    return StageResult(outputs, {"rows": count} | counts, counts, summary)
