from __future__ import annotations

import torch

from rayclust.losses.compression_routes import Groups, by_rows, by_top, by_width, prefers_rows
from tests.losses.test_compression_rate import problem


def test_the_cheaper_side_is_taken():
    assert not prefers_rows(1024, 128)
    assert prefers_rows(1024, 1024)
    assert prefers_rows(1500, 1024)
    assert not prefers_rows(4096, 1024)


def test_all_routes_find_the_same():
    z, membership = problem(21, 9)
    groups = Groups(z, membership, 90 / membership.sum(0), True)
    inverses = torch.linalg.inv(
        torch.eye(9) + groups.scales[:, None, None] * torch.einsum("ij,ia,ib->jab", membership, z, z)
    )
    found = [by_width(groups, 1 << 20, 0.0), by_rows(groups, 1 << 20, 0.0), by_top(groups, 21, 1 << 20, 0.0)]
    for one in found:
        torch.testing.assert_close(one.logs, -torch.logdet(inverses))
        torch.testing.assert_close(one.forms, torch.einsum("ia,jab,ib->ij", z, inverses, z))
        torch.testing.assert_close(one.pulls, torch.einsum("ij,jab,ib->ia", membership, inverses, z))
