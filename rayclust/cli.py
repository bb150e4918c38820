"""Command line: one command a stage, and the few that run or show a whole run.

Exit codes: 0 done; 2 the user's mistake, with one line that says what to do; 130 interrupted; 1 anything else. `-v`
shows the traceback.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import textwrap
import threading
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from rayclust import stages
from rayclust.errors import ConfigError, RayclustError
from rayclust.export import FORMATS
from rayclust.report.formats import clean
from rayclust.runtime.log import new_handler

STAGE_COMMANDS = tuple(name for name in stages.NAMES if name != "figures")
"""Stages whose command takes a RUN.yaml; figures has one of its own."""
IN_A_WORD = {
    "encode": "images to embeddings",
    "neighbors": "each row's nearest rows",
    "counterparts": "each image's nearest words",
    "select-k": "the number of clusters, where it is open",
    "train": "fit the method",
    "consensus": "one partition of many",
    "assign": "the cluster of every row",
    "label": "names, typical and odd images",
    "curate": "near-duplicates and odd images",
    "index": "search by image and words",
    "map": "a place on the plane for each row",
    "evaluate": "scores, with labels or without",
    "figures": "drawings and the numbers behind them",
    "report": "one page of it all",
}
"""What each stage is about, for the list of commands."""
_NEXT = "rayclust explore {run}; rayclust export {run} --to FORMAT --out FILE; rayclust predict {run} IMAGES --out FILE"
RESUMED = frozenset({"quick", "run", "compare", "predict", "demo", *STAGE_COMMANDS})
"""Commands that go on where they were when the same line is given again."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
FIRST_WORD_SECONDS = 0.3


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    verbose = bool({"-v", "--verbose"} & set(arguments))
    try:
        result = commands.main(list(arguments), standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        goes_on = any(argument in RESUMED for argument in arguments[:2])  # behind -v, where that comes first
        return _fail("interrupted" + (": run the same line again to go on" if goes_on else ""), INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except RayclustError as error:
        return _fail(str(error), error.exit_code, verbose)
    except Exception as error:  # noqa: BLE001 - the outermost frame: whatever is left becomes one line and exit code 1
        line = (str(error).strip().splitlines() or ["no message"])[-1]
        return _fail(f"unexpected {type(error).__name__}: {line} (-v shows the traceback)", 1, verbose)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int, verbose: bool = False) -> int:
    if verbose:
        logging.getLogger(__name__).exception("rayclust failed")
    click.echo(f"rayclust: {clean(' '.join(message.split()))}", err=True)
    return code


class _Commands(click.Group):
    """Commands in the order in which they are used: those of whole runs, then the stages as a run does them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands, key=lambda name: stages.NAMES.index(name) if name in stages.NAMES else -1)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        limit = formatter.width - 6 - max(map(len, self.commands))
        names = self.list_commands(ctx)
        sections = {
            "Commands": [(name, self.commands[name].get_short_help_str(limit)) for name in names],
            "Stages, in order": [(name, IN_A_WORD.get(name, "")) for name in stages.NAMES],
        }
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl([row for row in rows if (row[0] in stages.NAMES) == (title != "Commands")])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="rayclust")
@click.option("-v", "--verbose", is_flag=True, help="Show debug lines, and the traceback of an error.")
@click.pass_context
def commands(context: click.Context, verbose: bool) -> None:
    """From a bucket of unlabelled images to named, measured clusters."""
    # Ray warns of things that a user of rayclust cannot act on.
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    package = logging.getLogger("rayclust")
    package.handlers = [new_handler()]
    package.propagate = False
    package.setLevel(logging.DEBUG if verbose else logging.INFO)
    # The libraries take seconds to load; a mistake that is found without them is still one line.
    timer = threading.Timer(FIRST_WORD_SECONDS, _say_loading, [context.invoked_subcommand])
    timer.daemon = True
    timer.start()


def _say_loading(command: str) -> None:
    if not hasattr(sys.modules.get("rayclust.runtime.api"), "load_config"):
        logging.getLogger(__name__).info("%s: loading libraries", command)


_FORCE = click.option("--force", is_flag=True, help="Run again even what is done.")
_VERBOSE = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, is_eager=True, help="Show the traceback of an error."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def _complete_method(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from rayclust.methods import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


def _complete_encoder(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return names of encoders; those of timm only once the family is there, as its list takes seconds."""
    found, spec = ["auto", "pixels", "timm/"], find_spec("open_clip")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found += [f"open_clip/{path.stem}" for path in sorted((Path(folder) / "model_configs").glob("*.json"))]
    if incomplete.startswith("timm/"):
        from timm import list_models

        found = [f"timm/{name}" for name in list_models()]
    return [name for name in found if name.startswith(incomplete)]


@commands.command(short_help="Everything in one line: from images to a report.")
@click.argument("images")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--out", required=True, help="Folder or s3:// URI of the run.")
@click.option(
    "--clusters", default="10", show_default=True, help="Number of clusters, or auto, or some to try: 5,8,10."
)
@click.option(
    "--method",
    default="auto",
    show_default=True,
    shell_complete=_complete_method,
    help="auto, kmeans, temi, cpp, spectral, propos …",
)
@click.option(
    "--encoder",
    default=None,
    shell_complete=_complete_encoder,
    help="open_clip/ARCH, timm/ARCH or pixels.  [default: what the machine can do]",
)
@_JSON
@_VERBOSE
def quick(images: str, overrides: tuple[str, ...], *, out: str, as_json: bool, **settings: Any) -> None:
    """Do everything in one line: encode IMAGES, cluster, name, measure, and write a report below --out."""
    from rayclust.runtime.api import quick as run_quick

    _show_result(run_quick(images, out, overrides=overrides, **settings), as_json)


@commands.command(short_help="A RUN.yaml to start from, with every key explained.")
@click.argument("config", default="RUN.yaml")
@click.option("--images", required=True, help="Folder, tars, tables or embeddings: what images.uri takes.")
@click.option("--run", default="run", show_default=True, help="Folder or s3:// URI of the run.")
@click.option(
    "--method", default="auto", show_default=True, shell_complete=_complete_method, help="Its keys are listed."
)
@click.option("--clusters", default="10", show_default=True, help="Number of clusters, or auto, or some: [5,8,10].")
@_VERBOSE
def init(config: str, **settings: str) -> None:
    """Write CONFIG (RUN.yaml) with every key as a comment, and its JSON schema for editors beside it."""
    from rayclust.config import RunConfig, parse
    from rayclust.methods import METHODS
    from rayclust.runtime.api import SCHEMA_FILE, starter, with_absolute_paths
    from rayclust.store import storage

    path = Path(config)
    if path.exists():
        raise ConfigError(f"{config}: is there already; name another file")
    if settings["method"] not in METHODS:
        raise ConfigError(f"--method {settings['method']}: must be one of {', '.join(METHODS)}")
    text = starter(**settings)
    with_absolute_paths(parse(text, source=config))
    storage.write_bytes(config, text.encode())
    schema = json.dumps(RunConfig.model_json_schema(), indent=2)
    storage.write_bytes(str(path.with_name(SCHEMA_FILE)), schema.encode())
    click.echo(f"{config} is written; next: rayclust check {config}, then rayclust run {config}")


@commands.command(short_help="All stages of a RUN.yaml that are not done yet.")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@_FORCE
@_JSON
@_VERBOSE
def run(config: str, overrides: tuple[str, ...], *, force: bool, as_json: bool) -> None:
    """Run all stages of the run in CONFIG (RUN.yaml, or - for standard input) that are not done yet."""
    from rayclust.runtime.api import load_config
    from rayclust.runtime.pipeline import run_all

    settings = load_config(config, overrides)
    run_all(settings, force=force)
    _show_result(settings.run, as_json)


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@_FORCE
@_VERBOSE
@click.pass_context
def _stage(context: click.Context, config: str, overrides: tuple[str, ...], force: bool) -> None:
    from rayclust.runtime.api import load_config
    from rayclust.runtime.pipeline import run_stage

    run_stage(str(context.command.name), load_config(config, overrides), force=force)


for _name in STAGE_COMMANDS:
    _about = f": {IN_A_WORD[_name]}" if _name in IN_A_WORD else ""
    _help = f"Run the stage {_name} of the run in CONFIG (RUN.yaml){_about}."
    commands.add_command(click.Command(_name, callback=_stage.callback, params=_stage.params, help=_help))


@commands.command(short_help="Refuse a bad run before it costs money.")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@_JSON
@_VERBOSE
def check(config: str, overrides: tuple[str, ...], *, as_json: bool) -> int:
    """Refuse a bad run before it costs money: config, access, encoder, a sample of inputs, estimates."""
    from rayclust.runtime.api import load_config

    settings = load_config(config, overrides)
    from rayclust.runtime.preflight import check as run_check  # torch comes only where the config is good

    findings = run_check(settings)
    if as_json:
        _print_json([vars(finding) for finding in findings])
    bad = sum(not finding.good for finding in findings)
    for finding in () if as_json else findings:
        _print_line(f"{'ok  ' if finding.good else 'FAIL'}  {finding.subject:<10} ", finding.text)
    if not as_json:
        mend = f"mend {'this' if bad == 1 else f'these {bad}'}, then check again" if bad else f"rayclust run {config}"
        click.echo(f"next: {mend}")
    return 2 if bad else 0


@commands.command(short_help="The same as `run`, as a job of a Ray cluster.")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--address", default=None, help="The cluster's dashboard, http://HOST:8265; else RAY_API_SERVER_ADDRESS.")
@click.option("--no-wait", "action", flag_value="no-wait", help="Submit, and do not follow the job.")
@click.option("--follow", "action", flag_value="follow", help="Submit nothing; follow the last job of this run.")
@click.option("--stop", "action", flag_value="stop", help="End this run's job; what it finished stays.")
@click.option("--stage", default=None, type=click.Choice(STAGE_COMMANDS), help="Only this stage.")
@click.option("--shared-paths", is_flag=True, help="The cluster's nodes see this machine's paths.")
@_VERBOSE
def submit(
    config: str,
    overrides: tuple[str, ...],
    *,
    address: str | None,
    action: Any,
    stage: str | None,
    shared_paths: bool,
) -> int:
    """Submit `run` as a job of a Ray cluster, show its log, end with its exit code.

    The same line again follows a job that is under way, and goes on after one that failed.
    """
    from rayclust.runtime.api import load_config
    from rayclust.runtime.jobs import Submission, address_of, submit_run

    url, submission = address_of(address), Submission(load_config(config, overrides), stage or "run")
    return submit_run(submission, url, partial(click.echo, nl=False), action=action, shared_paths=shared_paths)


@commands.command(short_help="What is done, what is missing, and how it went.")
@click.argument("run_uri", metavar="RUN")
@_JSON
@_VERBOSE
def status(run_uri: str, *, as_json: bool) -> None:
    """Show what of RUN is done and what is missing, rates and rejects, health of the clusters."""
    from rayclust.runtime.status import facts, lines

    if as_json:
        _print_json(facts(run_uri))
        return
    for line in lines(run_uri):
        # The names of stages stand apart, and what is said of them below each other.
        start = 13 if line.startswith("  ") else 0
        _print_line(line[:start], line[start:])


@commands.command(short_help="Images nearest to an image or to words.")
@click.argument("run_uri", metavar="RUN")
@click.option("--image", default=None, help="An image file or URI to search with.")
@click.option("--text", default=None, help="Words to search with, for encoders that read text.")
@click.option(
    "--like", default=None, metavar="KEY", help="One of the run's images to search with: no encoder is loaded."
)
@click.option("--top", default=10, show_default=True, type=click.IntRange(1, 10_000), help="Images to show.")
@click.option(
    "--space",
    default=None,
    help="encoder (default; z where pixels were learnt from), z, both, or one of several encoders.",
)
@_JSON
@_VERBOSE
def search(run_uri: str, *, as_json: bool, **query: Any) -> None:
    """Find the images of RUN nearest to an image or to words; z is the method's own space, for images alone."""
    from rayclust.runtime.api import load_run
    from rayclust.stages.search import as_lines
    from rayclust.stages.search import search as run_search

    found = run_search(load_run(run_uri), **query)
    if as_json:
        _print_json({space: [vars(hit) for hit in hits] for space, hits in found.items()})
    for line in () if as_json else as_lines(found):
        click.echo(clean(line))


@commands.command()
@click.argument("run_uri", metavar="RUN")
@click.option("--out", default=None, help="Folder or URI to write to.  [default: RUN/figures]")
@_JSON
@_VERBOSE
def figures(run_uri: str, out: str | None, *, as_json: bool) -> None:
    """Write the figures of RUN (a run, or its RUN.yaml) as SVG files, with the numbers behind them."""
    from rayclust.runtime.api import load_run
    from rayclust.stages.figures import export

    found = list(export(load_run(run_uri), out))
    if as_json:
        _print_json(found)
    for uri in () if as_json else found:
        click.echo(uri)


@commands.command(short_help="Clusters of new images.")
@click.argument("run_uri", metavar="RUN")
@click.argument("images")
@click.option("--out", required=True, help="Table to write: .parquet or .csv, a path or URI.")
@click.option("--evaluate", is_flag=True, help="Score the clusters against the images' own labels.")
@_JSON
@_VERBOSE
def predict(run_uri: str, images: str, *, out: str, evaluate: bool, as_json: bool) -> None:
    """Assign new IMAGES to the clusters of the frozen RUN."""
    from rayclust.runtime.api import load_run
    from rayclust.stages.predict import predict as run_predict

    found = run_predict(load_run(run_uri), images, out, evaluate=evaluate)
    if as_json:
        _print_json({"out": out} | found)
        return
    click.echo(f"{found['rows']:,} images and {found['rejects']:,} rejects in {out}")
    if evaluate:
        shown = ", ".join(f"{name} {score:.4f}" for name, score in found.items() if isinstance(score, float))
        click.echo(f"{found['labelled']:,} images with a label: {shown}")


@commands.command(short_help="A run as a page to work in: all images, search, edits.")
@click.argument("run_uri", metavar="RUN")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen; from other machines a token is needed."
)
@click.option("--port", default=8008, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--against", metavar="OTHER", help="A run over the same images to compare with.")
@click.option("--atlas", is_flag=True, help="Export the run and open it in embedding-atlas instead.")
@_VERBOSE
def explore(run_uri: str, *, host: str, port: int, against: str | None, atlas: bool) -> None:
    """Serve RUN as a page: all images of a cluster, search, neighbours; rename, merge and split clusters.

    Needs the extra explore. Listens on this machine alone unless --host says otherwise. Ctrl-C ends it.
    """
    from rayclust.runtime.api import load_run

    if atlas:
        from rayclust.export.tables import open_atlas

        open_atlas(load_run(run_uri), host, port)
        return
    try:
        from rayclust.web.app import serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"explore needs {error.name}: pip install 'rayclust[explore]'") from None
    other = None if against is None else load_run(against)
    serve(load_run(run_uri), host=host, port=port, show=partial(click.echo), against=other)


