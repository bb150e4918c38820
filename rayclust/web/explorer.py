"""Questions about a run that its page asks: clusters, their images, search, neighbours, edits. Knows no HTTP."""

from __future__ import annotations

import csv
import io
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayclust.config import RunConfig
from rayclust.errors import ArtefactError, ConfigError
from rayclust.export.rows import RunRows
from rayclust.report.payload import base64_of, map_columns
from rayclust.report.thumbnails import thumbnail
from rayclust.runtime.edits import ShownClusters, edit_clusters, shown_clusters, undo_edit
from rayclust.runtime.rows import table_at
from rayclust.runtime.spaces import learnt_index
from rayclust.stages.search import Searcher
from rayclust.store import storage, tables
from rayclust.store.sources import fetch_many
from rayclust.web.comparison import Comparison
from rayclust.web.encoding import QueryEncoder
from rayclust.web.rows import RowIndex

SIZES = (160, 1024)
"""Pixels on the shorter side of pictures: of a list, and of one alone."""
MAX_ASPECT = 8.0
"""How many times longer than wide a large picture may be."""
CACHE_BYTES = 64 << 20
"""Of pictures that are kept."""
TYPICAL = 6
"""Pictures of a cluster in the list."""
NEIGHBORS = 24
"""Neighbours of an image that are shown."""
LOOKED_AT = 3
"""Images that are tried to know whether a run of ready embeddings has any."""
MAP_POINTS = 200_000
"""Most points of the map."""
CSV_ROWS = 2000
"""Rows of a table that are made at once."""
SELECTIONS = "selections"
"""Folder below the run of saved selections: a text file for each, a key a line."""
_SELECTION = re.compile(r"[\w -]{1,60}")
_BOUND = re.compile(r"(size|confidence|purity)([<>])(\d{1,15})")
"""A word of the list's filter that bounds a number: of images, or percent."""
SORTS = ("size", "number", "name", "confidence", "purity")


@dataclass(frozen=True)
class _State:
    """The clusters as they are after an edit; replaced as a whole by the next."""

    shown: ShownClusters
    clusters: dict[int, dict[str, Any]]
    """What the list shows of each, by number, largest first."""
    moved: dict[int, NDArray[np.int64]]
    """Rows that splits moved, by where they are now."""
    moved_rows: frozenset[int]
    """All of them."""


