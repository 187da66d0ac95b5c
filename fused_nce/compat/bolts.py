"""Lightning Bolts' losses (pl_bolts.losses.self_supervised_learning), on any Lightning or none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fused_nce.compat.amdim import PENALTY, clip, first_image, nce_scores
from fused_nce.compat.base import Adapter
from fused_nce.compat.processes import everyone
from fused_nce.core import checks
from fused_nce.core.engine import tile_loss
from fused_nce.core.spec import Index, Spec
from fused_nce.core.tails import Nce
from fused_nce.losses.nt_xent import nt_xent

TARGETS = Spec(Index(), stats=Nce().stats)


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


class SimCLR:
    """The loss that SimCLR's module has for a method: assign it, or inherit from this class first."""

    def nt_xent_loss(
        self,
        out_1: Tensor,  # (N, D)
        out_2: Tensor,  # (N, D)
        temperature: float,
        eps: float = 1e-6,
    ) -> Tensor:
        """`nt_xent_loss`, among the rows of all processes. Nothing is clamped at `eps`: a row itself is left out.

        Raises:
            TypeError, ValueError: naming the argument, the value seen and the value needed.
        """
        return nt_xent(out_1, out_2, temperature=temperature, normalize=False, group=everyone()).loss


class PixelCNN(nn.Module):
    """Five residual blocks of convolutions that see the rows above and their own (van den Oord et al. 2016).

    Args:
        input_channels: C, in and out.
        hidden_channels: of a block's inside.
        num_blocks: how many.
    """

    def __init__(self, input_channels: int, hidden_channels: int = 256, num_blocks: int = 5) -> None:
        super().__init__()
        self.input_channels, self.hidden_channels = input_channels, hidden_channels
        self.blocks = nn.ModuleList([self._block() for _ in range(num_blocks)])

    def _block(self) -> nn.Sequential:
        c, h = self.input_channels, self.hidden_channels
        return nn.Sequential(
            nn.Conv2d(c, h, (1, 1)),
            nn.ReLU(),
            nn.Conv2d(h, h, (1, 3)),
            nn.ConstantPad2d((0, 0, 1, 0), 1.0),  # a row of ones above, as upstream: the kernel below is two rows high
            nn.Conv2d(h, h, (2, 1), padding=(0, 1)),
            nn.ReLU(),
            nn.Conv2d(h, c, (1, 1)),
        )

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        for block in self.blocks:
            z = z + block(z)
        return z.relu()


class CPCTask(Adapter):
    """CPC on a feature map: each place predicts those of its column i + 1 rows below, for i = 1 … H − 2.

    A prediction is classified among all B·H·W places. Upstream computes the loss of step i i times over and adds; here
    it is computed once, with the weight i. Its last step, an empty one, costs it a wait for the GPU.

    Args:
        num_input_channels: C.
        target_dim: D of predictions and targets.
        embed_scale: factor of the predictions.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """

    HOOKS = ("compute_loss_h",)
    SHOWN = ("target_dim", "embed_scale")

    def __init__(self, num_input_channels: int, target_dim: int = 64, embed_scale: float = 0.1) -> None:
        super().__init__()
        checks.check_number("embed_scale", embed_scale)
        self.target_dim, self.embed_scale = target_dim, embed_scale
        self.target_cnn = nn.Conv2d(num_input_channels, target_dim, kernel_size=1)
        self.pred_cnn = nn.Conv2d(num_input_channels, target_dim, kernel_size=1)
        self.context_cnn = PixelCNN(num_input_channels)

    def forward(
        self,
        z: Tensor,  # (B, C, H, W), H >= 3 and W >= 3
    ) -> Tensor:
        """Σ_i i·L_i in nats, 0-d: a sum, not a mean."""
        checks.check_tensor("z", z, ("B", "C", "H", "W"))
        images, _, height, width = z.shape
        if height < 3 or width < 3:
            raise ValueError(f"z: got (H, W) = {(height, width)}, need >= 3 of both: two rows lie below, three abreast")
        targets = self.target_cnn(z).permute(0, 2, 3, 1)  # (B, H, W, D)
        predictions = self.pred_cnn(self.context_cnn(z)).permute(0, 2, 3, 1)
        places = torch.arange(images * height * width, device=z.device).view(images, height, width)
        columns = targets.flatten(0, 2)
        losses = [
            tile_loss(
                predictions[:, : -(i + 1)].flatten(0, 2),
                columns,
                TARGETS,
                Nce(weight=float(i)),  # fault: cpctask-every-step
                scale=self.embed_scale,
                row_ids=places[:, i + 1 :].flatten(),
            ).loss
            for i in range(1, height - 1)
        ]
        return torch.stack(losses).sum()


