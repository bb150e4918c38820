from __future__ import annotations

import pytest
import torch

from rayclust.errors import ArtefactError, ShapeError
from rayclust.methods import build, load
from rayclust.methods.settings import SpectralConfig
from rayclust.methods.spectral import SpectralClustering
from rayclust.metrics.external import ari
from rayclust.training.loop import fit_arrays

LABELS = torch.arange(4).repeat_interleave(30)


def rows(seed: int = 0) -> torch.Tensor:
    """Four directions with a little noise, some rows turned round: the membership takes no notice of signs."""
    noise = torch.randn(120, 16, generator=torch.Generator().manual_seed(seed))
    signs = torch.where(torch.arange(120) % 3 == 0, -1.0, 1.0)
    return (torch.eye(16)[LABELS] + 0.1 * noise) * signs[:, None]


def fitted(clusters: int = 4) -> SpectralClustering:
    method = fit_arrays(rows(), None, SpectralConfig(clusters=clusters), 0)
    assert isinstance(method, SpectralClustering)
    return method


def test_planted_directions_are_found_and_new_rows_go_to_theirs():
    method = fitted()
    for x in (rows(), rows(seed=1)):
        probabilities = method.predict_proba(x)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(120))
        assert ari(LABELS.numpy(), probabilities.argmax(1).numpy()) == 1.0


def test_a_loaded_state_assigns_the_same_and_fewer_clusters_need_no_other_fit():
    method = fitted(6)
    again = load(method.state())
    assert torch.equal(again.predict_proba(rows()), method.predict_proba(rows()))
    four = method.recut(4)
    assert four.config.clusters == 4
    assert ari(LABELS.numpy(), four.predict_proba(rows()).argmax(1).numpy()) == 1.0


def test_membership_is_doubly_stochastic():
    membership = fitted().membership(rows())
    torch.testing.assert_close(membership.sum(0), torch.ones(120), rtol=0, atol=1e-4)
    torch.testing.assert_close(membership.sum(1), torch.ones(120), rtol=0, atol=1e-4)


def test_what_is_not_fitted_or_of_another_width_is_refused():
    method = build(SpectralConfig(clusters=4), 16, 120, seed=0)
    with pytest.raises(ArtefactError, match="fit it first"):
        method.predict_proba(rows())
    with pytest.raises(ShapeError):
        fitted().predict_proba(torch.zeros(3, 5))