@commands.command(name="export", short_help="Take a run home in the formats of other tools.")
@click.argument("run_uri", metavar="RUN")
@click.option("--to", required=True, type=click.Choice(list(FORMATS)), help="Format.")
@click.option("--out", required=True, help="File (atlas, table) or folder to write, a path or URI.")
@click.option("--images", is_flag=True, help="Put the images in: thumbnails for atlas, the files for hf.")
@click.option("--push", metavar="OWNER/NAME", help="With hf: upload it to Hugging Face's hub too, private if new.")
@_JSON
@_VERBOSE
def export_run(run_uri: str, *, as_json: bool, **settings: Any) -> None:
    """Write the rows of RUN with their clusters, as they are named and edited, for other tools.

    See docs/explore.md for the formats.
    """
    from rayclust.export import export
    from rayclust.runtime.api import load_run

    found = export(load_run(run_uri), **settings)
    if as_json:
        _print_json(found)
        return
    missing = f"; {found['missing']:,} of their images cannot be read" if found.get("missing") else ""
    pushed = f"; {found['pushed']}" if "pushed" in found else ""
    click.echo(f"{found['rows']:,} images in {found['out']} ({found['files']:,} files){missing}{pushed}")


@commands.command(short_help="K-means under several encoders, one table.")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@_JSON
@_VERBOSE
def compare(config: str, overrides: tuple[str, ...], *, as_json: bool) -> None:
    """Score k-means on the input of CONFIG under several encoders: encoder.name=[A,B], others KEY=VALUE for all."""
    from rayclust.stages.compare import as_lines
    from rayclust.stages.compare import compare as run_compare

    found = run_compare(config, overrides)
    if as_json:
        _print_json(found)
    for line in () if as_json else as_lines(found):
        click.echo(line)


