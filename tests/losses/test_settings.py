"""Settings of every loss: scales above 0, numbers of NumPy, keywords of modules; and what a loss's result is not."""

from __future__ import annotations

import functools
import inspect
import math
import operator
from typing import Any, cast

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_nce import AMDIMLoss, CLIPLoss, InfoNCELoss, MemoryQueue, NCEOutput, NPIDNCELoss, info_nce, tile_loss
from fused_nce.core.spec import Block, Spec, TanhClip
from fused_nce.core.tails import Nce
from fused_nce.losses.registry import LOSSES
from tests.losses.test_registry import grown
from tests.refusals import unlike

FIRST = {entry.name: name for name, entry in reversed(LOSSES.items())}  # of each function
FACTORS = ("scale", "logit_scale", "temperature", "max_scale", "tau", "margin", "z", "clip")
STRENGTHS = ("penalty", "hardness", "proximal", "label_smoothing", "guide_margin", "false_negative_margin", "tau_plus")
NUMBERS = (*FACTORS, *STRENGTHS, "logit_bias", "ema")


def taking(names):
    """(function, setting) of the losses that have it."""
    return [(f, s) for f in FIRST for s in names if s in inspect.signature(LOSSES[FIRST[f]].function).parameters]


def run(function, **settings):
    entry, inputs, _ = grown(FIRST[function], 1)
    beside = {"guide": (torch.eye(len(next(iter(inputs.values())))),) * 2} if "guide_margin" in settings else {}
    return entry.function(**(inputs | settings | beside))


@pytest.mark.parametrize(("function", "setting"), taking(FACTORS))
def test_a_factor_is_above_0(function, setting):
    """In the function and, where it keeps the setting, in the module's constructor; a tensor is not read."""
    module: Any = LOSSES[FIRST[function]].module
    kept = setting in inspect.signature(module).parameters or setting == "max_scale" or module is AMDIMLoss
    needed: dict[str, Any] = {"tau": 1.0} if function == "amdim_mixture_nce" else {}
    for value in (0, 0.0, -1.0, math.nan):
        wanted = ValueError, rf"^{setting}: got {value!r}, need a finite number > 0$"
        calls = [lambda value=value: run(function, **{setting: value})]
        calls += [lambda value=value: module(**(needed | {setting: value}))] if kept else []
        assert unlike([(call, *wanted) for call in calls]) == []
    if setting in ("scale", "logit_scale"):
        assert run(function, **{setting: torch.tensor(-1.0)}).loss.isfinite()


def test_the_engine_takes_any_scale():
    q = torch.randn(4, 3)
    for scale in (-1.0, 0.0):
        assert tile_loss(q, q.flip(0), Spec(Block(1)), Nce(), scale=scale).loss.isfinite()


@pytest.mark.parametrize(("function", "setting"), taking(NUMBERS))
@pytest.mark.parametrize("kind", [numpy.float16, numpy.float32, numpy.float64, numpy.longdouble])
def test_numbers_of_numpy_are_numbers(function, setting, kind):
    """The same bits as Python's: 0.3 of 16 bits, that no later arithmetic is of 16 bits, nor its name in a spec."""
    value = kind(0.3)
    found, wanted = (run(function, **{setting: x}) for x in (value, float(value)))
    assert torch.equal(found.loss, wanted.loss)


@pytest.mark.parametrize("kind", [numpy.float16, numpy.int64])
def test_numbers_of_numpy_inside_others(kind):
    q = torch.randn(6, 8)
    losses: list[Any] = [
        lambda x: info_nce(q, q, prefixes=(2, 8), prefix_weights=(x, x)),
        lambda x: LOSSES["cpc_nce"].function(q[None], q[None], weights=(x,)),
        lambda x: tile_loss(q, q, Spec(Block(1), TanhClip(x)), Nce()),
    ]
    assert all(torch.equal(loss(kind(3)).loss, loss(3.0).loss) for loss in losses)


def test_a_temperature_of_16_bits_is_inverted_in_32():
    q, k, tau = torch.randn(6, 8), torch.randn(6, 8), torch.tensor(0.07, dtype=torch.bfloat16)
    assert torch.equal(info_nce(q, k, temperature=tau).loss, info_nce(q, k, temperature=tau.float()).loss)
    weights = torch.rand(6)
    found = info_nce(q, k, row_weights=weights.double()).loss
    assert found.dtype == torch.float32
    assert torch.equal(found, info_nce(q, k, row_weights=weights).loss)


