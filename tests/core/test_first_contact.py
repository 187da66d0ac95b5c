"""A GPU backend's first test on a card; here the CPU plays the card."""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_nce import info_nce
from fused_nce.backends import chunked, cuda, reference
from fused_nce.core import dispatch, first_contact
from fused_nce.core.spec import FILTERS, Bias, Block, Index, Labels, Separate, Several, Spec, TanhClip
from fused_nce.core.tails import LogIn, LogOut, Nce, Sigmoid
from tests.conftest import needs_kernels

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


def trial(backend, name, dtype, width=40, scale=first_contact.SCALE, k_dtype=None):
    spec = SPECS[name]
    problems = first_contact.problems(spec, dtype, None if spec.drop_self else k_dtype or dtype, width, scale)
    return first_contact.trial(backend, dispatch.backend_module("reference"), problems, CPU)


@pytest.mark.parametrize(("layout", "width"), [(Block(49), 128), (Block(49), 2560), (Block(3, 500), 64)])
def test_problems_of_images_are_bounded(layout, width):
    for p in first_contact.problems(Spec(layout), torch.bfloat16, torch.bfloat16, width):
        assert p.n * p.m <= first_contact.MOST_SCORES
        assert max(p.n, p.m) * width <= first_contact.MOST_NUMBERS
        assert p.n // layout.rows_per_image == p.m // layout.n_c >= 15


@pytest.mark.parametrize("width", [128, 1024, 2560])
def test_the_oracle_takes_at_most_seven_gflop(width):
    """In every kind of spec; its exponentials are of as many scores as MOST_SCORES allows."""
    oracle = dispatch.backend_module("reference")
    for name, spec in SPECS.items():
        tried = first_contact.problems(spec, torch.float32, None if spec.drop_self else torch.float32, width)
        with FlopCounterMode(display=False) as counter:
            assert first_contact.trial(oracle, oracle, tried, CPU) == ("", True)  # the oracle twice
        assert counter.get_total_flops() <= 14e9, name


SCALES = {"near": first_contact.SCALE, "far": 64.0, "tensor": torch.tensor(2.0)}


@needs_kernels
def test_sound_kernels_pass(play_gpu):
    """By the operators and by plain calls, by each kind of scale."""
    failed = {
        (name, dtype, kind): found
        for name, spec in SPECS.items()
        for dtype in first_contact.TOLERANCE
        for kind, scale in SCALES.items()
        if dtype != torch.float16 or kind == "tensor"  # one kind is enough for it
        if (spec.unit_norm or kind != "far") and (found := trial(cuda, name, dtype, scale=scale)) != ("", True)
    }
    assert failed == {}


@needs_kernels
@pytest.mark.parametrize("normalize", [False, True])
def test_a_plain_call_is_tried_too(normalize, play_gpu, monkeypatch):
    """The function that serves it has kernels of its own: here its loss is wrong, where rows are divided or not."""
    whole: Any = cuda.whole_loss

    def spoilt(*arguments):
        found = whole(*arguments)
        return (found[0] * (1.2 if arguments[5] == normalize else 1.0), *found[1:])

    monkeypatch.setattr(cuda, "whole_loss", spoilt)
    found, lasts = trial(cuda, "views", torch.bfloat16)
    assert "a plain call's loss of" in found
    assert lasts


class Faulty:
    """A backend, wrong in one place of what it makes, or of what it is given."""

    def __init__(self, field="", change=lambda x: x, of=chunked, given=lambda problem: problem):
        self.field, self.change, self.of, self.given = field, change, of, given

    def __getattr__(self, name):
        return getattr(self.of, name)

    def spoilt(self, made):
        return tuple(
            x._replace(**{self.field: self.change(getattr(x, self.field))}) if self.field in x._fields else x
            for x in made
        )

    def loss(self, problem, *args):
        return self.spoilt(self.of.loss(self.given(problem), *args))

    def stats(self, problem):
        return self.spoilt([self.of.stats(self.given(problem))])[0]

    def grads(self, problem, *args):
        return self.spoilt([self.of.grads(self.given(problem), *args)])[0]


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


def louder(problem):
    """A scale that is a tensor, a fifth too large."""
    return problem._replace(scale=problem.scale * 1.2) if isinstance(problem.scale, torch.Tensor) else problem


@pytest.mark.parametrize("of", [chunked, pytest.param(cuda, marks=needs_kernels)])
def test_a_tensor_as_scale_is_tried_where_a_call_has_one(of, play_gpu):
    for name in ("both ways", "amdim"):
        assert trial(Faulty(of=of, given=louder), name, torch.bfloat16) == ("", True)
        assert "is off by" in trial(Faulty(of=of, given=louder), name, torch.bfloat16, scale=SCALES["tensor"])[0]


