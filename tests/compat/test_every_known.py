"""`patch` and `verify` on every class that is known: a stand-in with upstream's settings and the dense formula."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from fused_nce import patch, verify
from fused_nce.compat import bolts, known, lightly
from tests.compat import dense, pml_dense

Formula = Callable[..., Any]
LIGHTLY, CLIP, BOLTS, PML = "lightly.loss.x", "open_clip.loss", known.BOLTS, f"{known.PML}.x"
N, D = 6, 5


def stand_in(name: str, module: str, formula: Formula, **attributes: Any) -> nn.Module:
    """A module of somebody's class; the formula is given it."""
    found: nn.Module = type(name, (nn.Module,), {"__module__": module, "forward": formula})()
    for key, value in attributes.items():
        setattr(found, key, value)
    return found


def empty_bank():
    bank = nn.Module()
    bank.size = (0,)  # type: ignore[assignment]
    return bank


def unit(*shape):
    return nn.functional.normalize(torch.randn(*shape), dim=-1)


def unit_rows(x):
    return nn.functional.normalize(x, dim=1)


def sampled(x):
    """One place an image, as torch draws it, (B, C)."""
    flat = x.flatten(2)
    return flat[torch.arange(len(x)), :, torch.randint(0, flat.shape[2], (len(x),))]


def columns(x):
    return x.movedim(1, 0).flatten(1)


def amdim(self, r_src, r_trg, mask):
    log_p, _, penalty = dense.amdim_scores(r_src, r_trg, len(mask), self.tclip)
    return -log_p.mean(), penalty


def multi_nce(self, r1_1, r5_1, r7_1, r1_2, r5_2, r7_2):
    places = [torch.randint(0, 25, (len(r5_1),)) for _ in range(2)]
    every = torch.arange(len(r5_1))
    drawn = [x.flatten(2)[every, :, at] for x, at in zip((r5_1, r5_2), places, strict=True)]
    sources = (r1_1.flatten(1), drawn[0], r1_2.flatten(1), drawn[1])
    return dense.amdim_multi(sources, [columns(x) for x in (r5_1, r7_1, r5_2, r7_2)], len(r5_1), self.nce_func.tclip)


def feature_maps(self, anchors, positives):
    images = len(anchors[0])
    log_p, _, penalty = dense.amdim_scores(sampled(anchors[0]), columns(positives[0]), images, self.tclip)
    return -log_p.mean()[None], penalty


def cpc(self, z):
    maps = (self.target_cnn(z), self.pred_cnn(self.context_cnn(z)))
    targets, predictions = (x.permute(0, 2, 3, 1) for x in maps)
    return dense.cpc(targets, predictions, self.embed_scale)


def pairs(formula: Formula, *settings: str) -> Formula:
    """A pair loss of a batch with its labels."""

    def forward(self, embeddings, labels):
        chosen = pml_dense.pairs(labels, labels, 0)
        return formula(embeddings, embeddings, *chosen, *(getattr(self, name) for name in settings))

    return forward


def in_memory(self, embeddings, labels):
    """After entering a memory of as many rows."""
    self.embedding_memory.copy_(embeddings.detach()), self.label_memory.copy_(labels)
    own, others = pml_dense.pairs(labels, labels, 0)
    return pml_dense.sup_con(embeddings, self.embedding_memory.clone(), own, others, self.loss.temperature)


def sup_con(self, features, labels):
    return dense.sup_con(features, labels, self.temperature, self.base_temperature, self.contrast_mode)


def words(module: nn.Module, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}