def test_counts_of_numpy():
    queue, noise = MemoryQueue(numpy.int64(6), numpy.int32(8)), NPIDNCELoss(m=numpy.int64(3))
    assert [type(count) for count in (queue.size, queue.dim, noise.m)] == [int] * 3
    q, widths = torch.randn(6, 8), cast(Any, numpy.array([2, 8]))
    assert torch.equal(info_nce(q, q, prefixes=widths).loss, info_nce(q, q, prefixes=(2, 8)).loss)


KEYWORDS = [
    (lambda: InfoNCELoss(temprature=3), TypeError, "^InfoNCELoss: got temprature, need temperature$"),
    (lambda: InfoNCELoss(learnabel=True), TypeError, "^InfoNCELoss: got learnabel, need learnable$"),
    (lambda: InfoNCELoss(cast(Any, torch.nn.Parameter(torch.ones(())))), TypeError, ".*Parameter, .*learnable=True"),
    (lambda: InfoNCELoss(normalise=True), TypeError, "^InfoNCELoss: got normalise, need normalize$"),
    (lambda: InfoNCELoss(guide=None), TypeError, "^InfoNCELoss: got guide, which comes with each call, need it .*$"),
    (lambda: AMDIMLoss(penaltee=1.0), TypeError, "^AMDIMLoss: got penaltee, need penalty$"),
    (lambda: CLIPLoss(temperature=0.07), TypeError, "^CLIPLoss: got temperature, need one of backend, .*$"),
    (lambda: CLIPLoss(maxscale=100), TypeError, "^CLIPLoss: got maxscale, need max_scale$"),
    (lambda: CLIPLoss(logit_scale=10.0), TypeError, "^CLIPLoss: got logit_scale, which comes with each call, need .*$"),
]


def test_keywords_of_modules():
    assert unlike(KEYWORDS) == []


@pytest.mark.parametrize("function", FIRST)
def test_no_module_takes_another_keyword(function):
    module: Any = LOSSES[FIRST[function]].module
    with pytest.raises(TypeError, match=rf"{module.__name__}.* got .*colour"):
        module(colour=1)


def results() -> list[Any]:
    q = torch.randn(4, 3, requires_grad=True)
    return [info_nce(q, q.detach()), tile_loss(q, q.detach(), Spec(Block(1)), Nce())]


ARITHMETIC: list[Any] = [
    *(lambda x, f=f: f(x, x) for f in (operator.add, operator.sub, operator.truediv)),
    *(lambda x, f=f: f(x, 2) for f in (operator.add, operator.sub, operator.mul, operator.truediv)),
    *(lambda x, f=f: f(2, x) for f in (operator.add, operator.sub, operator.mul, operator.truediv)),
    *(lambda x, f=f: f(x.loss, x) for f in (operator.add, operator.mul)),
    operator.neg,
    lambda x: sum([x, x]),
]


def test_a_result_is_a_tuple_and_no_number():
    for x in results():
        name = type(x).__name__
        wanted = TypeError, rf"^{name}: got arithmetic on it, need it on its \.loss"
        assert unlike([(functools.partial(f, x), *wanted) for f in ARITHMETIC]) == []
        for attribute in ("backward", "item", "detach"):
            assert not hasattr(x, attribute)
            with pytest.raises(AttributeError, match=rf"^{name}: has no {attribute}, need \.loss\.{attribute}$"):
                getattr(x, attribute)
        with pytest.raises(AttributeError, match=rf"^{name}: has no los$"):
            _ = x.los
        loss, nce, *_ = x
        assert issubclass(type(x), tuple)
        assert x[0] is loss is x.loss
        assert x[:2] == (loss, nce)
        assert x == x._replace()
        leaves, spec = pytree.tree_flatten(x)
        again = pytree.tree_unflatten(leaves, spec)
        assert type(again) is type(x)
        assert again.loss is loss


def test_a_compiled_result_is_one_too():
    def step(q: Tensor) -> tuple[NCEOutput, Tensor]:
        out = info_nce(q, q.detach())
        loss, _, penalty, _ = out
        return out, loss + penalty

    q = torch.randn(4, 3, requires_grad=True)
    out, loss = torch.compile(step, fullgraph=True, backend="aot_eager")(q)
    assert type(out) is NCEOutput
    assert torch.equal(loss, step(q)[1])