class Explorer:
    """A run with what is asked of it again and again at hand. Methods may be called from several threads.

    Args:
        config: the run's.
        against: of another run over the same images, to compare with.

    Raises:
        ArtefactError: the run, or the other one, has no clusters, or those of the run are not labelled.
        DataError: the runs have no image in common.
    """

    def __init__(self, config: RunConfig, against: RunConfig | None = None) -> None:
        self.config = config
        self._rows = RunRows(config)
        self._run = self._rows.run
        if not self._rows.is_labelled:
            raise ArtefactError(f"{self._run.uri}: is not labelled: run `rayclust label RUN.yaml` first")
        self._index = RowIndex(self._rows)
        self._searcher, self._encoder = Searcher(config), QueryEncoder(config)
        self._pictures = OrderedDict[tuple[int, int], bytes]()
        self._lock, self._searching = threading.Lock(), threading.Lock()
        self._neighbors = lru_cache(4)(self._read_neighbors)
        self._learnt = learnt_index(config)
        self._has_pictures = config.encoder.name != "unknown"
        if not self._has_pictures:  # ready embeddings, whose images may be at hand
            some = np.unique(np.linspace(0, self._rows.count - 1, LOOKED_AT, dtype=np.int64))
            found = fetch_many([record["uri"] for record in self._index.records(some)], config.images.columns)
            self._has_pictures = any(data is not None for _, data in found)
        self._plane: tuple[NDArray[np.int64], dict[str, str]] | None = None
        """The rows of the map, Int64[n] sorted, and their places."""
        self._own = tables.read_table(self._run.clusters).to_pylist()
        cells = self._run.contingency
        self._cells = tables.read_table(cells).to_pylist() if storage.exists(cells) else []
        self._state = self._load(self._rows.shown)
        self._comparison = None if against is None else Comparison(self._index.keys, RunRows(against))

    def facts(self) -> dict[str, Any]:
        """Return what the page says of the whole run."""
        state = self._state
        return {
            "run": self._run.uri,
            "method": self.config.method.name,
            "encoder": ", ".join(encoder.name for encoder in self.config.each_encoder),
            "images": self._rows.count,
            "clusters": len(state.clusters),
            "reads_text": self.config.text_encoder.family == "open_clip",
            "has_labels": bool(self._cells),
            "has_pictures": self._has_pictures,
            "is_mapped": self._rows.is_mapped,
            "against": None if self._comparison is None else self._comparison.uri,
            "edits": len(state.shown.overlay.edits),
            "unfit": [
                {"edit": each.edit.model_dump(mode="json"), "reason": each.reason} for each in state.shown.overlay.unfit
            ],
        }

    def clusters(
        self, *, sort: str = "size", descending: bool = True, query: str = "", offset: int = 0, limit: int = 100
    ) -> dict[str, Any]:
        """Return clusters of a page of the list, and how many there are in all.

        Args:
            sort: one of `SORTS`; clusters without a value come last.
            descending: largest first.
            query: only those in whose name, number, mark or most common class each of its words is; `size>100`,
                `confidence<60` and `purity<50` bound the number of images and shares in percent.
            offset: clusters before the page.
            limit: clusters of the page.
        """
        if sort not in SORTS:
            raise ConfigError(f"sort = {sort}: must be one of {', '.join(SORTS)}")
        found = list(self._state.clusters.values())
        for word in query.casefold().split():
            parsed = _BOUND.fullmatch(word)
            if parsed is None:
                found = [each for each in found if word in each["search"]]
                continue
            name, sign, number = parsed.groups()
            bound = int(number) / (1 if name == "size" else 100)
            found = [each for each in found if each[name] is not None]
            found = [each for each in found if (each[name] > bound if sign == ">" else each[name] < bound)]
        known = [each for each in found if each[sort] is not None]
        known.sort(key=lambda each: (each[sort], -each["number"]), reverse=descending)
        known += [each for each in found if each[sort] is None]
        page = known[offset : offset + limit]
        return {
            "total": len(known),
            "images": sum(each["size"] for each in known),
            "clusters": [{name: value for name, value in each.items() if name != "search"} for each in page],
        }

    def cluster(self, number: int) -> dict[str, Any]:
        """Return one cluster as the list has it, with its other names; raise `ConfigError` if it is not shown."""
        found = self._state.clusters.get(number)
        if found is None:
            raise ConfigError(f"there is no cluster {number}")
        others = self._own[number]["runners_up"] if number < len(self._own) else []
        return found | {"runners_up": [other["name"] for other in others]}

    def members(self, number: int) -> NDArray[np.int64]:
        """Return the rows of a shown cluster, Int64[n]: of each cluster that went into it, the most certain first."""
        self.cluster(number)
        state, edited = self._state, self._state.shown.edited
        moved = np.fromiter(state.moved_rows, np.int64, len(state.moved_rows))
        pieces = []
        for cluster in np.flatnonzero(edited.final[: edited.clusters] == number).tolist():
            rows = self._index.order[self._index.bounds[cluster] : self._index.bounds[cluster + 1]]
            if len(moved) and (is_moved := np.isin(rows, moved)).any():  # else they stay mapped
                rows = rows[~is_moved]
            pieces.append(rows)
        pieces += [state.moved[number]] if number in state.moved else []
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.int64), *pieces])

    def images(self, number: int, *, odd_first: bool = False, offset: int = 0, limit: int = 100) -> dict[str, Any]:
        """Return images of a page of a cluster, and how many it has in all."""
        rows = self.members(number)
        rows = rows[::-1] if odd_first else rows
        return {"total": len(rows), "images": self.records(rows[offset : offset + limit])}

    def records(self, rows: Sequence[int] | NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return some images as lists show them, in their order; raise `ConfigError` if there is no such row.

        Each has row, key, uri, label, confidence, cluster and its name.
        """
        self._check(rows)
        rows = np.array(rows, np.int64)
        shown, found = self._state.shown, self._index.records(rows)
        keys = pa.array([record["key"] for record in found], pa.string())
        clusters = shown.edited.of(self._index.clusters[rows], keys).tolist()
        return [
            record | {"cluster": cluster, "name": shown.names.get(cluster)}
            for record, cluster in zip(found, clusters, strict=True)
        ]

    def map(self) -> dict[str, Any]:
        """Return the map of all rows, or of an even sample of many, with the clusters as edited.

        Returns:
            x and y as `payload.map_columns`; row, Float64, and cluster, UInt32, each point's place among `clusters`, in
            base64; `count`; number and name of each of the `clusters`, largest first.

        Raises:
            ArtefactError: the run has no map.
        """
        if self._plane is None:
            if not self._rows.is_mapped:
                raise ArtefactError(f"{self._run.uri}: has no map: run `rayclust map RUN.yaml` first")
            rows = np.arange(self._rows.count)
            if len(rows) > MAP_POINTS:
                rows = np.sort(np.random.default_rng(0).choice(len(rows), MAP_POINTS, replace=False))
            places = table_at(self._run.map, self._rows.starts, rows, ["x", "y"])
            self._plane = rows, map_columns(places["x"].to_numpy(), places["y"].to_numpy())
        rows, columns = self._plane
        state, now = self._state, self._now()[rows]
        place_of = np.zeros(len(state.shown.edited.final), "<u4")
        place_of[list(state.clusters)] = np.arange(len(state.clusters))
        return columns | {
            "row": base64_of(rows.astype("<f8")),
            "cluster": base64_of(place_of[now]),
            "count": len(rows),
            "clusters": [[number, each["name"]] for number, each in state.clusters.items()],
        }

    def image(self, row: int) -> dict[str, Any]:
        """Return one image with its neighbours, nearest first, in the learnt space if pixels were learnt from.

        Raises:
            ConfigError: there is no such row.
        """
        [found] = self.records([row])
        part = int(np.searchsorted(self._rows.starts, row, side="right")) - 1
        ids, similarity = np.zeros(0, np.int64), np.zeros(0, np.float32)
        if self._learnt is not None:
            ids, similarity = (column[0] for column in self._learnt.neighbors(np.array([row]), NEIGHBORS))
        elif self._rows.neighbors is not None:
            ids, similarity = (column[row - self._rows.starts[part]][:NEIGHBORS] for column in self._neighbors(part))
        near = [
            record | {"similarity": round(float(s), 4)}
            for record, s in zip(self.records(ids[ids >= 0]), similarity[ids >= 0], strict=True)
        ]
        return found | {"neighbors": near}

    def search(self, *, text: str | None = None, data: bytes | None = None, top: int = 100) -> list[dict[str, Any]]:
        """Return the images nearest to words, or to an encoded image, with their cosines.

        Raises:
            ConfigError: the encoder reads no text, or there are no words, or too many.
            DataError: the data is no image.
            RayclustError: the run is not indexed.
        """
        if text is not None:
            text = text.strip()
            if not text or len(text) > 1000:
                raise ConfigError("text: give some words, at most 1,000 letters")
        with self._searching:  # one encoder, and its memory, at a time
            [space] = self._searcher.resolve(None, has_text=text is not None)
            query = self._encoder.encode(data or b"" if text is None else text, space)
            near = self._searcher.nearest(query, space, max(1, top))
        records = self.records(list(near))
        return [record | {"similarity": round(near[record["row"]], 4)} for record in records]

    def picture(self, row: int, size: int) -> bytes:
        """Return an image as webp, at one of `SIZES`; a placeholder where it cannot be read. Recent ones are kept."""
        self._check([row])
        if size not in SIZES:
            raise ConfigError(f"size = {size}: must be one of {', '.join(map(str, SIZES))}")
        with self._lock:
            if (row, size) in self._pictures:
                self._pictures.move_to_end((row, size))
                return self._pictures[row, size]
        [record] = self._index.records(np.array([row]))
        [(_, data)] = fetch_many([record["uri"]], self.config.images.columns)
        # Small ones are cropped to stand side by side; a large one is shown whole, unless it is a ribbon.
        made = thumbnail(data or b"", size) if size == SIZES[0] else thumbnail(data or b"", size, MAX_ASPECT)
        with self._lock:
            self._pictures[row, size] = made
            kept = sum(map(len, self._pictures.values()))
            while kept > CACHE_BYTES:
                kept -= len(self._pictures.popitem(last=False)[1])
        return made

    def edit(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Add an edit, given as its JSON; a split may name `rows` instead of keys. Return the facts of the run.

        Raises:
            ConfigError: it is no edit, or of a cluster that is not shown.
            HeldError: somebody else has edited the clusters meanwhile.
        """
        content = dict(content)
        if "rows" in content:
            rows = content.pop("rows")
            if not isinstance(rows, list) or not all(isinstance(row, int) for row in rows):
                raise ConfigError("edit: rows must be a list of numbers")
            self._check(rows)
            content["keys"] = [record["key"] for record in self._index.records(np.array(rows, np.int64))]
        edit_clusters(self._run, content)
        return self._reload()

    def undo(self) -> dict[str, Any]:
        """Take back the last edit; return the facts of the run."""
        undo_edit(self._run)
        return self._reload()

    def table(self, clusters: Sequence[int], rows: Sequence[int]) -> Iterator[str]:
        """Yield CSV of all images of some clusters and of some rows besides, a line per image.

        Raises:
            ConfigError: at its first line, if there is no such cluster or row.
        """
        self._check(rows)
        groups = [self.members(number) for number in clusters] + [np.array(rows, np.int64)]
        names = ("row", "key", "uri", "label", "cluster", "name", "confidence")
        yield ",".join(names) + "\r\n"
        for group in groups:
            for start in range(0, len(group), CSV_ROWS):
                buffer = io.StringIO()
                writer = csv.DictWriter(buffer, names)
                writer.writerows(self.records(group[start : start + CSV_ROWS]))
                yield buffer.getvalue()

    def compare(self) -> dict[str, Any]:
        """Return how far the run agrees with the other one, see `Comparison.facts`; raise `ConfigError` without one."""
        return self._other().facts(self._now(), self._state.shown)

    def flow(self, source: int, target: int, *, offset: int = 0, limit: int = 100) -> dict[str, Any]:
        """Return images of a page of those in one cluster here and in another in the other run, and their number."""
        other = self._other()
        rows = np.flatnonzero((self._now() == source) & (other.clusters == target))
        names = {"from_name": self._state.shown.names.get(source), "to_name": other.names.get(target)}
        return {"total": len(rows), "images": self.records(rows[offset : offset + limit])} | names

    def selections(self) -> dict[str, int]:
        """Return the number of images of each saved selection, by name."""
        files = storage.walk(self._run.at(SELECTIONS), suffixes=(".txt",), missing_ok=True)
        return {file.key.removesuffix(".txt"): storage.read_bytes(file.uri).count(b"\n") for file in files}

    def select(self, name: str, rows: Sequence[int]) -> dict[str, int]:
        """Save the keys of some rows under a name, in place of what is there; none removes it. Return all selections.

        Raises:
            ConfigError: the name has other characters than letters, digits, spaces, - and _, or there is no such row.
        """
        uri = self._selection(name)
        self._check(rows)
        keys = [record["key"] for record in self._index.records(np.unique(np.array(rows, np.int64)))]
        if any("\n" in key for key in keys):
            raise ConfigError("selection: a key holds a line break; save the table instead")
        if keys:
            storage.write_bytes(uri, "".join(f"{key}\n" for key in keys).encode())
        else:
            storage.remove(uri)
        return self.selections()

    def selected(self, name: str) -> list[dict[str, Any]]:
        """Return the images of a saved selection that the run still has."""
        try:
            keys = storage.read_bytes(self._selection(name)).decode().splitlines()
        except storage.MissingError:
            raise ConfigError(f"there is no selection {name}") from None
        return self.records(self._index.find(pa.array(keys, pa.string()))[0])

    def _selection(self, name: str) -> str:
        if not _SELECTION.fullmatch(name):
            raise ConfigError(f"selection = {name!r}: needs 1 to 60 letters, digits, spaces, - and _")
        return self._run.at(SELECTIONS, f"{name}.txt")

    def _other(self) -> Comparison:
        if self._comparison is None:
            raise ConfigError("there is no run to compare with: rayclust explore RUN --against OTHER")
        return self._comparison

    def _now(self) -> NDArray[np.int32]:
        """Return the shown cluster of every row, Int32[N]."""
        state = self._state
        found = np.asarray(state.shown.edited.final[self._index.clusters], np.int32)
        for number, rows in state.moved.items():
            found[rows] = number
        return found

    def _reload(self) -> dict[str, Any]:
        shown = shown_clusters(self._run)
        if shown is not None:
            self._state = self._load(shown)
        return self.facts()

    def _check(self, rows: Iterable[int]) -> None:
        for row in rows:
            if not 0 <= row < self._rows.count:
                raise ConfigError(f"there is no row {row} among {self._rows.count:,}")

    def _read_neighbors(self, part: int) -> tuple[NDArray[Any], NDArray[Any]]:
        table = tables.read_table(self._run.neighbors(part), ["neighbors", "similarity"])
        return tables.matrix(table["neighbors"]), tables.matrix(table["similarity"])

    def _load(self, shown: ShownClusters) -> _State:
        """Work out the list of clusters."""
        edited = shown.edited
        # 1. Rows that splits moved, by where they are now.
        rows, keys = self._index.find(edited.split_keys)
        now = edited.of(self._index.clusters[rows], keys) if len(rows) else np.zeros(0, np.int32)
        stay = edited.final[self._index.clusters[rows]] if len(rows) else now
        rows, now, stay = rows[now != stay], now[now != stay], stay[now != stay]
        moved = {int(number): rows[now == number] for number in np.unique(now)}
        # 2. Sizes and sums of confidence, of all that went into a cluster, without what was moved.
        sizes, sums = (np.zeros(len(edited.final)) for _ in range(2))
        np.add.at(sizes, edited.final[: edited.clusters], [each["size"] for each in self._own])
        np.add.at(sums, edited.final[: edited.clusters], self._index.confidence_sums)
        certain = self._index.confidence[rows]
        for place, sign in ((now, 1), (stay, -1)):
            np.add.at(sizes, place, np.full(len(place), sign))
            np.add.at(sums, place, sign * certain)
        # 3. The most common class, of the clusters that went into one.
        classes = dict[int, dict[str, int]]()
        for cell in self._cells:
            found = classes.setdefault(int(edited.final[cell["cluster"]]), {})
            found[cell["label"]] = found.get(cell["label"], 0) + cell["count"]
        # 4. The rows that stand for each, in turn from all that went into it.
        state, groups = _State(shown, {}, moved, frozenset(rows.tolist())), dict[int, list[list[int]]]()
        for each in self._own:
            own = [row for row in each["exemplars"] if row not in state.moved_rows]
            groups.setdefault(int(edited.final[each["cluster"]]), []).append(own)
        for number, here in moved.items():
            groups.setdefault(number, []).append(here[:TYPICAL].tolist())
        typical = {
            number: [group[i] for i in range(TYPICAL) for group in some if i < len(group)][:TYPICAL]
            for number, some in groups.items()
        }
        # 5. The list, large clusters first.
        for number in sorted(edited.shown, key=lambda number: (-sizes[number], number)):
            if not sizes[number]:
                continue
            counts, name, mark = classes.get(number, {}), shown.names[number], edited.marks.get(number)
            label = max(counts, key=lambda each: counts[each]) if counts else None
            state.clusters[number] = {
                "number": number,
                "name": name,
                "mark": mark,
                "size": int(sizes[number]),
                "confidence": round(float(sums[number] / sizes[number]), 4),
                "label": label,
                "purity": round(counts[label] / sum(counts.values()), 4) if label is not None else None,
                "typical": typical.get(number, []),
                "search": " ".join(filter(None, (name, f"#{number}", mark, label))).casefold(),
            }
        return state
