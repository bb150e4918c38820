from __future__ import annotations

import pytest
import torch

from rayclust.kernels import definite, native

CLOSE = {"rtol": 0.0, "atol": 1e-4}
needs_library = pytest.mark.skipif(native.library() is None, reason="no compiler, or no matrix tiles")
FORMS = [pytest.param(True, marks=needs_library, id="compiled"), pytest.param(False, id="torch")]


@pytest.fixture(params=FORMS)
def is_compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(definite, "library", lambda: None)
    return bool(request.param)


@pytest.mark.usefixtures("is_compiled")
@pytest.mark.parametrize(("count", "width"), [(1, 1), (3, 2), (16, 32), (37, 31), (64, 17), (2, 40)])
def test_inverse_and_determinant_are_those_of_float64(count: int, width: int):
    torch.manual_seed(0)
    rows = torch.randn(count, width, width, dtype=torch.float64)
    matrices = rows @ rows.mT + torch.eye(width)
    inverse, logs = definite.inverse_and_log_determinant(matrices.float())
    eye = torch.eye(width, dtype=torch.float64).expand_as(matrices)
    torch.testing.assert_close(inverse.double() @ matrices, eye, **CLOSE)
    torch.testing.assert_close(logs.double(), torch.logdet(matrices), rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("is_compiled")
def test_worked_by_hand():
    matrices = torch.tensor([[[4.0, 2.0], [2.0, 3.0]], [[1.0, 0.0], [0.0, 2.0]]])
    inverse, logs = definite.inverse_and_log_determinant(matrices)
    torch.testing.assert_close(inverse[0], torch.tensor([[3.0, -2.0], [-2.0, 4.0]]) / 8.0)
    torch.testing.assert_close(logs, torch.tensor([8.0, 2.0]).log())


@pytest.mark.usefixtures("is_compiled")
def test_only_what_is_on_and_above_the_diagonal_is_read_and_matrices_may_be_parts_of_larger_ones():
    torch.manual_seed(1)
    rows = torch.randn(20, 8, 8)
    whole = rows @ rows.mT + torch.eye(8)
    larger = torch.full((20, 11, 13), torch.nan)
    larger[:, :8, :8] = torch.where(torch.ones(8, 8).triu().bool(), whole, torch.nan)
    found = definite.inverse_and_log_determinant(larger[:, :8, :8])
    for part, wanted in zip(found, definite.inverse_and_log_determinant(whole), strict=True):
        torch.testing.assert_close(part, wanted)


@pytest.mark.usefixtures("is_compiled")
def test_a_matrix_that_is_not_positive_definite_spoils_its_own_logarithm_alone():
    good, bad = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    _, logs = definite.inverse_and_log_determinant(torch.stack([good, bad, good]))
    assert logs.isfinite().tolist() == [True, False, True]
    torch.testing.assert_close(logs[[0, 2]], torch.full((2,), 3.0).log())


def test_float64_takes_torchs_own_form():
    matrices = torch.eye(3, dtype=torch.float64)[None] * 2.0
    inverse, logs = definite.inverse_and_log_determinant(matrices)
    assert inverse.dtype == logs.dtype == torch.float64
    torch.testing.assert_close(logs, torch.tensor([8.0], dtype=torch.float64).log())