def made() -> dict[str, tuple[nn.Module, Callable[[], list[Any]]]]:
    """By name and module: the stand-in, and how its arguments are drawn."""
    labels = torch.tensor([0, 1, 0, 2, 1, 2])
    two = lambda: [torch.randn(N, D), torch.randn(N, D)]  # noqa: E731
    rows = lambda: [torch.randn(N, D), labels]  # noqa: E731
    clip = lambda: [unit(N, D), unit(N, D), torch.tensor(9.0), torch.tensor(-2.0)]  # noqa: E731
    maps = lambda: [torch.randn(3, 4, s, s) for s in (1, 5, 7) * 2]  # noqa: E731
    weights = functools.partial(lightly.negative_mises_fisher_weights, sigma=0.4)
    task = bolts.CPCTask(3, 5, 0.2)
    parts = words(task, "target_cnn", "pred_cnn", "context_cnn", "target_dim", "embed_scale")
    one = stand_in("NTXentLoss", PML, pairs(pml_dense.nt_xent, "temperature"), temperature=0.2)
    memory_loss = stand_in("SupConLoss", PML, pairs(pml_dense.sup_con, "temperature"), temperature=0.2)
    memory: dict[str, Any] = {
        "embedding_size": D,
        "memory_size": N,
        "miner": None,
        "queue_idx": 0,
        "has_been_filled": True,
    }
    memory |= {"embedding_memory": torch.zeros(N, D), "label_memory": torch.zeros(N, dtype=torch.int64)}
    nce = stand_in(
        "NCE_MI_MULTI",
        "costs",
        lambda self, *x: dense.amdim_multi(x[:4], [t[0] for t in x[4:8]], len(x[8]), self.tclip),
        tclip=7.0,
    )
    cases = [
        (
            stand_in(
                "NTXentLoss",
                LIGHTLY,
                lambda self, a, b: dense.nt_xent(unit_rows(a), unit_rows(b), self.temperature),
                temperature=0.2,
                gather_distributed=False,
                memory_bank=empty_bank(),
            ),
            two,
        ),
        *(
            (
                stand_in(
                    name,
                    LIGHTLY,
                    lambda self, a, b: dense.dcl(a, b, self.temperature, self.weight_fn),
                    temperature=0.2,
                    weight_fn=weight_fn,
                    gather_distributed=False,
                ),
                two,
            )
            for name, weight_fn in (("DCLLoss", None), ("DCLWLoss", weights))
        ),
        (stand_in("ClipLoss", CLIP, lambda self, *x: dense.clip(*x), rank=0, world_size=1), clip),
        (stand_in("SigLipLoss", CLIP, lambda self, *x: dense.siglip(*x), rank=0, world_size=1), clip),
        (one, rows),
        (memory_loss, rows),
        (
            stand_in(
                "ContrastiveLoss",
                PML,
                pairs(pml_dense.contrastive, "pos_margin", "neg_margin"),
                pos_margin=0.1,
                neg_margin=0.9,
            ),
            rows,
        ),
        (
            stand_in(
                "TripletMarginLoss",
                PML,
                pairs(pml_dense.triplet, "margin"),
                margin=0.3,
                swap=False,
                smooth_loss=False,
                triplets_per_anchor="all",
            ),
            rows,
        ),
        (stand_in("CrossBatchMemory", PML, in_memory, loss=memory_loss, **memory), rows),
        (
            stand_in(
                "SelfSupervisedLoss",
                PML,
                lambda self, a, b: self.loss(torch.cat((a, b)), torch.arange(len(a)).repeat(2)),
                loss=one,
                symmetric=True,
            ),
            two,
        ),
        (
            stand_in(
                "DistributedLossWrapper",
                "pytorch_metric_learning.utils.distributed",
                lambda self, x, labels: self.loss(x, labels),
                loss=one,
                efficient=False,
            ),
            rows,
        ),
        (
            stand_in("AmdimNCELoss", BOLTS, amdim, tclip=7.0),
            lambda: [torch.randn(N, D), torch.randn(D, 4 * N), torch.eye(N)],
        ),
        (stand_in("CPCTask", BOLTS, cpc, **parts), lambda: [torch.randn(2, 3, 4, 4)]),
        (
            stand_in(
                "FeatureMapContrastiveTask", BOLTS, feature_maps, comparisons="00", tclip=7.0, bidirectional=False
            ),
            lambda: [(torch.randn(3, 4, 2, 2),), (torch.randn(3, 4, 2, 2),)],
        ),
        (
            stand_in("SupConLoss", "losses", sup_con, temperature=0.2, contrast_mode="all", base_temperature=0.1),
            lambda: [unit(N, 2, D), labels],
        ),
        (
            nce,
            lambda: [
                *(torch.randn(3, 4) for _ in range(4)),
                *(torch.randn(1, 4, 3 * s) for s in (25, 49, 25, 49)),
                torch.eye(3),
                "train",
            ],
        ),
        (stand_in("LossMultiNCE", "costs", multi_nce, nce_func=nce, masks_r5=nn.Parameter(torch.ones(25))), maps),
    ]
    return {f"{type(x).__module__}.{type(x).__name__}": (x, draw) for x, draw in cases}


NAMES = sorted(made())


def test_every_known_class_is_here():
    assert len(NAMES) == len(known.KNOWN)
    assert all(known.is_known(x) for x, _ in made().values())


@pytest.mark.parametrize("name", NAMES)
def test_patched_and_verified(name):
    """Both agree on two steps, then ours runs alone."""
    torch.manual_seed(0)
    theirs, draw = made()[name]
    found = verify(theirs, known.adapter(theirs), *draw(), repeats=1, within=50, show=False)
    assert math.isfinite(found.worst)
    ours = patch(theirs, verify_steps=2, show=False)
    assert type(ours).__module__.startswith("fused_nce.compat.")
    for step in range(3):
        assert ("forward" in vars(ours)) == (step < 2)
        given = draw()
        for x in pytree.tree_leaves(given):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.requires_grad_()
        ours(*given)
    assert "forward" not in vars(ours)
