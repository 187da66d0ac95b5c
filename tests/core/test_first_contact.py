"""A GPU backend's first test on a card; here the CPU plays the card."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch

from fused_nce import _extension, info_nce
from fused_nce.backends import chunked, cuda, reference
from fused_nce.core import dispatch, first_contact
from fused_nce.core.spec import FILTERS, Bias, Block, Index, Labels, Separate, Several, Spec, TanhClip
from fused_nce.core.tails import LogIn, LogOut, Nce, Sigmoid

CPU = torch.device("cpu")
SPECS = {
    "amdim": Spec(Block(49), TanhClip(20.0)),
    "wide clip": Spec(Block(3), TanhClip(60.0)),
    "rows of an image": Spec(Block(2, 3), stats=Nce().stats),
    "targets": Spec(Index(), stats=Nce().stats),
    "queue": Spec(Separate(2), stats=Nce().stats, unit_norm=True),
    "queue, a key a row": Spec(Separate(1), stats=Nce().stats),
    "both ways": Spec(Block(1), stats=Nce().stats, columns=("neg_lse",)),
    "pairs": Spec(Block(1), Bias(), stats=Sigmoid().stats),
    "labels": Spec(Labels(), stats=tuple(dict.fromkeys(LogOut.READS + LogIn.READS))),
    "views": Spec(Block(2, 2), stats=Nce().stats, drop_self=True),
    "one statistic, no tail": Spec(Block(1), stats=("neg_lse",)),
    "a sequence, no tail": Spec(Labels(), stats=("pos_lse", "pos_max")),
    "labels of one tensor": Spec(Labels(), stats=LogOut.READS, drop_self=True),
    "margin and guide": Spec(Index(), TanhClip(20.0), filters=FILTERS),
    "guide, labels, no tail": Spec(Labels(), stats=("neg_lse", "neg_sum", "neg_count"), filters=("guide",)),
    "several, no tail": Spec(Several(70), stats=("neg_lse", "neg_max")),
    "prefixes": Spec(Index(), stats=Nce().stats, filters=FILTERS, prefixes=(3, 17, 40)),
    "prefixes of one tensor, no tail": Spec(Labels(), stats=("neg_lse",), drop_self=True, prefixes=(8, 40)),
}
needs_kernels = pytest.mark.skipif(_extension.status()[0] is None, reason="no C++ kernels on this machine")


def trial(backend, name, dtype, width=40):
    spec = SPECS[name]
    problems = first_contact.problems(spec, dtype, None if spec.drop_self else dtype, width)
    return first_contact.trial(backend, dispatch.backend_module("reference"), problems, CPU)


@pytest.mark.parametrize(("layout", "width"), [(Block(49), 128), (Block(49), 2560), (Block(3, 500), 64)])
def test_problems_of_images_are_bounded(layout, width):
    for p in first_contact.problems(Spec(layout), torch.bfloat16, torch.bfloat16, width):
        assert p.n * p.m <= first_contact.MOST_SCORES
        assert max(p.n, p.m) * width <= first_contact.MOST_NUMBERS
        assert p.n // layout.rows_per_image == p.m // layout.n_c >= 15


@needs_kernels
def test_sound_kernels_pass(monkeypatch):
    """By the operators and by plain calls."""
    module: Any = _extension.status()[0]
    monkeypatch.setattr(cuda, "why_not", lambda spec, q, k: cuda._unable(module, spec, q, k))
    failed = {
        (name, dtype): found
        for name in SPECS
        for dtype in first_contact.TOLERANCE
        if (found := trial(cuda, name, dtype)) != ("", True)
    }
    assert failed == {}


@needs_kernels
@pytest.mark.parametrize("normalize", [False, True])
def test_a_plain_call_is_tried_too(normalize, monkeypatch):
    """The function that serves it has kernels of its own: here its loss is wrong, where rows are divided or not."""
    module: Any = _extension.status()[0]
    whole: Any = cuda.whole_loss

    def spoilt(*arguments):
        found = whole(*arguments)
        return (found[0] * (1.2 if arguments[5] == normalize else 1.0), *found[1:])

    monkeypatch.setattr(cuda, "why_not", lambda spec, q, k: cuda._unable(module, spec, q, k))
    monkeypatch.setattr(cuda, "whole_loss", spoilt)
    found, lasts = trial(cuda, "views", torch.bfloat16)
    assert "a plain call's loss of" in found
    assert lasts


class Faulty:
    """`chunked`, wrong in one place."""

    def __init__(self, field, change):
        self.field, self.change = field, change

    def __getattr__(self, name):
        return getattr(chunked, name)

    def spoilt(self, made):
        return tuple(
            x._replace(**{self.field: self.change(getattr(x, self.field))}) if self.field in x._fields else x
            for x in made
        )

    def loss(self, *args):
        return self.spoilt(chunked.loss(*args))

    def stats(self, *args):
        return self.spoilt([chunked.stats(*args)])[0]

    def grads(self, *args):
        return self.spoilt([chunked.grads(*args)])[0]


def first_to_zero(x):
    return torch.cat([x.reshape(-1)[:1] * 0, x.reshape(-1)[1:]]).reshape(x.shape)


def test_a_spec_without_a_tail_is_tried_too():
    for field in ("rows", "dq", "dk", "dscale"):
        assert field in trial(Faulty(field, first_to_zero), "one statistic, no tail", torch.float32)[0]


@pytest.mark.parametrize("field", ["pos", "rows", "dq", "dk", "dscale"])
def test_one_wrong_number_is_seen(field):
    """In every dtype, whether an entry is missing or not a number."""
    for change in (first_to_zero, lambda x: first_to_zero(x) / 0):
        for dtype in first_contact.TOLERANCE:
            found, lasts = trial(Faulty(field, change), "amdim", dtype)
            assert "its first test on this card failed: " + field in found, (change, dtype)
            assert lasts
    assert trial(Faulty(field, lambda x: x), "amdim", torch.float32) == ("", True)


def test_infinities_have_a_sign():
    x = torch.tensor([1.0, torch.inf, torch.nan])
    assert first_contact.off(x, x) == 0
    assert first_contact.off(x, torch.tensor([1.0, -torch.inf, torch.nan])) == float("inf")
    assert first_contact.off(x, torch.tensor([1.0, 2.0, torch.nan])) == float("inf")


def test_an_exception_is_a_verdict_that_does_not_last():
    def out_of_memory(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    found, lasts = trial(Faulty("dq", out_of_memory), "amdim", torch.float32)
    assert found.startswith("it raised OutOfMemoryError in its first test on this card: CUDA out of memory")
    assert not lasts


@pytest.fixture
def card(monkeypatch, tmp_path):
    """CPU tensors lie on a card that has `cuda`, which a test makes sound or faulty."""
    file = tmp_path / "cache" / "verdicts.json"
    monkeypatch.setattr(first_contact, "_verdicts", {})
    monkeypatch.setattr(first_contact, "path", lambda device: file)
    monkeypatch.setattr(first_contact, "PLAYED", CPU.type)
    monkeypatch.setattr(dispatch, "AUTOMATIC", ("cuda", "chunked"))
    monkeypatch.setattr(chunked, "why_not", lambda *args: None)
    monkeypatch.delenv("FUSED_NCE_STRICT", raising=False)

    def has(module):
        module.why_not = lambda *args: None
        monkeypatch.setattr(
            dispatch, "backend_module", lambda name: {"cuda": module, "reference": reference}.get(name, chunked)
        )
        return file

    return has


def backend_used():
    path = dispatch.last_path()
    assert path is not None
    return path.backend


def run():
    q, k = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    return info_nce(q, k)


def test_a_failed_backend_is_not_used_and_says_why(card, caplog, monkeypatch):
    file = card(Faulty("dq", first_to_zero))
    with caplog.at_level(logging.WARNING, "fused_nce"):
        run()
    assert backend_used() == "chunked"
    assert "cuda: its first test on this card failed: dq of block(1,1)" in caplog.text
    with pytest.raises(ValueError, match="backend: got 'cuda', which cannot run this: its first test on this card"):
        info_nce(torch.randn(6, 8), torch.randn(6, 8), backend="cuda")
    assert "failed" in next(iter(json.loads(file.read_text()).values()))
    monkeypatch.setenv("FUSED_NCE_FIRST_CONTACT", "0")
    run()
    assert backend_used() == "cuda"


def test_a_sound_backend_is_tried_once_and_the_verdict_kept(card, monkeypatch):
    file = card(Faulty("dq", lambda x: x))
    run()
    assert dispatch.last_path() == ("cuda", "")
    assert set(json.loads(file.read_text()).values()) == {""}
    monkeypatch.setattr(first_contact, "trial", None)
    run()
    monkeypatch.setattr(first_contact, "_verdicts", {})  # as in another process
    run()
    file.write_text("[")
    monkeypatch.setattr(first_contact, "_verdicts", {})
    with pytest.raises(TypeError):  # a damaged file holds no verdict
        run()
