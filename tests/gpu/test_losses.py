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
from tests.losses.test_registry import OPEN, etas_of

ONE_A_LAYOUT = (
    "info_nce/targets, clip, penalty",
    "info_nce/symmetric, targets, penalty",
    "moco_nce",
    "nt_xent",
    "siglip_loss",
    "sup_con",
    "dim_mi",
)


def cases(names: Iterable[str], dtypes: Iterable[str]) -> list[object]:
    """(place, dtype, loss) of the GPU's kernels. On a CPU `tests/losses` has them all, one tries this file.

    Triton compiles each loss and dtype for seconds: bfloat16 of one loss a layout, the rest nightly.
    """
    found: list[object] = []
    for loss in names:
        found.append(pytest.param(Place("cpu", "chunked"), "float32", loss, id=f"cpu-chunked-{loss}"))
        for backend, dtype in ((backend, dtype) for backend in ("cuda", "triton") for dtype in dtypes):
            quick = backend == "cuda" or (loss in ONE_A_LAYOUT and dtype == "bfloat16")
            marks = [pytest.mark.gpu, *([] if quick else [pytest.mark.nightly])]
            found.append(pytest.param(Place("cuda", backend), dtype, loss, id=f"{backend}-{dtype}-{loss}", marks=marks))
    return found


@contextmanager
def skipped_where_refused() -> Iterator[None]:
    """With the backend's reason."""
    try:
        yield
    except ValueError as refusal:
        if "which cannot run this: " not in str(refusal):
            raise
        pytest.skip(str(refusal))


@pytest.mark.parametrize(("place", "dtype", "name"), cases(OPEN, ("float32", "bfloat16", "float16")))
def test_value_and_gradients(place, name, dtype, record_eta):
    require(place, DTYPES[dtype])
    for seed, upstream in ((0, 1.0), (3, -2.5)):
        with skipped_where_refused():
            etas = etas_of(name, place.device, place.backend, DTYPES[dtype], seed, upstream)
        record_eta(" ".join(reversed(place)), dtype, etas)
        assert max(etas.values()) <= 1, (name, seed, etas)


@pytest.mark.parametrize("workspace_mb", ["16", "0.1"])
@pytest.mark.parametrize(("place", "dtype", "name"), cases([*PLAIN, *BOTH_WAYS, *MANY], ["float32"]))
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
