"""The choice of negatives: what is refused, what equals what. The registry holds every option to its dense oracle."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fused_nce import CLIPLoss, InfoNCELoss, clip_loss, info_nce

N, D, H = 6, 5, 2
Q, K, HARD = (
    torch.randn(*shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    for i, shape in enumerate(((N, D), (N, D), (N, H, D)))
)
IDS = torch.tensor([0, 1, 0, 2, 3, 3])
TENSORS = ("ids", "guide", "row_weights")
F64: dict[str, Any] = {"backend": "chunked", "temperature": 0.5}


def graded(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def same(one, other, leaves, rtol=1e-12):
    """Two losses, and their gradients by the leaves, relative to the largest."""
    torch.testing.assert_close(one, other, rtol=rtol, atol=1e-14)
    pairs = (torch.autograd.grad(x, leaves, allow_unused=True) for x in (one, other))
    for a, b in zip(*pairs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert b is not None
            assert (a - b).abs().max() <= 100 * max(rtol, torch.finfo(a.dtype).eps) * a.abs().max()


def test_golden():
    """One row by hand: s⁺ = 2, an in-batch negative of 1, own hard negatives of 0 and −1, at scale 1."""
    q, k = torch.tensor([[1.0, 0.0], [0.0, 9.0]]).double(), torch.tensor([[2.0, 0.0], [1.0, 9.0]]).double()
    hard = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]], [[0.0, -9.0], [0.0, -9.0]]]).double()
    options: dict[str, Any] = {"temperature": 1.0, "reduction": "none", "backend": "reference", "hard_negatives": hard}
    e = math.exp

    def first(**more):
        return info_nce(q, k, **options, **more).nce[0].item()

    def xent(*negatives, positives=1):
        return math.log(positives + sum(e(x - 2) for x in negatives))

    assert first() == pytest.approx(xent(1, 0, -1), rel=1e-14)
    assert first(share_hard_negatives=True) == pytest.approx(xent(1, 0, -1, 0, 0), rel=1e-14)
    assert first(false_negative_margin=-1.5) == pytest.approx(xent(0, -1), rel=1e-14)
    assert first(false_negative_margin=-2.5, filter_hard_negatives=True) == pytest.approx(xent(-1), rel=1e-14)
    assert first(hardness=0.5) == pytest.approx(xent(1.5, 0, -1.5), rel=1e-14)
    assert first(query_ids=torch.tensor([4, 4])) == pytest.approx(xent(0, -1), rel=1e-14)
    # k2q: ⟨k_0, q⟩ = 2, 0; q2q: ⟨q_0, q_1⟩ = 0; k2k: ⟨k_0, k_1⟩ = 2.
    joint: dict[str, Any] = {"directions": ("q2k", "k2q", "q2q", "k2k"), "joint": True}
    assert first(**joint) == pytest.approx(xent(1, 0, -1, 0, 0, 2, positives=2), rel=1e-14)
    apart = (xent(1, 0, -1) + xent(0) + xent(0) + xent(2)) / 4
    assert first(directions=joint["directions"]) == pytest.approx(apart, rel=1e-14)
    smooth = 0.9 * xent(1, 0, -1) + 0.1 * (xent(1, 0, -1) + 2 - (2 + 1 + 0 - 1) / 4)
    assert first(label_smoothing=0.1) == pytest.approx(smooth, rel=1e-14)
    g = (e(1) + e(0) + e(-1) - 3 * 0.05 * e(2)) / 0.95
    assert first(tau_plus=0.05) == pytest.approx(math.log(1 + g * e(-2)), rel=1e-14)
    assert first(tau_plus=0.5) == pytest.approx(math.log(1 + 3 * e(-1) * e(-2)), rel=1e-14)  # its floor
    floors: list[tuple[Any, float, float]] = [({"hardness": 0.5}, -1.5, 2.0)]
    floors += [({"clip": 3.0}, -3 * math.tanh(1 / 3), 3 * math.tanh(2 / 3))]
    for choice, low, own in floors:
        assert first(tau_plus=0.5, **choice) == pytest.approx(math.log(1 + 3 * e(low - own)), rel=1e-14)


def test_what_equals_what():
    q, k, h = leaves = graded(Q, K, HARD)
    appended = torch.cat([k, h.flatten(0, 1)])
    shared = {"hard_negatives": h, "share_hard_negatives": True}
    same(info_nce(q, k, **shared, **F64).loss, info_nce(q, appended, torch.arange(N), **F64).loss, leaves)
    # The same by blocks: ids of which none comes twice take the way of the rest.
    distinct = torch.arange(N)
    same(info_nce(q, k, **shared, query_ids=distinct, **F64).loss, info_nce(q, k, **shared, **F64).loss, leaves)
    both = ("q2k", "k2q")
    same(info_nce(q, k, directions=both, **F64).loss, info_nce(q, k, symmetric=True, **F64).loss, leaves[:2])
    same(
        info_nce(q, k, directions=both, row_weights=torch.ones(N).double(), **F64).loss,
        info_nce(q, k, symmetric=True, **F64).loss,
        leaves[:2],
    )
    permuted = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    one = info_nce(q, k, permuted, symmetric=True, row_weights=torch.ones(N).double(), **F64).loss
    same(one, info_nce(q, k, permuted, symmetric=True, **F64).loss, leaves[:2])
    # A bias of every column alike moves nothing; one of −∞ leaves the column out.
    same(info_nce(q, k, column_bias=torch.full((N,), 3.0).double(), **F64).loss, info_nce(q, k, **F64).loss, leaves[:2])
    more = torch.cat([k, torch.randn(2, D, dtype=torch.float64)])
    away = torch.tensor([0.0] * N + [-1e3] * 2).double()
    same(
        info_nce(q, more, torch.arange(N), column_bias=away, **F64).loss, info_nce(q, k, **F64).loss, leaves[:2], 1e-11
    )
    # A guide that is the model itself, and no margin, is a false negative's margin of 0.
    guided = info_nce(q, k, guide=(Q, K), guide_margin=-0.1, **F64).loss
    same(guided, info_nce(q, k, false_negative_margin=0.1, **F64).loss, leaves[:2])
    # Rows of weight 0 are negatives still, and no rows.
    w = torch.tensor([2.0, 0, 1, 1, 0, 1]).double()
    for reduction, divisor in (("mean", 5), ("sum", 1)):
        elements = info_nce(q, k, reduction="none", **F64).nce
        weighted = info_nce(q, k, row_weights=w, reduction=reduction, **F64).loss
        same(weighted, (w * elements).sum() / divisor, leaves[:2])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_what_equals_the_positive_is_no_false_negative(backend):
    """The same document twice, at margin 0: summed in another order, its score is the positive's within rounding."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(64, 300, generator=g)
    k = (q + torch.randn(64, 300, generator=g)).index_select(0, torch.arange(64) // 2)
    both: tuple[dict[str, Any], ...] = ({"false_negative_margin": 0.0}, {"guide": (q, k)})
    for options in both:
        found = info_nce(q, k, temperature=300.0, **options, backend=backend).loss
        s = q.double() @ k.double().T
        away = s > s.diagonal()[:, None] + 1e-9
        exact = nn.functional.cross_entropy((s / 300).masked_fill(away, -1e4), torch.arange(64))
        assert away.any()
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_clip_loss_is_info_nce_both_ways():
    """With each of its options; a pair's row weight holds in both directions."""
    unit = nn.functional.normalize
    q, k = leaves = graded(unit(Q, dim=1), unit(K, dim=1))
    every: tuple[dict[str, Any], ...] = (
        {},
        {"max_scale": 1.5},
        {"ids": IDS},
        {"false_negative_margin": 0.1},
        {"guide": (Q, K), "guide_margin": 0.2, "guide_margin_kind": "relative"},
        {"tau_plus": 0.1},
        {"label_smoothing": 0.1, "row_weights": torch.linspace(0, 1, N).double()},
        {"prefixes": (2, 5), "prefix_weights": (1, 0.5)},
    )
    for options in every:
        others = {{"ids": "query_ids"}.get(name, name): x for name, x in options.items()}
        same(
            clip_loss(q, k, 2.0, **options, backend="chunked").loss,
            info_nce(q, k, temperature=0.5, symmetric=True, **others, backend="chunked").loss,
            leaves,
        )
        module = CLIPLoss(backend="chunked", **{x: y for x, y in options.items() if x not in TENSORS})
        assert torch.equal(
            module(q, k, 2.0, **{x: y for x, y in options.items() if x in TENSORS}).loss,
            clip_loss(q, k, 2.0, **options, backend="chunked").loss,
        )
    assert clip_loss(q, k, 2.0, ids=IDS).loss != clip_loss(q, k, 2.0).loss
    with pytest.raises(ValueError, match=r"^ids: got shape \(5,\), need \(N,\) = \(6,\)$"):
        clip_loss(q, k, 2.0, ids=IDS[:5])


def test_clip_loss_of_several_positives():
    """Half of each direction's `info_nce`, with the rows' weights and smoothing of both."""
    q, k, scale = leaves = graded(*(nn.functional.normalize(x, dim=1) for x in (Q, K)), torch.tensor(2.0).double())
    texts, images = torch.tensor([[0, 1], [1, -1], [2, 0], [3, 4], [5, 4], [5, -1]]), torch.arange(N)[:, None]
    weights = tuple(torch.rand(x.shape, dtype=torch.float64).masked_fill(x < 0, 0.0) for x in (texts, images))
    shares = [w / w.sum(1, keepdim=True) for w in weights]
    soft = tuple(zip((texts, images), shares, strict=True))
    cases: list[tuple[dict[str, Any], str, Any]] = [
        ({}, "positives", (texts, images)),
        ({"label_smoothing": 0.1, "row_weights": torch.linspace(0, 1, N).double()}, "positives", [texts, images]),
        ({"max_scale": 1.5}, "soft_targets", soft),
    ]
    for options, name, pair in cases:
        found = clip_loss(q, k, scale, **{name: pair}, **options, backend="chunked")
        ways = [
            info_nce(x, y, temperature=1 / scale, **{name: z}, **options, backend="chunked").loss
            for x, y, z in ((q, k, pair[0]), (k, q, pair[1]))
        ]
        same(found.loss, (ways[0] + ways[1]) / 2, leaves)
        assert found.nce == found.loss
        module = CLIPLoss(backend="chunked", **{x: y for x, y in options.items() if x not in TENSORS})
        given = {name: pair} | {x: y for x, y in options.items() if x in TENSORS}
        assert torch.equal(module(q, k, scale, **given).loss, found.loss)
    for options, message in (
        ({"positives": texts}, r"positives: got Tensor, need a pair: of the images and of the texts"),
        ({"soft_targets": soft[0] + soft[1]}, r"soft_targets: got 4 of them, need a pair"),
        ({"positives": (texts, images), "ids": IDS}, r"positives: got it with targets, ids, .*, need none of them"),
        ({"positives": (texts, images), "prefixes": (2,)}, r"prefixes: got them with positives or soft_targets"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            clip_loss(q, k, scale, **options)


@pytest.mark.nightly  # compiled
def test_targets_are_looked_at_in_a_compiled_graph():
    """Where no message can be made of values, a wrong sum or index still stops the call."""
    compiled = torch.compile(lambda t, w: info_nce(Q, K, soft_targets=(t, w), backend="chunked").loss)
    at, half = torch.tensor([[0, 1]] * N), torch.full((N, 2), 0.5).double()
    assert compiled(at, half).isfinite()
    for t, w in ((at, half * 1.5), (at + N, half), (at, torch.tensor([[1.5, -0.5]] * N).double())):
        with pytest.raises(RuntimeError, match="soft_targets: got others, need -1 <= index < M = 6"):
            compiled(t, w)


def test_hardness_weighs_and_is_not_differentiated():
    """t = s + α·sg(r) of the negatives: the gradient holds the second part still, by the temperature too."""
    q, k, t = leaves = graded(Q, K, torch.tensor(0.5).double())
    own = torch.eye(N, dtype=torch.bool)
    r = q @ k.T
    weighed = r / t + (1.5 * r.detach()).masked_fill(own, 0.0)
    exact = nn.functional.cross_entropy(weighed, torch.arange(N))
    found = info_nce(q, k, hardness=1.5, temperature=t, backend="chunked")
    same(found.loss, exact, leaves)
    each: tuple[dict[str, Any], ...] = ({}, {"tau_plus": 0.1})
    for more in each:  # of weighed negatives there is no bound, and the highest is none of the scores'
        assert info_nce(q, k, hardness=1.5, **more).stats.keys() == {"pos_mean", "neg_lse_mean"}


def test_several_positives_are_a_set_and_soft_targets_a_distribution():
    """One alone is a target; a column named twice counts once, or with both weights; equal weights are positives."""
    q, k = leaves = graded(Q, K)
    twice = torch.tensor([[i, (i + 1) % N, i] for i in range(N)])
    pairs = torch.stack([twice[:, 0], twice[:, 1]], dim=1)
    for backend in ("reference", "chunked"):
        how = F64 | {"backend": backend}
        one = info_nce(q, k, positives=torch.arange(N)[:, None], **how).loss
        same(one, info_nce(q, k, **how).loss, leaves)
        same(info_nce(q, k, positives=twice, **how).loss, info_nce(q, k, positives=pairs, **how).loss, leaves)
        halves, thirds = (torch.tensor([x]).double().repeat(N, 1) for x in ([0.5, 0.5], [0.25, 0.5, 0.25]))
        for soft in ((pairs, halves), (twice, thirds)):
            same(info_nce(q, k, soft_targets=soft, **how).loss, info_nce(q, k, positives=pairs, **how).loss, leaves)
        # Weights in 16 bits round, and are none the less of sum 1.
        narrow = torch.tensor([[1 / 3, 2 / 3]]).repeat(N, 1).to(torch.bfloat16)
        assert info_nce(q, k, soft_targets=(pairs, narrow), **how).loss.isfinite()
        # The row's own label set, as SupCon has it.
        every = torch.stack([torch.where(IDS[i] == IDS, torch.arange(N), -1) for i in range(N)])
        s = 2 * q @ k.T
        exact = torch.stack([(s[i].logsumexp(0) - s[i][IDS[i] == IDS]).mean() for i in range(N)]).mean()
        same(info_nce(q, k, positives=every, **how).loss, exact, leaves)


def test_a_clamped_scale_has_no_gradient_beyond_its_limit():
    for temperature, wants in ((0.2, True), (0.005, False)):
        t = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
        loss = info_nce(Q, K, temperature=t, max_scale=100.0, backend="reference").loss
        assert torch.equal(loss, info_nce(Q, K, temperature=max(temperature, 0.01), backend="reference").loss)
        assert (torch.autograd.grad(loss, t)[0] != 0) == wants


@pytest.mark.parametrize("n", [1, 2, 3])
def test_rows_without_negatives_cost_nothing(n):
    """Ids that are all one, or a single row: loss and gradients 0, whatever the direction."""
    q, k = leaves = graded(Q[:n], K[:n])
    for options in (
        {},
        {"directions": ("q2k", "q2q", "k2k"), "joint": True},
        {"tau_plus": 0.1},
        {"label_smoothing": 0.1},
    ):
        out = info_nce(q, k, query_ids=torch.zeros(n, dtype=torch.int64), **options, **F64)
        grads = torch.autograd.grad(out.loss, leaves)
        assert out.loss == 0
        assert not any(g.any() for g in grads)
    hidden = info_nce(q, k, query_ids=torch.arange(n), false_negative_margin=-100.0, **F64)
    assert hidden.loss == 0


def test_a_score_that_is_not_finite_shows():
    """In every option's loss."""
    bad = K.clone()
    bad[2, 1] = float("nan")
    hard = HARD.clone()
    hard[1, 0, 0] = float("inf")
    options = (
        {"query_ids": IDS},
        {"false_negative_margin": 0.1},
        {"guide": (Q, K)},
        {"hardness": 1.0},
        {"tau_plus": 0.1},
        {"label_smoothing": 0.1},
        {"directions": ("k2k", "q2q"), "joint": True},
        {"prefixes": (2, 5)},
        {"column_bias": torch.zeros(N).double()},
    )
    for each in options:
        assert info_nce(Q, bad, **each, backend="chunked").loss.isnan(), each
    for share in (False, True):
        assert not info_nce(Q, K, hard_negatives=hard, share_hard_negatives=share, backend="chunked").loss.isfinite()


def test_targets_keep_their_bits_under_autocast_and_drop_what_weighs_nothing():
    q, k = (x.bfloat16().float() for x in (Q, K))  # what autocast would round is rounded already
    columns = torch.stack([torch.arange(N), (torch.arange(N) + 1) % N], dim=1)
    weights = torch.tensor([0.75, 0.25]).expand(N, 2)
    for targets in ({"positives": columns}, {"soft_targets": (columns, weights)}):
        plain = info_nce(q, k, **targets).loss
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(info_nce(q, k, **targets).loss, plain)
    bias = torch.zeros(N).double()
    bias[1] = -math.inf
    rest = columns.clone()
    rest[0, 1] = -1
    one = torch.tensor([1.0, 0.0]).expand(N, 2).double()
    found, wanted = (
        info_nce(Q, K, soft_targets=(x, one), column_bias=bias, label_smoothing=0.1, reduction="none", **F64).nce
        for x in (columns, rest)
    )
    torch.testing.assert_close(found[0], wanted[0])
    assert found[0].isfinite().all()


def test_without_a_negative_left_a_rows_negatives_sum_to_nothing():
    out = info_nce(Q, K, column_bias=torch.tensor([0.0] + [-math.inf] * (N - 1)).double(), reduction="none")
    assert out.nce[0] == 0
    assert out.stats["neg_lse_mean"] == -math.inf


def test_a_guide_that_is_not_finite_shows():
    for i, bad in itertools.product(range(2), (math.nan, math.inf, -math.inf)):
        guide = [Q.clone(), torch.cat([K, K[:1]])]
        guide[i][-1, 0] = bad  # a column that is nobody's own among them
        more = torch.cat([K, K[:1]])
        assert info_nce(Q, more, torch.arange(N), guide=tuple(guide), **F64).loss.isnan()


@pytest.mark.parametrize("bad", [1e38, -1e38])
def test_a_positive_beyond_float32_shows(bad, backend):
    """Among the other queries alone no score of its row is bad: as cross entropy in float32 has it."""
    q, k = torch.ones(4, 3), torch.ones(4, 3)
    k[1] = bad
    loss = info_nce(q, k, directions=["q2q"], backend=backend).loss
    scores = 10 * q @ q.T
    dense = nn.functional.cross_entropy(
        scores.masked_fill(torch.eye(4, dtype=torch.bool), 0) + torch.diag(10 * (q * k).sum(1)), torch.arange(4)
    )
    assert not loss.isfinite()
    assert loss.isnan() == dense.isnan()


ONES, AT = torch.ones(N), IDS[:, None]
SHARED: dict[str, Any] = {"hard_negatives": HARD, "share_hard_negatives": True}
ERRORS: dict[str, dict[str, Any]] = {
    "directions: got ('q2d',), need some of 'q2k', 'k2q', 'q2q', 'k2k', each once": {"directions": ("q2d",)},
    "directions: got NoneType, need a sequence": {"directions": None},
    "directions: got ('q2q',) with symmetric=True, need one of the two": {"directions": ("q2q",), "symmetric": True},
    "hard_negatives: got shape (6, 5), need (N, H, D)": {"hard_negatives": Q},
    "hard_negatives: got N = 4, need queries' 6": {"hard_negatives": HARD[:4]},
    "share_hard_negatives: got it with no hard_negatives, need some": {"share_hard_negatives": True},
    "key_ids: got some without query_ids, need both": {"key_ids": IDS},
    "query_ids: got 1 for row 1, whose own key has the id 5, need the same": {
        "query_ids": IDS,
        "key_ids": IDS.index_fill(0, torch.tensor([1]), 5),
    },
    "guide: got 1 tensors, need a tuple of (N, G) and (M, G)": {"guide": (Q,)},
    "guide: got 2 tensors, need a tuple of (N, G) and (M, G) and (N, H, G)": {"guide": (Q, K)} | SHARED,
    "guide: got shape (6, 3) on cpu, need (M, G) = (6, 5) on cpu": {"guide": (Q, K[:, :3])},
    "guide_margin: got it with no guide, need one": {"guide_margin": 0.1},
    "guide_margin_kind: got 'percent', need one of 'absolute', 'relative'": {"guide_margin_kind": "percent"},
    "hardness: got -1, need a finite number >= 0": {"hardness": -1},
    "hardness: got it with clip, need clip=None": {"hardness": 1.0, "clip": 3.0},
    "tau_plus: got 1.0, need < 1": {"tau_plus": 1.0},
    "label_smoothing: got 1.0, need < 1": {"label_smoothing": 1.0},
    "row_weights: got shape (5,) on cpu, need (N,) = (6,) on cpu": {"row_weights": torch.ones(5)},
    "column_bias: got it with directions ('q2k', 'k2q'), false_negative_margin None, clip None, hardness 0.0, "
    "need ('q2k',) without symmetric, None, None and 0": {"column_bias": ONES, "symmetric": True},
    **{
        f"column_bias: got it with directions ('q2k',), false_negative_margin {m}, clip {c}, hardness {h}, "
        "need ('q2k',) without symmetric, None, None and 0": {
            **{"column_bias": ONES, "false_negative_margin": m, "clip": c, "hardness": h}  # noqa: PIE800
        }
        for m, c, h in ((0.1, None, 0.0), (None, 3.0, 0.0), (None, None, 1.5))
    },
    "hard_negatives: got it with directions ('k2q',), in which none is a candidate, need 'q2k' among them": {
        "hard_negatives": HARD,
        "directions": ["k2q"],
    },
    "penalty: got 0.2 with more than keys, clip and filters, need 0": {"penalty": 0.2} | SHARED,
    "penalty: got 0.1 with more than keys, clip and filters, need 0": {"penalty": 0.1, "hardness": 1.0},
    "positives: got torch.float64, need (N, P) int64 indices": {"positives": Q},
    "positives: got shape (6,) on cpu, need (N, P) indices of N = 6 rows on cpu": {"positives": IDS},
    "positives: got 6, need -1 <= index < M = 6": {"positives": torch.full((6, 1), 6)},
    "positives: got none for row 2, need at least one": {"positives": torch.tensor([[0], [1], [-1], [2], [3], [4]])},
    "positives: got it with targets, ids, a guide, a margin, tau_plus, symmetric or directions, which are of one "
    "positive a row, need none of them": {"positives": AT, "symmetric": True},
    "soft_targets: got it with targets, ids, a guide, a margin, tau_plus, symmetric or directions, which are of one "
    "positive a row, need none of them": {"soft_targets": (AT, Q[:, :1] * 0 + 1), "tau_plus": 0.1},
    "soft_targets: got them with positives, need one of the two": {"positives": AT, "soft_targets": (AT, Q[:, :1])},
    "soft_targets: got Tensor, need a pair (indices, weights)": {"soft_targets": Q},
    "soft_targets: got weights torch.float64 (6, 5), need floats of (6, 1) on cpu": {"soft_targets": (AT, Q)},
    "soft_targets: got weights of sum 0.5 for row 0, need weights >= 0 of sum 1": {
        "soft_targets": (AT, torch.full((6, 1), 0.5))
    },
    "prefixes: got them with positives or soft_targets, need one of the two": {"positives": AT, "prefixes": (2,)},
    "prefixes: got 9, need 1 <= prefix <= D = 5": {"prefixes": (2, 9)},
    "prefixes: got int, need a sequence": {"prefixes": 2},
    "prefix_weights: got float, need a sequence": {"prefixes": (2,), "prefix_weights": 1.0},
    "temperature: got 1e-45, need a number whose inverse float32 holds": {"temperature": 1e-45},
    "temperature: got str, need a number (int, float or NumPy's) or a 0-d tensor": {"temperature": "0.1"},
    "prefix_weights: got 1, need one for each of 2 prefixes": {"prefixes": (2, 5), "prefix_weights": (1.0,)},
    "prefix_weights: got some without prefixes, need None": {"prefix_weights": (1.0,)},
    "max_scale: got 0, need a finite number > 0": {"max_scale": 0},
}


def test_messages():
    for message, options in ERRORS.items():
        with pytest.raises((ValueError, TypeError)) as caught:
            info_nce(Q, K, **options)
        assert str(caught.value) == message
        if not any(isinstance(x, (torch.Tensor, tuple)) for x in options.values()):
            with pytest.raises((ValueError, TypeError)):
                InfoNCELoss(**options)(Q, K)


BY_TARGETS: tuple[dict[str, Any], ...] = (
    {"symmetric": True},
    {"hard_negatives": HARD},
    {"hard_negatives": HARD, "share_hard_negatives": True},
    {"directions": ("k2q",)},
    {"query_ids": IDS, "key_ids": IDS},
    {"guide": (Q, K)},
    {"label_smoothing": 0.1},
    {"row_weights": ONES},
    {"column_bias": ONES},
    {"prefixes": (2,)},
)


def test_targets_are_among_the_keys_whatever_is_chosen():
    """-1 is no last key, and a hard negative no positive."""
    for bad, options in itertools.product((-1, N, N + 1), BY_TARGETS):
        with pytest.raises(ValueError, match=rf"^targets: got {bad}, need 0 <= index < {N}$"):
            info_nce(Q, K, torch.arange(N).index_fill(0, torch.tensor([2]), bad), **options)
    several = torch.stack([torch.arange(N), torch.arange(N).flip(0)])
    losses = [info_nce(Q, K, t, label_smoothing=0.1).loss for t in several]
    assert torch.equal(torch.vmap(lambda t: info_nce(Q, K, t, label_smoothing=0.1).loss)(several), torch.stack(losses))
    with FakeTensorMode(allow_non_fake_inputs=True):  # has no numbers
        assert info_nce(Q, K, torch.arange(N), label_smoothing=0.1).loss.shape == ()
    assert make_fx(lambda t: info_nce(Q, K, t, row_weights=torch.ones(N)).loss)(several[0])(several[1]).isfinite()


def test_clip_loss_checks_choices_that_nothing_uses():
    x = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    for options in ({"guide_margin_kind": "zzz"}, {"guide_margin": 0.1}):
        with pytest.raises(ValueError, match=r"^guide_margin"):
            clip_loss(x, x, 10.0, **options)


PERMUTED = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i)) for i in range(2)])
AFTER = torch.stack([PERMUTED, PERMUTED.roll(1, dims=1)], dim=2)
INDEXED: dict[str, tuple[torch.Tensor, Any]] = {
    "targets: got one key twice": (PERMUTED, lambda q, t: info_nce(q, K, t, symmetric=True)),
    "positives: got others": (AFTER, lambda q, t: info_nce(q, K, positives=t)),
    "soft_targets: got others": (
        AFTER,
        lambda q, t: info_nce(q, K, soft_targets=(t, torch.full((N, 2), 0.5).double())),
    ),
    "query_ids: got another": (PERMUTED, lambda q, t: info_nce(q, K, query_ids=t, key_ids=PERMUTED[0])),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("message", INDEXED)
def test_indices_are_read_through_a_vmap_and_not_where_they_are_fake(message):
    indices, loss = INDEXED[message]
    good = indices[:1].expand(2, *indices.shape[1:])
    rows = torch.stack([Q, 2 * Q])
    torch.testing.assert_close(
        torch.vmap(lambda q, t: loss(q, t).loss)(rows, good), torch.stack([loss(q, good[0]).loss for q in rows])
    )
    wrong = good.clone()
    wrong[1, 0] = 99 if indices.dim() == 3 else good[1, 1]
    with pytest.raises(ValueError, match=f"^{message}"):
        torch.vmap(lambda q, t: loss(q, t).loss)(rows, wrong)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert loss(mode.from_tensor(Q), mode.from_tensor(good[0])).loss.shape == ()
