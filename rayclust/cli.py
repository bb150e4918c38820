"""Command line: one command a stage, and the few that run or show a whole run.

Exit codes: 0 done; 2 the user's mistake, with one line that says what to do; 1 anything else. `-v` shows the traceback.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import click

from rayclust import stages
from rayclust.errors import ConfigError, RayclustError
from rayclust.report.formats import clean
from rayclust.runtime.log import new_handler

STAGE_COMMANDS = tuple(name for name in stages.NAMES if name != "figures")
"""Stages whose command takes a RUN.yaml; figures has one of its own."""
FIRST_WORD_SECONDS = 0.3


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    verbose = bool({"-v", "--verbose"} & set(arguments))
    try:
        result = commands.main(list(arguments), standalone_mode=False)
    except click.exceptions.Abort:
        return _fail("interrupted: run the same line again to go on", 1)
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except RayclustError as error:
        return _fail(str(error), error.exit_code, verbose)
    except KeyboardInterrupt:
        return _fail("interrupted: run the same line again to go on", 1)
    except Exception as error:  # noqa: BLE001 - the outermost frame: whatever is left becomes one line and exit code 1
        line = (str(error).strip().splitlines() or ["no message"])[-1]
        return _fail(f"unexpected {type(error).__name__}: {line} (-v shows the traceback)", 1, verbose)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int, verbose: bool = False) -> int:
    if verbose:
        logging.getLogger(__name__).exception("rayclust failed")
    click.echo(f"rayclust: {clean(' '.join(message.split()))}", err=True)
    return code


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
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


@commands.command()
@click.argument("images")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--out", required=True, help="Folder or s3:// URI of the run.")
@click.option(
    "--clusters", default="10", show_default=True, help="Number of clusters, or auto, or some to try: 5,8,10."
)
@click.option("--method", default="auto", show_default=True, help="auto, kmeans, temi, cpp or spectral.")
@click.option(
    "--encoder", default=None, help="open_clip/ARCH, timm/ARCH or pixels.  [default: what the machine can do]"
)
@_VERBOSE
def quick(images: str, overrides: tuple[str, ...], out: str, clusters: str, method: str, encoder: str | None) -> None:
    """Do everything in one line: encode IMAGES, cluster, name, measure, and write a report below --out."""
    from rayclust.runtime.api import quick as run_quick

    _show_result(run_quick(images, out, clusters=clusters, method=method, encoder=encoder, overrides=overrides))


@commands.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@_FORCE
@_VERBOSE
def run(config: str, overrides: tuple[str, ...], force: bool) -> None:
    """Run all stages of the run in CONFIG (RUN.yaml, or - for standard input) that are not done yet."""
    from rayclust.runtime.api import load_config
    from rayclust.runtime.pipeline import run_all

    settings = load_config(config, overrides)
    run_all(settings, force=force)
    _show_result(settings.run)


def _stage_command(name: str) -> click.Command:
    @click.argument("config")
    @click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
    @_FORCE
    @_VERBOSE
    def command(config: str, overrides: tuple[str, ...], force: bool) -> None:
        from rayclust.runtime.api import load_config
        from rayclust.runtime.pipeline import run_stage

        run_stage(name, load_config(config, overrides), force=force)

    return click.command(name, help=f"Run the stage {name} of the run in CONFIG (RUN.yaml).")(command)


for _name in STAGE_COMMANDS:
    commands.add_command(_stage_command(_name))


@commands.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@_VERBOSE
def check(config: str, overrides: tuple[str, ...]) -> int:
    """Refuse a bad run before it costs money: config, access, encoder, a sample of inputs, estimates."""
    from rayclust.runtime.api import load_config
    from rayclust.runtime.preflight import check as run_check

    findings = run_check(load_config(config, overrides))
    for finding in findings:
        click.echo(f"{'ok  ' if finding.good else 'FAIL'}  {finding.subject:<12} {finding.text}")
    return 0 if all(finding.good for finding in findings) else 2


@commands.command()
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


@commands.command()
@click.argument("run_uri", metavar="RUN")
@_VERBOSE
def status(run_uri: str) -> None:
    """Show what of RUN is done and what is missing, rates and rejects, health of the clusters."""
    from rayclust.runtime.status import lines

    for line in lines(run_uri):
        click.echo(line)


@commands.command()
@click.argument("run_uri", metavar="RUN")
@click.option("--image", default=None, help="An image file or URI to search with.")
@click.option("--text", default=None, help="Words to search with, for encoders that read text.")
@click.option("--top", default=10, show_default=True, type=click.IntRange(1, 10_000), help="Images to show.")
@click.option("--space", default="encoder", show_default=True, type=click.Choice(["z", "encoder", "both"]))
@_VERBOSE
def search(run_uri: str, image: str | None, text: str | None, top: int, space: str) -> None:
    """Find the images of RUN nearest to an image or to words; z is the method's own space, for images alone."""
    from rayclust.runtime.api import load_run
    from rayclust.stages.search import as_lines
    from rayclust.stages.search import search as run_search

    for line in as_lines(run_search(load_run(run_uri), image=image, text=text, top=top, space=space)):
        click.echo(clean(line))


