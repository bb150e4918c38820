"""Every error that rayclust raises on purpose.

RayclustError                 base; `exit_code` is what the command line ends with
├── ConfigError               a key of RUN.yaml or an argument is wrong: fix the config
├── DataError                 an input cannot be used as asked: missing, unreadable, too many rejects
├── ArtefactError             an artefact of a run is missing, unfinished or damaged
├── HeldError                 another process works on the run: wait for it, or end it
└── ShapeError                an array has the wrong axes or width: a caller's mistake

A message holds the name, the value, the bound and what to do, in one line.
"""

from __future__ import annotations


class RayclustError(Exception):
    """Base of all errors that rayclust raises on purpose."""

    exit_code = 1


class ConfigError(RayclustError, ValueError):
    """A setting is unknown, of the wrong type or impossible."""

    exit_code = 2


class DataError(RayclustError, ValueError):
    """An input is missing, unreadable or not what it was declared to be."""

    exit_code = 2


class ArtefactError(RayclustError):
    """An artefact of a run is missing, unfinished or damaged."""

    exit_code = 2


class HeldError(RayclustError):
    """Another process works on the run."""

    exit_code = 2


class ShapeError(RayclustError, ValueError):
    """An array has the wrong number of axes or the wrong width."""
