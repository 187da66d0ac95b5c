"""Every loss of the package on every device, backend and dtype: whatever kernels it takes, within its error budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.backends.test_cpu_layouts import LOSSES as PLAIN
from tests.backends.test_cpu_layouts import D, M, N
from tests.backends.test_cuda_layouts import BOTH_WAYS, MANY
from tests.cases import DTYPES
from tests.gpu.conftest import Place, require
from tests.gpu.losses import OPEN, etas_of


def places(dtypes: Iterable[str]) -> list[object]:
    """(place, dtype) of the GPU's kernels. On a CPU `tests/losses` has them all, one tries this file."""
    on_gpu = [(name, dtype) for name in ("cuda", "triton") for dtype in dtypes]
    slow = {"triton": [pytest.mark.nightly]}  # it compiles for minutes
    return [
        pytest.param(Place("cpu", "chunked"), "float32", id="cpu-chunked"),
        *(
            pytest.param(
                Place("cuda", name), dtype, id=f"cuda-{name}-{dtype}", marks=[pytest.mark.gpu, *slow.get(name, [])]
            )
            for name, dtype in on_gpu
        ),
    ]


@contextmanager
def skipped_where_refused() -> Iterator[None]:
    """With the backend's reason."""
    try:
        yield
    except ValueError as refusal:
        if "which cannot run this: " not in str(refusal):
            raise
        pytest.skip(str(refusal))


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize(("place", "dtype"), places(("float32", "bfloat16", "float16")))
def test_value_and_gradients(place, name, dtype, record_eta):
    require(place, DTYPES[dtype])
    for seed, upstream in ((0, 1.0), (3, -2.5)):
        with skipped_where_refused():
            etas = etas_of(name, place.device, place.backend, DTYPES[dtype], seed, upstream)
        record_eta(" ".join(reversed(place)), dtype, etas)
        assert max(etas.values()) <= 1, (name, seed, etas)


@pytest.mark.parametrize("workspace_mb", ["16", "0.1"])
@pytest.mark.parametrize("name", [*PLAIN, *BOTH_WAYS, *MANY])
@pytest.mark.parametrize(("place", "dtype"), places(["float32"]))
def test_strips_and_panels_are_the_whole_matrix(place, dtype, name, workspace_mb, monkeypatch):
    """In one piece and in many, against the oracle's on the same device."""
    require(place)
    torch.manual_seed(0)
    a, b = (torch.randn(rows, D).to(place.device, DTYPES[dtype]).requires_grad_() for rows in (N, M))
    call = (PLAIN | BOTH_WAYS | MANY)[name]
    with torch.device(place.device):  # the numbers and ids that the calls make
        wanted = call(a, b, "reference")
        monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
        with skipped_where_refused():
            found = call(a, b, place.backend)
    for x, value in zip(found, wanted, strict=True):
        assert (x - value).abs().max() <= 5e-6 * value.abs().max()