@commands.command(short_help="The whole path on images that need no download.")
@click.option("--out", default="demo", show_default=True, help="Folder or s3:// URI for images, run and report.")
@_JSON
@_VERBOSE
def demo(out: str, *, as_json: bool) -> None:
    """Run everything on images that need no download: scanned digits, k-means and TEMI side by side."""
    from rayclust.runtime.demo import demo as run_demo
    from rayclust.runtime.demo import table
    from rayclust.store.run import Run

    uri, scores = run_demo(out)
    if as_json:
        _print_json({"run": uri, "report": Run(uri).report, "scores": scores})
        return
    click.echo(f"Scanned digits, {len(next(iter(scores.values())))} seeds, percent:\n{table(scores)}")
    _show_next(uri)


@commands.command(short_help="JSON schema of RUN.yaml, for editors.")
@click.option("--method", default=None, shell_complete=_complete_method, help="Only the settings of this method.")
def schema(method: str | None) -> None:
    """Print the JSON schema of RUN.yaml, for editors."""
    from rayclust.config import RunConfig
    from rayclust.methods import METHODS, config_type

    if method is not None and method not in METHODS:
        raise ConfigError(f"--method {method}: must be one of {', '.join(METHODS)}")
    model = RunConfig if method is None else config_type(method)
    click.echo(json.dumps(model.model_json_schema(), indent=2))


