"""pytorch-metric-learning's losses on random configurations, its memory, its state, and the way out to upstream."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from fused_nce.compat import pml
from fused_nce.compat.pml import base
from tests.compat import pml_dense as dense
from tests.compat.harness import both
from tests.refusals import unlike

LOSSES = {"NTXentLoss": dense.nt_xent, "SupConLoss": dense.sup_con}
INSTALLED = importlib.util.find_spec("pytorch_metric_learning") is not None


def stand_in(name, folder, **attributes):
    """An object that looks like the package's own."""
    kind = type(name, (nn.Module,), {"__module__": f"pytorch_metric_learning.{folder}"})
    found = kind()
    for key, value in attributes.items():
        setattr(found, key, value)
    return found


def options(pick):
    """Constructor options, and what the formula is told."""
    normalize, reducer = pick.random() < 0.7, pick.choice((None, "mean", "nonzero"))
    given = {}
    if not normalize:
        attributes = {"normalize_embeddings": False, "p": 2, "power": 1}
        given["distance"] = stand_in("DotProductSimilarity", "distances.dot_product_similarity", **attributes)
    if reducer:
        kind = {"mean": "MeanReducer", "nonzero": "AvgNonZeroReducer"}[reducer]
        given["reducer"] = stand_in(kind, "reducers.any")
    return given, {"normalize": normalize, **({"reducer": reducer} if reducer else {})}


def posed(at, least, fewest):
    """Rows among themselves, among others with labels, or among others without; a check of a loss and its formula."""
    g, pick = at.generator, at.pick
    n, width, classes = pick.randint(least, 12), pick.choice((3, 16)), pick.randint(1, 4)
    ids = torch.randint(0, classes, (n,), generator=g)
    form = pick.choice(("self", "ref", "ref without labels"))
    m = pick.randint(fewest, 12) if form == "ref" else n
    other = torch.randint(-1, classes, (m,), generator=g) if form == "ref" else ids
    rows = [0.5 * torch.randn(x, width, generator=g, dtype=torch.float64) for x in (n, m)]
    found = dense.pairs(ids.tolist(), other.tolist(), None if form == "ref" else 0)
    labels = ids.to(pick.choice((torch.int32, torch.int64)))

    def check(loss, formula, *numbers, **told):
        def ours(q, k):
            return loss(q, labels, *(() if form == "self" else (None, k, other if form == "ref" else None)))

        at.agree(ours, lambda q, k: formula(q, q if form == "self" else k, *found, *numbers, **told), rows)

    return check


@both
def test_losses(at):
    """Dot products and both reducers."""
    check, temperature = posed(at, 3, 3), at.pick.choice((0.1, 0.5))
    given, told = options(at.pick)
    for name, formula in LOSSES.items():
        check(getattr(pml, name)(temperature, **given), formula, temperature, **told)


@both
def test_margins(at):
    """Pairs and triplets, of distances and similarities."""
    check, pick = posed(at, 2, 1), at.pick
    given, told = options(pick)
    told["similar"] = pick.random() < 0.5
    if told["similar"]:
        kind = "CosineSimilarity" if told["normalize"] else "DotProductSimilarity"
        given["distance"] = stand_in(kind, "distances.any", normalize_embeddings=told["normalize"], p=2, power=1)
    elif "distance" in given:
        given["distance"] = stand_in("LpDistance", "distances.any", normalize_embeddings=False, p=2, power=1)
    pos_margin, neg_margin, margin = pick.choice((0, 0.3)), pick.choice((1, 0.4, 0)), pick.choice((0.05, 0.7))
    check(pml.ContrastiveLoss(pos_margin, neg_margin, **given), dense.contrastive, pos_margin, neg_margin, **told)
    check(pml.TripletMarginLoss(margin, **given), dense.triplet, margin, **told)


@both
def test_memory(at):
    """Several steps around the ring's end, with a mask now and then: enqueue first, no row with its own copy."""
    g, pick = at.generator, at.pick
    size, width, temperature = pick.randint(4, 12), pick.choice((3, 8)), 0.2
    name = pick.choice(tuple(LOSSES))
    memory = pml.CrossBatchMemory(getattr(pml, name)(temperature), width, size).to(at.dtype)
    kept: list[tuple[torch.Tensor, int]] = []
    for step in range(5):
        n = pick.randint(2, size)
        ids = torch.randint(0, 3, (n,), generator=g)
        x = torch.randn(n, width, generator=g, dtype=torch.float64)
        mask = torch.rand(n, generator=g) < 0.5 if step == 3 else None
        enter = list(range(n)) if mask is None else mask.nonzero()[:, 0].tolist()
        rows = list(range(n)) if mask is None else (~mask).nonzero()[:, 0].tolist()
        kept = (kept + [(x[i], int(ids[i])) for i in enter])[-size:]
        twin = copy.deepcopy(memory)
        value = memory(x.to(at.dtype), ids, enqueue_mask=mask)
        if not rows or not kept:
            assert value == 0
            continue
        columns, other = torch.stack([y for y, _ in kept]), [y for _, y in kept]
        itself = len(kept) - n if mask is None else None
        found = dense.pairs(ids[rows].tolist(), other, itself)
        at.agree(
            lambda x, twin=twin, ids=ids, mask=mask: copy.deepcopy(twin)(x, ids, enqueue_mask=mask),
            lambda x, rows=rows, columns=columns, found=found: LOSSES[name](
                x[rows], columns, found[0], found[1], temperature
            ),
            [x],
        )
        real = memory.embedding_memory[: size if memory.has_been_filled else memory.queue_idx]
        assert sorted(real.double().sum(1).tolist()) == pytest.approx(sorted(columns.sum(1).tolist()), abs=1e-4)


