"""pytest-benchmark cases of every registered loss: `pytest bench/test_losses.py`."""

from __future__ import annotations

import pytest
import torch

from bench.losses import LOSSES, MICRO, step
from bench.test_loss import ROUNDS, WARMUPS
from fused_nce import last_path


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients(benchmark, name):
    run = step(name)
    benchmark.group = name
    benchmark.extra_info.update(MICRO._asdict())
    value = benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=WARMUPS, iterations=1)
    benchmark.extra_info["backend"] = "torch" if LOSSES[name].closed else str(last_path())
    assert torch.isfinite(value)