@needs_kernels
def test_a_plain_call_learns_its_scale(play_gpu, monkeypatch):
    """The gradient of a scale that is a tensor, of rows and of one's own keys: here it is lost."""

    class Lost(torch.autograd.Function):
        @staticmethod
        def forward(ctx, scale):
            return scale.clone()

        @staticmethod
        def backward(ctx, d):
            return d * 0.8

    whole: Any = cuda.whole_loss

    def spoilt(spec, tail, leaves, *rest):
        return whole(spec, tail, (*leaves[:2], leaves[2] and Lost.apply(leaves[2]), *leaves[3:]), *rest)

    for name in ("views", "queue, a key a row"):
        with monkeypatch.context() as patch:
            patch.setattr(cuda, "whole_loss", spoilt)
            assert "a plain call's dscale" in trial(cuda, name, torch.bfloat16, scale=SCALES["tensor"])[0]


@pytest.mark.parametrize(("name", "kind"), [("both ways", "near"), ("both ways", "tensor"), ("queue", "far")])
def test_a_shift_that_is_missing_is_seen(name, kind):
    """e^t, which nothing bounds, overflows without one; of rows of length one and a small number it does not."""
    for dtype in first_contact.TOLERANCE:
        assert "rows: neg_lse" in trial(Faulty("rows", lambda x: x.exp().log()), name, dtype, scale=SCALES[kind])[0]


@pytest.fixture
def allow_tf32():
    """Torch's own switch, as a function of how it stands."""
    before, on = torch.backends.cuda.matmul.fp32_precision, torch.backends.cuda.matmul
    yield lambda precision: setattr(on, "fp32_precision", precision)
    on.fp32_precision = before


def tf32(x):
    """10 digits of 23."""
    return ((x.float().view(torch.int32) + 4096) & -8192).view(torch.float32)


def test_tf32_is_allowed_where_torch_allows_it(allow_tf32):
    coarse = Faulty(given=lambda p: p._replace(q=tf32(p.q), k=tf32(p.k)))
    for name, kind in (("amdim", "near"), ("both ways", "tensor"), ("queue", "far")):
        allow_tf32("ieee")
        assert "is off by" in trial(coarse, name, torch.float32, scale=SCALES[kind])[0]
        allow_tf32("tf32")
        for sound in (coarse, Faulty()):
            assert trial(sound, name, torch.float32, scale=SCALES[kind]) == ("", True)
        assert "dq" in trial(Faulty("dq", first_to_zero), name, torch.float32, scale=SCALES[kind])[0]


def test_a_gradient_of_mixed_dtypes_may_be_as_coarse_as_its_input():
    for wrong, change in ((False, lambda x: x.bfloat16()), (True, lambda x: first_to_zero(x).bfloat16())):
        found, lasts = trial(Faulty("dk", change), "amdim", torch.float32, k_dtype=torch.bfloat16)
        assert bool(found) == wrong
        assert lasts


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


def test_a_backward_knows_of_its_trial():
    """A card's runs in a thread of its own as a rule; `tests/gpu/test_torch.py` has that."""
    seen, x = [], torch.ones(3, requires_grad=True)
    with first_contact.believing(as_large=True):
        y = x * 2
        y.register_hook(lambda g: seen.append((threading.get_ident(), first_contact.large())))
        y.sum().backward()
        assert not torch._C._is_multithreading_enabled()  # all that tells a CPU from a card here
    assert seen == [(threading.get_ident(), True)]
    assert torch._C._is_multithreading_enabled()


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


def run(**options):
    q, k = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    return info_nce(q, k, **options)


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


@needs_kernels
@pytest.mark.parametrize("around", ["inference mode", torch.float64, torch.bfloat16], ids=str)
def test_a_first_test_is_the_same_wherever_it_is_met(around, card, monkeypatch):
    """A validation step in inference mode, a default dtype: they are no fault of the kernels."""
    monkeypatch.setattr(cuda, "why_not", cuda.why_not)
    card(cuda)
    mode, dtype = around == "inference mode", torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype if mode else around)
        with torch.inference_mode(mode):
            q = torch.randn(6, 40, dtype=torch.float32)
            for name in ("amdim", "queue, a key a row", "pairs", "views", "prefixes"):
                scale = torch.tensor(2.0, dtype=torch.float32)
                k = None if SPECS[name].drop_self else q.clone()
                asked = ("cuda", dispatch.backend_module, SPECS[name], q, k, scale)
                assert first_contact.why_not(*asked) is None, name
    finally:
        torch.set_default_dtype(dtype)


def test_each_kind_of_call_has_a_verdict_of_its_own(card, allow_tf32):
    """By a number or a tensor as scale, near or far, and with TF32 or without."""
    file = card(Faulty(given=louder))
    used = []
    for options in ({}, {"temperature": torch.tensor(0.5)}, {"temperature": 0.01}, {}):
        run(normalize=True, **options)
        used.append(backend_used())
    allow_tf32("tf32")
    run(normalize=True)
    assert [*used, backend_used()] == ["cuda", "chunked", "cuda", "cuda", "cuda"]
    assert len(json.loads(file.read_text())) == 4


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
