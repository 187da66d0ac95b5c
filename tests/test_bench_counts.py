"""What a call launches and moves on a GPU, counted without one, and the model of its time that is made from it."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from bench import calls, compiled, counted, static_cuda, tables
from bench.gpu import machine, problems, rivals
from bench.gpu import tables as gpu_tables
from fused_nce import _extension, amdim_nce
from fused_nce.bench import formulas
from fused_nce.core import dispatch
from fused_nce.core.cost import Call
from tests.marks import nightly_but
from tests.test_bench_gpu import made_up, record_of

BY_LABEL = {p.label: p for p in problems.ALL}
COUNTS = pytest.mark.skipif(
    torch.version.cuda is None or not hasattr(_extension.status()[0], "cuda_tally"),
    reason="needs the emulation of a GPU, and a torch that knows which operators have kernels on one",
)
FEW = (
    "CLIP 8,192², D 64",
    "AMDIM 128×49, D 1024",
    "MoCo 256 × 65,536, D 128",
    "InfoNCE 1,024², D 256",
    "NT-Xent 1,024², D 128",
)


@COUNTS
@pytest.mark.parametrize("label", nightly_but(FEW, calls.problems_counted()))
def test_a_call_counts_what_the_table_says(label):
    found = [calls.count(label, backend) for backend in calls.BACKENDS]
    assert calls.regressions(found) == [], "python -m bench.calls --write"


def test_each_number_that_is_not_the_tables_is_seen():
    """Of a call and of each of its kernels, more or less than before; code is what no count without a compiler has."""
    for backend in calls.BACKENDS:
        whole = calls.committed()["CLIP 8,192², D 64", backend]
        assert calls.regressions([{**whole, "kernels": [{**k, "code": {}} for k in whole["kernels"]]}]) == []
        wrong = [whole | {name: whole[name] + 1} for name in ("launches", "torch_bytes")]
        wrong += [whole | {"torch": whole["torch"] | {"mul": 0}}, whole | {"kernels": whole["kernels"][1:]}]
        for place, kernel in enumerate(whole["kernels"]):
            for name in kernel.keys() - {"name", "code"}:
                for by in (-1, 1):
                    kernels = [*whole["kernels"]]
                    kernels[place] = kernel | {name: kernel[name] + by}
                    wrong.append(whole | {"kernels": kernels})
        assert all(calls.regressions([call]) for call in wrong)
        assert "not in static-calls.json" in calls.regressions([whole | {"label": "?"}])[0]


@COUNTS
def test_a_launch_more_is_seen(monkeypatch):
    """Of torch's, before the op and within it; and what is no launch is none."""
    label = FEW[1]
    formula = formulas.FORMULAS["amdim_nce"]
    slow = formula._replace(ours=lambda a, c, backend: formula.ours(a + 0.0, c, backend))
    monkeypatch.setitem(formulas.FORMULAS, "amdim_nce", slow)
    assert "launches, was" in calls.regressions([calls.count(label, "cuda")])[0]
    x = torch.ones(4, 6)
    run = lambda: (x.view(6, 4).t()[1:].unsqueeze(0), torch.empty(3), torch.stack([x, x]).sum(), x[:0] + 1, x.clone())  # noqa: E731
    found, moved = calls.operators(run)
    assert found == {"cat": 1, "sum": 1, "copy_": 1}
    assert moved == 4 * (2 * 24 + 24 + 48 + 3 * 24)


