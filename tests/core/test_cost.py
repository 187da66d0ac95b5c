"""The model that chooses between the backends of a GPU, its table, and its fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_nce.core import cost, dispatch
from fused_nce.core.cost import Call, Cost, Measured
from fused_nce.core.problem import Needs
from fused_nce.core.spec import Block, Spec

SPEC = Spec(Block(1))
TWO, ONE, PENALISED = Call(), Call(k=False), Call(penalised=True)


def first(call: Call, n: int, m: int, d: int, dtype: torch.dtype = torch.bfloat16) -> str:
    return cost.fastest_first(call, n, m, d, dtype)[0]


@pytest.mark.parametrize(("n", "m"), [(8192, 32768), (32768, 32768)])
def test_the_width_decides(n, m):
    """Recomputing wins while D is small; for float32 the tensor cores that it does without decide at any D."""
    assert first(TWO, n, m, 64) == first(TWO, n, m, 250) == "triton"
    wide = TWO._replace(stored=True)
    assert first(TWO, n, m, 300) == first(wide, n, m, 300) == first(PENALISED, n, m, 150) == "cuda"
    assert cost.fastest_first(TWO, n, m, 2560, torch.float16) == ["cuda", "triton"]
    assert first(TWO, n, m, 64, torch.float32) == "cuda"
    assert first(wide, n, 2 * m, 500) == first(PENALISED, n, 2 * m, 128) == "triton"  # products wait for keys
    assert first(wide, n, 2 * m, 600) == first(PENALISED._replace(stored=True), n, 2 * m, 260) == "cuda"


def test_the_gradients_decide():
    """A pass of its own for each gradient is what `triton` pays: not for the first without a penalty."""
    costs = {(name, 2): Cost(0.0, {128: ps}) for name, ps in (("triton", 1.0), ("cuda", 1.5))}
    for call, name in ((ONE, "triton"), (TWO, "triton"), (PENALISED, "cuda")):
        assert cost.fastest_first(call, 32768, 32768, 128, torch.bfloat16, costs)[0] == name


def test_both_ways_have_costs_of_their_own():
    """As calls whose weights are stored have."""
    fast = Cost(10.0, {64: 0.01})
    both = Call(columns=True, stored=True)
    for name, call, other in (
        (cost.BOTH_WAYS, both, both._replace(stored=False)),
        (cost.STORED, TWO._replace(stored=True), TWO),
        (cost.PLAIN, TWO, PENALISED),
    ):
        table = TRUTH | {("triton" + name, 2): fast}
        for one, first_one in ((call, "triton"), (other, "cuda")):
            found = cost.fastest_first(one, 8192, 8192, 256, torch.bfloat16, table)
            assert (found[0], len(found)) == (first_one, 2)
    most = cost.THIN_FROM
    assert both._replace(at_once=False).entry("triton", most) == "triton"
    both_of = (both.entry("cuda", most), both._replace(shared=True).entry("cuda", most))
    assert both_of == ("cuda" + cost.BOTH_WAYS, "cuda")
    assert TWO._replace(stored=True).entry("cuda", most - 1) == "cuda" + cost.PLAIN
    assert TWO._replace(stored=True).entry("triton", most) == "triton" + cost.STORED + cost.PLAIN


def test_thin_strips_have_a_cost_of_their_own():
    """Of `cuda` alone; a table without an entry has the one whose name begins alike."""
    slow = Cost(10.0, {64: 100.0})
    table = TRUTH | {("cuda" + cost.THIN, 2): slow}
    for call in (TWO, PENALISED):
        less, half, more = (
            cost.times_us(call, 8192, m, 256, torch.bfloat16, table)["cuda"] / m
            for m in (cost.THICK, 49152, cost.THIN_FROM)
        )
        assert half == pytest.approx((less + more) / 2, rel=1e-3)  # but for a launch
        for m, name in ((cost.THICK, "cuda"), (cost.THIN_FROM, "triton"), (2 * cost.THIN_FROM, "triton")):
            assert cost.fastest_first(call, 8192, m, 256, torch.bfloat16, table)[0] == name


def test_a_score_costs_beside_its_products():
    truth = Cost(10.0, {64: 1.0, 128: 2.0}, 5.0)
    rows = [
        Measured("cuda", 2, call, n, n, d, truth.time_us(call.gemms("cuda"), n, n, d))
        for call in (PENALISED, PENALISED._replace(k=False))
        for n in (1024, 8192)
        for d in (64, 128)
    ]
    found = cost.fit(rows)["cuda", 2]
    assert (found.launch_us, found.score_ps) == pytest.approx((10.0, 5.0))
    assert found.gemm_ps == pytest.approx(truth.gemm_ps)
    assert cost.fit([row for row in rows if row.call.k])["cuda", 2].score_ps == 0.0


def test_both_ways_beyond_the_plan_cost_what_runs():
    """Where blocks have no room for statistics of columns, or strips none for weights, `triton` takes thin passes."""
    spec = Spec(Block(1), columns=("neg_lse",))
    shapes = (65536, 65536), (66000, 66000), (4096, 65536), (4096, 1 << 20)
    found = {}
    for n, m in shapes:
        q, k = (SimpleNamespace(device=torch.device("cuda"), shape=(x, 512), dtype=torch.bfloat16) for x in (n, m))
        call = dispatch.planned(Call(), spec, q, k)  # type: ignore[arg-type]
        found[n, m] = call.at_once, call.stored, dispatch.automatic(q, k, call)[0]  # type: ignore[arg-type]
    plans = (True, True, "triton"), (False, True, "cuda"), (True, True, "triton"), (True, False, "cuda")
    assert found == dict(zip(shapes, plans, strict=True))


def test_few_launches_win_where_there_are_few_scores():
    assert cost.fastest_first(TWO, 128, 6272, 64, torch.bfloat16) == ["cuda", "triton"]


GEMMS = {  # as `core/problem.py` and the backends' docstrings count them: (triton, cuda)
    Call(): (4, 3),
    Call(penalised=True): (5, 3),
    Call(k=False): (2, 2),
    Call(q=False): (3, 2),
    Call(q=False, k=False): (1, 1),
    Call(k=False, shared=True): (3, 3),
    Call(columns=True, stored=True): (4, 4),
    Call(stored=True): (4, 3),
    Call(k=False, penalised=True, stored=True): (3, 2),
    Call(q=False, k=False, columns=True): (1, 1),
    Call("stats"): (1, 1),
    Call("stats", columns=True): (1, 1),
    Call("stats", columns=True, at_once=False): (2, 1),
    Call(columns=True, at_once=False, stored=True): (5, 4),
    Call(columns=True): (5, 4),
    Call("grads", columns=True): (4, 3),
    Call("grads"): (4, 3),
    Call("grads", k=False, shared=True): (2, 3),
}


@pytest.mark.parametrize("call", GEMMS, ids=str)
def test_gemms_of_a_call(call):
    assert (call.gemms("triton"), call.gemms("cuda")) == GEMMS[call]


def test_the_cpu_sees_symmetric_scores_once_and_keeps_what_fits():
    """Of large problems: 1.5u and 2u, against 3u on other backends; both ways 3u and 4u."""
    both_ways, alike = Call(columns=True), Call(k=False, shared=True, symmetric=True)
    for call, kept, streamed in ((both_ways, 3, 4), (alike, 1.5, 2), (TWO, 3, 3)):
        assert call.gemms("cpu", call.tiles(kept=True)) == kept
        assert call.gemms("cpu", call.tiles(kept=False)) == streamed
    assert alike.gemms("chunked") == alike.gemms("cuda") == 3


def test_a_scale_alone_takes_the_rows_pass():
    assert Call.of("loss", Needs(False, False, True)) == Call("loss", True, False)
    assert Call.of("grads", Needs(False, True, True)) == Call("grads", False, True)


def test_between_and_beyond_the_entries():
    model = Cost(5.0, {128: 0.5, 256: 1.5})
    times = [model.time_us(2, 1000, 1000, d) for d in (64, 128, 192, 256, 1024)]
    assert times == pytest.approx([6, 6, 7, 8, 17])


TRUTH = {("cuda", 2): Cost(25.0, {64: 0.7, 256: 1.3}), ("triton", 2): Cost(40.0, {64: 0.3, 256: 1.6})}
SHAPES = [(128, 6272, 64), (4096, 4096, 64), (8192, 9000, 256), (512, 49152, 256)]


def times_of(table: cost.Table) -> list[Measured]:
    return [
        Measured(name, size, PENALISED, *shape, model.time_us(PENALISED.gemms(name), *shape))
        for (name, size), model in table.items()
        for shape in SHAPES
    ]


def test_fit_finds_what_made_the_times():
    found = cost.fit(times_of(TRUTH))
    assert found.keys() == TRUTH.keys()
    for key, model in TRUTH.items():
        assert found[key].launch_us == pytest.approx(model.launch_us)
        assert found[key].gemm_ps == pytest.approx(model.gemm_ps)
    with pytest.raises(ValueError, match=r"^measured: got 2 times of 'cuda' at 2 widths, need more times"):
        cost.fit(times_of(TRUTH)[1:3])


def test_fit_gives_no_negative_time():
    """Faster by more than the scores say: noise, or another path of the backend's."""
    rows = [row._replace(time_us=3.0 * row.n * row.m * 1e-6 - 5.0) for row in times_of(TRUTH)]
    for model in cost.fit(rows).values():
        assert model.launch_us == 0
        assert all(ps > 0 for ps in model.gemm_ps.values())


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch):
    assert {size for _, size in cost.table()} == {2, 4}
    monkeypatch.setattr(cost, "PATH", tmp_path / "cost.json")
    cost.write(TRUTH, "made up")
    assert cost.table() == TRUTH


