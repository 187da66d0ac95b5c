"""The loss and parts of its gradients in float64, panel by panel on the device, for problems too large to hold.

`tests/gpu/test_large.py` holds it to `tests/oracle.py` where both can run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

PANEL = 1 << 24  # scores of a panel: float64 and five temporaries of it are 800 MB


class Panels:
    """AMDIM's loss of one problem.

    Args:
        q: (N, D), rows_per_image rows of each image.
        k: (M, D), n_c columns of each.
        scale: factor of the dot product.
        n_c: columns an image.
        rows_per_image: rows an image.
        offset: image of row 0.
        clip: t = clip·tanh(s/clip).
        penalty: λ of λ·mean(s²).
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        n_c: int,
        rows_per_image: int,
        offset: int,
        clip: float,
        penalty: float,
    ) -> None:
        self.q, self.k, self.scale, self.n_c, self.clip, self.penalty = q, k, scale, n_c, clip, penalty
        self.n, self.m = len(q), len(k)
        self.image = torch.arange(self.n, device=q.device) // rows_per_image + offset
        self.lse, self.pos = q.new_empty(self.n, dtype=torch.float64), q.new_empty(self.n, n_c, dtype=torch.float64)
        square = q.new_zeros((), dtype=torch.float64)
        for rows in self._cut(self.n, min(self.m, PANEL // 64)):
            parts = []
            for columns in self._cut(self.m, rows.stop - rows.start, self.n_c):
                s, t, own = self._tile(rows, columns)
                square += s.square().sum()
                parts.append(t.masked_fill(own, -math.inf).logsumexp(dim=1))
                inside = own.any(dim=1)
                self.pos[rows][inside] = t[own].view(-1, n_c)
            self.lse[rows] = torch.stack(parts).logsumexp(dim=0)
        softplus = torch.logaddexp(torch.zeros_like(self.pos), self.lse[:, None] - self.pos)
        self.loss = softplus.mean() + penalty * square / (self.n * self.m)

    def dq(self, rows: slice) -> Tensor:
        """dL/dq of some rows."""
        total = self.q.new_zeros(rows.stop - rows.start, self.q.shape[1], dtype=torch.float64)
        for columns in self._cut(self.m, rows.stop - rows.start, self.n_c):
            total += self._weights(rows, columns) @ self.k[columns].double()
        return total * self.scale

    def dk(self, columns: slice) -> Tensor:
        """dL/dk of the columns of some images."""
        total = self.k.new_zeros(columns.stop - columns.start, self.k.shape[1], dtype=torch.float64)
        for rows in self._cut(self.n, columns.stop - columns.start):
            total += self._weights(rows, columns).T @ self.q[rows].double()
        return total * self.scale

    def _cut(self, size: int, across: int, multiple: int = 1) -> Iterator[slice]:
        """Slices of `size` whose panels hold about `PANEL` scores, and whose copies of q or k as many numbers."""
        width = max(1, PANEL // max(across, self.q.shape[1]) // multiple) * multiple
        return (slice(i, min(i + width, size)) for i in range(0, size, width))

    def _tile(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        s = self.scale * (self.q[rows].double() @ self.k[columns].double().T)
        images = torch.arange(columns.start, columns.stop, device=s.device) // self.n_c
        return s, self.clip * torch.tanh(s / self.clip), self.image[rows][:, None] == images

    def _weights(self, rows: slice, columns: slice) -> Tensor:
        """w = dL/ds."""
        s, t, own = self._tile(rows, columns)
        g = torch.sigmoid(self.lse[rows][:, None] - self.pos[rows]) / self.pos.numel()
        w = g.sum(dim=1, keepdim=True) * torch.exp(t - self.lse[rows][:, None])
        w[own] = -g[own.any(dim=1)].view(-1)
        return w * (1 - (t / self.clip) ** 2) + 2 * self.penalty * s / (self.n * self.m)