def host(backend):
    """Calls of Python's functions, and dispatched operators, of AMDIM 128×49 forward and backward, once it is warm."""
    q, k = (x.bfloat16().requires_grad_() for x in (torch.randn(128, 1024), torch.randn(128, 49, 1024)))
    functions = 0

    def run():
        q.grad = k.grad = None
        amdim_nce(q, k, backend=backend).loss.backward()

    def heard(frame, event, argument):
        nonlocal functions
        functions += event == "call"

    run()
    sys.setprofile(heard)
    try:
        run()
    finally:
        sys.setprofile(None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        run()
    return functions, len(profiled.events())


@COUNTS
def test_an_eager_call_on_a_gpu_costs_the_host_what_one_on_a_cpu_does():
    """One C++ operator forward and one backward, the kernels stubbed."""
    own = host("cpu")
    with calls.counting_cuda():
        found = host("cuda")
    assert found[0] <= own[0] + 25 <= 80
    assert found[1] <= own[1] + 10 <= 75


@COUNTS
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_an_eager_call_by_triton_stays_within_what_its_launches_in_python_cost():
    with calls.counting_triton(False):
        functions, operators = host("triton")
    assert functions <= 550
    assert operators <= 92  # of a strip, views


@COUNTS
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("label", nightly_but(["MoCo 256 × 65,536, D 128"], compiled.PROBLEMS))
def test_what_inductor_makes_of_a_loss(label):
    """Each launch of the code that it generates, and its bytes, as the table has them from this torch."""
    if compiled.version() != torch.__version__:
        pytest.skip(f"the table is of torch {compiled.version()}")
    found = compiled.count(compiled.PROBLEMS[label])
    assert found == compiled.committed()[label]
    products = [kernel["flop"] for kernel in found["kernels"] if "flop" in kernel]
    assert sum(products) == compiled.PROBLEMS[label].flop if label == FEW[1] else products


def test_the_model_of_torch_compile_costs_bytes_products_and_launches(monkeypatch):
    gemm = {"name": "extern_kernels.mm", "bytes": 10**6, "flop": 790 * 10**9}
    found = [{"name": "fused", "bytes": 43 * 10**8}, {"name": "fused", "bytes": 55 * 10**5}, gemm]
    monkeypatch.setattr(compiled, "counted", lambda problem: {"kernels": found})
    assert counted.compiled_ms(problems.MOCO) == pytest.approx(1.0 + 1e-3 + 1.0 / 0.92 + 4 * 2e-3)


def test_the_model_waits_for_the_pipe_that_is_full_first(monkeypatch):
    """Of a row kernel, of a Triton program with the multiprocessor to itself, and of two that share it."""
    monkeypatch.setattr(static_cuda, "committed", lambda: {"sm_90": {"fold": {"issued": 16.0, "slots": 24.0}}})
    per_s = 0.8 * 128 * 1.755e9  # issue slots of a multiprocessor
    assert counted._compute_s({"name": "fold", "scores": 10**6}) == pytest.approx(24e6 / (132 * per_s))
    code = {"scores": 4096, "matrix_clocks_per_score": 0.1, "issued_per_score": 16.0}
    for special, alu, slots in ((1.0, 7.0, 16), (3.0, 7.0, 24), (1.0, 9.0, 18)):
        code |= {"special_per_score": special, "alu_per_score": alu}
        for resident, clocks in ((1, slots / (0.8 * 128) + 0.1), (2, slots / (0.8 * 128))):
            kernel = {"name": "x", "launches": 2, "programs": 133, "tiles": 3, "code": code | {"resident": resident}}
            assert counted._compute_s(kernel) == pytest.approx(2 * 2 * 3 * 4096 * clocks / 1.755e9)


def test_the_model_is_made_of_counts():
    """A GEMM's FLOP, what the row kernels issue, every launch; and never below the bound."""
    whole, bounded = (counted.parts(counted.counted(p, "cuda")) for p in (problems.GLOBAL, problems.BOUNDED))
    assert whole.gemms == pytest.approx(counted.bound_ms(problems.GLOBAL) / 0.92)
    slots = static_cuda.committed()["sm_90"]["loss clip bfloat16"]["slots"]
    assert whole.rows == pytest.approx(1e3 * problems.GLOBAL.scores * slots / (0.8 * 132 * 128 * 1.755e9))
    assert whole.launches == pytest.approx(2e-3 * counted.counted(problems.GLOBAL, "cuda")["launches"])
    assert bounded.gemms / whole.gemms == pytest.approx(4 / 3, rel=0.02)
    assert bounded.launches > whole.launches
    assert counted.bound_ms(problems.MOCO) == pytest.approx(2 * 2 * 256 * 65536 * 128 / 790e12 * 1e3)
    every = [(p, backend) for p in BY_LABEL.values() for backend in calls.BACKENDS]
    assert all(counted.time_ms(*one) > counted.bound_ms(one[0]) for one in every)
    assert "**Modelled from counts, not measured**" in counted.table()


@pytest.mark.skipif(_extension.status()[0] is None, reason="the plan of `cuda` is in the kernels")
def test_the_plan_of_every_shape_keeps_its_memory_target():
    """All but the queue's, whose target is that nothing is stored; docs/performance.md says so."""
    over = {p.loss for p in problems.TABLE if p.target is not None and counted.extra_mb(p) > p.target.peak_mb}
    assert over == {"moco_nce"}
    assert counted.extra_mb(problems.BOUNDED) <= 32 * 2**20 / 1e6
    assert all(p.label in counted.memory_table() for p in problems.TABLE)


@pytest.mark.parametrize("p", {p.loss: p for p in problems.TABLE}.values(), ids=lambda p: p.loss)
def test_a_problem_names_the_spec_and_the_gradients_of_its_loss(p, monkeypatch):
    """As the engine sees them when the benchmark calls the loss."""
    seen = []
    choose = dispatch.choose

    def listen(spec, q, k, requested, call=dispatch.ANY_CALL, scale=1.0):
        seen.append((spec, call._replace(shared=k is None, columns=bool(spec.columns))))
        return choose(spec, q, k, requested, call, scale)

    monkeypatch.setattr(dispatch, "choose", listen)
    monkeypatch.setenv("FUSED_NCE_BACKEND", "chunked")  # by the ops, as on a GPU
    tiny = p.tiny()
    formula = formulas.FORMULAS[p.loss]
    rivals.step(rivals.with_backend(formula.ours, None), formula.inputs(tiny, machine.Machine().draw(0, torch.float32)))
    spec, call = seen[0]
    assert spec.code == tiny.spec.code
    assert call.op == "loss"
    asked = problems.CALLS.get(p.loss, Call())._replace(k=not p.rows_alone)
    assert (call.gemms("cuda"), call.gemms("triton")) == (asked.gemms("cuda"), asked.gemms("triton"))


def test_a_full_record_reaches_the_documents():
    """Every problem of a run on a GPU, each taking what the model expects."""
    rows = []
    for p in problems.ALL:
        bound, ms = counted.bound_ms(p), {name: counted.time_ms(p, name) for name in calls.BACKENDS}
        chosen = counted.choice(p)
        others = {name: value for name, value in ms.items() if name != chosen}
        row = made_up(p.label, ms[chosen], 5 * bound, 2 * bound, bound, backends=others)
        rows.append(row | {"ours_backend": chosen, "fastest_backend": min(ms, key=lambda name: ms[name])})
    record = record_of(*rows)
    text = tables.render("<!-- bench:gpu -->\n<!-- /bench -->\n", record, "x.md")
    assert "No GPU figures" in text  # until a record is committed
    text = gpu_tables.block(record)
    assert all(p.label in text for p in problems.TABLE)
    asked = sum(4 + (p.target.graph_ms is not None) for p in problems.TABLE if p.target)
    assert f" of {asked + 1} targets met." in text  # and the slowdown of the bounded one
    assert gpu_tables.report(record).startswith(gpu_tables.card_line(record))
