"""Moved."""

from rayclust.methods.base import BaseMethodConfig as BaseMethodConfig
from rayclust.methods.base import Plan as Plan
from rayclust.methods.base import TrainedConfig as TrainedConfig