@both
def test_self_supervised(at):
    g, pick = at.generator, at.pick
    n, width, temperature = pick.randint(2, 9), pick.choice((3, 16)), pick.choice((0.1, 0.5))
    symmetric = at.seed % 2 == 0
    views = [torch.randn(n, width, generator=g, dtype=torch.float64) for _ in range(2)]
    for name, formula in LOSSES.items():
        loss = pml.SelfSupervisedLoss(getattr(pml, name)(temperature), symmetric=symmetric)

        def theirs(a, b, formula=formula):
            rows = torch.cat((a, b)) if symmetric else a
            ids = list(range(n)) * (1 + symmetric)
            found = dense.pairs(ids, ids, 0 if symmetric else None)
            return formula(rows, rows if symmetric else b, *found, temperature)

        at.agree(loss, theirs, views)


def test_nothing_to_compare_costs_nothing():
    """One class, or as many classes as rows: 0, with a gradient of 0 and not none."""
    for loss in (pml.NTXentLoss(), pml.SupConLoss(), pml.TripletMarginLoss()):
        for labels in (torch.zeros(4, dtype=torch.int64), torch.arange(4)):
            x = torch.randn(4, 3, requires_grad=True)
            value = loss(x, labels)
            value.backward()
            assert value == 0
            assert x.grad is not None
            assert not x.grad.any()


def test_a_nan_is_not_hidden():
    for loss in (pml.NTXentLoss(), pml.SupConLoss(), pml.TripletMarginLoss(), pml.ContrastiveLoss()):
        x = torch.randn(6, 3)
        x[2, 1] = float("nan")
        assert loss(x, torch.tensor([0, 0, 1, 1, 2, 2])).isnan()


