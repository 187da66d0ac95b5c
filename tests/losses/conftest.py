"""What the losses' tests share: the backends of float64, and features."""

from __future__ import annotations

import pytest
import torch

F64 = ("reference", "chunked")


@pytest.fixture(params=F64)
def wide(request: pytest.FixtureRequest) -> str:
    """The backends that run float64."""
    return str(request.param)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """float64 features that want a gradient."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
