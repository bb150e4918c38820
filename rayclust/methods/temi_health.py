"""How a training's clusters are doing, epoch by epoch, and an alarm when they fall together."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from rayclust.methods.temi_config import TemiConfig

logger = logging.getLogger(__name__)

LEAST_ENTROPY = 0.5
"""Part of ln K below which the entropy of a head's shares tells of a collapse."""
STEP_OF_BETA = 0.1
"""By how much lower a β the alarm proposes."""


@dataclass(frozen=True)
class Health:
    """Of each head at the end of an epoch."""

    entropy: Tensor
    """Float[H], nats: that of the clusters' running shares p̂; ln K when they are even."""
    live: Tensor
    """Int[H]: clusters with more than a tenth of an even share."""
    largest: Tensor
    """Float[H]: the share of the largest cluster."""
    agreement: Tensor
    """Float[H]: probability that both rows of a pair fall into one cluster, mean over the epoch."""
    clusters: int
    """K."""

    def row(self, best: int) -> dict[str, Any]:
        """For the epoch's row of metrics: each head's numbers, and those of the best head under names of their own."""
        return {
            "head_entropies": self.entropy.tolist(),
            "head_live_clusters": self.live.tolist(),
            "head_largest_shares": self.largest.tolist(),
            "head_agreements": self.agreement.tolist(),
            "collapsed_heads": int(self.collapsed().sum()),
            "collapsed": int(self.collapsed()[best]),
            "marginal_entropy": float(self.entropy[best]),
            "live_clusters": int(self.live[best]),
            "largest_share": float(self.largest[best]),
            "agreement": float(self.agreement[best]),
        }

    def collapsed(self) -> Tensor:
        """Bool[H]: which heads have put most rows into few clusters.

        Little entropy alone is none: classes may be of very different size. Half of the clusters must be dead as well.
        """
        return (self.entropy < LEAST_ENTROPY * math.log(self.clusters)) & (2 * self.live <= self.clusters)

    def watch(self, best: int, config: TemiConfig) -> bool:
        """Whether the best head has collapsed; says so, and what to do."""
        if not bool(self.collapsed()[best]):
            return False
        lower = max(0.51, round(config.beta - STEP_OF_BETA, 2))
        advice = (
            f"set method.beta below {config.beta:g}, such as {lower:g}: a lower β keeps clusters more even"
            if config.beta > lower and config.loss != "scan"
            else "lower method.learning_rate, or ask for fewer clusters"
        )
        logger.warning(
            "clusters collapse: head %d has %d live clusters of %d, entropy %.2f of %.2f, largest share %.0f %%; %s",
            best, int(self.live[best]), self.clusters, float(self.entropy[best]), math.log(self.clusters),
            100 * float(self.largest[best]), advice,
        )  # fmt: skip
        return True
