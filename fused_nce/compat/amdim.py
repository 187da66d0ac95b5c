"""amdim-public's losses (github.com/Philip-Bachman/amdim-public, costs.py), without its score tensors.

The four numbers come apart, to be weighted as the caller likes, so their gradients recompute the scores: four GEMMs a
comparison, where `fused_nce.AMDIMLoss(preset="amdim-public")`, which adds them itself, takes three.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fused_nce.compat.base import Adapter
from fused_nce.core import checks
from fused_nce.core.engine import tile_stats
from fused_nce.core.spec import Block, Identity, Spec, TanhClip
from fused_nce.core.statistics import deficit, softplus

PENALTY = 5e-2
SIDE = 5  # of the map that sources are drawn from
Scores = tuple[Tensor, Tensor, Tensor]


def nce_scores(r_src: Tensor, r_trg: Tensor, offset: int, n_images: int, tclip: float | None, penalty: float) -> Scores:
    """Log-probability (n, L) and clipped score (n, L) of each row's positives, and penalty·mean(s²), s = ⟨·,·⟩/√R.

    Args:
        r_src: (n, R), one row an image.
        r_trg: (R, n_images·L).
        offset: the image of row 0.
        n_images: that r_trg holds L locations of.
        tclip: c of c·tanh(s/c); None for none.
        penalty: λ.
    """
    checks.check_tensor("r_src", r_src, ("n", "R"))
    checks.check_tensor("r_trg", r_trg, ("R", "n_images·L"))
    if r_trg.shape[1] % n_images:
        raise ValueError(f"r_trg: got {r_trg.shape[1]} columns, need a multiple of the mask's {n_images} images")
    n_locs = r_trg.shape[1] // n_images
    spec = Spec(Block(n_locs), Identity() if tclip is None else TanhClip(float(tclip)))
    found = tile_stats(r_src, r_trg.t(), spec, scale=1 / math.sqrt(r_src.shape[1]), offset=offset)
    squares = penalty / (r_src.shape[0] * r_trg.shape[1]) * found["square"].sum()
    return -softplus(deficit(found["neg_lse"][:, None], found["pos"])), found["pos"], squares


def clip(tclip: float | Tensor | None) -> float | None:
    """The constant of the soft clip, checked: a number, or a tensor of one without a gradient.

    Raises:
        TypeError, ValueError: naming the value seen and the value needed.
    """
    if isinstance(tclip, Tensor) and tclip.requires_grad:
        raise TypeError("tclip: got a tensor with a gradient, need a number: it is compiled into the kernel")
    found = tclip.item() if isinstance(tclip, Tensor) and tclip.numel() == 1 else tclip
    if found is not None:
        checks.check_number("tclip", found, above=0)  # type: ignore[arg-type]
    return found  # type: ignore[return-value]


def first_image(mask_mat: Tensor) -> int:
    """The image of row 0, of a mask (n, n_images) whose row i is 1 at image i + offset alone. Read on the host.

    Raises:
        TypeError, ValueError: for anything else; a row's positives are the locations of one image, in order.
    """
    if not isinstance(mask_mat, Tensor) or mask_mat.dim() != 2 or 0 in mask_mat.shape:
        seen = tuple(mask_mat.shape) if isinstance(mask_mat, Tensor) else type(mask_mat).__name__
        raise ValueError(f"mask_mat: got {seen}, need an (n, n_images) tensor")
    n, n_images = mask_mat.shape
    mask_mat = mask_mat.to(torch.uint8) if mask_mat.dtype == torch.bool else mask_mat
    offset = int(mask_mat[0].argmax())
    wanted = torch.arange(n, device=mask_mat.device)[:, None] + offset == torch.arange(n_images, device=mask_mat.device)
    if offset + n > n_images or not bool((mask_mat == wanted.to(mask_mat.dtype)).all()):
        raise ValueError("mask_mat: got another pattern, need 1 at image i + offset of row i and 0 elsewhere")
    return offset


class NCE_MI_MULTI(Adapter):
    """The six comparisons 1→5, 1→7 and 5→5 in both directions.

    Args:
        tclip: c of the soft clip c·tanh(s/c).
        penalty: λ of λ·mean(s²), 0.05 upstream (0.04 in some of its commits).

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """

    HOOKS = ("_model_scores", "_loss_g2l")
    SHOWN = ("tclip", "penalty")

    def __init__(self, tclip: float | None = 20.0, *, penalty: float = PENALTY) -> None:
        super().__init__()
        checks.check_number("penalty", penalty, at_least=0)
        self.tclip, self.penalty = clip(tclip), penalty

    def forward(
        self,
        r1_src_1: Tensor,  # (n, R)
        r5_src_1: Tensor,  # (n, R)
        r1_src_2: Tensor,  # (n, R)
        r5_src_2: Tensor,  # (n, R)
        r5_trg_1: Tensor,  # (1, R, n_images·25), as are all targets: a replica dimension stands before
        r7_trg_1: Tensor,
        r5_trg_2: Tensor,
        r7_trg_2: Tensor,
        mask_mat: Tensor,  # (n, n_images), 1 at each row's own image; all zero: nothing to do
        mode: str,
    ) -> tuple[Tensor, ...]:
        """`"train"`: loss_1t5, loss_1t7, loss_5t5 and lgt_reg, 0-d; `"viz"`: log-probabilities and scores of 1→7."""
        checks.check_choice("mode", mode, ("train", "viz"))
        if mode == "train" and not bool(mask_mat.any()):
            return (mask_mat.detach().mean(),) * 4
        offset, n_images = first_image(mask_mat), mask_mat.shape[1]

        def compare(r_src: Tensor, r_trg: Tensor) -> Scores:
            return nce_scores(r_src, r_trg[0], offset, n_images, self.tclip, self.penalty)

        if mode == "viz":
            return compare(r1_src_1, r7_trg_2)[:2]
        pairs = (
            (compare(r1_src_1, r5_trg_2), compare(r1_src_2, r5_trg_1)),
            (compare(r1_src_1, r7_trg_2), compare(r1_src_2, r7_trg_1)),
            (compare(r5_src_1, r5_trg_2), compare(r5_src_2, r5_trg_1)),
        )
        losses = (-0.5 * (there[0].mean() + back[0].mean()) for there, back in pairs)
        return (*losses, 0.5 * torch.stack([way[2] for pair in pairs for way in pair]).sum())


class LossMultiNCE(Adapter):
    """The objective from the feature maps of two views, without DataParallel; upstream's draws at the same seed.

    Args:
        tclip: as in `NCE_MI_MULTI`. Upstream's trainer passes 20, not this default.
        penalty: as in `NCE_MI_MULTI`.
    """

    HOOKS = ("_sample_src_ftr",)
    masks_r5: nn.Parameter

    def __init__(self, tclip: float | None = 10.0, *, penalty: float = PENALTY) -> None:
        super().__init__()
        self.nce_func = NCE_MI_MULTI(tclip, penalty=penalty)
        # Published checkpoints hold it. Nothing here reads it: a place is an index.
        masks = torch.eye(SIDE**2, dtype=torch.uint8).view(-1, 1, SIDE, SIDE)
        self.masks_r5 = nn.Parameter(masks, requires_grad=False)

    def forward(
        self,
        r1_x1: Tensor,  # (B, R, 1, 1)
        r5_x1: Tensor,  # (B, R, 5, 5)
        r7_x1: Tensor,  # (B, R, 7, 7)
        r1_x2: Tensor,
        r5_x2: Tensor,
        r7_x2: Tensor,
    ) -> tuple[Tensor, ...]:
        """loss_1t5, loss_1t7, loss_5t5 and lgt_reg, 0-d each; a trainer adds them up."""
        given = {"r1_x1": r1_x1, "r5_x1": r5_x1, "r7_x1": r7_x1, "r1_x2": r1_x2, "r5_x2": r5_x2, "r7_x2": r7_x2}
        for name, maps in given.items():
            checks.check_tensor(name, maps, ("B", "R", "H", "W"))
            if maps.shape[:2] != r1_x1.shape[:2]:
                raise ValueError(f"{name}: got (B, R) = {tuple(maps.shape[:2])}, need r1_x1's {tuple(r1_x1.shape[:2])}")
        for name, side in (("r1_x1", 1), ("r1_x2", 1), ("r5_x1", SIDE), ("r5_x2", SIDE)):
            if given[name].shape[2:] != (side, side):
                raise ValueError(f"{name}: got a map of {tuple(given[name].shape[2:])}, need {(side, side)}")
        r5_src_1, r5_src_2 = _sampled(r5_x1), _sampled(r5_x2)
        targets = [maps.movedim(1, 0).flatten(1)[None] for maps in (r5_x1, r7_x1, r5_x2, r7_x2)]
        mask = torch.eye(len(r1_x1), device=r1_x1.device)
        sources = (r1_x1.flatten(1), r5_src_1, r1_x2.flatten(1), r5_src_2)
        found: tuple[Tensor, ...] = self.nce_func(*sources, *targets, mask, "train")
        return found


def _sampled(maps: Tensor) -> Tensor:  # (B, R, 5, 5)
    """One location of each image, (B, R); drawn on the host, as upstream's is."""
    places = torch.randint(0, SIDE**2, (len(maps),)).to(maps.device)
    return maps.flatten(2)[torch.arange(len(maps), device=maps.device), :, places]
