"""Lightning Bolts' losses (pl_bolts.losses.self_supervised_learning), on any Lightning or none."""

from __future__ import annotations

from torch import Tensor, nn

from fused_nce.compat.amdim import PENALTY, first_image, nce_scores
from fused_nce.core import checks
from fused_nce.losses.nt_xent import nt_xent


def nt_xent_loss(
    out_1: Tensor,  # (N, D)
    out_2: Tensor,  # (N, D)
    temperature: float,
) -> Tensor:
    """NT-Xent of two views of N images, 0-d: rows as they are, so unit ones, as SimCLR's module hands them over.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    return nt_xent(out_1, out_2, temperature=temperature, normalize=False).loss


class AmdimNCELoss(nn.Module):
    """AMDIM's loss of one row an image against all locations.

    Args:
        tclip: c of the soft clip c·tanh(s/c); None for none.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """

    def __init__(self, tclip: float | None) -> None:
        super().__init__()
        if tclip is not None:
            checks.check_number("tclip", tclip, above=0)
        self.tclip = tclip

    def extra_repr(self) -> str:
        """The settings, as `print(module)` shows them."""
        return f"tclip={self.tclip}"

    def forward(
        self,
        anchor_representations: Tensor,  # (B, R)
        positive_representations: Tensor,  # (R, B·L)
        mask_mat: Tensor,  # (B, B), the identity
    ) -> tuple[Tensor, Tensor]:
        """The mean loss in nats and 0.05·mean(s²), 0-d each."""
        offset, n_images = first_image(mask_mat), mask_mat.shape[1]
        scores, _, penalty = nce_scores(
            anchor_representations, positive_representations, offset, n_images, self.tclip, PENALTY
        )
        return -scores.mean(), penalty
