"""Moved."""

from rayclust.settings import Config as Config
