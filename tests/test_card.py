"""The long trial of a card's backends, with the CPU as the card."""

from __future__ import annotations

import re

import pytest
import torch

from fused_nce import cli
from fused_nce.backends import chunked, cuda
from fused_nce.bench import card
from fused_nce.core import first_contact
from fused_nce.losses.registry import LOSSES
from tests.conftest import MODULE, needs_kernels

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("play_gpu")


def test_sound_backends_pass(capsys):
    """`chunked` runs every loss; the GPU's rows, emulated, those that they know, and name why not for the rest."""
    backends = ("chunked", "cuda") if MODULE else ("chunked",)
    assert card.shown(CPU, backends, (24,)) == 0
    printed = capsys.readouterr().out
    scored = sum(not entry.closed for entry in LOSSES.values())
    assert f"chunked  float32   {scored} of {scored} right, worst " in printed
    assert printed.endswith(f"{len(backends) * 3 * scored} trials, 0 wrong\n")
    assert "WRONG" not in printed


@needs_kernels
def test_a_wrong_kernel_is_named(monkeypatch, capsys):
    sound = cuda.loss

    def spoilt(*args):
        found, out = sound(*args)
        return found, out._replace(dk=None if out.dk is None else out.dk * 1.2)

    monkeypatch.setattr(cuda, "loss", spoilt)
    monkeypatch.setattr(cuda, "whole_loss", None)  # which does not call it
    assert card.shown(CPU, ("cuda",), (24,)) == 1
    printed = capsys.readouterr().out
    assert "  WRONG  amdim_nce, width 24: the gradient of consequents is off by 0.2 of the largest" in printed
    assert "please send this report" in printed


def test_a_kernel_that_is_wrong_for_many_rows_alone_is_named(monkeypatch, capsys):
    """Symmetric scores seen once, strips after the first: what few rows never meet."""
    sound = chunked.loss

    def spoilt(*args):
        found, out = sound(*args)
        return found, out._replace(dq=out.dq * (1.2 if first_contact.large() else 1.0))

    monkeypatch.setattr(chunked, "loss", spoilt)
    monkeypatch.setattr(card, "LOSSES", {name: LOSSES[name] for name in ("info_nce", "nt_xent")})
    assert card.shown(CPU, ("chunked",), (24,)) == 1
    printed = capsys.readouterr().out
    assert "WRONG  nt_xent, width 24: the gradient of " in printed
    assert " of a problem taken for large is off by 0.2 of the largest" in printed


def test_nothing_that_ran_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "why_not", lambda *call: "no card of its kind")
    assert card.shown(CPU, ("cuda",), (24,)) == 1
    printed = capsys.readouterr().out
    assert "  not its own: " in printed
    assert re.search(r" of \d+: no card of its kind\n", printed)
    assert printed.endswith("cuda ran nothing: its kernels are not tested\n")


def test_a_broken_context_ends_the_trials(monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(chunked, "loss", broken)
    assert card.shown(CPU, ("chunked",), (24,)) == 1
    printed = capsys.readouterr().out
    assert "stopped: cpu is of no use any more to this process" in printed
    assert ", 1 wrong; please send this report" in printed


def test_an_exception_is_a_result(monkeypatch):
    def broken(*args):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(chunked, "loss", broken)
    found = [x.wrong for x in card.trials(CPU, ("chunked",), (24,)) if x.loss == "amdim_nce"]
    assert found == ["it raised RuntimeError: no kernel image is available"] * 3


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["doctor", "--gpu"]) == cli.USERS
    assert "fused-nce: --gpu: torch sees no GPU here, needed: at least one" in capsys.readouterr().err
