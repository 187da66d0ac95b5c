"""The same bits: run after run, for any number of threads, from any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.conftest import MODULE, why_not
from tests.core.problems import features, grads_of, run


def everything(backend, q, k):
    out = run(backend, q, k, "none")
    dq, dk = grads_of(out.loss, q, k, retain_graph=True)
    return [
        out.loss,
        out.nce,
        out.penalty,
        *out.report.values(),
        *out.rows.values(),
        dq,
        dk,
        *grads_of(out.nce.sum(), q, k),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_runs_are_equal(backend, dtype):
    n, n_c, d = 65, 3, 33
    if backend == "cpu":  # several tasks, whose sums are merged
        assert MODULE.plan(n, n * n_c, d, dtype, 16 << 20, image=n_c)["groups"] > 1
    first = everything(backend, *features(n, n_c, d, dtype))
    for _ in range(50):
        again = everything(backend, *features(n, n_c, d, dtype))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("shape", [(5, 3, 7), (64, 48, 130), (130, 3, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_thread_count_does_not_change_a_bit(shape, dtype, monkeypatch):
    if why_not("cpu", dtype):
        pytest.skip(f"cpu: {why_not('cpu', dtype)}")
    n, n_c, d = shape
    for mb in ("16", "0.5"):
        monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", mb)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything("cpu", *features(n, n_c, d, dtype)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("calls", [25, pytest.param(200, marks=pytest.mark.nightly)])
def test_eight_threads_equal_one(backend, calls):
    """Concurrent callers share no state."""
    q, k = features(24, 3, 40)
    expected = everything(backend, q, k)

    def work(_):
        for _ in range(calls):
            assert all(map(torch.equal, expected, everything(backend, q, k)))

    torch.set_num_threads(1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
