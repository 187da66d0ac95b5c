"""What an adapter cannot honour is refused by name, before any work."""

from __future__ import annotations

import pytest
import torch

from fused_nce.compat import amdim, bolts, lightly, open_clip, supcontrast

ROWS = torch.randn(4, 3)
SOURCES = [torch.randn(2, 4)] * 4
TARGETS = [torch.randn(1, 4, 2 * n) for n in (25, 49, 25, 49)]
MAPS = [torch.randn(2, 4, s, s) for s in (1, 5, 7) * 2]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "tclip: got -1", lambda: amdim.NCE_MI_MULTI(-1)),
        (ValueError, "mode: got 'test', need", lambda: amdim.NCE_MI_MULTI()(*SOURCES, *TARGETS, torch.eye(2), "test")),
        (
            ValueError,
            "mask_mat: got another pattern",
            lambda: amdim.NCE_MI_MULTI()(*SOURCES, *TARGETS, torch.eye(2).flip(0), "train"),
        ),
        (
            ValueError,
            "mask_mat: got another pattern",
            lambda: amdim.NCE_MI_MULTI()(*SOURCES, *TARGETS, 0.5 * torch.eye(2), "train"),
        ),
        (ValueError, "r5_x2: got a map of", lambda: amdim.LossMultiNCE()(*MAPS[:4], MAPS[5], MAPS[5])),
        (ValueError, "r7_x2: got .B, R.", lambda: amdim.LossMultiNCE()(*MAPS[:5], MAPS[5][:1])),
        (ValueError, "tclip: got 0", lambda: bolts.AmdimNCELoss(0)),
        (ValueError, "r_trg: got 7 columns", lambda: bolts.AmdimNCELoss(9)(ROWS, torch.randn(3, 7), torch.eye(4))),
        (ValueError, "temperature: got 0", lambda: bolts.nt_xent_loss(ROWS, ROWS, 0.0)),
        (ValueError, "temperature: got 1e-09", lambda: lightly.NTXentLoss(1e-9)),
        (ValueError, "memory_bank_size: got 64, need", lambda: lightly.NTXentLoss(memory_bank_size=64)),
        (ValueError, "out0: got width D = 3", lambda: lightly.NTXentLoss(memory_bank_size=(8, 5))(ROWS, ROWS)),
        (NotImplementedError, "world_size: got 2, need 1", lambda: open_clip.ClipLoss(world_size=2)),
        (NotImplementedError, "world_size: got 2, need 1", lambda: open_clip.SigLipLoss(world_size=2)),
        (ValueError, "dist_impl: got 'ring'", lambda: open_clip.SigLipLoss(dist_impl="ring")),
        (TypeError, "Mine: got get_logits", lambda: type("Mine", (open_clip.ClipLoss,), {"get_logits": print})),
        (ValueError, "contrast_mode: got 'two'", lambda: supcontrast.SupConLoss(contrast_mode="two")),
        (ValueError, "features: got .4, 3., need .B, V", lambda: supcontrast.SupConLoss()(ROWS)),
        (
            ValueError,
            "mask: got one with labels",
            lambda: supcontrast.SupConLoss()(ROWS[:, None], torch.arange(4), torch.eye(4)),
        ),
        (ValueError, "labels: got 3, need", lambda: supcontrast.SupConLoss()(ROWS[:, None], torch.arange(3))),
        (TypeError, "labels: got torch.float32", lambda: supcontrast.SupConLoss()(ROWS[:, None], torch.rand(4))),
        (
            NotImplementedError,
            "mask: got weights",
            lambda: supcontrast.SupConLoss()(ROWS[:, None], mask=torch.eye(4).roll(1, 0) + torch.eye(4)),
        ),
    ],
)
def test_refused(error, message, call):
    with pytest.raises(error, match=rf"^{message}"):
        call()


def test_gathering_is_refused_among_several_processes(monkeypatch):
    monkeypatch.setattr(lightly, "_world_size", lambda: 2)
    with pytest.raises(NotImplementedError, match=r"^gather_distributed: got True among 2 processes"):
        lightly.NTXentLoss(gather_distributed=True)(ROWS, ROWS)
