"""Moved."""

from rayclust.store.lock import RunLock as Lease
from rayclust.store.lock import lock_owner as holder_of
from rayclust.store.lock import run_lock as held

__all__ = ["Lease", "held", "holder_of"]
