"""An encoder whose parameters are sharded (FSDP2) has the gradients of one process, with the loss as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fused_nce import info_nce
from fused_nce.distributed import Processes

from .launch import run

BATCH, WIDE = 8, 6


def encoder() -> nn.Sequential:
    """The same on every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def views() -> Tensor:
    """(2, BATCH, WIDE)"""
    return torch.randn(2, BATCH, WIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(rank: int) -> dict[str, dict[str, Tensor]]:
    """Of each way that keys travel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for way, ring in (("gather", False), ("ring", True)):
        net = encoder()
        for layer in net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
        q, k = net(views()[:, rank * BATCH // 2 : (rank + 1) * BATCH // 2])
        info_nce(q, k, temperature=0.5, group=Processes(ring=ring)).loss.backward()
        found[way] = {name: p.grad.full_tensor() for name, p in net.named_parameters()}  # type: ignore[union-attr]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes has."""
    pytest.importorskip("torch.distributed.fsdp", reason="needs FSDP2")
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("needs FSDP2: torch >= 2.6")
    return run(tmp_path_factory.mktemp("fsdp"), 2, gradients)


@pytest.mark.nightly  # by default tests/distributed/test_law.py has its loss
@pytest.mark.parametrize("way", ["gather", "ring"])
def test_a_sharded_encoder_has_the_gradients_of_one_process(found, way):
    net = encoder()
    info_nce(*net(views()), temperature=0.5).loss.backward()
    for name, p in net.named_parameters():
        exact = p.grad
        assert exact is not None
        for result in found:
            assert (result[way][name] - exact).abs().max() <= 1e-12 * exact.abs().max()
