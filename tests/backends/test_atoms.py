"""Each formula of `csrc/atoms.h` against its twin in torch, in float64: value and derivative."""

from __future__ import annotations

import pytest
import torch

from fused_nce.core import atoms
from fused_nce.core.spec import TanhClip
from fused_nce.core.statistics import softplus
from tests.conftest import MODULE, needs_kernels

pytestmark = needs_kernels

U = 2.0**-24
SIZES = torch.cat(
    [torch.logspace(-30, 2.3, 4000, dtype=torch.float64), torch.linspace(0, 90, 9001, dtype=torch.float64)]
)
X = torch.cat([-SIZES.flip(0), SIZES]).float()


def compare(found, exact, relative, absolute):
    """|found − exact| ≤ relative·|exact| + absolute, elementwise, and the worst is told."""
    error = (found.double() - exact).abs() - absolute
    worst = (error / exact.abs().clamp_min(1e-300)).nan_to_num(0.0)
    worst = torch.where(error <= 0, torch.zeros_like(worst), worst)
    index = int(worst.argmax())
    assert worst[index] <= relative, f"at {X[index]}: {found[index]} against {exact[index]}"


def test_exp():
    value, _ = MODULE.atom("exp", X)
    inside = (X > -87) & (X < 88.3)
    compare(value[inside], X[inside].double().exp(), 3 * U, 0)
    assert (value[X < -87.4] == 0).all()
    assert torch.isinf(value[X > 88.4]).all()


@pytest.mark.parametrize("clip", [4.0, 10.0, 20.0, 43.0, 300.0])
def test_tanh_clip(clip):
    transform = TanhClip(clip)
    value, slope = MODULE.atom("tanh_clip", X, clip)
    t = atoms.transform_value(transform, X.double())
    compare(value, t, 8 * U, 0)  # relative: small scores keep their digits
    sech = torch.cosh(X.double() / clip).reciprocal().square()
    compare(slope, sech, 8 * U, 4 * U)
    torch.testing.assert_close(atoms.transform_slope(transform, t), sech, rtol=0, atol=1e-15)


def test_softplus_and_sigmoid():
    value, slope = MODULE.atom("softplus", X)
    compare(value, softplus(X.double()), 4 * U, 2.0**-126)
    compare(slope, torch.sigmoid(X.double()), 4 * U, 2.0**-126)
    value, slope = MODULE.atom("sigmoid", X)
    s = torch.sigmoid(X.double())
    compare(value, s, 4 * U, 2.0**-126)
    compare(slope, s * torch.sigmoid(-X.double()), 8 * U, 2.0**-126)


@pytest.mark.parametrize("name", ["exp", "softplus", "sigmoid"])
def test_nan_stays_nan(name):
    assert MODULE.atom(name, torch.tensor([float("nan")]))[0].isnan().all()


def test_infinities():
    x = torch.tensor([float("inf"), -float("inf")])
    assert MODULE.atom("exp", x)[0].tolist() == [float("inf"), 0]
    assert MODULE.atom("sigmoid", x)[0].tolist() == [1, 0]
    assert MODULE.atom("softplus", x)[0].tolist() == [float("inf"), 0]
    assert MODULE.atom("tanh_clip", x, 20.0)[0].tolist() == [20, -20]


def test_unknown_atom_is_named():
    with pytest.raises(ValueError, match="name is 'gelu', needed: exp, tanh_clip"):
        MODULE.atom("gelu", X)
