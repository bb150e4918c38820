"""Moved."""

from rayclust.store.lock import SUBMISSION_VARIABLE, LockOwner
from rayclust.store.lock import LockOwner as Holder
from rayclust.store.lock import process_start_time as birth

__all__ = ["SUBMISSION_VARIABLE", "Holder", "LockOwner", "birth", "myself"]

myself = LockOwner.this_process
