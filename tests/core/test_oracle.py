"""The oracle against 60-digit arithmetic: the one place where it is judged rather than judge."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest

from tests.oracle import Oracle

NEEDS_LONG_DOUBLE = np.finfo(np.longdouble).eps > 1e-18


def high_precision(q, k, scale, n_c, rows_per_image, offset, clip, g, d_square):
    """Loss, statistics and gradients by definition, as nested lists of mpf."""
    mp = mpmath.mp
    n, m, d = len(q), len(k), len(q[0])
    q, k, scale = (
        [[mp.mpf(float(x)) for x in row] for row in q],
        [[mp.mpf(float(x)) for x in row] for row in k],
        mp.mpf(scale),
    )
    r = [[mp.fdot(a, b) for b in k] for a in q]
    s = [[scale * x for x in row] for row in r]
    t = [[clip * mp.tanh(x / clip) if clip else x for x in row] for row in s]
    own = [[i // rows_per_image + offset == j // n_c for j in range(m)] for i in range(n)]
    mass = [mp.fsum(mp.exp(t[i][j]) for j in range(m) if not own[i][j]) for i in range(n)]
    nce, pos, w = [], [], [[mp.mpf(0)] * m for _ in range(n)]
    for i in range(n):
        columns = [j for j in range(m) if own[i][j]]
        pos.append([t[i][j] for j in columns])
        nce.append([-mp.log(mp.exp(x) / (mp.exp(x) + mass[i])) for x in pos[i]])
        for p, j in enumerate(columns):
            q_ip = mass[i] / (mp.exp(t[i][j]) + mass[i])
            w[i][j] -= q_ip * g[i][p]
            for other in range(m):
                if not own[i][other]:
                    w[i][other] += q_ip * g[i][p] * mp.exp(t[i][other]) / mass[i]
        for j in range(m):
            if clip:
                w[i][j] *= mp.sech(s[i][j] / clip) ** 2
            w[i][j] += 2 * mp.mpf(d_square) * s[i][j]
    return {
        "pos": pos,
        "nce": nce,
        "neg_lse": [mp.log(x) for x in mass],
        "neg_max": [max(t[i][j] for j in range(m) if not own[i][j]) for i in range(n)],
        "square": [mp.fsum(x * x for x in row) for row in s],
        "weights": w,
        "dq": [[scale * mp.fsum(w[i][j] * k[j][x] for j in range(m)) for x in range(d)] for i in range(n)],
        "dk": [[scale * mp.fsum(w[i][j] * q[i][x] for i in range(n)) for x in range(d)] for j in range(m)],
        "dscale": mp.fsum(w[i][j] * r[i][j] for i in range(n) for j in range(m)),
    }


def relative_error(found, exact):
    """The largest |found − exact| / |exact| over all elements, and how many there are."""
    found, exact = np.asarray(found, dtype=object).ravel(), np.asarray(exact, dtype=object).ravel()
    assert found.shape == exact.shape
    with mpmath.workdps(60):
        errors = [
            abs(mpmath.mpf(np.format_float_scientific(x, precision=40)) - y) for x, y in zip(found, exact, strict=True)
        ]
        return max(float(e / abs(y)) if y else float(e) for e, y in zip(errors, exact, strict=True)), len(errors)


CASES = {
    # name: scale, clip, margin of the positives, rows_per_image, offset, images beside the rows' own
    "moderate": (0.7, 20.0, 0, 1, 0, 0),
    "no clip, several rows an image, offset": (0.7, None, 0, 2, 1, 2),
    "saturated": (60.0, 4.0, 0, 1, 0, 0),
    "margin 5": (1.0, None, 5, 1, 0, 0),
    "margin 10": (1.0, 20.0, 10, 1, 0, 1),
    "margin 20": (1.0, None, 20, 1, 0, 0),
    "margin 40": (1.0, None, 40, 1, 0, 0),
    "scores of 1e4": (4e3, None, 0, 1, 0, 0),
    "scores of 1e4, clipped": (4e3, 20.0, 0, 1, 0, 0),
}


@pytest.mark.skipif(NEEDS_LONG_DOUBLE, reason="this machine has no type wider than float64 to be exact to 1e-12 in")
@pytest.mark.parametrize("name", CASES)
def test_oracle_is_exact(name):
    scale, clip, margin, rows_per_image, offset, extra = CASES[name]
    rng = np.random.default_rng(7)
    n, n_c, d = 4, 2, 3
    n_k = n // rows_per_image + extra
    q, k = rng.standard_normal((n, d)), rng.standard_normal((n_k * n_c, d))
    if margin:
        for i in range(n):
            own = slice((i + offset) * n_c, (i + offset + 1) * n_c)
            k[own] += margin / scale / (q[i] @ q[i]) * q[i]
    g, d_square = rng.standard_normal((n, n_c)), 0.03
    arguments: Any = {"scale": scale, "n_c": n_c, "rows_per_image": rows_per_image, "offset": offset, "clip": clip}
    with mpmath.workdps(8000 if scale > 100 and not clip else 60):
        exact = high_precision(q, k, **arguments, g=g.tolist(), d_square=d_square)
    oracle = Oracle(q, k, **arguments, real=np.longdouble)
    coefficients = oracle.nce_coefficients(g, d_square)
    found = {key: getattr(oracle, key) for key in ("pos", "nce", "neg_lse", "neg_max", "square")}
    found |= {"weights": oracle.weights(coefficients), **oracle.gradients(coefficients)._asdict()}
    elements = 0
    for key, value in found.items():
        error, count = relative_error(value, exact[key])
        assert error <= 1e-12, f"{key}: relative error {error:.2e}"
        elements += count
    assert elements >= 60


def test_float64_and_wider_agree():
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((5, 7)), rng.standard_normal((18, 7))
    one, two = (Oracle(q, k, scale=0.5, n_c=3, clip=20.0, real=real) for real in (np.float64, np.longdouble))
    for key in ("pos", "nce", "neg_lse", "neg_max", "square"):
        np.testing.assert_allclose(getattr(one, key), np.asarray(getattr(two, key), dtype=np.float64), rtol=1e-13)


def test_no_negatives_are_no_loss():
    oracle = Oracle(np.ones((1, 2)), np.ones((3, 2)), scale=1.0, n_c=3)
    assert np.isneginf(oracle.neg_lse).all()
    assert (oracle.nce == 0).all()
    assert (oracle.weights(oracle.nce_coefficients(np.ones((1, 3)))) == 0).all()