@commands.command()
@click.argument("run_uri", metavar="RUN")
@click.option("--out", default=None, help="Folder or URI to write to.  [default: RUN/figures]")
@_VERBOSE
def figures(run_uri: str, out: str | None) -> None:
    """Write the figures of RUN (a run, or its RUN.yaml) as SVG files, with the numbers behind them."""
    from rayclust.runtime.api import load_run
    from rayclust.stages.figures import export

    for uri in export(load_run(run_uri), out):
        click.echo(uri)


@commands.command()
@click.argument("run_uri", metavar="RUN")
@click.argument("images")
@click.option("--out", required=True, help="Table to write: .parquet or .csv, a path or URI.")
@click.option("--evaluate", is_flag=True, help="Score the clusters against the images' own labels.")
@_VERBOSE
def predict(run_uri: str, images: str, out: str, evaluate: bool) -> None:
    """Assign new IMAGES to the clusters of the frozen RUN."""
    from rayclust.runtime.api import load_run
    from rayclust.stages.predict import predict as run_predict

    found = run_predict(load_run(run_uri), images, out, evaluate=evaluate)
    click.echo(f"{found['rows']:,} images and {found['rejects']:,} rejects in {out}")
    if evaluate:
        shown = ", ".join(f"{name} {score:.4f}" for name, score in found.items() if isinstance(score, float))
        click.echo(f"{found['labelled']:,} images with a label: {shown}")


@commands.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
@_VERBOSE
def compare(config: str, overrides: tuple[str, ...]) -> None:
    """Score k-means on the input of CONFIG under several encoders: encoder.name=[A,B], others KEY=VALUE for all."""
    from rayclust.stages.compare import as_lines
    from rayclust.stages.compare import compare as run_compare

    for line in as_lines(run_compare(config, overrides)):
        click.echo(line)


@commands.command()
@click.option("--out", default="demo", show_default=True, help="Folder or s3:// URI for images, run and report.")
@_VERBOSE
def demo(out: str) -> None:
    """Run everything on images that need no download: scanned digits, k-means and TEMI side by side."""
    from rayclust.runtime.demo import demo as run_demo
    from rayclust.runtime.demo import table
    from rayclust.store.run import Run

    uri, scores = run_demo(out)
    click.echo(f"Scanned digits, {len(next(iter(scores.values())))} seeds, percent:\n{table(scores)}")
    click.echo(f"report: {Run(uri).report}")


@commands.command()
@click.option("--method", default=None, help="Only the settings of this method.")
def schema(method: str | None) -> None:
    """Print the JSON schema of RUN.yaml, for editors."""
    from rayclust.config import RunConfig
    from rayclust.methods import METHODS, find

    if method is not None and method not in METHODS:
        raise ConfigError(f"--method {method}: must be one of {', '.join(METHODS)}")
    model = RunConfig if method is None else find(method).config_type
    click.echo(json.dumps(model.model_json_schema(), indent=2))


def _show_result(run_uri: str) -> None:
    from rayclust.store import storage
    from rayclust.store.run import Run

    run = Run(run_uri)
    metrics = storage.read_json(run.metrics)
    names = ("accuracy", "nmi", "ari", "ami", "purity", "knn_accuracy", "silhouette")
    scores, test = metrics | metrics.get("test", {}), metrics.get("test")
    shown = [f"{name} {scores[name]:.3f}" for name in names if scores.get(name) is not None]
    where = f"; of the {test['rows']:,} kept aside" if test else ""
    click.echo(f"{metrics['rows']:,} images in {metrics['clusters']} clusters{where}: {', '.join(shown)}")
    click.echo(f"report: {run.report}")
