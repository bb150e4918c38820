"""The scores that the page knows: short name, meaning and how they are written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rayclust.report.contents import MethodResult
from rayclust.report.formats import number, percent


@dataclass(frozen=True)
class Score:
    """How one metric is shown.

    Attributes:
        key: its key in `metrics.json`.
        short: the column's head.
        meaning: one sentence with range and chance level.
        is_share: written in percent.
        larger_is_better: which end of the range is good; None marks no winner.
    """

    key: str
    short: str
    meaning: str
    is_share: bool = True
    larger_is_better: bool | None = True

    def write(self, value: float | None, spread: float | None = None) -> str:
        """The value, with ± its spread over seeds where there is one."""
        written = percent(value) if self.is_share else number(value)
        if spread is None or value is None:
            return written
        if self.is_share:
            return f"{100 * value:.1f} ± {100 * spread:.1f}%"
        return f"{written} ± {number(spread, 2)}"


KNOWN = (
    Score("accuracy", "ACC", "Images in the right class when clusters are matched to classes one to one. 0 to 100%."),
    Score(
        "accuracy_held_out",
        "ACC, map from other half",
        "Images whose cluster's most common class is theirs; that class comes from the other half of the images.",
    ),
    Score(
        "accuracy_in_sample",
        "ACC, map from same images",
        "As published for many clusters: the map is fitted on the images that it scores and rises with more.",
        larger_is_better=None,
    ),
    Score("nmi", "NMI", "Mutual information of clusters and classes over their mean entropy. 0 to 100%."),
    Score("ari", "ARI", "Agreement over all pairs of images, corrected for chance. 0% is chance, 100% perfect."),
    Score("ami", "AMI", "Mutual information corrected for chance. 0% is chance, 100% perfect."),
    Score("purity", "Purity", "Images that belong to their cluster's most common class. Rises with more clusters."),
    Score(
        "linear_probe", "Linear probe", "Images whose class a linear layer tells after seeing others with their labels."
    ),
    Score("knn_accuracy", "kNN probe", "Images whose class their nearest neighbours tell: what the encoder sees."),
    Score(
        "name_accuracy",
        "Names",
        "Images whose cluster is named exactly as their class. Only as good as the list of names.",
    ),
    Score(
        "name_accuracy_without_classes",
        "Names, blind",
        "The same where the data set's own class names were not among the candidates.",
    ),
    Score(
        "silhouette",
        "Silhouette",
        "How much closer images lie to their own cluster than to the next one, on a sample. -1 to 1. Needs no labels.",
        is_share=False,
    ),
    Score(
        "coding_length",
        "Coding length",
        "How long a description the embeddings need when their clusters are known. Smaller is better. Needs no labels.",
        is_share=False,
        larger_is_better=False,
    ),
    Score(
        "membership_detection_error",
        "Π outside class",
        "How much of an image's membership, on a sample, goes to images of other classes. Smaller is better.",
        larger_is_better=False,
    ),
    Score(
        "membership_wrong_edges",
        "Π wrong edges",
        "Pairs of images that belong together by the membership, but not by their classes. Smaller is better.",
        larger_is_better=False,
    ),
    Score(
        "membership_nonzeros",
        "Π entries",
        "Images of the sample, itself included, to which an image belongs: more than a tenth of an even share.",
        is_share=False,
        larger_is_better=None,
    ),
    Score(
        "membership_components",
        "Π components",
        "Groups of the sample's images between which there is no membership. Needs no labels.",
        is_share=False,
        larger_is_better=None,
    ),
)


def columns(methods: Iterable[MethodResult]) -> list[Score]:
    """The scores that at least one method has: known ones in the usual order, then the others as they come."""
    keys = {key: None for method in methods for key, value in method.metrics.items() if value is not None}
    known = [score for score in KNOWN if score.key in keys]
    names = {score.key for score in known}
    others = [key for key in keys if key not in names]
    return known + [Score(key, key, "", is_share=False, larger_is_better=None) for key in others]


def best(score: Score, methods: Iterable[MethodResult]) -> float | None:
    """The best value among methods; None where the score has no better end or fewer than two methods have it."""
    given = [method.metrics.get(score.key) for method in methods]
    values = [value for value in given if value is not None and math.isfinite(value)]
    if len(values) < 2 or score.larger_is_better is None:
        return None
    return max(values) if score.larger_is_better else min(values)
