"""The model that chooses between the backends of a GPU, and its fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_nce.core import cost, dispatch
from fused_nce.core.cost import Cost, Measured


def test_the_width_decides():
    """Recomputing wins while D is small; for float32 the tensor cores that it does without decide at any D."""
    for n, m in ((4096, 65536), (32768, 32768)):
        assert cost.fastest_first(n, m, 64, torch.bfloat16)[0] == "triton"
        assert cost.fastest_first(n, m, 256, torch.bfloat16)[0] == "cuda"
        assert cost.fastest_first(n, m, 2560, torch.float16) == ["cuda", "triton"]
        assert cost.fastest_first(n, m, 64, torch.float32)[0] == "cuda"


def test_few_launches_win_where_there_are_few_scores():
    assert cost.fastest_first(128, 6272, 64, torch.bfloat16) == ["cuda", "triton"]


def test_between_and_beyond_the_entries():
    model = Cost(5.0, {128: 1.0, 256: 3.0})
    times = [model.time_us(1000, 1000, d) for d in (64, 128, 192, 256, 1024)]
    assert times == pytest.approx([6, 6, 7, 8, 17])


def test_fit_finds_what_made_the_times():
    truth = {
        ("cuda", 2): Cost(25.0, {64: 2.1, 256: 3.9}),
        ("triton", 2): Cost(40.0, {64: 1.2, 256: 6.5}),
    }
    measured = [
        Measured(name, size, n, m, d, model.time_us(n, m, d))
        for (name, size), model in truth.items()
        for n, m, d in [(128, 6272, 64), (4096, 4096, 64), (8192, 9000, 256), (512, 65536, 256)]
    ]
    found = cost.fit(measured)
    assert found.keys() == truth.keys()
    for key, model in truth.items():
        assert found[key].launch_us == pytest.approx(model.launch_us)
        assert found[key].score_ps == pytest.approx(model.score_ps)
    with pytest.raises(ValueError, match=r"^measured: got 2 times of 'cuda' at 2 widths, need more times"):
        cost.fit(measured[1:3])


def test_only_a_gpu_asks_the_model():
    x: Any = torch.empty(4, 8)
    assert dispatch.automatic(x, x) == dispatch.AUTOMATIC
    x = SimpleNamespace(device=SimpleNamespace(type="cuda"), shape=(128, 2560), dtype=torch.bfloat16)
    assert dispatch.automatic(x, x)[0] == "cuda"
    assert dispatch.automatic(x, x)[-1] == "chunked"