def filled(steps):
    memory = pml.CrossBatchMemory(pml.NTXentLoss(), 4, 10)
    torch.manual_seed(0)
    for _ in range(steps):
        memory(torch.randn(4, 4), torch.tensor([0, 0, 1, 2]))
    return memory


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_the_memorys_state_is_whole(steps):
    """With its pointer; of a state of upstream's, which has none, by the rows that are not 0."""
    memory = filled(steps)
    batch = torch.randn(4, 4), torch.tensor([0, 1, 1, 2])
    fresh = pml.CrossBatchMemory(pml.NTXentLoss(), 4, 10)
    fresh.load_state_dict(memory.state_dict())
    for twin in (fresh, copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert (twin.queue_idx, twin.has_been_filled) == (memory.queue_idx, memory.has_been_filled)
        assert torch.equal(twin(*batch), copy.deepcopy(memory)(*batch))
    upstreams = {key: memory.state_dict()[key] for key in ("embedding_memory", "label_memory")}
    other = pml.CrossBatchMemory(pml.NTXentLoss(), 4, 10)
    other.load_state_dict(upstreams)
    assert other.has_been_filled == memory.has_been_filled
    assert other.queue_idx == (0 if memory.has_been_filled else memory.queue_idx)
    other.reset_queue()
    assert (other.queue_idx, other.has_been_filled, bool(other.embedding_memory.any())) == (0, False, False)


def test_a_backward_after_the_memory_moved_on():
    memory, x = filled(3), torch.randn(4, 4, requires_grad=True)
    twin = copy.deepcopy(memory)
    labels = torch.tensor([0, 1, 1, 2])
    loss = memory(x, labels)
    memory(torch.randn(4, 4), labels)
    (late,) = torch.autograd.grad(loss, x)
    (early,) = torch.autograd.grad(twin(x, labels), x)
    assert torch.equal(late, early)


# ---- what is not fused ------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Upstream's code, which here gives its arguments back."""
    if INSTALLED:
        pytest.skip("pytorch-metric-learning is installed, and asked in test_packages.py")
    monkeypatch.setattr(base, "INSTALLED", True)
    monkeypatch.setattr(base, "_logged", set())
    monkeypatch.setattr(base._Alone, "forward", lambda self, *arguments: (torch.tensor(7.0), arguments))


def odd():
    """Options that no kernel honours."""
    return {
        "distance=SNRDistance": {"distance": stand_in("SNRDistance", "distances.snr_distance")},
        "distance=Mine": {"distance": nn.Module()},
        "distance=CosineSimilarity": {"distance": stand_in("CosineSimilarity", "distances.x", power=2)},
        "reducer=ThresholdReducer": {"reducer": stand_in("ThresholdReducer", "reducers.x")},
        "embedding_regularizer": {"embedding_regularizer": nn.Module()},
        "collect_stats": {"collect_stats": True},
    }


@pytest.mark.parametrize("reason", odd())
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_not_fused_goes_to_upstream_and_says_so(installed, name, reason, caplog):
    given = odd()[reason]
    loss = getattr(pml, name)(0.3, **given)
    x, labels = torch.randn(4, 3), torch.arange(4)
    for _ in range(2):
        value, arguments = loss(x, labels)
        assert value == 7
        assert arguments[:2] == (x, labels)
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith(f"pml: {name} runs in pytorch-metric-learning: {reason.replace('Mine', 'Module')}")


def test_pairs_of_a_miner_go_to_upstream(installed):
    x, labels, indices = torch.randn(4, 3), torch.arange(4), (torch.tensor([0]),) * 3
    value, arguments = pml.NTXentLoss()(x, labels, indices)
    assert (value, arguments[2]) == (7, indices)
    for memory, rest in (
        (pml.CrossBatchMemory(pml.NTXentLoss(), 3, 8, miner=nn.Module()), ()),
        (pml.CrossBatchMemory(pml.NTXentLoss(), 3, 8), (indices,)),
        (pml.CrossBatchMemory(nn.Module(), 3, 8), ()),
    ):
        value, arguments = memory(x, labels, *rest)
        assert (value, arguments[:2]) == (7, (x, labels))


@pytest.mark.skipif(INSTALLED, reason="pytorch-metric-learning is installed")
def test_without_upstream_it_raises():
    with pytest.raises(
        NotImplementedError, match=r"^NTXentLoss: got indices_tuple, which is not fused, need pytorch-m"
    ):
        pml.NTXentLoss()(torch.randn(4, 3), torch.arange(4), (torch.tensor([0]),) * 3)
    settings: tuple[dict[str, Any], ...] = (
        {"swap": True},
        {"smooth_loss": True},
        {"triplets_per_anchor": 2},
        {"margin": -0.1},
    )
    for words in settings:
        loss, ((word, value),) = pml.TripletMarginLoss(**words), words.items()
        with pytest.raises(NotImplementedError, match=rf"^TripletMarginLoss: got {word}={value}, which is not fused"):
            loss(torch.randn(4, 3), torch.arange(4))


WORD: Any = "0.1"


REFUSED: list[Any] = [
    (ValueError, "temperature: got 0", lambda x: pml.NTXentLoss(0)),
    (TypeError, "SupConLoss: got distanc, need distance", lambda x: pml.SupConLoss(distanc=None)),
    (ValueError, "labels: got None, need", lambda x: pml.NTXentLoss()(x)),
    (TypeError, "labels: got torch.complex64, need n", lambda x: pml.NTXentLoss()(x, x[:, 0] + 0j)),
    (TypeError, "labels: got list, need a tensor", lambda x: pml.NTXentLoss()(x, [0, 0, 1, 1])),
    (TypeError, "labels: got ndarray, need a tensor", lambda x: pml.SupConLoss()(x, torch.arange(4).numpy())),
    (TypeError, "labels: got list, need a tensor", lambda x: XBM(9)(x, [0, 0, 1, 1])),
    (TypeError, "ref_labels: got list, need a t", lambda x: pml.NTXentLoss()(x, x[:, 0], None, x, [0, 0, 1, 1])),
    (TypeError, r"temperature: got str, need a number \(int", lambda x: pml.NTXentLoss(WORD)),
    (ValueError, "labels: got shape .3,.", lambda x: pml.NTXentLoss()(x, torch.arange(3))),
    (ValueError, "ref_emb: got width D = 2", lambda x: pml.NTXentLoss()(x, torch.arange(4), None, x[:, :2])),
    (ValueError, "ref_emb: got N = 3, need", lambda x: pml.SupConLoss()(x, torch.arange(4), None, x[:3])),
    (ValueError, "memory_size: got 0", lambda x: pml.CrossBatchMemory(pml.NTXentLoss(), 3, 0)),
    (TypeError, "CrossBatchMemory: got minor", lambda x: pml.CrossBatchMemory(pml.NTXentLoss(), 3, minor=1)),
    (ValueError, "embeddings: got N = 4, need <= mem", lambda x: XBM(3)(x, torch.arange(4))),
    (ValueError, "embeddings: got width D = 2", lambda x: XBM(9)(x[:, :2], torch.arange(4))),
    (ValueError, "enqueue_mask: got one with indices", lambda x: XBM(9)(x, torch.arange(4), (x,), x[:, 0] > 0)),
    (ValueError, "ddp_compat: got 'theirs'", lambda x: pml.DistributedLossWrapper(XBM(9), ddp_compat="theirs")),
]


def test_refused():
    x = torch.randn(4, 3)
    assert unlike([(partial(call, x), error, f"^{message}") for error, message, call in REFUSED]) == []


def XBM(size):
    return pml.CrossBatchMemory(pml.NTXentLoss(), 3, size)
