"""What the model of a GPU's times counts."""

from __future__ import annotations

import pytest
import torch

from bench import static_cuda, tables
from bench.gpu import fit, machine, model, problems, rivals, verdict
from bench.gpu import tables as gpu_tables
from fused_nce import _extension
from fused_nce.bench import formulas
from fused_nce.core import dispatch
from tests.test_bench_gpu import made_up, record_of


def test_the_model_counts_what_each_loss_does():
    """Two-sided statistics: four GEMMs, three row kernels; a queue: two GEMMs; and never below the bound."""
    by_label = {problem.label: problem for problem in problems.TABLE}
    clip = by_label["CLIP 32,768², D 512"]
    issued = sum(static_cuda.committed()["sm_90"][f"{name} shift"] for name in ("fold", "fold_columns"))
    issued += static_cuda.committed()["sm_90"]["weigh shift columns bfloat16"]
    score_ps = 4 * 2 * 512 / (0.92 * 790) + issued / (0.8 * 132 * 128 * 1.755e-3)
    assert model.cuda_ms(clip) == pytest.approx(0.030 + clip.scores * score_ps * 1e-9)
    assert model.bound_ms(problems.MOCO) == pytest.approx(2 * 2 * 256 * 65536 * 128 / 790e12 * 1e3)
    assert all(min(model.cuda_ms(p), model.triton_ms(p)) > model.bound_ms(p) for p in problems.TABLE)
    assert "**Modelled, not measured**" in model.table()
    bounded, whole = model.cuda_parts(problems.BOUNDED), model.cuda_parts(problems.GLOBAL)
    assert bounded.gemms / whole.gemms == pytest.approx(4 / 3)
    assert bounded.rows / whole.rows == pytest.approx(1, rel=0.05)  # its two halves, in kernels of their own


@pytest.mark.skipif(_extension.status()[0] is None, reason="the plan of `cuda` is in the kernels")
def test_the_plan_of_every_shape_keeps_its_memory_target():
    """All but the queue's, whose target is that nothing is stored; docs/performance.md says so."""
    over = {p.loss for p in problems.TABLE if p.target is not None and model.extra_mb(p) > p.target.peak_mb}
    assert over == {"moco_nce"}
    assert model.extra_mb(problems.BOUNDED) <= 32 * 2**20 / 1e6
    assert all(p.label in model.memory_table() for p in problems.TABLE)


@pytest.mark.parametrize("p", {p.loss: p for p in problems.TABLE}.values(), ids=lambda p: p.loss)
def test_a_problem_names_the_spec_and_the_gradients_of_its_loss(p, monkeypatch):
    """As the engine sees them when the benchmark calls the loss."""
    seen = []
    choose = dispatch.choose

    def listen(spec, q, k, requested, call=dispatch.ANY_CALL):
        seen.append((spec, call._replace(shared=k is None, columns=bool(spec.columns))))
        return choose(spec, q, k, requested, call)

    monkeypatch.setattr(dispatch, "choose", listen)
    monkeypatch.setenv("FUSED_NCE_BACKEND", "chunked")  # by the ops, as on a GPU
    tiny = p.tiny()
    formula = formulas.FORMULAS[p.loss]
    rivals.step(lambda *x: formula.ours(*x, None), formula.inputs(tiny, machine.Machine().draw(0, torch.float32)))
    spec, call = seen[0]
    assert spec.code == tiny.spec.code
    assert call.op == "loss"
    assert call.gemms("cuda") == p.call.gemms("cuda")
    assert call.gemms("triton") == p.call.gemms("triton")


def test_a_full_record_reaches_the_documents_and_the_table_of_the_choice():
    """Every problem of a run on a GPU, each taking what the model expects."""
    rows = []
    for p in (*problems.TABLE, *problems.CROSSOVER, *problems.LARGER):
        bound, ms = model.bound_ms(p), {"cuda": model.cuda_ms(p), "triton": model.triton_ms(p)}
        chosen = model.choice(p)
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
    refitted = fit.refit(record | {"cost_times": verdict.cost_times(record)})
    assert refitted["cuda", 2].launch_us == pytest.approx(model.CUDA_US, rel=0.05)
