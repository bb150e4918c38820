"""The stages of a run: one file each with its `run`; `registry.py` declares them."""

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
