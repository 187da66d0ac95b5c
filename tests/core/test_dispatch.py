"""Which backend runs, how that is told, and what the environment changes."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_nce
from fused_nce import amdim_nce, info_nce, npid_nce, tile_stats, triplet_margin, workspace_bytes
from fused_nce.core import dispatch
from fused_nce.core.distributed import ring
from fused_nce.core.problem import Backend
from fused_nce.core.spec import Bias, Block, Labels, Spec, TanhClip
from tests.conftest import why_not

A, C = torch.ones(4, 8), torch.ones(4, 3, 8)
SPEC = Spec(Block(3), TanhClip(20.0))
last_path: Any = fused_nce.last_path


def test_last_path_of_a_forced_backend(backend):
    amdim_nce(A, C, backend=backend)
    assert last_path() == (backend, "requested")
    tile_stats(A, C.view(12, 8), SPEC, backend=backend)
    assert last_path() == (backend, "requested")


def test_automatic_choice_takes_the_first_that_can():
    amdim_nce(A, C)
    able = [name for name in dispatch.AUTOMATIC if why_not(name) is None]
    assert last_path().backend == able[0]
    assert "reference" not in dispatch.AUTOMATIC


def test_environment_forces_a_backend(backend, monkeypatch):
    monkeypatch.setenv("FUSED_NCE_BACKEND", backend)
    amdim_nce(A, C)
    assert last_path() == (backend, "requested")
    amdim_nce(A, C, backend="reference")  # the call's own argument wins
    assert last_path().backend == "reference"
    monkeypatch.setenv("FUSED_NCE_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"^backend: got 'fast', need one of"):
        amdim_nce(A, C)


def test_a_fallback_is_told_once_and_refused_when_strict(monkeypatch, caplog):
    """float64 is beyond the C++ kernels: one log line with the reason, however many calls."""
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.WARNING, logger="fused_nce"):
        for _ in range(3):
            amdim_nce(A.double(), C.double())
    assert last_path().backend == "chunked"
    assert last_path().reason.startswith("cpu: ")
    assert len(caplog.records) == 1
    assert last_path().reason in caplog.text
    monkeypatch.setenv("FUSED_NCE_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"^FUSED_NCE_STRICT=1 forbids the fallback to 'chunked': cpu: "):
        amdim_nce(A.double(), C.double())
    amdim_nce(A.double(), C.double(), backend="chunked")  # asked for: no fallback


def test_what_no_kernel_has_is_no_fallback(monkeypatch, caplog):
    """Distances, hardest negatives, gathered columns: plain torch is the one way, and strict mode lets it."""
    monkeypatch.setenv("FUSED_NCE_STRICT", "1")
    with caplog.at_level(logging.WARNING, logger="fused_nce"):
        triplet_margin(A, torch.arange(len(A)) // 2)
        assert last_path() == (
            "chunked",
            "no kernel has neg_hardest, neg_ties, pos_hardest, pos_min, pos_ties, sq_dist",
        )
        npid_nce(A, C.view(12, 8).detach(), torch.arange(len(A)), torch.zeros(len(A), 3, dtype=torch.int64), z=9.0)
        assert last_path() == ("chunked", "no kernel gathers columns")
    assert not caplog.records


NEW_ATOM = """
import torch, fused_nce
from fused_nce.core import spec, statistics

spec.VOCABULARY |= {"neg_cube"}
statistics.STATISTIC |= statistics._sum("neg_cube", "t", lambda t: t**3, lambda t: 3 * t**2)
q, k = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
cube = fused_nce.tile_stats(q, k, spec.Spec(spec.Block(1), stats=("neg_cube",)))["neg_cube"]
assert fused_nce.last_path().backend == "chunked", fused_nce.last_path()
dense = ((q @ k.T) ** 3).masked_fill(torch.eye(5, dtype=torch.bool), 0).sum(1)
torch.testing.assert_close(*([x, *torch.autograd.grad(x.sum(), q)] for x in (cube, dense)))
"""


def test_a_new_atom_runs_in_plain_torch_by_default():
    """As `docs/ADDING_A_LOSS.md` has it: no kernel claims a name that it was not told."""
    done = subprocess.run([sys.executable, "-c", NEW_ATOM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_last_path_of_several_positives_is_that_of_their_negatives(backend):
    """Whose scores are gathered in plain torch on every backend, forward and backward."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(9, 8, generator=g).requires_grad_() for _ in range(2))
    positives, weights = torch.stack([torch.arange(9), torch.arange(9).roll(1)], dim=1), torch.full((9, 2), 0.5)
    first = next(name for name in dispatch.AUTOMATIC if why_not(name) is None)
    for targets in ({"positives": positives}, {"soft_targets": (positives, weights)}):
        for asked, path in ((backend, backend), (None, first)):
            loss = info_nce(q, k, **targets, backend=asked).loss
            assert last_path().backend == path
            loss.backward()
            assert last_path().backend == path