def test_only_a_gpu_asks_the_model():
    x: Any = torch.empty(4, 8)
    assert dispatch.automatic(x, x) == dispatch.AUTOMATIC
    x = SimpleNamespace(device=SimpleNamespace(type="cuda"), shape=(128, 2560), dtype=torch.bfloat16)
    assert dispatch.automatic(x, x)[0] == "cuda"
    assert dispatch.automatic(x, x)[-1] == "chunked"


def test_the_choice_knows_what_is_wanted(monkeypatch):
    """What follows from the spec and the tensors is filled in."""
    asked: list[Call] = []

    def answer(call, *_):
        asked.append(call)
        return ["triton"]

    monkeypatch.setattr(cost, "fastest_first", answer)
    x: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), shape=(8, 4), dtype=torch.bfloat16)
    monkeypatch.setattr(dispatch, "why_not", lambda *_: None)
    dispatch.choose(SPEC, x, None, "", ONE)
    dispatch.choose(Spec(Block(1), columns=("neg_lse",)), x, x, "", Call("stats"))
    assert asked == [Call(k=False, shared=True), Call("stats", columns=True, stored=True)]


@pytest.mark.parametrize(("wanted", "call"), [("q", Call("loss", True, False)), ("qk", Call("loss", True, True))])
def test_the_ops_say_what_is_wanted(wanted, call, monkeypatch):
    from fused_nce import info_nce

    asked, choose = [], dispatch.choose

    def listen(*given):
        asked.append(given[4])  # the call
        return choose(*given)

    monkeypatch.setattr(dispatch, "choose", listen)
    q, k = (torch.randn(4, 8).requires_grad_(name in wanted) for name in "qk")
    info_nce(q, k, penalty=0.1, backend="chunked")
    assert asked == [call._replace(penalised=True)]
