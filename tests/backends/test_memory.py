"""Peak memory as the process's own high-water mark, in a process of its own: within the published formula."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_nce import amdim_nce, tile_stats, workspace_bytes
from fused_nce.core import dispatch
from fused_nce.core.spec import Block, Index, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.conftest import ABSENT, why_not

LINUX = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to reset a high-water mark"
)

# The statistics and positives are outputs; 16-bit inputs have their gradients in float32 until the upstream has come.
PROBE = """
import json, os, sys, torch
from fused_nce import amdim_nce
from fused_nce.measure import peak_bytes

torch.set_num_threads(1)

def run(backend, dtype, n, n_c, d):
    a = torch.randn(n, d, dtype=dtype).requires_grad_()
    c = torch.randn(n, n_c, d, dtype=dtype).requires_grad_()
    return peak_bytes(lambda: amdim_nce(a, c, backend=backend).loss.backward())

peaks = {}
for backend, cases in json.loads(sys.argv[1]).items():
    peaks[backend] = []
    for dtype, n, n_c, d, workspace_mb in cases:
        os.environ["FUSED_NCE_WORKSPACE_MB"] = workspace_mb
        for rows in (8, 8, n):
            peak = run(backend, getattr(torch, dtype), rows, n_c, d)
        peaks[backend].append(peak)
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def peaks_bytes():
    """Peaks above the inputs of one loss and its gradients, by backend, in one process of their own.

    Each tensor is a mapping of its own: in a heap that grows, some runs kept four score tensors more than others.
    """
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    cases = {name: [(*shape, "16") for shape in SHAPES] for name in dispatch.BACKENDS if name not in ABSENT}
    for name in cases.keys() - {"reference"}:
        cases[name] += [(*shape, "4") for shape in GROWN]
    command = [sys.executable, "-c", PROBE, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def outputs_bytes(dtype, n, n_c, d):
    """Gradients (twice where the stash is wider than they are), positives, statistics."""
    elements = n * d + n * n_c * d
    gradients = elements * (4 if dtype == "float32" else 4 + 2)
    return gradients + 4 * n * n_c + 4 * 6 * n


SLACK = 3 << 20  # what BLAS and the allocator keep: their threads' buffers, and pages that are only half used
SHAPES = [("float32", 128, 49, 256), ("float32", 256, 25, 64), ("bfloat16", 128, 49, 128), ("float32", 512, 9, 32)]
GROWN = [("float32", n, 25, 64) for n in (256, 1024)]


@LINUX
def test_peak_is_within_the_formula_and_grows_like_the_gradients_alone(backend, peaks_bytes):
    """At a fixed workspace four times the batch costs four times the gradients, while the scores grow sixteenfold."""
    peaks = peaks_bytes[backend]
    for (dtype, n, n_c, d), peak in zip(SHAPES, peaks, strict=False):
        formula = workspace_bytes(
            Spec(Block(n_c), TanhClip(20.0)), n, n * n_c, d, getattr(torch, dtype), backend=backend
        )
        assert peak <= outputs_bytes(dtype, n, n_c, d) + 1.1 * formula + SLACK, (dtype, n, n_c, d)
    if backend != "reference":
        extra = [peak - outputs_bytes(*shape) for shape, peak in zip(GROWN, peaks[len(SHAPES) :], strict=True)]
        scores = 4 * 1024 * 1024 * 25
        assert max(extra) <= (4 << 20) * 1.1 + SLACK < scores / 8
        assert extra[1] - extra[0] <= SLACK


@pytest.fixture
def small_pages():
    """The kernel may join pages into one of 2 MiB behind a test that counts them: not in this process, for now."""
    thp_disable, prctl = 41, ctypes.CDLL(None).prctl
    prctl(thp_disable, 1, 0, 0, 0)
    yield
    prctl(thp_disable, 0, 0, 0, 0)


@pytest.mark.nightly  # what one step keeps, tests/losses/test_promises.py sees
@pytest.mark.usefixtures("small_pages")
def test_two_thousand_steps_leak_nothing(backend):
    g = torch.Generator().manual_seed(0)
    a, c = torch.randn(8, 16, generator=g).requires_grad_(), torch.randn(8, 3, 16, generator=g).requires_grad_()
    spec = Spec(Block(3), TanhClip(20.0))

    def steps(count):
        for _ in range(count):
            a.grad = c.grad = None
            out = amdim_nce(a, c, backend=backend)
            (out.loss + 0.1 * out.nce).backward()
            tile_stats(a, c.view(24, 16), spec, backend=backend)["neg_lse"].sum().backward()

    steps(300)
    gc.collect()
    before = resident_bytes()
    steps(2000)
    gc.collect()
    assert resident_bytes() - before < 1 << 20


def resident_bytes():
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


NPID_PROBE = """
import json, sys, torch
from torch.nn.functional import normalize
from fused_nce import npid_softmax
from fused_nce.measure import peak_bytes

backend, n, rows = json.loads(sys.argv[1])
torch.manual_seed(0)
bank = torch.empty(n, 128)
for part in bank.split(1 << 16):
    part.copy_(normalize(torch.randn(part.shape), dim=1))
indices = torch.randint(n, (rows,))
f = normalize(bank[indices] + 0.1 * torch.randn(rows, 128), dim=1).requires_grad_()
npid_softmax(f, bank[:1000], indices % 1000, backend=backend).loss.backward()
f.grad = None
def step():
    global out
    out = npid_softmax(f, bank, indices, backend=backend)
    out.loss.backward()

peak = peak_bytes(step)
lse = torch.stack([((f.double() @ part.double().T) / 0.07).logsumexp(1) for part in bank.split(1 << 16)], 1)
lse = lse.logsumexp(1)
own = (f.double() * bank[indices].double()).sum(1) / 0.07
exact = (lse - own).mean()
slope = -bank[indices].double()
for part in bank.split(1 << 16):
    slope += (f.double() @ part.double().T / 0.07 - lse[:, None]).exp() @ part.double()
slope = slope / 0.07 / rows
print(json.dumps([peak, (out.loss - exact).item(), exact.item(), ((f.grad - slope).norm() / slope.norm()).item()]))
"""


@LINUX
@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_npid_over_the_whole_of_imagenet(backend):
    """The exact softmax over 1.28 M rows of width 128: value and gradient, and not a row of its logits is held."""
    reason = why_not(backend)
    if reason is not None:
        pytest.skip(reason)
    rows, images = 64, 1_280_000
    done = subprocess.run(
        [sys.executable, "-c", NPID_PROBE, json.dumps([backend, images, rows])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    peak, error, exact, slope_error = json.loads(done.stdout)
    spec = Spec(Index(), stats=Nce().stats)
    assert peak <= 1.1 * workspace_bytes(spec, rows, images, 128, torch.float32, backend) + SLACK
    assert peak < rows * images * 4 / 8  # of the logits
    u = 2.0**-24
    assert abs(error) <= 2 * u * (4 + 128**0.5) / 0.07 + 16 * u * (1 + abs(exact) + 14.3)
    assert slope_error <= 1e-5