def _show_result(run_uri: str, as_json: bool) -> None:
    from rayclust.store import storage
    from rayclust.store.run import Run

    run = Run(run_uri)
    metrics = storage.read_json(run.metrics)
    if as_json:
        _print_json({"run": run.uri, "report": run.report, "metrics": metrics})
        return
    names = ("accuracy", "nmi", "ari", "ami", "purity", "knn_accuracy", "silhouette")
    scores, test = metrics | metrics.get("test", {}), metrics.get("test")
    shown = [f"{name} {scores[name]:.3f}" for name in names if scores.get(name) is not None]
    where = f"; of the {test['rows']:,} kept aside" if test else ""
    occupied, wanted = sum(size > 0 for size in metrics["sizes"]), metrics["clusters"]
    clusters = f"{occupied:,} of {wanted:,} clusters" if occupied < wanted else f"{wanted:,} clusters"
    click.echo(f"{metrics['rows']:,} images in {clusters}{where}{': ' if shown else ''}{', '.join(shown)}")
    _show_next(run_uri)


def _show_next(run_uri: str) -> None:
    """Show where the report is, as a link that terminals open, and what can be done with the run."""
    from rayclust.store import storage
    from rayclust.store.run import Run

    report = Run(run_uri).report
    click.echo(f"report: {report if storage.is_remote(report) else storage.to_path(report).as_uri()}")
    click.echo(f"next: {_NEXT.format(run=run_uri)}")


def _print_json(value: Any) -> None:
    from rayclust.store.storage import canonical_json

    click.echo(canonical_json(value), nl=False)


def _print_line(start: str, text: str) -> None:
    """Print a line; on a terminal what does not fit goes on below, as far in as `start` is long."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    text = clean(text)
    if width > 2 * len(start):
        # Paths are not cut: they are copied.
        parts = textwrap.wrap(text, width - len(start), break_long_words=False, break_on_hyphens=False) or [""]
        text = ("\n" + " " * len(start)).join(parts)
    click.echo(start + text)