def test_last_path_belongs_to_the_thread():
    amdim_nce(A, C, backend="reference")
    seen: list[Any] = []

    def work():
        seen.append(last_path())
        amdim_nce(A, C, backend="chunked")
        seen.append(last_path().backend)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, "chunked"]
    assert last_path().backend == "reference"


def test_workspace_settings_reach_the_formula(monkeypatch):
    whole = workspace_bytes(SPEC, 4096, 4096 * 3, 64, backend="chunked")
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", "1")
    small = workspace_bytes(SPEC, 4096, 4096 * 3, 64, backend="chunked")
    assert small < 3 << 20 < whole < 20 << 20


def test_workspace_of_a_dtype_that_a_backend_does_not_run():
    if why_not("cpu"):
        pytest.skip(f"cpu: {why_not('cpu')}")
    with pytest.raises(ValueError, match=r"^dtype: got one of 8 bytes, need float32, bfloat16 or float16 for 'cpu'$"):
        workspace_bytes(SPEC, 4, 12, 8, torch.float64)


def test_a_backend_refuses_what_it_has_no_atom_for(monkeypatch):
    """Each by name; k None is one tensor in both roles, and a bank of another dtype is mixed."""
    q = torch.ones(4, 8)
    spec = Spec(Labels(), Bias(), ("pos_lse",), ("neg_lse",), drop_self=True)
    with monkeypatch.context() as context:
        context.setattr(dispatch.backend_module("chunked"), "ATOMS", {"block", "identity", "neg_lse"})
        reason = dispatch.why_not("chunked", spec, q, None)
    assert reason == "it has no bias, columns, drop_self, labels, pos_lse, self"
    assert dispatch.why_not("cpu", SPEC, q, torch.ones(12, 8).bfloat16()) == "it has no mixed"
    for name in ("reference", "chunked"):
        assert dispatch.why_not(name, spec, q, None) is None


def test_a_backend_has_every_member_and_core_looks_none_up_by_name():
    members = {name for name in (*vars(Backend), *Backend.__annotations__) if not name.startswith("_")}
    assert {"ATOMS", "loss", "whole_loss", "mirrored", "tiles", "ways"} <= members
    for x in (*map(dispatch.backend_module, dispatch.BACKENDS), ring.Ring):
        before = {"ATOMS", "why_not", "workspace_bytes"} if x is ring.Ring else set()  # whose blocks have been asked
        assert {name for name in members if not hasattr(x, name)} == before, x
    code = "".join(path.read_text(encoding="utf-8") for path in Path(dispatch.__file__).parent.rglob("*.py"))
    asked = re.findall(r"\b(?:get|has)attr\((.*?), (.*?)[,)]", code)
    # A name that is written out is looked up in what a thread has of its own alone.
    assert not [x for x in asked if "backend" in x[0] or (x[1][0] == '"' and x[0][0] != "_")]


def test_backends_and_doctor():
    found = fused_nce.backends()
    assert tuple(found) == dispatch.BACKENDS
    assert found["chunked"] is None
    assert found["reference"] is None
    text = fused_nce.doctor()
    assert torch.__version__ in text
    for name, why in found.items():
        assert f"backend   {name:10} {'ready' if why is None else f'no: {why}'}\n" in text
    call = re.search(r"^call +([\d.]+) ms", text, re.M)
    assert call
    assert 0 < float(call[1]) < 1000
    assert re.search(r"^compiler +C\+\+ \S+", text, re.M)


def test_doctor_names_the_command_that_adds_what_is_missing(monkeypatch):
    doctor = sys.modules["fused_nce.doctor"]  # the package's attribute of this name is the function
    needs = {"plots": {"no_such_module": "nothing", "torch": "torch"}, "core": {"torch": "torch"}}
    monkeypatch.setattr(doctor, "EXTRAS", needs)
    assert "missing   for plots; add: pip install nothing\n" in fused_nce.doctor() + "\n"
    assert doctor.missing() == {"plots": ["nothing"]}
