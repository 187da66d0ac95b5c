"""CPC, NPID, DIM and the closed forms: refusals, each one line."""

from __future__ import annotations

import math
from typing import Any

import torch

from fused_nce import (
    CPCLoss,
    DIMLoss,
    MINELoss,
    amdim_mixture_nce,
    binary_nce,
    club,
    cpc_nce,
    dim_mi,
    gaussian_kl,
    mine_dv,
    npid_softmax,
)
from tests.refusals import unlike

A, T = torch.ones(4, 3), torch.arange(4)
ANY: Any = T
S = torch.ones(2, 4, 3)
ERRORS = [
    (lambda: cpc_nce(A, A), ValueError, r"^predictions: got shape \(4, 3\), need \(S, N, D\)$"),
    (lambda: cpc_nce(S, S[:, :3]), ValueError, r"^targets: got shape \(2, 3, 3\), need predictions's \(2, 4, 3\)$"),
    (
        lambda: cpc_nce(S, S, weights=(1.0,)),
        ValueError,
        r"^weights: got 1 of them, need a number for each of S = 2 .*$",
    ),
    (lambda: cpc_nce(S, S, weights=(1.0, -1.0)), ValueError, r"^weights: got -1.0, need a finite number >= 0$"),
    (lambda: cpc_nce(S, S, weights=0.5), TypeError, r"^weights: got float, need a sequence$"),  # type: ignore[arg-type]
    (lambda: cpc_nce(S, S, weights=(0, 0)), ValueError, r"^weights: got \(0, 0\), need one > 0$"),
    (lambda: cpc_nce(S, S, negatives="all"), ValueError, r"^negatives: got 'all', need one of 'batch', 'sequence'$"),
    (lambda: cpc_nce(S, S, negatives=ANY), ValueError, r"^negatives: got shape \(4,\), need \(N, m\) = \(4, m\) .*$"),
    (lambda: cpc_nce(S, S, negatives=ANY[:, None] + 1), ValueError, r"^negatives: got 4, need 0 <= index < 4$"),
    (
        lambda: cpc_nce(S, S, negatives=ANY[:, None], group="world"),
        ValueError,
        r"^group: got one with .* a sample, .*$",
    ),
    (lambda: cpc_nce(S, S, negatives="sequence"), TypeError, r"^groups: got NoneType, need a \(N,\) int64 tensor$"),
    (lambda: cpc_nce(S, S, groups=T), ValueError, r"^groups: got a tensor with negatives='batch', need None.*$"),
    (lambda: CPCLoss(negatives="all"), ValueError, r"^negatives: got 'all', need one of .*$"),
    (lambda: amdim_mixture_nce(A, S, tau=1), ValueError, r"^consequents: got n_k = 2 images for n_a = 4 .*$"),
    (lambda: amdim_mixture_nce(A[:2], S, tau=1), ValueError, r"^antecedents: got shape \(2, 3\), need \(n_a, m, D\)$"),
    (lambda: amdim_mixture_nce(S, S, tau=0), ValueError, r"^tau: got 0, need a finite number > 0$"),
    (lambda: npid_softmax(A, A[:, :2], T), ValueError, r"^bank: got width D = 2, need features's 3$"),
    (lambda: npid_softmax(A, A, T.int()), TypeError, r"^indices: got torch.int32, need int64$"),
    (lambda: npid_softmax(A, A, T + 1), ValueError, r"^indices: got 4, need 0 <= index < 4$"),
    (lambda: npid_softmax(A, A, T, temperature=0), ValueError, r"^temperature: got 0, need a finite number > 0$"),
    (lambda: dim_mi(S, A), ValueError, r"^global_: got B = 4, need local's 2$"),
    (lambda: dim_mi(S, A[:2, :2]), ValueError, r"^global_: got width D = 2, need local's 3$"),
    (lambda: dim_mi(S, A[:2], estimator="kl"), ValueError, r"^estimator: got 'kl', need one of .*$"),
    (lambda: dim_mi(S, A[:2], anchor="both"), ValueError, r"^anchor: got 'both' with estimator='jsd', .*$"),
    (lambda: DIMLoss("nce", anchor="none"), ValueError, r"^anchor: got 'none', need one of .*$"),
    (lambda: mine_dv(A, A[0]), ValueError, r"^joint: got shape \(4, 3\), need \(P,\)$"),
    (lambda: mine_dv(A[0], A[0, :0]), ValueError, r"^product: got shape \(0,\), need \(Q,\) with Q >= 1$"),
    (lambda: mine_dv(A[0], A[0], ema=math.nan), ValueError, r"^ema: got nan, need a finite number$"),
    (lambda: MINELoss(1.0), ValueError, r"^rate: got 1.0, need a number < 1$"),
    (lambda: gaussian_kl(A, A[:3]), ValueError, r"^logvar: got shape \(3, 3\), need mu's \(4, 3\)$"),
    (lambda: club(A, A, A[:3]), ValueError, r"^logvar: got shape \(3, 3\), need y's \(4, 3\)$"),
    (lambda: binary_nce(A[0], A, A[0], A), ValueError, r"^noise_scores: got N = 4, need data_scores's 3$"),
    (
        lambda: binary_nce(A[:, 0], A, A[0], A),
        ValueError,
        r"^log_kq_data: got shape \(3,\), need data_scores's \(4,\)$",
    ),
]


def test_messages():
    assert unlike(ERRORS) == []
