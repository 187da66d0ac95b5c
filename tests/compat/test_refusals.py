"""What an adapter cannot honour is refused by name, before any work."""

from __future__ import annotations

from typing import Any

import torch

from fused_nce.compat import amdim, bolts, dim, inf_cl, lightly, moco, open_clip, solo, supcontrast
from tests.refusals import unlike

ROWS, EYE = torch.randn(4, 3), torch.eye(2)
VIEWS = ROWS[:, None]
NUMBER: Any = 16.0
LIST: Any = [0, 1, 2, 3]
SOURCES = [torch.randn(2, 4)] * 4
TARGETS = [torch.randn(1, 4, 2 * n) for n in (25, 49, 25, 49)]
MAPS = [torch.randn(2, 4, s, s) for s in (1, 5, 7) * 2]


def encoder(num_classes):
    return torch.nn.Linear(3, num_classes)


REFUSED: list[Any] = [
    (ValueError, "tclip: got -1", lambda: amdim.NCE_MI_MULTI(-1)),
    (ValueError, "mode: got 'test', need", lambda: amdim.NCE_MI_MULTI()(*SOURCES, *TARGETS, EYE, "test")),
    (ValueError, "mask_mat: got another", lambda: amdim.NCE_MI_MULTI()(*SOURCES, *TARGETS, EYE.flip(0), "train")),
    (ValueError, "mask_mat: got another", lambda: amdim.NCE_MI_MULTI()(*SOURCES, *TARGETS, 0.5 * EYE, "train")),
    (ValueError, "r5_x2: got a map of", lambda: amdim.LossMultiNCE()(*MAPS[:4], MAPS[5], MAPS[5])),
    (ValueError, "r7_x2: got .B, R.", lambda: amdim.LossMultiNCE()(*MAPS[:5], MAPS[5][:1])),
    (ValueError, "tclip: got 0", lambda: bolts.AmdimNCELoss(0)),
    (ValueError, "r_trg: got 7 columns", lambda: bolts.AmdimNCELoss(9)(ROWS, torch.randn(3, 7), torch.eye(4))),
    (ValueError, "temperature: got 0", lambda: bolts.nt_xent_loss(ROWS, ROWS, 0.0)),
    (ValueError, "temperature: got 1e-09", lambda: lightly.NTXentLoss(1e-9)),
    (TypeError, "indexes: got list, need a tensor", lambda: solo.simclr_loss_func(ROWS, LIST)),
    (TypeError, "labels: got list, need a tensor", lambda: inf_cl.cal_flash_loss(ROWS, ROWS, LIST)),
    (TypeError, "labels: got list, need a tensor", lambda: supcontrast.SupConLoss()(VIEWS, [0, 0, 1, 1])),
    (TypeError, "mask: got list, need a tensor", lambda: supcontrast.SupConLoss()(VIEWS, mask=[[1]])),
    (ValueError, "memory_bank_size: got 64, need", lambda: lightly.NTXentLoss(memory_bank_size=64)),
    (ValueError, "out0: got width D = 3", lambda: lightly.NTXentLoss(memory_bank_size=(8, 5))(ROWS, ROWS)),
    (ValueError, "ddp_compat: got 'both'", lambda: open_clip.ClipLoss(ddp_compat="both")),
    (ValueError, "dist_impl: got 'ring'", lambda: open_clip.SigLipLoss(dist_impl="ring")),
    (TypeError, "Mine: got a get_logits of its", lambda: type("Mine", (open_clip.ClipLoss,), {"get_logits": print})),
    (ValueError, "contrast_mode: got 'two'", lambda: supcontrast.SupConLoss(contrast_mode="two")),
    (ValueError, "features: got .4, 3., need .B, V", lambda: supcontrast.SupConLoss()(ROWS)),
    (ValueError, "mask: got one with labels", lambda: supcontrast.SupConLoss()(VIEWS, torch.arange(4), torch.eye(4))),
    (ValueError, "labels: got 3, need", lambda: supcontrast.SupConLoss()(VIEWS, torch.arange(3))),
    (TypeError, "labels: got torch.complex64", lambda: supcontrast.SupConLoss()(VIEWS, torch.rand(4) + 0j)),
    (ValueError, "mask: got shape .3, 4.", lambda: supcontrast.SupConLoss()(VIEWS, mask=torch.ones(3, 4))),
    (ValueError, "out0: got N = 1, need N >= 2", lambda: lightly.DCLLoss()(ROWS[:1], ROWS[:1])),
    (ValueError, "temperature: got 0.0", lambda: lightly.DCLWLoss(0.0)),
    (TypeError, "indexes: got torch.float32, need integers", lambda: solo.simclr_loss_func(ROWS, ROWS[:, 0])),
    (ValueError, "indexes: got shape .3,., need", lambda: solo.simclr_loss_func(ROWS, torch.arange(3))),
    (ValueError, "queue: got width D = 5", lambda: solo.mocov2plus_loss_func(ROWS, ROWS, torch.randn(5, 8))),
    (ValueError, "k: got M = 3, need >= N = 4", lambda: inf_cl.cal_flash_loss(ROWS, ROWS[:3])),
    (TypeError, "labels: got torch.float32, need integers", lambda: inf_cl.cal_flash_loss(ROWS, ROWS, ROWS[:, 0])),
    (TypeError, "head_dim: got float", lambda: inf_cl.cal_inf_loss(ROWS, ROWS, None, None, NUMBER)),
    (ValueError, "mask: got 'leaky'", lambda: dim.infonce_loss(MAPS[0], MAPS[0], mask="leaky")),
    (ValueError, "m: got .N, C. = .2, 3.", lambda: dim.infonce_loss(MAPS[0], MAPS[0][:, :3])),
    (NotImplementedError, "measure: got None, need one of 'GAN'", lambda: dim.fenchel_dual_loss(MAPS[1], MAPS[0])),
    (ValueError, "l: got N = 1, need N >= 2", lambda: dim.fenchel_dual_loss(MAPS[1][:1], MAPS[0][:1], "KL")),
    (ValueError, "z: got .H, W. = .2, 4.", lambda: bolts.CPCTask(3)(torch.randn(1, 3, 2, 4))),
    (ValueError, "comparisons: got '0x'", lambda: bolts.FeatureMapContrastiveTask("0x")),
    (ValueError, "anchor_maps: got 1 maps", lambda: bolts.FeatureMapContrastiveTask("01")(MAPS[:1], MAPS)),
    (ValueError, "K: got 0, need >= 1", lambda: moco.MoCo(encoder, K=0)),
    (ValueError, "logits: got 'none'", lambda: moco.MoCo(encoder, logits="none")),
    (ValueError, "T: got 0", lambda: moco.MoCo(encoder, T=0)),
    (ValueError, "im_q: got N = 4, need a mult", lambda: moco.MoCo(encoder, K=8, bn_splits=3)(ROWS, ROWS)),
]


def test_refused():
    assert unlike([(call, error, f"^{message}") for error, message, call in REFUSED]) == []
