"""Moved."""

from rayclust.encoders.base import EncoderConfig as EncoderConfig
