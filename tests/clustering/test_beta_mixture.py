"""The mixture of two beta distributions against its own draws, scipy's densities and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rayclust.clustering import beta_mixture
from rayclust.errors import ShapeError


def test_planted_components_are_found():
    rng = np.random.default_rng(0)
    is_high = rng.random(4000) < 0.3
    scores = np.where(is_high, rng.beta(12, 3, 4000), rng.beta(2, 10, 4000))
    found = beta_mixture.fit(scores)
    assert found.weight == pytest.approx([0.7, 0.3], abs=0.02)
    assert found.alpha / (found.alpha + found.beta) == pytest.approx([2 / 12, 12 / 15], abs=0.02)
    assert ((found.posterior(scores) > 0.5) == is_high).mean() > 0.98


def test_one_m_step_matches_the_moments_of_the_halves():
    low, high = np.array([0.1, 0.2, 0.3]), np.array([0.7, 0.8, 0.9])
    found = beta_mixture.fit(np.concatenate([low, high]), iterations=0)
    for place, half in enumerate((low, high)):
        component = stats.beta(found.alpha[place], found.beta[place])
        assert (component.mean(), component.var()) == pytest.approx((half.mean(), half.var()))
    assert found.weight == pytest.approx([0.5, 0.5])


def test_densities_are_scipys():
    mixture = beta_mixture.BetaMixture(np.array([0.25, 0.75]), np.array([2.0, 5.0]), np.array([6.0, 1.5]))
    s = np.array([0.05, 0.4, 0.95])
    joint = mixture.weight * stats.beta.pdf(s[:, None], mixture.alpha, mixture.beta)
    assert np.exp(mixture.log_joint(s)) == pytest.approx(joint)
    assert mixture.posterior(s) == pytest.approx(joint[:, 1] / joint.sum(axis=1))


@pytest.mark.parametrize("scores", [[], [0.5, 0.5], [0.2, 1.2], [[0.1, 0.2]], [0.1, np.nan]])
def test_what_cannot_be_split_is_refused(scores):
    with pytest.raises(ShapeError, match="from 0 to 1"):
        beta_mixture.fit(np.array(scores))
