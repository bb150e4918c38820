"""`rayclust.run` and `rayclust.load`: a run from Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa

from rayclust.config import RunConfig, validate
from rayclust.errors import ArtefactError
from rayclust.stages.pipeline import run_all
from rayclust.stages.quick import anchored, load_config, load_run
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run, parts
from rayclust.store.manifest import read_json_output


def run(config: RunConfig | Mapping[str, Any] | str, overrides: Sequence[str] = ()) -> RunTables:
    """Runs every stage that is not done.

    Args:
        config: a RUN.yaml's path or URI, its content as a mapping, or a `RunConfig`.
        overrides: `KEY=VALUE` items, for a path or URI.

    Returns:
        The run's tables.

    Raises:
        RayclustError: what the command line would say.
    """
    if isinstance(config, str):
        settings = load_config(config, overrides)
    else:
        settings = anchored(config if isinstance(config, RunConfig) else validate(dict(config)))
    run_all(settings)
    return load(settings.run)


def load(run: str) -> RunTables:
    """The run below a folder or URI; tables are read when they are asked for.

    Raises:
        ArtefactError: there is no run.
    """
    return RunTables(load_run(run))


class RunTables:
    """What a run has written so far."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        """What the run was last started with."""
        self._run = Run(config.run)

    def iter(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The parts of a table in order, one at a time.

        Args:
            name: embeddings, rejects, neighbors or assignments.
            columns: the columns to read; None reads all.

        Raises:
            ArtefactError: a part is missing or damaged.
        """
        return tables.iter_tables((uri for _, uri in parts(self._run.at(name))), columns)

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A whole table in memory; see `iter`.

        Raises:
            ArtefactError: the stage that writes it has not begun.
        """
        found = list(self.iter(name, columns))
        if not found:
            raise ArtefactError(f"{self._run.at(name)}: no parts there: the stage that writes them has not run")
        return pa.concat_tables(found)

    @cached_property
    def clusters(self) -> pa.Table:
        """One line a cluster: size, name, score, runners-up, exemplars, outliers."""
        return tables.read_table(self._run.clusters)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Scores.

        Raises:
            ArtefactError: the stage evaluate has not run.
        """
        try:
            scores: dict[str, Any] = read_json_output(self._run, "evaluate", self._run.metrics)
        except filesystem.MissingError:
            raise ArtefactError(f"{self._run.metrics}: is missing: run evaluate first") from None
        return scores

    @property
    def report(self) -> str:
        """URI of the page."""
        return self._run.report
