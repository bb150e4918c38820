"""Settings of curation: duplicates, outliers, pruning, a balanced sample; and the presets of the papers.

Apart from `config.py` as a method's settings are: presets belong to the papers behind duplicates.py, outliers.py and
balanced_sampling.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rayclust.settings import Config

Preset = Literal["none", "list", "semdedup", "d4", "hierarchical"]

PRESETS: dict[str, dict[str, Any]] = {
    # Nothing is removed: duplicates and outliers to look at, and the share that each ε would keep.
    "list": {"duplicates": {"remove": False}},
    # arXiv 2303.09540.
    "semdedup": {"duplicates": {"policy": "semdedup"}},
    # arXiv 2308.12284: duplicates to 75 % of the rows, k-means anew, the most prototypical rows out.
    "d4": {
        "duplicates": {"policy": "semdedup", "keep_share": 0.75, "largest_epsilon": 0.3},
        "prune": {"keep": 0.8, "which": "hard"},
    },
    # arXiv 2405.15613.
    "hierarchical": {"sample": {"levels": "auto"}},
}
"""Settings that a preset fills where they are not given."""


class DuplicatesConfig(Config):
    """Near-duplicates, by cosine in the space of the run's neighbours."""

    remove: bool = True
    """Whether duplicates are removed; else they are only listed."""
    epsilon: float = Field(0.03, ge=0, lt=1)
    """ε: rows are near from a cosine of 1 − ε on. Larger removes more."""
    keep_share: float | None = Field(None, gt=0, le=1)
    """Share of the rows to keep; ε is then the one that does so, up to `largest_epsilon`. None takes `epsilon`."""
    largest_epsilon: float = Field(0.1, gt=0, lt=1)
    """Up to which the share kept is measured, in one search; at least `epsilon`."""
    policy: Literal["component", "semdedup", "greedy"] = "greedy"
    """greedy: rows without an earlier kept near row; no two kept rows are near, each removed one has a kept one near.
    component: one row of each group. semdedup: rows without any earlier near row, as published (with cos > 1 − ε)."""
    keep: str = "hard"
    """Order, first is kept first: hard (far from the run's centroid of its cluster), easy (near it), first (by row), or
    a column of `values`, largest first."""
    values: str | None = None
    """Parquet file or URI with the columns `key` and that of `keep`: resolution, bytes, a score."""
    search: Literal["auto", "neighbors", "clusters"] = "auto"
    """neighbors: pairs of the run's neighbours. clusters: rows against their own of √N clusters and `probes` − 1 more.
    auto: neighbors up to `neighbors.exact_rows` rows."""
    probes: int | None = Field(4, ge=1)
    """Clusters that a row is compared with; 1 is its own, as published; None all that an exact result needs."""
    recall_rows: int = Field(1000, ge=0)
    """Rows, drawn by their keys, on which the search is compared with all pairs; 0 leaves it out."""

    @model_validator(mode="after")
    def _consistent(self) -> DuplicatesConfig:
        is_column = self.keep not in ("hard", "easy", "first")
        if is_column and self.values is None:
            raise ValueError(f"keep = {self.keep}: must be hard, easy or first, or a column of the file in `values`")
        if not is_column and self.values is not None:
            raise ValueError(f"values = {self.values}: is not read with keep = {self.keep}")
        return self


class OutliersConfig(Config):
    """Odd rows, by their neighbours and their cluster."""

    share: float = Field(0.001, ge=0, le=0.5)
    """Share of the rows that is flagged, the oddest."""
    remove: bool = False
    """Whether they are removed; else they are only listed."""


class PruneConfig(Config):
    """Pruning by the distance to centroids of a new k-means of what is left, with as many clusters as the method."""

    keep: float = Field(1.0, gt=0, le=1)
    """Share of the rows left that is kept; 1 prunes nothing."""
    which: Literal["hard", "easy"] = "hard"
    """hard keeps rows far from their centroid, for much data; easy near ones, for little."""
    per_cluster: float = Field(0.5, gt=0, le=1)
    """Largest share of a cluster that is dropped."""


class SampleConfig(Config):
    """A sample that is even over the clusters of all levels."""

    rows: int | None = Field(None, ge=1)
    """Rows to draw, copies counted. None draws no sample."""
    levels: tuple[Annotated[int, Field(ge=1)], ...] | Literal["auto", "run"] = "run"
    """Numbers of clusters, finest first. auto: a hundredth of the rows, a tenth of that, and again. run: the run's
    clusters alone."""
    resamples: int = Field(10, ge=0)
    """Times that a level above the first is fitted anew to points drawn evenly from its clusters."""
    weights: Literal["count", "rows"] = "count"
    """Whether a centroid counts once in the next level (as published) or as its rows do."""
    draw: Literal["random", "nearest", "diverse"] = "random"
    """From a cluster: at random by key, nearest to its centroid, or each row the farthest from those before."""
    copies: int = Field(1, ge=1, le=32_767)
    """Times that one row may be drawn."""

    @field_validator("levels")
    @classmethod
    def _fall(cls, levels: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if isinstance(levels, tuple) and sorted(levels, reverse=True) != list(levels):
            raise ValueError("should fall, the finest level first")
        return levels


class CurateConfig(Config):
    """The stage curate, in runs that name a preset; settings that are given win over the preset's."""

    preset: Preset = "none"
    """none: no such stage. list: duplicates and outliers are listed, nothing is removed. semdedup: duplicates out. d4:
    duplicates out, then the most prototypical rows. hierarchical: duplicates out, then a balanced sample of
    `sample.rows`."""
    duplicates: DuplicatesConfig = DuplicatesConfig()
    outliers: OutliersConfig = OutliersConfig()
    prune: PruneConfig = PruneConfig()
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        preset = PRESETS.get(str(tree.get("preset")), {})
        groups = {
            name: values | tree[name] if isinstance(tree.get(name), dict) else tree.get(name, values)
            for name, values in preset.items()
        }
        return tree | groups

    @model_validator(mode="after")
    def _complete(self) -> CurateConfig:
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if self.preset == "none" and changed:
            raise ValueError(f"{changed[0]}: has no effect without a preset; name one, such as preset: list")
        if self.preset == "hierarchical" and self.sample.rows is None:
            raise ValueError("sample.rows: this key is required by the preset hierarchical, the rows to draw")
        if self.duplicates.keep_share is None and self.duplicates.epsilon > self.duplicates.largest_epsilon:
            bound = self.duplicates.largest_epsilon
            raise ValueError(
                f"duplicates.epsilon = {self.duplicates.epsilon}: must be at most largest_epsilon, {bound}"
            )
        return self
