"""The first test on a card (`core/first_contact.py`), with the interpreter as the card.

`test_interpret.py` runs this file in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fused_nce.backends import reference
from fused_nce.backends import triton as backend
from fused_nce.backends.triton import gather, kernels, norms, stored, tail
from fused_nce.core import first_contact
from fused_nce.core.spec import Block, Separate, Spec
from fused_nce.core.tails import Nce
from tests.core.test_first_contact import SPECS
from tests.marks import nightly_but
from tests.triton.heard import Heard, Launch

VIEWS = Spec(Block(2, 2), stats=Nce().stats, drop_self=True, unit_norm=True)
PAIRS = Spec(Block(1), stats=Nce().stats, unit_norm=True)
BOTH = Spec(Block(1), stats=Nce().stats, columns=("neg_lse",), unit_norm=True)
QUEUE = Spec(Separate(1), stats=Nce().stats)
CPU = torch.device("cpu")
TAKEN = {name: replace(spec, unit_norm=name == "views") for name, spec in SPECS.items() if spec.atoms <= backend.ATOMS}


@pytest.fixture(autouse=True)
def _two_blocks(monkeypatch):
    """Of rows that are columns: the interpreter takes a millisecond a tile."""
    monkeypatch.setattr(first_contact, "LARGE_ITSELF", (270, 270))


def trial(spec: Spec, scale: float | torch.Tensor = 1.0, mixed: bool = False) -> tuple[str, bool]:
    dtype = torch.float32 if spec.columns or mixed else torch.float16  # whose weights are not stored
    k_dtype = None if spec.drop_self else torch.float16 if mixed else dtype
    problems = first_contact.problems(spec, dtype, k_dtype, 16, scale)
    sides: Any = (backend, reference)  # modules
    return first_contact.trial(sides[0], sides[1], problems, CPU)


@pytest.mark.parametrize("name", nightly_but(["views", "both ways"], TAKEN))
def test_sound_kernels_pass(name):
    assert trial(TAKEN[name]) == ("", True)


KINDS = [("views", torch.tensor(1.0), False), ("both ways", torch.tensor(1.0), True), ("targets", 1.0, True)]


@pytest.mark.parametrize(("name", "scale", "mixed"), nightly_but(KINDS[1:2], KINDS))
def test_a_tensor_as_scale_and_mixed_dtypes(name, scale, mixed):
    assert trial(TAKEN[name], scale, mixed) == ("", True)


# Of each kernel what it writes, and of which launches: all ways that a call may take it, those of large problems first.
LARGE = [
    (VIEWS, kernels, "fold_kernel", "mirrored", lambda x: x["MIRRORED"]),
    (VIEWS, gather, "merge_kernel", "out", lambda x: x["MIRRORED"]),
    (PAIRS, gather, "finish_kernel", "out", lambda x: x["SPLITS"] > 1 and x["AS_COLUMN"]),
    (VIEWS, tail, "close_kernel", "d_rows", lambda x: not x["ALONE"] and x["MIRRORED"]),
    (PAIRS, tail, "summary_kernel", "report", lambda x: True),
]
WRITES = [
    *LARGE,
    (VIEWS, kernels, "fold_kernel", "partial", lambda x: not x["MIRRORED"]),
    (VIEWS, kernels, "fold_kernel", "partial", lambda x: x["MIRRORED"]),
    (VIEWS, kernels, "weights_kernel", "sums", lambda x: True),
    (PAIRS, kernels, "fold_kernel", "sums", lambda x: x["n_y"] > 256),
    (VIEWS, gather, "terms_kernel", "terms", lambda x: True),
    (VIEWS, gather, "positives_kernel", "pos", lambda x: True),
    (VIEWS, gather, "finish_kernel", "out", lambda x: x["SPLITS"] > 1),
    (PAIRS, gather, "finish_kernel", "out", lambda x: x["SPLITS"] > 1 and x["NORMALISE"]),
    (PAIRS, norms, "unit_kernel", "unit_k", lambda x: True),
    (VIEWS, norms, "unit_kernel", "unit_q", lambda x: x["unit_stride"] == 32),
    (QUEUE, norms, "unit_kernel", "positives", lambda x: True),
    (PAIRS, norms, "through_kernel", "out_k", lambda x: not x["NORMALISE"]),
    (PAIRS, norms, "through_kernel", "out_q", lambda x: x["NORMALISE"]),
    (QUEUE, norms, "through_kernel", "out_q", lambda x: x["OWN"]),
    (PAIRS, tail, "close_kernel", "d_pos", lambda x: x["ALONE"]),
    (PAIRS, tail, "close_kernel", "report", lambda x: x["ALONE"]),
    (PAIRS, tail, "close_kernel", "sums", lambda x: not x["ALONE"]),
    (VIEWS, tail, "summary_kernel", "loss", lambda x: True),
    (BOTH, stored, "both_kernel", "blocks", lambda x: True),
    (BOTH, stored, "both_kernel", "partial", lambda x: True),
    (BOTH, stored, "strip_kernel", "stored", lambda x: x["start"] > 0),
    (BOTH, gather, "finish_kernel", "out", lambda x: x["start"] > 0),
    (BOTH, tail, "close_both_kernel", "d_columns", lambda x: True),
]


@pytest.mark.parametrize(("spec", "module", "name", "written", "of"), nightly_but(LARGE[::2], WRITES))
def test_a_wrong_kernel_is_noticed(spec, module, name, written, of, monkeypatch):
    def spoil(launch: Launch) -> None:
        if of(launch):
            launch[written].mul_(1.25).add_(0.25)  # scores of own keys are near 0

    heard = Heard(monkeypatch, module, name, spoil)
    found, lasts = trial(spec)
    assert any(of(launch) for launch in heard.launches)
    assert "its first test on this card failed" in found
    assert lasts