class AmdimNCELoss(Adapter):
    """AMDIM's loss of one row an image against all locations.

    Args:
        tclip: c of the soft clip c·tanh(s/c); None for none.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """

    SHOWN = ("tclip",)

    def __init__(self, tclip: float | None) -> None:
        super().__init__()
        self.tclip = clip(tclip)

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


class FeatureMapContrastiveTask(Adapter):
    """AMDIM's losses between feature maps of two views: one place an image against all places of the other view's map.

    Places are torch's draws, upstream's at the same seed. Maps need not be square, nor as many as the comparisons.

    Args:
        comparisons: pairs of map numbers, "01, 0r"; r is drawn at each call (by torch; upstream asks numpy).
        tclip: c of the soft clip c·tanh(s/c); None for none.
        bidirectional: average with the views exchanged.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """

    HOOKS = ("feat_size_w_mask", "_sample_src_ftr")
    SHOWN = ("comparisons", "tclip", "bidirectional")

    def __init__(self, comparisons: str = "00, 11", tclip: float | None = 10.0, bidirectional: bool = True) -> None:
        super().__init__()
        self.comparisons, self.tclip, self.bidirectional = comparisons, tclip, bidirectional
        self.map_indexes = self.parse_map_indexes(comparisons)
        self.nce_loss = AmdimNCELoss(tclip)

    @staticmethod
    def parse_map_indexes(comparisons: str) -> list[tuple[int, int]]:
        """`"11, 2r"` as [(1, 1), (2, -1)]."""
        pairs = [pair.strip() for pair in comparisons.split(",")]
        if not all(len(pair) == 2 and set(pair) <= set("0123456789r") for pair in pairs):
            raise ValueError(f"comparisons: got {comparisons!r}, need pairs of digits or r, such as '00, 1r'")
        first, second = ([-1 if pair[i] == "r" else int(pair[i]) for pair in pairs] for i in range(2))
        return list(zip(first, second, strict=True))

    def forward(
        self,
        anchor_maps: Sequence[Tensor],  # (B, C, H, W) each
        positive_maps: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The loss of each comparison, (n,), and the sum of their penalties, 0-d."""
        for name, maps in (("anchor_maps", anchor_maps), ("positive_maps", positive_maps)):
            if len(maps) <= max(max(pair) for pair in self.map_indexes) or len(maps) == 0:
                raise ValueError(f"{name}: got {len(maps)} maps, need those of comparisons={self.comparisons!r}")
            for x in maps:
                checks.check_tensor(name, x, ("B", "C", "H", "W"))
        found = []
        for pair in self.map_indexes:
            a, b = (int(torch.randint(0, len(anchor_maps), ())) if i < 0 else i for i in pair)
            ways = [self._compare(anchor_maps[a], positive_maps[b])]
            if self.bidirectional:
                ways.append(self._compare(positive_maps[a], anchor_maps[b]))
            found.append(torch.stack([torch.stack(way) for way in ways]).mean(dim=0))
        losses, penalties = torch.stack(found).unbind(dim=1)
        return losses, penalties.sum()

    def _compare(self, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the penalty of one drawn place an image, (B, C), against all places of the targets."""
        images = torch.arange(len(sources), device=sources.device)
        flat = sources.flatten(2)
        drawn = flat[images, :, torch.randint(0, flat.shape[2], (len(flat),), device=flat.device)]
        loss, penalty = self.nce_loss(drawn, targets.movedim(1, 0).flatten(1), torch.eye(len(flat), device=flat.device))
        return loss, penalty
