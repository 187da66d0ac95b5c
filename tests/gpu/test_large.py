"""Memory: the peak of a call within the published formula, and tensors of more than 2^31 elements."""

from __future__ import annotations

import gc

import pytest
import torch

from fused_nce import tile_loss, workspace_bytes
from fused_nce.core.spec import Block, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.gpu.conftest import HOME, PLACES, Place, parameters, peak_bytes, require
from tests.gpu.panels import Panels
from tests.gpu.problems import SCALE, features, spec_of
from tests.oracle import Oracle

# ---- the published formula --------------------------------------------------------------------------------------

SLACK = 1 << 20  # the small tensors of a tail


def outputs_bytes(dtype, n, n_c, d):
    """Gradients (twice where the stash is wider than they are), positives and their softplus, statistics."""
    gradients = (n * d + n * n_c * d) * (4 if dtype == torch.float32 else 4 + 2)
    return gradients + 4 * 4 * n * n_c + 4 * 8 * n


@pytest.mark.parametrize("mb", ["4", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 49, 256), (512, 49, 64), (1008, 25, 512)])
@pytest.mark.parametrize("place", parameters([p for p in PLACES if p.device == "cuda" and p.backend != "reference"]))
def test_peak_is_within_the_formula(place, shape, dtype, mb, monkeypatch):
    """By the caching allocator's own count; a CPU's is in `tests/backends/test_memory.py`."""
    require(place, dtype)
    if mb is not None:
        monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", mb)
    n, n_c, d = shape
    q, k = features(shape, place.device, dtype)

    def step():
        q.grad = k.grad = None
        tile_loss(q, k, spec_of(n_c), Nce(0.04), scale=SCALE, backend=place.backend).loss.backward()

    step()  # cuBLAS takes its workspace here
    q.grad = k.grad = None
    formula = workspace_bytes(spec_of(n_c), n, n * n_c, d, dtype, place.backend, "cuda")
    assert peak_bytes(step) <= outputs_bytes(dtype, n, n_c, d) + 1.1 * formula + SLACK


# ---- more than 2^31 elements ------------------------------------------------------------------------------------

N_C = 2
EDGE = 2**25 + 8  # · 64 elements are more than 2^31
# name: rows, images of keys, rows an image, D; and what a CPU can hold of the same form
LARGE = {
    "keys": ((4, EDGE // N_C, 1, 64), (4, 20, 1, 16)),
    "queries": ((EDGE, 4, EDGE // 4, 64), (40, 4, 10, 16)),
    "scores": ((46400, 23200, 2, 32), (48, 24, 2, 16)),
}
NEEDED_BYTES = 48 << 30


def large_place():
    """The GPU's kernels, one after the other in one test: each takes tens of gigabytes."""
    on_gpu = [p for p in PLACES if p.device == "cuda" and p.backend in HOME]
    return on_gpu or [Place("cuda", name) for name in HOME if HOME[name] == "cuda"]


def check_large(place, sizes):
    """Loss and the gradients of the first and the last rows and columns: a wrapped offset is wrong by all of it."""
    n, images, rows_per_image, d = sizes
    generator = torch.Generator(place.device).manual_seed(0)
    q, k = (
        torch.randn(rows, d, generator=generator, device=place.device, dtype=torch.bfloat16).requires_grad_()
        for rows in (n, images * N_C)
    )
    offset = images - n // rows_per_image
    scale, penalty = d**-0.5, 0.04
    spec = Spec(Block(N_C, rows_per_image), TanhClip(20.0))
    loss = tile_loss(q, k, spec, Nce(penalty), scale=scale, offset=offset, backend=place.backend).loss
    loss.backward()
    loss, dq, dk = loss.detach(), q.grad, k.grad
    exact = Panels(
        q.detach(), k.detach(), scale=scale, n_c=N_C, rows_per_image=rows_per_image, offset=offset, clip=20.0,
        penalty=penalty,
    )  # fmt: skip
    torch.testing.assert_close(loss.double(), exact.loss, rtol=1e-4, atol=0)
    for found, of, size in ((dq, exact.dq, n), (dk, exact.dk, images * N_C)):
        few = min(64, size) // N_C * N_C
        assert found is not None
        for part in (slice(0, few), slice(size - few, size)):
            wanted = of(part)
            error = (found[part].double() - wanted).norm() / wanted.norm()
            assert error <= 2**-6, f"{place.backend}: rows {part.start} to {part.stop} are off by {error:.3g}"


@pytest.mark.parametrize("name", LARGE)
def test_the_form_of_the_large_problems(place, name):
    """The same test at sizes that any machine has."""
    check_large(require(place, torch.float32 if place.backend == "reference" else torch.bfloat16), LARGE[name][1])


@pytest.mark.gpu
@pytest.mark.nightly
def test_more_than_2_31_elements():
    """One test for all: two at once would not fit the card."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if torch.cuda.mem_get_info()[0] < NEEDED_BYTES:
        pytest.skip(f"{torch.cuda.mem_get_info()[0] >> 30} GiB free, need {NEEDED_BYTES >> 30}")
    ran = []
    for place in large_place():
        try:
            require(place, torch.bfloat16)
        except pytest.skip.Exception as reason:
            print(reason)
            continue
        for sizes, _ in LARGE.values():
            check_large(place, sizes)
            gc.collect()
            torch.cuda.empty_cache()
        ran.append(place.backend)
    if not ran:
        pytest.skip("no backend with kernels for this GPU")


@pytest.mark.parametrize("offset", [0, 2])
def test_panels_agree_with_the_oracle(offset, monkeypatch):
    monkeypatch.setattr("tests.gpu.panels.PANEL", 64)  # several panels in both directions
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(rows, 5, generator=g, dtype=torch.float64) for rows in (12, 8 * N_C))
    options = {"scale": 0.7, "n_c": N_C, "rows_per_image": 2, "offset": offset, "clip": 4.0}
    exact = Oracle(q.numpy(), k.numpy(), **options)
    panels = Panels(q, k, **options, penalty=0.5)
    torch.testing.assert_close(panels.loss.item(), exact.nce.mean() + exact.penalty(0.5))
    unit = torch.full((12, N_C), 1 / (12 * N_C)).double().numpy()
    wanted = exact.gradients(exact.nce_coefficients(unit, 0.5 / (12 * 8 * N_C)))
    torch.testing.assert_close(panels.dq(slice(3, 12)), torch.from_numpy(wanted.dq[3:12]))
    torch.testing.assert_close(panels.dk(slice(4, 16)), torch.from_numpy(wanted.dk[4:16]))
