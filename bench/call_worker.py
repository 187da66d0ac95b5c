"""The process that `bench.call` asks: it measures the build that it is told to import, and knows no other file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

WIDTH, LOCATIONS, QUEUE = 64, 9, 256
REPEATS = 40


def eager_amdim(a: Tensor, c: Tensor) -> Tensor:
    """The scores, the clip and the penalty in full."""
    n, n_c, d = c.shape
    s = (a @ c.reshape(-1, d).T).view(n, n, n_c) / d**0.5
    t = 20 * torch.tanh(s / 20)
    own = torch.eye(n, dtype=torch.bool)
    others = t.masked_fill(own[:, :, None], float("-inf")).flatten(1).logsumexp(1, keepdim=True)
    return torch.nn.functional.softplus(others - t[own]).mean() + 0.04 * s.square().mean()


def eager_nt_xent(x: Tensor, y: Tensor) -> Tensor:
    """Of all views but the own."""
    z = normalize(torch.cat((x, y)), dim=1)
    s = (z @ z.T / 0.5).fill_diagonal_(float("-inf"))
    return cross_entropy(s, torch.arange(len(z)).roll(len(x)))


def eager_moco(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """MoCo's builder."""
    q, k = normalize(q, dim=1), normalize(k.detach(), dim=1)
    logits = torch.cat(((q * k).sum(1, keepdim=True), q @ queue.T), dim=1) / 0.07
    return cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def eager_clip(x: Tensor, y: Tensor) -> Tensor:
    """Both ways."""
    s, own = 10.0 * x @ y.T, torch.arange(len(x))
    return (cross_entropy(s, own) + cross_entropy(s.T, own)) / 2


def problems(loss: str, rows: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]:
    """Ours, eager torch's and the leaves of one problem."""
    import fused_nce as f

    draw = torch.Generator().manual_seed(0)
    x, y, more = (torch.randn(*n, WIDTH, generator=draw) for n in ((rows,), (rows,), (rows, LOCATIONS)))
    queue = normalize(torch.randn(QUEUE, WIDTH, generator=draw), dim=1)
    for leaf in (x, y, more):
        leaf.requires_grad_()
    own = torch.arange(rows)
    ours, eager = {
        "amdim_nce": (lambda: f.amdim_nce(x, more).loss, lambda: eager_amdim(x, more)),
        "info_nce": (lambda: f.info_nce(x, y).loss, lambda: cross_entropy(x @ y.T / 0.1, own)),
        "info_nce normalized": (
            lambda: f.info_nce(x, y, normalize=True).loss,
            lambda: cross_entropy(normalize(x, dim=1) @ normalize(y, dim=1).T / 0.1, own),
        ),
        "clip_loss": (lambda: f.clip_loss(x, y, 10.0).loss, lambda: eager_clip(x, y)),
        "nt_xent": (lambda: f.nt_xent(x, y).loss, lambda: eager_nt_xent(x, y)),
        "moco_nce": (lambda: f.moco_nce(x, y, queue).loss, lambda: eager_moco(x, y, queue)),
    }[loss]
    return ours, eager, [x, y, more]


def step(loss: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    """Forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    loss().backward()


def least_us(loss: Callable[[], Tensor], leaves: list[Tensor]) -> float:
    """CPU time of the fastest of some calls."""
    step(loss, leaves)
    found = []
    for _ in range(REPEATS):
        begin = time.process_time_ns()
        step(loss, leaves)
        found.append(time.process_time_ns() - begin)
    return min(found) / 1e3


def python_calls(loss: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """Python functions that a forward and backward enter, less those of this file."""
    step(loss, leaves)
    names: list[str] = []
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        step(loss, leaves)
    finally:
        sys.setprofile(None)
    return sum(name != __file__ for name in names)


def work() -> None:
    """Answer each line, a loss and a number of rows, with what this build takes."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        loss, rows = json.loads(line)
        ours, eager, leaves = problems(loss, rows)
        found = {"ours": least_us(ours, leaves), "eager": least_us(eager, leaves), "calls": python_calls(ours, leaves)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    work()
