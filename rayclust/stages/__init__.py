"""The stages of a run: one file each, which ends with its `STAGE`."""

NAMES = (
    "encode",
    "neighbors",
    "counterparts",
    "select-k",
    "train",
    "assign",
    "label",
    "curate",
    "index",
    "evaluate",
    "map",
    "figures",
    "report",
)
"""Every stage in the order in which a run does them; that of `select-k` is `select_k.py`."""
