"""AMDIM's mixture features: several vectors in the place of f1."""

from torch import Tensor, nn


class Components(nn.Module):
    """f1 to the m components of its mixture (Bachman et al. 2019, section 3.5): f1 plus an MLP of one hidden layer.

    Args:
        width: D of f1, and of the hidden layer.
        count: m.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.net = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, count * width))

    def forward(
        self,
        f1: Tensor,  # (B, D, 1, 1)
    ) -> Tensor:  # (B, m, D)
        x = f1.flatten(1)
        moved = self.net(x).unflatten(1, (self.count, -1))
        return x[:, None].to(moved.dtype) + moved
